"""How far may an image be spoiled until a network answers wrongly? Noise, and attacks on it.

    python experiments/robustness.py --weights pretrained/mnist pretrained/mnist_weak \
        --dataset mnist --out runs/robustness

- *Spoiled images*: Gaussian noise, a square that hides a part, less contrast, blur.
- *Attacks* that know the network: projected gradient ascent on the margin by which a wrong class
  wins (Madry et al. 2018, arXiv:1706.06083), within ``epsilon`` of each pixel. A network must not
  look robust because a gradient is poor, so there are two of them, by the images: EP's of the
  network as it is (`ep_jax.equilibrium`), and the exact one of its rate twin through all of a long
  relaxation; several random starts of each; and an image counts as lost when any of them fools the
  network as it is.

All images are validation images; networks are compared on the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import command, margin, plain
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy import ndimage

import ep_jax as ep
from ep_jax import diagnostics, network, training
from ep_jax.data import load, to_float
from ep_jax.files import new_folder, write_json
from ep_jax.provenance import provenance


@dataclass(frozen=True)
class Arguments:
    """How far may an image be spoiled until a network answers wrongly?"""

    weights: tuple[Path, ...]
    """Folders of the networks to compare."""
    dataset: str
    """digits, mnist or fashion_mnist."""
    out: Path
    """Folder for robustness.json and robustness.png."""
    data_dir: str | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""
    images: int = 1000
    """Validation images that are spoiled."""
    attacked: int = 256
    """Validation images that are attacked."""
    steps: int = 20
    """Steps of an attack."""
    starts: int = 2
    """Random starts of an attack by each gradient."""
    exact_sweeps: int = 40
    """Sweeps of the relaxation of which an attack has the exact gradient."""
    batch: int = 64
    """Images at once."""


STRENGTHS = {
    "noise": (0.1, 0.2, 0.3, 0.4, 0.5),
    "hidden square": (0.2, 0.3, 0.4, 0.5, 0.6),
    "lost contrast": (0.3, 0.5, 0.7, 0.8, 0.9),
    "blur": (0.5, 1.0, 1.5, 2.0, 2.5),
    "attack": (0.02, 0.05, 0.1, 0.15, 0.2),
}
"""Standard deviation of the noise; side of the square and of the image; share of the contrast that
is gone; standard deviation of the blur in pixels; largest change of a pixel."""


def spoil(kind: str, strength: float, images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Images ``[N, H, W, C]`` in [0, 1] made worse, in [0, 1]; the seed decides noise and place."""
    rng = np.random.default_rng(seed)
    count, height, width, _ = images.shape
    match kind:
        case "noise":
            spoiled = images + strength * rng.normal(size=images.shape)
        case "hidden square":
            side = round(strength * min(height, width))
            top = rng.integers(0, height - side + 1, (count, 1, 1, 1))
            left = rng.integers(0, width - side + 1, (count, 1, 1, 1))
            rows, columns = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
            hidden = (top <= rows) & (rows < top + side) & (left <= columns)
            spoiled = np.where(hidden & (columns < left + side), 0.0, images)
        case "lost contrast":
            mean = images.mean((1, 2), keepdims=True)
            spoiled = mean + (1 - strength) * (images - mean)
        case "blur":
            spoiled = ndimage.gaussian_filter(images, (0, strength, strength, 0))
        case _:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(STRENGTHS)}")
    return np.clip(spoiled, 0, 1).astype(images.dtype)


Outputs = Callable[[jax.Array], jax.Array]


def outputs_of(
    params: ep.Params, spec: ep.NetworkSpec, phases: ep.Phases, derivative: ep.Derivative
) -> Outputs:
    """``images -> answers [B, classes]``, with a derivative by the images."""

    def outputs(xs: jax.Array) -> jax.Array:
        key = jax.random.key(0) if spec.neuron.stochastic else None
        last, _ = ep.equilibrium(params, spec, xs, phases, key, derivative, info=True)
        prepared = network.prepare(params, spec)
        return jax.vmap(lambda s: network.read_out(spec, prepared, s))(last)

    return outputs


def attack(
    outputs: Outputs, xs: jax.Array, ys: jax.Array, epsilon: float, steps: int, key: jax.Array
) -> jax.Array:
    """Images within `epsilon` of `xs` and in [0, 1] for which a wrong class wins, where there are.

    From a random start, steps of ``2.5 epsilon / steps`` up the sign of the margin's gradient.
    """

    def lead(xs: jax.Array) -> jax.Array:
        return -jnp.sum(margin(outputs(xs), ys))  # each image has a term of its own

    low, high = jnp.maximum(xs - epsilon, 0), jnp.minimum(xs + epsilon, 1)

    def step(moved: jax.Array, _: None) -> tuple[jax.Array, None]:
        up = jnp.sign(jax.grad(lead)(moved))
        return jnp.clip(moved + 2.5 * epsilon / steps * up, low, high), None

    start = xs + epsilon * jax.random.uniform(key, xs.shape, xs.dtype, -1, 1)
    return jax.lax.scan(step, jnp.clip(start, low, high), None, length=steps)[0]


