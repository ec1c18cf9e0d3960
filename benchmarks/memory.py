"""Peak memory of one gradient: EP against BPTT and implicit differentiation.

    python benchmarks/memory.py --out runs/memory

Bytes of temporaries, arguments and results that the compiler reserves, against the number of sweeps
(free and nudged phase alike), batch, width and depth, for rate and for spiking networks; and what
the device itself reports as its peak, where it does. Nothing but the device's own peak needs the
gradients to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from matplotlib.figure import Figure
from measure import (
    PRESET,
    Gradient,
    compiled,
    derived,
    device_peak,
    jitted,
    label_sizes,
    lower_bound,
    memory,
    network_at,
    own_peak,
    rematerialised,
    truncated,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ep_jax as ep
from ep_jax.files import write_json
from ep_jax.provenance import provenance

MIB = 2**20

RULE = "EP, one-sided, displacement, as a derivative rule"
STRAGGLING = ("stragglers", "free_more", "nudged_more")
EP: dict[str, dict[str, Any]] = {
    "EP, one-sided, displacement": {"estimator": "one_sided", "coordinates": "displacement"},
    RULE: {"estimator": "one_sided", "coordinates": "displacement"},
    "EP, random sign, displacement": {"estimator": "random_sign", "coordinates": "displacement"},
    "EP, symmetric, displacement": {"estimator": "symmetric", "coordinates": "displacement"},
    "EP, one-sided, displacement, stragglers": {
        "estimator": "one_sided",
        "coordinates": "displacement",
        **{name: getattr(PRESET.phases, name) for name in ("relaxation", *STRAGGLING)},
    },
    "EP, one-sided": {"estimator": "one_sided", "coordinates": "absolute"},
    "EP, random sign": {"estimator": "random_sign", "coordinates": "absolute"},
    "EP, symmetric": {"estimator": "symmetric", "coordinates": "absolute"},
    "EP, holomorphic": {"estimator": "holomorphic", "coordinates": "absolute"},
}
REVERSE: dict[str, Gradient] = {
    "BPTT": ep.bptt_gradient,
    "BPTT, rematerialised": rematerialised,
    "BPTT, 10 tracked": truncated,
    "implicit": ep.implicit_gradient,
}
MAIN = ("EP, one-sided, displacement", "EP, symmetric", *REVERSE)
"""Methods whose growth with batch, width and depth is measured; all, with the sweeps."""

NEURONS: dict[str, ep.Neuron] = {
    "rate": ep.Rate(),
    "spiking": PRESET.neuron,
}


@dataclass(frozen=True)
class Arguments:
    """Peak memory of one gradient."""

    out: Path
    """Folder for memory.json and memory.png."""
    quick: bool = False
    """A look: two numbers of sweeps, the main methods."""


def points(quick: bool) -> Iterator[dict[str, Any]]:
    """What is varied, one thing at a time."""
    usual = {"sweeps": 50, "batch": 64, "width": 1.0, "convolutions": 2}
    for sweeps in (10, 200) if quick else (10, 100, 200, 1000):
        yield {"axis": "sweeps"} | usual | {"sweeps": sweeps}
    if quick:
        return
    for batch in (16, 64, 256):
        yield {"axis": "batch"} | usual | {"batch": batch}
    for width in (0.5, 1.0, 2.0):
        yield {"axis": "width"} | usual | {"width": width}
    for convolutions in (2, 4, 8):
        yield {"axis": "depth"} | usual | {"convolutions": convolutions}


def measure(method: str, neuron: str, point: dict[str, Any]) -> dict[str, Any]:
    """Bytes of one gradient."""
    jax.clear_caches()  # the programs of the cases before: a process can hold some hundred
    model = NEURONS[neuron]
    if method == "EP, holomorphic":
        model = ep.Rate(activation="tanh")
    spec = network_at(point, model)
    phases = ep.Phases(
        free=point["sweeps"], nudged=point["sweeps"], sweep="ordered", **EP.get(method, {})
    )
    gradient = (REVERSE | {RULE: derived}).get(method, ep.ep_gradient)
    batch = point["batch"]
    params = jax.eval_shape(lambda: ep.init_params(jax.random.key(0), spec))
    xs = jax.ShapeDtypeStruct((batch, *spec.input_shape), jnp.float32)
    ys = jax.ShapeDtypeStruct((batch,), jnp.int32)
    key = jax.random.key(0)
    made, _ = compiled(jitted(gradient), params, spec, xs, ys, phases, key)
    row = {"method": method, "neuron": neuron} | point | memory(made)
    if method in EP:
        row["lower_bound"] = lower_bound(spec, phases, batch)
    if device_peak() is not None:
        given = (ep.init_params(key, spec), *(jnp.zeros(a.shape, a.dtype) for a in (xs, ys)), key)
        row["device_peak"] = own_peak(lambda: made(*given))
    return row


def run(arguments: Arguments) -> dict[str, Any]:
    """Measure everything, write it, return it."""
    cases = [
        (method, neuron, point)
        for point in points(arguments.quick)
        for neuron in NEURONS
        for method in (*EP, *REVERSE)
        if (method in MAIN or (point["axis"] == "sweeps" and not arguments.quick))
        and not (method == "EP, holomorphic" and neuron != "rate")
    ]
    rows = [measure(*case) for case in track(cases, "memory", console=Console(stderr=True))]
    found = {"rows": rows, "claims": claims(rows)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "memory.json", found | provenance())
    draw(rows).savefig(arguments.out / "memory.png", dpi=150)
    return found


def claims(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers behind "constant memory"."""
    along = [r for r in rows if r["axis"] == "sweeps"]

    def of(method: str, neuron: str) -> dict[int, int]:
        return {
            r["sweeps"]: r["temporary"]
            for r in along
            if (r["method"], r["neuron"]) == (method, neuron)
        }

    found = {}
    for r in along:
        if "lower_bound" in r:
            name = f"{r['method']}, {r['neuron']}: temporary / lower bound"
            found[name] = max(found.get(name, 0.0), r["temporary"] / r["lower_bound"])
    for neuron in NEURONS:
        if rule := of(RULE, neuron):
            plain = of(MAIN[0], neuron)
            found[f"derivative rule / ep_gradient, {neuron}"] = max(
                rule[sweeps] / plain[sweeps] for sweeps in rule
            )
        for method in EP:
            if sizes := of(method, neuron).values():
                found[f"{method}, {neuron}: largest / smallest over sweeps"] = max(sizes) / min(
                    sizes
                )
        for method in ("BPTT", "BPTT, rematerialised"):
            ratio = of(method, neuron)[200] / of(MAIN[0], neuron)[200]
            found[f"{method} / EP, T = 200, {neuron}"] = ratio
    return found


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Temporary memory along each axis; EP's lower bound beside it."""
    axes_of = {"sweeps": "sweeps", "batch": "batch", "width": "width", "depth": "convolutions"}
    there = [axis for axis in axes_of if any(r["axis"] == axis for r in rows)]
    figure = Figure(figsize=(3.6 * len(there) + 1.5, 6), layout="constrained")
    panels = figure.subplots(len(NEURONS), len(there), squeeze=False, sharey="col")
    for i, neuron in enumerate(NEURONS):
        for j, axis in enumerate(there):
            panel = panels[i, j]
            for k, method in enumerate(MAIN):
                line = sorted(
                    (r[axes_of[axis]], r["temporary"] / MIB, r.get("lower_bound"))
                    for r in rows
                    if (r["method"], r["neuron"]) == (method, neuron) and r["axis"] == axis
                )
                xs, ys, bounds = zip(*line, strict=True)
                panel.plot(xs, ys, "o-", color=f"C{k}", label=method, ms=4)
                if method == MAIN[0]:
                    lowest = [b / MIB for b in bounds]
                    panel.plot(xs, lowest, "k--", lw=1, label="lower bound of EP, one-sided")
            panel.set(title=f"{neuron}", xlabel=axis, xscale="log", yscale="log")
            label_sizes(panel, (r[axes_of[axis]] for r in rows if r["axis"] == axis))
            panel.grid(alpha=0.3)
        panels[i, 0].set_ylabel("temporary memory, MiB")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def table(found: dict[str, Any]) -> Table:
    """The claims."""
    made = Table(title="memory of one gradient")
    made.add_column("")
    made.add_column("ratio", justify="right")
    for name, value in found["claims"].items():
        made.add_row(name, f"{value:.3f}")
    return made


def main() -> None:
    """Measure, print, write."""
    Console().print(table(run(tyro.cli(Arguments, description=__doc__))))


if __name__ == "__main__":
    main()
