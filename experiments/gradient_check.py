"""EP's gradient against the exact one, layer by layer, and against BPTT sweep by sweep.

    python experiments/gradient_check.py --weights runs/mnist --dataset mnist --out runs/check
    python experiments/gradient_check.py --preset digits --out runs/check

With --weights the network is what a training wrote; with --preset alone it is the preset's at
initialisation. The reference is the exact gradient of the rate network with the same parameters at
its fixed point, in float64. All images are validation images.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
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
from ep_jax import diagnostics, plots
from ep_jax.checks import check_seed
from ep_jax.data import DATASETS, Dataset, load
from ep_jax.descriptions import to_json
from ep_jax.files import new_folder, write_json
from ep_jax.presets import PRESETS, spec_of
from ep_jax.progress import say
from ep_jax.provenance import provenance


@dataclass(frozen=True)
class Arguments:
    """EP's gradient against the exact one."""

    out: Path
    """Folder for check.json and the figures."""
    weights: Path | None = None
    """Folder of a training, or shipped weights."""
    preset: str | None = None
    """Preset whose network at initialisation is checked where there are no weights."""
    dataset: str | None = None
    """digits, mnist or fashion_mnist; by default the preset's."""
    data_dir: str | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""
    batches: int = 16
    """Number of batches, each compared by itself: late in training one says little."""
    batch: int = 64
    """Images in a batch."""
    seed: int = 0
    """Seed of initial weights and random neurons."""

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        if (self.weights is None) == (self.preset is None):
            raise ValueError("expected either --weights or --preset")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}; expected one of {', '.join(PRESETS)}")
        if self.weights is not None and self.dataset is None:
            raise ValueError(f"expected --dataset ({', '.join(DATASETS)}) with --weights")


def network_of(arguments: Arguments, data: Dataset) -> tuple[ep.Params, ep.NetworkSpec, ep.Phases]:
    """The network to check."""
    if arguments.weights is not None:
        return ep.load_weights(arguments.weights)
    preset = PRESETS[arguments.preset or ""]
    spec = spec_of(preset, data.train_images.shape[1:], data.classes)
    params = ep.init_params(jax.random.key(arguments.seed), spec, preset.gain)
    return params, spec, preset.phases


def estimators(spec: ep.NetworkSpec, phases: ep.Phases) -> dict[str, Any]:
    """What is compared: the network's own EP, and other ways to a gradient at the same sweeps.

    Through time every image makes as many sweeps as the stragglers.
    """
    twin, alike = diagnostics.rate_twin(spec), phases.for_all()
    found = {"EP, as trained": functools.partial(ep.ep_gradient, spec=spec, phases=phases)}
    if spec != twin:
        found |= {
            "BPTT, surrogate derivatives": functools.partial(
                ep.bptt_gradient, spec=spec, phases=alike
            ),
            "implicit, at the spiking state": functools.partial(
                ep.implicit_gradient, spec=spec, phases=phases
            ),
            "EP, rate neurons": functools.partial(ep.ep_gradient, spec=twin, phases=phases),
        }
    return found | {
        "BPTT, rate neurons": functools.partial(ep.bptt_gradient, spec=twin, phases=alike)
    }


def gdu_curves(
    params: ep.Params, spec: ep.NetworkSpec, x: np.ndarray, y: np.ndarray
) -> diagnostics.GDU:
    """The curves of the rate twin over 15 synchronous sweeps, in float64."""
    phases = dataclasses.replace(
        diagnostics.SETTLED,
        free=1000,  # synchronous, without over-relaxation: at a radius of .98 that is 2e-9
        nudged=15,
        beta=1e-4,
        sweep="synchronous",
        coordinates="absolute",
        relaxation=1.0,
    )
    with jax.enable_x64(True):
        curves = jax.jit(diagnostics.gdu, static_argnames=STATIC)(
            in_float64(params), diagnostics.rate_twin(spec), in_float64(x), y, phases
        )
        return jax.device_get(curves)


