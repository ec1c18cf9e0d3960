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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ep_jax.checks import check_choice, check_integer

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


class _Window(NamedTuple):
    """How a convolution gathers its patches: the same three numbers on both spatial axes."""

    size: int
    stride: int
    pad: tuple[int, int]  # zeros before and after, in the packed layout
    blocked: bool  # the packed layout is space-to-depth


def _folds(layer: Conv) -> bool:
    return layer.fold and layer.pool == "avg"


def _window(layer: Conv, below: Shape) -> _Window:
    k = layer.kernel
    before = (k - 1) // 2 if layer.padding == "SAME" else 0
    after = k - 1 - before if layer.padding == "SAME" else 0
    if not _folds(layer):
        return _Window(k, 1, (before, after), False)
    if before % 2 or below[0] % 2 or below[1] % 2:
        # Blocks of two would straddle the windows: stride over the plain layout instead.
        return _Window(k + 1, 2, (before, after), False)
    return _Window(k // 2 + 1, 1, (before // 2, (after + 1) // 2), True)


def pack(layer: Layer, below: Shape, state: jax.Array) -> jax.Array:
    """The logical state ``below`` a layer in the layout in which the layer reads it."""
    if isinstance(layer, Dense):
        return state.reshape(-1)
    if not _window(layer, below).blocked:
        return state
    h, w, c = below
    return (
        state.reshape(h // 2, 2, w // 2, 2, c).transpose(0, 2, 1, 3, 4).reshape(h // 2, w // 2, -1)
    )


def unpack(layer: Layer, below: Shape, packed: jax.Array) -> jax.Array:
    """The inverse of `pack`."""
    if isinstance(layer, Conv) and _window(layer, below).blocked:
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
    window = _window(layer, below)
    if window.blocked:
        m, c = window.size, below[-1]
        extra = 2 * m - folded.shape[0]
        folded = jnp.pad(folded, ((0, extra), (0, extra), (0, 0), (0, 0)))
        folded = folded.reshape(m, 2, m, 2, c, -1).transpose(0, 2, 1, 3, 4, 5)
    return folded.reshape(-1, layer.features)


# Products of the windows of a packed state with a matrix, and back. `_looped` gathers, multiplies
# and adds one part of the window at a time: that needs the least memory and, on a CPU, no more
# time. Its derivative is that of `_unrolled`: in reverse mode a loop would keep every part. Other
# backends have fast convolutions of their own.

WIDE = 64
"""Channels from which a single position of the window makes a product that is wide enough."""


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
    return _convolve(_window(layer, below), packed, matrix)


def adjoint(layer: Layer, below: Shape, matrix: jax.Array, field: jax.Array) -> jax.Array:
    """The transpose of `convolve` for a fixed `matrix`: from what it returns to a packed state."""
    if isinstance(layer, Dense):
        return field @ matrix.T
    packed = jax.eval_shape(lambda: pack(layer, below, jnp.zeros(below))).shape
    return _adjoint(_window(layer, below), packed, field, matrix)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _convolve(window: _Window, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    """Windows of a packed state times `matrix`: ``[H', W', features]``."""
    return jax.lax.platform_dependent(
        packed,
        matrix,
        cpu=functools.partial(_looped, window),
        default=functools.partial(_native, window),
    )


@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _(window: _Window, primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    packed, matrix = primals
    moved, changed = tangents
    way = functools.partial(_differentiable, window)
    out, parts = way(packed, matrix), []
    if not isinstance(moved, SymbolicZero):
        parts.append(way(moved, matrix))
    if not isinstance(changed, SymbolicZero):
        parts.append(
            jax.lax.platform_dependent(
                packed,
                changed,
                cpu=functools.partial(_looped_matrix, window),
                default=functools.partial(_native, window),
            )
        )
    return out, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(out)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _adjoint(window: _Window, shape: Shape, field: jax.Array, matrix: jax.Array) -> jax.Array:
    """The transpose of `_convolve` with respect to a packed state of a shape."""
    return jax.lax.platform_dependent(
        field,
        matrix,
        cpu=functools.partial(_looped_adjoint, window, shape),
        default=functools.partial(_transposed, window, shape, _native),
    )


@_adjoint.defjvp
def _(window: _Window, shape: Shape, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    transposed = functools.partial(_transposed, window, shape, _differentiable)
    return jax.jvp(transposed, primals, tangents)


def _differentiable(window: _Window, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        packed,
        matrix,
        cpu=functools.partial(_unrolled, window),
        default=functools.partial(_native, window),
    )


def _transposed(
    window: _Window, shape: Shape, way: Any, field: jax.Array, matrix: jax.Array
) -> jax.Array:
    like = jax.ShapeDtypeStruct(shape, field.dtype)
    return jax.linear_transpose(lambda packed: way(window, packed, matrix), like)(field)[0]


def _sides(window: _Window, shape: Shape) -> tuple[int, int]:
    """Height and width of what a convolution of a packed state of a shape returns."""
    padded = [n + sum(window.pad) for n in shape[:2]]
    height, width = ((n - window.size) // window.stride + 1 for n in padded)
    return height, width


def _native(window: _Window, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    """One convolution."""
    weights = matrix.reshape(window.size, window.size, packed.shape[-1], -1)
    return jax.lax.conv_general_dilated(
        packed[None],
        weights,
        (window.stride,) * 2,
        (window.pad,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]


def _unrolled(window: _Window, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    """One product for each row of the window, whose columns alone are gathered.

    That moves and keeps a fraction of the bytes of all the patches, and its transpose is as cheap.
    """
    height, width = _sides(window, packed.shape)
    packed = jnp.pad(packed, (window.pad, window.pad, (0, 0)))
    size, stride = window.size, window.stride

    def strided(a: jax.Array, start: int, count: int, axis: int) -> jax.Array:
        return jax.lax.slice_in_dim(a, start, start + (count - 1) * stride + 1, stride, axis)

    rows = jnp.concatenate([strided(packed, j, width, axis=1) for j in range(size)], axis=-1)
    products = [
        strided(rows, i, height, axis=0) @ part
        for i, part in enumerate(matrix.reshape(size, -1, matrix.shape[-1]))
    ]
    return functools.reduce(jnp.add, products)


class _Parts(NamedTuple):
    """A window taken apart: where each part starts, and its share of the matrix.

    Attributes:
        corners: row and column of each part's first position ``[parts, 2]``.
        matrices: ``[parts, columns * channels, features]``.
        columns: positions in a part, side by side: a whole row of the window, or one.
    """

    corners: jax.Array
    matrices: jax.Array
    columns: int


def _parts(window: _Window, channels: int, matrix: jax.Array, by_row: bool = False) -> _Parts:
    columns = window.size if by_row or channels < WIDE else 1
    starts = [(i, j) for i in range(window.size) for j in range(0, window.size, columns)]
    matrices = matrix.reshape(len(starts), columns * channels, -1)
    return _Parts(jnp.array(starts), matrices, columns)


def _looped(window: _Window, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    """One product for each part of the window, one after the other."""
    parts = _parts(window, packed.shape[-1], matrix)
    product = _product(window, packed, parts.columns)
    # The first product, not zeros: XLA would make those long before they are needed.
    first = product(parts.corners[0], parts.matrices[0])
    return jax.lax.scan(
        lambda total, part: (total + product(*part), None),
        first,
        (parts.corners[1:], parts.matrices[1:]),
    )[0]


def _looped_matrix(window: _Window, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    """The same, a row of the window at a time, for the derivative with respect to the matrix.

    Its transpose fills the matrix part by part. The checkpoint makes it gather the rows again.
    """
    parts = _parts(window, packed.shape[-1], matrix, by_row=True)
    product = jax.checkpoint(_product(window, packed, parts.columns))
    zero = jnp.zeros((*_sides(window, packed.shape), matrix.shape[-1]), packed.dtype)
    return jax.lax.scan(
        lambda total, part: (total + product(*part), None), zero, (parts.corners, parts.matrices)
    )[0]


def _product(
    window: _Window, packed: jax.Array, columns: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The function that multiplies one part, from a corner on, by its share of the matrix."""
    stride = window.stride
    height, width = ((n - 1) * stride + 1 for n in _sides(window, packed.shape))
    padded = jnp.pad(packed, (window.pad, window.pad, (0, 0)))

    def product(corner: jax.Array, weights: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice(
            padded, (corner[0], corner[1], 0), (height, width + columns - 1, padded.shape[-1])
        )
        gathered = [rows[::stride, j : j + width : stride] for j in range(columns)]
        return jnp.concatenate(gathered, axis=-1) @ weights

    return product


def _looped_adjoint(
    window: _Window, shape: Shape, field: jax.Array, matrix: jax.Array
) -> jax.Array:
    """The transpose of `_looped`: each part of the window adds what it has to say."""
    channels, (before, after) = shape[-1], window.pad
    parts = _parts(window, channels, matrix)
    height, width = (n + before + after for n in shape[:2])
    spans = [(n - 1) * window.stride + 1 for n in field.shape[:2]]

    def said(weights: jax.Array) -> list[jax.Array]:
        """What a part says to its place, column by column."""
        product = (field @ weights.T).reshape(*field.shape[:2], parts.columns, channels)
        apart = (0, 0, window.stride - 1)
        zero = jnp.zeros((), product.dtype)
        return [
            jax.lax.pad(product[:, :, j], zero, (apart, apart, (0, 0, 0)))
            for j in range(parts.columns)
        ]

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        corner, weights = part
        for j, here in enumerate(said(weights)):
            place = (corner[0], corner[1] + j, 0)
            old = jax.lax.dynamic_slice(total, place, here.shape)
            total = jax.lax.dynamic_update_slice(total, old + here, place)
        return total, None

    # As above: the first part in the frame of all.
    frames = [
        jnp.pad(here, ((0, height - spans[0]), (j, width - spans[1] - j), (0, 0)))
        for j, here in enumerate(said(parts.matrices[0]))
    ]
    total, _ = jax.lax.scan(
        add, functools.reduce(jnp.add, frames), (parts.corners[1:], parts.matrices[1:])
    )
    return total[before : before + shape[0], before : before + shape[1]]


def pool(layer: Layer, convolved: jax.Array) -> jax.Array:
    """The pool that is left to do on what `convolve` returns."""
    if isinstance(layer, Dense) or layer.pool is None or _folds(layer):
        return convolved
    windows = windows_of(convolved)
    return windows.mean((1, 3)) if layer.pool == "avg" else windows.max((1, 3))


def unpool(layer: Layer, field: jax.Array, before: jax.Array | None) -> jax.Array:
    """The transpose of the derivative of `pool` at `before`: to each unit what it passed on.

    Args:
        layer: the layer.
        field: a value for each unit after the pool.
        before: what was pooled; only a max pool asks.
    """
    if isinstance(layer, Dense) or layer.pool is None or _folds(layer):
        return field
    spread = field[:, None, :, None]
    if before is None:
        spread = jnp.broadcast_to(spread / 4, (len(field), 2, field.shape[1], 2, field.shape[2]))
    else:
        spread = spread * winners(windows_of(before))
    height, _, width, _, channels = spread.shape
    return spread.reshape(2 * height, 2 * width, channels)


def winners(windows: jax.Array) -> jax.Array:
    """One-hot winners of each window; equals share, as in the derivative of a maximum."""
    won = (windows == windows.max((1, 3), keepdims=True)).astype(windows.dtype)
    return won / won.sum((1, 3), keepdims=True)


def windows_of(convolved: jax.Array) -> jax.Array:
    """``[H, W, C]`` as ``[H/2, 2, W/2, 2, C]``: the windows of the pools are axes 1 and 3."""
    h, w, c = convolved.shape
    return convolved.reshape(h // 2, 2, w // 2, 2, c)
