"""What the experiments share: errors, trainings, exact gradients, agreement, intervals."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

import ep_jax as ep
from ep_jax import diagnostics, training
from ep_jax.checks import check_integer, check_seed
from ep_jax.cli import told_in_a_line
from ep_jax.data import Dataset, to_float
from ep_jax.diagnostics import Agreement
from ep_jax.optimizers import AdamW, Settings, make_optimizer
from ep_jax.tables import spaced

STATIC = ("spec", "phases")
WIDTH = 160
"""Of a study's table in characters: narrower, numbers would be cut off."""
ADAMW = AdamW()

STUDIED = ep.DeltaCode(quantum=0.5, decay=0.6, lag=1.0, nudged_quantum=0.7, nudged_decay=0.5)
"""The code of the study of pooling, ternary on a schedule; it suits 9 + 6 ordered sweeps at
feedback .05."""


@dataclass(frozen=True)
class EqualBudgets:
    """What all trainings of a study share."""

    runs: Path
    """Folder for rows and weights made so far: an interrupted command goes on."""
    out: Path
    """Folder for the result and the figures."""
    dataset: Literal["digits", "mnist", "fashion_mnist"] = "mnist"
    """Images; the network, its code and its phases are those of the preset of this name."""
    train_images: int = 20_000
    """Images to learn."""
    epochs: int = 1
    """Passes over them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and order of the images."""
    batches: int = 12
    """Batches of 64 images whose gradients are looked at."""
    images: int = 64
    """Images whose relaxation is looked at."""
    data_dir: str | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""

    def __post_init__(self) -> None:
        for name in ("train_images", "epochs", "batches", "images"):
            check_integer(name, getattr(self, name), at_least=1)
        for seed in self.seeds:
            check_seed("seeds", seed)
        if not self.seeds:
            raise ValueError("seeds is (); expected at least one")

    def decides(self) -> dict[str, Any]:
        """What decides the rows beside their keys."""
        names = ("dataset", "train_images", "epochs", "batches", "images")
        return {name: getattr(self, name) for name in names}


def finite(params: ep.Params) -> bool:
    """Whether no parameter has overflowed."""
    return all(bool(jnp.isfinite(value).all()) for value in jax.tree.leaves(params))


def margin(outputs: jax.Array, labels: jax.Array | np.ndarray) -> jax.Array:
    """By how much the right class leads in ``[..., classes]``; below 0 another one does."""
    right = jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)
    others = jnp.where(right > 0, -jnp.inf, outputs).max(-1)
    return jnp.sum(right * outputs, -1) - others


def learn(
    spec: ep.NetworkSpec,
    phases: ep.Phases,
    gradient: training.Gradient,
    data: Dataset,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    gain: float,
    batch: int = 64,
    seed: int = 0,
    optimizer: Settings = ADAMW,
    cap: float | None = None,
) -> tuple[ep.Params, training.StepMetrics]:
    """Train from scratch in one dispatch; the seed decides weights and order of the images."""
    made = make_optimizer(
        spec,
        optimizer,
        learning_rate=learning_rate,
        steps=steps,
        weight_decay=weight_decay,
        cap=cap,
    )
    init_key, step_key = jax.random.split(jax.random.key(seed))
    state = training.init_train_state(init_key, spec, made, gain)
    run = training.make_train_steps(spec, phases, made, gradient=gradient)
    order = np.random.default_rng(seed).permutation(len(data.train_images))
    batches = np.resize(order, (steps, batch)).astype(np.int32)
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    state, metrics = jax.jit(run)(state, images, labels, jnp.asarray(batches), step_key)
    return state.params, metrics


def command() -> contextlib.AbstractContextManager[None]:
    """What was wrong with the input of a script, in one line; a reader that went away ends it."""
    return told_in_a_line(Path(sys.argv[0]).name)


