"""The network: its specification, parameters, primitive function, energy and currents.

Everything is written for one example; ``jax.vmap`` adds the batch. With layer states
``s_1 ... s_L``, the static input ``s_0 = x``, the affine drives ``A_l`` of `ep_jax.layers` and the
feedback strength ``alpha`` in (0, 1]:

    Phi(theta, x, s) = sum_l alpha^(l - L) <A_l(s_{l-1}), s_l>          (primitive function)
    E(theta, x, s)   = sum_l alpha^(l - L) 1/2 |s_l|^2 - Phi            (energy)
    I_l(s)           = alpha^(L - l) dPhi/ds_l = A_l(s_{l-1}) + alpha A_{l+1}^T(s_{l+1})

So layer ``l`` hears the layer above attenuated by ``alpha``, and the network still has an energy.
``alpha = 1`` is the network of Ernoult et al. (NeurIPS 2019) and of Lin, Bal & Sengupta (ICONS
2024); ``alpha -> 0`` is back-propagation (Xie & Seung, Neural Computation 2003).

With ``cost="cross_entropy"`` the last layer of the spec is a read-out outside the dynamics, and
``L`` is the layer below it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from ep_jax import layers as ops
from ep_jax.checks import check_choice, check_float_array, check_integer, check_number
from ep_jax.layers import Conv, Dense, Layer, Shape
from ep_jax.neurons import DeltaCode, Neuron

COSTS = ("squared_error", "cross_entropy")


LayerParams: TypeAlias = dict[str, jax.Array]
"""Parameters of one layer: ``w`` (convolution HWIO, dense ``[in, out]``) and ``b`` ``[out]``."""

Params: TypeAlias = tuple[LayerParams, ...]
State: TypeAlias = tuple[jax.Array, ...]


@dataclass(frozen=True)
class NetworkSpec:
    """A layered convergent recurrent network. Frozen and hashable: static under ``jit``.

    Attributes:
        input_shape: ``(H, W, C)`` or ``(N,)`` of one input.
        layers: `Conv` layers, then `Dense` layers; the last one is `Dense`, a unit a class.
        neuron: the neuron model of every layer.
        cost: ``"squared_error"`` (the last layer is part of the dynamics, linear) or
            ``"cross_entropy"`` (the last layer is a softmax read-out outside the dynamics).
        feedback: the feedback strength alpha in (0, 1].

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
    cost: Literal["squared_error", "cross_entropy"] = "squared_error"
    feedback: float = 1.0

    def __post_init__(self) -> None:
        for name in ("input_shape", "layers"):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or isinstance(value, str) or not value:
                raise TypeError(f"{name} is {value!r}; expected a non-empty tuple")
            object.__setattr__(self, name, tuple(value))  # a list would not be hashable
        for size in self.input_shape:
            check_integer("input_shape", size, at_least=1)
        for layer in self.layers:
            if not isinstance(layer, Conv | Dense):
                raise TypeError(f"layers holds {layer!r}; expected ep_jax.Conv or ep_jax.Dense")
        if not isinstance(self.layers[-1], Dense):
            raise ValueError(f"layers ends with {self.layers[-1]}; expected Dense(classes)")
        if not isinstance(self.neuron, Neuron):
            raise TypeError(f"neuron is {self.neuron!r}; expected a neuron model such as "
                            "ep_jax.Rate() or ep_jax.DeltaCode()")  # fmt: skip
        check_choice("cost", self.cost, COSTS)
        check_number("feedback", self.feedback, above=0.0, at_most=1.0)
        if self.cost == "cross_entropy" and len(self.layers) < 2:
            raise ValueError("layers holds one layer; expected two or more with "
                             "cost='cross_entropy', whose read-out has no state")  # fmt: skip
        _ = self.shapes  # raises where a layer does not fit the one below it

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Logical shapes of the input and of every layer's output."""
        shapes = [self.input_shape]
        for layer in self.layers:
            shapes.append(layer.output_shape(shapes[-1]))
        return tuple(shapes)

    @property
    def depth(self) -> int:
        """``L``, the number of layers inside the dynamics."""
        return len(self.layers) - (self.cost == "cross_entropy")

    @property
    def state_shapes(self) -> tuple[Shape, ...]:
        """Logical shapes of ``s_1 ... s_L``."""
        return self.shapes[1 : self.depth + 1]

    @property
    def classes(self) -> int:
        """Number of classes, the size of a one-hot target."""
        return self.layers[-1].features

    def weight_of(self, layer: int) -> float:
        """``alpha^(L - l)`` of layer ``l`` (0-based): how much of the nudge reaches it."""
        return float(self.feedback) ** (self.depth - 1 - layer)


