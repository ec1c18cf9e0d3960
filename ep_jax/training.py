"""Training: augmentation, several steps a dispatch, evaluation. Pure functions.

Data lie on the device as uint8; a dispatch gets the indices of its batches and scans over them, so
nothing but indices and metrics crosses the boundary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ep_jax import network
from ep_jax.checks import check_integer, check_non_negative
from ep_jax.coordinates import Absolute
from ep_jax.data import check_pixels, to_float
from ep_jax.dynamics import PhaseInfo, mean_info, settle_batch
from ep_jax.gradients.ep import ep_gradient
from ep_jax.network import NetworkSpec, Params
from ep_jax.optimizers import norms_of
from ep_jax.phases import Phases, check_phases

Gradient: TypeAlias = Callable[..., tuple[Params, Any]]
"""Any of the library's gradients: ``(params, spec, xs, ys, phases, key) -> (grads, info)``."""


class TrainState(NamedTuple):
    """All that training carries from step to step.

    Attributes:
        params: parameters.
        opt_state: state of the optimiser.
        step: number of optimisation steps done, int32.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array


class LinkNorms(NamedTuple):
    """The links between the layers, where their norms are capped.

    Attributes:
        norms: operator norm of each link, ``[L - 1]``.
        capped: how many of them were scaled down.
    """

    norms: tuple[jax.Array, ...]
    capped: jax.Array


def link_norms_of(opt_state: optax.OptState) -> LinkNorms | None:
    """What an optimiser's state says of capped links; ``None`` where nothing is capped.

    Args:
        opt_state: the state of the optimiser.
    """
    found = norms_of(opt_state)
    return None if found is None else LinkNorms(tuple(found.norms), found.capped)


class StepMetrics(NamedTuple):
    """What one optimisation step (or, averaged, several) tells about itself.

    Attributes:
        loss: mean cost of the batch.
        error: share of wrong answers in the batch, in per cent.
        gradient_norm: tuple over layers of the gradients' norms.
        params_norm: tuple over layers of the norms of the parameters after the step.
        free: `PhaseInfo` of the free phases: the largest residuals of the batch, else means.
        nudged: that of the nudged phases; ``None`` for a gradient without them.
        limited: share of the examples whose displacement was limited; ``None`` without a limit.
        links: norms of the links and how many of them the cap held; ``None`` without a cap.
    """

    loss: jax.Array
    error: jax.Array
    gradient_norm: tuple[jax.Array, ...]
    params_norm: tuple[jax.Array, ...]
    free: PhaseInfo
    nudged: PhaseInfo | None
    limited: jax.Array | None = None
    links: LinkNorms | None = None


def init_train_state(
    key: jax.Array, spec: NetworkSpec, optimizer: optax.GradientTransformation, gain: float = 1.0
) -> TrainState:
    """A fresh training state.

    Args:
        key: random key of the initial weights.
        spec: the network.
        optimizer: its state is made for these weights.
        gain: scale of the weights, see `ep_jax.init_params`.
    """
    params = network.draw_params(key, spec, gain)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


@dataclass(frozen=True)
class Augmentation:
    """How the training images are varied, each image on its own; by default not at all.

    What moves in from outside an image is 0.
    """

    shift: int = 0
    """Shift by up to this many whole pixels along both axes."""
    rotate: float = 0.0
    """Rotate by up to this many degrees."""
    scale: float = 0.0
    """Scale height and width, each by a factor of up to 1 plus this, or of down to its inverse."""
    shear: float = 0.0
    """Shear by up to this many degrees."""
    warp: float = 0.0
    """Bend: displace the knots of a 5x5 grid by this many pixels (standard deviation)."""
    flip: bool = False
    """Mirror half of the images left to right."""
    erase: int = 0
    """Set a square of this side, anywhere in the image, to 0."""

    def __post_init__(self) -> None:
        check_integer("shift", self.shift, at_least=0)
        check_integer("erase", self.erase, at_least=0)
        check_non_negative("rotate", self.rotate, at_most=180.0)
        check_non_negative("scale", self.scale)
        check_non_negative("shear", self.shear, at_most=80.0)
        check_non_negative("warp", self.warp)

    @property
    def deforms(self) -> bool:
        """Whether pixels are interpolated."""
        return max(self.rotate, self.scale, self.shear, self.warp) > 0.0

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise where examples of a shape are no images, or nothing would be left of them."""
        if self == Augmentation():
            return
        if len(shape) != 3:
            raise ValueError(f"augmentation is {self} for examples of shape {shape}; expected "
                             "none, or images (H, W, C)")  # fmt: skip
        side = min(shape[:2])
        for name, value in (("shift", self.shift), ("erase", self.erase), ("warp", self.warp)):
            if value >= side:
                raise ValueError(f"augmentation.{name} is {value} for images of shape {shape}; "
                                 f"expected less than {side}")  # fmt: skip


