"""Convolutions with pools, and the folded average pool.

**The folded average pool.** Average pooling of a convolution is itself a convolution: with stride 2
and the kernel box-filtered to ``k + 1``. After space-to-depth of the state (``[H, W, C]`` to
``[H/2, W/2, 4 C]``) it becomes a plain stride-1 convolution that needs about a quarter of the
multiplications and no pooling at all. It is private to this file: a state below such a layer is
packed in blocks of two by two, and ``Kernel`` is the matrix that multiplies their patches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ep_jax import convolution
from ep_jax.checks import check_choice, check_integer
from ep_jax.convolution import Window
from ep_jax.layers import Layer, LayerParams, kept_bias, uniform
from ep_jax.maps import Pool, Shape, Unit
from ep_jax.pools import AvgPool, MaxPool

POOLS = {"avg": AvgPool(), "max": MaxPool(), None: None}
"""The pools that have names: two by two, with stride two."""
PADDINGS = ("VALID", "SAME")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["below"])
@dataclass(frozen=True)
class Kernel:
    """A convolution's weights in working form.

    Attributes:
        matrix: ``[patch, features]``; HWIO where `convolution` has no way of its own.
        below: shape of the state below, static.
    """

    matrix: jax.Array
    below: Shape


@dataclass(frozen=True)
class Conv(Layer):
    """A convolution followed by a pool; states are post-pool.

    Attributes:
        features: number of output channels.
        kernel: side of the square kernel.
        pool: ``"avg"`` or ``"max"`` (two by two, with stride two), a pool of `ep_jax.pools` or of
            your own, or ``None``.
        padding: ``"VALID"`` or ``"SAME"`` (zeros, as in ``jax.lax``).
        fold: fold the average pool into the convolution. The numbers are the same to rounding;
            ``False`` computes the convolution, then the pool, as the papers write it.
        stride: steps from patch to patch, along both axes.
        dilation: steps between neighbours in a patch.
        groups: the channels below are divided into so many groups, and so are the features.

    Example:
        >>> Conv(32, 5).output_shape((28, 28, 1))
        (12, 12, 32)
        >>> Conv(64, 3, stride=2, pool=MaxPool(3, stride=1)).output_shape((15, 15, 32))
        (5, 5, 64)
    """

    features: int
    kernel: int
    pool: Literal["avg", "max"] | Pool | None = "avg"
    padding: Literal["VALID", "SAME"] = "VALID"
    fold: bool = True
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("features", "kernel", "stride", "dilation", "groups"):
            check_integer(f"Conv.{name}", getattr(self, name), at_least=1)
        if not isinstance(self.pool, Pool):
            check_choice("Conv.pool", self.pool, POOLS)
        check_choice("Conv.padding", self.padding, PADDINGS)
        if self.features % self.groups:
            raise ValueError(f"Conv.groups is {self.groups}; expected a divisor of the "
                             f"{self.features} features")  # fmt: skip
        # No field: it follows from the pool.
        object.__setattr__(self, "linear", self._pool is None or self._pool.linear)

    @property
    def _pool(self) -> Pool | None:
        return self.pool if isinstance(self.pool, Pool) else POOLS[self.pool]

    @property
    def _plain(self) -> bool:
        """Whether `convolution` has a way of its own."""
        return self.stride == self.dilation == self.groups == 1

    @property
    def _folds(self) -> bool:
        pool = self._pool
        halves = isinstance(pool, AvgPool) and pool.size == pool.step == 2
        return self.fold and self._plain and halves

    @property
    def _pooled_later(self) -> Pool | None:
        """The pool that is left to do after the product."""
        return None if self._folds else self._pool

    def _convolved_shape(self, below: Shape) -> Shape:
        """Shape of the convolution's output, before the pool."""
        if len(below) != 3:
            raise ValueError(f"{self} needs an input of shape (H, W, C), but what is below it "
                             f"has shape {below}")  # fmt: skip
        if below[2] % self.groups:
            raise ValueError(f"{self}: groups={self.groups} does not divide the {below[2]} "
                             f"channels of its input of shape {below}")  # fmt: skip
        reach = (self.kernel - 1) * self.dilation if self.padding == "VALID" else 0
        sides = [(n - reach - 1) // self.stride + 1 for n in below[:2]]
        if min(sides) < 1:
            raise ValueError(f"{self}: the kernel is larger than its input of shape {below}")
        return (*sides, self.features)

    def output_shape(self, below: Shape) -> Shape:
        """Logical ``(H, W, C)`` of this layer's state; ``ValueError`` where it does not fit."""
        shape = self._convolved_shape(below)
        if self._pool is None:
            return shape
        try:
            return self._pool.output_shape(shape)
        except ValueError as error:
            raise ValueError(f"{self} on an input of shape {below}: {error}") from error

    def init(self, key: jax.Array, below: Shape, gain: float, dtype: Any) -> LayerParams:
        """Weights HWIO and biases ``[features]`` of zero."""
        shape = (self.kernel, self.kernel, below[-1] // self.groups, self.features)
        w = uniform(key, shape, math.prod(shape[:-1]), gain, dtype)
        return {"w": w, "b": jnp.zeros((self.features,), dtype)}

    # How a state below is laid out.

    def _padding(self) -> tuple[int, int]:
        """Zeros before and after, of a plain convolution."""
        if self.padding == "VALID":
            return 0, 0
        before = (self.kernel - 1) // 2
        return before, self.kernel - 1 - before

    def _blocked(self, below: Shape) -> bool:
        """Whether the packed layout is space-to-depth: where no block straddles two windows."""
        before, _ = self._padding()
        return self._folds and not (before % 2 or below[0] % 2 or below[1] % 2)

    def _window(self, below: Shape) -> Window:
        """How patches are gathered from what `_read` makes of the packed state."""
        before, after = self._padding()
        if not self._folds:
            return Window(self.kernel, (before, after))
        pad = (before // 2, (after + 1) // 2) if self._blocked(below) else (0, 0)
        return Window(self.kernel // 2 + 1, pad)

    def pack(self, below: Shape, state: jax.Array) -> jax.Array:
        """See `ep_jax.layers.Layer`."""
        return _space_to_depth(state) if self._blocked(below) else state

    def unpack(self, below: Shape, packed: jax.Array) -> jax.Array:
        """See `ep_jax.layers.Layer`."""
        if self._blocked(below):
            h, w, c = below
            packed = packed.reshape(h // 2, w // 2, 2, 2, c).transpose(0, 2, 1, 3, 4)
        return packed.reshape(below)

    def _read(self, below: Shape, packed: jax.Array) -> jax.Array:
        """What the window slides over: blocks, wherever a pool is folded.

        Where blocks of the state itself would straddle windows, it is framed by zeros first.
        """
        if not self._folds or self._blocked(below):
            return packed
        before, _ = self._padding()
        sides = (2 * (n + self.kernel // 2) for n in self.output_shape(below)[:2])
        frame = [(before, side - before - n) for side, n in zip(sides, below[:2], strict=True)]
        return _space_to_depth(jnp.pad(packed, (*frame, (0, 0))))

    # Products.

    def prepare(self, params: Mapping[str, jax.Array], below: Shape) -> Kernel:
        """See `ep_jax.layers.Layer`: the matrix that multiplies patches."""
        w = params["w"]
        if not self._plain:
            return Kernel(w, below)
        if not self._folds:
            return Kernel(w.reshape(-1, self.features), below)
        # pool(conv(s, w)) = conv(s, box * w) with stride 2; box is the 2x2 average.
        shifts = [((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)) for i in (0, 1) for j in (0, 1)]
        folded = functools.reduce(jnp.add, [jnp.pad(w, shift) for shift in shifts]) / 4
        m, c = self._window(below).size, below[-1]
        extra = 2 * m - folded.shape[0]
        folded = jnp.pad(folded, ((0, extra), (0, extra), (0, 0), (0, 0)))
        folded = folded.reshape(m, 2, m, 2, c, -1).transpose(0, 2, 1, 3, 4, 5)
        return Kernel(folded.reshape(-1, self.features), below)

    def _convolve(self, kernel: Kernel, packed: jax.Array) -> jax.Array:
        """All of the drive but a pool that is not folded."""
        if self._plain:
            read = self._read(kernel.below, packed)
            return convolution.convolve(self._window(kernel.below), read, kernel.matrix)
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(packed.dtype, kernel.matrix.dtype)
        return jax.lax.conv_general_dilated(
            packed[None].astype(dtype),
            kernel.matrix.astype(dtype),
            (self.stride,) * 2,
            self.padding,
            rhs_dilation=(self.dilation,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )[0]

    def _adjoint(self, kernel: Kernel, field: jax.Array) -> jax.Array:
        """The transpose of `_convolve`: from what it returns to a packed state."""
        below = kernel.below
        packed = jax.eval_shape(lambda: self.pack(below, jnp.zeros(below, field.dtype)))
        if not self._plain:
            return jax.linear_transpose(lambda s: self._convolve(kernel, s), packed)(field)[0]
        read = functools.partial(self._read, below)
        blocks = jax.eval_shape(read, packed).shape
        told = convolution.transpose(self._window(below), blocks, field, kernel.matrix)
        return jax.linear_transpose(read, packed)(told)[0]

    def drive(self, prepared: Kernel, s: jax.Array) -> jax.Array:
        """See `ep_jax.layers.Layer`."""
        z, pool = self._convolve(prepared, s), self._pooled_later
        return z if pool is None else pool(z)

    def pull(self, prepared: Kernel, here: jax.Array, field: jax.Array) -> jax.Array:
        """See `ep_jax.layers.Layer`."""
        if (pool := self._pooled_later) is not None:
            z = jnp.zeros(self._convolved_shape(prepared.below), field.dtype)
            field = pool.pull(z if pool.linear else self._convolve(prepared, here), field)
        return self._adjoint(prepared, field)

    # Of a pool that is not linear, see `ep_jax.layers.Layer`.

    def context(self, prepared: Kernel, base: jax.Array) -> Any:
        """What the pool needs to know."""
        return self._nonlinear.context(self._convolve(prepared, base))

    def difference(self, prepared: Kernel, context: Any, d: jax.Array, unit: Unit) -> jax.Array:
        """The pool's, of the convolved displacement."""
        return self._nonlinear.difference(context, self._convolve(prepared, d), unit)

    def pull_difference(
        self,
        prepared: Kernel,
        context: Any,
        d: jax.Array,
        fields: tuple[jax.Array, jax.Array],
        units: tuple[Unit, Unit],
    ) -> jax.Array:
        """The pool's, sent down the convolution."""
        moved = self._convolve(prepared, d)
        told = self._nonlinear.pull_difference(context, moved, fields, units)
        return self._adjoint(prepared, told)

    @property
    def _nonlinear(self) -> Pool:
        assert self._pool is not None
        return self._pool

    # What else the library asks.

    def bound(self) -> tuple[Conv, float]:
        """See `ep_jax.layers.Layer`: without a pool that is not linear."""
        if self.linear:
            return self, 1.0
        return dataclasses.replace(self, pool=None), self._nonlinear.lipschitz()

    def connections(self, below: Shape) -> int:
        """Products of one drive, but for those with the zeros that only fill blocks.

        A pool that is left to do comes after more of them.

        Example:
            >>> Conv(2, 3).connections((8, 8, 1)), Conv(2, 3, fold=False).connections((8, 8, 1))
            (288, 648)
        """
        folds = self._folds
        height, width, _ = self.output_shape(below) if folds else self._convolved_shape(below)
        patch = (self.kernel + folds) ** 2 * (below[-1] // self.groups)
        return height * width * patch * self.features

    def keep(
        self, params: LayerParams, below: Shape, alive: np.ndarray, units: np.ndarray
    ) -> tuple[Conv, LayerParams]:
        """See `ep_jax.layers.Layer`."""
        del below
        if self.groups > 1:
            raise TypeError(f"{self} has groups and cannot lose channels; expected groups=1")
        smaller = {"w": params["w"][:, :, alive][..., units]} | kept_bias(params, units)
        return dataclasses.replace(self, features=int(units.sum())), smaller


def _space_to_depth(state: jax.Array) -> jax.Array:
    """``[H, W, C]`` in blocks of two by two: ``[H/2, W/2, 4 C]``."""
    h, w, c = state.shape
    blocks = state.reshape(h // 2, 2, w // 2, 2, c).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(h // 2, w // 2, -1)
