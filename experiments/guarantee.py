"""Contractive or accurate? What holds a network inside the edge, what it costs, what lies beyond.

    python experiments/guarantee.py trainings --runs runs/guarantee --out results/guarantee/mnist
    python experiments/guarantee.py images --weights pretrained/mnist --dataset mnist \\
        --out results/guarantee/images_mnist
    python experiments/guarantee.py trainings --dataset digits --train-images 320 --seeds 0 \\
        --recipes preset truncated --batches 2 --images 16 --runs runs/small --out runs/small/out

- *trainings*: the preset's network by recipes that differ in how exact the gradient of an image
  near the edge is, and in what holds the spectral radius. Of each: errors at its own sweeps and at
  four times as many, from a random start and under noise; the radius; the share of the images with
  several states, and the error among them; the cosine of its own gradient with the exact one.
- *images*: who the images near the critical radius of a network are, and what they contribute to
  the exact gradient.

All images are training or validation images. An interrupted training goes on where it was.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import recurrence
import tyro
from common import (
    WIDTH,
    EqualBudgets,
    Journal,
    by_layer,
    command,
    finite,
    in_float64,
    margin,
    over_seeds,
    plain,
)
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from robustness import spoil
from scipy import stats

import ep_jax as ep
from ep_jax import diagnostics, network, training
from ep_jax.checks import check_integer, check_number
from ep_jax.data import Dataset, load, to_float
from ep_jax.descriptions import to_json
from ep_jax.evaluation import recurrence_of
from ep_jax.files import new_folder, write_json
from ep_jax.loop import Training
from ep_jax.presets import PRESETS, Config
from ep_jax.provenance import provenance

Recipe: TypeAlias = Literal[
    "preset", "no limit", "limit 3", "held", "cap .8", "cap .61", "truncated", "long", "implicit"
]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
NOISE = 0.3
"""Standard deviation of the noise under which answers are compared."""


def config_of(recipe: Recipe, config: Config) -> Config:
    """What a recipe changes of a preset.

    ``limit``: how much more than the median an image may contribute; ``held``: limit 3, and links
    that shrink while images are unsettled; ``cap``: of the norms of the links, .61 proves a
    contraction of four layers; ``truncated``: half of the sweeps and no stragglers; ``long``: three
    times the sweeps and no limit; ``implicit``: the exact gradient, with no bound on an image's
    share.
    """
    phases = config.phases
    match recipe:
        case "preset":
            return config
        case "no limit":
            return replace(config, phases=replace(phases, limit=None))
        case "limit 3":
            return replace(config, phases=replace(phases, limit=3.0))
        case "held":
            return replace(config, phases=replace(phases, limit=3.0), shrink=5.0)
        case "cap .8":
            return replace(config, cap=0.8, learning_rate=1e-2)
        case "cap .61":
            return replace(config, cap=0.61, learning_rate=2e-2)
        case "truncated":
            few = replace(phases.without_stragglers(), limit=None)
            return replace(config, phases=replace(few, free=few.free // 2, nudged=few.nudged // 2))
        case "long":
            more = {
                name: 3 * getattr(phases, name)
                for name in ("free", "nudged", "free_more", "nudged_more")
            }
            return replace(config, phases=replace(phases, limit=None, **more))
        case "implicit":
            alike = replace(phases.for_all(), limit=None)
            return replace(config, gradient="implicit", phases=alike)


@dataclass(frozen=True)
class Trainings(EqualBudgets):
    """Recipes at equal budgets: what they cost, and what they guarantee."""

    recipes: tuple[Recipe, ...] = RECIPES
    """What is trained: the preset; other limits on what an image may contribute; links held by the
    unsettled images, or capped; fewer and more sweeps; exact gradients."""
    epochs: int = 2
    """Passes over them."""
    images: int = 256
    """Images whose relaxation is looked at."""

    def run(self) -> None:
        """Train what is missing, tabulate, draw, write."""
        out = new_folder("out", self.out, "trainings.json")
        made = provenance()
        data = load(self.dataset, data_dir=self.data_dir)
        settings = self.decides()
        journal = Journal(self.runs / "guarantee.jsonl", settings)
        rows = [
            journal.row(
                {"recipe": recipe, "seed": seed, "config": to_json(self.config(recipe, seed))},
                functools.partial(self.train, recipe, seed, data),
            )
            for recipe in self.recipes
            for seed in self.seeds
        ]
        Console(width=WIDTH).print(tabulate(rows))
        draw_trainings(rows).savefig(out / "trainings.png", dpi=150)
        write_json(out / "trainings.json", plain({"rows": rows, "settings": settings} | made))

    def config(self, recipe: Recipe, seed: int) -> Config:
        """The run of a recipe."""
        return replace(
            config_of(recipe, PRESETS[self.dataset]),
            train_images=self.train_images,
            epochs=self.epochs,
            seed=seed,
        )

    def train(self, recipe: Recipe, seed: int, data: Dataset) -> dict[str, Any]:
        """Train, and look at what came out of it."""
        print(recipe, seed, flush=True)
        learning = Training(self.config(recipe, seed), data)
        state, errors = learning.compile(learning.start()), []
        for epoch in range(1, self.epochs + 1):
            for batches in learning.dispatches(epoch):
                state, _ = learning.steps(state, batches)
                if not finite(state.params):
                    return {"diverged": True}
            errors.append(learning.validation_error(state))
        params, spec = jax.device_get(state.params), learning.spec
        # The network is asked as it is used: by the preset's sweeps, however it was trained.
        phases = PRESETS[self.dataset].phases
        ep.save_weights(self.runs / "weights" / f"{recipe}, seed {seed}", params, spec, phases)
        own = learning.config.phases
        right = recurrence.right(params, spec, own, data, self.batches, (1.0,))
        return {
            "diverged": False,
            "val_error": errors,
            "right": right[f"own, {own.free} + {own.nudged}"],
            "recurrent": recurrence_of(params, spec, data, radii=self.images),
            "trusted": trust(params, spec, phases, data, self.images),
        }


def trust(
    params: ep.Params, spec: ep.NetworkSpec, phases: ep.Phases, data: Dataset, images: int
) -> dict[str, Any]:
    """Does an answer depend on the number of sweeps, on the start, on noise?

    Returns:
        Errors in per cent of the validation images at the network's own sweeps, at four times as
        many, and under noise; of the first `images` of them, those of the rate twin from zero and
        from a random start, and the share of the answers that these two do not share; the share
        with several states, ``ambiguous``, and the errors among them and among the others.
    """
    pixels, labels = np.asarray(to_float(data.validation_images)), data.validation_labels

    def error(xs: np.ndarray, at: ep.Phases) -> float:
        return training.error_rate(training.predict(params, spec, at, xs)[0], labels)

    found = {
        "own": error(pixels, phases),
        "own_4x": error(pixels, phases.longer(4)),
        "noise": error(spoil("noise", NOISE, pixels), phases),
    }
    xs, ys = jnp.asarray(pixels[:images]), labels[:images]
    zero, random, apart = jax.device_get(_two_starts(params, xs, spec=spec))
    several, wrong = ~(apart <= diagnostics.AMBIGUOUS), zero != ys
    return found | {
        "from_zero": training.error_rate(zero, ys),
        "from_random": training.error_rate(random, ys),
        "changed": 100 * float((zero != random).mean()),
        "ambiguous": float(several.mean()),
        "error_ambiguous": 100 * float(wrong[several].mean()) if several.any() else None,
        "error_others": 100 * float(wrong[~several].mean()) if not several.all() else None,
    }


@functools.partial(jax.jit, static_argnames="spec")
def _two_starts(
    params: ep.Params, xs: jax.Array, *, spec: ep.NetworkSpec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the rate twin's long relaxations from zero and from a random start: both answers of each
    image, and the largest distance of a unit between the two states."""
    twin = diagnostics.rate_twin(spec)
    prepared = network.prepare(params, twin)

    def one(x: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        starts = (None, network.random_state(key, twin, x.dtype))
        zero, random = (
            ep.free_phase(params, twin, x, diagnostics.SETTLED, start=start)[0] for start in starts
        )
        answers = (network.read_out(twin, prepared, s[-1]) for s in (zero, random))
        return *map(network.classify, answers), network.largest_gap(zero, random)

    zero, random, apart = jax.vmap(one)(xs, jax.random.split(jax.random.key(0), len(xs)))
    return zero, random, apart


def tabulate(rows: Sequence[dict[str, Any]]) -> Table:
    """A line for each recipe: means and intervals over the seeds."""
    table = Table(
        "recipe", "validation error", "at 4 T", "random start", "noise", "cut", "radius",
        "several states", "cosine: median", "lowest",
        title="per cent, mean and half width of the 95 % interval over the seeds",
    )  # fmt: skip
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        same = [row for row in rows if row["recipe"] == recipe]
        kept = [row for row in same if not row["diverged"]]
        if not kept:
            table.add_row(recipe, f"{len(same)} of {len(same)} diverged")
            continue

        recurrent, trusted = (
            [None if row["diverged"] else row[part] for row in same]
            for part in ("recurrent", "trusted")
        )

        def told(rows: Sequence[Any], name: str, digits: int = 2) -> str:
            return over_seeds([row and row[name] for row in rows], digits)

        largest = max(row["recurrent"]["radius_largest"] for row in kept)
        table.add_row(
            recipe,
            told(trusted, "own"),
            told(trusted, "own_4x"),
            told(trusted, "from_random"),
            told(trusted, "noise", 1),
            told(recurrent, "error_cut", 1),
            f"{told(recurrent, 'radius_mean')}; {largest:.3f}",
            f"{100 * np.mean([row['trusted']['ambiguous'] for row in kept]):.1f}",
            by_layer([row["right"]["median"] for row in kept]),
            by_layer([row["right"]["lowest"] for row in kept]),
        )
    return table


def draw_trainings(rows: Sequence[dict[str, Any]]) -> Figure:
    """Error and cosine against the radius."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    kept = [row for row in rows if not row["diverged"]]
    for i, recipe in enumerate(dict.fromkeys(row["recipe"] for row in kept)):
        same = [row for row in kept if row["recipe"] == recipe]
        radius = [row["recurrent"]["radius_largest"] for row in same]
        error = [row["trusted"]["own"] for row in same]
        cosine = [min(row["right"]["median"]) for row in same]
        for axis, values in zip(axes, (error, cosine), strict=True):
            axis.plot(radius, values, "os^v"[i % 4], color=f"C{i}", label=recipe, alpha=0.8)
    axes[0].set(ylabel="validation error, %")
    axes[1].set(ylabel="cosine with the exact gradient,\nworst layer, median of batches")
    for axis in axes:
        axis.set_xlabel("largest spectral radius")
        axis.axvline(1, color="0.7", lw=0.8)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


@dataclass(frozen=True)
class Images:
    """Who the images near the critical radius are, and what they contribute to the gradient."""

    weights: Path
    """Folder of a training, or shipped weights."""
    dataset: str
    """digits, mnist or fashion_mnist."""
    out: Path
    """Folder for images.json and images.png."""
    images: int = 1000
    """Validation images that are looked at."""
    share: float = 0.05
    """The slowest images are this share of them."""
    data_dir: str | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""

    def __post_init__(self) -> None:
        check_integer("images", self.images, at_least=2)
        check_number("share", self.share, above=0.0, at_most=0.5)

    def run(self) -> None:
        """Measure, print, draw, write."""
        out = new_folder("out", self.out, "images.json")
        made = provenance()
        params, spec, _ = ep.load_weights(self.weights)
        data = load(self.dataset, data_dir=self.data_dir)
        pixels = data.validation_images[: self.images]
        labels = data.validation_labels[: self.images]
        seen = look(params, spec, pixels, labels)
        found = summary(seen, self.share)
        for name, value in found.items():
            print(f"{name}: {value}")
        draw_images(seen, pixels, labels).savefig(out / "images.png", dpi=150)
        named = {"weights": str(self.weights), "dataset": self.dataset, "share": self.share}
        arrays = {n: v for n, v in seen.items() if n not in ("gradients", "answer")}
        write_json(out / "images.json", plain(named | {"summary": found} | arrays | made))


def look(
    params: ep.Params, spec: ep.NetworkSpec, pixels: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    """Of each image, of the rate twin in float64.

    Returns:
        ``radius`` at the fixed point; ``norm`` of the exact gradient of its cost; ``margin`` of the
        right class over the best wrong one; ``answer``; ``gradients [images, n]``, in float32.
    """
    twin = diagnostics.rate_twin(spec)

    def one(params: ep.Params, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        state, _ = ep.free_phase(params, twin, x, diagnostics.SETTLED)
        output = network.read_out(twin, network.prepare(params, twin), state[-1])
        exact = diagnostics.exact_gradient(params, twin, x[None], y[None])
        gradient = jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(exact)])
        return {
            "radius": diagnostics.spectral_radius(params, twin, x, state),
            "norm": jnp.linalg.norm(gradient),
            "margin": margin(output, y),
            "answer": network.classify(output),
            "gradients": gradient.astype(jnp.float32),
        }

    with jax.enable_x64(True):
        doubled = in_float64(params)
        xs = in_float64(to_float(pixels))
        run = jax.jit(lambda xs, ys: jax.lax.map(lambda a: one(doubled, *a), (xs, ys)))
        return jax.device_get(run(xs, jnp.asarray(labels, jnp.int32)))


def summary(seen: dict[str, Any], share: float) -> dict[str, Any]:
    """What the images of the largest radius are, and what the mean gradient is without them."""
    order = np.argsort(-seen["radius"])
    edge, rest = np.split(order, [max(1, round(share * len(order)))])
    gradients = seen["gradients"].astype(np.float64)
    whole, without = gradients.mean(0), gradients[rest].mean(0)
    squares = seen["norm"] ** 2
    wrong = seen["margin"] < 0
    cosine = whole @ without / (np.linalg.norm(whole) * np.linalg.norm(without))
    return plain(
        {
            "radius: edge from": seen["radius"][edge].min(),
            "error, %: edge": 100 * wrong[edge].mean(),
            "error, %: rest": 100 * wrong[rest].mean(),
            "norm of the gradient, median: edge": np.median(seen["norm"][edge]),
            "norm of the gradient, median: rest": np.median(seen["norm"][rest]),
            "share of the squared norms: edge": squares[edge].sum() / squares.sum(),
            "norm of the mean gradient: all": np.linalg.norm(whole),
            "norm of the mean gradient: rest": np.linalg.norm(without),
            "cosine of the mean gradient: all, rest": cosine,
            "rank correlation: radius, norm": stats.spearmanr(seen["radius"], seen["norm"])[0],
            "rank correlation: radius, margin": stats.spearmanr(seen["radius"], seen["margin"])[0],
        }
    )


def draw_images(seen: dict[str, Any], pixels: np.ndarray, labels: np.ndarray) -> Figure:
    """Gradient against radius, and the images of the largest and the smallest radius."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    halves: Any = figure.subfigures(1, 2)
    left, right = halves
    axis = left.subplots()
    wrong = seen["margin"] < 0
    for chosen, label, colour in ((~wrong, "right", "tab:blue"), (wrong, "wrong", "tab:red")):
        axis.semilogy(
            seen["radius"][chosen], seen["norm"][chosen] + 1e-12, ".", color=colour, label=label
        )
    axis.set(xlabel="spectral radius", ylabel="norm of the exact gradient of an image")
    axis.legend()
    axis.grid(alpha=0.3)
    order, columns = np.argsort(-seen["radius"]), 8
    axes = right.subplots(4, columns)
    chosen = [*order[: 2 * columns], *order[::-1][: 2 * columns]]
    for place, i in zip(axes.flat, chosen, strict=False):
        place.imshow(pixels[i].squeeze(), cmap="gray")
        told = f"{labels[i]}" + (f", not {seen['answer'][i]}" if wrong[i] else "")
        place.set_title(told, fontsize=7, color="tab:red" if wrong[i] else "black")
    for place in axes.flat:
        place.axis("off")
    right.suptitle("largest radius (above), smallest (below)", fontsize=10)
    return figure


def main() -> None:
    """Parse, run."""
    with command():
        tyro.extras.subcommand_cli_from_dict({"trainings": Trainings, "images": Images}).run()


if __name__ == "__main__":
    main()
