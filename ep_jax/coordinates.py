"""What relaxes in a phase: the state, or the displacement of a nudged state.

The nudged phase exists in two coordinates with one fixed point. In *absolute* coordinates the state
itself relaxes under the nudge ``-beta dC/ds_L``. In *displacement* coordinates its displacement
relaxes, in units in which it is of order one in every layer::

    s_l = s0_l + beta_l D_l,   beta_l = beta alpha^(L - l)
    J_l = alpha A'_l(D_{l-1}) + A_{l+1}^T(D_{l+1}),   J_L = alpha A'_L(D_{L-1}) - dC/ds_L
    (and alpha^(m - l) A'_e(D_l), A_e^T(D_m) of a skip from l to m)
    D_l = [sigma(I0_l + beta_l J_l) - sigma(I0_l)] / beta_l

with ``I0`` the currents of the free state, ``s0 = sigma(I0)`` and ``A'`` the drive without bias.
Where the maps between layers are affine this is exact at any beta; no small difference of large
numbers is formed, so it is exact in any precision. (So is a max pool's, `ep_jax.pools`; a map that
is not linear and knows no better loses digits.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ep_jax import network
from ep_jax.network import NetworkSpec, Prepared, State
from ep_jax.neurons import relax, relax_displacement
from ep_jax.phases import Update, all_hear_all


class Swept(NamedTuple):
    """One synchronous sweep of rate neurons, packed: the map whose fixed point a network seeks.

    Attributes:
        state: what the layers would become, ``F(s)``.
        currents: what they receive, with input, bias and nudge.
    """

    state: State
    currents: State


class Nudge(NamedTuple):
    """What pulls at the last layer: ``-beta`` times a gradient.

    Attributes:
        beta: nudging strength.
        gradient: ``dC/ds_L`` as a function of the last layer's state.
    """

    beta: jax.Array | float
    gradient: Callable[[jax.Array], jax.Array]

    def size(self, last: jax.Array) -> jax.Array:
        """``max |dC/ds_L|`` at a free state: the size of a displacement, in its own units.

        Spiking neurons scale the quantum of a nudged phase by it, so that what is learned from an
        example is coded as finely where its error is small as where it is large.
        """
        size = jnp.max(jnp.abs(self.gradient(last)))
        return jnp.maximum(size, jnp.finfo(size.dtype).eps)  # what is below rounding is no error


class Coordinates(Protocol):
    """What relaxes in a phase, of one example, packed: the state, or a displacement.

    Attributes:
        nudged: whether it is a nudged phase.
        displaced: whether the state is a displacement.
        from_zero: whether it starts from signals of zero.
        start: the packed state that the phase starts from.
        start_currents: what the layers receive there from each other.
        units: scale of the state in each layer, see `ep_jax.neurons.Clock`.
        scales: what a unit of the state of each layer is in units of activity.
        error: the output's error, see `ep_jax.neurons.Clock`.
    """

    nudged: bool
    displaced: bool
    from_zero: bool
    start: State
    start_currents: State
    units: tuple[jax.Array | float, ...]
    scales: tuple[jax.Array | float, ...]
    error: jax.Array | float

    def current(self, turn: Update, signals: State) -> jax.Array:
        """What a layer receives from its neighbours' `signals`."""
        ...

    def relax(
        self, l: int, s: jax.Array, current: jax.Array, epsilon: jax.Array | float
    ) -> jax.Array:
        """The damped step of layer ``l`` from `s` under a `current`."""
        ...

    def swept(self, state: State) -> Swept:
        """One synchronous sweep of rate neurons from `state`."""
        ...

    def moved(self, state: State) -> State:
        """What residuals are relative to."""
        ...


class Absolute:
    """The state itself: of the free phase, or (with a `nudge`) of a nudged one.

    Args:
        spec: the network.
        prepared: its parameters.
        drives: what the input says to each layer.
        start: the state to start from; zero by default.
        nudge: that of a nudged phase.
    """

    displaced = False
    units: tuple[jax.Array | float, ...]
    scales: tuple[jax.Array | float, ...]
    error: jax.Array | float

    def __init__(
        self,
        spec: NetworkSpec,
        prepared: Prepared,
        drives: tuple[jax.Array | None, ...],
        start: State | None = None,
        nudge: Nudge | None = None,
    ) -> None:
        self._spec, self._prepared, self._nudge = spec, prepared, nudge
        self._external = network.external(prepared, drives)
        self.nudged, self.from_zero = nudge is not None, start is None
        self.units = self.scales = (1.0,) * spec.depth
        self.error = 1.0
        if start is None:
            start = tuple(map(jnp.zeros_like, self._external))
            self.start_currents = start
        else:
            self.start_currents = network.currents(spec, prepared, start)
        self.start = start
        if nudge is not None:
            self.units = tuple(abs(nudge.beta) * spec.weight_of(l) for l in range(spec.depth))
            self.error = nudge.size(start[-1])

    def current(self, turn: Update, signals: State) -> jax.Array:
        """See `Coordinates`."""
        spec, prepared, l = self._spec, self._prepared, turn.layer
        total = jnp.zeros_like(signals[l])
        for edge in turn.below:
            total = total + network.drive(spec, prepared, edge, signals[edge.source])
        for edge in turn.above:
            above = network.pull(spec, prepared, edge, signals[l], signals[edge.target])
            total = total + spec.attenuation(edge) * above
        return total

    def _total(self, l: int, s: jax.Array, current: jax.Array) -> jax.Array:
        total = current + self._external[l]
        if self._nudge is not None and l == self._spec.depth - 1:
            total = total - self._nudge.beta * self._nudge.gradient(s)
        return total

    def relax(
        self, l: int, s: jax.Array, current: jax.Array, epsilon: jax.Array | float
    ) -> jax.Array:
        """See `Coordinates`."""
        return relax(self._spec.activation(l), s, self._total(l, s, current), epsilon)

    def swept(self, state: State) -> Swept:
        """See `Coordinates`."""
        spec = self._spec
        heard = network.currents(spec, self._prepared, state)
        currents = tuple(
            self._total(l, s, i) for l, (s, i) in enumerate(zip(state, heard, strict=True))
        )
        return Swept(tuple(spec.activation(l).apply(i) for l, i in enumerate(currents)), currents)

    def moved(self, state: State) -> State:
        """See `Coordinates`."""
        return tuple(map(jnp.subtract, state, self.start)) if self.nudged else state


