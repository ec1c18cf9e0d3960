"""The network: its specification, parameters, primitive function, energy and currents.

Everything is written for one example; ``jax.vmap`` adds the batch. A network is a graph of *edges*:
each layer is one from the state below it, and a skip is one from a lower state to a higher. With
layer states ``s_1 ... s_L``, the static input ``s_0 = x``, the maps ``A_e`` of `ep_jax.layers`, an
edge's source ``l(e)`` and target ``m(e)``, and the feedback strength ``alpha`` in (0, 1]::

    Phi(theta, x, s) = sum_e alpha^(m - L) <A_e(s_l), s_m>              (primitive function)
    E(theta, x, s)   = sum_m alpha^(m - L) 1/2 |s_m|^2 - Phi            (energy)
    I_m(s)           = alpha^(L - m) dPhi/ds_m
                     = sum_{e to m} A_e(s_l) + sum_{e from m} alpha^(m' - m) A_e^T(s_m')

So a layer hears those above attenuated by ``alpha`` a layer, and the network still has an energy.
``alpha = 1`` is the network of Ernoult et al. (NeurIPS 2019) and of Lin, Bal & Sengupta (ICONS
2024); ``alpha -> 0`` is back-propagation (Xie & Seung, Neural Computation 2003).

With a read-out the last layer of the spec is outside the dynamics, and ``L`` is the layer below it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ep_jax.checks import check_choice, check_float_array, check_integer, check_number, known
from ep_jax.costs import COSTS, Cost, check_cost, gradient
from ep_jax.layers import Layer, LayerParams, check_layer
from ep_jax.maps import Shape, Unit
from ep_jax.neurons import ACTIVATIONS, Activation, DeltaCode, Neuron, check_neuron

Params: TypeAlias = tuple[LayerParams, ...]
"""Parameters of the layers, then of the skips."""
State: TypeAlias = tuple[jax.Array, ...]
"""States of the layers, from the input up."""


@dataclass(frozen=True)
class Skip:
    """A connection from one layer's state to that of a layer further up.

    Attributes:
        source: number of the layer that it comes from; 0 is the input.
        target: number of the layer that it goes to, from 1; two more than `source` at least.
        layer: the map; its output has the shape of the target's state. It has no bias of its own.

    Example:
        >>> around = Skip(1, 3, Dense(10))
        >>> spec = NetworkSpec((8,), (Dense(16), Dense(16), Dense(10)), skips=(around,))
        >>> [p["w"].shape for p in draw_params(jax.random.key(0), spec)]
        [(8, 16), (16, 16), (16, 10), (16, 10)]
    """

    source: int
    target: int
    layer: Layer

    def __post_init__(self) -> None:
        check_integer("Skip.source", self.source, at_least=0)
        check_integer("Skip.target", self.target, at_least=1)
        if self.target < self.source + 2:
            raise ValueError(f"Skip.target is {self.target} with source {self.source}; expected "
                             f"{self.source + 2} or more: between neighbours there is a layer "
                             "already")  # fmt: skip
        if not isinstance(self.layer, Layer):
            raise TypeError(f"Skip.layer is {self.layer!r}; expected a layer such as ep_jax.Conv")


@dataclass(frozen=True)
class Normalization:
    """What a network takes its inputs as: ``(x - mean) / std``, along their last axis.

    Attributes:
        mean: a number for each channel (or feature), or one for all.
        std: likewise, positive.

    Example:
        >>> Normalization(mean=(0.5,), std=(0.25,))(jnp.array([0.25, 1.0])).tolist()
        [-1.0, 2.0]
    """

    mean: tuple[float, ...] | float = (0.0,)
    std: tuple[float, ...] | float = (1.0,)

    def __post_init__(self) -> None:
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            values = tuple(values) if isinstance(values, Sequence | np.ndarray) else (values,)
            object.__setattr__(self, name, values)
            for value in values:
                check_number(f"Normalization.{name}", value, above=least)
            if not values:
                raise ValueError(f"Normalization.{name} is (); expected at least one number")

    def __call__(self, x: jax.Array) -> jax.Array:
        """The inputs ``x [..., channels]`` as the network takes them."""
        if self == Normalization():
            return x
        mean, std = (jnp.asarray(values, x.dtype) for values in (self.mean, self.std))
        return (x - mean) / std

    def check(self, input_shape: Shape) -> None:
        """Raise where inputs of a shape have another number of channels."""
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (1, input_shape[-1]):
                raise ValueError(f"normalization.{name} is {values}; expected 1 number, or "
                                 f"{input_shape[-1]} for inputs {input_shape}")  # fmt: skip


class Edge(NamedTuple):
    """A map from one state to another one.

    Attributes:
        number: its place in `NetworkSpec.edges`.
        params_index: that of its parameters in `Params`.
        source: 0-based number of the layer that it comes from; -1 is the input.
        target: 0-based number of the layer that it goes to.
        layer: the map.
    """

    number: int
    params_index: int
    source: int
    target: int
    layer: Layer

    @property
    def skips(self) -> bool:
        """Whether it does not come from the layer below."""
        return self.target > self.source + 1


def _check_frozen(name: str, part: Any) -> None:
    """Raise where a part of a network may change: a compiled program would answer as before."""
    made = getattr(part, "__dataclass_params__", None)
    if made is None or not made.frozen:
        raise TypeError(f"{name} is {part!r}, whose attributes may change while it is static under "
                        "jit; expected a frozen dataclass")  # fmt: skip


@dataclass(frozen=True)
class NetworkSpec:
    """A layered convergent recurrent network. Frozen and hashable: static under ``jit``.

    Attributes:
        input_shape: ``(H, W, C)`` or ``(N,)`` of one input.
        layers: the layers from the input up.
        neuron: the neuron model of every layer.
        cost: ``"squared_error"``, ``"cross_entropy"`` or your own (`ep_jax.costs`).
        feedback: the feedback strength alpha in (0, 1].
        skips: connections between layers that are no neighbours.
        readout: whether the last layer is a linear read-out outside the dynamics; by default with
            ``cost="cross_entropy"`` alone.
        output: activation of the last layer inside the dynamics; by default ``"linear"``, and the
            neurons' own below a read-out.
        normalization: what the inputs are taken as.

    Raises:
        ValueError, TypeError: naming the argument, where the layers do not fit each other.

    Example:
        >>> spec = NetworkSpec((28, 28, 1), (Conv(32, 5), Conv(64, 5), Dense(10)), feedback=0.1)
        >>> spec.state_shapes
        ((12, 12, 32), (4, 4, 64), (10,))
    """

    input_shape: Shape
    layers: tuple[Layer, ...]
    neuron: Neuron = field(default_factory=DeltaCode)
    cost: str | Cost = "squared_error"
    feedback: float = 1.0
    skips: tuple[Skip, ...] = ()
    readout: bool | None = None
    output: str | None = None
    normalization: Normalization = Normalization()

    def __post_init__(self) -> None:
        for name, optional in (("input_shape", False), ("layers", False), ("skips", True)):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or isinstance(value, str) or not (value or optional):
                kind = "tuple" if optional else "non-empty tuple"
                raise TypeError(f"{name} is {value!r}; expected a {kind}")
            object.__setattr__(self, name, tuple(value))  # a list would not be hashable
        for size in self.input_shape:
            check_integer("input_shape", size, at_least=1)
        for layer in self.layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"layers holds {layer!r}; expected layers such as ep_jax.Conv or "
                                "ep_jax.Dense")  # fmt: skip
        for skip in self.skips:
            if not isinstance(skip, Skip):
                raise TypeError(f"skips holds {skip!r}; expected ep_jax.Skip")
        if isinstance(self.neuron, type) or not isinstance(self.neuron, Neuron):
            missing = _missing_methods(self.neuron)
            lacks = f" without {', '.join(missing)}" if missing else ""
            raise TypeError(f"neuron is {self.neuron!r}{lacks}; expected a neuron model such as "
                            "ep_jax.Rate() or ep_jax.DeltaCode()")  # fmt: skip
        check_choice("neuron.activation", self.neuron.activation, ACTIVATIONS)
        if not callable(self.cost):
            check_choice("cost", self.cost, COSTS)
        check_number("feedback", self.feedback, above=0.0, at_most=1.0)
        check_choice("readout", self.readout, (None, True, False))
        if self.output is not None:
            check_choice("output", self.output, ACTIVATIONS)
        if not isinstance(self.normalization, Normalization):
            raise TypeError(f"normalization is {self.normalization!r}; expected "
                            "ep_jax.Normalization")  # fmt: skip
        self.normalization.check(self.input_shape)
        parts = {"neuron": self.neuron, "cost": self.cost, "layers": self.layers}
        for name, part in (parts | {"skips": self.skips}).items():
            try:
                hash(part)
            except TypeError as error:
                raise TypeError(f"{name} is {part!r}, which has no hash, so it cannot be static "
                                "under jit; expected frozen dataclasses") from error  # fmt: skip
        for name, some in (("neuron", (self.neuron,)), ("layers", self.layers)):
            for part in some:
                _check_frozen(name, part)
        if not isinstance(self.cost, str | functools.partial) and not hasattr(
            self.cost, "__qualname__"
        ):
            _check_frozen("cost", self.cost)
        if not self.depth:
            raise ValueError("layers holds one layer; expected two or more with a read-out (that of"
                             " cost='cross_entropy'), which has no state")  # fmt: skip
        check_neuron(self.neuron)
        below = self.input_shape
        for layer in self.layers:
            below = check_layer(layer, below)
        check_cost(self.cost, below)
        for skip in self.skips:
            if skip.target > self.depth:
                raise ValueError(f"skips holds {skip}; expected a target of at most {self.depth}, "
                                 "the last layer inside the dynamics")  # fmt: skip
            found = check_layer(skip.layer, self.shapes[skip.source])
            wanted = self.shapes[skip.target]
            if found != wanted:
                raise ValueError(f"skips holds {skip}, whose output has shape {found}; expected "
                                 f"{wanted}, that of layer {skip.target}")  # fmt: skip

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Logical shapes of the input and of every layer's output."""
        shapes = [self.input_shape]
        for layer in self.layers:
            shapes.append(layer.output_shape(shapes[-1]))
        return tuple(shapes)

    @property
    def has_readout(self) -> bool:
        """Whether the last layer is outside the dynamics."""
        return self.cost == "cross_entropy" if self.readout is None else self.readout

    @property
    def depth(self) -> int:
        """``L``, the number of layers inside the dynamics."""
        return len(self.layers) - self.has_readout

    @property
    def state_shapes(self) -> tuple[Shape, ...]:
        """Logical shapes of ``s_1 ... s_L``."""
        return self.shapes[1 : self.depth + 1]

    @property
    def output_shape(self) -> Shape:
        """Shape of an answer."""
        return self.shapes[-1]

    @property
    def classes(self) -> int:
        """Number of classes: of the units of an answer that is a vector."""
        return self.output_shape[-1]

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The maps inside the dynamics: those of the layers, then the skips."""
        ends = [(l, l - 1, l, self.layers[l]) for l in range(self.depth)]
        ends += [
            (len(self.layers) + k, skip.source - 1, skip.target - 1, skip.layer)
            for k, skip in enumerate(self.skips)
        ]
        return tuple(Edge(number, *of) for number, of in enumerate(ends))

    @property
    def links(self) -> tuple[Edge, ...]:
        """The edges between layers: all but those from the input."""
        return tuple(edge for edge in self.edges if edge.source >= 0)

    def weight_of(self, layer: int) -> float:
        """``alpha^(L - l)`` of layer ``l`` (0-based): how much of the nudge reaches it."""
        return float(self.feedback) ** (self.depth - 1 - layer)

    def attenuation(self, edge: Edge) -> float:
        """``alpha^(m - l)`` of an edge: how much of its target its source hears."""
        return float(self.feedback) ** (edge.target - edge.source)

    def activation(self, layer: int) -> Activation:
        """The activation of layer ``l`` (0-based)."""
        name = self.neuron.activation
        if layer == self.depth - 1:
            name = self.output or (name if self.has_readout else "linear")
        return ACTIVATIONS[name]


def _missing_methods(neuron: Any) -> list[str]:
    """What an object that is to be a neuron model has not."""
    names = ("activation", "readout", "signal", "start", "step", "stochastic")
    return [] if isinstance(neuron, type) else [n for n in names if not hasattr(neuron, n)]


def draw_params(
    key: jax.Array, spec: NetworkSpec, gain: float = 0.5, dtype: Any = jnp.float32
) -> Params:
    """Random parameters of every layer and skip; see `ep_jax.init_params`.

    Example:
        >>> params = draw_params(jax.random.key(0), NetworkSpec((8,), (Dense(4), Dense(2))))
        >>> [p["w"].shape for p in params]
        [(8, 4), (4, 2)]
    """
    check_number("gain", gain, above=0.0)
    keys = jax.random.split(key, len(spec.layers))
    params = [
        layer.init(k, below, gain, dtype)
        for layer, below, k in zip(spec.layers, spec.shapes, keys, strict=False)
    ]
    for number, skip in enumerate(spec.skips):
        own = jax.random.fold_in(key, number)
        params.append(_without_bias(skip.layer.init(own, spec.shapes[skip.source], gain, dtype)))
    return tuple(params)


def _without_bias(params: LayerParams) -> LayerParams:
    return {name: value for name, value in params.items() if name != "b"}


def check_params(spec: NetworkSpec, params: Params) -> None:
    """Raise where `params` does not belong to `spec`."""
    count = len(spec.layers) + len(spec.skips)
    if not isinstance(params, tuple | list) or len(params) != count:
        found = len(params) if isinstance(params, tuple | list) else type(params).__name__
        raise ValueError(f"params holds {found} layers; expected a tuple of {count} layers (the "
                         "skips' come last), as from ep_jax.init_params")  # fmt: skip
    first = None
    for i, (p, wanted) in enumerate(zip(params, parameters_of(spec), strict=True)):
        names = ", ".join(map(repr, sorted(wanted, reverse=True)))
        if not hasattr(p, "keys") or set(p.keys()) != wanted.keys():
            raise ValueError(f"params[{i}] is {type(p).__name__}; expected a dict of {names}")
        for name, like in wanted.items():
            check_float_array(f"params[{i}][{name!r}]", p[name], like.shape)
            found = jax.dtypes.canonicalize_dtype(p[name].dtype)
            first = first or (f"params[{i}][{name!r}]", found)
            if found != first[1]:
                raise TypeError(f"params[{i}][{name!r}] has dtype {found}; expected {first[1]}, as "
                                f"{first[0]}: one precision for all")  # fmt: skip


@functools.cache
def parameters_of(spec: NetworkSpec) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
    """What parameters there are, of each layer and then of each skip."""
    return jax.eval_shape(lambda key: draw_params(key, spec), jax.random.key(0))


def precision_of(params: Params) -> jnp.dtype:
    """The precision that all parameters have."""
    return jax.tree.leaves(params)[0].dtype


def check_state(spec: NetworkSpec, state: State) -> None:
    """Raise where `state` is no state of one example of `spec`."""
    if not isinstance(state, tuple | list) or len(state) != spec.depth:
        count = len(state) if isinstance(state, tuple | list) else type(state).__name__
        raise ValueError(f"state holds {count} layers; expected a tuple of {spec.depth} arrays "
                         f"of shapes {spec.state_shapes}")  # fmt: skip
    for i, (shape, s) in enumerate(zip(spec.state_shapes, state, strict=True)):
        check_float_array(f"state[{i}]", s, shape)


# Prepared form: packed layouts and matrices, made once a phase, never in a loop.


class Prepared(NamedTuple):
    """The parameters as the dynamics read them; a pytree, linear in the parameters.

    Attributes:
        maps: what each edge's layer has prepared, in the order of ``spec.edges``.
        biases: the bias of each layer inside the dynamics, packed like its state.
        readout: the parameters of a read-out, or ``None``.
    """

    maps: tuple[Any, ...]
    biases: State
    readout: LayerParams | None


def prepare(params: Params, spec: NetworkSpec, precision: str = "float32") -> Prepared:
    """The parameters in prepared form; a `precision` of bfloat16 rounds the links between layers.

    What the input says is no part of a sweep, so it is computed in full.
    """
    maps = tuple(
        edge.layer.prepare(params[edge.params_index], spec.shapes[edge.source + 1])
        for edge in spec.edges
    )
    if precision == "bfloat16":
        maps = tuple(
            map_ if edge.source < 0 else jax.tree.map(lambda a: a.astype(jnp.bfloat16), map_)
            for edge, map_ in zip(spec.edges, maps, strict=True)
        )
    biases = tuple(spec.layers[l].bias(params[l], spec.shapes[l]) for l in range(spec.depth))
    readout = params[spec.depth] if spec.has_readout else None
    return Prepared(maps, pack(spec, biases), readout)


def random_state(key: jax.Array, spec: NetworkSpec, dtype: Any) -> State:
    """A state uniform in [0, 1], from which a relaxation may start."""
    keys = jax.random.split(key, spec.depth)
    return tuple(
        jax.random.uniform(k, shape, dtype)
        for k, shape in zip(keys, spec.state_shapes, strict=True)
    )


def largest_gap(one: State, other: State) -> jax.Array:
    """The largest distance of a unit between two states."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(a - b)) for a, b in zip(one, other, strict=True)]))