def augment(key: jax.Array, images: jax.Array, how: Augmentation) -> jax.Array:
    """Vary images ``[B, H, W, C]``, each on its own. Examples that are no images stay as they are.

    Args:
        key: random key.
        images: a batch.
        how: kinds and sizes of the variations.

    Example:
        >>> augment(jax.random.key(0), jnp.ones((2, 8, 8, 1)), Augmentation(shift=2)).shape
        (2, 8, 8, 1)
    """
    if how == Augmentation():
        return images

    def vary(key: jax.Array, image: jax.Array) -> jax.Array:
        shift_key, deform_key, flip_key, erase_key = jax.random.split(key, 4)
        if how.shift:
            padded = jnp.pad(image, ((how.shift, how.shift), (how.shift, how.shift), (0, 0)))
            row, column = jax.random.randint(shift_key, (2,), 0, 2 * how.shift + 1)
            image = jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
        if how.deforms:
            image = _deform(deform_key, image, how)
        if how.flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        if how.erase:
            image = _erase(erase_key, image, how.erase)
        return image

    return jax.vmap(vary)(jax.random.split(key, len(images)), images)


def _deform(key: jax.Array, image: jax.Array, how: Augmentation) -> jax.Array:
    """Rotated, scaled, sheared and bent about its centre, interpolated linearly."""
    height, width, _ = image.shape
    angle_key, scale_key, shear_key, warp_key = jax.random.split(key, 4)
    angle = jnp.deg2rad(how.rotate) * jax.random.uniform(angle_key, minval=-1.0)
    slope = jnp.tan(jnp.deg2rad(how.shear) * jax.random.uniform(shear_key, minval=-1.0))
    scales = (1.0 + how.scale) ** jax.random.uniform(scale_key, (2,), minval=-1.0)
    turned = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    matrix = turned @ jnp.array([[1.0, 0.0], [slope, 1.0]]) @ jnp.diag(scales)
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"))
    middle = jnp.array([height - 1, width - 1]).reshape(2, 1, 1) / 2
    # Where each pixel of the result comes from.
    source = jnp.einsum("ij,jhw->ihw", matrix, grid.astype(middle.dtype) - middle) + middle
    if how.warp:
        knots = how.warp * jax.random.normal(warp_key, (2, 5, 5))
        source += jax.image.resize(knots, source.shape, "cubic")
    return jax.vmap(
        lambda channel: jax.scipy.ndimage.map_coordinates(channel, list(source), order=1),
        in_axes=-1,
        out_axes=-1,
    )(image)


def _erase(key: jax.Array, image: jax.Array, side: int) -> jax.Array:
    """Without a square whose middle is anywhere in the image."""
    height, width, _ = image.shape

    def covered(key: jax.Array, length: int) -> jax.Array:
        start = jax.random.randint(key, (), 0, length) - side // 2
        return (start <= jnp.arange(length)) & (jnp.arange(length) < start + side)

    row_key, column_key = jax.random.split(key)
    hole = covered(row_key, height)[:, None] & covered(column_key, width)[None, :]
    return jnp.where(hole[:, :, None], 0.0, image)


