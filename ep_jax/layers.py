"""Layers and their linear maps: convolution, pooling, and the folded average pool.

A layer holds no parameters; it is a hashable description, static under ``jit``. Its affine drive is
``A(s) = B(s) + b`` with the bias-free linear (for max pooling: positively homogeneous) map ``B``.
A bias is constant over space, so every pool lets it through unchanged and it is added last.

``B`` works on *packed* states. ``pack`` puts the logical ``[H, W, C]`` state below a layer into the
layout in which that layer reads it most cheaply; ``kernel`` turns the logical weights into the
matrix that multiplies the patches of a packed state. Both are linear, so the derivative with
respect to the logical weights and states flows through them.

**The folded average pool.** Average pooling of a convolution is itself a convolution: with stride 2
and the kernel box-filtered to ``k + 1``. After space-to-depth of the state (``[H, W, C]`` to
``[H/2, W/2, 4 C]``) it becomes a plain stride-1 convolution that needs about a quarter of the
multiplications and no pooling at all.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from ep_jax import convolution
from ep_jax.checks import check_choice, check_integer
from ep_jax.convolution import Window

Shape: TypeAlias = tuple[int, ...]

POOLS = ("avg", "max", None)
PADDINGS = ("VALID", "SAME")


@dataclass(frozen=True)
class Conv:
    """A stride-1 convolution followed by a 2x2, stride-2 pool; states are post-pool.

    Attributes:
        features: number of output channels.
        kernel: side of the square kernel.
        pool: ``"avg"``, ``"max"`` or ``None``.
        padding: ``"VALID"`` or ``"SAME"`` (zeros, as in ``jax.lax``).
        fold: fold the average pool into the convolution. The numbers are the same to rounding;
            ``False`` computes the convolution, then the pool, as the papers write it.

    Example:
        >>> Conv(32, 5).output_shape((28, 28, 1))
        (12, 12, 32)
    """

    features: int
    kernel: int
    pool: Literal["avg", "max"] | None = "avg"
    padding: Literal["VALID", "SAME"] = "VALID"
    fold: bool = True

    def __post_init__(self) -> None:
        check_integer("Conv.features", self.features, at_least=1)
        check_integer("Conv.kernel", self.kernel, at_least=1)
        check_choice("Conv.pool", self.pool, POOLS)
        check_choice("Conv.padding", self.padding, PADDINGS)

    def weight_shape(self, below: Shape) -> Shape:
        """HWIO shape of the weights on a state of shape ``below``."""
        return (self.kernel, self.kernel, below[-1], self.features)

    def output_shape(self, below: Shape) -> Shape:
        """Logical ``(H, W, C)`` of this layer's state; ``ValueError`` where it does not fit."""
        if len(below) != 3:
            raise ValueError(f"{self} needs an input of shape (H, W, C), but what is below it "
                             f"has shape {below}")  # fmt: skip
        shrink = self.kernel - 1 if self.padding == "VALID" else 0
        height, width = below[0] - shrink, below[1] - shrink
        if height < 1 or width < 1:
            raise ValueError(f"{self}: the kernel is larger than its input of shape {below}")
        if self.pool is None:
            return (height, width, self.features)
        if height % 2 or width % 2:
            raise ValueError(
                f"{self}: pool={self.pool!r} is 2x2 with stride 2 and does not divide the "
                f"convolution's output of {height}x{width} (input shape {below}); expected even "
                "sides: change kernel, padding or the input's shape"
            )
        return (height // 2, width // 2, self.features)


@dataclass(frozen=True)
class Dense:
    """A fully connected layer on the flattened (HWC order) state below.

    Attributes:
        features: number of units.

    Example:
        >>> Dense(10).weight_shape((4, 4, 64))
        (1024, 10)
    """

    features: int

    def __post_init__(self) -> None:
        check_integer("Dense.features", self.features, at_least=1)

    def weight_shape(self, below: Shape) -> Shape:
        """``[in, out]`` shape of the weights on a state of shape ``below``."""
        return (math.prod(below), self.features)

    def output_shape(self, below: Shape) -> Shape:
        """Shape of this layer's state."""
        del below
        return (self.features,)


Layer: TypeAlias = Conv | Dense


def _folds(layer: Conv) -> bool:
    return layer.fold and layer.pool == "avg"


def _window(layer: Conv, below: Shape) -> Window:
    """How a convolution gathers its patches from what `_read` makes of the packed state."""
    before, after = _padding(layer)
    if not _folds(layer):
        return Window(layer.kernel, (before, after))
    pad = (before // 2, (after + 1) // 2) if _blocked(layer, below) else (0, 0)
    return Window(layer.kernel // 2 + 1, pad)


def _padding(layer: Conv) -> tuple[int, int]:
    """Zeros before and after."""
    if layer.padding == "VALID":
        return 0, 0
    before = (layer.kernel - 1) // 2
    return before, layer.kernel - 1 - before


def _blocked(layer: Layer, below: Shape) -> bool:
    """Whether the packed layout is space-to-depth: where blocks of two do not straddle windows."""
    if isinstance(layer, Dense) or not _folds(layer):
        return False
    before, _ = _padding(layer)
    return not (before % 2 or below[0] % 2 or below[1] % 2)


def pack(layer: Layer, below: Shape, state: jax.Array) -> jax.Array:
    """The logical state ``below`` a layer in the layout in which the layer reads it."""
    if isinstance(layer, Dense):
        return state.reshape(-1)
    if not _blocked(layer, below):
        return state
    return _space_to_depth(state)


def _space_to_depth(state: jax.Array) -> jax.Array:
    """``[H, W, C]`` in blocks of two by two: ``[H/2, W/2, 4 C]``."""
    h, w, c = state.shape
    blocks = state.reshape(h // 2, 2, w // 2, 2, c).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(h // 2, w // 2, -1)


def _read(layer: Conv, below: Shape, packed: jax.Array) -> jax.Array:
    """What the window of a convolution slides over: blocks, wherever a pool is folded.

    Where blocks of the state itself would straddle windows, it is framed by zeros first.
    """
    if not _folds(layer) or _blocked(layer, below):
        return packed
    before, _ = _padding(layer)
    sides = (2 * (n + layer.kernel // 2) for n in layer.output_shape(below)[:2])
    frame = [(before, side - before - n) for side, n in zip(sides, below[:2], strict=True)]
    return _space_to_depth(jnp.pad(packed, (*frame, (0, 0))))


def unpack(layer: Layer, below: Shape, packed: jax.Array) -> jax.Array:
    """The inverse of `pack`."""
    if _blocked(layer, below):
        h, w, c = below
        packed = packed.reshape(h // 2, w // 2, 2, 2, c).transpose(0, 2, 1, 3, 4)
    return packed.reshape(below)


def kernel(layer: Layer, below: Shape, w: jax.Array) -> jax.Array:
    """The matrix ``[patch, features]`` of a layer's linear map; linear in the weights ``w``."""
    if isinstance(layer, Dense):
        return w
    if not _folds(layer):
        return w.reshape(-1, layer.features)
    # pool(conv(s, w)) = conv(s, box * w) with stride 2; box is the 2x2 average.
    shifts = [((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)) for i in (0, 1) for j in (0, 1)]
    folded = functools.reduce(jnp.add, [jnp.pad(w, shift) for shift in shifts]) / 4
    m, c = _window(layer, below).size, below[-1]
    extra = 2 * m - folded.shape[0]
    folded = jnp.pad(folded, ((0, extra), (0, extra), (0, 0), (0, 0)))
    folded = folded.reshape(m, 2, m, 2, c, -1).transpose(0, 2, 1, 3, 4, 5)
    return folded.reshape(-1, layer.features)


def convolve(layer: Layer, below: Shape, matrix: jax.Array, packed: jax.Array) -> jax.Array:
    """The linear part of a drive: all of it but a pool that is not folded.

    Args:
        layer: the layer.
        below: logical shape of the state below it.
        matrix: what `kernel` made of its weights.
        packed: the state below, in the layout of `pack`.
    """
    if isinstance(layer, Dense):
        return packed @ matrix
    return convolution.convolve(_window(layer, below), _read(layer, below, packed), matrix)


def adjoint(layer: Layer, below: Shape, matrix: jax.Array, field: jax.Array) -> jax.Array:
    """The transpose of `convolve` for a fixed `matrix`: from what it returns to a packed state."""
    if isinstance(layer, Dense):
        return field @ matrix.T
    packed = jax.eval_shape(lambda: pack(layer, below, jnp.zeros(below, field.dtype)))
    read = functools.partial(_read, layer, below)
    blocks = jax.eval_shape(read, packed).shape
    told = convolution.transpose(_window(layer, below), blocks, field, matrix)
    return jax.linear_transpose(read, packed)(told)[0]


def connections(layer: Layer, below: Shape) -> int:
    """Products of one drive, but for those with the zeros that only fill blocks.

    A pool that is left to do comes after four times as many.

    Example:
        >>> connections(Conv(2, 3), (8, 8, 1)), connections(Conv(2, 3, fold=False), (8, 8, 1))
        (288, 648)
    """
    if isinstance(layer, Dense):
        return math.prod(layer.weight_shape(below))
    folds = _folds(layer)
    height, width, features = layer.output_shape(below)
    pooled_later = 4 if layer.pool is not None and not folds else 1
    return pooled_later * height * width * (layer.kernel + folds) ** 2 * below[-1] * features


def pool(layer: Layer, convolved: jax.Array) -> jax.Array:
    """The pool that is left to do on what `convolve` returns."""
    if isinstance(layer, Dense) or layer.pool is None or _folds(layer):
        return convolved
    windows = windows_of(convolved)
    return windows.mean((1, 3)) if layer.pool == "avg" else windows.max((1, 3))


def unpool(layer: Layer, field: jax.Array, shares: jax.Array | None) -> jax.Array:
    """The transpose of the derivative of `pool`: to each unit what it passed on.

    Args:
        layer: the layer.
        field: a value for each unit after the pool.
        shares: what part of it each unit of a window gets, for a max pool its `winners`; ``None``
            for a quarter.
    """
    if isinstance(layer, Dense) or layer.pool is None or _folds(layer):
        return field
    height, width, channels = field.shape
    if shares is None:
        shares = jnp.full((height, 2, width, 2, channels), 0.25, field.dtype)
    return (field[:, None, :, None] * shares).reshape(2 * height, 2 * width, channels)


def winners(windows: jax.Array) -> jax.Array:
    """One-hot winners of each window; equals share, as in the derivative of a maximum."""
    won = (windows == windows.max((1, 3), keepdims=True)).astype(windows.dtype)
    return won / won.sum((1, 3), keepdims=True)


def windows_of(convolved: jax.Array) -> jax.Array:
    """``[H, W, C]`` as ``[H/2, 2, W/2, 2, C]``: the windows of the pools are axes 1 and 3."""
    h, w, c = convolved.shape
    return convolved.reshape(h // 2, 2, w // 2, 2, c)