def init_params(
    key: jax.Array, spec: NetworkSpec, gain: float = 0.5, dtype: jnp.dtype | type = jnp.float32
) -> Params:
    """Random parameters: weights uniform with standard deviation ``gain / sqrt(fan_in)``, no bias.

    Args:
        key: random key.
        spec: the network.
        gain: scale of the weights. Large gains with strong feedback make a network multistable;
            with small ones the states of a deep network fade away.
        dtype: floating-point type of the parameters.

    Returns:
        A tuple over layers of ``{"w", "b"}``.

    Example:
        >>> params = init_params(jax.random.key(0), NetworkSpec((8,), (Dense(4), Dense(2))))
        >>> [p["w"].shape for p in params]
        [(8, 4), (4, 2)]
    """
    check_number("gain", gain, above=0.0)
    params = []
    for layer, below, k in zip(
        spec.layers, spec.shapes, jax.random.split(key, len(spec.layers)), strict=False
    ):
        shape = layer.weight_shape(below)
        limit = gain * math.sqrt(3.0 / math.prod(shape[:-1]))
        w = jax.random.uniform(k, shape, dtype, -limit, limit)
        params.append({"w": w, "b": jnp.zeros((layer.features,), dtype)})
    return tuple(params)


def check_params(spec: NetworkSpec, params: Params) -> None:
    """Raise where `params` does not belong to `spec`."""
    if not isinstance(params, tuple | list) or len(params) != len(spec.layers):
        count = len(params) if isinstance(params, tuple | list) else type(params).__name__
        raise ValueError(f"params holds {count} layers; expected a tuple of {len(spec.layers)} "
                         "layers of {'w', 'b'}, as from ep_jax.init_params")  # fmt: skip
    for i, (layer, below, p) in enumerate(zip(spec.layers, spec.shapes, params, strict=False)):
        if not hasattr(p, "keys") or set(p.keys()) != {"w", "b"}:
            raise ValueError(f"params[{i}] is {type(p).__name__}; expected a dict of 'w' and 'b'")
        check_float_array(f"params[{i}]['w']", p["w"], layer.weight_shape(below))
        check_float_array(f"params[{i}]['b']", p["b"], (layer.features,))
        for name in ("w", "b"):
            found, first = (
                jax.dtypes.canonicalize_dtype(q.dtype) for q in (p[name], params[0]["w"])
            )
            if found != first:
                raise TypeError(f"params[{i}]['{name}'] has dtype {found}; expected {first}, as "
                                "params[0]['w']: one precision for all")  # fmt: skip


def check_state(spec: NetworkSpec, state: State) -> None:
    """Raise where `state` is no state of one example of `spec`."""
    if not isinstance(state, tuple | list) or len(state) != spec.depth:
        count = len(state) if isinstance(state, tuple | list) else type(state).__name__
        raise ValueError(f"state holds {count} layers; expected a tuple of {spec.depth} arrays "
                         f"of shapes {spec.state_shapes}")  # fmt: skip
    for i, (shape, s) in enumerate(zip(spec.state_shapes, state, strict=True)):
        check_float_array(f"state[{i}]", s, shape)


# Working form: packed layouts and kernel matrices, made once a phase, never in a loop.


class Links(NamedTuple):
    """The parameters in working form; a pytree, linear in the parameters.

    Attributes:
        matrices: the kernel matrix of each layer (`ep_jax.layers.kernel`).
        biases: the bias of each layer inside the dynamics, packed like its state.
        readout: the parameters of a read-out outside the dynamics, or ``None``.
    """

    matrices: tuple[jax.Array, ...]
    biases: State
    readout: LayerParams | None


def link(params: Params, spec: NetworkSpec) -> Links:
    """The parameters in working form."""
    inside = range(spec.depth)
    matrices = tuple(ops.kernel(spec.layers[l], spec.shapes[l], params[l]["w"]) for l in inside)
    biases = tuple(jnp.broadcast_to(params[l]["b"], spec.state_shapes[l]) for l in inside)
    readout = params[-1] if spec.depth < len(spec.layers) else None
    return Links(matrices, pack(spec, biases), readout)