def pack(spec: NetworkSpec, state: State) -> State:
    """Each layer's state in the layout in which the layer above it reads it."""
    return tuple(pack_layer(spec, l, s) for l, s in enumerate(state))


def unpack(spec: NetworkSpec, packed: State) -> State:
    """The inverse of `pack`."""
    return tuple(unpack_layer(spec, l, s) for l, s in enumerate(packed))


def pack_layer(spec: NetworkSpec, l: int, state: jax.Array) -> jax.Array:
    """A state of layer ``l`` (0-based) as the layer above it reads it; the last one as it is."""
    return spec.layers[l + 1].pack(state.shape, state) if l + 1 < spec.depth else state


def unpack_layer(spec: NetworkSpec, l: int, packed: jax.Array) -> jax.Array:
    """The inverse of `pack_layer`."""
    shape = spec.state_shapes[l]
    return spec.layers[l + 1].unpack(shape, packed) if l + 1 < spec.depth else packed


# What an edge says, in both directions. All states are packed; `_read` and `_told` turn to the
# layout of a skip, which need not be that of the layer above.


def _read(spec: NetworkSpec, edge: Edge, below: jax.Array) -> jax.Array:
    if not edge.skips:
        return below
    return edge.layer.pack(spec.state_shapes[edge.source], unpack_layer(spec, edge.source, below))


