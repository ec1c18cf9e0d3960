"""The quality of EP's gradient against sweeps, time and spikes.

    python experiments/frontier.py --runs runs/frontier --out results/frontier \\
        --weights runs/mnist10

--weights adds those of a long training. It is about weak feedback: networks as of the preset
mnist_weak, with the sweeps and the code that were the preset's when the study was made.

Every point is the agreement of one gradient with the exact one (of the rate network with the same
parameters, at its fixed point, in float64) on batches of MNIST validation images. Weights of each
feedback strength are trained as rate networks, so that no neuron model is favoured. The study is
docs/studies/frontier.md.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import jax
import numpy as np
import tyro
from common import (
    STUDIED,
    Journal,
    agreements,
    exact_gradients,
    in_float64,
    learn,
    plain,
    validation_batches,
)
from matplotlib.figure import Figure
from rich.console import Console

import ep_jax as ep
from ep_jax.checkpoint import to_json, write_json
from ep_jax.data import Dataset, load
from ep_jax.diagnostics import spikes_per_neuron
from ep_jax.presets import PRESETS, spec_of
from ep_jax.run import provenance

Precision: TypeAlias = Literal["float64", "float32", "bfloat16"]

PRESET = PRESETS["mnist_weak"]
QUICK = replace(PRESET.phases, free=9, nudged=6)
"""The sweeps of the code that is called preset below."""
BASE = replace(QUICK, free=12, nudged=8, sweep="alternating")
"""Where nothing else is said: sweeps that suit rate and spiking networks alike."""
SWEEPS = ((4, 3), (6, 4), (8, 6), (12, 8), (16, 12), (25, 12), (40, 16))
RATE = ep.Rate()
DELTA = ep.DeltaCode(quantum=0.5, decay=0.65, lag=2.0, nudged_quantum=0.7, nudged_decay=0.6)
"""A delta code that suits `BASE`; `STUDIED` suits ordered sweeps."""
CLOSED = replace(DELTA, leak=True, quantum=0.9, decay=0.85)
OPEN = PRESETS["mnist_sigma_delta_weak"].sigma_delta
NEURONS: dict[str, ep.Neuron] = {
    "rate": RATE,
    "delta code": DELTA,
    "sigma-delta, closed loop": CLOSED,
    "sigma-delta, open loop": OPEN,
}
SCHEDULES: dict[str, ep.Neuron] = {
    **{
        f"delta code, quantum {q}, decay {d}": replace(DELTA, quantum=q, decay=d)
        for q, d in ((0.7, 0.6), (0.7, 0.65), (0.5, 0.6), (0.5, 0.65), (0.5, 0.7), (0.5, 0.75))
    },
    **{f"delta code, lag {lag}": replace(DELTA, lag=lag) for lag in (0.0, 1.0, 3.0)},
    **{
        f"delta code, nudged quantum {q}, decay {d}": replace(
            DELTA, nudged_quantum=q, nudged_decay=d
        )
        for q, d in ((0.5, 0.5), (0.7, 0.5), (0.7, 0.6), (1.0, 0.6), (0.2, 0.5))
    },
    **{
        f"closed loop, quantum {q}, decay {d}": replace(CLOSED, quantum=q, decay=d)
        for q, d in ((0.7, 0.75), (0.7, 0.8), (0.9, 0.8), (0.9, 0.85), (0.9, 0.9))
    },
    **{
        f"open loop, lam power {p}, floor {f}": replace(OPEN, lam_power=p, lam_floor=f)
        for p, f in ((0.9, 0.1), (0.75, 0.1), (0.6, 0.1), (0.75, 0.05), (0.6, 0.05))
    },
}
"""Schedules of quanta and leaks, alternating sweeps."""
ORDERED: dict[str, ep.Neuron] = {
    "preset": STUDIED,
    **{
        f"ordered, {', '.join(f'{k} {v}' for k, v in change.items())}": replace(STUDIED, **change)
        for change in (
            {"decay": 0.5},
            {"decay": 0.55},
            {"decay": 0.65},
            {"lag": 0.0},
            {"lag": 2.0},
            {"nudged_decay": 0.4},
            {"nudged_decay": 0.6},
            {"nudged_quantum": 1.0},
        )
    },
}
"""The preset's code of then and its neighbours, at its sweeps."""
ORDERED_SWEEPS = ((6, 4), (8, 5), (9, 6), (10, 6), (12, 8))


@dataclass(frozen=True)
class Arguments:
    """The quality of EP's gradient against sweeps, time and spikes."""

    runs: Path
    """Folder for trained weights and the rows measured so far: an interrupted command goes on."""
    out: Path
    """Folder for frontier.json and the figures."""
    weights: Path | None = None
    """Folder with the weights of a long training of the preset mnist_weak, which are added."""
    feedbacks: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03)
    """Feedback strengths."""
    early: int = 100
    """Optimisation steps of the weights early in training."""
    late: int = 860
    """Optimisation steps of the weights late in training: 860 are an epoch."""
    batches: int = 3
    """Number of batches of 64 images."""
    data_dir: str | None = None
    """Where MNIST lies; by default TFDS_DATA_DIR."""