def pack(spec: NetworkSpec, state: State) -> State:
    """Each layer's state in the layout in which the layer above it reads it."""
    above = spec.layers[1 : spec.depth]
    packed = [ops.pack(layer, s.shape, s) for layer, s in zip(above, state, strict=False)]
    return (*packed, state[-1])


def unpack(spec: NetworkSpec, packed: State) -> State:
    """The inverse of `pack`."""
    above, shapes = spec.layers[1 : spec.depth], spec.state_shapes
    state = [ops.unpack(a, h, p) for a, h, p in zip(above, shapes, packed, strict=False)]
    return (*state, packed[-1])


def drive(spec: NetworkSpec, links: Links, l: int, below: jax.Array) -> jax.Array:
    """The bias-free drive of layer ``l`` (0-based) by the packed state below it, packed."""
    return _packed(spec, l, ops.pool(spec.layers[l], _convolve(spec, links, l, below)))


def _convolve(spec: NetworkSpec, links: Links, l: int, below: jax.Array) -> jax.Array:
    return ops.convolve(spec.layers[l], spec.shapes[l], links.matrices[l], below)


def _packed(spec: NetworkSpec, l: int, state: jax.Array) -> jax.Array:
    """A logical state of layer ``l`` as the layer above it reads it."""
    return ops.pack(spec.layers[l + 1], state.shape, state) if l + 1 < spec.depth else state


def feedback(
    spec: NetworkSpec, links: Links, l: int, here: jax.Array, above: jax.Array
) -> jax.Array:
    """The adjoint of the drive of layer ``l + 1`` at the state `here` of layer ``l``.

    It is ``d <A_{l+1}(s_l), s_{l+1}> / d s_l``. Only a max pool depends on `here`: it routes what
    comes from above to the unit that won; the adjoint of an average pool spreads it evenly.
    """
    shares = None
    if not is_linear(spec.layers[l + 1]):
        shares = ops.winners(ops.windows_of(_convolve(spec, links, l + 1, here)))
    return _adjoint(spec, links, l + 1, _unpool(spec, l + 1, above, shares))


def _unpool(spec: NetworkSpec, l: int, state: jax.Array, shares: jax.Array | None) -> jax.Array:
    """`ep_jax.layers.unpool` of a packed state of layer ``l``."""
    if l + 1 < spec.depth:
        state = ops.unpack(spec.layers[l + 1], spec.state_shapes[l], state)
    return ops.unpool(spec.layers[l], state, shares)


def _adjoint(spec: NetworkSpec, links: Links, l: int, field: jax.Array) -> jax.Array:
    """The transpose of `_convolve`."""
    return ops.adjoint(spec.layers[l], spec.shapes[l], links.matrices[l], field)


def is_linear(layer: Layer) -> bool:
    """Whether a layer's drive is affine (all but max pooling)."""
    return not (isinstance(layer, Conv) and layer.pool == "max")


def input_drive(spec: NetworkSpec, links: Links, x: jax.Array) -> jax.Array:
    """The bias-free drive of the first layer by the input: constant, so once an example."""
    x = as_precise_as(links.matrices[0], x)
    return drive(spec, links, 0, ops.pack(spec.layers[0], spec.input_shape, x))


def as_precise_as(weights: jax.Array, x: jax.Array) -> jax.Array:
    """An input in the higher precision of its own and the parameters', which all states have."""
    with jax.numpy_dtype_promotion("standard"):  # explicit here, so no strict rule is broken
        precision = jnp.promote_types(x.dtype, weights.dtype)
    return x.astype(precision)


def current(
    spec: NetworkSpec,
    links: Links,
    l: int,
    signals: State,
    from_below: float = 1.0,
    from_above: float = 1.0,
) -> jax.Array:
    """What layer ``l`` receives from its neighbours' packed signals, without input and bias.

    ``from_below * A'_l(m_{l-1}) + from_above * A_{l+1}^T(m_{l+1})``; a factor of 0 costs nothing.
    """
    total = jnp.zeros_like(signals[l])
    if l > 0 and from_below != 0:
        total = total + from_below * drive(spec, links, l, signals[l - 1])
    if l + 1 < spec.depth and from_above != 0:
        total = total + from_above * feedback(spec, links, l, signals[l], signals[l + 1])
    return total


def currents(
    spec: NetworkSpec, links: Links, signals: State, from_below: float, from_above: float
) -> State:
    """`current` of every layer."""
    return tuple(
        current(spec, links, l, signals, from_below, from_above) for l in range(spec.depth)
    )


