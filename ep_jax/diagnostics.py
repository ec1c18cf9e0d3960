"""Whether to trust a gradient: comparisons, GDU curves, distances, contractivity.

What a network would cost on hardware (`ep_jax.hardware`) is found here as well.

The reference for every network, spiking ones as well, is the exact gradient of its *rate twin*: the
rate network with the same parameters and activation, at its fixed point (`exact_gradient`).

All functions are pure and can be jitted with ``spec`` and ``phases`` static, except
`check_contractivity`, which warns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import chex
import jax
import jax.numpy as jnp

from ep_jax import dynamics, network
from ep_jax.checks import check_integer, check_number
from ep_jax.coordinates import Absolute, Coordinates, Displacement, Nudge, base_of
from ep_jax.dynamics import PhaseInfo, mean_info
from ep_jax.gradients.batch import check, check_batch, keys_of, settle
from ep_jax.gradients.implicit import implicit_gradient, rate_sweep
from ep_jax.hardware import FLOAT32 as FLOAT32
from ep_jax.hardware import FLOAT32_DRAM as FLOAT32_DRAM
from ep_jax.hardware import INT8 as INT8
from ep_jax.hardware import connections as connections
from ep_jax.hardware import hardware_cost as hardware_cost
from ep_jax.hardware import synaptic_operations as synaptic_operations
from ep_jax.network import NetworkSpec, Params, State
from ep_jax.neurons import Rate
from ep_jax.numerics import norm
from ep_jax.phases import Phases, optimal_relaxation
from ep_jax.relaxation import Snapshot

P = ParamSpec("P")
R = TypeVar("R")


def _with_full_products(function: Callable[P, R]) -> Callable[P, R]:
    """What is measured is exact, whatever the precision of products that a machine prefers."""

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("float32"):
            return function(*args, **kwargs)

    return exact


def rate_twin(spec: NetworkSpec) -> NetworkSpec:
    """The rate network whose fixed point the neurons of `spec` encode.

    Example:
        >>> rate_twin(NetworkSpec((3,), (Dense(2),))).neuron
        Rate(epsilon=1.0, activation='hard_sigmoid', epsilon_power=0.0)
    """
    return dataclasses.replace(spec, neuron=Rate(activation=spec.neuron.activation))


SETTLED = Phases(free=200, sweep="ordered", relaxation=1.4)
"""Sweeps after which a contractive rate network has reached its fixed point: at a spectral radius
of .99 they shrink errors by a factor of 1e8 (without over-relaxation by 50)."""


def exact_gradient(
    params: Params, spec: NetworkSpec, xs: jax.Array, ys: jax.Array, phases: Phases = SETTLED
) -> Params:
    """The exact gradient of the rate twin of `spec` at its fixed point, the reference.

    Args:
        params: parameters of `spec`.
        spec: the network, of any neuron model.
        xs: inputs ``[B, *spec.input_shape]``.
        ys: integer labels ``[B]`` or one-hot targets.
        phases: the free phase in which the rate twin settles.
    """
    return implicit_gradient(params, rate_twin(spec), xs, ys, phases)[0]


# Gradients compared.


class Agreement(NamedTuple):
    """How an estimate compares with the exact gradient, of each layer and of all together.

    Attributes:
        cosine: cosine of the angle between them, ``[layers]``.
        norm_ratio: norm of the estimate over that of the exact gradient, ``[layers]``.
        relative_error: norm of their difference over that of the exact gradient, ``[layers]``.
        total_cosine: cosine over all layers.
        total_norm_ratio: norm ratio over all layers.
        total_relative_error: relative error over all layers.
    """

    cosine: jax.Array
    norm_ratio: jax.Array
    relative_error: jax.Array
    total_cosine: jax.Array
    total_norm_ratio: jax.Array
    total_relative_error: jax.Array


def _by_layer(name: str, gradient: Any) -> tuple[Any, ...]:
    """The gradient of each layer."""
    if isinstance(gradient, Mapping):
        return tuple(gradient[number] for number in sorted(gradient))
    if isinstance(gradient, tuple | list):
        return tuple(gradient)
    raise TypeError(f"{name} is {type(gradient).__name__}; expected a gradient for each layer: a "
                    "tuple, a list or a mapping by number")  # fmt: skip


def compare(estimate: Params | Mapping[Any, Any], exact: Params | Mapping[Any, Any]) -> Agreement:
    """Cosine, norm ratio and relative error of a gradient, layer by layer (weights and biases).

    A layer whose exact gradient is zero has no angle: NaN.

    Args:
        estimate: the gradient to judge: a tuple over layers, or a mapping by their numbers, as a
            flax state is.
        exact: the gradient to compare it with.

    Raises:
        TypeError: one of them is neither.
        AssertionError: they are not gradients of one network.

    Example:
        >>> exact = ({"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])},)
        >>> double = ({"w": jnp.array([6.0, 0.0]), "b": jnp.array([8.0])},)
        >>> agreement = compare(double, exact)
        >>> float(agreement.cosine[0]), float(agreement.norm_ratio[0])
        (1.0, 2.0)
    """
    estimate, exact = _by_layer("estimate", estimate), _by_layer("exact", exact)
    chex.assert_trees_all_equal_shapes(
        estimate, exact, custom_message="estimate and exact differ; expected gradients of one spec"
    )
    both = jax.tree.leaves((estimate, exact))
    with jax.numpy_dtype_promotion("standard"):  # the exact one may have a higher precision
        precision = jnp.result_type(*both)
    estimate, exact = jax.tree.map(lambda g: jnp.asarray(g, precision), (estimate, exact))

    def measures(estimate: Any, exact: Any) -> tuple[jax.Array, ...]:
        here, there = norm(estimate), norm(exact)
        pairs = zip(jax.tree.leaves(estimate), jax.tree.leaves(exact), strict=True)
        cosine = jnp.sum(jnp.stack([jnp.vdot(a / here, b / there) for a, b in pairs]))
        apart = norm(jax.tree.map(jnp.subtract, estimate, exact))
        return cosine, here / there, apart / there

    layers = zip(*map(measures, estimate, exact), strict=True)
    return Agreement(*map(jnp.stack, layers), *measures(estimate, exact))


class Spread(NamedTuple):
    """Mean-square error of an estimator, split; relative to the exact gradient's squared norm.

    Attributes:
        bias: ``|E[g] - exact|^2 / |exact|^2`` of each layer: averaging does not remove it.
        variance: ``E |g - E[g]|^2 / |exact|^2`` of each layer: averaging does.
    """

    bias: jax.Array
    variance: jax.Array


def bias_and_variance(estimates: Params, exact: Params) -> Spread:
    """Bias and variance of an estimator over seeds (of its random keys, batches, weights).

    With S estimates the squared bias holds ``variance / S`` too, which is subtracted: it is
    unbiased, and near zero it can come out negative.

    Args:
        estimates: gradients with a leading axis of S seeds, as from ``jax.vmap`` over keys.
        exact: the exact gradient, one for all seeds or with the same leading axis.

    Raises:
        ValueError: there is one seed only.
    """
    if len(jax.tree.leaves(estimates)[0]) < 2:
        raise ValueError("estimates holds 1 seed; expected a leading axis of at least 2")
    layers: list[tuple[jax.Array, jax.Array]] = []
    for estimate, true in zip(estimates, exact, strict=True):
        bias, variance, square = (jnp.zeros(()),) * 3
        size = norm(true)
        for name, e in estimate.items():
            seeds = len(e)
            t = jnp.broadcast_to(true[name], e.shape) / size
            wrong = e / size - t
            mean = jnp.mean(wrong, 0, keepdims=True)
            spread = jnp.sum((wrong - mean) ** 2) / (seeds - 1)
            bias = bias + jnp.sum(mean**2) - spread / seeds
            variance = variance + spread
            square = square + jnp.sum(t**2) / seeds
        layers.append((bias / square, variance / square))
    return Spread(*(jnp.stack(values) for values in zip(*layers, strict=True)))


# Gradient-descending updates.


class GDU(NamedTuple):
    """EP's updates and BPTT's gradients, sweep by sweep; both have the sign of an update.

    The theorem of Ernoult et al. (NeurIPS 2019): in the limit of small beta they are equal in every
    sweep, not in their sum alone. Arrays have a leading axis of K sweeps; entry t belongs to the
    t-th sweep of the nudged phase, and to the t-th last of the free phase.

    Attributes:
        ep_state: ``[s^beta_{t+1} - s^beta_t] / (beta alpha^(L - l))``, ``[K, B, ...]``.
        bptt_state: ``-dC/dI_l(T - t)``, minus the gradient with respect to the unit's drive.
        ep_params: ``[dPhi(s^beta_{t+1}) - dPhi(s^beta_t)] / beta``, mean over the batch.
        bptt_params: ``-dC/dtheta(T - t)``: of the parameters' use in that sweep alone.
    """

    ep_state: State
    bptt_state: State
    ep_params: Params
    bptt_params: Params


def gdu(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    ys: jax.Array,
    phases: Phases,
    key: jax.Array | None = None,
) -> GDU:
    """The GDU curves of a batch over the ``phases.nudged`` sweeps of the nudged phase.

    The theorem wants synchronous sweeps, a free state at rest and a small beta: use float64. Both
    nudges are run and their half difference taken. BPTT is that of the rate twin.

    Args:
        params: parameters of `spec`.
        spec: the network.
        xs: inputs ``[B, *spec.input_shape]``.
        ys: integer labels ``[B]`` or one-hot targets.
        phases: sweeps and beta; synchronous, absolute coordinates.
        key: random key, for stochastic neurons.

    Raises:
        ValueError: `phases` has other sweeps or coordinates.

    Example:
        >>> spec = NetworkSpec((3,), (Dense(4), Dense(2)), neuron=Rate())
        >>> params = network.draw_params(jax.random.key(0), spec)
        >>> phases = Phases(50, 6, 1e-2, sweep="synchronous", coordinates="absolute")
        >>> curves = gdu(params, spec, jnp.ones((5, 3)), jnp.zeros(5, int), phases)
        >>> curves.ep_params[0]["w"].shape, curves.bptt_state[1].shape
        ((6, 3, 4), (6, 5, 2))
    """
    given = check(params, spec, xs, ys, phases, key)
    if phases.sweep != "synchronous" or phases.coordinates != "absolute":
        raise ValueError(
            f"phases has sweep={phases.sweep!r} and coordinates={phases.coordinates!r}; expected "
            "'synchronous' and 'absolute'"
        )
    free, _ = settle(params, spec, xs, phases, given.keys.free)
    start = jax.vmap(lambda s: network.unpack(spec, s))(free.state)

    def nudged(x: jax.Array, y: jax.Array, s: State, key: Any, beta: float) -> State:
        """The states of the nudged phase, the free one first: ``[K + 1, ...]``."""
        seen = dynamics.nudged_phase(
            params, spec, x, y, s, beta, phases, key, trace=lambda now: now.state
        )[1].trace
        return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), s, seen)

    sides = [
        jax.vmap(lambda x, y, s, key, beta=beta: nudged(x, y, s, key, beta), out_axes=1)(
            xs, given.ys, start, given.keys.nudged
        )
        for beta in (phases.beta, -phases.beta)
    ]
    ep_state = tuple(
        jnp.diff(plus - minus, axis=0) / (2 * phases.beta * spec.weight_of(l))
        for l, (plus, minus) in enumerate(zip(*sides, strict=True))
    )

    def phi_gradient(states: State) -> Params:
        def mean_phi(params: Params) -> jax.Array:
            return jnp.mean(jax.vmap(lambda x, s: network.phi(params, spec, x, s))(xs, states))

        return jax.grad(mean_phi)(params)

    # One sweep after the other: K + 1 times the parameters, but never their activations as well.
    plus, minus = (jax.lax.map(phi_gradient, side) for side in sides)
    ep_params = jax.tree.map(lambda p, m: jnp.diff(p - m, axis=0) / (2 * phases.beta), plus, minus)
    bptt_params, bptt_state = _bptt_by_sweep(params, spec, xs, given.ys, free.state, phases.nudged)
    return GDU(ep_state, bptt_state, ep_params, bptt_params)


@_with_full_products
def _bptt_by_sweep(
    params: Params, spec: NetworkSpec, xs: jax.Array, ys: jax.Array, state: State, sweeps: int
) -> tuple[Params, State]:
    """Minus the gradient of each of the last `sweeps` sweeps, the last sweep first."""
    twin = rate_twin(spec)

    def mean_cost(per_sweep: Params, bumps: State) -> jax.Array:
        def one(x: jax.Array, y: jax.Array, s: State, bumps: State) -> jax.Array:
            def sweep(s: State, now: tuple[Params, State]) -> tuple[State, None]:
                prepared = network.prepare(now[0], twin)
                bumped = prepared._replace(biases=jax.tree.map(jnp.add, prepared.biases, now[1]))
                drives = network.input_drive(twin, bumped, x)
                return rate_sweep(twin, bumped, drives, s), None

            last = jax.lax.scan(sweep, s, (per_sweep, bumps))[0][-1]
            return network.cost_of(twin, network.prepare(params, twin), last, y)

        return jnp.mean(jax.vmap(one, in_axes=(0, 0, 0, 1))(xs, ys, state, bumps))

    per_sweep = jax.tree.map(lambda p: jnp.broadcast_to(p, (sweeps, *p.shape)), params)
    bumps = jax.tree.map(lambda s: jnp.zeros((sweeps, *s.shape), s.dtype), state)
    grads, states = jax.grad(mean_cost, argnums=(0, 1))(per_sweep, bumps)
    states = jax.vmap(jax.vmap(lambda s: network.unpack(spec, s)))(states)
    batch = len(xs)  # the gradient of each example's own cost, not of the mean
    return (
        jax.tree.map(lambda g: -g[::-1], grads),
        jax.tree.map(lambda g: -batch * g[::-1], states),
    )


class CurveErrors(NamedTuple):
    """How far two bundles of curves are apart, for each layer ``[layers]``.

    Attributes:
        rmse: root-mean-square difference over the larger of their root-mean-squares.
        sign_error: of the points at which both are non-zero, the share whose signs differ.
    """

    rmse: jax.Array
    sign_error: jax.Array


def curve_errors(ep: Sequence[Any], bptt: Sequence[Any]) -> CurveErrors:
    """Relative RMSE and sign error per layer, as Ernoult et al. (2019, section 4) measure them.

    Args:
        ep: ``ep_state`` or ``ep_params`` of a `GDU` (without a read-out outside the dynamics, which
            has no curve).
        bptt: ``bptt_state`` or ``bptt_params`` of the same.
    """

    def layer(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
        x, y = (jnp.concatenate([v.ravel() for v in jax.tree.leaves(t)]) for t in (a, b))
        scale = jnp.maximum(jnp.mean(x**2), jnp.mean(y**2))
        differ, told = jnp.sum(x * y < 0), jnp.sum(x * y != 0)
        return jnp.sqrt(jnp.mean((x - y) ** 2) / scale), differ / jnp.maximum(told, 1)

    found = [layer(a, b) for a, b in zip(ep, bptt, strict=True)]
    return CurveErrors(*(jnp.stack(values) for values in zip(*found, strict=True)))


# States and the map they are fixed points of.


class StateDistance(NamedTuple):
    """Distance of settled states from the rate twin's fixed points, for each layer ``[layers]``.

    Attributes:
        rms: root-mean-square distance of a unit.
        relative: the same over the root-mean-square of the fixed points.
        info: mean `PhaseInfo` of the settled states: residual, spikes per neuron.
    """

    rms: jax.Array
    relative: jax.Array
    info: PhaseInfo


@_with_full_products
def distance_to_rate(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    phases: Phases,
    key: jax.Array | None = None,
    reference: Phases = SETTLED,
) -> StateDistance:
    """How far the free states of `spec` are from the fixed points that they encode.

    Args:
        params: parameters of `spec`.
        spec: the network.
        xs: inputs ``[B, *spec.input_shape]``.
        phases: its free phase.
        key: random key, for stochastic neurons.
        reference: the free phase in which the rate twin settles.
    """
    xs = check_batch(params, spec, xs, phases, key)
    keys = keys_of(spec, key, len(xs)).free
    free, told = settle(params, spec, xs, phases, keys)
    fixed, _ = settle(params, rate_twin(spec), xs, reference, None)

    def rms(values: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(values**2))

    apart = jnp.stack([rms(a - b) for a, b in zip(free.state, fixed.state, strict=True)])
    size = jnp.stack([rms(b) for b in fixed.state])
    return StateDistance(apart, apart / size, mean_info(told))


def spikes_per_neuron(spec: NetworkSpec, spikes: Sequence[jax.Array | float]) -> float:
    """Spikes per neuron over all layers: a layer counts as many times as it has units.

    Args:
        spec: the network.
        spikes: spikes per neuron of each layer, as in `ep_jax.PhaseInfo`.

    Example:
        >>> spec = NetworkSpec((3,), (Dense(30), Dense(10)))
        >>> spikes_per_neuron(spec, (1.0, 3.0))
        1.5
    """
    sizes = [math.prod(shape) for shape in spec.state_shapes]
    return sum(float(s) * n for s, n in zip(spikes, sizes, strict=True)) / sum(sizes)


@_with_full_products
def spectral_radius(
    params: Params, spec: NetworkSpec, x: jax.Array, state: State, iterations: int = 100
) -> jax.Array:
    """The spectral radius of the relaxation's Jacobian at `state`, one example; matrix-free.

    The Jacobian of a synchronous sweep, ``diag(sigma') alpha^(L - l) d2Phi/ds2``, is self-adjoint
    in the metric ``sum_l alpha^(l - L) u_l v_l / sigma'_l``, so its eigenvalues are real and the
    power iteration's growth in that metric approaches the largest modulus from below. The state is
    stable where it is below 1; an alternating sweep shrinks errors by its square.

    Args:
        params: parameters of `spec`.
        spec: the network, of any neuron model: the Jacobian is that of its rate twin.
        x: one input.
        state: one state, as from `ep_jax.free_phase`.
        iterations: products with the Jacobian.

    Example:
        >>> spec = NetworkSpec((1,), (Dense(1), Dense(1)), feedback=0.5)
        >>> params = ({"w": jnp.ones((1, 1)), "b": jnp.zeros(1)},) * 2
        >>> state = (jnp.array([0.5]), jnp.array([0.5]))
        >>> round(float(spectral_radius(params, spec, jnp.array([0.25]), state)), 4)  # sqrt(1/2)
        0.7071
    """
    network.check_example(spec, params, x, state)
    check_integer("iterations", iterations, at_least=1)
    prepared = network.prepare(params, spec)
    drives = network.input_drive(spec, prepared, x)
    packed = network.pack(spec, state)
    currents = Absolute(spec, prepared, drives, packed).swept(packed).currents
    slopes = tuple(
        jax.jvp(spec.activation(l).apply, (i,), (jnp.ones_like(i),))[1]
        for l, i in enumerate(currents)
    )
    push = jax.linearize(lambda s: rate_sweep(spec, prepared, drives, s), packed)[1]

    def norm(v: State) -> jax.Array:
        squares = (
            jnp.sum(jnp.where(slope > 0, u**2 / jnp.where(slope > 0, slope, 1.0), 0.0))
            / spec.weight_of(l)
            for l, (u, slope) in enumerate(zip(v, slopes, strict=True))
        )
        return jnp.sqrt(sum(squares, start=jnp.zeros((), x.dtype)))

    def scaled(v: State) -> State:
        size = norm(v)
        return jax.tree.map(lambda u: u / jnp.where(size > 0, size, 1.0), v)

    def multiply(_: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        new = push(carry[0])
        return scaled(new), norm(new)  # the norm before was 1

    keys = jax.random.split(jax.random.key(0), spec.depth)
    start = tuple(
        jax.random.normal(k, s.shape, s.dtype) * slope
        for k, s, slope in zip(keys, packed, slopes, strict=True)
    )
    return jax.lax.fori_loop(0, iterations, multiply, (scaled(start), jnp.zeros((), x.dtype)))[1]


class Contractivity(NamedTuple):
    """Whether EP's premise holds: each example has one stable fixed point, and reaches it.

    Attributes:
        radius: `spectral_radius` at the state reached from zero, ``[B]``; below 1 it is stable.
        disagreement: largest distance of a unit between the states reached from zero and from
            random starts, ``[B]``.
        residual: relative residual of that state (`ep_jax.PhaseInfo`), ``[B]``.
    """

    radius: jax.Array
    disagreement: jax.Array
    residual: jax.Array


@_with_full_products
def contractivity(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    phases: Phases = SETTLED,
    starts: int = 3,
    key: jax.Array | None = None,
) -> Contractivity:
    """Spectral radius at the fixed points of the rate twin, and their agreement between starts.

    Args:
        params: parameters of `spec`.
        spec: the network.
        xs: inputs ``[B, *spec.input_shape]``.
        phases: the free phase in which the rate twin settles.
        starts: number of random starts, uniform in [0, 1].
        key: random key of the starts; a fixed one by default.
    """
    network.check_params(spec, params)
    dynamics.check_inputs(spec, xs)
    check_integer("starts", starts, at_least=1)
    twin = rate_twin(spec)
    key = jax.random.key(0) if key is None else key

    def one(x: jax.Array, key: jax.Array) -> Contractivity:
        state, info = dynamics.free_phase(params, twin, x, phases)

        def apart(key: jax.Array) -> jax.Array:
            start = network.random_state(key, spec, state[0].dtype)
            other, _ = dynamics.free_phase(params, twin, x, phases, start=start)
            return network.largest_gap(state, other)

        gaps = jax.lax.map(apart, jax.random.split(key, starts))
        radius = spectral_radius(params, spec, x, state)
        return Contractivity(radius, jnp.max(gaps), info.residual)

    return jax.vmap(one)(xs, jax.random.split(key, len(xs)))


# What recurrence does, and how long it takes.


class Recurrence(NamedTuple):
    """What feedback does to the fixed points of the rate twin.

    Attributes:
        share: ``|s - s_ff| / |s|`` of each layer over all images, ``[layers]``: how much of the
            free state feedback makes. ``s_ff`` is one pass from below that hears nothing from
            above.
        cut: share of the answers that change when the feedback is cut.
        mean: share that change when it is replaced by its mean over the images.
        other: share that change when it is replaced by that of another image.
    """

    share: jax.Array
    cut: jax.Array
    mean: jax.Array
    other: jax.Array


class FeedbackAnswers(NamedTuple):
    """Answers ``[B]`` of the rate twin under some feedback, and what feedback makes of its state.

    An answer is the number of the largest unit of the output, whatever its shape.

    Attributes:
        share: see `Recurrence`.
        own: at the fixed point.
        cut: one pass from below, without feedback.
        mean: one pass under the mean feedback of all images at their fixed points.
        other: one pass under the feedback of the next image in the batch.
    """

    share: jax.Array
    own: jax.Array
    cut: jax.Array
    mean: jax.Array
    other: jax.Array


def recurrence(
    params: Params, spec: NetworkSpec, xs: jax.Array, phases: Phases = SETTLED
) -> Recurrence:
    """What feedback does: to the states of the rate twin of `spec`, and to its answers.

    A network whose answers do not care about their feedback is a feed-forward one, however it is
    trained. All three numbers are invariant under the change of variables that trades feedback
    strength for the size of weights and states (docs/concepts/settling.md), so they can be compared
    between networks.

    Args:
        params: parameters of `spec`.
        spec: the network, of any neuron model.
        xs: inputs ``[B, *spec.input_shape]``, at least two.
        phases: the free phase in which the rate twin settles.

    Example:
        >>> spec = NetworkSpec((1,), (Dense(1), Dense(2)), feedback=0.5)
        >>> weights = ({"w": jnp.ones((1, 1))}, {"w": jnp.array([[0.5, 0.25]])})
        >>> params = tuple(w | {"b": jnp.zeros(w["w"].shape[1])} for w in weights)
        >>> found = recurrence(params, spec, jnp.array([[0.2], [0.4]]))
        >>> [round(float(share), 3) for share in found.share], float(found.cut)
        ([0.156, 0.156], 0.0)
    """
    found = feedback_answers(params, spec, xs, phases)
    cut, mean, other = (jnp.mean(a != found.own) for a in (found.cut, found.mean, found.other))
    return Recurrence(found.share, cut, mean, other)


@_with_full_products
def feedback_answers(
    params: Params, spec: NetworkSpec, xs: jax.Array, phases: Phases = SETTLED
) -> FeedbackAnswers:
    """The answers that `recurrence` compares; with labels they give errors. Arguments: see there.

    At the fixed point one pass from below, under the feedback held as it is, changes nothing; so
    whatever another feedback changes is its work.
    """
    network.check_params(spec, params)
    dynamics.check_inputs(spec, xs)
    if len(xs) < 2:
        raise ValueError("xs holds one example; expected two or more: another one's feedback is "
                         "asked for")  # fmt: skip
    twin = rate_twin(spec)
    prepared = network.prepare(params, twin)

    def rest(x: jax.Array) -> tuple[tuple[jax.Array | None, ...], State, State]:
        drives = network.input_drive(twin, prepared, x)
        state = dynamics.settle(twin, phases, Absolute(twin, prepared, drives), None).state
        return drives, state, network.feedback(twin, prepared, state)

    drives, states, heard = jax.lax.map(rest, xs, batch_size=min(len(xs), 64))
    nothing = jax.tree.map(jnp.zeros_like, heard)
    average = jax.tree.map(lambda h: jnp.broadcast_to(h.mean(0), h.shape), heard)
    others = jax.tree.map(lambda h: jnp.roll(h, 1, 0), heard)

    def under(feedback: State) -> State:
        return jax.lax.map(
            lambda of: network.pass_from_below(twin, prepared, *of),
            (drives, feedback),
            batch_size=min(len(xs), 64),
        )

    def answers(state: State) -> jax.Array:
        outputs = jax.vmap(lambda s: network.read_out(twin, prepared, s))(state[-1])
        return network.classify(outputs.reshape(len(outputs), -1))

    forward = under(nothing)
    share = [
        jnp.linalg.norm(s - f) / jnp.linalg.norm(s) for s, f in zip(states, forward, strict=True)
    ]
    own, cut, mean, other = map(answers, (states, forward, under(average), under(others)))
    return FeedbackAnswers(jnp.stack(share), own, cut, mean, other)


def suggest_phases(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    tolerance: float = 1e-3,
    max_sweeps: int = 400,
) -> Phases:
    """Phases in which all of some inputs settle: one-sided, ordered, in displacement coordinates.

    The relaxation is Young's optimum (`ep_jax.phases.optimal_relaxation`) for the largest spectral
    radius among the inputs: the slowest ones decide how many sweeps it takes. The sweeps are those
    after which every input is, and stays, within `tolerance` of its fixed point: the distance of
    each layer, relative. Of the nudged phase it is the displacement's; the nudge is towards the
    next class.

    Not to be jitted: what it returns is static.

    Args:
        params: parameters of `spec`.
        spec: the network. A noisy code may never come as close: ask for its rate twin's phases
            then, or for a larger `tolerance`.
        xs: inputs ``[B, *spec.input_shape]``.
        tolerance: the largest relative distance from the fixed point.
        max_sweeps: look no further than this.

    Raises:
        ValueError: an input has a radius of 1 or more, or does not settle in `max_sweeps` sweeps.

    Example:
        >>> spec = NetworkSpec((3,), (Dense(8), Dense(2)), neuron=Rate())
        >>> params = network.draw_params(jax.random.key(0), spec, gain=0.5)
        >>> phases = suggest_phases(params, spec, jnp.ones((4, 3)))
        >>> phases.relaxation > 1, phases.sweep, phases.coordinates
        (True, 'ordered', 'displacement')
    """
    network.check_params(spec, params)
    dynamics.check_inputs(spec, xs)
    check_number("tolerance", tolerance, above=0.0)
    check_integer("max_sweeps", max_sweeps, at_least=1)
    twin = rate_twin(spec)

    def radius(x: jax.Array) -> jax.Array:
        return spectral_radius(params, twin, x, dynamics.free_phase(params, twin, x, SETTLED)[0])

    radii = jax.jit(lambda xs: jax.lax.map(radius, xs, batch_size=min(len(xs), 64)))(xs)
    largest = float(radii.max())
    if not largest < 1.0:
        raise ValueError(f"xs holds an example whose relaxation has a spectral radius of "
                         f"{largest:.3g}; expected less than 1: without a contraction no number of "
                         "sweeps is enough")  # fmt: skip
    damped = getattr(spec.neuron, "damped", True)
    phases = Phases(
        free=max_sweeps,
        nudged=max_sweeps,
        beta=0.03,
        estimator="one_sided",
        sweep="ordered",
        coordinates="displacement",
        relaxation=optimal_relaxation(largest) if damped else 1.0,
    )
    found = jax.jit(sweeps_needed, static_argnames=("spec", "phases"))(
        params, spec, xs, phases, tolerance
    )
    free, nudged = int(found.free.max()), int(found.nudged.max())
    for name, needed in (("free", free), ("nudged", nudged)):
        if needed > max_sweeps:
            raise ValueError(f"max_sweeps is {max_sweeps}, after which the {name} phase of some of "
                             f"xs is not within tolerance={tolerance:g} of its fixed point; "
                             "expected more sweeps or a larger tolerance")  # fmt: skip
    return dataclasses.replace(phases, free=free, nudged=nudged)


class SweepsNeeded(NamedTuple):
    """How many sweeps inputs need; see `sweeps_needed`.

    Attributes:
        free: of the free phase, ``[B]``; one more than were made where that was not enough.
        nudged: of the nudged phase.
        rest: the fixed points of the free phase, arrays ``[B, ...]``.
    """

    free: jax.Array
    nudged: jax.Array
    rest: State


@_with_full_products
def sweeps_needed(
    params: Params, spec: NetworkSpec, xs: jax.Array, phases: Phases, tolerance: float = 1e-3
) -> SweepsNeeded:
    """Sweeps after which inputs are, and stay, within `tolerance` of their fixed points.

    It is the relative distance of each layer, of the nudged phase the displacement's. Fixed points
    are those of the rate twin, to rounding or after ten times as many sweeps.

    Args:
        params: parameters of `spec`.
        spec: the network.
        xs: inputs ``[B, *spec.input_shape]``.
        phases: the most sweeps that are counted, their order, relaxation and nudge, which is
            towards the next class. Tolerance and stragglers play no part.
        tolerance: the largest relative distance from the fixed point.

    Example:
        >>> spec = NetworkSpec((3,), (Dense(8), Dense(2)), neuron=Rate())
        >>> params = network.draw_params(jax.random.key(0), spec, gain=0.5)
        >>> found = sweeps_needed(params, spec, jnp.ones((4, 3)), Phases(free=50, nudged=50))
        >>> found.free.shape, bool(found.free.max() < 50)
        ((4,), True)
    """
    twin = rate_twin(spec)
    prepared = network.prepare(params, twin)
    keys = jax.random.split(jax.random.key(0), len(xs)) if spec.neuron.stochastic else None
    phases = dataclasses.replace(phases.without_stragglers(), tolerance=None)
    exact = dataclasses.replace(
        phases,
        free=10 * phases.free,
        nudged=10 * phases.nudged,
        tolerance=16 * float(jnp.finfo(xs.dtype).eps),
    )

    def needed(coordinates: Coordinates, key: jax.Array | None) -> tuple[jax.Array, State]:
        goal = dynamics.settle(twin, exact, coordinates, None).state
        logical = network.unpack(spec, goal)

        def distance(now: Snapshot) -> jax.Array:
            changes = (s - g for s, g in zip(now.state, logical, strict=True))
            return dynamics.largest(tuple(map(dynamics.relative_size, changes, logical)))

        away = dynamics.settle(spec, phases, coordinates, key, distance).info.trace
        last = jnp.max(jnp.where(away > tolerance, jnp.arange(len(away)), -1))
        return last + 2, goal

    def one(x: jax.Array, key: jax.Array | None) -> SweepsNeeded:
        coordinates = Absolute(spec, prepared, network.input_drive(spec, prepared, x))
        free, rest = needed(coordinates, key)
        base = base_of(spec, prepared, coordinates.swept(rest))
        answer = network.read_out(spec, prepared, rest[-1])
        chosen = jax.nn.one_hot(answer.argmax(), answer.size, dtype=x.dtype)
        target = jnp.roll(chosen, 1).reshape(answer.shape)
        nudge = Nudge(phases.beta, lambda s: network.cost_gradient(spec, prepared, s, target))
        nudged, _ = needed(Displacement(spec, prepared, base, nudge), key)
        return SweepsNeeded(free, nudged, network.unpack(spec, rest))

    return jax.lax.map(lambda args: one(*args), (xs, keys), batch_size=min(len(xs), 64))


AMBIGUOUS = 1e-2
"""States of one input further apart than this, in any unit, are different fixed points."""


class NotContractiveWarning(UserWarning):
    """EP's premise fails: its gradient need not be that of the cost."""


def check_contractivity(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    phases: Phases = SETTLED,
    tolerance: float = AMBIGUOUS,
) -> Contractivity:
    """`contractivity` of a batch, with a warning where EP's premise fails.

    Args:
        params: parameters of `spec`.
        spec: the network.
        xs: inputs ``[B, *spec.input_shape]``.
        phases: the free phase in which the rate twin settles.
        tolerance: states further apart than this are different fixed points.

    Warns:
        NotContractiveWarning: a fixed point with a spectral radius of at least 1, or one that
            depends on the start.
    """
    found = jax.jit(contractivity, static_argnames=("spec", "phases"))(params, spec, xs, phases)
    unstable = int(jnp.sum(~(found.radius < 1.0)))
    ambiguous = int(jnp.sum(~(found.disagreement < tolerance)))
    if unstable or ambiguous:
        warnings.warn(
            f"of {len(xs)} examples {unstable} have a relaxation with a spectral radius of 1 or "
            f"more (largest {float(found.radius.max()):.3g}), and {ambiguous} a state after "
            f"{phases.free} sweeps that depends on the start (distance of a unit up to "
            f"{float(found.disagreement.max()):.2g}): EP's gradient need not be that of the cost. "
            "Weaker feedback, weight decay or a smaller gain make the relaxation contractive",
            NotContractiveWarning,
            stacklevel=2,
        )
    return found
