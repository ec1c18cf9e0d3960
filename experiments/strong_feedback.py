"""Why feedback 1 needs Muon: optimisers at equal budgets, and what their networks are like.

    python experiments/strong_feedback.py --runs runs/strong --out results/strong_feedback
    python experiments/strong_feedback.py --dataset digits --train-images 320 --seeds 0 \\
        --images 16 --parts relaxation --runs runs/strong_small --out runs/strong_small/out

The first makes all of it, the second a small version of one part.

The parts:

- *rates*: each optimiser at .3, 1 and 3 times its learning rate, one seed. The parts that follow
  take the best.
- *trainings*: each optimiser with rate neurons and with the preset's code, all seeds. Errors,
  cosines with the exact gradient, spectral radius, share of the state that feedback makes; over the
  training, the norms of the links, the radius, and how concentrated a step is.
- *relaxation*: sweeps to 1e-3 against the over-relaxation, beside Young's prediction.
- *feedback*: sweeps to 1e-3 of networks trained at feedback 1, .5 and .25.
- *decay*: weight decay against the share of the images with several fixed points.

All images are training or validation images. An interrupted command goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    over_seeds,
    plain,
)
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import ep_jax as ep
from ep_jax import diagnostics
from ep_jax.data import Dataset, load, to_float
from ep_jax.descriptions import to_json
from ep_jax.evaluation import recurrence_of, relaxation_of
from ep_jax.files import new_folder, write_json
from ep_jax.loop import Training
from ep_jax.optimizers import SGD, AdamW, Muon, link_norms, radius_bound
from ep_jax.presets import PRESETS, Config
from ep_jax.progress import say
from ep_jax.provenance import provenance
from ep_jax.training import Augmentation, TrainState

RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": AdamW(), "learning_rate": 1e-3},
    "sgd": {"optimizer": SGD(), "learning_rate": 0.25, "layer_rates": (1.0, 0.6, 0.4, 0.2)},
    "adamw, cap .7": {"optimizer": AdamW(), "learning_rate": 1e-3, "cap": 0.7, "gain": 0.6},
    "muon": {"optimizer": Muon(), "learning_rate": 0.01},
    "muon, cap .61": {"optimizer": Muon(), "learning_rate": 0.01, "cap": 0.61, "gain": 0.6},
}
"""What differs between the trainings. What a cap holds may start larger; at a cap of .61 four
layers are proved contractive."""
FACTORS = (0.3, 1.0, 3.0)
"""On the learning rates."""
FEEDBACKS = (1.0, 0.5, 0.25)
DECAYS = (0.0, 0.1, 0.3, 1.0, 3.0)
RELAXATIONS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8)
TOLERANCE = 1e-3
LOOKS = 12
"""How often a training is looked at, at least."""

Part: TypeAlias = Literal["rates", "trainings", "relaxation", "feedback", "decay"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Arguments(EqualBudgets):
    """Why feedback 1 needs Muon."""

    parts: tuple[Part, ...] = PARTS
    """What is made. Rows made before are in the results in any case."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    recipe: str
    seed: int
    code: bool = False
    """The preset's neurons, in place of rate neurons."""
    factor: float = 1.0
    """On the recipe's learning rate."""
    feedback: float = 1.0
    weight_decay: float = 0.0

    @property
    def folder(self) -> str:
        """A name for its weights."""
        parts = (f"{name}={value}" for name, value in dataclasses.asdict(self).items())
        return ",".join(parts).replace(" ", "")