def make_train_steps(
    spec: NetworkSpec,
    phases: Phases,
    optimizer: optax.GradientTransformation,
    *,
    augmentation: Augmentation = Augmentation(),
    gradient: Gradient = ep_gradient,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The function that runs several optimisation steps in one dispatch.

    Args:
        spec: the network.
        phases: how its gradient is estimated.
        optimizer: an optax optimiser.
        augmentation: how the images are varied; by default not at all.
        gradient: the gradient estimator.

    Returns:
        A function to be jitted, ``(state, images, labels, batches, key) -> (state, metrics)``:
        uint8 images ``[N, ...]`` and labels ``[N]`` on the device, indices ``[steps, B]`` of the
        batches, the training's random key; metrics are stacked over steps. `state` can be donated.
    """

    def train_step(
        state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        augment_key, phase_key = jax.random.split(jax.random.fold_in(key, state.step))
        xs = to_float(images)
        xs = augment(augment_key, xs, augmentation)
        grads, info = gradient(state.params, spec, xs, labels, phases, phase_key)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, opt_state = optax.with_extra_args_support(optimizer).update(
                grads, state.opt_state, state.params, unsettled=info.free.unsettled
            )
        params = cast(Params, optax.apply_updates(state.params, updates))
        metrics = StepMetrics(
            loss=info.cost,
            error=100.0 * jnp.mean(network.classify(info.output) != labels),
            gradient_norm=tuple(map(optax.tree.norm, grads)),
            params_norm=tuple(map(optax.tree.norm, params)),
            free=info.free,
            nudged=info.nudged,
            limited=info.limited,
            links=link_norms_of(opt_state),
        )
        return TrainState(params, opt_state, state.step + 1), metrics

    def train_steps(
        state: TrainState, images: jax.Array, labels: jax.Array, batches: jax.Array, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        return jax.lax.scan(
            lambda state, batch: train_step(state, images[batch], labels[batch], key),
            state,
            batches,
        )

    return train_steps


def epoch_batches(
    rng: np.random.Generator, examples: int, batch: int, steps_per_dispatch: int
) -> np.ndarray:
    """A shuffled epoch as indices ``[dispatches, steps, batch]``, every example at least once.

    All dispatches have the same number of steps, so that one compiled function serves them; what is
    missing to fill the last one is taken from the start of the same shuffle.

    Args:
        rng: what shuffles.
        examples: number of examples.
        batch: examples in a step.
        steps_per_dispatch: most steps in a dispatch.

    Example:
        >>> epoch_batches(np.random.default_rng(0), 10, 2, 3).shape
        (2, 3, 2)
    """
    check_integer("batch", batch, at_least=1)
    check_integer("steps_per_dispatch", steps_per_dispatch, at_least=1)
    steps = -(-examples // batch)
    dispatches = -(-steps // steps_per_dispatch)
    shape = (dispatches, -(-steps // dispatches), batch)
    return np.resize(rng.permutation(examples), shape).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("spec", "phases"))
def _answers(
    params: Params, images: jax.Array, keys: jax.Array, *, spec: NetworkSpec, phases: Phases
) -> tuple[jax.Array, PhaseInfo]:
    """Answers ``[B, classes]`` to images ``[B, ...]``, and each example's info."""
    with phases.products():
        prepared = network.prepare(params, spec, phases.precision)
        drives = jax.vmap(lambda x: network.input_drive(spec, prepared, x))(to_float(images))
        found = settle_batch(
            spec,
            phases,
            False,
            lambda *drives: Absolute(spec, prepared, drives),
            drives,
            keys if spec.neuron.stochastic else None,
        )
        outputs = jax.vmap(lambda s: network.read_out(spec, prepared, s))(found.state[-1])
        return outputs, found.info


def check_images(spec: NetworkSpec, images: np.ndarray | jax.Array) -> None:
    """Raise where `images` are not images ``[N, *spec.input_shape]``."""
    if not hasattr(images, "shape") or not hasattr(images, "dtype"):
        raise TypeError(f"images is {type(images).__name__}; expected an array (N, "
                        f"{', '.join(map(str, spec.input_shape))})")  # fmt: skip
    if tuple(images.shape[1:]) != spec.input_shape or not len(images):
        raise ValueError(
            f"images has dtype {images.dtype} and shape {tuple(images.shape)}; expected shape "
            f"(N, {', '.join(map(str, spec.input_shape))}) with N of at least 1"
        )
    check_pixels("images", images)


def predict(
    params: Params,
    spec: NetworkSpec,
    phases: Phases,
    images: np.ndarray | jax.Array,
    key: jax.Array | None = None,
    batch: int = 100,
) -> tuple[np.ndarray, PhaseInfo]:
    """The classes that the network names for uint8 images after ``phases.free`` sweeps.

    Args:
        params: parameters of `spec`.
        spec: the network.
        phases: how long and in which sweeps it settles.
        images: uint8 ``[N, *spec.input_shape]``.
        key: random key for stochastic neurons; a fixed one by default.
        batch: images in flight at once. With stragglers an answer may depend on it: which images
            of a batch go on settling depends on the others.

    Returns:
        Predicted labels ``[N]`` (-1 where an answer is not a number) and the `PhaseInfo` of all
        images: largest residuals, else means.
    """
    network.check_params(spec, params)
    check_images(spec, images)
    check_integer("batch", batch, at_least=1)
    key = jax.random.key(0) if key is None else key
    check_phases(spec, phases, key)
    keys = jax.random.split(key, len(images))
    batch = min(batch, len(images))
    parts = []
    for start in range(0, len(images), batch):
        these = np.arange(start, min(start + batch, len(images)))
        # Repeated where the last batch is not full, so that one compiled program serves all.
        these = np.resize(these, batch)
        parts.append(_answers(params, images[these], keys[these], spec=spec, phases=phases))
    outputs, info = jax.tree.map(lambda *some: jnp.concatenate(some)[: len(images)], *parts)
    return np.asarray(network.classify(outputs)), mean_info(info)


def error_rate(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of wrong predictions, in per cent.

    Args:
        predictions: predicted labels ``[N]``.
        labels: true labels ``[N]``.

    Raises:
        ValueError: they are not as many, or none.
    """
    if np.ndim(labels) != 1 or np.shape(predictions) != np.shape(labels) or not len(labels):
        raise ValueError(
            f"predictions has shape {np.shape(predictions)} and labels {np.shape(labels)}; "
            "expected (N,) twice, with N of at least 1"
        )
    return 100.0 * int(np.count_nonzero(predictions != labels)) / len(labels)
