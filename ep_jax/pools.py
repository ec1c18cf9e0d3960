"""Pools of convolutions: average, maximum, and the average of all positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ep_jax.checks import check_integer
from ep_jax.maps import Pool, Shape, Unit


@dataclass(frozen=True)
class _Windowed(Pool):
    """A pool over square windows.

    Windows that tile a state have to divide its sides. Of others (``stride`` is not ``size``) those
    count that fit, as with ``"VALID"`` in ``jax.lax``: what is left over at the end has no window.

    Attributes:
        size: side of the window.
        stride: steps from window to window; by default the size, so that windows tile the state.
    """

    size: int = 2
    stride: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_integer(f"{name}.size", self.size, at_least=1)
        if self.stride is not None:
            check_integer(f"{name}.stride", self.stride, at_least=1)

    @property
    def step(self) -> int:
        """The stride in numbers."""
        return self.size if self.stride is None else self.stride

    def output_shape(self, shape: Shape) -> Shape:
        """See `Pool`."""
        beyond = [n - self.size for n in shape[:2]]
        tiles = self.step == self.size
        if min(beyond) < 0 or (tiles and any(b % self.step for b in beyond)):
            wanted = f"multiples of {self.size}" if tiles else f"sides of at least {self.size}"
            raise ValueError(
                f"{self} does not fit a convolution's output of {shape[0]}x{shape[1]}; expected "
                f"{wanted}: change kernel, padding or the input's shape"
            )
        return (*(b // self.step + 1 for b in beyond), shape[2])

    def windows(self, z: jax.Array) -> jax.Array:
        """The windows of ``z [H, W, C]``, position by position: ``[size^2, H', W', C]``."""
        height, width, _ = self.output_shape(z.shape)
        rows, columns = (self.step * (n - 1) + 1 for n in (height, width))
        return jnp.stack(
            [
                z[i : i + rows : self.step, j : j + columns : self.step]
                for i in range(self.size)
                for j in range(self.size)
            ]
        )

    def _from_windows(self, z: jax.Array, windows: jax.Array) -> jax.Array:
        """The transpose of `windows`: each position's sum."""
        like = jax.ShapeDtypeStruct(z.shape, windows.dtype)
        return jax.linear_transpose(self.windows, like)(windows)[0]


@dataclass(frozen=True)
class AvgPool(_Windowed):
    """The mean of each window. Of size and stride 2 it is folded into a convolution.

    Example:
        >>> AvgPool()(jnp.arange(16.0).reshape(4, 4, 1))[:, :, 0]
        Array([[ 2.5,  4.5],
               [10.5, 12.5]], dtype=float32)
    """

    def __call__(self, z: jax.Array) -> jax.Array:
        """See `Pool`."""
        return self.windows(z).mean(0)


@dataclass(frozen=True)
class MaxPool(_Windowed):
    """The largest unit of each window, which alone hears what comes from above; equals share.

    Example:
        >>> MaxPool(3, stride=2).output_shape((13, 10, 8))
        (6, 4, 8)
    """

    linear = False

    def __call__(self, z: jax.Array) -> jax.Array:
        """See `Pool`."""
        return self.windows(z).max(0)

    def pull(self, z: jax.Array, field: jax.Array) -> jax.Array:
        """See `Pool`: to the winner of each window."""
        return self._from_windows(z, field * _winners(self.windows(z)))

    def lipschitz(self) -> float:
        """See `Pool`: a unit is in that many windows, squared."""
        return float(-(-self.size // self.step))

    def context(self, z: jax.Array) -> jax.Array:
        """How far each unit is behind the winner of its window, ``[size^2, H', W', C]``."""
        windows = self.windows(z)
        return windows - windows.max(0)

    def difference(self, context: Any, d: jax.Array, unit: Unit) -> jax.Array:
        """``max_i(d_i + behind_i / unit)``, exact; the minimum for a negative unit."""
        sign = jnp.sign(unit)
        return sign * (sign * (self.windows(d) + context / unit)).max(0)

    def pull_difference(
        self,
        context: Any,
        d: jax.Array,
        fields: tuple[jax.Array, jax.Array],
        units: tuple[Unit, Unit],
    ) -> jax.Array:
        """``w moved + (w - w0) field / v``, with the winners ``w`` now and ``w0`` at the base."""
        (moved, field), (below, above) = fields, units
        now = _winners(jnp.sign(below) * (self.windows(d) + context / below))
        told = moved * now + (field / above) * (now - _winners(context))
        return self._from_windows(d, told)


def _winners(windows: jax.Array) -> jax.Array:
    """One-hot winners of each window; equals share, as in the derivative of a maximum."""
    won = (windows == windows.max(0)).astype(windows.dtype)
    return won / won.sum(0)


@dataclass(frozen=True)
class GlobalAvgPool(Pool):
    """The mean of each channel over all positions: ``(1, 1, C)``.

    Example:
        >>> GlobalAvgPool().output_shape((7, 5, 64))
        (1, 1, 64)
    """

    def output_shape(self, shape: Shape) -> Shape:
        """See `Pool`."""
        return (1, 1, shape[2])

    def __call__(self, z: jax.Array) -> jax.Array:
        """See `Pool`."""
        return z.mean((0, 1), keepdims=True)
