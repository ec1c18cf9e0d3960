"""Implicit differentiation against closed forms and reverse mode through a long relaxation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    LinearNetwork,
    exact_gradient,
    flat,
    make_batch,
    make_params,
    one_hot,
    relative_error,
)

import ep_jax as ep

pytestmark = pytest.mark.usefixtures("x64")

implicit = jax.jit(
    ep.implicit_gradient, static_argnames=("spec", "phases", "tolerance", "max_sweeps")
)


@pytest.mark.parametrize("feedback", [1.0, 0.3])
def test_linear_network_in_closed_form(feedback: float) -> None:
    """A transpose, a power of alpha or a term of dF/dtheta that is missing, adjoint iterations off.

    Cut after n sweeps, the adjoint is ``sum_(k <= n) (M^T)^k dC/ds``, and its last change the last
    of these terms. Relative to what there is of the adjoint in a layer, that is the residual: it
    shows that the adjoint has not settled.
    """
    spec = ep.NetworkSpec(
        (4,), (ep.Dense(5), ep.Dense(6), ep.Dense(3)), ep.Rate(activation="linear"),
        feedback=feedback,
    )  # fmt: skip
    params, (xs, ys) = make_params(spec, seed=7, gain=0.4), make_batch(spec, 1)
    net = LinearNetwork(params, feedback, np.asarray(xs[0]), np.asarray(one_hot(spec, ys)[0]))
    phases = ep.Phases(free=150)
    grads, info = implicit(params, spec, xs, ys, phases)
    np.testing.assert_allclose(flat(grads), flat(net.exact()), atol=1e-13)
    np.testing.assert_allclose(info.output[0], net.rest(0)[net.at[-1]], atol=1e-13)
    assert float(info.nudged.residual) < 1e-14
    cut, info = implicit(params, spec, xs, ys, phases, max_sweeps=2)
    np.testing.assert_allclose(flat(cut), flat(net.truncated(3)), atol=1e-13)
    terms = [np.linalg.matrix_power(net.M.T, k) @ net.source() for k in range(3)]
    adjoint = np.sum(terms, axis=0)
    last = [np.linalg.norm(terms[2][at]) / np.linalg.norm(adjoint[at]) for at in net.at]
    np.testing.assert_allclose(info.nudged.residuals, last, atol=1e-12)
    np.testing.assert_allclose(info.nudged.residual, max(last), rtol=1e-9)
    assert float(info.nudged.unsettled) == 1


CASES: dict[str, Any] = {
    "avg": (ep.Conv(2, 3, padding="SAME"), "sigmoid", "cross_entropy", 1.0, 1.0),
    "max": (ep.Conv(3, 3, "max"), "softplus", "cross_entropy", 0.3, 0.5),
    "no pool": (ep.Conv(2, 3, pool=None), "tanh", "squared_error", 0.3, 0.7),
}


@pytest.mark.parametrize("name", CASES)
def test_is_reverse_mode_through_a_long_relaxation(name: str) -> None:
    """Anything the sweeps do that the adjoint does not know: feedback, routing, read-out, pools."""
    conv, activation, cost, feedback, gain = CASES[name]
    spec = ep.NetworkSpec(
        (6, 6, 1), (conv, ep.Dense(5), ep.Dense(3)), ep.Rate(activation=activation), cost, feedback
    )
    params, (xs, ys) = make_params(spec, seed=1, gain=gain), make_batch(spec, 3)
    exact = exact_gradient(params, spec, xs, ys, 120)
    grads, info = implicit(params, spec, xs, ys, ep.Phases(free=120))
    assert float(info.free.residual) < 1e-12
    for ours, expected in zip(grads, exact, strict=True):
        assert relative_error(ours, expected) < 1e-9


def test_clipped_units_have_no_gradient() -> None:
    """A kink on the wrong side: hard-sigmoid units at rest beyond their bounds do not learn."""
    spec = ep.NetworkSpec((8, 8, 1), (ep.Conv(3, 3), ep.Dense(8), ep.Dense(3)), feedback=0.5)
    rate = ep.NetworkSpec(spec.input_shape, spec.layers, ep.Rate(), feedback=0.5)
    params, (xs, ys) = make_params(spec, seed=2, gain=0.5, bias=1.0), make_batch(spec, 3)
    settle = jax.jit(ep.free_phase, static_argnames=("spec", "phases"))
    hidden = settle(params, rate, xs[0], ep.Phases(free=80))[0][1]
    still = (hidden == 0) | (hidden == 1)
    assert 2 <= int(still.sum()) <= 6
    exact = exact_gradient(params, rate, xs[:1], ys[:1], 80)
    grads, _ = implicit(params, rate, xs[:1], ys[:1], ep.Phases(free=80))
    assert relative_error(grads, exact) < 1e-12
    np.testing.assert_array_equal(grads[1]["b"] == 0, still)


def test_spiking_states_have_the_adjoint_of_rates_where_they_are() -> None:
    """An adjoint at another state than the read-out, or one that differentiates spikes.

    As the quantum of a delta code falls the read-out tends to the fixed point of rates, and the
    gradient to theirs, each by ``decay`` a sweep: from 30 sweeps to 60 by 0.8^30 = 1 / 800, but
    for the part of a quantum that an error happens to be.
    """
    layers = (ep.Conv(3, 3), ep.Dense(6), ep.Dense(3))
    spec, rate = (
        ep.NetworkSpec((8, 8, 1), layers, neuron, feedback=0.3)
        for neuron in (ep.DeltaCode(0.7, 0.8), ep.Rate())
    )
    params, (xs, ys) = make_params(spec, seed=1, gain=0.7), make_batch(spec, 2)
    exact, _ = implicit(params, rate, xs, ys, ep.Phases(free=150))
    errors = []
    for free in (30, 60):
        grads, info = implicit(params, spec, xs, ys, ep.Phases(free=free, sweep="alternating"))
        errors.append(relative_error(grads, exact))
        assert float(info.nudged.residual) < 1e-13
    assert 0.2 < errors[1] / errors[0] / 0.8**30 < 5, errors


def test_memory_does_not_grow_with_the_number_of_sweeps() -> None:
    """Anything that is kept of each sweep, free or adjoint."""
    spec = ep.NetworkSpec((64,), (ep.Dense(64), ep.Dense(64), ep.Dense(3)), ep.Rate())
    params = jax.eval_shape(lambda: ep.init_params(jax.random.key(0), spec))
    xs = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    ys = jax.ShapeDtypeStruct((32,), jnp.int32)
    sizes = []
    for steps in (10, 1000):
        lowered = implicit.lower(params, spec, xs, ys, ep.Phases(free=steps), max_sweeps=steps)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        sizes.append(analysis.temp_size_in_bytes)
    assert 0.02 * min(sizes) < 4 * 32 * 900  # one number of each example and sweep would show
    assert max(sizes) <= 1.02 * min(sizes), sizes


def test_tolerance_is_a_part_of_the_norm() -> None:
    """A tolerance that is not used, or stops far from where it says.

    The adjoint's series falls by some half a sweep here: what is cut off is of the size of the last
    change, and that of the gradient of the same order.
    """
    spec = ep.NetworkSpec((5,), (ep.Dense(8), ep.Dense(6), ep.Dense(3)), ep.Rate())
    params, (xs, ys) = make_params(spec, gain=0.6, bias=0.1), make_batch(spec, 2)
    far = 1e4 * one_hot(spec, ys)  # a large cost has a large adjoint
    settings = {"params": params, "spec": spec, "xs": xs, "ys": far, "phases": ep.Phases(free=200)}
    exact, _ = implicit(**settings)
    early, _ = implicit(**settings, tolerance=1e-3)
    assert 1e-5 < relative_error(early, exact) < 1e-2
