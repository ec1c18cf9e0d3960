"""Products of the windows of a state with a matrix, and their transpose.

How a convolution is computed, chosen here once by measurement. On a CPU, inside a scan, XLA's own
convolution is several times slower than matrix products of gathered windows. `looped` gathers,
multiplies and adds one part of the window at a time: of all ways it needs the least memory, and no
more time. Its derivative is that of `unrolled`, since in reverse mode a loop would keep every part.
Other backends have fast convolutions of their own (`native`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ep_jax.maps import product

Shape: TypeAlias = tuple[int, ...]

WIDE = 64
"""Channels from which a single position of the window makes a product that is wide enough."""


class Window(NamedTuple):
    """A square window, of stride 1, on a state ``[H, W, C]``: the same on both spatial axes.

    Attributes:
        size: its side.
        pad: zeros before and after the state.
    """

    size: int
    pad: tuple[int, int]


Way: TypeAlias = Callable[[Window, jax.Array, jax.Array], jax.Array]
"""``(window, packed, matrix) -> product``."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def convolve(window: Window, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    """Windows of a packed state times `matrix`: ``[H', W', features]``."""
    return _here(window, looped, packed, matrix)


@functools.partial(convolve.defjvp, symbolic_zeros=True)
def _(window: Window, primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    packed, matrix = primals
    moved, changed = tangents
    way = functools.partial(_differentiable, window)
    out, parts = way(packed, matrix), []
    if not isinstance(moved, SymbolicZero):
        parts.append(way(moved, matrix))
    if not isinstance(changed, SymbolicZero):
        parts.append(_here(window, looped_rows, packed, changed))
    return out, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(out)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def transpose(window: Window, shape: Shape, field: jax.Array, matrix: jax.Array) -> jax.Array:
    """The transpose of `convolve` with respect to a packed state of a shape."""
    return jax.lax.platform_dependent(
        field,
        matrix,
        cpu=functools.partial(looped_transpose, window, shape),
        default=functools.partial(native_transpose, window, shape),
    )


@transpose.defjvp
def _(window: Window, shape: Shape, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    way = functools.partial(transposed, window, shape, _differentiable)
    return jax.jvp(way, primals, tangents)


def _here(window: Window, on_cpu: Way, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    """`on_cpu` where the program runs on a CPU, else `native`."""
    return jax.lax.platform_dependent(
        packed,
        matrix,
        cpu=functools.partial(on_cpu, window),
        default=functools.partial(native, window),
    )


def _differentiable(window: Window, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    return _here(window, unrolled, packed, matrix)


def transposed(
    window: Window, shape: Shape, way: Way, field: jax.Array, matrix: jax.Array
) -> jax.Array:
    """The transpose of one `way`, as JAX makes it."""
    like = jax.ShapeDtypeStruct(shape, field.dtype)
    return jax.linear_transpose(lambda packed: way(window, packed, matrix), like)(field)[0]


def _sides(window: Window, shape: Shape) -> tuple[int, int]:
    """Height and width of what a convolution of a packed state of a shape returns."""
    height, width = (n + sum(window.pad) - window.size + 1 for n in shape[:2])
    return height, width


def native(window: Window, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    """One convolution."""
    weights = matrix.reshape(window.size, window.size, packed.shape[-1], -1)
    return _convolution(packed, weights, window.pad)


def native_transpose(
    window: Window, shape: Shape, field: jax.Array, matrix: jax.Array
) -> jax.Array:
    """The transpose of `native`: one convolution by the kernel turned around."""
    weights = matrix.reshape(window.size, window.size, shape[-1], -1)
    before, after = (window.size - 1 - n for n in window.pad)
    return _convolution(field, weights[::-1, ::-1].swapaxes(2, 3), (before, after))


def _convolution(state: jax.Array, weights: jax.Array, pad: tuple[int, int]) -> jax.Array:
    """A convolution of stride 1, in the precision that `ep_jax.maps.product` would have."""
    rounded = weights.dtype == jnp.bfloat16
    dtype = weights.dtype if rounded else jnp.promote_types(state.dtype, weights.dtype)
    return jax.lax.conv_general_dilated(
        state[None].astype(dtype),
        weights.astype(dtype),
        (1, 1),
        (pad, pad),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.promote_types(state.dtype, jnp.float32) if rounded else dtype,
    )[0]


def unrolled(window: Window, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    """One product for each row of the window, whose columns alone are gathered.

    That moves and keeps a fraction of the bytes of all the patches, and its transpose is as cheap.
    """
    height, width = _sides(window, packed.shape)
    packed = jnp.pad(packed, (window.pad, window.pad, (0, 0)))
    rows = jnp.concatenate([packed[:, j : j + width] for j in range(window.size)], axis=-1)
    parts = matrix.reshape(window.size, -1, matrix.shape[-1])
    products = [product(rows[i : i + height], part) for i, part in enumerate(parts)]
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


def _parts(window: Window, channels: int, matrix: jax.Array, by_row: bool = False) -> _Parts:
    columns = window.size if by_row or channels < WIDE else 1
    starts = [(i, j) for i in range(window.size) for j in range(0, window.size, columns)]
    matrices = matrix.reshape(len(starts), columns * channels, -1)
    return _Parts(jnp.array(starts), matrices, columns)


def looped(window: Window, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    """One product for each part of the window, one after the other."""
    parts = _parts(window, packed.shape[-1], matrix)
    part_product = _part_product(window, packed, parts.columns)
    # The first product, not zeros: XLA would make those long before they are needed.
    first = part_product(parts.corners[0], parts.matrices[0])
    return jax.lax.scan(
        lambda total, part: (total + part_product(*part), None),
        first,
        (parts.corners[1:], parts.matrices[1:]),
    )[0]


def looped_rows(window: Window, packed: jax.Array, matrix: jax.Array) -> jax.Array:
    """The same, a row of the window at a time, for the derivative with respect to the matrix.

    Its transpose fills the matrix part by part. The checkpoint makes it gather the rows again.
    """
    parts = _parts(window, packed.shape[-1], matrix, by_row=True)
    part_product = jax.checkpoint(_part_product(window, packed, parts.columns))
    zero = jnp.zeros((*_sides(window, packed.shape), matrix.shape[-1]), packed.dtype)
    return jax.lax.scan(
        lambda total, part: (total + part_product(*part), None),
        zero,
        (parts.corners, parts.matrices),
    )[0]


def _apart(corner: jax.Array) -> jax.Array:
    """The same, not fused with what reads it: XLA (jaxlib 0.10) fails to compile some such fusions.

    It confuses the slice of the corners with the slice at the corner.
    """
    return jax.lax.optimization_barrier(corner)


def _part_product(
    window: Window, packed: jax.Array, columns: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The function that multiplies one part, from a corner on, by its share of the matrix."""
    height, width = _sides(window, packed.shape)
    padded = jnp.pad(packed, (window.pad, window.pad, (0, 0)))

    def part_product(corner: jax.Array, weights: jax.Array) -> jax.Array:
        corner = _apart(corner)
        rows = jax.lax.dynamic_slice(
            padded, (corner[0], corner[1], 0), (height, width + columns - 1, padded.shape[-1])
        )
        gathered = [rows[:, j : j + width] for j in range(columns)]
        return product(jnp.concatenate(gathered, axis=-1), weights)

    return part_product


