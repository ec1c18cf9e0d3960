"""The phases: relaxation of the state, free and nudged, one ``lax.scan`` each.

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

Whether a phase has settled, only the map tells whose fixed point it seeks: a code that has stopped
to send looks at rest wherever it is. So at the end of each phase one sweep ``F`` of rate neurons is
computed from the read-out ``s``, and the residual is ``|F(s) - s|``, relative, in each layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from ep_jax import network
from ep_jax.checks import check_float_array
from ep_jax.network import NetworkSpec, Params, Prepared, State
from ep_jax.neurons import Clock, relax, relax_displacement
from ep_jax.phases import (
    Phases,
    Update,
    all_hear_all,
    check_beta,
    check_nudge,
    check_phases,
    plan,
)

MOVING = 1e-3
"""A unit counts as moving when a sweep changes it by more than this."""
UNSETTLED = 1e-2
"""An example counts as unsettled when its relative residual is larger than this."""
FAR = {"free": 0.1, "nudged": 0.3}
"""A phase is far from settled whose relative residual, the mean of a batch, is above this.

A gradient that is off by a relative .3 is still at a cosine of .95 with the exact one, and it is
linear in the displacement. The free state decides the answer, and its error enters all of it.
"""
CHECK = 4
"""A phase with a tolerance looks at its residual every so many sweeps."""


class Snapshot(NamedTuple):
    """What a `trace` function sees after each sweep, in logical layout.

    Attributes:
        step: 0-based number of the sweep.
        state: tuple over layers of the analog states (in displacement coordinates: of ``D``).
        spikes: tuple over layers of the spikes emitted in this sweep; zeros for rate neurons.
        signals: tuple over layers of what goes through the weights.
        residual: ``|s_{t+1} - s_t|`` of this sweep, over all layers. A code that has stopped to
            send has none, wherever it is: what tells of the fixed point is `PhaseInfo.residual`.
    """

    step: jax.Array
    state: State
    spikes: State
    signals: State
    residual: jax.Array


Trace: TypeAlias = Callable[[Snapshot], Any]


class PhaseInfo(NamedTuple):
    """What a phase tells about itself.

    In `ep_jax.GradientInfo` it speaks of a batch: `residual` and `residuals` are the largest of its
    examples, everything else is their mean.

    Attributes:
        residual: the largest of `residuals`.
        residuals: tuple over layers of ``|F(s) - s| / |s|``: how far one sweep of rate neurons
            would move the read-out. In a nudged phase it is relative to what the nudge has moved:
            ``|G(D) - D| / |D|`` in displacement coordinates, with ``G`` one sweep of the rate
            displacement, ``|F(s) - s| / |s - s_free|`` in absolute ones. 1 where ``s`` is zero and
            ``F(s)`` is not.
        mean_residual: the mean of `residual` over a batch.
        unsettled: share of a batch whose `residual` is above `UNSETTLED`.
        sweeps: sweeps taken.
        moving: fraction of units that the last sweep changed by more than `MOVING`.
        spikes: tuple over layers of the spikes per neuron in the whole phase (0 for rate neurons).
        activity: tuple over layers of the mean ``|s|`` at the end (displacement coordinates:
            ``|D|``). Near 0 a layer is dead, at 1 a hard sigmoid is saturated; it is not finite
            where the state is not.
        trace: what the `trace` function returned, stacked over sweeps; ``None`` without one.
    """

    residual: jax.Array
    residuals: tuple[jax.Array, ...]
    mean_residual: jax.Array
    unsettled: jax.Array
    sweeps: jax.Array
    moving: jax.Array
    spikes: tuple[jax.Array, ...]
    activity: tuple[jax.Array, ...]
    trace: Any = None


# What relaxes.


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


# How it relaxes.


class Carry(NamedTuple):
    """All that a phase keeps from sweep to sweep.

    Attributes:
        t: number of sweeps done, int32. As a scanned input it would take memory for each sweep.
        states: a state of the neuron model for each layer.
        moving: see `PhaseInfo`; measured in the last sweep alone, where it is known which that is.
        spikes: spikes per neuron up to now, for each layer.
    """

    t: jax.Array
    states: list[Any]
    moving: jax.Array
    spikes: list[jax.Array]


Sweep: TypeAlias = Callable[[Carry, None], tuple[Carry, Any]]
"""``(carry, None) -> (carry, what the trace saw)``."""


class Sweeps(NamedTuple):
    """A phase that has not run yet.

    Attributes:
        carry: what it starts from.
        opening: its first sweeps, which leave out the products that are zero (`plan`).
        sweep: any other sweep; it may stand for those of the opening, too.
        length: number of its sweeps.
    """

    carry: Carry
    opening: tuple[Sweep, ...]
    sweep: Sweep
    length: int

    def run(self) -> tuple[Carry, Any]:
        """All sweeps; those after the opening in one scan that keeps its carry and nothing else."""
        carry, seen = self.carry, []
        opening = self.opening[: self.length]
        for sweep in opening:
            carry, now = sweep(carry, None)
            seen.append(jax.tree.map(lambda a: a[None], now))
        carry, rest = jax.lax.scan(self.sweep, carry, length=self.length - len(opening))
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen, rest)

    def run_until(self, settled: Callable[[Carry], jax.Array]) -> Carry:
        """Sweeps until `settled`, which is asked every `CHECK` sweeps."""
        first = self.length % CHECK or min(CHECK, self.length)
        carry, _ = self._replace(length=first).run()

        def some(carry: Carry) -> Carry:
            return jax.lax.scan(self.sweep, carry, length=CHECK)[0]

        start = self.carry.t
        return jax.lax.while_loop(
            lambda carry: (carry.t - start < self.length) & ~settled(carry), some, carry
        )


def sweeps_of(
    spec: NetworkSpec,
    phases: Phases,
    coordinates: Coordinates,
    key: jax.Array | None,
    trace: Trace | None = None,
    resumed: Carry | None = None,
) -> Sweeps:
    """A phase of any kind, not run.

    Args:
        spec: the network.
        phases: its phases.
        coordinates: what relaxes.
        key: random key of a stochastic neuron.
        trace: see `free_phase`.
        resumed: go on from here, as a straggler; its key is the first sweeps'.
    """
    neuron, depth, nudged = spec.neuron, spec.depth, coordinates.nudged
    done, length = 0, phases.sweeps(nudged)
    if resumed is not None:
        done, length = length, phases.more(nudged)
    last, known = done + length - 1, phases.tolerance is None
    *opening, full = plan(spec, phases, nudged, coordinates.from_zero)
    in_place = phases.sweep != "synchronous"
    neighbours = [set[int]() for _ in range(depth)]
    for edge in spec.links:
        neighbours[edge.source].add(edge.target)
        neighbours[edge.target].add(edge.source)
    sizes = [s.size for s in coordinates.start]
    zero = jnp.zeros((), coordinates.start[-1].real.dtype)
    rounded = nudged and phases.nudged_signals == "bfloat16"

    def signal(state: Any) -> jax.Array:
        sent = neuron.signal(state)
        return jax.lax.reduce_precision(sent, 8, 7) if rounded else sent

    def update(turn: Update, state: Any, heard: State, t: jax.Array, fresh: bool) -> Any:
        """One layer's turn: its new state, and its spikes."""
        l = turn.layer

        def step(s: jax.Array, current: jax.Array, epsilon: jax.Array | float) -> jax.Array:
            return coordinates.relax(l, s, current, phases.relaxation * epsilon)

        # The barrier makes the current once; without it XLA repeats the adjoint's sums wherever
        # the neuron model reads it.
        incoming = jax.lax.optimization_barrier(coordinates.current(turn, heard))
        clock = Clock(
            step=t,
            steps=done + length,
            before=phases.sweeps(False) + phases.more(False) if nudged else 0,
            layer=l + 1,
            unit=coordinates.units[l],
            error=coordinates.error,
            fresh=fresh,
            nudged=nudged,
            displaced=coordinates.displaced,
        )
        dice = None if key is None else jax.random.fold_in(jax.random.fold_in(key, t), l)
        return neuron.step(state, incoming, step, clock, dice)

    def sweep(
        updates: tuple[Update, ...], number: int | None, carry: Carry, _: None
    ) -> tuple[Carry, Any]:
        """One sweep; its `number` where it is known before the program runs."""
        before = list(map(signal, carry.states))
        new, latest, spikes = list(carry.states), list(before), [zero] * depth
        updated: set[int] = set()
        for turn in updates:
            l = turn.layer
            fresh = in_place and bool(updated & neighbours[l])
            heard = tuple(latest if in_place else before)
            new[l], sent = update(turn, carry.states[l], heard, carry.t, fresh)
            latest[l] = signal(new[l])
            updated.add(l)
            if sent is not None:  # only looked at, so it costs no memory in reverse mode
                spikes[l] = jax.lax.stop_gradient(sent)
        counts = [
            n + jnp.sum(jnp.abs(q)) / z for n, q, z in zip(carry.spikes, spikes, sizes, strict=True)
        ]
        # What is only looked at costs no memory in reverse mode.
        old, now = jax.lax.stop_gradient((carry.states, new))

        def changes() -> list[jax.Array]:
            return [jnp.abs(b.s - a.s) for a, b in zip(old, now, strict=True)]

        def moved() -> jax.Array:  # made where it is asked for, not in every sweep
            return _moving(changes())

        if number is None and known:
            moving = jax.lax.cond(carry.t == last, moved, lambda: zero)
        else:
            moving = moved() if number == last or not known else zero
        seen = None
        if trace is not None:
            squares = [
                jnp.sum((jnp.abs(u) * c) ** 2)
                for u, c in zip(coordinates.scales, changes(), strict=True)
            ]
            emitted = map(jnp.broadcast_to, spikes, [s.shape for s in coordinates.start])
            seen = trace(
                Snapshot(
                    step=carry.t,
                    state=network.unpack(spec, tuple(state.s for state in new)),
                    spikes=network.unpack(spec, tuple(emitted)),
                    signals=network.unpack(spec, tuple(map(signal, new))),
                    residual=jnp.sqrt(functools.reduce(jnp.add, squares)),
                )
            )
        return Carry(carry.t + 1, new, moving, counts), seen

    if resumed is not None:
        if known:  # the same for all stragglers: no array of numbers
            resumed = resumed._replace(t=jnp.asarray(done, jnp.int32))
        return Sweeps(resumed, (), functools.partial(sweep, full, None), length)
    states = list(map(neuron.start, coordinates.start, coordinates.start_currents))
    return Sweeps(
        Carry(jnp.zeros((), jnp.int32), states, zero, [zero] * depth),
        tuple(functools.partial(sweep, updates, t) for t, updates in enumerate(opening)),
        functools.partial(sweep, full, None),
        length,
    )