class Base(NamedTuple):
    """What a displacement starts from, packed: the free state ``s0`` and its currents ``I0``.

    Attributes:
        state: ``s0 = sigma(I0)``: one synchronous sweep of rate neurons, the map whose fixed point
            the network relaxes to.
        currents: ``I0``, with input and bias.
        contexts: see `ep_jax.network.context`, of each edge; ``None`` where it is linear.
    """

    state: State
    currents: State
    contexts: tuple[Any, ...]


def base_of(spec: NetworkSpec, prepared: Prepared, swept: Swept) -> Base:
    """The base of a displacement from a free state, given the sweep from that state."""
    contexts = tuple(
        None if edge.source < 0 else network.context(spec, prepared, edge, swept.state[edge.source])
        for edge in spec.edges
    )
    return Base(swept.state, swept.currents, contexts)


class Displacement:
    """The displacement ``D`` of a nudged phase.

    Args:
        spec: the network.
        prepared: its parameters.
        base: what is displaced.
        nudge: what displaces it.
    """

    nudged, displaced, from_zero = True, True, True
    units: tuple[jax.Array | float, ...]
    scales: tuple[jax.Array | float, ...]
    error: jax.Array | float

    def __init__(self, spec: NetworkSpec, prepared: Prepared, base: Base, nudge: Nudge) -> None:
        self._spec, self._prepared, self._base, self._nudge = spec, prepared, base, nudge
        self.scales = displacement_units(spec, nudge.beta, base.state[-1].dtype)
        self.start = self.start_currents = tuple(map(jnp.zeros_like, base.state))
        self.units = (1.0,) * spec.depth
        self.error = nudge.size(base.state[-1])

    def current(self, turn: Update, signals: State) -> jax.Array:
        """See `Coordinates`."""
        spec, prepared, base, l = self._spec, self._prepared, self._base, turn.layer
        total = jnp.zeros_like(signals[l])
        for edge in turn.below:
            context, unit = base.contexts[edge.number], self.scales[edge.source]
            d = signals[edge.source]
            moved = network.drive_difference(spec, prepared, edge, d, context, unit)
            total = total + spec.attenuation(edge) * moved
        for edge in turn.above:
            total = total + network.pull_difference(
                spec,
                prepared,
                edge,
                signals[l],
                (signals[edge.target], base.state[edge.target]),
                base.contexts[edge.number],
                (self.scales[l], self.scales[edge.target]),
            )
        return total

    def _total(self, l: int, d: jax.Array, current: jax.Array) -> jax.Array:
        if l == self._spec.depth - 1:
            output = self._base.state[l] + self._nudge.beta * d
            current = current - self._nudge.gradient(output)
        return current

    def relax(
        self, l: int, s: jax.Array, current: jax.Array, epsilon: jax.Array | float
    ) -> jax.Array:
        """See `Coordinates`."""
        return self._step(l, s, self._total(l, s, current), epsilon)

    def _step(
        self, l: int, d: jax.Array, total: jax.Array, epsilon: jax.Array | float
    ) -> jax.Array:
        # Tied to what changes, so that XLA makes what sigma needs of the base anew in each sweep:
        # that is cheaper than keeping it.
        total, base_current = jax.lax.optimization_barrier((total, self._base.currents[l]))
        activation = self._spec.activation(l)
        return relax_displacement(activation, base_current, d, total, self.scales[l], epsilon)

    def swept(self, state: State) -> Swept:
        """See `Coordinates`."""
        depth = self._spec.depth
        currents = tuple(
            self._total(turn.layer, d, self.current(turn, state))
            for turn, d in zip(all_hear_all(self._spec), state, strict=True)
        )
        new = tuple(self._step(l, state[l], currents[l], 1.0) for l in range(depth))
        return Swept(new, currents)

    def moved(self, state: State) -> State:
        """See `Coordinates`."""
        return state


def displacement_units(
    spec: NetworkSpec, beta: jax.Array | float, dtype: Any
) -> tuple[jax.Array | float, ...]:
    """``beta_l = beta alpha^(L - l)`` of each layer, with a power of at least a unit of rounding.

    So small a displacement stays on its unit's branch of ``sigma`` whatever its size is, since the
    currents that decide the branch are rounded as well: nothing is lost, and nothing underflows.
    """
    rounding = float(jnp.finfo(dtype).eps)
    return tuple(beta * max(spec.weight_of(l), rounding) for l in range(spec.depth))


def displaced_state(spec: NetworkSpec, base: Base, d: State, beta: jax.Array | float) -> State:
    """``s_l = s0_l + beta alpha^(L - l) D_l``."""
    return tuple(
        s + beta * spec.weight_of(l) * v for l, (s, v) in enumerate(zip(base.state, d, strict=True))
    )