def _told(spec: NetworkSpec, edge: Edge, back: jax.Array) -> jax.Array:
    if not edge.skips:
        return back
    logical = edge.layer.unpack(spec.state_shapes[edge.source], back)
    return pack_layer(spec, edge.source, logical)


def drive(spec: NetworkSpec, prepared: Prepared, edge: Edge, below: jax.Array) -> jax.Array:
    """``A_e(s_l)``, without bias: what an edge's target receives."""
    said = edge.layer.drive(prepared.maps[edge.number], _read(spec, edge, below))
    return pack_layer(spec, edge.target, said)


def pull(
    spec: NetworkSpec, prepared: Prepared, edge: Edge, here: jax.Array, above: jax.Array
) -> jax.Array:
    """``A_e^T(s_m)``: what an edge's source hears of its target.

    It is ``d <A_e(s_l), s_m> / d s_l``, which depends on the state `here` of the source only where
    the layer is not linear.
    """
    field = unpack_layer(spec, edge.target, above)
    back = edge.layer.pull(prepared.maps[edge.number], _read(spec, edge, here), field)
    return _told(spec, edge, back)


def context(spec: NetworkSpec, prepared: Prepared, edge: Edge, base: jax.Array) -> Any:
    """What a displacement of `base`, below an edge, needs to know; ``None`` where it is linear."""
    if edge.layer.linear:
        return None
    return edge.layer.context(prepared.maps[edge.number], _read(spec, edge, base))