def _moving(changes: list[jax.Array]) -> jax.Array:
    """Fraction of the units that changed by more than `MOVING`."""
    counts = [jnp.sum(change > MOVING, dtype=change.dtype) for change in changes]
    return functools.reduce(jnp.add, counts) / sum(change.size for change in changes)


def residuals(
    coordinates: Coordinates, state: State, swept: Swept | None = None
) -> tuple[jax.Array, ...]:
    """Relative residual of each layer at a read-out; see `PhaseInfo`. No derivative flows."""
    state = jax.lax.stop_gradient(state)
    swept = jax.lax.stop_gradient(coordinates.swept(state) if swept is None else swept)

    changes = map(jnp.subtract, swept.state, state)
    return tuple(map(relative_size, changes, coordinates.moved(state)))


def relative_size(change: jax.Array, of: jax.Array) -> jax.Array:
    """``|change| / |of|``; 1 where `of` is zero and the change is not."""
    apart, size = _norm(change), _norm(of)
    return jnp.where(size > 0, apart / jnp.where(size > 0, size, 1), jnp.sign(apart))


def _norm(values: jax.Array) -> jax.Array:
    """The Euclidean norm, without underflow of the squares."""
    size = jnp.max(jnp.abs(values))
    scaled = jnp.abs(values) / jnp.where(size > 0, size, 1)
    return size * jnp.sqrt(jnp.sum(scaled**2))


