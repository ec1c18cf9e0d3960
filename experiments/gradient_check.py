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
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import ep_jax as ep
from ep_jax import diagnostics, plots
from ep_jax.checkpoint import to_json, write_json
from ep_jax.data import DATASETS, load, to_float
from ep_jax.diagnostics import Agreement
from ep_jax.presets import PRESETS, spec_of
from ep_jax.run import provenance

STATIC = ("spec", "phases")


@dataclass(frozen=True)
class Arguments:
    """EP's gradient against the exact one."""

    out: Path
    """Folder for check.json and the figures."""
    weights: Path | None = None
    """Folder with weights.npz and network.json."""
    preset: str | None = None
    """Preset whose network at initialisation is checked where there are no weights."""
    dataset: str | None = None
    """digits, mnist or fashion_mnist; by default the preset's."""
    data_dir: str | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""
    batches: int = 4
    """Number of batches, each compared by itself."""
    batch: int = 64
    """Images in a batch."""
    seed: int = 0
    """Seed of initial weights and random neurons."""

    def __post_init__(self) -> None:
        if (self.weights is None) == (self.preset is None):
            raise ValueError("expected either --weights or --preset")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}; expected one of {', '.join(PRESETS)}")
        if self.weights is not None and self.dataset is None:
            raise ValueError(f"expected --dataset ({', '.join(DATASETS)}) with --weights")


Network = tuple[ep.Params, ep.NetworkSpec, ep.Phases]


def network_of(arguments: Arguments) -> tuple[Network, np.ndarray, np.ndarray]:
    """The network to check, and validation images and labels."""
    preset = PRESETS[arguments.preset] if arguments.preset else None
    name = arguments.dataset or (preset.dataset if preset else "")
    data = load(name, data_dir=arguments.data_dir)
    images, labels = data.validation_images, data.validation_labels
    needed = arguments.batches * arguments.batch
    if not 0 < needed <= len(images):
        raise ValueError(f"batches times batch is {needed}; expected at least 1 and at most the "
                         f"{len(images)} validation images")  # fmt: skip
    if arguments.weights is not None:
        return ep.load_weights(arguments.weights), images[:needed], labels[:needed]
    assert preset is not None
    spec = spec_of(preset, images.shape[1:], data.classes)
    params = ep.init_params(jax.random.key(arguments.seed), spec, preset.gain)
    return (params, spec, preset.phases), images[:needed], labels[:needed]


def estimators(spec: ep.NetworkSpec, phases: ep.Phases) -> dict[str, Any]:
    """What is compared: the network's own EP, and other ways to a gradient at the same sweeps."""
    twin = diagnostics.rate_twin(spec)
    found = {"EP, as trained": functools.partial(ep.ep_gradient, spec=spec, phases=phases)}
    if spec != twin:
        found |= {
            "BPTT, surrogate derivatives": functools.partial(
                ep.bptt_gradient, spec=spec, phases=phases
            ),
            "implicit, at the spiking state": functools.partial(
                ep.implicit_gradient, spec=spec, phases=phases
            ),
            "EP, rate neurons": functools.partial(ep.ep_gradient, spec=twin, phases=phases),
        }
    return found | {
        "BPTT, rate neurons": functools.partial(ep.bptt_gradient, spec=twin, phases=phases)
    }


def exact_gradients(params: ep.Params, spec: ep.NetworkSpec, xs: Any, ys: Any) -> list[ep.Params]:
    """The exact gradient of each batch, computed in float64."""
    with jax.enable_x64(True):
        doubled = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        exact = jax.jit(diagnostics.exact_gradient, static_argnames=STATIC)
        return [
            jax.device_get(exact(doubled, spec, jnp.asarray(x, jnp.float64), y))
            for x, y in zip(xs, ys, strict=True)
        ]