# Differences of drives and adjoints under a displacement ``s_l = s0_l + beta_l D_l`` of the state,
# without cancellation. An affine map acts on D alone. Of a max pool, the winners move as well.


def behind(spec: NetworkSpec, links: Links, l: int, below: jax.Array) -> jax.Array | None:
    """How far each unit is behind the winner of its window in the max pool of layer ``l``.

    ``z_i - max_j z_j <= 0`` with ``z`` the convolution before the pool; ``None`` without max pool.
    """
    if is_linear(spec.layers[l]):
        return None
    windows = ops.windows_of(_convolve(spec, links, l, below))
    return windows - windows.max((1, 3), keepdims=True)


def drive_difference(
    spec: NetworkSpec,
    links: Links,
    l: int,
    d: jax.Array,
    behind: jax.Array | None,
    unit: jax.Array | float,
) -> jax.Array:
    """``[A_l(s0 + unit d) - A_l(s0)] / unit`` for the displacement `d` of the layer below.

    For a max pool ``max_i(z'_i + behind_i / unit)``, with ``z'`` the convolution of `d` (the
    minimum for a negative unit).
    """
    if behind is None:
        return drive(spec, links, l, d)
    sign = jnp.sign(unit)
    return _packed(spec, l, sign * (sign * _contest(spec, links, l, d, behind, unit)).max((1, 3)))


def feedback_difference(
    spec: NetworkSpec,
    links: Links,
    l: int,
    d: jax.Array,
    above: tuple[jax.Array, jax.Array],
    behind: jax.Array | None,
    units: tuple[jax.Array | float, jax.Array | float],
) -> jax.Array:
    """The difference of `feedback` to layer ``l``, in units of layer ``l + 1``.

    For a max pool ``conv^T(w D_{l+1} + (w - w0) s0_{l+1} / beta_{l+1})``, with ``w`` and ``w0`` the
    one-hot winners of each window now and at ``s0``.

    Args:
        spec: the network.
        links: its parameters.
        l: number of the layer.
        d: its displacement.
        above: displacement ``D_{l+1}`` and base ``s0_{l+1}`` of the layer above, packed.
        behind: see `behind`, of the layer above.
        units: ``beta_l`` and ``beta_{l+1}``.
    """
    moved, base = above
    if behind is None:
        return feedback(spec, links, l, d, moved)
    unit, unit_above = units
    now = ops.winners(jnp.sign(unit) * _contest(spec, links, l + 1, d, behind, unit))

    field = _unpool(spec, l + 1, moved, now)
    field = field + _unpool(spec, l + 1, base / unit_above, now - ops.winners(behind))
    return _adjoint(spec, links, l + 1, field)


def _contest(
    spec: NetworkSpec,
    links: Links,
    l: int,
    d: jax.Array,
    behind: jax.Array,
    unit: jax.Array | float,
) -> jax.Array:
    """Who wins in the windows of a max pool, in units of the displacement `d` below it."""
    return ops.windows_of(_convolve(spec, links, l, d)) + behind / unit


def working_phi(spec: NetworkSpec, links: Links, x: jax.Array, packed: State) -> jax.Array:
    """`phi` of a packed state: the one place where Phi is written."""
    total = jnp.zeros((), packed[-1].dtype)
    for l, s in enumerate(packed):
        below = input_drive(spec, links, x) if l == 0 else drive(spec, links, l, packed[l - 1])
        total = total + jnp.sum((below + links.biases[l]) * s) / spec.weight_of(l)
    return total


def phi(params: Params, spec: NetworkSpec, x: jax.Array, state: State) -> jax.Array:
    """The primitive function ``Phi = sum_l alpha^(l - L) <A_l(s_{l-1}), s_l>`` of one example.

    Args:
        params: parameters of `spec`.
        spec: the network.
        x: one input, of shape ``spec.input_shape``.
        state: tuple over layers of arrays ``[H, W, C]`` or ``[N]``.

    Returns:
        A scalar.

    Example:
        >>> spec = NetworkSpec((2,), (Dense(2),))
        >>> params = ({"w": jnp.eye(2), "b": jnp.zeros(2)},)
        >>> float(phi(params, spec, jnp.array([1.0, 2.0]), (jnp.array([3.0, 4.0]),)))
        11.0
    """
    check_example(spec, params, x, state)
    return working_phi(spec, link(params, spec), x, pack(spec, state))


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
