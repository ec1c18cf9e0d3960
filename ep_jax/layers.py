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

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ep_jax import maps
from ep_jax.checks import check_integer, told
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


@functools.lru_cache(maxsize=1024)
def check_layer(layer: Layer, below: Shape) -> Shape:
    """Raise where a layer's methods do not fit each other, as traced on a state of shape `below`.

    Returns:
        The shape of the layer's state.

    Raises:
        TypeError, ValueError: a method fails, or returns something else than `Layer` says.
    """
    shape = layer.output_shape(below)  # which says itself what does not fit
    if not isinstance(shape, tuple | list) or not all(
        isinstance(size, numbers.Integral) and size >= 1 for size in shape
    ):
        raise TypeError(f"{layer!r}.output_shape returns {shape!r} above a state of shape {below}; "
                        "expected a tuple of sizes of at least 1")  # fmt: skip
    if type(layer).pull is not Layer.pull:  # it knows better than what is asked here
        return tuple(shape)

    def traced(method: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return jax.eval_shape(function, *arguments)
        except Exception as error:  # whatever a user's code may do
            raise TypeError(f"{layer!r}.{method} fails above a state of shape {below}: "
                            f"{type(error).__name__}: {error}") from error  # fmt: skip

    key = jax.eval_shape(lambda: jax.random.key(0))
    params = traced("init", lambda k: layer.init(k, below, 1.0, jnp.float32), key)
    named = isinstance(params, dict) and all(isinstance(name, str) for name in params)
    if not named or not params or not all(hasattr(p, "dtype") for p in params.values()):
        raise TypeError(f"{layer!r}.init returns {told(params)}; expected a dict of one or more "
                        "arrays by name")  # fmt: skip
    s = jax.ShapeDtypeStruct(below, jnp.float32)

    def drive(params: LayerParams, s: jax.Array) -> jax.Array:
        return layer.drive(layer.prepare(params, below), layer.pack(below, s))

    for method, function in (("drive", drive), ("bias", lambda p, _: layer.bias(p, below))):
        found = traced(method, function, params, s)
        if getattr(found, "shape", None) != tuple(shape) or found.dtype != jnp.float32:
            raise TypeError(f"{layer!r}.{method} returns {told(found)} above a state of shape "
                            f"{below}; expected float32{list(shape)}, the shape of output_shape and"
                            " the dtype of the state")  # fmt: skip
    if layer.linear:
        _check_linear(layer, below, params, drive)
    return tuple(shape)


def _check_linear(layer: Layer, below: Shape, params: Any, drive: Callable[..., Any]) -> None:
    """Raise where a drive that should be linear has no transpose, or is not zero at zero."""
    expected = "expected a drive that is linear in the state, or a class with linear = False"
    zeros = jnp.zeros(below, jnp.float32)

    def at_zero() -> jax.Array:
        ones = jax.tree.map(lambda p: jnp.ones(p.shape, p.dtype), params)
        out, back = drive(ones, zeros), lambda s: drive(ones, s)
        jax.linear_transpose(back, zeros)(out)
        return jnp.all(out == 0)

    try:
        with jax.ensure_compile_time_eval():
            passes_through_zero = bool(jax.jit(at_zero)())
    except NotImplementedError as error:
        raise TypeError(f"{layer!r}.drive has no transpose: {error}; {expected}") from error
    if not passes_through_zero:
        raise ValueError(f"{layer!r}.drive of a state of zeros is not zero; {expected}, without "
                         "the bias, which `bias` adds")  # fmt: skip


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
        return maps.product(s, prepared)

    def pull(self, prepared: jax.Array, here: jax.Array, field: jax.Array) -> jax.Array:
        """See `Layer`."""
        del here
        return maps.product(field, prepared.T)

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