@dataclass(frozen=True)
class Subject:
    """Weights whose gradients are measured."""

    age: str
    feedback: float
    params: ep.Params
    exact: list[ep.Params]
    xs: np.ndarray
    ys: np.ndarray


def subjects(arguments: Arguments, data: Dataset) -> Iterator[Subject]:
    """The weights of a long training, and those early and late for each feedback strength."""
    xs, ys = validation_batches(data, arguments.batches, 64)

    def subject(age: str, feedback: float, params: ep.Params) -> Subject:
        exact = exact_gradients(params, _spec(feedback, RATE), xs, ys)
        return Subject(age, feedback, params, exact, xs, ys)

    if arguments.weights is not None:
        params, spec, _ = ep.load_weights(arguments.weights)
        if spec != _spec(spec.feedback, spec.neuron):
            raise ValueError(f"weights of {arguments.weights} are of another network; expected the "
                             "preset mnist_weak's")  # fmt: skip
        yield subject("long", spec.feedback, params)
    for feedback in arguments.feedbacks:
        for age, steps in (("early", arguments.early), ("late", arguments.late)):
            folder = arguments.runs / f"feedback{feedback:g}-{steps}"
            if not folder.exists():
                _train(feedback, steps, data, folder)
            yield subject(age, feedback, ep.load_weights(folder)[0])


def _train(feedback: float, steps: int, data: Dataset, folder: Path) -> None:
    """Train a rate network and save its weights."""
    spec = _spec(feedback, RATE)
    free = 25 if feedback > 0.5 else 12
    phases = replace(BASE, beta=1e-3, free=free, nudged=16)
    params, _ = learn(
        spec,
        phases,
        ep.ep_gradient,
        data,
        steps=steps,
        learning_rate=PRESET.learning_rate,
        weight_decay=PRESET.weight_decay,
        gain=PRESET.gain,
    )
    ep.save_weights(folder, params, spec, phases)


def _spec(feedback: float, neuron: ep.Neuron) -> ep.NetworkSpec:
    return replace(spec_of(PRESET, (28, 28, 1), 10), feedback=feedback, neuron=neuron)


def measure(
    subject: Subject,
    neuron: ep.Neuron,
    phases: ep.Phases,
    precision: Precision = "float32",
) -> dict[str, Any]:
    """Agreement, spikes and time of one gradient."""
    spec = _spec(subject.feedback, neuron)
    if precision == "bfloat16":
        phases = replace(phases, nudged_signals="bfloat16")
    with jax.enable_x64(precision == "float64"):
        cast = in_float64 if precision == "float64" else lambda tree: tree
        params, xs = cast((subject.params, subject.xs))
        gradient = jax.jit(
            lambda params, xs, ys, key: ep.ep_gradient(params, spec, xs, ys, phases, key)
        )
        found, info = agreements(gradient, params, xs, subject.ys, subject.exact)
        times = []
        for _ in range(9):
            began = time.perf_counter()
            jax.block_until_ready(gradient(params, xs[0], subject.ys[0], jax.random.key(0)))
            times.append(time.perf_counter() - began)
    assert info.nudged is not None
    return {
        **found._asdict(),
        "spikes_free": spikes_per_neuron(spec, info.free.spikes),
        "spikes_nudged": spikes_per_neuron(spec, info.nudged.spikes),
        "spikes_nudged_per_layer": np.stack(info.nudged.spikes),
        "residual_free": float(info.free.residual),
        "seconds": min(times),  # other work on the machine only ever adds
    }


