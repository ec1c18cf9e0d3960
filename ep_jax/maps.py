"""Maps between states, their differences under a displacement, and the transposes of their slopes.

A layer's drive and a pool are maps ``f``. What the dynamics ask of a map beside its value has a
default for every one of them, by automatic differentiation: exact where the map is linear, and up
to the cancellation of a difference where it is not. A map that knows better overrides it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

Shape: TypeAlias = tuple[int, ...]
Function: TypeAlias = Callable[[jax.Array], jax.Array]
Unit: TypeAlias = jax.Array | float


def pull(f: Function, linear: bool, here: jax.Array, field: jax.Array) -> jax.Array:
    """``f'(here)^T field``. Of a linear map, the shape of `here` is all that is looked at."""
    if linear:
        like = jax.ShapeDtypeStruct(here.shape, field.dtype)
        return jax.linear_transpose(f, like)(field)[0]
    return jax.vjp(f, here)[1](field)[0]


def difference(f: Function, base: jax.Array, d: jax.Array, unit: Unit) -> jax.Array:
    """``[f(base + unit d) - f(base)] / unit``, with the cancellation that a difference has."""
    return (f(base + unit * d) - f(base)) / unit


def pull_difference(
    f: Function,
    base: jax.Array,
    d: jax.Array,
    fields: tuple[jax.Array, jax.Array],
    units: tuple[Unit, Unit],
) -> jax.Array:
    """``[f'(base + u d)^T (field + v moved) - f'(base)^T field] / v``, likewise.

    Args:
        f: the map.
        base: the state below.
        d: its displacement, in units of ``u``.
        fields: ``moved`` and ``field``: displacement and base of what is pulled back.
        units: ``u`` and ``v``.
    """
    moved, field = fields
    below, above = units
    there = jax.vjp(f, base + below * d)[1](field + above * moved)[0]
    return (there - jax.vjp(f, base)[1](field)[0]) / above


class Pool:
    """A map of a convolution's channels ``[H, W, C]``, one by one, to fewer positions.

    A pool of your own is a frozen dataclass that inherits from this, with `output_shape` and
    ``__call__``.

    Example:
        >>> class Rows(ep_jax.Pool):
        ...     def output_shape(self, shape):
        ...         return (1, *shape[1:])
        ...     def __call__(self, z):
        ...         return z.mean(0, keepdims=True)
        >>> ep_jax.Conv(4, 3, pool=Rows()).output_shape((8, 8, 1))
        (1, 6, 4)
    """

    linear: bool = True
    """Whether it is linear in the state; a class says ``linear = False`` where it is not."""

    def output_shape(self, shape: Shape) -> Shape:
        """Shape ``(H', W', C)`` of the result; ``ValueError`` where it does not fit."""
        raise NotImplementedError

    def __call__(self, z: jax.Array) -> jax.Array:
        """The pool of ``z [H, W, C]``."""
        raise NotImplementedError

    def pull(self, z: jax.Array, field: jax.Array) -> jax.Array:
        """The transpose of the derivative at `z`; of a linear pool only the shape matters."""
        return pull(self, self.linear, z, field)

    def lipschitz(self) -> float:
        """A bound on how much a pool that is not linear stretches a difference."""
        raise TypeError(f"{self} has no method `lipschitz`, which a cap on its layer's norm needs")

    def context(self, z: jax.Array) -> Any:
        """What `difference` and `pull_difference` need to know of the base `z`."""
        return z

    def difference(self, context: Any, d: jax.Array, unit: Unit) -> jax.Array:
        """``[pool(z + unit d) - pool(z)] / unit`` of a pool that is not linear."""
        return difference(self, context, d, unit)

    def pull_difference(
        self,
        context: Any,
        d: jax.Array,
        fields: tuple[jax.Array, jax.Array],
        units: tuple[Unit, Unit],
    ) -> jax.Array:
        """The difference of `pull`, see `ep_jax.maps.pull_difference`."""
        return pull_difference(self, context, d, fields, units)
