"""Time of a gradient and of a training step: EP against BPTT, backprop and PyTorch.

What a training step is made of is timed apart, all of it in one run and on one device: the
gradients of feed-forward backprop and of EP at feedback 1 and in the feed-forward limit, each
alone; the optimisers; the augmentation. Weights are random: what a gradient costs does not depend
on them, since even the stragglers are a fixed share of the batch.

    python benchmarks/speed.py --out runs/speed
    python benchmarks/speed.py --out runs/speed --devices 2

Network 32C5-P2-64C5-P2-FC128-FC10 on 28 x 28 inputs. Compile time is apart; times are medians of
calls that take turns and wait for their results. Operations are the multiplications and additions
of the products that are made, counted from the specification; their rate is compared with that of
a large float32 product in the same run.

PyTorch (``pip install -e '.[peer]'``) is timed where it is installed: EP and truncated BPTT of the
same network, phases and parameters, whose gradients are held against ours before the clock starts.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from matplotlib.figure import Figure
from measure import (
    ALIKE,
    LAYERS,
    PRESET,
    RATE,
    SPIKING,
    STEPS,
    TEXTBOOK,
    Gradient,
    Timing,
    bptt_operations,
    compiled,
    derived,
    divided,
    ep_operations,
    feedforward_operations,
    implicit_operations,
    jitted,
    matmul_call,
    matmul_rate,
    problem,
    rematerialised,
    timings,
    training_steps,
    truncated,
)
from rich.console import Console
from rich.table import Table

import ep_jax as ep
from ep_jax import training
from ep_jax.devices import divide_cpu
from ep_jax.files import write_json
from ep_jax.gradients.feedforward import feedforward_gradient
from ep_jax.loop import optimizer_of
from ep_jax.presets import PRESETS, Config, spec_of
from ep_jax.provenance import provenance


@dataclass(frozen=True)
class Arguments:
    """Time of a gradient and of a training step."""

    out: Path
    """Folder for speed.json and speed.png."""
    batch: int = 64
    """Images in a batch."""
    repeats: int = 15
    """Timed calls of each case."""
    devices: int = 1
    """Devices among which each batch is divided; a core of a CPU can be one."""
    quick: bool = False
    """A look: 3 calls, and only the main cases."""


class Case(NamedTuple):
    """A gradient to time, with the operations it needs."""

    gradient: Gradient
    spec: ep.NetworkSpec
    phases: ep.Phases
    operations: int


def gradients(batch: int, quick: bool) -> dict[str, Case]:
    """Gradients of the textbook's network and phases, and of the spiking preset."""
    plain = tuple(replace(c, fold=False) if isinstance(c, ep.Conv) else c for c in LAYERS)
    unfolded = replace(RATE, layers=plain)
    code = PRESET.phases
    tracked = bptt_operations(RATE, TEXTBOOK, batch, 10)
    full = bptt_operations(RATE, TEXTBOOK, batch)
    cases = {
        "EP": Case(ep.ep_gradient, RATE, TEXTBOOK, ep_operations(RATE, TEXTBOOK, batch)),
        "BPTT, 10 tracked": Case(truncated, RATE, TEXTBOOK, tracked),
        "delta code EP (preset mnist)": Case(
            ep.ep_gradient, SPIKING, code, ep_operations(SPIKING, code, batch)
        ),
        "delta code EP (preset mnist), as a derivative rule": Case(
            derived, SPIKING, code, ep_operations(SPIKING, code, batch)
        ),
    }
    if quick:
        return cases
    return cases | {
        "EP, pool not folded": Case(
            ep.ep_gradient, unfolded, TEXTBOOK, ep_operations(unfolded, TEXTBOOK, batch)
        ),
        "BPTT": Case(ep.bptt_gradient, RATE, TEXTBOOK, full),
        # Once more forward, less the products with zeros that only the first pass leaves out.
        "BPTT, rematerialised": Case(rematerialised, RATE, TEXTBOOK, full * 4 // 3),
        f"implicit, {TEXTBOOK.nudged} sweeps of the adjoint": Case(
            functools.partial(ep.implicit_gradient, max_sweeps=TEXTBOOK.nudged),
            RATE,
            TEXTBOOK,
            implicit_operations(RATE, TEXTBOOK, batch, TEXTBOOK.nudged),
        ),
        "delta code BPTT (free phase of preset mnist)": Case(
            ep.bptt_gradient, SPIKING, ALIKE, bptt_operations(SPIKING, ALIKE, batch)
        ),
    }


BACKPROP = "feed-forward backprop"
EP_PRESETS = {
    "rate EP (preset mnist_rate)": "mnist_rate",
    "delta code EP (preset mnist)": "mnist",
    "rate EP, weak (preset mnist_rate_weak)": "mnist_rate_weak",
    "delta code EP, weak (preset mnist_weak)": "mnist_weak",
}
WHOLE = (BACKPROP, "rate EP (preset mnist_rate)", "delta code EP (preset mnist)")
"""Of these whole training steps are timed as well."""
OF_A_STEP = "gradient of a training step"
"""Its rows are timed on one device, as those of the optimisers and the augmentation."""


def steps(batch: int) -> dict[str, Case]:
    """What to hold against feed-forward backprop of the same layers."""
    cases = {
        BACKPROP: Case(feedforward_gradient, RATE, TEXTBOOK, feedforward_operations(RATE, batch))
    }
    for name, preset in EP_PRESETS.items():
        config = PRESETS[preset]
        spec = spec_of(config, RATE.input_shape, 10)
        cases[name] = Case(
            ep.ep_gradient, spec, config.phases, ep_operations(spec, config.phases, batch)
        )
    return cases


def prepare(case: Case, batch: int, devices: int) -> tuple[Callable[[], Any], float]:
    """A call of a compiled gradient, and the seconds of its compilation."""
    params, xs, ys = divided(problem(case.spec, batch), devices)
    made, took = compiled(jitted(case.gradient), params, case.spec, xs, ys, case.phases)
    return lambda: made(params, xs, ys), took


OPTIMIZERS = {
    "Muon": PRESET,
    "Muon, links capped": replace(PRESET, cap=0.72),
    "AdamW": PRESETS["mnist_weak"],
}


def prepare_optimizer(config: Config) -> tuple[Callable[[], Any], float]:
    """A call of one optimisation step, its gradient given."""
    optimizer = optimizer_of(config, RATE, 1000)
    state = training.init_train_state(jax.random.key(0), RATE, optimizer, config.gain)
    grads = ep.init_params(jax.random.key(1), RATE, 1e-3)

    def step(grads: ep.Params, opt_state: Any, params: ep.Params) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    given = (grads, state.opt_state, state.params)
    made, took = compiled(jax.jit(step), *given)
    return lambda: made(*given), took


def prepare_augmentation(batch: int) -> tuple[Callable[[], Any], float]:
    """A call of the preset's augmentation of a batch."""
    varied = jax.jit(lambda key, xs: training.augment(key, xs, PRESET.augmentation))
    given = (jax.random.key(0), problem(RATE, batch).xs)
    made, took = compiled(varied, *given)
    return lambda: made(*given), took


def peer_calls(batch: int) -> dict[str, Callable[[], Any]]:
    """PyTorch's gradients, equal to ours; empty where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import peer

    params, xs, ys = problem(RATE, batch)
    # In float64: in float32 the difference of two nearly equal states leaves three digits.
    with jax.enable_x64(True):
        doubled, some = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, xs[:4]))
        theirs = peer.Peer(doubled, RATE, some, ys[:4])
        for ours, other in (
            (ep.ep_gradient, theirs.ep_gradient(TEXTBOOK)),
            (truncated, theirs.bptt_gradient(TEXTBOOK, 10)),
        ):
            grads, _ = jitted(ours)(doubled, RATE, some, ys[:4], TEXTBOOK)
            peer.check_equal(grads, theirs.as_params(other))
    return peer.calls(params, RATE, xs, ys, TEXTBOOK)


def run(arguments: Arguments) -> dict[str, Any]:
    """Measure everything, write it, return it."""
    batch, repeats = arguments.batch, 3 if arguments.quick else arguments.repeats
    peers = peer_calls(batch)
    calls, rows = {"matmul": matmul_call()}, {}

    def add(part: str, name: str, call: Callable[[], Any], **row: Any) -> None:
        calls[f"{part}: {name}"] = call
        rows[f"{part}: {name}"] = {"part": part, "name": name, "sweeps": "–"} | row

    def counted(case: Case, took: float) -> dict[str, Any]:
        row: dict[str, Any] = {"compile_seconds": took, "operations": case.operations}
        return row if case.gradient is feedforward_gradient else row | {"sweeps": sweeps_of(case)}

    for name, case in gradients(batch, arguments.quick).items():
        call, took = prepare(case, batch, arguments.devices)
        add("gradient", name, call, **counted(case, took))
    parts = steps(batch)
    for name, case in parts.items():
        call, took = prepare(case, batch, devices=1)
        add(OF_A_STEP, name, call, **counted(case, took))
    for name, config in OPTIMIZERS.items():
        call, took = prepare_optimizer(config)
        add("optimiser", name, call, compile_seconds=took)
    call, took = prepare_augmentation(batch)
    add("augmentation", "preset mnist", call, compile_seconds=took)
    for name in WHOLE:
        config, case = PRESETS[EP_PRESETS.get(name, "mnist_backprop")], parts[name]
        program = training_steps(config, case.gradient, batch, arguments.devices)
        counts = counted(case, program.compile_seconds)
        add("training step", name, program, per_call=STEPS, **counts)
    calls |= {f"gradient: {name}": call for name, call in peers.items()}
    rows |= {f"gradient: {name}": {"part": "gradient", "name": name} for name in peers}
    measured = timings(calls, repeats)
    rate = matmul_rate(measured.pop("matmul"))
    for name, timing in measured.items():
        rows[name] |= scaled(timing, rows[name].pop("per_call", 1))
        if "operations" in rows[name]:
            achieved = rows[name]["operations"] / rows[name]["seconds"]
            rows[name]["of_matmul"] = achieved / rate
    found = {
        "batch": batch,
        "devices": arguments.devices,
        "matmul_rate": rate,
        "rows": list(rows.values()),
        "ratios": ratios(rows),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "speed.json", found | provenance())
    draw(found).savefig(arguments.out / "speed.png", dpi=150)
    return found


def sweeps_of(case: Case) -> str:
    """Sweeps of both phases; in brackets those that the stragglers make beyond."""
    phases = case.phases
    counts = ((phases.free, phases.free_more), (phases.nudged, phases.nudged_more))
    return "/".join(f"{all_} (+{more})" if more else str(all_) for all_, more in counts)


def scaled(timing: Timing, many: int) -> dict[str, float]:
    """The time of one of `many` that a call makes."""
    return {name: value / many for name, value in timing._asdict().items()}


def ratios(rows: dict[str, Any]) -> dict[str, float | None]:
    """The ratios that matter, from one run."""

    def ratio(above: str, below: str) -> float | None:
        if above not in rows or below not in rows:
            return None
        return rows[above]["seconds"] / rows[below]["seconds"]

    alone = {name: ratio(f"{OF_A_STEP}: {name}", f"{OF_A_STEP}: {BACKPROP}") for name in EP_PRESETS}
    code = "training step: delta code EP (preset mnist)"
    rule = "gradient: delta code EP (preset mnist)"
    return {
        "PyTorch EP / EP": ratio("gradient: PyTorch, EP", "gradient: EP"),
        "BPTT / PyTorch BPTT, 10 tracked": ratio(
            "gradient: BPTT, 10 tracked", "gradient: PyTorch, BPTT, 10 tracked"
        ),
        "derivative rule / ep_gradient": ratio(f"{rule}, as a derivative rule", rule),
        "not folded / folded": ratio("gradient: EP, pool not folded", "gradient: EP"),
        **{f"{name} / backprop": value for name, value in alone.items()},
        "optimiser (Muon) / training step (preset mnist)": ratio("optimiser: Muon", code),
    }


def table(found: dict[str, Any]) -> Table:
    """What a reader wants to see."""
    batch = f"batch {found['batch']}; gradient, training step: {found['devices']} devices, else 1"
    title = f"{batch}; matmul {found['matmul_rate'] / 1e9:.0f} GFLOP/s"
    made = Table(title=title)
    for column in ("", "", "sweeps", "ms", "quartiles", "GFLOP", "of matmul", "compile s"):
        made.add_column(column, justify="right" if column else "left")
    for row in found["rows"]:
        counted = "operations" in row
        made.add_row(
            row["part"],
            row["name"],
            row.get("sweeps", "50/10"),
            f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['low']:.1f}-{1e3 * row['high']:.1f}",
            f"{row['operations'] / 1e9:.1f}" if counted else "",
            f"{row['of_matmul']:.0%}" if counted else "",
            f"{row['compile_seconds']:.1f}" if counted else "",
        )
    return made


def draw(found: dict[str, Any]) -> Figure:
    """Bars, on a logarithmic axis."""
    rows = found["rows"][::-1]
    figure = Figure(figsize=(8, 0.35 * len(rows) + 1), layout="constrained")
    axis = figure.subplots()
    parts = list(dict.fromkeys(r["part"] for r in found["rows"]))
    colours = {part: f"C{i}" for i, part in enumerate(parts)}
    bars = axis.barh(
        [f"{r['part']}: {r['name']}" for r in rows],
        [1e3 * r["seconds"] for r in rows],
        color=[colours[r["part"]] for r in rows],
    )
    axis.bar_label(bars, fmt=lambda ms: f"{ms:.3g}" if ms < 100 else f"{ms:.0f}", padding=3)
    axis.margins(x=0.2)
    axis.set(xlabel=f"ms, batch {found['batch']}", xscale="log")
    axis.grid(alpha=0.3, axis="x")
    return figure


def main() -> None:
    """Measure, print, write."""
    arguments = tyro.cli(Arguments, description=__doc__)
    divide_cpu(arguments.devices)
    found = run(arguments)
    console = Console()
    console.print(table(found))
    for name, value in found["ratios"].items():
        if value is not None:
            console.print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
