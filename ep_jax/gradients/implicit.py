"""Implicit differentiation at the fixed point: recurrent back-propagation.

At the fixed point ``s = F(s, theta)`` of the rate equations ``F_l = sigma(A_l + alpha A_{l+1}^T)``
the gradient of the cost follows from the adjoint ``v``, itself a fixed point (Almeida, ICNN 1987;
Pineda, Physical Review Letters 1987)::

    v = dC/ds + (dF/ds)^T v,        dC/dtheta = v^T dF/dtheta

``dF/ds`` is never formed; memory does not grow with the number of sweeps. EP's nudged phase in
displacement coordinates becomes this iteration as beta goes to 0.

Spiking neurons settle as they do, and the adjoint is that of the rate equations at their read-out
(as Xiao et al., NeurIPS 2021, differentiate feedback spiking networks).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ep_jax import dynamics, network
from ep_jax.checks import check_integer, check_number
from ep_jax.coordinates import Absolute
from ep_jax.dynamics import PhaseInfo, mean_info
from ep_jax.gradients.batch import (
    Checked,
    Free,
    GradientInfo,
    answer,
    check,
    in_parts,
    settle,
    with_readout,
)
from ep_jax.network import NetworkSpec, Params, Prepared, State
from ep_jax.numerics import norm
from ep_jax.phases import Phases
from ep_jax.relaxation import MOVING


def implicit_gradient(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    ys: jax.Array,
    phases: Phases,
    key: jax.Array | None = None,
    *,
    tolerance: float | None = None,
    max_sweeps: int = 1000,
    microbatch: int | None = None,
) -> tuple[Params, GradientInfo]:
    """The gradient of the batch-mean cost by implicit differentiation at the free state.

    Exact where the free state is a fixed point: give it enough sweeps. Not jitted: wrap it as
    ``jax.jit(implicit_gradient, static_argnames=("spec", "phases", "max_sweeps",
    "microbatch"))``.

    Args:
        params: parameters of `spec`.
        spec: the network.
        xs: inputs, floating point, ``[B, *spec.input_shape]``.
        ys: integer labels ``[B]`` or one-hot targets ``[B, classes]``.
        phases: the free phase; what it says of the nudged one is not used.
        key: random key, for stochastic neurons.
        tolerance: the adjoint has settled when a sweep changes it by less than this part of its
            norm; by default 8 units of rounding.
        max_sweeps: most sweeps of the adjoint. An adjoint that has not settled by then shows in
            ``info.nudged.residual``.
        microbatch: see `ep_jax.ep_gradient`.

    Returns:
        The gradient, of the same tree as `params`, and a `GradientInfo` whose nudged phase is the
        adjoint's.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or value.

    Example:
        >>> spec = NetworkSpec((3,), (Dense(4), Dense(2)), neuron=ep_jax.Rate())
        >>> params = network.draw_params(jax.random.key(0), spec)
        >>> xs, ys = jnp.ones((5, 3)), jnp.array([0, 1, 1, 0, 1])
        >>> grads, info = implicit_gradient(params, spec, xs, ys, Phases(free=50))
        >>> bool(info.nudged.residual < 1e-4)
        True
    """
    given = check(params, spec, xs, ys, phases, key)
    check_adjoint(tolerance, max_sweeps)

    def gradient(part: Checked) -> tuple[Params, GradientInfo]:
        return _gradient(params, spec, phases, tolerance, max_sweeps, part)

    with phases.products():
        return in_parts(microbatch, given, gradient)


def _gradient(
    params: Params,
    spec: NetworkSpec,
    phases: Phases,
    tolerance: float | None,
    max_sweeps: int,
    given: Checked,
) -> tuple[Params, GradientInfo]:
    """See `implicit_gradient`."""
    free, told = settle(params, spec, given.xs, phases, given.keys.free)
    free = free._replace(prepared=network.prepare(params, spec))  # an adjoint settles to rounding
    gradient_of = jax.vmap(lambda s, y: network.cost_gradient(spec, free.prepared, s, y))
    sources = gradient_of(free.state[-1], given.ys)
    v, info = adjoints(spec, free, sources, tolerance, max_sweeps)
    batch = given.xs.shape[0]
    weights = jnp.full(batch, 1 / batch, given.xs.dtype)
    gradient = jax.grad(lambda p: pulled(p, spec, given.xs, free.state, v, weights))(params)
    said = answer(spec, free.prepared, free.state[-1], given.ys)
    infos = (mean_info(told), mean_info(info))
    return with_readout(spec, gradient, said), GradientInfo(said.cost, said.output, *infos)


def check_adjoint(tolerance: float | None, max_sweeps: int) -> None:
    """Raise where the settings of `adjoints` are none."""
    if tolerance is not None:
        check_number("tolerance", tolerance, above=0.0)
    check_integer("max_sweeps", max_sweeps, at_least=1)


def adjoints(
    spec: NetworkSpec,
    free: Free,
    sources: jax.Array,
    tolerance: float | None,
    max_sweeps: int,
) -> tuple[State, PhaseInfo]:
    """The adjoint of each example of a batch, packed, and how it settled.

    Args:
        spec: the network.
        free: the free phases.
        sources: what pulls at the last layer, ``dC/ds_L``, ``[B, ...]``.
        tolerance: see `implicit_gradient`.
        max_sweeps: most sweeps.
    """
    precision = free.state[-1].dtype
    if tolerance is None:
        tolerance = 8 * float(jnp.finfo(precision).eps)

    sources = _differentiated_no_further(sources)

    def one(
        drives: tuple[jax.Array | None, ...], state: State, pulls: jax.Array
    ) -> tuple[State, PhaseInfo]:
        pull = jax.vjp(lambda s: rate_sweep(spec, free.prepared, drives, s), state)[1]
        source = (*map(jnp.zeros_like, state[:-1]), pulls)

        def unsettled(carry: tuple[jax.Array, State, State]) -> jax.Array:
            sweeps, v, change = carry
            return (sweeps < max_sweeps) & (norm(change) > tolerance * norm(v))

        def sweep(carry: tuple[jax.Array, State, State]) -> tuple[jax.Array, State, State]:
            sweeps, v, _ = carry
            new = jax.tree.map(jnp.add, source, pull(v)[0])
            return sweeps + 1, new, jax.tree.map(jnp.subtract, new, v)

        start = (jnp.zeros((), jnp.int32), source, source)
        sweeps, v, change = jax.lax.while_loop(unsettled, sweep, start)
        moved = jnp.concatenate([jnp.abs(c).ravel() > MOVING for c in change])
        found = tuple(map(dynamics.relative_size, change, v))
        nothing = tuple(jnp.zeros((), precision) for _ in state)
        moving = jnp.mean(moved, dtype=precision)
        return v, dynamics.info_of(found, sweeps, moving, nothing, dynamics.mean_size(v))

    return jax.vmap(one)(free.drives, free.state, sources)


@jax.custom_jvp
def _differentiated_no_further(values: jax.Array) -> jax.Array:
    """`values`; a derivative through them is refused in this library's words, not in JAX's."""
    return values


@_differentiated_no_further.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise TypeError("a derivative of an implicit derivative is asked for, and there is none; "
                    "expected derivative=ep_jax.BPTT() or EP() for second derivatives")  # fmt: skip


def pulled(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    states: State,
    v: State,
    weights: jax.Array,
) -> jax.Array:
    """A scalar whose derivative by parameters and inputs is the weighted sum of ``v^T dF``."""
    prepared = network.prepare(params, spec)

    def one(x: jax.Array, state: State, v: State) -> jax.Array:
        swept = rate_sweep(spec, prepared, network.input_drive(spec, prepared, x), state)
        return sum(map(jnp.vdot, swept, v), start=jnp.zeros((), x.dtype))

    return jax.vmap(one)(xs, states, v) @ weights


def rate_sweep(
    spec: NetworkSpec,
    prepared: Prepared,
    drives: tuple[jax.Array | None, ...],
    state: State,
) -> State:
    """``F(s)``: one synchronous sweep of rate neurons, packed; the network rests where F(s) = s."""
    return Absolute(spec, prepared, drives, state).swept(state).state
