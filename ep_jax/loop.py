"""The loop of a training, without files, signals and progress.

Use it, or copy and change it::

    training = Training(config, data)
    state = training.compile(training.start())
    for epoch in range(1, config.epochs + 1):
        state, record = training.epoch(state, epoch)
        on_epoch(record)

`ep_jax.run.train` is this loop with a folder around it, and `Training.epoch` the loop inside.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ep_jax import health, training
from ep_jax.data import Dataset, check_dataset, to_float
from ep_jax.devices import placements
from ep_jax.diagnostics import spikes_per_neuron
from ep_jax.dynamics import PhaseInfo
from ep_jax.evaluation import relaxation_of
from ep_jax.gradients import GRADIENTS
from ep_jax.network import NetworkSpec
from ep_jax.optimizers import make_optimizer
from ep_jax.presets import Config, spec_of
from ep_jax.training import StepMetrics, TrainState

Record: TypeAlias = dict[str, Any]
"""What an epoch measured: a line of ``metrics.jsonl``."""
RADIUS_IMAGES = 16
"""Validation images on which the spectral radius is looked at after each epoch."""


class Training:
    """A training of `config` on `data`, ready to be run.

    Args:
        config: the run.
        data: what is learned; its first ``config.train_images`` training images, where these are
            given.

    Attributes:
        config: the run.
        data: what is learned.
        spec: the network.
        eval_key: random key of evaluations.
        compile_seconds: how long `compile` took.

    Raises:
        ValueError, TypeError: the configuration does not fit the data.

    Example:
        >>> from ep_jax.data import load
        >>> from ep_jax.presets import PRESETS
        >>> training = Training(PRESETS["digits"], load("digits"))
        >>> training.spec.state_shapes, training.dispatches(1).shape
        (((4, 4, 32), (2, 2, 64), (128,), (10,)), (1, 32, 32))
    """

    def __init__(self, config: Config, data: Dataset) -> None:
        check_dataset(data)
        shape = data.train_images.shape[1:]
        config.augmentation.check(shape)
        if config.train_images is not None:
            if config.train_images > len(data.train_images):
                raise ValueError(f"train_images is {config.train_images}; expected at most the "
                                 f"{len(data.train_images)} there are")  # fmt: skip
            kept = slice(config.train_images)
            data = data._replace(
                train_images=data.train_images[kept], train_labels=data.train_labels[kept]
            )
        chooses = config.patience is not None or config.keep == "best"
        if chooses and not len(data.validation_images):
            raise ValueError(f"patience is {config.patience} and keep {config.keep!r} without "
                             "validation images; expected some to choose by")  # fmt: skip
        self.config, self.data = config, data
        self.spec = spec_of(config, shape, data.classes)
        self.compile_seconds = 0.0
        self._place = placements(config.devices)
        plan = self.dispatches(0)
        self._shape = plan.shape[1:]
        self._optimizer = optimizer_of(config, self.spec, config.epochs * plan[..., 0].size)
        self._init_key, step_key, self.eval_key = jax.random.split(jax.random.key(config.seed), 3)
        self._given = (data.train_images, data.train_labels, step_key)
        steps = training.make_train_steps(
            self.spec,
            config.phases,
            self._optimizer,
            augmentation=config.augmentation,
            gradient=functools.partial(GRADIENTS[config.gradient], microbatch=config.microbatch),
        )
        everywhere = self._place.everywhere
        given = (everywhere, everywhere, everywhere, self._place.batches, everywhere, everywhere)
        self._jitted: Any = jax.jit(
            _first(steps), donate_argnums=0, in_shardings=given, out_shardings=everywhere
        )

    def start(self) -> TrainState:
        """Before the first step, on all devices."""
        state = training.init_train_state(
            self._init_key, self.spec, self._optimizer, self.config.gain
        )
        return self._everywhere(state)

    def _everywhere(self, tree: Any) -> Any:
        """Arrays that every process has, on the devices of all of them."""
        return jax.jit(lambda tree: tree, out_shardings=self._place.everywhere)(tree)

    def compile(self, state: TrainState) -> TrainState:
        """Compile the steps and bring the data to the devices; the state is left as it is."""
        self._given = self._everywhere(self._given)
        images, labels, key = self._given
        batches = jax.ShapeDtypeStruct(self._shape, np.int32)
        began = time.perf_counter()
        self._run = self._jitted.lower(state, images, labels, batches, key, np.int32(0)).compile()
        self.compile_seconds = time.perf_counter() - began
        return state

    def dispatches(self, epoch: int) -> np.ndarray:
        """Indices ``[dispatches, steps, B]`` of the training images of an epoch, shuffled."""
        rng = np.random.default_rng([self.config.seed, epoch])
        return training.epoch_batches(
            rng, len(self.data.train_images), self.config.batch, self.config.steps_per_dispatch
        )

    def steps(self, state: TrainState, batches: np.ndarray) -> tuple[TrainState, StepMetrics]:
        """The steps of one dispatch; their metrics, stacked, on the host. `state` is used up.

        A part of a dispatch's batches is taken as well, and compiles nothing anew.
        """
        images, labels, key = self._given
        count = len(batches)
        padded = np.resize(batches, self._shape)  # with steps that are not made
        state, metrics = self._run(state, images, labels, padded, key, np.int32(count))
        return state, jax.tree.map(lambda values: values[:count], jax.device_get(metrics))

    def epoch(self, state: TrainState, epoch: int) -> tuple[TrainState, Record]:
        """All steps of an epoch, and what it measured. `state` is used up.

        Args:
            state: as it lies on the devices, from `compile` or the epoch before.
            epoch: number of the epoch, from 1: it decides the order of the images.
        """
        records: list[Record] = []
        for batches in self.dispatches(epoch):
            began = time.perf_counter()
            state, metrics = self.steps(state, batches)
            seconds = (time.perf_counter() - began) / len(batches)
            records += [r | {"seconds": seconds} for r in records_of(metrics, self.spec)]
        return state, self.epoch_record(state, epoch, records)

    def epoch_record(self, state: TrainState, epoch: int, steps: list[Record]) -> Record:
        """What an epoch measured, from the records of its steps, each with its ``seconds``."""
        record: Record = {"epoch": epoch, "step": int(state.step)} | mean_record(steps)
        record["val_error"] = self.validation_error(state)
        record["radius"] = self.radius(state)
        record["warnings"] = health.complaints(record, self.spec, self.config)
        record["seconds"] *= len(steps)
        dispatches = len(self.dispatches(0))
        record["curve"] = {
            name: np.reshape([r[name] for r in steps], (dispatches, -1)).mean(1).tolist()
            for name in ("loss", "error")
        }
        return record

    def validation_error(self, state: TrainState) -> float | None:
        """In per cent; ``None`` without validation images."""
        if not len(self.data.validation_images):
            return None
        # Answers are computed on one device, and the parameters lie on all.
        params = jax.device_get(state.params)
        answers, _ = training.predict(
            params, self.spec, self.config.phases, self.data.validation_images, self.eval_key
        )
        return training.error_rate(answers, self.data.validation_labels)

    def radius(self, state: TrainState) -> Record | None:
        """Spectral radius of some validation images; ``None`` without any.

        Returns:
            ``mean``, ``largest``, the share ``ambiguous`` whose state depends on the start, and the
            number of ``images``.
        """
        if not len(self.data.validation_images):
            return None
        xs = jnp.asarray(to_float(self.data.validation_images[:RADIUS_IMAGES]))
        params = jax.device_get(state.params)
        return relaxation_of(params, self.spec, xs) | {"images": len(xs)}


def optimizer_of(config: Config, spec: NetworkSpec, steps: int) -> optax.GradientTransformation:
    """The optimiser of `config` for a training of so many steps.

    Args:
        config: the run.
        spec: its network.
        steps: number of optimisation steps, which the schedule of the learning rate spans.
    """
    return make_optimizer(
        spec,
        config.optimizer,
        learning_rate=config.learning_rate,
        steps=steps,
        layer_rates=config.layer_rates,
        weight_decay=config.weight_decay,
        layer_decays=config.layer_decays,
        warmup=config.warmup,
        cap=config.cap,
        shrink=config.shrink,
    )


def _first(steps: Callable[..., tuple[TrainState, StepMetrics]]) -> Callable[..., Any]:
    """`steps` for the first `count` of its batches, a number that is known when it runs."""

    def run(
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        batches: jax.Array,
        key: jax.Array,
        count: jax.Array,
    ) -> tuple[TrainState, StepMetrics]:
        def step(i: jax.Array, carry: tuple[TrainState, StepMetrics]) -> Any:
            state, seen = carry
            state, metrics = steps(state, images, labels, batches[i][None], key)
            return state, jax.tree.map(lambda all, one: all.at[i].set(one[0]), seen, metrics)

        _, seen = jax.eval_shape(steps, state, images, labels, batches, key)
        blank = jax.tree.map(lambda all: jnp.zeros(all.shape, all.dtype), seen)
        return jax.lax.fori_loop(0, count, step, (state, blank))

    return run


def records_of(metrics: StepMetrics, spec: NetworkSpec) -> list[Record]:
    """The metrics of each step, by the names that they have in ``metrics.jsonl``.

    Args:
        metrics: of several steps, stacked.
        spec: the network.
    """
    steps = range(len(metrics.loss))
    return [record_of(jax.tree.map(lambda v, i=i: v[i], metrics), spec) for i in steps]


def record_of(metrics: StepMetrics, spec: NetworkSpec) -> Record:
    """The metrics of a step, by the names that they have in ``metrics.jsonl``.

    Args:
        metrics: metrics of one step.
        spec: the network.
    """
    step = jax.tree.map(float, metrics)
    record = {
        "loss": step.loss,
        "error": step.error,
        **_settled(step.free, ""),
        "moving": step.free.moving,
        "spikes_free": spikes_per_neuron(spec, step.free.spikes),
        "spikes_nudged": 0.0,
        "spikes_free_per_layer": list(step.free.spikes),
        "activity": list(step.free.activity),
        "gradient_norm": list(step.gradient_norm),
        "params_norm": list(step.params_norm),
    }
    if step.nudged is not None:
        record |= _settled(step.nudged, "_nudged")
        record["activity_nudged"] = list(step.nudged.activity)
        record["spikes_nudged"] = spikes_per_neuron(spec, step.nudged.spikes)
        record["spikes_nudged_per_layer"] = list(step.nudged.spikes)
    if step.limited is not None:
        record["limited"] = step.limited
    if step.links is not None:
        record["link_norms"] = list(step.links.norms)
        record["links_capped"] = step.links.capped
    return record


def _settled(info: PhaseInfo, suffix: str) -> Record:
    """How well a phase settled: largest residual of a batch, its mean, share of unsettled images.

    ``residuals`` is the largest of each layer.
    """
    return {
        f"residual{suffix}": info.residual,
        f"residuals{suffix}": list(info.residuals),
        f"mean_residual{suffix}": info.mean_residual,
        f"unsettled{suffix}": info.unsettled,
    }


def mean_record(records: list[Record]) -> Record:
    """The mean of such records."""
    return {name: np.mean([r[name] for r in records], axis=0).tolist() for name in records[0]}
