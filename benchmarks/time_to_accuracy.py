"""Seconds, epochs, operations and spikes until the validation error stays below a target.

    python benchmarks/time_to_accuracy.py --out runs/time_to_accuracy

Below 1 % on MNIST (9 % on FashionMNIST). Every method trains from scratch, by the optimiser of its
preset, with a cosine schedule over its own number of epochs. The validation error is taken after
every dispatch, outside the clock; compile time is apart. "Stays" means: below at that evaluation
and at all later ones of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from measure import PRESET, TEXTBOOK, Gradient, compiled, ep_operations, feedforward_operations
from rich.console import Console
from rich.table import Table

import ep_jax as ep
from ep_jax import training
from ep_jax.data import Dataset, load
from ep_jax.devices import divide_cpu, placements
from ep_jax.diagnostics import spikes_per_neuron
from ep_jax.files import write_json
from ep_jax.gradients.feedforward import feedforward_gradient
from ep_jax.loop import optimizer_of
from ep_jax.presets import PRESETS, Config, spec_of
from ep_jax.provenance import provenance
from ep_jax.training import Augmentation

TARGETS = {"mnist": 1.0, "fashion_mnist": 9.0}
"""Per cent of the validation images."""
AUGMENTATION = {"mnist": Augmentation(shift=1), "fashion_mnist": Augmentation()}
"""A short training has no use for as much variation as the presets' long ones."""


@dataclass(frozen=True)
class Arguments:
    """Time until the validation error stays below a target."""

    out: Path
    """Folder for time_to_accuracy.json and the figure."""
    datasets: tuple[str, ...] = ("mnist", "fashion_mnist")
    """mnist, fashion_mnist."""
    quick: bool = False
    """A look: a fifth of an epoch of each method, on MNIST."""
    seed: int = 0
    """Seed of weights, order of the images and augmentation."""
    devices: int = 1
    """Devices among which each batch is divided; a core of a CPU can be one."""
    data_dir: str | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""


@dataclass(frozen=True)
class Contestant:
    """A method and its budget."""

    config: Config
    gradient: Gradient
    operations: Callable[[ep.NetworkSpec, ep.Phases, int], int]
    answer: ep.Phases
    """How it answers: sweeps of the evaluation."""


def contestants(dataset: str) -> dict[str, Contestant]:
    """The presets of a dataset, the published schedule by AdamW, and feed-forward backprop.

    On both datasets with the small network of MNIST, with which all of them finish in minutes.
    """
    short: dict[str, Any] = {
        "epochs": 3 if dataset == "mnist" else 10,
        "augmentation": AUGMENTATION[dataset],
        **{name: getattr(PRESET, name) for name in ("kernels", "padding", "hidden")},
    }
    spiking, rate, weak, weak_rate = (
        replace(PRESETS[f"{dataset}{kind}"], **short)
        for kind in ("", "_rate", "_weak", "_rate_weak")
    )
    textbook = replace(weak_rate, feedback=1.0, phases=TEXTBOOK, epochs=3)
    once = ep.Phases(free=1, sweep="ordered")
    found = {
        name: Contestant(config, ep.ep_gradient, ep_operations, config.phases)
        for name, config in {
            "spiking EP (preset)": spiking,
            "rate EP (preset)": rate,
            "spiking EP, feedback .002 (preset)": weak,
            "rate EP, feedback 1, T = 50/10": textbook,
        }.items()
    }
    return found | {
        "feed-forward backprop": Contestant(
            rate,
            feedforward_gradient,
            lambda spec, phases, batch: feedforward_operations(spec, batch),
            once,
        ),
    }


