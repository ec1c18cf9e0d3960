"""The loop of a training, without files, signals and progress.

Use it, or copy and change it::

    training = Training(config, data)
    state = training.start()
    training.compile(state)
    for epoch in range(1, config.epochs + 1):
        for batches in training.dispatches(epoch):
            state, metrics = training.steps(state, batches)
        print(epoch, metrics.loss.mean(), training.validation_error(state))

`ep_jax.run.train` is this loop with a folder around it.
"""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ep_jax import training
from ep_jax.data import Dataset, check_dataset, to_float
from ep_jax.devices import placements
from ep_jax.diagnostics import spikes_per_neuron
from ep_jax.dynamics import PhaseInfo
from ep_jax.evaluation import relaxation_of
from ep_jax.gradients import GRADIENTS
from ep_jax.network import NetworkSpec
from ep_jax.optimizers import make_optimizer
from ep_jax.presets import Config, spec_of
from ep_jax.training import Augmentation, StepMetrics, TrainState

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
        if config.augmentation != Augmentation() and len(shape) != 3:
            raise ValueError(f"augmentation is {config.augmentation} for examples of shape "
                             f"{shape}; expected none, or images (H, W, C)")  # fmt: skip
        if config.train_images is not None:
            if config.train_images > len(data.train_images):
                raise ValueError(f"train_images is {config.train_images}; expected at most the "
                                 f"{len(data.train_images)} there are")  # fmt: skip
            kept = slice(config.train_images)
            data = data._replace(
                train_images=data.train_images[kept], train_labels=data.train_labels[kept]
            )
        self.config, self.data = config, data
        self.spec = spec_of(config, shape, data.classes)
        self.compile_seconds = 0.0
        self._place = placements(config.devices)
        plan = self.dispatches(0)
        self._optimizer = optimizer_of(config, self.spec, config.epochs * plan[..., 0].size)
        self._init_key, step_key, self.eval_key = jax.random.split(jax.random.key(config.seed), 3)
        self._given = (data.train_images, data.train_labels, step_key)
        self._run: Any = jax.jit(
            training.make_train_steps(
                self.spec,
                config.phases,
                self._optimizer,
                augmentation=config.augmentation,
                gradient=GRADIENTS[config.gradient],
            ),
            donate_argnums=0,
            out_shardings=self._place.everywhere,
        )

    def start(self) -> TrainState:
        """Before the first step."""
        return training.init_train_state(
            self._init_key, self.spec, self._optimizer, self.config.gain
        )

    def compile(self, state: TrainState) -> TrainState:
        """Compile the steps and bring the data to the devices, once; the state as it lies there."""
        state, self._given = jax.device_put((state, self._given), self._place.everywhere)
        images, labels, key = self._given
        batches = jax.device_put(self.dispatches(0)[0], self._place.batches)
        began = time.perf_counter()
        self._run = self._run.lower(state, images, labels, batches, key).compile()
        self.compile_seconds = time.perf_counter() - began
        return state

    def dispatches(self, epoch: int) -> np.ndarray:
        """Indices ``[dispatches, steps, B]`` of the training images of an epoch, shuffled."""
        rng = np.random.default_rng([self.config.seed, epoch])
        return training.epoch_batches(
            rng, len(self.data.train_images), self.config.batch, self.config.steps_per_dispatch
        )

    def steps(self, state: TrainState, batches: np.ndarray) -> tuple[TrainState, StepMetrics]:
        """The steps of one dispatch; their metrics, stacked, on the host. `state` is used up."""
        images, labels, key = self._given
        placed = jax.device_put(batches, self._place.batches)
        state, metrics = self._run(state, images, labels, placed, key)
        return state, jax.device_get(metrics)

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


def record_of(metrics: StepMetrics, spec: NetworkSpec) -> Record:
    """The means of a dispatch's metrics, by the names that they have in ``metrics.jsonl``.

    Args:
        metrics: metrics of several steps, stacked.
        spec: the network.
    """
    mean = jax.tree.map(lambda values: float(values.mean()), metrics)
    record = {
        "loss": mean.loss,
        "error": mean.error,
        **_settled(mean.free, ""),
        "moving": mean.free.moving,
        "spikes_free": spikes_per_neuron(spec, mean.free.spikes),
        "spikes_nudged": 0.0,
        "spikes_free_per_layer": list(mean.free.spikes),
        "activity": list(mean.free.activity),
        "gradient_norm": list(mean.gradient_norm),
        "params_norm": list(mean.params_norm),
    }
    if mean.nudged is not None:
        record |= _settled(mean.nudged, "_nudged")
        record["activity_nudged"] = list(mean.nudged.activity)
        record["spikes_nudged"] = spikes_per_neuron(spec, mean.nudged.spikes)
        record["spikes_nudged_per_layer"] = list(mean.nudged.spikes)
    if mean.limited is not None:
        record["limited"] = mean.limited
    if mean.links is not None:
        record["link_norms"] = list(mean.links.norms)
        record["links_capped"] = mean.links.capped
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
