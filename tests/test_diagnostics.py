"""Diagnostics on numbers made by hand, dense matrices and the theorems they stand for."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    exact_gradient,
    flat,
    make_batch,
    make_params,
    make_state,
    reference_current,
    relative_error,
)
from jax.flatten_util import ravel_pytree

import ep_jax as ep
from ep_jax import diagnostics, network

pytestmark = pytest.mark.usefixtures("x64")


def layer(w: Any, b: Any) -> dict[str, jax.Array]:
    return {"w": jnp.asarray(w, float), "b": jnp.asarray(b, float)}


# Gradients compared.


@pytest.mark.usefixtures("nans_allowed")
def test_agreement_of_gradients_made_by_hand() -> None:
    """Norms of weights alone, a mean of layers for the total, estimate and exact exchanged."""
    exact = (layer([3, 0], [4]), layer([[0, 12]], [0]), layer([0], [0]))
    estimate = (layer([1, 0], [0]), layer([[0, -12]], [0]), layer([0], [1]))
    found = diagnostics.compare(estimate, exact)
    np.testing.assert_allclose(found.cosine, [0.6, -1, np.nan])
    np.testing.assert_allclose(found.norm_ratio, [0.2, 1, np.inf])
    np.testing.assert_allclose(found.relative_error, [np.sqrt(20) / 5, 2, np.inf])
    np.testing.assert_allclose(found.total_cosine, (3 - 144) / 13 / np.sqrt(146))
    np.testing.assert_allclose(found.total_norm_ratio, np.sqrt(146) / 13)
    np.testing.assert_allclose(found.total_relative_error, np.sqrt(20 + 24**2 + 1) / 13)


def test_bias_and_variance_are_unbiased() -> None:
    """A squared bias that holds the variance of the mean, a divisor S, batches mixed up.

    Estimates ``exact + shift + noise`` of five seeds: over many repetitions bias and variance are
    ``|shift|^2`` and ``n sigma^2`` over ``|exact|^2``, in five standard errors, shift or none.
    """
    repeats, seeds, sigma = 4000, 5, 0.5
    exact = (layer([1, -2, 0], [2]), layer([[1, 2]], [4]))
    shift = (layer([0.3, 0, 0], [-0.1]), layer([[0, 0]], [0]))
    rng = np.random.default_rng(0)

    def noisy(value: Any, by: Any) -> Any:
        noise = rng.normal(size=(repeats, seeds, *value.shape))
        return np.asarray(value) + np.asarray(by) + sigma * noise

    estimates = jax.tree.map(noisy, exact, shift)
    found = jax.jit(jax.vmap(diagnostics.bias_and_variance, in_axes=(0, None)))(estimates, exact)
    for l, (squared, size) in enumerate(((0.1 / 9, 4), (0.0, 3))):
        norm = 9 if l == 0 else 21
        for ours, expected in (
            (found.bias[:, l], squared),
            (found.variance[:, l], size * sigma**2 / norm),
        ):
            standard_error = float(jnp.std(ours)) / repeats**0.5
            assert abs(float(jnp.mean(ours)) - expected) < 5 * standard_error
    # No noise: the bias is exact, and an exact gradient for each seed is subtracted from its own.
    truths = jax.tree.map(lambda v: jnp.stack([v, 2 * v, 3 * v]), exact)
    shifted = jax.tree.map(lambda t, by: t + jnp.stack([by] * 3), truths, shift)
    still = diagnostics.bias_and_variance(shifted, truths)
    np.testing.assert_allclose(still.bias, [0.1 / (9 * 14 / 3), 0], atol=1e-15)
    np.testing.assert_allclose(still.variance, 0, atol=1e-15)


def test_exact_gradient_is_that_of_the_rate_twin() -> None:
    """A twin of another activation, cost or feedback, or one that has not settled."""
    spec = ep.NetworkSpec(
        (8, 8, 1), (ep.Conv(3, 3), ep.Dense(6), ep.Dense(3)), ep.DeltaCode(), "cross_entropy", 0.5
    )
    params, (xs, ys) = make_params(spec, seed=2, gain=0.7), make_batch(spec, 2)
    rate = ep.NetworkSpec(spec.input_shape, spec.layers, ep.Rate(), spec.cost, spec.feedback)
    ours = jax.jit(diagnostics.exact_gradient, static_argnames=("spec", "phases"))
    exact = exact_gradient(params, rate, xs, ys, 120)
    assert relative_error(ours(params, spec, xs, ys), exact) < 1e-12


# Gradient-descending updates.

CURVES: dict[str, Any] = {
    "squared error": ("tanh", "squared_error", 1.0, 0.5),
    "cross-entropy, weak feedback": ("softplus", "cross_entropy", 0.3, 0.5),
}


@pytest.mark.parametrize("name", CURVES)
def test_ep_and_bptt_agree_sweep_by_sweep(name: str) -> None:
    """Curves that agree in their sum alone; an index, sign, power of alpha or 1/B that is off.

    Both curves of the first ten sweeps, to the order of beta squared. BPTT's, independently: their
    sum is the gradient truncated to ten sweeps, and a bias is used once by each unit, so its curve
    is the batch mean of the units' curves, summed over space.
    """
    activation, cost, feedback, gain = CURVES[name]
    spec = ep.NetworkSpec(
        (6, 6, 1), (ep.Conv(3, 3), ep.Dense(6), ep.Dense(5), ep.Dense(3)),
        ep.Rate(activation=activation), cost, feedback,
    )  # fmt: skip
    params, (xs, ys) = make_params(spec, seed=3, gain=gain), make_batch(spec, 2)
    phases = ep.Phases(150, 10, 1e-4, sweep="synchronous", coordinates="absolute")
    curves = jax.jit(diagnostics.gdu, static_argnames=("spec", "phases"))(
        params, spec, xs, ys, phases
    )
    L = spec.depth
    for l in range(L):
        ep_state, bptt_state = (np.asarray(c[l]) for c in (curves.ep_state, curves.bptt_state))
        assert ep_state.shape == (10, 2, *spec.state_shapes[l])
        largest = np.abs(bptt_state).max(axis=tuple(range(1, bptt_state.ndim)))
        # News of the nudge comes after L - l sweeps, then in every second one.
        assert [t for t in range(10) if largest[t] > 0] == list(range(L - 1 - l, 10, 2))
        np.testing.assert_allclose(ep_state, bptt_state, rtol=0, atol=1e-6 * largest.max())
        for kind in ("w", "b"):
            expected = np.asarray(curves.bptt_params[l][kind])
            atol = 1e-6 * np.abs(expected).max()
            np.testing.assert_allclose(curves.ep_params[l][kind], expected, rtol=0, atol=atol)
        units = bptt_state.mean(1).reshape(10, -1, spec.state_shapes[l][-1]).sum(1)
        np.testing.assert_allclose(curves.bptt_params[l]["b"], units, rtol=0, atol=1e-14)
    truncated = jax.jit(ep.bptt_gradient, static_argnames=("spec", "phases", "tracked"))(
        params, spec, xs, ys, phases, tracked=10
    )[0]
    summed = jax.tree.map(lambda g: -g.sum(0), curves.bptt_params)
    np.testing.assert_allclose(flat(summed[:L]), flat(truncated[:L]), atol=1e-12)
    errors = diagnostics.curve_errors(curves.ep_state, curves.bptt_state)
    assert float(errors.rmse.max()) < 1e-6
    assert float(errors.sign_error.max()) == 0
    flipped = (*curves.ep_state[:-1], -curves.ep_state[-1])
    wrong = diagnostics.curve_errors(flipped, curves.bptt_state)
    np.testing.assert_allclose(wrong.sign_error, [0] * (L - 1) + [1])
    np.testing.assert_allclose(wrong.rmse[-1], 2, rtol=1e-6)


def test_curve_errors_of_curves_made_by_hand() -> None:
    """Zeros that count as wrong signs, a scale of one side alone, layers mixed up."""
    ep_curves = (jnp.array([[1.0, 2.0, 0.0]]), layer([4, -4], [0]))
    bptt = (jnp.array([[1.0, -2.0, 3.0]]), layer([4, -4], [0]))
    found = diagnostics.curve_errors(ep_curves, bptt)
    np.testing.assert_allclose(found.rmse, [np.sqrt(25 / 14), 0])
    np.testing.assert_allclose(found.sign_error, [1 / 2, 0])
    exchanged = diagnostics.curve_errors(bptt, ep_curves)
    np.testing.assert_allclose(exchanged.rmse, found.rmse)


# The map of the relaxation.

MAPS: dict[str, Any] = {
    "avg": (ep.Conv(3, 3), "tanh", "squared_error", 1.0, 0.6),
    "max, weak feedback": (ep.Conv(3, 3, "max"), "softplus", "cross_entropy", 0.3, 0.7),
    "clipped": (ep.Conv(3, 3), "hard_sigmoid", "cross_entropy", 0.3, 1.2),
}
SIGMA = {
    "tanh": jnp.tanh, "softplus": jax.nn.softplus, "hard_sigmoid": lambda x: jnp.clip(x, 0, 1)
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_spectral_radius_is_that_of_the_dense_jacobian(name: str) -> None:
    """A metric in which the map is not self-adjoint, slopes of another state, units lost.

    The Jacobian of a sweep written out with Phi's derivatives, its eigenvalues by LAPACK; and the
    residual of a synchronous relaxation falls by just so much a sweep.
    """
    conv, activation, cost, feedback, gain = MAPS[name]
    spec = ep.NetworkSpec(
        (6, 6, 1), (conv, ep.Dense(8), ep.Dense(3)), ep.Rate(activation=activation), cost, feedback
    )
    params, (xs, _) = make_params(spec, seed=1, gain=gain), make_batch(spec, 1)

    @jax.jit
    def settle(x: jax.Array) -> Any:
        phases = ep.Phases(free=200, sweep="synchronous")
        return ep.free_phase(params, spec, x, phases, trace=lambda seen: seen.change)

    state, info = settle(xs[0])
    if activation == "hard_sigmoid":
        clipped = sum(int(jnp.sum((s == 0) | (s == 1))) for s in state)
        assert 5 < clipped < sum(s.size for s in state) - 5
    vector, unravel = ravel_pytree(state)

    def sweep(vector: jax.Array) -> jax.Array:
        s, new = unravel(vector), []
        for l in range(spec.depth):
            is_output = l == spec.depth - 1 and cost == "squared_error"
            drive = reference_current(params, spec, xs[0], s, l)
            new.append(drive if is_output else SIGMA[activation](drive))
        return ravel_pytree(tuple(new))[0]

    eigenvalues = np.linalg.eigvals(np.asarray(jax.jit(jax.jacobian(sweep))(vector)))
    expected = np.abs(eigenvalues).max()
    assert 0.1 < expected < 1
    radius = jax.jit(diagnostics.spectral_radius, static_argnames=("spec", "iterations"))
    np.testing.assert_allclose(
        radius(params, spec, xs[0], state, iterations=2000), expected, rtol=1e-9
    )
    if name == "clipped":
        roughly = float(radius(params, spec, xs[0], state))
        assert 0.98 * expected < roughly <= expected * (1 + 1e-12)
    residuals = np.asarray(info.trace)
    last = np.argmax(residuals < 1e-11)  # far above rounding
    falls = (residuals[last] / residuals[last - 10]) ** 0.1
    assert abs(falls / expected - 1) < 0.02, (falls, expected)


def pair(weight: float) -> tuple[ep.NetworkSpec, Any]:
    """Two units ``h = tanh(w o + x)``, ``o = w h``: a pitchfork at w = 1."""
    spec = ep.NetworkSpec((1,), (ep.Dense(1), ep.Dense(1)), ep.Rate(activation="tanh"))
    return spec, (layer([[1]], [0]), layer([[weight]], [0]))


def test_contractive_network_is_let_through() -> None:
    """A warning for all, or a distance between states that have not settled."""
    spec, params = pair(0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnostics.check_contractivity(params, spec, jnp.array([[0.0], [0.5]]))
    np.testing.assert_allclose(found.radius[0], 0.9, rtol=1e-12)  # all slopes are 1 at rest
    assert 0.1 < float(found.radius[1]) < 0.9
    assert float(found.disagreement.max()) < 1e-12
    assert float(found.residual.max()) < 1e-12


def test_multistable_network_is_warned_of() -> None:
    """A check that starts from zero alone, where this network rests, unstably.

    At w = 2 zero is a fixed point with a radius of 2, and ``h = tanh(4 h)`` has two others, with
    ``o = 2 h``; positive starts reach the positive one.
    """
    spec, params = pair(2.0)
    h = 1.0
    for _ in range(50):
        h = np.tanh(4 * h)
    with pytest.warns(diagnostics.NotContractiveWarning) as caught:
        found = diagnostics.check_contractivity(params, spec, jnp.zeros((3, 1)))
    np.testing.assert_allclose(found.radius, 2, rtol=1e-12)
    np.testing.assert_allclose(found.disagreement, 2 * h, rtol=1e-12)
    said = str(caught[0].message)
    for part in ("of 3 examples 3", "largest 2)", "and 3 a state", "200 sweeps", "up to 2)"):
        assert part in said, said
    assert caught[0].filename == __file__  # the warning points at who asked


# Distance to the fixed points of rates.


@pytest.mark.parametrize("fold", [True, False])
def test_connections_are_what_a_drive_hangs_on(fold: bool) -> None:
    """A kernel of the wrong size, positions before and after the pool confused."""
    spec = ep.NetworkSpec(
        (8, 8, 1), (ep.Conv(2, 3), ep.Conv(3, 2, "avg", fold=fold), ep.Dense(2)), ep.Rate()
    )
    params = make_params(spec)
    prepared, edges = network.prepare(params, spec), spec.edges
    first = jax.jacobian(lambda x: network.input_drive(spec, prepared, x)[0])(jnp.zeros((8, 8, 1)))
    counted = diagnostics.connections(spec)
    assert counted[0] == np.count_nonzero(first)
    if fold:
        below = network.pack(spec, make_state(spec))[0]
        second = jax.jacobian(lambda s: network.drive(spec, prepared, edges[1], s))(below)
        assert counted[1] == np.count_nonzero(second)
    else:  # 2x2 kernels at 2x2 positions that are pooled
        assert counted[1] == 4 * (2 * 2 * 2) * 3
    assert diagnostics.synaptic_operations(spec, (1.0, 0.0, 0.0)) == counted[1]
    assert diagnostics.synaptic_operations(spec, (0.0, 1.0, 0.0)) == counted[1] + counted[2]


def test_distance_to_rates_falls_with_the_quantum() -> None:
    """A distance to another network's fixed point, or one in other units than it says."""
    layers = (ep.Conv(3, 3), ep.Dense(6), ep.Dense(3))
    rate, spec = (
        ep.NetworkSpec((8, 8, 1), layers, neuron, feedback=0.3)
        for neuron in (ep.Rate(), ep.DeltaCode(0.7, 0.8))
    )
    params, (xs, _) = make_params(spec, seed=1, gain=0.7), make_batch(spec, 2)
    distance = jax.jit(diagnostics.distance_to_rate, static_argnames=("spec", "phases"))
    none = distance(params, rate, xs, ep.Phases(free=150, sweep="synchronous"))
    assert float(none.rms.max()) < 1e-13
    sweeps, found = (30, 60), []
    for free in sweeps:
        found.append(distance(params, spec, xs, ep.Phases(free=free, sweep="synchronous")))
        assert float(found[-1].info.spikes[0]) > 1
    # An error of some part of a quantum: it falls by 0.8^30 = 1 / 800, but for that part.
    falls = np.asarray(found[1].rms / found[0].rms) / 0.8**30
    assert falls.max() < 5, falls
    assert falls.min() > 0.2, falls
    states, fixed = (
        jax.jit(jax.vmap(lambda x, s=s, p=p: ep.free_phase(params, s, x, p)[0]))(xs)
        for s, p in (
            (spec, ep.Phases(free=30, sweep="synchronous")),
            (rate, ep.Phases(free=150, sweep="ordered")),
        )
    )
    rms = [float(jnp.sqrt(jnp.mean((a - b) ** 2))) for a, b in zip(states, fixed, strict=True)]
    size = [float(jnp.sqrt(jnp.mean(b**2))) for b in fixed]
    np.testing.assert_allclose(found[0].rms, rms, rtol=1e-6)
    np.testing.assert_allclose(found[0].relative, np.divide(rms, size), rtol=1e-6)


def test_gradients_are_compared_layer_by_layer_whatever_holds_them() -> None:
    """A mapping by number, as of flax: its keys were taken for the layers."""
    a = ({"w": jnp.ones(3)}, {"w": jnp.ones(3)})
    b = ({"w": jnp.arange(3.0)}, {"w": -jnp.arange(3.0)})
    expected = ep.diagnostics.compare(a, b).cosine
    held = [dict(enumerate(g)) for g in (a, b)]
    np.testing.assert_array_equal(ep.diagnostics.compare(*held).cosine, expected)
    states = [nnx.State(h) for h in held]
    np.testing.assert_array_equal(ep.diagnostics.compare(*states).cosine, expected)
    neither: Any = jnp.ones(3)
    with pytest.raises(TypeError, match="estimate is"):
        ep.diagnostics.compare(neither, b)