def race(
    contestant: Contestant, data: Dataset, seed: int, devices: int, most_steps: int | None
) -> dict[str, Any]:
    """The curve of one training: seconds, validation error, operations and spikes so far."""
    place = placements(devices)
    config = contestant.config
    spec = spec_of(config, data.train_images.shape[1:], data.classes)
    rng = np.random.default_rng(seed)
    plan = [
        training.epoch_batches(rng, len(data.train_images), config.batch, config.steps_per_dispatch)
        for _ in range(config.epochs)
    ]
    dispatches = np.concatenate(plan)
    optimizer = optimizer_of(config, spec, dispatches.shape[0] * dispatches.shape[1])
    keys = jax.random.split(jax.random.key(seed))
    state = training.init_train_state(keys[0], spec, optimizer, config.gain)
    steps = training.make_train_steps(
        spec,
        config.phases,
        optimizer,
        augmentation=config.augmentation,
        gradient=contestant.gradient,
    )
    state, images, labels, step_key = jax.device_put(
        (state, data.train_images, data.train_labels, keys[1]), place.everywhere
    )
    made, compile_seconds = compiled(
        jax.jit(steps, donate_argnums=0, out_shardings=place.everywhere),
        state,
        images,
        labels,
        jax.device_put(dispatches[0], place.batches),
        step_key,
    )
    units = sum(int(np.prod(shape)) for shape in spec.state_shapes)
    operations = contestant.operations(spec, config.phases, config.batch)
    seconds, spikes, curve = 0.0, 0.0, []
    for i, batches in enumerate(dispatches, start=1):
        began = time.perf_counter()
        here = jax.device_put(batches, place.batches)
        state, metrics = jax.block_until_ready(made(state, images, labels, here, step_key))
        seconds += time.perf_counter() - began
        for info in filter(None, (metrics.free, metrics.nudged)):
            sent = spikes_per_neuron(spec, [s.mean() for s in info.spikes])
            spikes += batches.size * units * sent
        answers, _ = training.predict(
            jax.device_get(state.params), spec, contestant.answer, data.validation_images
        )
        done = i * batches.shape[0]
        curve.append(
            {
                "steps": done,
                "epochs": done * config.batch / len(data.train_images),
                "seconds": seconds,
                "val_error": training.error_rate(answers, data.validation_labels),
                "operations": done * operations,
                "spikes": spikes,
            }
        )
        if most_steps is not None and done >= most_steps:
            break
    return {"compile_seconds": compile_seconds, "curve": curve}


def first_stays_below(curve: list[dict[str, Any]], target: float) -> dict[str, Any] | None:
    """The earliest evaluation from which on all are below the target; ``None`` without one."""
    above = [i for i, point in enumerate(curve) if point["val_error"] >= target]
    start = above[-1] + 1 if above else 0
    return curve[start] if start < len(curve) else None


def run(arguments: Arguments) -> dict[str, Any]:
    """Train everything, write it, return it."""
    rows = []
    for dataset in ("mnist",) if arguments.quick else arguments.datasets:
        data = load(dataset, data_dir=arguments.data_dir)
        for name, contestant in contestants(dataset).items():
            most_steps = 200 if arguments.quick else None
            raced = race(contestant, data, arguments.seed, arguments.devices, most_steps)
            row = {"dataset": dataset, "target": TARGETS[dataset], "name": name} | raced
            row["reached"] = first_stays_below(raced["curve"], TARGETS[dataset])
            rows.append(row)
            last = raced["curve"][-1]
            Console(stderr=True).print(
                f"{dataset}, {name}: {last['val_error']:.2f} % after {last['seconds']:.0f} s"
            )
    found = {"seed": arguments.seed, "devices": arguments.devices, "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "time_to_accuracy.json", found | provenance())
    draw(rows).savefig(arguments.out / "time_to_accuracy.png", dpi=150)
    return found


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Validation error against seconds, on logarithmic axes."""
    datasets = list(dict.fromkeys(r["dataset"] for r in rows))
    figure = Figure(figsize=(5.5 * len(datasets) + 1, 4), layout="constrained")
    for axis, dataset in zip(
        figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True
    ):
        for row in rows:
            if row["dataset"] == dataset:
                axis.plot(
                    [p["seconds"] for p in row["curve"]],
                    [p["val_error"] for p in row["curve"]],
                    label=row["name"],
                )
        axis.axhline(TARGETS[dataset], color="0.5", ls="--", lw=1)
        axis.set(title=dataset, xlabel="seconds of training", ylabel="validation error, %")
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    return figure


def table(found: dict[str, Any]) -> Table:
    """When the target was reached."""
    made = Table(title="until the validation error stays below the target")
    for column in ("data", "method", "target", "seconds", "epochs", "TFLOP", "spikes", "last"):
        made.add_column(column)
    for row in found["rows"]:
        reached, last = row["reached"], row["curve"][-1]
        cells = ("not reached",) + ("",) * 3
        if reached is not None:
            cells = (
                f"{reached['seconds']:.0f}",
                f"{reached['epochs']:.1f}",
                f"{reached['operations'] / 1e12:.1f}",
                f"{reached['spikes']:.1e}",
            )
        made.add_row(
            row["dataset"],
            row["name"],
            f"{row['target']:g} %",
            *cells,
            f"{last['val_error']:.2f} % after {last['seconds']:.0f} s",
        )
    return made


def main() -> None:
    """Measure, print, write."""
    arguments = tyro.cli(Arguments, description=__doc__)
    divide_cpu(arguments.devices)
    Console().print(table(run(arguments)))


if __name__ == "__main__":
    main()