def drive_difference(
    spec: NetworkSpec, prepared: Prepared, edge: Edge, d: jax.Array, context: Any, unit: Unit
) -> jax.Array:
    """``[A_e(s0 + unit d) - A_e(s0)] / unit`` for the displacement `d` of an edge's source."""
    if edge.layer.linear:
        return drive(spec, prepared, edge, d)
    of = prepared.maps[edge.number]
    return pack_layer(
        spec, edge.target, edge.layer.difference(of, context, _read(spec, edge, d), unit)
    )


def pull_difference(
    spec: NetworkSpec,
    prepared: Prepared,
    edge: Edge,
    d: jax.Array,
    above: tuple[jax.Array, jax.Array],
    context: Any,
    units: tuple[Unit, Unit],
) -> jax.Array:
    """The difference of `pull`, in units of the edge's target.

    Args:
        spec: the network.
        prepared: its parameters.
        edge: the edge.
        d: the displacement of its source.
        above: displacement and base of its target.
        context: see `context`.
        units: those of source and target.
    """
    if edge.layer.linear:
        return pull(spec, prepared, edge, d, above[0])
    moved, base = (unpack_layer(spec, edge.target, v) for v in above)
    back = edge.layer.pull_difference(
        prepared.maps[edge.number], context, _read(spec, edge, d), (moved, base), units
    )
    return _told(spec, edge, back)