def study(subject: Subject, journal: Journal) -> None:
    """All measurements of one subject."""

    def take(
        part: str,
        what: str,
        neuron: ep.Neuron,
        precision: Precision = "float32",
        **settings: Any,
    ) -> None:
        phases = replace(BASE, **settings)
        names = ("free", "nudged", "sweep", "beta", "coordinates")
        key = {"part": part, "what": what, "age": subject.age, "feedback": subject.feedback}
        key |= {"precision": precision} | {name: getattr(phases, name) for name in names}
        row = journal.row(key, lambda: measure(subject, neuron, phases, precision))
        cosines = np.round(_cosines(row), 4)
        print(
            *key.values(),
            f"cosines {cosines} norm {np.mean(row['total_norm_ratio']):.3f} spikes "
            f"{row['spikes_free']:.2f} + {row['spikes_nudged']:.3f} {1e3 * row['seconds']:.0f} ms",
            flush=True,
        )

    for name, neuron in NEURONS.items():
        for free, nudged in SWEEPS:
            if name == "rate" or (free > 8 and subject.age != "early"):
                take("sweeps", name, neuron, free=free, nudged=nudged)
    if subject.age == "early" or (subject.age == "late" and subject.feedback != 0.1):
        return
    for order in ("synchronous", "ordered"):
        for free, nudged in SWEEPS[:5]:
            take("order", "rate", RATE, free=free, nudged=nudged, sweep=order)
    for free, nudged in ORDERED_SWEEPS:
        take("order", "preset", STUDIED, free=free, nudged=nudged, sweep="ordered")
        take("order", "delta code", DELTA, free=free, nudged=nudged, sweep="alternating")
    for name, neuron in SCHEDULES.items():
        free = BASE.free if name.startswith("delta") else 20 if "closed" in name else 25
        take("schedules", name, neuron, free=free)
    for name, neuron in ORDERED.items():
        take("schedules", name, neuron, free=QUICK.free, nudged=QUICK.nudged, sweep=QUICK.sweep)
    for coordinates in ("absolute", "displacement"):
        for precision in get_args(Precision):
            for beta in (1e-1, 1e-3, 1e-5):
                settled = {"free": 40, "nudged": 30, "beta": beta, "coordinates": coordinates}
                take("precision", "rate", RATE, precision, **settled)
    for beta in (0.3, 0.1, 0.03, 0.01):
        take("beta", "delta code", DELTA, beta=beta)


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """The figures."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    rate = [r for r in rows if r["part"] == "sweeps" and r["what"] == "rate"]
    for axis, age in zip(axes[:2], ("early", "late"), strict=True):
        for i, feedback in enumerate(sorted({r["feedback"] for r in rate}, reverse=True)):
            line = [r for r in rate if (r["feedback"], r["age"]) == (feedback, age)]
            if line:
                axis.plot(
                    [r["free"] + r["nudged"] for r in line],
                    [_miss(r) for r in line],
                    "o-",
                    color=f"C{i}",
                    label=f"feedback {feedback:g}",
                )
        axis.set(xlabel="sweeps, free + nudged", title=f"rate, {age} in training")
    for feedback, style in ((1.0, "--"), (0.1, "-")):
        for i, name in enumerate(NEURONS):
            line = [
                r
                for r in rows
                if (r["part"], r["what"], r["age"], r["feedback"])
                == ("sweeps", name, "late", feedback)
            ]
            label = name if feedback == 0.1 else None
            axes[2].plot(
                [1e3 * r["seconds"] for r in line],
                [_miss(r) for r in line],
                "o" + style,
                color=f"C{i}",
                label=label,
            )
    axes[2].set(
        xlabel="ms a gradient, 64 images",
        title="late; feedback .1, dashed: 1",
    )
    axes[0].set(ylabel="1 - cosine, worst layer")
    for axis in axes:
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(out / "sweeps.png", dpi=150)

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ages = [age for age in ("late", "long") if any(r["age"] == age for r in rows)]
    for i, name in enumerate(NEURONS):
        for age, style in zip(ages, ("o-", "s--"), strict=False):
            line = [
                r
                for r in rows
                if (r["part"], r["what"], r["age"]) == ("sweeps", name, age)
                and (age == "long" or r["feedback"] == 0.1)
            ]
            if name != "rate":
                left.plot(
                    [r["spikes_free"] + r["spikes_nudged"] for r in line],
                    [_miss(r) for r in line],
                    style,
                    color=f"C{i}",
                    label=f"{name}, {age}",
                )
    left.set(
        xlabel="spikes a neuron, free + nudged phase",
        ylabel="1 - cosine, worst layer",
        yscale="log",
    )
    left.legend(fontsize=8)
    for i, precision in enumerate(("float64", "float32", "bfloat16")):
        for coordinates, style in (("displacement", "o-"), ("absolute", "s--")):
            line = [
                r
                for r in rows
                if (r["part"], r["precision"], r["coordinates"], r["age"])
                == ("precision", precision, coordinates, ages[-1])
            ]
            right.plot(
                [r["beta"] for r in line],
                [max(_miss(r), 1e-12) for r in line],
                style,
                color=f"C{i}",
                label=f"{precision}, {coordinates}",
            )
    right.set(xlabel="beta", xscale="log", yscale="log", title=f"rate, settled, {ages[-1]} weights")
    right.legend(fontsize=8, loc=(0.45, 0.55))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(out / "spikes_and_precision.png", dpi=150)


def _cosines(row: dict[str, Any]) -> np.ndarray:
    """Cosine of each layer, mean over batches; 0 where the estimate is nothing at all."""
    return np.nan_to_num(np.asarray(row["cosine"], float)).mean(0)


def _miss(row: dict[str, Any]) -> float:
    """One minus the cosine of the worst layer."""
    return float(np.max(1 - _cosines(row)))


def main() -> None:
    """Train, measure, draw, write."""
    try:
        arguments = tyro.cli(Arguments, description=__doc__)
        data = load("mnist", data_dir=arguments.data_dir)
        journal = Journal(arguments.runs / "frontier.jsonl")
        for subject in subjects(arguments, data):
            study(subject, journal)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"frontier.py: error: {error}")
    made = provenance()  # before files of the checkout change
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(journal.rows, arguments.out)
    statement = dataclasses.asdict(arguments)
    del statement["runs"], statement["out"], statement["data_dir"]
    statement["weights"] = None if arguments.weights is None else arguments.weights.name
    statement["phases"] = to_json(BASE)
    named = NEURONS | SCHEDULES | ORDERED
    statement["neurons"] = {name: to_json(n) for name, n in named.items()}
    rows = {"rows": journal.rows}
    write_json(arguments.out / "frontier.json", plain(statement) | rows | made)
    Console().print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
