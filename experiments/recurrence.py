"""Is a trained network recurrent, does it settle, and is its gradient right?

    python experiments/recurrence.py --weights runs/mnist --dataset mnist --out runs/recurrence

- *Recurrent*: how much of each layer's state feedback makes, and what becomes of the error when the
  feedback is cut, replaced by its mean over the images, or by another image's.
- *Settled*: how far the network's own state is from the rate network's fixed point, the error at
  four times the sweeps, the spectral radius, and whether random starts end in the same state.
- *Right*: the cosine of EP's gradient with the exact one (implicit differentiation in float64) over
  batches; late in training one batch says little, so median, mean and lowest are given. And EP at
  fewer and more sweeps, for what the preset's are worth.
- *Fast*: sweeps until all images are within 1e-3 of their fixed point, with and without the best
  over-relaxation for the largest spectral radius, and Young's prediction of what it gains.

All images are validation images.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import (
    STATIC,
    agreements,
    command,
    exact_gradients,
    in_float64,
    plain,
    validation_batches,
)
from rich.console import Console
from rich.table import Table

import ep_jax as ep
from ep_jax import diagnostics, training
from ep_jax.data import Dataset, load, to_float
from ep_jax.descriptions import to_json
from ep_jax.evaluation import recurrence_of
from ep_jax.files import new_folder, write_json
from ep_jax.phases import optimal_relaxation
from ep_jax.provenance import provenance
from ep_jax.tables import markdown, spaced


@dataclass(frozen=True)
class Arguments:
    """Is a trained network recurrent, does it settle, and is its gradient right?"""

    weights: Path
    """Folder of a training, or shipped weights."""
    dataset: str
    """digits, mnist or fashion_mnist."""
    out: Path
    """Folder for recurrence.json."""
    data_dir: str | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""
    images: int = 256
    """Images whose states are looked at."""
    batches: int = 16
    """Batches of 64 images whose gradients are looked at."""
    fast_images: int = 64
    """Images for which sweeps are counted."""
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0)
    """So many times the network's own sweeps the gradients are looked at."""


def settled(
    params: ep.Params, spec: ep.NetworkSpec, phases: ep.Phases, data: Dataset, images: int
) -> dict[str, Any]:
    """How far the network's own state is from the fixed point, and what more sweeps change."""
    xs = jnp.asarray(to_float(data.validation_images[:images]))
    distance = jax.jit(diagnostics.distance_to_rate, static_argnames=(*STATIC, "reference"))
    found = distance(params, spec, xs, phases, jax.random.key(0))
    errors = [
        training.error_rate(
            training.predict(params, spec, at, data.validation_images)[0], data.validation_labels
        )
        for at in (phases, phases.longer(4))
    ]
    return {
        "distance": plain(found.relative),
        "residual_mean": float(found.info.mean_residual),
        "unsettled": float(found.info.unsettled),
        "spikes_per_neuron": plain(found.info.spikes),
        "error": errors[0],
        "error_4x": errors[1],
    }


