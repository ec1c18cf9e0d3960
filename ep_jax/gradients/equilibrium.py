"""The gradient of Equilibrium Propagation: a local difference at two fixed points.

With the total energy ``E + beta C`` and its fixed points ``s^beta``, the gradient of the cost at
the free fixed point is (Scellier & Bengio, Frontiers in Computational Neuroscience 2017)::

    dC/dtheta = -lim_{beta -> 0} psi(beta),   psi(beta) = [dPhi(s^beta) - dPhi(s^0)] / beta

where ``dPhi`` is the derivative with respect to the parameters. The estimators are averages of
``-psi``: ``one_sided`` takes one ``beta`` (error of order beta), ``random_sign`` one of random sign
(order beta, order beta squared in the mean; Laborieux et al. 2021), ``symmetric`` the two at plus
and minus beta, in which ``dPhi(s^0)`` cancels (order beta squared).

In displacement coordinates the difference is never formed as one::

    psi = d/dtheta sum_l <A_l(s0_{l-1}), D_l> + alpha <A'_l(D_{l-1}), s0_l + beta_l D_l>
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from ep_jax import dynamics, network
from ep_jax.costs import cost, read_out, targets
from ep_jax.dynamics import Base, PhaseInfo, Phases
from ep_jax.network import Links, NetworkSpec, Params, State


class GradientInfo(NamedTuple):
    """What a gradient tells about itself.

    Attributes:
        cost: mean cost of the batch at the free states.
        output: answers of the free phase ``[B, classes]`` (output layer or logits).
        free: mean `PhaseInfo` of the free phases.
        nudged: mean `PhaseInfo` of the nudged phases.
    """

    cost: jax.Array
    output: jax.Array
    free: PhaseInfo
    nudged: PhaseInfo


def nudges(phases: Phases, batch: int, dtype: jnp.dtype, key: jax.Array | None) -> jax.Array:
    """The nudging strengths ``[points, batch]`` whose ``psi`` the estimator averages."""
    if phases.estimator == "symmetric":
        signs = jnp.broadcast_to(jnp.array([[1.0], [-1.0]], dtype), (2, batch))
    elif phases.estimator == "random_sign":
        if key is None:
            raise ValueError("key is None; expected a random key with estimator='random_sign'")
        signs = jax.random.rademacher(key, (1, batch), dtype)
    else:
        signs = jnp.ones((1, batch), dtype)
    return phases.beta * signs


def displacement_psi(
    spec: NetworkSpec, links: Links, x: jax.Array, base: Base, d: State, beta: jax.Array
) -> jax.Array:
    """A scalar whose derivative with respect to the parameters is ``psi(beta)`` of one example."""
    total = jnp.zeros((), d[-1].dtype)
    for l, v in enumerate(d):
        if l == 0:
            below = network.input_drive(spec, links, x)
        else:
            below = network.drive(spec, links, l, base.state[l - 1])
            nudged = base.state[l] + beta * spec.weight_of(l) * v
            moved = network.drive(spec, links, l, d[l - 1])
            total = total + spec.feedback * jnp.sum(moved * nudged)
        total = total + jnp.sum((below + links.biases[l]) * v)
    return total


def ep_gradient(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    ys: jax.Array,
    phases: Phases,
    key: jax.Array | None = None,
) -> tuple[Params, GradientInfo]:
    """The gradient of the batch-mean cost by Equilibrium Propagation.

    Memory does not grow with the number of sweeps. Not jitted: wrap it, or what calls it, as
    ``jax.jit(ep_gradient, static_argnames=("spec", "phases"))``.

    Args:
        params: parameters of `spec`.
        spec: the network.
        xs: inputs, floating point, ``[B, *spec.input_shape]``.
        ys: integer labels ``[B]`` or one-hot targets ``[B, classes]``.
        phases: sweeps, nudging strength, estimator, coordinates.
        key: random key, for stochastic neurons and ``estimator="random_sign"``. The nudged phases
            of one example share one key.

    Returns:
        The gradient, of the same tree as `params`, and a `GradientInfo`.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or value.

    Example:
        >>> spec = NetworkSpec((3,), (network.Dense(4), network.Dense(2)), neuron=ep_jax.Rate())
        >>> params = network.init_params(jax.random.key(0), spec)
        >>> xs, ys = jnp.ones((5, 3)), jnp.array([0, 1, 1, 0, 1])
        >>> grads, info = ep_gradient(params, spec, xs, ys, Phases(free=20, nudged=10))
        >>> grads[0]["w"].shape, info.output.shape
        ((3, 4), (5, 2))
    """
    dynamics.check_batch(spec, params, xs)
    dynamics.check_phases(spec, phases, key)
    batch = xs.shape[0]
    ys = targets(spec, ys, xs.dtype, (batch,))
    sign_key, phase_key = (None, None) if key is None else jax.random.split(key)
    betas = nudges(phases, batch, xs.dtype, sign_key)
    free_keys, nudged_keys = None, None
    if spec.neuron.stochastic and phase_key is not None:
        free_keys, nudged_keys = jax.random.split(phase_key, (2, batch))

    links = network.link(params, spec)
    drives = jax.vmap(lambda x: network.input_drive(spec, links, x))(xs)
    free, free_info = jax.vmap(
        lambda drive, key: dynamics.settle_free(spec, links, drive, phases, key)
    )(drives, free_keys)

    contrast = _displaced if phases.coordinates == "displacement" else _absolute
    mean_psi, nudged_info = contrast(spec, links, phases, xs, ys, drives, free, betas, nudged_keys)

    def mean_cost(readout: network.LayerParams | None) -> tuple[jax.Array, jax.Array]:
        here = links._replace(readout=readout)
        costs = jax.vmap(lambda s, y: cost(spec, here, s, y))(free[-1], ys)
        return jnp.mean(costs), jax.vmap(lambda s: read_out(here, s))(free[-1])

    psi = jax.grad(mean_psi)(params)
    grads = tuple(jax.tree.map(jnp.negative, p) for p in psi)
    if links.readout is None:
        value, output = mean_cost(None)
    else:
        # Outside the dynamics: its gradient is that of the cost at the free state, exactly.
        (value, output), own = jax.value_and_grad(mean_cost, has_aux=True)(links.readout)
        grads = (*grads[:-1], own)
    free_mean, nudged_mean = jax.tree.map(jnp.mean, (free_info, nudged_info))
    return grads, GradientInfo(value, output, free_mean, nudged_mean)


Contrast: TypeAlias = tuple[Callable[[Params], jax.Array], PhaseInfo]
"""A function of the parameters whose derivative is the mean ``psi``; the nudged phases' info."""


