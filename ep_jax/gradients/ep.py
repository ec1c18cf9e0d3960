"""The gradient of Equilibrium Propagation: a local difference at two fixed points.

With the total energy ``E + beta C`` and its fixed points ``s^beta``, the gradient of the cost at
the free fixed point is (Scellier & Bengio, Frontiers in Computational Neuroscience 2017)::

    dC/dtheta = -lim_{beta -> 0} psi(beta),   psi(beta) = [dPhi(s^beta) - dPhi(s^0)] / beta

where ``dPhi`` is the derivative with respect to the parameters. The estimators are averages of
``-psi``: ``one_sided`` takes one ``beta`` (error of order beta), ``random_sign`` one of random sign
(order beta, order beta squared in the mean; Laborieux et al. 2021), ``symmetric`` the two at plus
and minus beta, in which ``dPhi(s^0)`` cancels (order beta squared), ``holomorphic`` the N points
``beta exp(2 pi i n / N)`` of a circle, which is Cauchy's integral for the derivative (order beta^N;
Laborieux & Zenke, NeurIPS 2022).

In displacement coordinates the difference is never formed as one::

    psi = d/dtheta sum_l <A_l(s0_{l-1}), D_l> + alpha <A'_l(D_{l-1}), s0_l + beta_l D_l>

Nothing here knows what pulls at the output: the gradient of a cost (`ep_gradient`), or a vector
that comes from whatever the output is part of (`ep_jax.equilibrium`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ep_jax import dynamics, network
from ep_jax.coordinates import Absolute, Base, Displacement, Nudge, base_of, displacement_units
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
from ep_jax.phases import Phases, check_nudge


class Nudges(NamedTuple):
    """The points at which an estimator looks.

    Attributes:
        betas: nudging strengths ``[points, B]``.
        weights: the weight of each point's ``psi`` in the average, ``[points]``.
    """

    betas: jax.Array
    weights: jax.Array


def nudges(phases: Phases, batch: int, dtype: jnp.dtype, key: jax.Array | None) -> Nudges:
    """The points of ``phases.estimator``.

    Of the holomorphic estimator's points ``beta exp(2 pi i n / N)`` those in the upper half plane
    do: the state at a conjugate point is the conjugate state.
    """
    if phases.estimator == "symmetric":
        signs = jnp.array([1.0, -1.0], dtype)
    elif phases.estimator == "random_sign":
        if key is None:
            raise ValueError("key is None; expected a random key with estimator='random_sign'")
        signs = jax.random.rademacher(key, (1, batch), dtype)
        return Nudges(phases.beta * signs, jnp.ones(1, dtype))
    elif phases.estimator == "holomorphic":
        n = np.arange(phases.points // 2 + 1)
        angles = 2 * np.pi * n / phases.points
        cosines, sines = (jnp.asarray(f(angles), dtype) for f in (np.cos, np.sin))
        signs = jax.lax.complex(cosines, sines)
        real = (n == 0) | (2 * n == phases.points)
        weights = jnp.asarray(np.where(real, 1.0, 2.0) / phases.points, dtype)
        return Nudges(jnp.broadcast_to(phases.beta * signs[:, None], (len(n), batch)), weights)
    else:
        signs = jnp.ones(1, dtype)
    betas = jnp.broadcast_to(phases.beta * signs[:, None], (len(signs), batch))
    return Nudges(betas, jnp.full(len(signs), 1 / len(signs), dtype))


def displacement_psi(
    spec: NetworkSpec, prepared: Prepared, x: jax.Array, base: Base, d: State, beta: jax.Array
) -> jax.Array:
    """A scalar whose derivative by parameters and input is ``psi(beta)`` of one example."""
    total = jnp.zeros((), d[-1].dtype)
    units = displacement_units(spec, beta, d[-1].dtype)
    own = network.external(prepared, network.input_drive(spec, prepared, x))
    for l, v in enumerate(d):
        below = own[l]
        for edge in spec.links:
            if edge.target != l:
                continue
            source = edge.source
            below = below + network.drive(spec, prepared, edge, base.state[source])
            context = network.context(spec, prepared, edge, base.state[source])
            moved = network.drive_difference(
                spec, prepared, edge, d[source], context, units[source]
            )
            nudged = base.state[l] + beta * spec.weight_of(l) * v
            total = total + spec.attenuation(edge) * jnp.sum(moved * nudged)
        total = total + jnp.sum(below * v)
    return total


def ep_gradient(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    ys: jax.Array,
    phases: Phases,
    key: jax.Array | None = None,
    *,
    microbatch: int | None = None,
) -> tuple[Params, GradientInfo]:
    """The gradient of the batch-mean cost by Equilibrium Propagation.

    Memory does not grow with the number of sweeps. Not jitted: wrap it, or what calls it, as
    ``jax.jit(ep_gradient, static_argnames=("spec", "phases", "microbatch"))``.

    Args:
        params: parameters of `spec`.
        spec: the network.
        xs: inputs, floating point, ``[B, *spec.input_shape]``.
        ys: integer labels ``[B]``, or targets ``[B, ...]`` of the answers' shape.
        phases: sweeps, nudging strength, estimator, coordinates.
        key: random key, for stochastic neurons and ``estimator="random_sign"``. The nudged phases
            of one example share one key.
        microbatch: settle the batch in parts of so many examples, one after the other: the memory
            is that of a part. Parts have stragglers and a median (``phases.limit``) of their own.

    Returns:
        The gradient, of the same tree as `params`, and a `GradientInfo`.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or value.

    Example:
        >>> spec = NetworkSpec((3,), (Dense(4), Dense(2)), neuron=ep_jax.Rate())
        >>> params = network.draw_params(jax.random.key(0), spec)
        >>> xs, ys = jnp.ones((5, 3)), jnp.array([0, 1, 1, 0, 1])
        >>> grads, info = ep_gradient(params, spec, xs, ys, Phases(free=20, nudged=10))
        >>> grads[0]["w"].shape, info.output.shape
        ((3, 4), (5, 2))
    """
    given = check(params, spec, xs, ys, phases, key)
    check_nudge(spec, phases, phases.beta, given.xs.dtype)
    with phases.products():
        return in_parts(microbatch, given, lambda part: _gradient(params, spec, phases, part))


def _gradient(
    params: Params, spec: NetworkSpec, phases: Phases, given: Checked
) -> tuple[Params, GradientInfo]:
    """See `ep_gradient`."""
    batch = given.xs.shape[0]
    points = nudges(phases, batch, given.xs.dtype, given.keys.estimator)
    free, told = settle(params, spec, given.xs, phases, given.keys.free)

    def pulled(prepared: Prepared, y: jax.Array) -> Callable[[jax.Array], jax.Array]:
        return lambda last: network.cost_gradient(spec, prepared, last, y)

    found = contrast(spec, phases, free, points, pulled, given.ys, given.keys.nudged)
    weights = jnp.full(batch, -1 / batch, given.xs.dtype)
    gradient = jax.grad(lambda params: found.psi(params, given.xs, weights))(params)
    said = answer(spec, free.prepared, free.state[-1], given.ys)
    infos = (mean_info(told), mean_info(found.info))
    return with_readout(spec, gradient, said), GradientInfo(
        said.cost, said.output, *infos, found.limited
    )


Pulled: TypeAlias = Callable[[Prepared, jax.Array], Callable[[jax.Array], jax.Array]]
"""``(prepared, y) -> (last state -> gradient)``: what pulls at an example with the datum ``y``."""


class Contrast(NamedTuple):
    """The nudged phases of a batch.

    Attributes:
        psi: ``(params, xs, weights) -> scalar``; its derivative by parameters and inputs is the
            sum of the examples' ``psi``, weighted.
        info: the `PhaseInfo` of each nudged phase.
        limited: share of the examples whose displacement was scaled down, or ``None``.
    """

    psi: Callable[[Params, jax.Array, jax.Array], jax.Array]
    info: PhaseInfo
    limited: jax.Array | None


def contrast(
    spec: NetworkSpec,
    phases: Phases,
    free: Free,
    points: Nudges,
    pulled: Pulled,
    ys: jax.Array,
    keys: jax.Array | None,
) -> Contrast:
    """Nudge a batch at the estimator's points.

    Args:
        spec: the network.
        phases: its phases.
        free: the free phases.
        points: where the estimator looks.
        pulled: what pulls at an example.
        ys: its datum, ``[B, ...]``.
        keys: a key for each example of stochastic neurons.
    """
    way = _displaced if phases.coordinates == "displacement" else _absolute
    return way(spec, phases, free, points, pulled, ys, keys)


def _absolute(
    spec: NetworkSpec,
    phases: Phases,
    free: Free,
    points: Nudges,
    pulled: Pulled,
    ys: jax.Array,
    keys: jax.Array | None,
) -> Contrast:
    """Nudged phases of the state itself: ``psi`` is a difference of Phi."""
    like = _cast_to(points.betas.dtype)
    prepared, drives, state, data = like((free.prepared, free.drives, free.state, ys))

    def settle_at(betas: jax.Array) -> tuple[State, PhaseInfo]:
        def coordinates_of(beta: Any, y: Any, drives: Any, s: State) -> Absolute:
            return Absolute(spec, prepared, drives, s, Nudge(beta, pulled(prepared, y)))

        examples = (betas, data, drives, state)
        found = dynamics.settle_batch(spec, phases, True, coordinates_of, examples, keys)
        return found.state, found.info

    nudged, info = jax.vmap(settle_at)(points.betas)

    def psi(params: Params, xs: jax.Array, weights: jax.Array) -> jax.Array:
        prepared, inputs = like((network.prepare(params, spec), xs))
        phi_of = jax.vmap(lambda x, s: network.prepared_phi(spec, prepared, x, s))
        each = jax.vmap(lambda beta, s: phi_of(inputs, s) / beta)(points.betas, nudged)
        total = points.weights @ (each.real @ weights)
        if phases.estimator in ("symmetric", "holomorphic"):  # the free states cancel
            return total
        at_rest = jax.vmap(lambda x, s: network.prepared_phi(spec, prepared, x, s))(xs, free.state)
        return total - (at_rest / points.betas[0]) @ weights

    return Contrast(psi, info, None)


def _displaced(
    spec: NetworkSpec,
    phases: Phases,
    free: Free,
    points: Nudges,
    pulled: Pulled,
    ys: jax.Array,
    keys: jax.Array | None,
) -> Contrast:
    """Nudged phases of the displacement: ``psi`` without a difference."""
    like = _cast_to(points.betas.dtype)
    base = jax.vmap(lambda swept: base_of(spec, free.prepared, swept))(free.swept)
    prepared, data, base = like((free.prepared, ys, base))

    def settle_at(betas: jax.Array) -> tuple[State, PhaseInfo]:
        def coordinates_of(beta: Any, y: Any, base: Base) -> Displacement:
            return Displacement(spec, prepared, base, Nudge(beta, pulled(prepared, y)))

        examples = (betas, data, base)
        found = dynamics.settle_batch(spec, phases, True, coordinates_of, examples, keys)
        return found.state, found.info

    d, info = jax.vmap(settle_at)(points.betas)
    limited = None
    if phases.limit is not None:
        size = jax.vmap(lambda s, y: Nudge(phases.beta, pulled(prepared, y)).size(s))
        d, limited = limit_displacements(d, size(base.state[-1], data), phases.limit)

    def psi(params: Params, xs: jax.Array, weights: jax.Array) -> jax.Array:
        prepared, inputs = like((network.prepare(params, spec), xs))
        each = _each(
            lambda beta, d, x, base: displacement_psi(spec, prepared, x, base, d, beta),
            (points.betas, d),
            (inputs, base),
        )
        return points.weights @ (each.real @ weights)

    return Contrast(psi, info, limited)


def limit_displacements(d: State, errors: jax.Array, limit: float) -> tuple[State, jax.Array]:
    """Scale down the displacements that are large for their output's error.

    Args:
        d: displacements, arrays ``[points, B, ...]``.
        errors: the output's error of each example, ``[B]``.
        limit: the largest norm of a displacement over its error, in units of the batch's median.

    Returns:
        The displacements, and the share of them that was scaled down.
    """
    flat = [jnp.abs(v).reshape(*v.shape[:2], -1) for v in d]
    sizes = jnp.sqrt(sum(jnp.sum(v**2, axis=-1) for v in flat)) / errors
    most = limit * jnp.median(sizes, axis=1, keepdims=True)
    factors = jnp.where(sizes > most, most / jnp.where(sizes > 0, sizes, 1), 1)
    scaled = tuple(v * factors.reshape(*factors.shape, *(1,) * (v.ndim - 2)) for v in d)
    return scaled, jnp.mean(factors < 1, dtype=factors.dtype)


def _cast_to(dtype: jnp.dtype) -> Callable[[Any], Any]:
    """A function that makes the arrays of a tree complex where the nudges are."""
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return lambda tree: tree
    return lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree)


def _each(f: Callable[..., Any], own: tuple[Any, ...], shared: tuple[Any, ...]) -> Any:
    """`f` of each point and example: `own` is ``[points, B, ...]``, `shared` is ``[B, ...]``."""
    return jax.vmap(lambda *own: jax.vmap(f)(*own, *shared))(*own)