def right(
    params: ep.Params,
    spec: ep.NetworkSpec,
    phases: ep.Phases,
    data: Dataset,
    batches: int,
    scales: Sequence[float],
) -> dict[str, Any]:
    """Cosines with the exact gradient at the network's sweeps, and at other numbers of them."""
    batch = min(64, len(data.validation_images) // batches)
    xs, ys = validation_batches(data, batches, batch)
    exact = exact_gradients(params, spec, xs, ys)
    found = {}
    for scale in scales:
        at = dataclasses.replace(
            phases,
            free=math.ceil(scale * phases.free),
            nudged=math.ceil(scale * phases.nudged),
            free_more=math.ceil(scale * phases.free_more),
            nudged_more=math.ceil(scale * phases.nudged_more),
        )
        subjects = {"own": spec, "rate": diagnostics.rate_twin(spec)}
        if subjects["rate"] == spec:
            del subjects["rate"]
        for name, neurons in subjects.items():
            gradient = jax.jit(functools.partial(ep.ep_gradient, spec=neurons, phases=at))
            agreement, _ = agreements(
                lambda p, x, y, key, gradient=gradient: gradient(p, xs=x, ys=y, key=key),
                params,
                xs,
                ys,
                exact,
            )
            cosine = np.asarray(agreement.cosine)
            found[f"{name}, {at.free} + {at.nudged}"] = {
                "median": np.median(cosine, axis=0).tolist(),
                "mean": cosine.mean(0).tolist(),
                "lowest": cosine.min(0).tolist(),
                "norm_ratio_median": np.median(agreement.norm_ratio, axis=0).tolist(),
            }
    return found


MOST_SWEEPS = 400
"""Sweeps are counted up to here."""


def sweeps_at(
    params: ep.Params, twin: ep.NetworkSpec, xs: jax.Array, relaxation: float
) -> diagnostics.SweepsNeeded:
    """Sweeps of a rate network until each image is within 1e-3 of its fixed point, on the host."""
    phases = ep.Phases(free=MOST_SWEEPS, nudged=1, relaxation=relaxation)
    needed = jax.jit(diagnostics.sweeps_needed, static_argnames=STATIC)
    return jax.device_get(needed(params, twin, xs, phases))


def fast(params: ep.Params, spec: ep.NetworkSpec, data: Dataset, images: int) -> dict[str, Any]:
    """Sweeps of the rate twin until all images are within 1e-3, with and without over-relaxation.

    Where some image's relaxation is no contraction, its radius alone.
    """
    twin = diagnostics.rate_twin(spec)
    with jax.enable_x64(True):
        doubled, xs = in_float64((params, to_float(data.validation_images[:images])))
        stability = jax.jit(diagnostics.contractivity, static_argnames=STATIC)(doubled, twin, xs)
        radius = float(stability.radius.max())
        found = {"images": len(xs), "radius_largest": radius}
        if radius >= 1.0:
            return found
        omega = optimal_relaxation(radius)
        without, relaxed = (sweeps_at(doubled, twin, xs, at) for at in (1.0, omega))
    pairs = zip(without.rest, relaxed.rest, strict=True)
    apart = max(float(np.max(np.abs(a - b))) for a, b in pairs)
    return found | {
        "relaxation": omega,
        "sweeps": int(relaxed.free.max()),
        "sweeps_without": int(without.free.max()),
        "gain": int(without.free.max()) / int(relaxed.free.max()),
        "gain_by_young": math.log(omega - 1.0) / math.log(radius**2),
        "fixed_points_apart": apart,
    }


def check(arguments: Arguments) -> dict[str, Any]:
    """Measure, print, write."""
    out = new_folder("out", arguments.out, "recurrence.json")
    params, spec, phases = ep.load_weights(arguments.weights)
    data = load(arguments.dataset, data_dir=arguments.data_dir)
    found: dict[str, Any] = {
        "weights": str(arguments.weights),
        "dataset": arguments.dataset,
        "spec": to_json(spec),
        "phases": to_json(phases),
        "recurrent": recurrence_of(params, spec, data, radii=arguments.images),
        "settled": settled(params, spec, phases, data, arguments.images),
        "right": right(params, spec, phases, data, arguments.batches, arguments.scales),
        "fast": fast(params, spec, data, arguments.fast_images),
    }
    write_json(out / "recurrence.json", plain(found | provenance()))
    console = Console()
    for part in ("recurrent", "settled", "fast"):
        table = Table(title=part)
        table.add_column("")
        table.add_column("", justify="right")
        for name, value in found[part].items():
            values = value if isinstance(value, list) else [value]
            table.add_row(name, " ".join(f"{v:.4g}" for v in values))
        console.print(table)
    table = Table(title="cosine with the exact gradient: median, mean, lowest of the batches")
    for column in ("neurons, sweeps", *(f"layer {l + 1}" for l in range(len(spec.layers)))):
        table.add_column(column)
    for name, row in found["right"].items():
        layers = zip(row["median"], row["mean"], row["lowest"], strict=True)
        table.add_row(name, *(spaced(values, 3) for values in layers))
    console.print(table)
    return found


ROWS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "share of the state that feedback makes, by layer": lambda r: spaced(
        r["recurrent"]["share"], 2
    ),
    "error at the fixed point, %": lambda r: f"{r['recurrent']['error']:.2f}",
    "with the feedback cut; its mean; another image's, %": lambda r: "; ".join(
        f"{r['recurrent'][f'error_{of}']:.2f}" for of in ("cut", "mean", "other")
    ),
    "distance from the rate network's fixed point, by layer": lambda r: spaced(
        r["settled"]["distance"], 4
    ),
    "own error; at four times the sweeps, %": lambda r: (
        f"{r['settled']['error']:.2f}; {r['settled']['error_4x']:.2f}"
    ),
    "spectral radius, mean; largest": lambda r: (
        f"{r['recurrent']['radius_mean']:.2f}; {r['recurrent']['radius_largest']:.3f}"
    ),
    "images whose state depends on the start, %": lambda r: (
        f"{100 * r['recurrent']['ambiguous']:.1f}"
    ),
    "cosine with the exact gradient, by layer: median": lambda r: spaced(_own(r)["median"], 3),
    "mean": lambda r: spaced(_own(r)["mean"], 3),
    "lowest": lambda r: spaced(_own(r)["lowest"], 2),
    "spikes per neuron, by layer": lambda r: spaced(r["settled"]["spikes_per_neuron"], 1),
    "sweeps until the slowest image is within 1e-3: ω = 1; the best ω": lambda r: (
        f"{r['fast']['sweeps_without']}; {r['fast']['sweeps']} (ω = {r['fast']['relaxation']:.2f})"
    ),
    "gain in sweeps; predicted by Young": lambda r: (
        f"{r['fast']['gain']:.1f}; {r['fast']['gain_by_young']:.1f}"
    ),
}
"""What is told of a network: a title, and the text of a result."""


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in ``folder/NAME/recurrence.json``, by name."""
    files = sorted(folder.glob("*/recurrence.json"))
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def summary(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What was measured, a column for each network, in Markdown."""
    cells = ([title, *map(show, found.values())] for title, show in ROWS.items())
    return markdown(("", *(f"`{name}`" for name in found)), cells)


def more_sweeps(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Cosines of spiking networks at their sweeps, at fewer and at more, in Markdown."""
    rows = [
        (f"`{name}`", sweeps, spaced(row["median"], 3), spaced(row["mean"], 3))
        for name, result in found.items()
        for sweeps, row in result["right"].items()
        if result["spec"]["neuron"]["type"] != "Rate"
    ]
    return markdown(("network", "neurons, sweeps", "median, by layer", "mean, by layer"), rows)


def _own(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The cosines of the network's own neurons at its own sweeps."""
    phases = result["phases"]
    return result["right"][f"own, {phases['free']} + {phases['nudged']}"]


def main() -> None:
    """Parse, check."""
    with command():
        check(tyro.cli(Arguments, description=__doc__))


if __name__ == "__main__":
    main()