def agreements(
    gradient: Any, params: ep.Params, xs: Any, ys: Any, exact: list[ep.Params], seed: int
) -> tuple[list[Agreement], ep.GradientInfo]:
    """Agreement of each batch, and what the gradient of the last one told about itself."""
    run = jax.jit(lambda params, xs, ys, key: gradient(params, xs=xs, ys=ys, key=key))
    found, info = [], None
    for i, (x, y, true) in enumerate(zip(xs, ys, exact, strict=True)):
        grads, info = run(params, x, y, jax.random.fold_in(jax.random.key(seed), i))
        with jax.enable_x64(True):
            found.append(jax.device_get(diagnostics.compare(jax.device_get(grads), true)))
    assert info is not None
    return found, info


def gdu_curves(network: Network, x: Any, y: Any) -> diagnostics.GDU:
    """The curves of the rate twin over 15 synchronous sweeps, in float64."""
    params, spec, _ = network
    phases = dataclasses.replace(diagnostics.SETTLED, sweep="synchronous", nudged=15, beta=1e-4)
    with jax.enable_x64(True):
        doubled = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        curves = jax.jit(diagnostics.gdu, static_argnames=STATIC)(
            doubled, diagnostics.rate_twin(spec), jnp.asarray(x, jnp.float64), y, phases
        )
        return jax.device_get(curves)


def check(arguments: Arguments) -> None:
    """Compare, print, draw, write."""
    network, images, labels = network_of(arguments)
    params, spec, phases = network
    shape = (arguments.batches, arguments.batch)
    xs = np.asarray(to_float(images)).reshape(*shape, *spec.input_shape)
    ys = labels.reshape(shape)
    exact = exact_gradients(params, spec, xs, ys)

    table = Table(title=f"{spec.neuron} against the exact gradient, {len(xs)} batches")
    for column in ("gradient", "layer", "cosine", "lowest", "norm ratio", "relative error"):
        table.add_column(column)
    results: dict[str, Any] = {}
    for name, gradient in estimators(spec, phases).items():
        found, info = agreements(gradient, params, xs, ys, exact, arguments.seed)
        results[name] = {
            **{field: np.stack([getattr(a, field) for a in found]) for field in Agreement._fields},
            "spikes_free": np.stack(info.free.spikes),
            "spikes_nudged": np.stack(info.nudged.spikes) if info.nudged else None,
            "residual_free": float(info.free.residual),
        }
        for layer in (*range(len(params)), "all"):
            picked = (
                [results[name][f"total_{m}"] for m in Agreement._fields[:3]]
                if layer == "all"
                else [results[name][m][:, layer] for m in Agreement._fields[:3]]
            )
            table.add_row(
                name if layer == 0 else "",
                str(layer if layer == "all" else layer + 1),
                f"{picked[0].mean():.4f}",
                f"{picked[0].min():.4f}",
                f"{picked[1].mean():.3f}",
                f"{picked[2].mean():.3f}",
            )
    console = Console()
    console.print(table)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        stability = diagnostics.check_contractivity(params, spec, jnp.asarray(xs[0]))
    distance = jax.jit(diagnostics.distance_to_rate, static_argnames=STATIC)(
        params, spec, jnp.asarray(xs[0]), phases, jax.random.key(arguments.seed)
    )
    curves = gdu_curves(network, xs[0], ys[0])
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

    arguments.out.mkdir(parents=True, exist_ok=True)
    plots.gdu(curves).savefig(arguments.out / "gdu.png", dpi=150)
    plots.agreement(results).savefig(arguments.out / "agreement.png", dpi=150)
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
    plain = jax.tree.map(lambda v: np.asarray(v).tolist() if hasattr(v, "shape") else v, document)
    write_json(arguments.out / "check.json", plain | provenance())
    console.print(f"written to {arguments.out}")


def main() -> None:
    """Parse, check, and say in one line what was wrong where the input was."""
    try:
        check(tyro.cli(Arguments, description=__doc__))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"gradient_check.py: error: {error}")


if __name__ == "__main__":
    main()