def largest(values: tuple[jax.Array, ...]) -> jax.Array:
    """The largest of some scalars; not a number where one of them is none."""
    return functools.reduce(jnp.maximum, values)


class Settled(NamedTuple):
    """How a phase ended, in working form.

    Attributes:
        carry: what it could go on from.
        state: the packed read-out.
        swept: one more sweep of rate neurons from there.
        info: its `PhaseInfo`.
    """

    carry: Carry
    state: State
    swept: Swept
    info: PhaseInfo


def settle(
    spec: NetworkSpec,
    phases: Phases,
    coordinates: Coordinates,
    key: jax.Array | None,
    trace: Trace | None = None,
    resumed: Carry | None = None,
) -> Settled:
    """Run a phase of one example; the arguments are those of `sweeps_of`."""
    phase = sweeps_of(spec, phases, coordinates, key, trace, resumed)
    if phases.tolerance is None or trace is not None:
        return conclude(spec, coordinates, *phase.run())
    tolerance = phases.tolerance

    def settled(carry: Carry) -> jax.Array:
        readout = tuple(map(spec.neuron.readout, carry.states))
        return largest(residuals(coordinates, readout)) < tolerance

    return conclude(spec, coordinates, phase.run_until(settled))


def conclude(
    spec: NetworkSpec, coordinates: Coordinates, carry: Carry, trace: Any = None
) -> Settled:
    """How a phase ended that ended with `carry`."""
    state = tuple(map(spec.neuron.readout, carry.states))
    swept = coordinates.swept(state)
    found = residuals(coordinates, state, swept)
    spikes = tuple(carry.spikes)
    info = info_of(found, carry.t, carry.moving, spikes, mean_size(state), trace)
    return Settled(carry, state, swept, info)