def _absolute(
    spec: NetworkSpec,
    links: Links,
    phases: Phases,
    xs: jax.Array,
    ys: jax.Array,
    drives: jax.Array,
    free: State,
    betas: jax.Array,
    keys: jax.Array | None,
) -> Contrast:
    """Nudged phases of the state itself: ``psi`` is a difference of Phi."""
    nudged, info = _each(
        lambda beta, y, drive, s, key: dynamics.settle_nudged(
            spec, links, drive, y, s, beta, phases, key
        ),
        (betas,),
        (ys, drives, free, keys),
    )

    def mean_psi(params: Params) -> jax.Array:
        links = network.link(params, spec)
        phi_of = jax.vmap(lambda x, s: network.working_phi(spec, links, x, s))
        total = jnp.mean(jax.vmap(lambda beta, s: phi_of(xs, s) / beta)(betas, nudged))
        if phases.estimator == "symmetric":  # the free states cancel
            return total
        return total - jnp.mean(phi_of(xs, free) / betas)

    return mean_psi, info


def _displaced(
    spec: NetworkSpec,
    links: Links,
    phases: Phases,
    xs: jax.Array,
    ys: jax.Array,
    drives: jax.Array,
    free: State,
    betas: jax.Array,
    keys: jax.Array | None,
) -> Contrast:
    """Nudged phases of the displacement: ``psi`` without a difference."""
    base = jax.vmap(lambda drive, s: dynamics.base_of(spec, links, drive, s))(drives, free)
    d, info = _each(
        lambda beta, y, base, key: dynamics.settle_displacement(
            spec, links, y, base, beta, phases, key
        ),
        (betas,),
        (ys, base, keys),
    )

    def mean_psi(params: Params) -> jax.Array:
        links = network.link(params, spec)
        psi = _each(
            lambda beta, d, x, base: displacement_psi(spec, links, x, base, d, beta),
            (betas, d),
            (xs, base),
        )
        return jnp.mean(psi)

    return mean_psi, info


def _each(f: Callable[..., Any], own: tuple[Any, ...], shared: tuple[Any, ...]) -> Any:
    """`f` of each point and example: `own` is ``[points, B, ...]``, `shared` is ``[B, ...]``."""
    return jax.vmap(lambda *own: jax.vmap(f)(*own, *shared))(*own)
