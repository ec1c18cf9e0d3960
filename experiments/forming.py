"""How an answer forms, and what the feedback says to the layers below: pictures.

    python experiments/forming.py --weights pretrained/mnist --dataset mnist --out runs/forming
    python experiments/forming.py --weights pretrained/mnist --dataset mnist --images 50 \
        --out runs/forming_small

Of some validation images, those of the smallest margin and some of which a square is hidden: the
outputs after each sweep, beside the answers of the network without feedback; and what feedback
makes of the first layer's state, brought back to the image by the adjoint of the first layer's
weights: red is what it adds to what is seen, blue what it takes away. The hidden ones that are
shown are chosen for being right because of the feedback; how many images it mends and how many it
spoils is told beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import command, margin
from matplotlib.figure import Figure
from robustness import spoil

import ep_jax as ep
from ep_jax import diagnostics, network
from ep_jax.checks import check_integer, check_number
from ep_jax.data import load, to_float
from ep_jax.files import new_folder, write_json
from ep_jax.provenance import provenance


@dataclass(frozen=True)
class Arguments:
    """How an answer forms, and what the feedback says."""

    weights: Path
    """Folder of a training, or shipped weights."""
    dataset: str
    """digits, mnist or fashion_mnist."""
    out: Path
    """Folder for ambiguous.png, hidden.png and forming.json."""
    data_dir: str | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""
    images: int = 1000
    """Validation images among which some are chosen."""
    shown: int = 6
    """Images in a picture."""
    sweeps: int = 60
    """Sweeps that are followed, from below upwards and without over-relaxation."""
    side: float = 0.4
    """Side of the hidden square, as a share of the image's."""

    def __post_init__(self) -> None:
        for name in ("images", "shown", "sweeps"):
            check_integer(name, getattr(self, name), at_least=1)
        check_number("side", self.side, above=0.0, at_most=1.0)


class Forming(NamedTuple):
    """What a relaxation goes through.

    Attributes:
        outputs: answers after each sweep, ``[T, classes]``.
        settled: answers at the fixed point, ``[classes]``.
        alone: answers of one pass from below, without feedback, ``[classes]``.
        said: what feedback makes of the first layer's state, as an image.
    """

    outputs: Any
    settled: Any
    alone: Any
    said: Any


def follow(params: ep.Params, spec: ep.NetworkSpec, xs: jax.Array, sweeps: int) -> Forming:
    """The rate twin's relaxations of a batch, from zero; leading axes ``[B]``."""
    twin = diagnostics.rate_twin(spec)
    prepared = network.prepare(params, twin)
    slow = ep.Phases(free=sweeps, sweep="ordered")

    def one(x: jax.Array) -> Forming:
        _, info = ep.free_phase(
            params,
            twin,
            x,
            slow,
            trace=lambda now: network.read_out(twin, prepared, now.state[-1]),
        )
        state, _ = ep.free_phase(params, twin, x, diagnostics.SETTLED)
        drives, back = jax.vjp(lambda x: network.input_drive(twin, prepared, x), x)
        alone = network.pass_from_below(twin, prepared, drives)
        first_layer = network.pack(twin, state)[0] - alone[0]
        (said,) = back((first_layer, *jax.tree.map(jnp.zeros_like, drives[1:])))
        settled, first = (network.read_out(twin, prepared, s[-1]) for s in (state, alone))
        return Forming(info.trace, settled, first, said)

    return jax.device_get(jax.jit(jax.vmap(one))(xs))


def draw(xs: np.ndarray, labels: np.ndarray, seen: Forming) -> Figure:
    """A row for each image: it, its outputs over the sweeps, and what the feedback says."""
    rows, sweeps, classes = seen.outputs.shape
    figure = Figure(figsize=(8, 1.55 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, width_ratios=(1, 3.2, 1), squeeze=False)
    for i, (image, output, feedback) in enumerate(axes):
        image.imshow(xs[i].squeeze(), cmap="gray", vmin=0, vmax=1)
        image.set_ylabel(f"class {labels[i]}")
        answer, first = seen.settled[i].argmax(), seen.alone[i].argmax()
        shown = {int(c): f"C{n}" for n, c in enumerate(dict.fromkeys((labels[i], answer, first)))}
        for c in range(classes):
            told = c in shown
            look = {"color": shown.get(c, "0.8"), "zorder": 2 if told else 1}
            output.plot(
                range(1, sweeps + 1),
                seen.outputs[i, :, c],
                lw=1.5 if told else 0.7,
                label=str(c) if told else None,
                **look,
            )
            output.plot(sweeps + 2, seen.settled[i, c], "o", ms=3, **look)
        output.set_title(f"without feedback: {first}; settled: {answer}", fontsize=8)
        output.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        output.set_ylabel("output", fontsize=8)
        output.grid(alpha=0.3)
        said = seen.said[i].sum(-1)
        largest = np.abs(said).max() or 1.0
        feedback.imshow(said, cmap="RdBu_r", vmin=-largest, vmax=largest)
        for axis in (image, feedback):
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0, 2].set_title("feedback adds (red),\ntakes away (blue)", fontsize=8)
    axes[-1, 1].set_xlabel("sweep (dot: fixed point)", fontsize=8)
    return figure


def count(seen: Forming, labels: np.ndarray) -> dict[str, int]:
    """Of how many images the settled answer is wrong, and that without feedback; one of the two."""
    settled, alone = (found.argmax(-1) != labels for found in (seen.settled, seen.alone))
    return {
        "images": len(labels),
        "wrong": int(settled.sum()),
        "wrong_without_feedback": int(alone.sum()),
        "mended": int((alone & ~settled).sum()),
        "spoiled": int((settled & ~alone).sum()),
    }


def run(arguments: Arguments) -> dict[str, Any]:
    """Choose images, follow, count, draw."""
    out = new_folder("out", arguments.out, "ambiguous.png", "hidden.png", "forming.json")
    params, spec, _ = ep.load_weights(arguments.weights)
    data = load(arguments.dataset, data_dir=arguments.data_dir)
    whole = np.asarray(to_float(data.validation_images[: arguments.images]))
    labels = data.validation_labels[: arguments.images].astype(np.int32)
    seen = follow(params, spec, jnp.asarray(whole), 1)
    closest = np.argsort(np.abs(margin(seen.settled, labels)))[: arguments.shown]
    hidden = spoil("hidden square", arguments.side, whole)
    occluded = follow(params, spec, jnp.asarray(hidden), 1)
    # Those that are right because of the feedback, as far as there are any.
    won = np.minimum(margin(occluded.settled, labels), -margin(occluded.alone, labels))
    rescued = np.argsort(-won)[: arguments.shown]
    for name, xs, chosen in (("ambiguous", whole, closest), ("hidden", hidden, rescued)):
        forming = follow(params, spec, jnp.asarray(xs[chosen]), arguments.sweeps)
        draw(xs[chosen], labels[chosen], forming).savefig(out / f"{name}.png", dpi=150)
    counts = {"whole": count(seen, labels), "hidden": count(occluded, labels)}
    settings = {name: getattr(arguments, name) for name in ("dataset", "images", "sweeps", "side")}
    settings["weights"] = str(arguments.weights)
    write_json(out / "forming.json", {"settings": settings, "counts": counts} | provenance())
    print(counts)
    return counts


def main() -> None:
    """Parse, run."""
    with command():
        run(tyro.cli(Arguments, description=__doc__))


if __name__ == "__main__":
    main()