def config_of(cell: Cell, arguments: Arguments) -> Config:
    """The run of a cell. All cells share layers, phases, images and number of steps."""
    preset = PRESETS[arguments.dataset]
    recipe = RECIPES[cell.recipe]
    steps = arguments.epochs * math.ceil(arguments.train_images / preset.batch)
    rate = cell.factor * recipe["learning_rate"]
    return replace(
        preset,
        train_images=arguments.train_images,
        epochs=arguments.epochs,
        steps_per_dispatch=max(1, steps // LOOKS),
        augmentation=Augmentation(),
        neuron=preset.neuron if cell.code else ep.Rate(),
        feedback=cell.feedback,
        weight_decay=cell.weight_decay,
        seed=cell.seed,
        **recipe | {"learning_rate": rate},
    )


def key_of(kind: str, cell: Cell) -> dict[str, Any]:
    """What tells a row from the others: a recipe that was changed makes new ones."""
    recipe = {name: to_json(value) for name, value in RECIPES[cell.recipe].items()}
    return plain({"kind": kind, "settings": recipe} | dataclasses.asdict(cell))


def concentration(step: jax.Array) -> jax.Array:
    """Largest singular value over Frobenius norm: 1 at rank one, least where all are equal.

    Args:
        step: change of the weights of a layer, a matrix ``[inputs, outputs]`` or a kernel.
    """
    matrix = step.reshape(-1, step.shape[-1])
    size = jnp.linalg.norm(matrix)
    return jnp.linalg.norm(matrix, 2) / jnp.where(size > 0, size, 1.0)


def along(step: jax.Array, activity: jax.Array) -> jax.Array:
    """The share of a dense layer's step, in squares, that is along the activity below it.

    Args:
        step: matrix ``[inputs, outputs]``.
        activity: the mean state below, ``[inputs]``.
    """
    part = activity @ step / jnp.maximum(jnp.linalg.norm(activity), 1e-30)
    return jnp.sum(part**2) / jnp.maximum(jnp.sum(step**2), 1e-30)


@functools.partial(jax.jit, static_argnames=("spec", "phases"))
def _look(
    before: ep.Params,
    after: ep.Params,
    xs: jax.Array,
    *,
    spec: ep.NetworkSpec,
    phases: ep.Phases,
) -> dict[str, Any]:
    """The links after a step, and the step itself, decay included."""
    steps = [b["w"] - a["w"] for a, b in zip(before, after, strict=True)]
    twin = diagnostics.rate_twin(spec)
    states = jax.vmap(lambda x: ep.free_phase(before, twin, x, phases)[0])(xs)
    below = zip(states, steps[1:], strict=False)
    norms = link_norms(after, spec)
    return {
        "links": norms,
        "bound": radius_bound(norms, spec.feedback),
        "concentration": [concentration(step) for step in steps],
        "along": [
            along(step, state.mean(0).reshape(-1)) for state, step in below if step.ndim == 2
        ],
    }


def look(training: Training, before: ep.Params, state: TrainState, xs: jax.Array) -> dict[str, Any]:
    """What a training is like after a step from the parameters `before`."""
    config, spec = training.config, training.spec
    after = jax.device_get(state.params)
    found = _look(before, after, xs, spec=spec, phases=config.phases.without_stragglers())
    return {"step": int(state.step), "radius": training.radius(state)} | plain(found)


def follow(training: Training) -> tuple[TrainState, list[dict[str, Any]]]:
    """Train, and look at the first step of each dispatch; what diverges ends there."""
    state = training.compile(training.start())
    xs = jnp.asarray(to_float(training.data.validation_images[:64]))
    seen = []
    for epoch in range(1, training.config.epochs + 1):
        for batches in training.dispatches(epoch):
            before = jax.tree.map(np.array, state.params)  # a copy: the state is used up
            state, _ = training.steps(state, batches[:1])
            if not finite(state.params):
                return state, seen
            seen.append(look(training, before, state, xs))
            state, _ = training.steps(state, batches[1:])
    return state, seen


def young_factor(relaxation: float, radius: float) -> float:
    """What Young's theory says an ordered over-relaxed sweep leaves of an error, asymptotically.

    For the radius of the synchronous relaxation of a consistently ordered linear problem, as that
    of layers in a chain is.

    Example:
        >>> young_factor(1.0, 0.5)  # without over-relaxation its square
        0.25
    """
    inside = (relaxation * radius) ** 2 - 4.0 * (relaxation - 1.0)
    if inside < 0.0:
        return relaxation - 1.0
    return ((relaxation * radius + math.sqrt(inside)) / 2.0) ** 2


def young_sweeps(relaxation: float, radius: float) -> float | None:
    """Sweeps to `TOLERANCE` by `young_factor`; ``None`` where it does not contract."""
    factor = young_factor(relaxation, radius)
    if not factor < 1.0:
        return None
    return 1.0 if factor == 0.0 else max(1.0, math.log(TOLERANCE) / math.log(factor))


def sweeps_against_relaxation(
    params: ep.Params, spec: ep.NetworkSpec, data: Dataset, images: int
) -> dict[str, Any]:
    """Sweeps of the slowest and of the median image at each relaxation, and Young's prediction.

    One more than `recurrence.MOST_SWEEPS` where these were not enough.
    """
    twin = diagnostics.rate_twin(spec)
    with jax.enable_x64(True):
        doubled, xs = in_float64((params, to_float(data.validation_images[:images])))
        radius = relaxation_of(doubled, twin, xs)["largest"]
        found = [recurrence.sweeps_at(doubled, twin, xs, at).free for at in RELAXATIONS]
    return {
        "radius_largest": radius,
        "relaxation": RELAXATIONS,
        "slowest": [int(sweeps.max()) for sweeps in found],
        "median": [float(np.median(sweeps)) for sweeps in found],
        "young": [young_sweeps(at, radius) for at in RELAXATIONS],
    }


class Study:
    """The rows of the study: made where they are not there yet."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.data = load(arguments.dataset, data_dir=arguments.data_dir)
        self.journal = Journal(arguments.runs / "strong_feedback.jsonl", arguments.decides())

    def make(self) -> None:
        """The parts that are asked for, in an order in which each has what it needs."""
        for part in PARTS:
            if part in self.arguments.parts:
                getattr(self, part)()

    def rates(self) -> None:
        """Each recipe at several learning rates."""
        for recipe in RECIPES:
            for factor in FACTORS:
                self.trained(Cell(recipe, self.arguments.seeds[0], factor=factor))

    def best_factor(self, recipe: str) -> float:
        """The factor of the lowest error in the part *rates*; 1 where that was not made."""
        cells = [Cell(recipe, self.arguments.seeds[0], factor=factor) for factor in FACTORS]
        found = {c.factor: row["error"] for c in cells if (row := self.find("training", c))}
        if len(found) < len(FACTORS):
            return 1.0
        return min(found, key=lambda factor: _number(found[factor]))

    def trainings(self) -> None:
        """The table: every recipe, rate neurons and the code, every seed."""
        for cell in self.table():
            if self.trained(cell)["finite"]:
                self.row("measured", cell, lambda cell=cell: self.measure(cell))

    def table(self) -> Iterator[Cell]:
        """The cells of the table."""
        for recipe in RECIPES:
            for code in (False, True):
                for seed in self.arguments.seeds:
                    yield Cell(recipe, seed, code, self.best_factor(recipe))

    def relaxation(self) -> None:
        """Of networks that AdamW and Muon trained: one near the edge, one well inside."""
        for recipe in ("adamw", "muon"):
            for cell in self.of_seeds(recipe):
                if self.trained(cell)["finite"]:
                    self.row("relaxation", cell, lambda cell=cell: self.relaxed(cell))

    def feedback(self) -> None:
        """Of networks trained by Muon at each feedback."""
        for feedback in FEEDBACKS:
            for cell in self.of_seeds("muon", feedback=feedback):
                if self.trained(cell)["finite"]:
                    self.row("feedback", cell, lambda cell=cell: self.fast(cell))

    def decay(self) -> None:
        """Of networks trained by Muon at each decay."""
        for weight_decay in DECAYS:
            for cell in self.of_seeds("muon", weight_decay=weight_decay):
                if self.trained(cell)["finite"]:
                    self.row("decay", cell, lambda cell=cell: self.recurrent(cell))

    def of_seeds(
        self, recipe: str, feedback: float = 1.0, weight_decay: float = 0.0
    ) -> Iterator[Cell]:
        """Rate networks of a recipe at its best rate, one for each seed."""
        factor = self.best_factor(recipe)
        for seed in self.arguments.seeds:
            yield Cell(recipe, seed, False, factor, feedback, weight_decay)

    def find(self, kind: str, cell: Cell) -> dict[str, Any] | None:
        """The row of a cell, if it was made."""
        key = key_of(kind, cell)
        rows = (r for r in self.journal.rows if all(r[n] == v for n, v in key.items()))
        return next(rows, None)

    def row(self, kind: str, cell: Cell, make: Any) -> dict[str, Any]:
        """The row of a cell, made now if need be, and told."""
        if (old := self.find(kind, cell)) is not None:
            return old
        print(kind, cell.folder, flush=True)
        return self.journal.row(key_of(kind, cell), make)

    def trained(self, cell: Cell) -> dict[str, Any]:
        """The row of a training, whose weights are kept."""
        return self.row("training", cell, lambda: self.train(cell))

    def train(self, cell: Cell) -> dict[str, Any]:
        """Train, keep the weights of what did not diverge."""
        training = Training(config_of(cell, self.arguments), self.data)
        state, seen = follow(training)
        learned = finite(state.params)
        if learned:
            folder = self.arguments.runs / "weights" / cell.folder
            params = jax.device_get(state.params)
            ep.save_weights(folder, params, training.spec, training.config.phases)
        return {
            "learning_rate": training.config.learning_rate,
            "finite": learned,
            "error": training.validation_error(state) if learned else None,
            "looks": seen,
        }

    def network(self, cell: Cell) -> tuple[ep.Params, ep.NetworkSpec, ep.Phases]:
        """What a training left."""
        return ep.load_weights(self.arguments.runs / "weights" / cell.folder)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Is it recurrent, does it settle, is its gradient right?"""
        params, spec, phases = self.network(cell)
        right = recurrence.right(params, spec, phases, self.data, self.arguments.batches, (1.0,))
        return {
            "right": right[f"own, {phases.free} + {phases.nudged}"],
            "recurrent": recurrence_of(params, spec, self.data),
            "settled": recurrence.settled(params, spec, phases, self.data, 256),
        }

    def relaxed(self, cell: Cell) -> dict[str, Any]:
        """See `sweeps_against_relaxation`."""
        params, spec, _ = self.network(cell)
        return sweeps_against_relaxation(params, spec, self.data, self.arguments.images)

    def fast(self, cell: Cell) -> dict[str, Any]:
        """See `recurrence.fast`."""
        params, spec, _ = self.network(cell)
        return recurrence.fast(params, spec, self.data, self.arguments.images)

    def recurrent(self, cell: Cell) -> dict[str, Any]:
        """See `ep_jax.evaluation.recurrence_of`."""
        params, spec, _ = self.network(cell)
        return recurrence_of(params, spec, self.data)

    def all_of(self, kind: str, cells: Iterator[Cell]) -> list[dict[str, Any]]:
        """Those rows of these cells that were made."""
        return [row for cell in cells if (row := self.find(kind, cell))]


def _number(value: float | None) -> float:
    """A number of a row; what was none is beyond all others."""
    return math.inf if value is None else value


def tabulate(study: Study) -> Table:
    """The table of the trainings."""
    table = Table(title="optimisers at equal budgets: validation images, means over the seeds")
    columns = ("optimiser", "neurons", "rate", "error, %", "at 4T", "cosine: medians",
               "radius: mean", "largest", "share", "error, cut", "links", "step")  # fmt: skip
    for column in columns:
        table.add_column(column)
    for recipe in RECIPES:
        for code in (False, True):
            cells = [c for c in study.table() if (c.recipe, c.code) == (recipe, code)]
            rows = study.all_of("training", iter(cells))
            measured = study.all_of("measured", iter(cells))
            if not rows:
                continue
            recurrent = [r["recurrent"] for r in measured]
            last = [r["looks"][-1] for r in rows if r["finite"]]
            table.add_row(
                recipe,
                "code" if code else "rate",
                f"{rows[0]['learning_rate']:.2g}",
                over_seeds([r["error"] for r in rows]),
                over_seeds([r["settled"]["error_4x"] for r in measured]),
                by_layer([r["right"]["median"] for r in measured], 3),
                over_seeds([r["radius_mean"] for r in recurrent]),
                over_seeds([r["radius_largest"] for r in recurrent]),
                by_layer([r["share"] for r in recurrent]),
                over_seeds([r["error_cut"] for r in recurrent]),
                by_layer([look["links"] for look in last]),
                by_layer([look["concentration"] for look in last]),
            )
    return table


def draw_training(study: Study) -> Figure:
    """Over the training, rate neurons: radius, its bound, concentration and direction of a step."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).flat
    panels = {
        "spectral radius, mean of 16 images": lambda look: look["radius"]["mean"],
        "norm of the links, largest": lambda look: max(look["links"]),
        "step: largest singular value / Frobenius norm": lambda look: np.mean(
            look["concentration"]
        ),
        "dense steps: share along the mean activity": lambda look: np.mean(look["along"]),
    }
    for axis, (name, value) in zip(axes, panels.items(), strict=True):
        for i, recipe in enumerate(RECIPES):
            cells = (c for c in study.table() if c.recipe == recipe and not c.code)
            for n, row in enumerate(study.all_of("training", cells)):
                if not row["finite"]:
                    continue
                steps = [look["step"] for look in row["looks"]]
                line = [value(look) for look in row["looks"]]
                axis.plot(steps, line, "o-", ms=3, color=f"C{i}", label=None if n else recipe)
        axis.set(xlabel="step", title=name)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return figure


def draw_settling(study: Study) -> Figure:
    """Sweeps against relaxation, with Young's prediction, and feedback; fixed points by decay."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    relaxation, feedback, decay = figure.subplots(1, 3)
    for i, recipe in enumerate(("adamw", "muon")):
        for n, row in enumerate(study.all_of("relaxation", study.of_seeds(recipe))):
            label = None if n else recipe
            relaxation.plot(row["relaxation"], row["slowest"], "o-", color=f"C{i}", label=label)
            young = [math.nan if v is None else v for v in row["young"]]
            relaxation.plot(
                row["relaxation"], young, "--", color=f"C{i}", label=None if n else "Young"
            )
    relaxation.set(xlabel="relaxation", ylabel="sweeps to 1e-3, slowest image", yscale="log")
    for name, label, mark in (
        ("sweeps_without", "relaxation 1", "C0o"),
        ("sweeps", "suggested relaxation", "C1s"),
    ):
        for n, at in enumerate(FEEDBACKS):
            rows = study.all_of("feedback", study.of_seeds("muon", feedback=at))
            values = [row.get(name, math.nan) for row in rows]  # none beyond contractivity
            feedback.plot([at] * len(values), values, mark, label=None if n else label)
    feedback.set(xlabel="feedback", ylabel="sweeps to 1e-3, slowest image", yscale="log")
    for name, label, mark in (
        ("ambiguous", "share of images with several fixed points", "C0o"),
        ("radius_largest", "largest spectral radius", "C1s"),
    ):
        for n, at in enumerate(DECAYS):
            rows = study.all_of("decay", study.of_seeds("muon", weight_decay=at))
            decay.plot(
                [at] * len(rows), [row[name] for row in rows], mark, label=None if n else label
            )
    decay.set(xlabel="weight decay", xscale="symlog", ylim=(-0.05, None))
    for axis in (relaxation, feedback, decay):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    return figure


def run(arguments: Arguments) -> dict[str, Any]:
    """Make what is missing, print, draw, write."""
    out = new_folder("out", arguments.out, "strong_feedback.json")
    made = provenance()  # before files of the checkout change
    study = Study(arguments)
    study.make()
    console = Console()
    console.print(tabulate(study), width=WIDTH)
    draw_training(study).savefig(out / "training.png", dpi=150)
    draw_settling(study).savefig(out / "settling.png", dpi=150)
    document = arguments.decides() | {
        "seeds": arguments.seeds,
        "rows": study.journal.rows,
    }
    write_json(out / "strong_feedback.json", plain(document) | made)
    say(console, f"written to {out}")
    return document


def main() -> None:
    """Parse, run, and say in one line what was wrong where the input was."""
    with command():
        run(tyro.cli(Arguments, description=__doc__))


if __name__ == "__main__":
    main()
