"""Layers: maps from the state below to what the units of a layer receive.

A layer holds no parameters; it is a hashable description, static under ``jit``. Its drive is ``A(s)
= B(s) + b`` with a map ``B`` without bias that is linear in the state, or says that it is not
(``linear = False``). The bias is constant over space, so it is added once, outside of all loops.

A layer of your own is a frozen dataclass that inherits from `Layer`, in any file::

    @dataclass(frozen=True)
    class Scale(ep_jax.Layer):
        def output_shape(self, below):
            return below

        def init(self, key, below, gain, dtype):
            return {"w": gain * jax.random.normal(key, below, dtype), "b": jnp.zeros(below, dtype)}

        def drive(self, prepared, s):
            return prepared["w"] * s

That is all: transposes, differences, what an optimiser and a cost of hardware need to know have
defaults. `Conv` overrides some of them for speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ep_jax import maps
from ep_jax.checks import check_integer
from ep_jax.maps import Shape, Unit

LayerParams: TypeAlias = dict[str, jax.Array]
"""Parameters of one layer by name: ``b`` is the bias, weights of `Conv` and `Dense` are ``w``."""


class Layer:
    """What the library asks of a layer; three methods have no default.

    States are logical arrays of the shape that `output_shape` of the layer below has said, unless
    the layer packs them (`pack`).

    Example:
        >>> class Shift(ep_jax.Layer):
        ...     def output_shape(self, below):
        ...         return below
        ...     def init(self, key, below, gain, dtype):
        ...         return {"w": jnp.full(below, gain, dtype)}
        ...     def drive(self, prepared, s):
        ...         return prepared["w"] * jnp.roll(s, 1)
        >>> layer = Shift()
        >>> params = layer.init(jax.random.key(0), (3,), 2.0, jnp.float32)
        >>> layer.drive(params, jnp.array([1.0, 2.0, 3.0])).tolist()
        [6.0, 2.0, 4.0]
        >>> layer.pull(params, jnp.zeros(3), jnp.array([1.0, 0.0, 0.0])).tolist()
        [0.0, 0.0, 2.0]
    """

    linear: bool = True
    """Whether the drive is linear in the state; a class says ``linear = False`` where it is not.

    What is not linear costs twice the work, and precision in displacement coordinates.
    """

    def output_shape(self, below: Shape) -> Shape:
        """Shape of the layer's state; ``ValueError`` where one of shape `below` does not fit."""
        raise NotImplementedError

    def init(self, key: jax.Array, below: Shape, gain: float, dtype: Any) -> LayerParams:
        """Random parameters, of a size that makes states ``gain`` times those below."""
        raise NotImplementedError

    def drive(self, prepared: Any, s: jax.Array) -> jax.Array:
        """``B(s)``: what the units receive from the (packed) state below, without bias."""
        raise NotImplementedError

    # Defaults.

    def bias(self, params: Mapping[str, jax.Array], below: Shape) -> jax.Array:
        """The bias of each unit; by default ``b``, for the last axis or for all, or none."""
        shape = self.output_shape(below)
        if "b" not in params:
            return jnp.zeros(shape, jax.tree.leaves(params)[0].dtype)
        return jnp.broadcast_to(params["b"], shape)

    def prepare(self, params: Mapping[str, jax.Array], below: Shape) -> Any:
        """The parameters in the form in which `drive` reads them, made once a phase.

        Linear in the parameters; a pytree.
        """
        del below
        return params

    def pack(self, below: Shape, state: jax.Array) -> jax.Array:
        """A state of shape `below` in the layout in which `drive` reads it; linear."""
        del below
        return state

    def unpack(self, below: Shape, packed: jax.Array) -> jax.Array:
        """The inverse of `pack`."""
        return packed.reshape(below)

    def pull(self, prepared: Any, here: jax.Array, field: jax.Array) -> jax.Array:
        """The transpose of the drive's derivative at a packed state `here`: what comes back down.

        Of a linear drive, the shape of `here` is all that is looked at.
        """
        return maps.pull(lambda s: self.drive(prepared, s), self.linear, here, field)

    def context(self, prepared: Any, base: jax.Array) -> Any:
        """What the differences below need to know of the packed state that is displaced."""
        del prepared
        return base

    def difference(self, prepared: Any, context: Any, d: jax.Array, unit: Unit) -> jax.Array:
        """``[B(s + unit d) - B(s)] / unit`` of a drive that is not linear."""
        return maps.difference(lambda s: self.drive(prepared, s), context, d, unit)

    def pull_difference(
        self,
        prepared: Any,
        context: Any,
        d: jax.Array,
        fields: tuple[jax.Array, jax.Array],
        units: tuple[Unit, Unit],
    ) -> jax.Array:
        """The difference of `pull`; see `ep_jax.maps.pull_difference`."""
        f = lambda s: self.drive(prepared, s)  # noqa: E731
        return maps.pull_difference(f, context, d, fields, units)

    def matrices(self, params: Mapping[str, Any]) -> dict[str, int]:
        """Which parameters are matrices: these decay, and Muon's steps are orthogonal in them.

        By default all with two axes or more.

        Returns:
            For each of them the number of its leading axes that count matrices, usually 0. Of the
            others, the last is the matrices' output, and all before it are their input.
        """
        return {name: 0 for name, value in params.items() if np.ndim(value) > 1}

    def bound(self) -> tuple[Layer, float]:
        """A linear layer of the same parameters, and a factor: what they bound.

        The drive's difference at two states is at most the factor times the norm of that layer's
        drive times the states' difference.

        Raises:
            TypeError: a layer that is not linear does not know one.
        """
        if not self.linear:
            raise TypeError(f"{self} has no method `bound`, which a cap on its norm needs")
        return self, 1.0

    def connections(self, below: Shape) -> int:
        """Products of one drive, counted with those that share a weight.

        By default what a drive by ones through weights of ones adds up to.
        """
        like = jax.eval_shape(lambda k: self.init(k, below, 1.0, jnp.float32), jax.random.key(0))

        def total() -> jax.Array:
            weights = jax.tree.map(lambda p: jnp.ones(p.shape, p.dtype), like)
            ones = self.pack(below, jnp.ones(below))
            return self.drive(self.prepare(weights, below), ones).sum()

        return round(float(jax.jit(total)()))

    def keep(
        self, params: LayerParams, below: Shape, alive: np.ndarray, units: np.ndarray
    ) -> tuple[Layer, LayerParams]:
        """The layer and its parameters without some units, for `ep_jax.pruning`.

        Args:
            params: the parameters.
            below: shape of the state below.
            alive: which entries of its last axis stay, booleans.
            units: which entries of this layer's last axis stay.

        Raises:
            TypeError: the layer does not know how.
        """
        raise TypeError(f"{self} cannot lose units; expected a layer with a method `keep`")


