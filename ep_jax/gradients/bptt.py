"""Back-propagation through time: reverse mode through the free relaxation.

The exact gradient of the cost at the state that the free phase ends with, and the baseline that EP
is compared with. It keeps something of every sweep, so its memory grows with their number T; with
rematerialisation with sqrt(T), for about one more forward pass. Spikes have no derivative: in
reverse mode the quantiser's is the neuron model's surrogate (`ep_jax.spikes`).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ep_jax import dynamics, network
from ep_jax.checks import check_choice, check_integer
from ep_jax.coordinates import Absolute
from ep_jax.dynamics import PhaseInfo, mean_info
from ep_jax.gradients.batch import Checked, GradientInfo, check, in_parts
from ep_jax.network import NetworkSpec, Params, Prepared, State
from ep_jax.neurons import ACTIVATIONS, Clock, Neuron, relax
from ep_jax.phases import Phases
from ep_jax.relaxation import Carry, Relaxation


def bptt_gradient(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    ys: jax.Array,
    phases: Phases,
    key: jax.Array | None = None,
    *,
    tracked: int | None = None,
    remat: bool = False,
    microbatch: int | None = None,
) -> tuple[Params, GradientInfo]:
    """The gradient of the batch-mean cost after ``phases.free`` sweeps, by reverse mode.

    Not jitted: wrap it as ``jax.jit(bptt_gradient, static_argnames=("spec", "phases", "tracked",
    "remat", "microbatch"))``.

    Args:
        params: parameters of `spec`.
        spec: the network.
        xs: inputs, floating point, ``[B, *spec.input_shape]``.
        ys: integer labels ``[B]`` or one-hot targets ``[B, classes]``.
        phases: the free phase; what it says of the nudged one is not used. Reverse mode needs a
            number of sweeps that is known: without a tolerance, and the same for all examples.
        key: random key, for stochastic neurons.
        tracked: differentiate the last so many sweeps only, by default all: from a settled state,
            the truncated gradient converges to the exact one.
        remat: keep the state of every sqrt(tracked)-th sweep alone and compute the others again.
        microbatch: see `ep_jax.ep_gradient`.

    Returns:
        The gradient, of the same tree as `params`, and a `GradientInfo` without a nudged phase.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or value.

    Example:
        >>> spec = NetworkSpec((3,), (Dense(4), Dense(2)), neuron=ep_jax.Rate())
        >>> params = network.draw_params(jax.random.key(0), spec)
        >>> xs, ys = jnp.ones((5, 3)), jnp.array([0, 1, 1, 0, 1])
        >>> grads, info = bptt_gradient(params, spec, xs, ys, Phases(free=20), tracked=5)
        >>> grads[0]["w"].shape, info.nudged is None
        ((3, 4), True)
    """
    given = check(params, spec, xs, ys, phases, key)
    tracked = check_tracked(spec, phases, tracked, remat)

    def gradient(part: Checked) -> tuple[Params, GradientInfo]:
        return _gradient(params, spec, phases, tracked, remat, part)

    with phases.products():
        return in_parts(microbatch, given, gradient)


def _gradient(
    params: Params,
    spec: NetworkSpec,
    phases: Phases,
    tracked: int,
    remat: bool,
    given: Checked,
) -> tuple[Params, GradientInfo]:
    """See `bptt_gradient`."""

    def mean_cost(params: Params) -> tuple[jax.Array, tuple[jax.Array, PhaseInfo]]:
        prepared = network.prepare(params, spec, phases.precision)
        last, info = settled(prepared, spec, given.xs, phases, given.keys.free, tracked, remat)
        costs = jax.vmap(lambda s, y: network.cost_of(spec, prepared, s, y))(last, given.ys)
        output = jax.vmap(lambda s: network.read_out(spec, prepared, s))(last)
        return jnp.mean(costs), (output, info)

    (value, (output, info)), grads = jax.value_and_grad(mean_cost, has_aux=True)(params)
    return grads, GradientInfo(value, output, mean_info(info))


def check_tracked(spec: NetworkSpec, phases: Phases, tracked: int | None, remat: bool) -> int:
    """Raise where reverse mode cannot go through `phases`; the number of tracked sweeps."""
    if not _has_derivative(spec.neuron):
        raise ValueError(f"neuron is {spec.neuron!r}, whose signal has a derivative of zero; "
                         "expected one with a surrogate derivative (jax.custom_jvp, as in "
                         "ep_jax.spikes): back-propagation through time would give no gradient to "
                         "the layers below")  # fmt: skip
    if phases.tolerance is not None:
        raise ValueError(f"phases.tolerance is {phases.tolerance}; expected None: back-propagation "
                         "through time needs a number of sweeps that is known")  # fmt: skip
    if phases.stragglers:
        raise ValueError(f"phases.stragglers is {phases.stragglers}; expected 0: back-propagation "
                         "through time makes the same sweeps of all examples")  # fmt: skip
    tracked = phases.free if tracked is None else tracked
    check_integer("tracked", tracked, at_least=1)
    if tracked > phases.free:
        raise ValueError(f"tracked is {tracked}; expected at most the {phases.free} sweeps of the "
                         "free phase")  # fmt: skip
    check_choice("remat", remat, (True, False))
    return tracked


@functools.cache
def _has_derivative(neuron: Neuron) -> bool:
    """Whether what a neuron receives changes what it sends, as reverse mode sees it.

    Looked at in units of their own for a few sweeps, whose currents go through the whole range of
    an activation.
    """
    activation, sweeps = ACTIVATIONS[neuron.activation], 8
    currents = np.linspace(-1.0, 2.0, 32, dtype=np.float32)

    def sent(current: jax.Array) -> jax.Array:
        total = jnp.zeros_like(current)
        state = neuron.start(total, total)
        for t in range(sweeps):
            clock = Clock(jnp.array(t), sweeps, 0, 1, 1.0, 1.0, True, False, False)
            key = jax.random.key(t) if neuron.stochastic else None
            state, _ = neuron.step(state, current, functools.partial(relax, activation), clock, key)
            total = total + neuron.signal(state)
        return total

    with jax.ensure_compile_time_eval():  # it may be asked while a program is traced
        passed = jax.jvp(sent, (jnp.asarray(currents),), (jnp.ones_like(currents),))[1]
        return bool(jnp.any(passed != 0.0))


def settled(
    prepared: Prepared,
    spec: NetworkSpec,
    xs: jax.Array,
    phases: Phases,
    keys: jax.Array | None,
    tracked: int,
    remat: bool,
) -> tuple[jax.Array, PhaseInfo]:
    """The last layer's free states ``[B, ...]``, for reverse mode, and each example's info."""

    def one(x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, PhaseInfo]:
        drives = network.input_drive(spec, prepared, x)
        state, info = _settle(spec, prepared, drives, phases, key, tracked, remat)
        return state[-1], info

    return jax.vmap(one)(xs, keys)


def _settle(
    spec: NetworkSpec,
    prepared: Prepared,
    drives: tuple[jax.Array | None, ...],
    phases: Phases,
    key: jax.Array | None,
    tracked: int,
    remat: bool,
) -> tuple[State, PhaseInfo]:
    """The free phase, of which the last `tracked` sweeps can be differentiated."""
    coordinates = Absolute(spec, prepared, drives)
    phase, carry = Relaxation(spec, phases, coordinates, key), None
    if tracked < phase.length:
        fixed = Absolute(spec, *jax.lax.stop_gradient((prepared, drives)))
        carry, _ = Relaxation(spec, phases, fixed, key).run(phase.length - tracked)
    if remat:
        carry = _in_segments(phase, phase.start() if carry is None else carry, tracked)
    else:
        carry, _ = phase.run(tracked, carry)
    found = dynamics.settled(spec, coordinates, carry)
    return found.state, found.info


def _in_segments(phase: Relaxation, carry: Carry, sweeps: int) -> Carry:
    """Sweeps on from a carry that remember that of every ``sqrt(sweeps)``-th alone."""

    def run(carry: Carry, count: int) -> Carry:
        return phase.run(count, carry)[0]

    length = math.isqrt(sweeps)
    segments, rest = divmod(sweeps, length)
    # Inside a scan nothing can merge the second forward pass with the first.
    segment = jax.checkpoint(lambda carry: run(carry, length), prevent_cse=False)
    carry, _ = jax.lax.scan(lambda carry, _: (segment(carry), None), carry, length=segments)
    return jax.checkpoint(lambda carry: run(carry, rest))(carry) if rest else carry
