"""Is a trained network recurrent, does it settle, and is its gradient right?

    python experiments/recurrence.py --weights pretrained/mnist --dataset mnist --out runs/recurrence

- *Recurrent*: how much of each layer's state feedback makes, and what becomes of the error when the
  feedback is cut, replaced by its mean over the images, or by another image's.
- *Settled*: how far the network's own state is from the rate network's fixed point, the error at
  four times the sweeps, the spectral radius, and whether random starts end in the same state.
- *Right*: the cosine of EP's gradient with the exact one (implicit differentiation in float64) over
  batches; late in training one batch says little, so median, mean and lowest are given. And EP at
  fewer and more sweeps, for what the preset's are worth.
- *Fast*: sweeps until all images are within 1e-3 of their fixed point, with and without
  over-relaxation, beside Young's prediction for the measured radius.

All images are validation images.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import STATIC, agreements, exact_gradients, in_float64, plain, validation_batches
from rich.console import Console
from rich.table import Table

import ep_jax as ep
from ep_jax import diagnostics, training
from ep_jax.checkpoint import make_folder, to_json, write_json
from ep_jax.data import Dataset, load, to_float
from ep_jax.run import provenance, recurrence_of


@dataclass(frozen=True)
class Arguments:
    """Is a trained network recurrent, does it settle, and is its gradient right?"""

    weights: Path
    """Folder with weights.npz and network.json."""
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


def settled(
    params: ep.Params, spec: ep.NetworkSpec, phases: ep.Phases, data: Dataset, images: int
) -> dict[str, Any]:
    """How far the network's own state is from the fixed point, and what more sweeps change."""
    xs = jnp.asarray(to_float(data.validation_images[:images]))
    distance = jax.jit(diagnostics.distance_to_rate, static_argnames=(*STATIC, "reference"))
    found = distance(params, spec, xs, phases, jax.random.key(0))
    longer = dataclasses.replace(phases, free=4 * phases.free, free_more=4 * phases.free_more)
    errors = [
        training.error_rate(
            training.predict(params, spec, at, data.validation_images)[0], data.validation_labels
        )
        for at in (phases, longer)
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
    params: ep.Params, spec: ep.NetworkSpec, phases: ep.Phases, data: Dataset, batches: int
) -> dict[str, Any]:
    """Cosines with the exact gradient at the network's sweeps, and at other numbers of them."""
    batch = min(64, len(data.validation_images) // batches)
    xs, ys = validation_batches(data, batches, batch)
    exact = exact_gradients(params, spec, xs, ys)
    found = {}
    for scale in (0.5, 0.75, 1.0, 1.5, 2.0):
        at = dataclasses.replace(
            phases,
            free=math.ceil(scale * phases.free),
            nudged=math.ceil(scale * phases.nudged),
        )
        for name, neurons in (("own", spec), ("rate", diagnostics.rate_twin(spec))):
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


def fast(params: ep.Params, spec: ep.NetworkSpec, data: Dataset, images: int) -> dict[str, Any]:
    """Sweeps of the rate twin until all images are within 1e-3, with and without relaxation."""
    twin = diagnostics.rate_twin(spec)
    with jax.enable_x64(True):
        doubled, xs = in_float64((params, to_float(data.validation_images[:images])))
        suggested = diagnostics.suggest_phases(doubled, twin, xs)
        plain_phases = dataclasses.replace(suggested, relaxation=1.0, free=4000)

        @jax.jit
        def both(x: jax.Array) -> Any:
            rests = [
                ep.free_phase(doubled, twin, x, dataclasses.replace(plain_phases, relaxation=r))[0]
                for r in (1.0, suggested.relaxation)
            ]

            def away(now: ep.Snapshot) -> jax.Array:
                gaps = [
                    jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
                    for a, b in zip(now.state, rests[0], strict=True)
                ]
                return jnp.max(jnp.stack(gaps))

            traced = dataclasses.replace(plain_phases, free=400)
            gaps = ep.free_phase(doubled, twin, x, traced, trace=away)[1].trace
            apart = [jnp.max(jnp.abs(a - b)) for a, b in zip(*rests, strict=True)]
            return jnp.max(jnp.where(gaps > 1e-3, jnp.arange(400), -1)) + 2, jnp.max(
                jnp.stack(apart)
            )

        needed, apart = jax.device_get(jax.lax.map(both, xs, batch_size=16))
        radius = 1.0 - (2.0 / suggested.relaxation - 1.0) ** 2  # Young's formula, inverted
    rho = math.sqrt(radius)
    return {
        "images": len(xs),
        "radius_largest": rho,
        "relaxation": suggested.relaxation,
        "sweeps": suggested.free,
        "sweeps_without": int(needed.max()),
        "gain": int(needed.max()) / suggested.free,
        "gain_by_young": math.log(suggested.relaxation - 1.0) / math.log(rho**2),
        "fixed_points_apart": float(apart.max()),
    }


def check(arguments: Arguments) -> dict[str, Any]:
    """Measure, print, write."""
    make_folder("out", arguments.out)
    params, spec, phases = ep.load_weights(arguments.weights)
    data = load(arguments.dataset, data_dir=arguments.data_dir)
    found: dict[str, Any] = {
        "weights": str(arguments.weights),
        "dataset": arguments.dataset,
        "spec": to_json(spec),
        "phases": to_json(phases),
        "recurrent": recurrence_of(params, spec, data, radii=arguments.images),
        "settled": settled(params, spec, phases, data, arguments.images),
        "right": right(params, spec, phases, data, arguments.batches),
        "fast": fast(params, spec, data, arguments.fast_images),
    }
    write_json(arguments.out / "recurrence.json", plain(found | provenance()))
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
        table.add_row(name, *(" ".join(f"{v:.3f}" for v in values) for values in layers))
    console.print(table)
    return found


def main() -> None:
    """Parse, check."""
    try:
        check(tyro.cli(Arguments, description=__doc__))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"recurrence.py: error: {error}")


if __name__ == "__main__":
    main()
