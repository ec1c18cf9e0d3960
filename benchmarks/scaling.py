"""How time grows with sweeps, batch, width and depth; samples per second; sweeps a depth needs.

    python benchmarks/scaling.py --out runs/scaling

Each axis is varied by itself; the exponent is the slope of log time against log size. Along the
depth (2 to 8 convolutional layers) it is also asked how many sweeps EP needs until its gradient has
a cosine of .99 with the exact one in every layer, at initial weights and without over-relaxation,
which these do not need. Phases are those of the preset mnist, without stragglers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from measure import (
    ALIKE,
    PRESET,
    Gradient,
    compiled,
    deep,
    jitted,
    label_sizes,
    network_at,
    problem,
    timings,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ep_jax as ep
from ep_jax import diagnostics
from ep_jax.files import write_json
from ep_jax.provenance import provenance

METHODS: dict[str, tuple[Gradient, ep.Neuron]] = {
    "EP, rate": (ep.ep_gradient, ep.Rate()),
    "EP, spiking": (ep.ep_gradient, PRESET.neuron),
    "BPTT, rate": (ep.bptt_gradient, ep.Rate()),
}
AXES = {"sweeps": "free", "batch": "batch", "width": "width", "depth": "convolutions"}
"""The number that varies along each axis."""
CANDIDATES = (4, 6, 8, 10, 12, 16, 20, 25, 30, 40, 60, 80, 120)
"""Sweeps of each phase that are tried, fewest first."""


@dataclass(frozen=True)
class Arguments:
    """How time grows with the size of the problem."""

    out: Path
    """Folder for scaling.json and scaling.png."""
    repeats: int = 7
    """Timed calls of each case."""
    quick: bool = False
    """A look: two points an axis, 3 calls, two depths."""


def points(quick: bool) -> Iterator[dict[str, Any]]:
    """What is varied, one thing at a time."""
    usual = {"free": 12, "nudged": 8, "batch": 64, "width": 1.0, "convolutions": 2}
    values: dict[str, tuple[float, ...]] = {
        "sweeps": (12, 24, 48, 96),
        "batch": (1, 4, 16, 64, 256, 1024),
        "width": (0.5, 1.0, 2.0, 4.0),
        "depth": (2, 4, 6, 8),
    }
    for axis, series in values.items():
        for value in (series[0], series[-2]) if quick else series:
            point = {"axis": axis} | usual | {AXES[axis]: value}
            if axis == "sweeps":
                point["nudged"] = int(value) * 2 // 3
            yield point


def time_at(point: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Time of a gradient by each method, taking turns."""
    jax.clear_caches()  # the programs of the points before
    phases = replace(ALIKE, free=point["free"], nudged=point["nudged"])
    calls = {}
    for name, (gradient, neuron) in METHODS.items():
        spec = network_at(point, neuron)
        params, xs, ys = problem(spec, point["batch"])
        made, _ = compiled(jitted(gradient), params, spec, xs, ys, phases)
        calls[name] = lambda made=made, args=(params, xs, ys): made(*args)
    return [
        {"method": name} | point | timing._asdict()
        for name, timing in timings(calls, repeats).items()
    ]


def sweeps_needed(convolutions: int, neuron: ep.Neuron, cosine: float = 0.99) -> int | None:
    """Fewest free and nudged sweeps with this cosine in every layer; ``None``: more than tried."""
    jax.clear_caches()
    spec = deep(convolutions, neuron)
    params, xs, ys = problem(spec, 16)
    exact = jitted_exact(params, spec, xs, ys)
    for sweeps in CANDIDATES:
        phases = replace(ALIKE, free=sweeps, nudged=sweeps, relaxation=1.0)
        grads, _ = jitted(ep.ep_gradient)(params, spec, xs, ys, phases)
        if float(diagnostics.compare(grads, exact).cosine.min()) >= cosine:
            return sweeps
    return None


jitted_exact = jax.jit(diagnostics.exact_gradient, static_argnames=("spec", "phases"))


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log time against log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def run(arguments: Arguments) -> dict[str, Any]:
    """Measure everything, write it, return it."""
    repeats = 3 if arguments.quick else arguments.repeats
    console = Console(stderr=True)
    rows = []
    for point in track(list(points(arguments.quick)), "scaling", console=console):
        rows += time_at(point, repeats)
    depths = (2, 4) if arguments.quick else (2, 3, 4, 5, 6, 7, 8)
    needed = [
        {"convolutions": n, "method": name, "sweeps": sweeps_needed(n, neuron)}
        for n in track(depths, "depth", console=console)
        for name, (gradient, neuron) in METHODS.items()
        if gradient is ep.ep_gradient
    ]
    found = {"rows": rows, "exponents": exponents(rows), "sweeps_needed": needed}
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "scaling.json", found | provenance())
    draw(found).savefig(arguments.out / "scaling.png", dpi=150)
    return found


def line(rows: list[dict[str, Any]], axis: str, method: str) -> tuple[list[float], list[float]]:
    """Sizes and seconds of one method along an axis."""
    chosen = [r for r in rows if (r["axis"], r["method"]) == (axis, method)]
    return [r[AXES[axis]] for r in chosen], [r["seconds"] for r in chosen]


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each method, along each axis."""
    return {
        method: {axis: exponent(*line(rows, axis, method)) for axis in AXES} for method in METHODS
    }


def draw(found: dict[str, Any]) -> Figure:
    """Time along each axis, samples per second, sweeps needed."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for panel, axis in zip(panels, AXES, strict=False):
        for method in METHODS:
            sizes, seconds = line(found["rows"], axis, method)
            slope = found["exponents"][method][axis]
            panel.plot(
                sizes, [1e3 * s for s in seconds], "o-", ms=4, label=f"{method}: {slope:.2f}"
            )
        panel.set(xlabel=axis, ylabel="ms a gradient", xscale="log", yscale="log")
        label_sizes(panel, line(found["rows"], axis, "EP, rate")[0])
        panel.legend(title="exponent", fontsize=8)
    for method in METHODS:
        sizes, seconds = line(found["rows"], "batch", method)
        rate = [n / s for n, s in zip(sizes, seconds, strict=True)]
        panels[4].plot(sizes, rate, "o-", ms=4, label=method)
    panels[4].set(xlabel="batch", ylabel="images a second", xscale="log", yscale="log")
    label_sizes(panels[4], line(found["rows"], "batch", "EP, rate")[0])
    for method in METHODS:
        chosen = [r for r in found["sweeps_needed"] if r["method"] == method and r["sweeps"]]
        if chosen:
            panels[5].plot(
                [r["convolutions"] for r in chosen],
                [r["sweeps"] for r in chosen],
                "o-",
                label=method,
            )
    panels[5].set(xlabel="convolutional layers", ylabel="sweeps a phase for cosine .99", ylim=0)
    for panel in panels[4:]:
        panel.legend(fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure


def table(found: dict[str, Any]) -> Table:
    """Exponents."""
    made = Table(title="time ~ size^exponent")
    for column in ("", *AXES):
        made.add_column(column)
    for method, slopes in found["exponents"].items():
        made.add_row(method, *(f"{slopes[axis]:.2f}" for axis in AXES))
    return made


def main() -> None:
    """Measure, print, write."""
    found = run(tyro.cli(Arguments, description=__doc__))
    console = Console()
    console.print(table(found))
    for row in found["sweeps_needed"]:
        console.print(
            f"{row['convolutions']} convolutions, {row['method']}: {row['sweeps']} sweeps"
        )


if __name__ == "__main__":
    main()