def info_of(
    found: tuple[jax.Array, ...],
    sweeps: jax.Array,
    moving: jax.Array,
    spikes: tuple[jax.Array, ...],
    activity: tuple[jax.Array, ...],
    trace: Any = None,
) -> PhaseInfo:
    """The `PhaseInfo` of one example with the residuals `found`."""
    worst = largest(found)
    return PhaseInfo(
        residual=worst,
        residuals=found,
        mean_residual=worst,
        unsettled=(worst > UNSETTLED).astype(worst.dtype),
        sweeps=sweeps.astype(worst.dtype),
        moving=moving,
        spikes=spikes,
        activity=activity,
        trace=trace,
    )


def mean_size(state: State) -> tuple[jax.Array, ...]:
    """Mean ``|s|`` of each layer, only to be looked at: no derivative flows through it."""
    return tuple(jnp.mean(jnp.abs(s)) for s in jax.lax.stop_gradient(state))


def settle_batch(
    spec: NetworkSpec,
    phases: Phases,
    nudged: bool,
    coordinates_of: Callable[..., Coordinates],
    examples: tuple[Any, ...],
    keys: jax.Array | None,
) -> Settled:
    """Run a phase of a batch. Its stragglers, the examples of the largest residual, go on.

    They are gathered into a smaller batch and scattered back, so all shapes are static.

    Args:
        spec: the network.
        phases: its phases.
        nudged: whether it is the nudged phase.
        coordinates_of: what relaxes, from the data of one example.
        examples: these data, arrays ``[B, ...]``.
        keys: a key for each example of stochastic neurons.
    """

    def first(key: jax.Array | None, *data: Any) -> Settled:
        return settle(spec, phases, coordinates_of(*data), key)

    found = jax.vmap(first)(keys, *examples)
    batch = len(found.info.residual)
    if not phases.stragglers or not phases.more(nudged):
        return found
    _, slow = jax.lax.top_k(found.info.residual, phases.straggling(batch))

    def on(key: jax.Array | None, carry: Carry, *data: Any) -> Settled:
        return settle(spec, phases, coordinates_of(*data), key, resumed=carry)

    chosen = jax.tree.map(lambda a: a[slow], (keys, found.carry, *examples))
    return jax.tree.map(lambda all_, some: all_.at[slow].set(some), found, jax.vmap(on)(*chosen))


def mean_info(info: PhaseInfo) -> PhaseInfo:
    """The `PhaseInfo` of a batch from those of its examples: see there."""
    mean = jax.tree.map(jnp.mean, info)
    return mean._replace(
        residual=jnp.max(info.residual), residuals=tuple(map(jnp.max, info.residuals))
    )


# The phases of one example.