def looped_transpose(
    window: Window, shape: Shape, field: jax.Array, matrix: jax.Array
) -> jax.Array:
    """The transpose of `looped`: each part of the window adds what it has to say."""
    channels, (before, after) = shape[-1], window.pad
    parts = _parts(window, channels, matrix)
    height, width = (n + before + after for n in shape[:2])
    rows, columns = field.shape[:2]

    def said(weights: jax.Array) -> list[jax.Array]:
        """What a part says to its place, column by column."""
        back = product(field, weights.T).reshape(rows, columns, parts.columns, channels)
        return [back[:, :, j] for j in range(parts.columns)]

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        corner, weights = _apart(part[0]), part[1]
        for j, here in enumerate(said(weights)):
            place = (corner[0], corner[1] + j, 0)
            old = jax.lax.dynamic_slice(total, place, here.shape)
            total = jax.lax.dynamic_update_slice(total, old + here, place)
        return total, None

    # As above: the first part in the frame of all.
    frames = [
        jnp.pad(here, ((0, height - rows), (j, width - columns - j), (0, 0)))
        for j, here in enumerate(said(parts.matrices[0]))
    ]
    total, _ = jax.lax.scan(
        add, functools.reduce(jnp.add, frames), (parts.corners[1:], parts.matrices[1:])
    )
    return total[before : before + shape[0], before : before + shape[1]]