class Network:
    """A trained network, and what an attacker knows of it."""

    def __init__(self, weights: Path, arguments: Arguments) -> None:
        params, spec, phases = ep.load_weights(weights)
        self.name, self._batch, self._starts = weights.name, arguments.batch, arguments.starts
        self._network = (params, spec, phases)
        twin, long = diagnostics.rate_twin(spec), ep.Phases(free=arguments.exact_sweeps)
        known = {
            "ep": outputs_of(params, spec, phases, ep.EP()),
            "exact": outputs_of(params, twin, long, ep.BPTT()),
        }
        self._attacks = {
            name: jax.jit(functools.partial(attack, outputs, steps=arguments.steps))
            for name, outputs in known.items()
        }

    def wrong(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Which images are answered wrongly."""
        return training.predict(*self._network, images, batch=self._batch)[0] != labels

    def lost(
        self, images: np.ndarray, labels: np.ndarray, wrong: np.ndarray, epsilon: float
    ) -> dict[str, np.ndarray]:
        """Which images are answered wrongly after some attack, by each gradient and by any.

        Those that are `wrong` as they are count as well.
        """
        found = {}
        for name, run in self._attacks.items():
            found[name] = wrong
            for start in range(self._starts):
                key = jax.random.key(start)
                moved = [
                    np.asarray(run(images[i : i + self._batch], labels[i : i + self._batch],
                                   epsilon, key=jax.random.fold_in(key, i)))
                    for i in range(0, len(images), self._batch)
                ]  # fmt: skip
                found[name] = found[name] | self.wrong(np.concatenate(moved), labels)
        return found | {"any": functools.reduce(np.logical_or, found.values())}


def measure(net: Network, images: np.ndarray, labels: np.ndarray, attacked: int) -> dict[str, Any]:
    """Errors in per cent of images as they are, spoiled, and attacked."""

    def percent(wrong: np.ndarray) -> float:
        return 100 * float(wrong.mean())

    wrong = net.wrong(images, labels)
    found: dict[str, Any] = {"name": net.name, "clean": percent(wrong)}
    for kind, strengths in STRENGTHS.items():
        if kind != "attack":
            found[kind] = [
                percent(net.wrong(spoil(kind, strength, images), labels)) for strength in strengths
            ]
    some = images[:attacked], labels[:attacked], wrong[:attacked]
    lost = [net.lost(*some, epsilon) for epsilon in STRENGTHS["attack"]]
    found["attack"] = [percent(of["any"]) for of in lost]
    found["attack by"] = {name: [percent(of[name]) for of in lost] for name in ("ep", "exact")}
    return found


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Error against strength, a panel for each way to spoil."""
    figure = Figure(figsize=(3 * len(STRENGTHS), 3.2), layout="constrained")
    panels = figure.subplots(1, len(STRENGTHS), sharey=True)
    for panel, (kind, strengths) in zip(panels, STRENGTHS.items(), strict=True):
        for row in rows:
            panel.plot((0, *strengths), (row["clean"], *row[kind]), "o-", ms=4, label=row["name"])
        panel.set(title=kind, xlabel="strength")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("error, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def table(rows: list[dict[str, Any]]) -> Table:
    """Errors, a line for each network and way to spoil."""
    made = Table("network", "images", "error, % (strength)")
    for row in rows:
        made.add_row(row["name"], "as they are", f"{row['clean']:.2f}")
        for kind, strengths in STRENGTHS.items():
            pairs = zip(row[kind], strengths, strict=True)
            made.add_row("", kind, "  ".join(f"{e:.1f} ({s:g})" for e, s in pairs))
    return made


def run(arguments: Arguments) -> dict[str, Any]:
    """Measure, write, return."""
    data = load(arguments.dataset, data_dir=arguments.data_dir)
    images = np.asarray(to_float(data.validation_images[: arguments.images]))
    labels = data.validation_labels[: arguments.images].astype(np.int32)
    out = new_folder("out", arguments.out, "robustness.json")
    rows = [
        measure(Network(weights, arguments), images, labels, arguments.attacked)
        for weights in arguments.weights
    ]
    settings = {
        "dataset": arguments.dataset,
        "images": len(images),
        "attacked": min(arguments.attacked, len(images)),
        "steps": arguments.steps,
        "starts": arguments.starts,
        "strengths": STRENGTHS,
    }
    found = plain({"rows": rows, "settings": settings}) | provenance()
    write_json(out / "robustness.json", found)
    draw(rows).savefig(out / "robustness.png", dpi=150)
    return found


def main() -> None:
    """Measure, print, write."""
    with command():
        Console().print(table(run(tyro.cli(Arguments, description=__doc__))["rows"]))


if __name__ == "__main__":
    main()