def free_phase(
    params: Params,
    spec: NetworkSpec,
    x: jax.Array,
    phases: Phases,
    key: jax.Array | None = None,
    trace: Trace | None = None,
    start: State | None = None,
) -> tuple[State, PhaseInfo]:
    """Relax the network freely (``beta = 0``), from zero state unless `start` is given.

    Args:
        params: parameters of `spec`.
        spec: the network.
        x: one input, floating point, of shape ``spec.input_shape``.
        phases: ``phases.free`` sweeps of the kind ``phases.sweep``. One example has no stragglers.
        key: random key; stochastic neurons need one.
        trace: called with a `Snapshot` after each sweep; what it returns is stacked over sweeps in
            ``info.trace``. Nothing is stored per sweep without it. A traced phase makes all sweeps,
            whatever ``phases.tolerance`` is.
        start: state to start from; spiking neurons start with receivers that know it.

    Returns:
        The state, a tuple over layers of arrays ``[H, W, C]`` or ``[N]`` (for spiking neurons the
        read-out of the analog states), and a `PhaseInfo`.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or value.

    Example:
        >>> spec = NetworkSpec((2,), (ep_jax.Dense(2),), neuron=ep_jax.Rate())
        >>> params = ({"w": jnp.eye(2), "b": jnp.zeros(2)},)
        >>> state, info = free_phase(params, spec, jnp.array([0.5, 0.25]), Phases(free=3))
        >>> [float(s) for s in state[-1]]
        [0.5, 0.25]
    """
    network.check_example(spec, params, x, start)
    check_phases(spec, phases, key)
    prepared = network.prepare(params, spec)
    drives = network.input_drive(spec, prepared, x)
    packed = None if start is None else network.pack(spec, tuple(start))
    found = settle(spec, phases, Absolute(spec, prepared, drives, packed), key, trace)
    return network.unpack(spec, found.state), found.info


def nudged_phase(
    params: Params,
    spec: NetworkSpec,
    x: jax.Array,
    y: jax.Array | int,
    state: State,
    beta: jax.Array | float,
    phases: Phases,
    key: jax.Array | None = None,
    trace: Trace | None = None,
) -> tuple[State, PhaseInfo]:
    """Relax the network nudged by ``-beta dC/ds_L``, from the free `state`.

    Spiking neurons start with receivers that know `state`, so the phases at plus and minus beta
    start alike; give both the same `key`.

    Args:
        params: parameters of `spec`.
        spec: the network.
        x: one input, floating point, of shape ``spec.input_shape``.
        y: its target: an integer label, or an array of the answer's shape.
        state: the free state, from `free_phase`.
        beta: nudging strength, not 0; it may be traced.
        phases: ``phases.nudged`` sweeps of the kind ``phases.sweep`` in ``phases.coordinates``. One
            example has no stragglers.
        key: random key; stochastic neurons need one.
        trace: as for `free_phase`.

    Returns:
        The nudged state (in either coordinates) and a `PhaseInfo`.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or value.

    Example:
        >>> spec = NetworkSpec((2,), (ep_jax.Dense(2),), neuron=ep_jax.Rate())
        >>> params = ({"w": jnp.eye(2), "b": jnp.zeros(2)},)
        >>> x, free = jnp.array([0.5, 0.0]), (jnp.array([0.5, 0.0]),)
        >>> state, info = nudged_phase(params, spec, x, 0, free, 0.5, Phases(nudged=40))
        >>> [round(float(s), 4) for s in state[-1]]
        [0.6667, 0.0]
    """
    network.check_example(spec, params, x, state)
    check_phases(spec, phases, key)
    check_beta("beta", beta)
    x = network.as_precise_as(jax.tree.leaves(params)[0], x)
    check_nudge(spec, phases, beta, x.dtype)
    target = network.targets(spec, y, x.dtype)
    prepared = network.prepare(params, spec)
    drives = network.input_drive(spec, prepared, x)
    packed = network.pack(spec, tuple(state))
    nudge = Nudge(beta, lambda s: network.cost_gradient(spec, prepared, s, target))
    if phases.coordinates == "absolute":
        coordinates = Absolute(spec, prepared, drives, packed, nudge)
        found = settle(spec, phases, coordinates, key, trace)
        return network.unpack(spec, found.state), found.info
    base = base_of(spec, prepared, Absolute(spec, prepared, drives, packed).swept(packed))
    found = settle(spec, phases, Displacement(spec, prepared, base, nudge), key, trace)
    return network.unpack(spec, displaced_state(spec, base, found.state, beta)), found.info


def displaced_state(spec: NetworkSpec, base: Base, d: State, beta: jax.Array | float) -> State:
    """``s_l = s0_l + beta alpha^(L - l) D_l``."""
    return tuple(
        s + beta * spec.weight_of(l) * v for l, (s, v) in enumerate(zip(base.state, d, strict=True))
    )


def check_inputs(spec: NetworkSpec, xs: jax.Array) -> None:
    """Raise where a batch of inputs does not fit `spec`."""
    check_float_array("xs", xs, ("batch", *spec.input_shape))
    if not len(xs):
        raise ValueError("xs holds no example; expected at least one")