def input_drive(
    spec: NetworkSpec, prepared: Prepared, x: jax.Array
) -> tuple[jax.Array | None, ...]:
    """What the input says to each layer, without bias: constant, so once an example.

    A tuple over layers, with ``None`` for those that it says nothing to.
    """
    x = spec.normalization(as_precise_as(prepared.biases[0], x))
    drives: list[jax.Array | None] = [None] * spec.depth
    for edge in spec.edges:
        if edge.source < 0:
            packed = edge.layer.pack(spec.input_shape, x)
            said = edge.layer.drive(prepared.maps[edge.number], packed)
            said = pack_layer(spec, edge.target, said)
            before = drives[edge.target]
            drives[edge.target] = said if before is None else before + said
    return tuple(drives)


def external(prepared: Prepared, drives: tuple[jax.Array | None, ...]) -> State:
    """Input and bias of each layer."""
    return tuple(
        b if drive is None else b + drive for b, drive in zip(prepared.biases, drives, strict=True)
    )


def as_precise_as(weights: jax.Array, x: jax.Array) -> jax.Array:
    """An input in the higher precision of its own and the parameters', which all states have."""
    with jax.numpy_dtype_promotion("standard"):  # explicit here, so no strict rule is broken
        precision = jnp.promote_types(x.dtype, weights.dtype)
    return x.astype(precision)


