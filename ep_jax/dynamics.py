"""The phases: relaxation of the state, free and nudged, one ``lax.scan`` each.

A phase relaxes in some coordinates (`ep_jax.coordinates`) by sweeps (`ep_jax.relaxation`).

Whether a phase has settled, only the map tells whose fixed point it seeks: a code that has stopped
to send looks at rest wherever it is. So at the end of each phase one sweep ``F`` of rate neurons is
computed from the read-out ``s``, and the residual is ``|F(s) - s|``, relative, in each layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ep_jax import network
from ep_jax.checks import check_float_array, check_native
from ep_jax.coordinates import (
    Absolute,
    Coordinates,
    Displacement,
    Nudge,
    Swept,
    base_of,
    displaced_state,
)
from ep_jax.network import NetworkSpec, Params, State
from ep_jax.numerics import beyond, norm
from ep_jax.phases import Phases, check_beta, check_nudge, check_phases
from ep_jax.relaxation import Carry, Relaxation, Trace

UNSETTLED = 1e-2
"""An example counts as unsettled when its relative residual is larger than this."""
FAR = {"free": 0.1, "nudged": 0.3}
"""A phase is far from settled whose relative residual, the mean of a batch, is above this.

A gradient that is off by a relative .3 is still at a cosine of .95 with the exact one, and it is
linear in the displacement. The free state decides the answer, and its error enters all of it.
"""


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
    apart, size = norm(change), norm(of)
    return jnp.where(size > 0, apart / jnp.where(size > 0, size, 1), jnp.sign(apart))


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
    key: jax.Array | None = None,
    trace: Trace | None = None,
    straggler: Carry | None = None,
) -> Settled:
    """Run a phase of one example.

    Args:
        spec: the network.
        phases: its phases.
        coordinates: what relaxes.
        key: random key of a stochastic neuron.
        trace: see `free_phase`.
        straggler: how the first sweeps ended, to make the further ones of a straggler.
    """
    phase = Relaxation(spec, phases, coordinates, key, trace, straggling=straggler is not None)
    if phases.tolerance is None or trace is not None:
        if straggler is not None:  # the same for all of them: no array of numbers
            made = jnp.asarray(phases.sweeps(coordinates.nudged), jnp.int32)
            straggler = straggler._replace(t=made)
        return settled(spec, coordinates, *phase.run(carry=straggler))
    tolerance = phases.tolerance

    def near(carry: Carry) -> jax.Array:
        readout = tuple(map(spec.neuron.readout, carry.states))
        return largest(residuals(coordinates, readout)) < tolerance

    return settled(spec, coordinates, phase.run_until(near, straggler))


def settled(
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
        unsettled=beyond(worst, UNSETTLED),
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
    batch = found.info.residual.shape[0]
    if not phases.stragglers or not phases.more(nudged):
        return found
    _, slow = jax.lax.top_k(found.info.residual, phases.straggling(batch))

    def on(key: jax.Array | None, carry: Carry, *data: Any) -> Settled:
        return settle(spec, phases, coordinates_of(*data), key, straggler=carry)

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
    with phases.products():
        prepared = network.prepare(params, spec, phases.precision)
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
    with phases.products():
        prepared = network.prepare(params, spec, phases.precision)
        drives = network.input_drive(spec, prepared, x)
        packed = network.pack(spec, tuple(state))
        nudge = Nudge(beta, lambda s: network.cost_gradient(spec, prepared, s, target))
        if phases.coordinates == "absolute":
            coordinates = Absolute(spec, prepared, drives, packed, nudge)
            found = settle(spec, phases, coordinates, key, trace)
            return network.unpack(spec, found.state), found.info
        rest = Absolute(spec, prepared, drives, packed)
        base = base_of(spec, prepared, rest.swept(packed))
        found = settle(spec, phases, Displacement(spec, prepared, base, nudge), key, trace)
    return network.unpack(spec, displaced_state(spec, base, found.state, beta)), found.info


def check_inputs(spec: NetworkSpec, xs: jax.Array) -> None:
    """Raise where a batch of inputs does not fit `spec`."""
    check_float_array("xs", xs, ("batch", *spec.input_shape))
    check_native("xs", xs.dtype)
    if xs.shape[0] == 0:
        raise ValueError("xs holds no example; expected at least one")