def check(arguments: Arguments) -> None:
    """Compare, print, draw, write."""
    out = new_folder("out", arguments.out, "check.json")
    name = arguments.dataset or PRESETS[arguments.preset or ""].dataset
    data = load(name or "", data_dir=arguments.data_dir)
    params, spec, phases = network_of(arguments, data)
    xs, ys = validation_batches(data, arguments.batches, arguments.batch)
    exact = exact_gradients(params, spec, xs, ys)

    table = Table(title=f"{spec.neuron} against the exact gradient, {len(xs)} batches")
    for column in ("gradient", "layer", "cosine: median", "mean", "lowest", "norm ratio: median"):
        table.add_column(column)
    results: dict[str, Any] = {}
    for name, gradient in estimators(spec, phases).items():
        run = jax.jit(
            lambda params, xs, ys, key, gradient=gradient: gradient(params, xs=xs, ys=ys, key=key)
        )
        found, info = agreements(run, params, xs, ys, exact, arguments.seed)
        results[name] = {
            **found._asdict(),
            "spikes_free": np.stack(info.free.spikes),
            "spikes_nudged": np.stack(info.nudged.spikes) if info.nudged else None,
            "residual_free": float(info.free.residual),
        }
        for layer in (*range(len(params)), "all"):
            cosine, ratio = (
                results[name][f"total_{m}"] if layer == "all" else results[name][m][:, layer]
                for m in ("cosine", "norm_ratio")
            )
            table.add_row(
                name if layer == 0 else "",
                str(layer if layer == "all" else layer + 1),
                *(f"{value:.3f}" for value in (np.median(cosine), cosine.mean(), cosine.min())),
                f"{np.median(ratio):.3f}",
            )
    console = Console()
    console.print(table)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        stability = diagnostics.check_contractivity(params, spec, jnp.asarray(xs[0]))
    distance = jax.jit(diagnostics.distance_to_rate, static_argnames=STATIC)(
        params, spec, jnp.asarray(xs[0]), phases, jax.random.key(arguments.seed)
    )
    curves = gdu_curves(params, spec, xs[0], ys[0])
    depth = spec.depth
    state_errors = diagnostics.curve_errors(curves.ep_state, curves.bptt_state)
    param_errors = diagnostics.curve_errors(curves.ep_params[:depth], curves.bptt_params[:depth])
    own = results["EP, as trained"]
    console.print(f"spikes per neuron, free phase: {np.round(own['spikes_free'], 3)}")
    console.print(f"spikes per neuron, nudged phase: {np.round(own['spikes_nudged'], 3)}")
    console.print(f"spectral radius of the relaxation: up to {float(stability.radius.max()):.3f}")
    console.print(f"states from other starts differ by up to {stability.disagreement.max():.1e}")
    console.print(f"distance to the rate fixed point, relative: {np.round(distance.relative, 4)}")
    console.print(f"GDU curves, relative RMSE: states {state_errors.rmse.max():.1e}, "
                  f"parameters {param_errors.rmse.max():.1e}")  # fmt: skip

    plots.gdu(curves).savefig(out / "gdu.png", dpi=150)
    plots.agreement(results).savefig(out / "agreement.png", dpi=150)
    document = {
        "weights": None if arguments.weights is None else str(arguments.weights),
        "preset": arguments.preset,
        "batches": arguments.batches,
        "batch": arguments.batch,
        "seed": arguments.seed,
        "spec": to_json(spec),
        "phases": to_json(phases),
        "gradients": results,
        "spectral_radius": stability.radius,
        "start_disagreement": stability.disagreement,
        "distance_to_rate": {"rms": distance.rms, "relative": distance.relative},
        "gdu": {
            "state_rmse": state_errors.rmse,
            "state_sign_error": state_errors.sign_error,
            "params_rmse": param_errors.rmse,
            "params_sign_error": param_errors.sign_error,
        },
    }
    write_json(out / "check.json", plain(document) | provenance())
    say(console, f"written to {out}")


def main() -> None:
    """Parse, check, and say in one line what was wrong where the input was."""
    with command():
        check(tyro.cli(Arguments, description=__doc__))


if __name__ == "__main__":
    main()