def feedback(spec: NetworkSpec, prepared: Prepared, state: State) -> State:
    """What each layer hears from those above it, attenuated."""
    heard = list(map(jnp.zeros_like, state))
    for edge in spec.links:
        l = edge.source
        above = pull(spec, prepared, edge, state[l], state[edge.target])
        heard[l] = heard[l] + spec.attenuation(edge) * above
    return tuple(heard)


def currents(spec: NetworkSpec, prepared: Prepared, state: State) -> State:
    """What each layer receives from the others, without input and bias."""
    total = list(feedback(spec, prepared, state))
    for edge in spec.links:
        below = drive(spec, prepared, edge, state[edge.source])
        total[edge.target] = total[edge.target] + below
    return tuple(total)


def pass_from_below(
    spec: NetworkSpec,
    prepared: Prepared,
    drives: tuple[jax.Array | None, ...],
    heard: State | None = None,
) -> State:
    """One pass of rate neurons, bottom-up, under a feedback that is held; by default under none.

    Args:
        spec: the network.
        prepared: its parameters.
        drives: what the input says, see `input_drive`.
        heard: what each layer hears from those above it, as `feedback` makes it.
    """
    state: list[jax.Array] = []
    for l, total in enumerate(external(prepared, drives)):
        if heard is not None:
            total = total + heard[l]
        for edge in spec.links:
            if edge.target == l:
                total = total + drive(spec, prepared, edge, state[edge.source])
        state.append(spec.activation(l).apply(total))
    return tuple(state)


def prepared_phi(spec: NetworkSpec, prepared: Prepared, x: jax.Array, packed: State) -> jax.Array:
    """`phi` of a packed state: the one place where Phi is written."""
    total = jnp.zeros((), packed[-1].dtype)
    own = external(prepared, input_drive(spec, prepared, x))
    for l, s in enumerate(packed):
        below = own[l]
        for edge in spec.links:
            if edge.target == l:
                below = below + drive(spec, prepared, edge, packed[edge.source])
        total = total + jnp.sum(below * s) / spec.weight_of(l)
    return total


def phi(params: Params, spec: NetworkSpec, x: jax.Array, state: State) -> jax.Array:
    """The primitive function ``Phi = sum_e alpha^(m - L) <A_e(s_l), s_m>`` of one example.

    Args:
        params: parameters of `spec`.
        spec: the network.
        x: one input, of shape ``spec.input_shape``.
        state: tuple over layers of arrays of shapes ``spec.state_shapes``.

    Returns:
        A scalar.

    Example:
        >>> spec = NetworkSpec((2,), (Dense(2),))
        >>> params = ({"w": jnp.eye(2), "b": jnp.zeros(2)},)
        >>> float(phi(params, spec, jnp.array([1.0, 2.0]), (jnp.array([3.0, 4.0]),)))
        11.0
    """
    check_example(spec, params, x, state)
    return prepared_phi(spec, prepare(params, spec), x, pack(spec, state))


