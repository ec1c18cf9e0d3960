"""The sweeps of a phase: which layer hears whom, and when.

A phase is a ``Relaxation``: of a neuron model in each layer, in some `ep_jax.coordinates`, in the
order of `ep_jax.phases`. Its sweeps run in one ``lax.scan`` that keeps its carry and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from ep_jax import network
from ep_jax.coordinates import Coordinates
from ep_jax.network import NetworkSpec, State
from ep_jax.neurons import Clock
from ep_jax.phases import Phases, Update, plan

MOVING = 1e-3
"""A unit counts as moving when a sweep changes it by more than this."""
CHECK = 4
"""A phase with a tolerance looks at its residual every so many sweeps."""


class Snapshot(NamedTuple):
    """What a `trace` function sees after each sweep, in logical layout.

    Attributes:
        step: 0-based number of the sweep.
        state: tuple over layers of the analog states (in displacement coordinates: of ``D``).
        spikes: tuple over layers of the spikes emitted in this sweep; zeros for rate neurons.
        signals: tuple over layers of what goes through the weights.
        change: ``|s_{t+1} - s_t|`` of this sweep, over all layers. A code that has stopped to send
            has none, wherever it is: what tells of the fixed point is `PhaseInfo.residual`.
    """

    step: jax.Array
    state: State
    spikes: State
    signals: State
    change: jax.Array


Trace: TypeAlias = Callable[[Snapshot], Any]


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


def _arrays(seen: Any) -> Any:
    """What a trace returned, to be stacked."""
    try:
        return jax.tree.map(jnp.asarray, seen)
    except TypeError as error:
        raise TypeError(f"trace returned {seen!r}; expected arrays or numbers, in any "
                        "pytree") from error  # fmt: skip


class Relaxation:
    """The sweeps of one phase of one example.

    Args:
        spec: the network.
        phases: its phases.
        coordinates: what relaxes.
        key: random key of a stochastic neuron.
        trace: see `ep_jax.free_phase`.
        straggling: whether these are the further sweeps of a straggler; its key is the first ones'.

    Attributes:
        length: number of its sweeps.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        phases: Phases,
        coordinates: Coordinates,
        key: jax.Array | None = None,
        trace: Trace | None = None,
        *,
        straggling: bool = False,
    ) -> None:
        self._spec, self._phases, self._coordinates = spec, phases, coordinates
        self._key, self._trace = key, trace
        nudged = coordinates.nudged
        self._done = phases.sweeps(nudged) if straggling else 0
        self.length = phases.more(nudged) if straggling else phases.sweeps(nudged)
        *opening, self._updates = plan(spec, phases, nudged, coordinates.from_zero)
        self._opening = [] if straggling else opening
        self._in_place = phases.sweep != "synchronous"
        self._rounded = nudged and phases.nudged_signals == "bfloat16"
        self._neighbours = [set[int]() for _ in range(spec.depth)]
        for edge in spec.links:
            self._neighbours[edge.source].add(edge.target)
            self._neighbours[edge.target].add(edge.source)

    def start(self) -> Carry:
        """Before the first sweep."""
        coordinates = self._coordinates
        zero = jnp.zeros((), coordinates.start[-1].real.dtype)
        states = map(self._spec.neuron.start, coordinates.start, coordinates.start_currents)
        return Carry(jnp.zeros((), jnp.int32), list(states), zero, [zero] * self._spec.depth)

    def run(self, sweeps: int | None = None, carry: Carry | None = None) -> tuple[Carry, Any]:
        """So many sweeps, by default all: from the start, or on from a `carry`.

        Returns:
            The carry after them, and what the trace saw, stacked.
        """
        sweeps = self.length if sweeps is None else sweeps
        # The first sweeps leave out the products that are zero (`plan`).
        opening = self._opening[:sweeps] if carry is None else []
        carry = self.start() if carry is None else carry
        seen = []
        for number, updates in enumerate(opening):
            carry, now = self._sweep(carry, updates, number)
            seen.append(jax.tree.map(lambda a: a[None], now))
        if sweeps > len(opening):
            carry, rest = jax.lax.scan(
                lambda carry, _: self._sweep(carry, self._updates),
                carry,
                length=sweeps - len(opening),
            )
            seen.append(rest)
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen) if seen else None

    def run_until(self, settled: Callable[[Carry], jax.Array], carry: Carry | None = None) -> Carry:
        """Sweeps until `settled`, which is asked every `CHECK` sweeps, and at most all."""
        start = self.start().t if carry is None else carry.t
        carry, _ = self.run(self.length % CHECK or min(CHECK, self.length), carry)
        return jax.lax.while_loop(
            lambda carry: (carry.t - start < self.length) & ~settled(carry),
            lambda carry: self.run(CHECK, carry)[0],
            carry,
        )

    def _sweep(
        self, carry: Carry, updates: tuple[Update, ...], number: int | None = None
    ) -> tuple[Carry, Any]:
        """All updates; the `number` of the sweep where it is known before the program runs."""
        before = list(map(self._signal, carry.states))
        states, latest = list(carry.states), list(before)
        spikes = [jnp.zeros_like(carry.moving)] * self._spec.depth
        updated: set[int] = set()
        for update in updates:
            l = update.layer
            clock = self._clock(carry.t, l, self._in_place and bool(updated & self._neighbours[l]))
            heard = tuple(latest if self._in_place else before)
            states[l], sent = self._updated(update, carry.states[l], heard, clock)
            latest[l] = self._signal(states[l])
            updated.add(l)
            if sent is not None:
                spikes[l] = jax.lax.stop_gradient(sent)
        # What is only looked at costs no memory in reverse mode.
        old, new = jax.lax.stop_gradient((carry.states, states))
        counts = [
            n + jnp.sum(jnp.abs(q)) / s.size
            for n, q, s in zip(carry.spikes, spikes, self._coordinates.start, strict=True)
        ]
        moving = self._moving(carry.t, old, new, number)
        seen = None
        if self._trace is not None:
            seen = _arrays(self._trace(self._seen(carry.t, old, new, spikes)))
        return Carry(carry.t + 1, states, moving, counts), seen

    def _signal(self, state: Any) -> jax.Array:
        """What the others hear of a layer."""
        sent = self._spec.neuron.signal(state)
        return jax.lax.reduce_precision(sent, 8, 7) if self._rounded else sent

    def _updated(
        self, update: Update, state: Any, heard: State, clock: Clock
    ) -> tuple[Any, jax.Array | None]:
        """A layer's new state, and its spikes."""
        l = update.layer

        def step(s: jax.Array, current: jax.Array, epsilon: jax.Array | float) -> jax.Array:
            return self._coordinates.relax(l, s, current, self._phases.relaxation * epsilon)

        # The barrier makes the current once; without it XLA repeats the adjoint's sums wherever
        # the neuron model reads it.
        current = jax.lax.optimization_barrier(self._coordinates.current(update, heard))
        key = None
        if self._key is not None:
            key = jax.random.fold_in(jax.random.fold_in(self._key, clock.step), l)
        return self._spec.neuron.step(state, current, step, clock, key)

    def _clock(self, t: jax.Array, l: int, neighbours_updated: bool) -> Clock:
        phases, coordinates = self._phases, self._coordinates
        return Clock(
            step=t,
            steps=self._done + self.length,
            before=phases.sweeps(False) + phases.more(False) if coordinates.nudged else 0,
            layer=l + 1,
            unit=coordinates.units[l],
            error=coordinates.error,
            neighbours_updated=neighbours_updated,
            nudged=coordinates.nudged,
            displaced=coordinates.displaced,
        )

    def _moving(
        self, t: jax.Array, old: list[Any], new: list[Any], number: int | None
    ) -> jax.Array:
        """Fraction of the units that changed by more than `MOVING`, of the last sweep alone."""
        last = self._done + self.length - 1
        zero = jnp.zeros((), self._coordinates.start[-1].real.dtype)

        def measured() -> jax.Array:
            changes = [jnp.abs(b.s - a.s) for a, b in zip(old, new, strict=True)]
            counts = [jnp.sum(change > MOVING, dtype=zero.dtype) for change in changes]
            return functools.reduce(jnp.add, counts) / sum(change.size for change in changes)

        if self._phases.tolerance is not None:  # nobody knows which sweep is the last
            return measured()
        if number is not None:
            return measured() if number == last else zero
        return jax.lax.cond(t == last, measured, lambda: zero)

    def _seen(self, t: jax.Array, old: list[Any], new: list[Any], spikes: list[Any]) -> Snapshot:
        spec, coordinates = self._spec, self._coordinates
        squares = [
            jnp.sum((jnp.abs(unit) * jnp.abs(b.s - a.s)) ** 2)
            for unit, a, b in zip(coordinates.scales, old, new, strict=True)
        ]
        emitted = map(jnp.broadcast_to, spikes, [s.shape for s in coordinates.start])
        return Snapshot(
            step=t,
            state=network.unpack(spec, tuple(state.s for state in new)),
            spikes=network.unpack(spec, tuple(emitted)),
            signals=network.unpack(spec, tuple(map(self._signal, new))),
            change=jnp.sqrt(functools.reduce(jnp.add, squares)),
        )