def validation_batches(data: Dataset, batches: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[batches, batch, H, W, C]`` in [0, 1] and labels ``[batches, batch]``.

    Raises:
        ValueError: there are not as many validation images.
    """
    needed = batches * batch
    if not 0 < needed <= len(data.validation_images):
        raise ValueError(f"batches times batch is {needed}; expected at least 1 and at most the "
                         f"{len(data.validation_images)} validation images")  # fmt: skip
    images = np.asarray(to_float(data.validation_images[:needed]))
    labels = data.validation_labels[:needed]
    return images.reshape(batches, batch, *images.shape[1:]), labels.reshape(batches, batch)


def in_float64(tree: Any) -> Any:
    """All floating-point arrays of a tree in double precision; inside ``jax.enable_x64``."""
    return jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


def exact_gradients(
    params: ep.Params, spec: ep.NetworkSpec, xs: np.ndarray, ys: np.ndarray
) -> list[ep.Params]:
    """The exact gradient of each batch, computed in float64."""
    with jax.enable_x64(True):
        exact = jax.jit(diagnostics.exact_gradient, static_argnames=STATIC)
        doubled = in_float64(params)
        return [
            jax.device_get(exact(doubled, spec, in_float64(x), y))
            for x, y in zip(xs, ys, strict=True)
        ]


def compare(grads: ep.Params, exact: ep.Params) -> Agreement:
    """`ep_jax.diagnostics.compare` in float64, on the host."""
    with jax.enable_x64(True):
        return jax.device_get(diagnostics.compare(jax.device_get(grads), exact))


def agreements(
    gradient: Callable[..., Any],
    params: ep.Params,
    xs: np.ndarray,
    ys: np.ndarray,
    exact: Sequence[ep.Params],
    seed: int = 0,
) -> tuple[Agreement, ep.GradientInfo]:
    """Agreement with a leading axis of batches, and what the last gradient told about itself.

    Args:
        gradient: ``(params, xs, ys, key) -> (grads, info)``, jitted.
        params: parameters.
        xs: batches of images ``[batches, B, ...]``.
        ys: labels ``[batches, B]``.
        exact: the exact gradient of each batch.
        seed: seed of random neurons.
    """
    found, info = [], None
    for i, (x, y, true) in enumerate(zip(xs, ys, exact, strict=True)):
        grads, info = gradient(params, x, y, jax.random.fold_in(jax.random.key(seed), i))
        found.append(compare(grads, true))
    assert info is not None
    return jax.tree.map(lambda *fields: np.stack(fields), *found), info


def muon(
    learning_rate: float, steps: int, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Muon for the matrices of any model, Adam for its vectors; rates decay along a cosine.

    A kernel of a convolution is a matrix from all its inputs to its outputs, the last axis. (For a
    network alone `ep_jax.optimizers.make_optimizer` has a cheaper one.)
    """

    def matrices(params: Any) -> Any:
        def axes(value: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
            inputs = tuple(range(value.ndim - 1))
            return optax.contrib.MuonDimensionNumbers(inputs, value.ndim - 1) if inputs else None

        return jax.tree.map(axes, params)

    return optax.contrib.muon(
        optax.cosine_decay_schedule(learning_rate, steps),
        weight_decay=weight_decay,
        adam_learning_rate=optax.cosine_decay_schedule(2e-3, steps),
        muon_weight_dimension_numbers=matrices,
    )


class Journal:
    """Rows that are written as they come, one line of JSON each, and not made twice.

    An experiment that was interrupted goes on where it was. A last line that was cut off is made
    again.

    Args:
        path: the file. Its first line holds the settings.
        settings: all that decides the rows beside their keys.

    Raises:
        ValueError: the file holds rows of other settings, or lines that are none of these.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        try:
            made, *self.rows = [json.loads(line) for line in whole.splitlines()] or [None]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} holds a line that is no JSON: {error}") from error
        settings = plain(settings)
        if made is None:
            self._write(settings)
        elif made != settings:
            raise ValueError(f"{path} holds rows made with the settings {made}, and not with "
                             f"{settings}; expected the same, or another folder")  # fmt: skip

    def _write(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def row(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row with these entries: an old one, or what `make` adds to them."""
        for old in self.rows:
            if all(old.get(name) == value for name, value in key.items()):
                return old
        row = plain(key | make())
        self.rows.append(row)
        self._write(row)
        return row


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval (Student's t)."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.inf
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values)), float(half)


def over_seeds(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean and half width of its interval, as text; ``None`` stands for what diverged."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    mean, half = interval(numbers)
    told = f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(numbers) > 1 else "")
    missing = len(values) - len(numbers)
    return f"{told} ({missing} diverged)" if missing else told


def by_layer(rows: Sequence[Any], digits: int = 2) -> str:
    """Means over the seeds of what has a number for each layer, as text."""
    return spaced(np.mean(np.asarray(rows, float), axis=0), digits) if rows else "–"


def plain(tree: Any) -> Any:
    """Arrays as lists and numbers, fit for JSON; what is not a number (0 / 0) becomes ``None``."""
    if hasattr(tree, "tolist"):
        return plain(tree.tolist())
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