def energy(params: Params, spec: NetworkSpec, x: jax.Array, state: State) -> jax.Array:
    """The energy ``E = sum_l alpha^(l - L) 1/2 |s_l|^2 - Phi`` of one example.

    A relaxation of hard-sigmoid (or linear) units never raises it. For a smooth activation
    ``sigma`` the Lyapunov function has the integral of ``sigma^-1`` in place of ``1/2 s^2``.

    Args and example: as for `phi`.
    """
    interaction = phi(params, spec, x, state)  # which checks the arguments
    self_energy = sum(
        (jnp.sum(s**2) / (2 * spec.weight_of(l)) for l, s in enumerate(state)),
        start=jnp.zeros((), state[-1].dtype),
    )
    return self_energy - interaction


def check_example(
    spec: NetworkSpec, params: Params, x: jax.Array, state: State | None = None
) -> None:
    """Raise where the arguments of a per-example function do not fit `spec`."""
    check_params(spec, params)
    check_float_array("x", x, spec.input_shape)
    if state is not None:
        check_state(spec, state)


# Answers, targets, costs.


def read_out(spec: NetworkSpec, prepared: Prepared, last: jax.Array) -> jax.Array:
    """What the network answers, given the last layer's state: that state, or its read-out."""
    if prepared.readout is None:
        return last
    layer, below = spec.layers[-1], spec.shapes[-2]
    maps = layer.prepare(prepared.readout, below)
    return layer.drive(maps, layer.pack(below, last)) + layer.bias(prepared.readout, below)


def classify(answers: jax.Array) -> jax.Array:
    """The class that each of some answers ``[..., classes]`` names: that of its largest entry.

    An answer that holds something that is not a number names none: -1, which is no label.

    Example:
        >>> classify(jnp.array([[0.1, 0.9], [jnp.nan, 0.2]])).tolist()
        [1, -1]
    """
    return jnp.where(jnp.isnan(answers).any(-1), -1, answers.argmax(-1))


def cost_of(spec: NetworkSpec, prepared: Prepared, last: jax.Array, y: jax.Array) -> jax.Array:
    """``C`` of one example at the last layer's state; `y` is a target of the answer's shape."""
    cost = COSTS[spec.cost] if isinstance(spec.cost, str) else spec.cost
    return cost(read_out(spec, prepared, last), y)


def cost_gradient(
    spec: NetworkSpec, prepared: Prepared, last: jax.Array, y: jax.Array
) -> jax.Array:
    """``dC/ds_L``: minus beta times this is the nudge on the last layer of the dynamics."""
    return gradient(lambda s, y: cost_of(spec, prepared, s, y), last, y)


def targets(spec: NetworkSpec, y: Any, dtype: Any, batch: tuple[int, ...] = ()) -> jax.Array:
    """Targets of the answer's shape, from such targets or from integer labels ``[*batch]``.

    Raises:
        ValueError, TypeError: wrong shape, or a label outside ``0 .. classes - 1``. Inside ``jit``
            the cost of such a label, and the gradient, are not a number.
    """
    name, shape = "ys" if batch else "y", spec.output_shape
    y = np.asarray(y) if isinstance(y, int | list | tuple) else y
    if not hasattr(y, "dtype"):
        raise TypeError(f"{name} is {type(y).__name__}; expected integer labels or one-hot targets")
    if tuple(y.shape) == (*batch, *shape):
        y = jnp.asarray(y, dtype)
        check_float_array(name, y, y.shape)
        return y
    whole = jnp.issubdtype(y.dtype, jnp.integer)
    if tuple(y.shape) != batch or not whole or len(shape) != 1:
        labels = f"integer labels of shape {batch} or " if len(shape) == 1 else ""
        raise ValueError(
            f"{name} has shape {tuple(y.shape)} and dtype {y.dtype}; expected {labels}"
            f"floating-point targets of shape {(*batch, *shape)}"
        )
    (classes,) = shape
    if known(y):
        wrong = np.asarray(y)[(np.asarray(y) < 0) | (np.asarray(y) >= classes)]
        if wrong.size:
            raise ValueError(f"{name} holds the label {wrong.flat[0]}; expected labels in "
                             f"0 .. {classes - 1}")  # fmt: skip
    hot = jax.nn.one_hot(y, classes, dtype=dtype)
    # Inside jit nobody can raise: what a label out of range teaches is not a number.
    return jnp.where(((y >= 0) & (y < classes))[..., None], hot, jnp.nan)