def uniform(key: jax.Array, shape: Shape, fan_in: int, gain: float, dtype: Any) -> jax.Array:
    """Uniform weights with standard deviation ``gain / sqrt(fan_in)``."""
    limit = gain * math.sqrt(3.0 / fan_in)
    return jax.random.uniform(key, shape, dtype, -limit, limit)


@dataclass(frozen=True)
class Dense(Layer):
    """A fully connected layer on the flattened (HWC order) state below.

    Attributes:
        features: number of units.

    Example:
        >>> Dense(10).output_shape((4, 4, 64))
        (10,)
    """

    features: int

    def __post_init__(self) -> None:
        check_integer("Dense.features", self.features, at_least=1)

    def output_shape(self, below: Shape) -> Shape:
        """See `Layer`."""
        del below
        return (self.features,)

    def init(self, key: jax.Array, below: Shape, gain: float, dtype: Any) -> LayerParams:
        """Weights ``[in, out]`` and biases ``[out]`` of zero."""
        fan_in = math.prod(below)
        w = uniform(key, (fan_in, self.features), fan_in, gain, dtype)
        return {"w": w, "b": jnp.zeros((self.features,), dtype)}

    def pack(self, below: Shape, state: jax.Array) -> jax.Array:
        """See `Layer`: flat."""
        del below
        return state.reshape(-1)

    def prepare(self, params: Mapping[str, jax.Array], below: Shape) -> jax.Array:
        """See `Layer`: the matrix alone."""
        del below
        return params["w"]

    def drive(self, prepared: jax.Array, s: jax.Array) -> jax.Array:
        """See `Layer`."""
        return s @ prepared

    def pull(self, prepared: jax.Array, here: jax.Array, field: jax.Array) -> jax.Array:
        """See `Layer`."""
        del here
        return field @ prepared.T

    def connections(self, below: Shape) -> int:
        """See `Layer`.

        Example:
            >>> Dense(10).connections((4, 4, 64))
            10240
        """
        return math.prod(below) * self.features

    def keep(
        self, params: LayerParams, below: Shape, alive: np.ndarray, units: np.ndarray
    ) -> tuple[Dense, LayerParams]:
        """See `Layer`."""
        flat = np.broadcast_to(alive, below).reshape(-1)
        smaller = {"w": params["w"][flat][:, units]}
        return Dense(int(units.sum())), smaller | kept_bias(params, units)


def kept_bias(params: LayerParams, units: np.ndarray) -> LayerParams:
    """The biases of some units; a skip has none."""
    return {"b": params["b"][units]} if "b" in params else {}
