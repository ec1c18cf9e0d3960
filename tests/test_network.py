"""Phi, energy and currents against plain sums in numpy; the specification as a static argument."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_params, make_state, one_hot, reference_current, reference_nudge

import ep_jax as ep
from ep_jax import network

pytestmark = pytest.mark.usefixtures("x64")

LAYERS = (
    ep.Conv(2, 3, padding="SAME"),
    ep.Conv(3, 2, pool="max"),
    ep.Conv(2, 1, pool=None),
    ep.Dense(4),
    ep.Dense(3),
)


def numpy_affine(layer: Any, p: Any, s: np.ndarray) -> np.ndarray:
    """A layer's drive by loops over pixels, so that nothing is shared with any library."""
    w, b = np.asarray(p["w"]), np.asarray(p["b"])
    if isinstance(layer, ep.Dense):
        return s.reshape(-1) @ w + b
    k = layer.kernel
    if layer.padding == "SAME":
        before = (k - 1) // 2
        s = np.pad(s, ((before, k - 1 - before), (before, k - 1 - before), (0, 0)))
    h, width = s.shape[0] - k + 1, s.shape[1] - k + 1
    out = np.empty((h, width, layer.features))
    for i in range(h):
        for j in range(width):
            out[i, j] = np.tensordot(s[i : i + k, j : j + k], w, 3) + b
    if layer.pool is None:
        return out
    windows = np.stack([out[i::2, j::2] for i in (0, 1) for j in (0, 1)])
    return windows.mean(0) if layer.pool == "avg" else windows.max(0)


@pytest.mark.parametrize(
    ("feedback", "cost"),
    [(1.0, "squared_error"), (0.5, "cross_entropy"), (0.1, "squared_error")],
)
def test_phi_and_energy_are_the_sums_of_the_papers(feedback: float, cost: Any) -> None:
    """Wrong weights ``alpha^(l - L)``, a bias left out, or L counted with the read-out."""
    spec = ep.NetworkSpec((6, 10, 1), LAYERS, ep.Rate(), cost, feedback)
    params, state = make_params(spec), make_state(spec)
    x = np.random.default_rng(3).normal(size=spec.input_shape)
    s = [np.asarray(v) for v in state]
    L = 5 if cost == "squared_error" else 4
    phi, self_energy, below = 0.0, 0.0, x
    for l in range(L):
        phi += feedback ** (l + 1 - L) * (numpy_affine(LAYERS[l], params[l], below) * s[l]).sum()
        self_energy += feedback ** (l + 1 - L) * (s[l] ** 2).sum() / 2
        below = s[l]
    ours = jax.jit(lambda x, s: (ep.phi(params, spec, x, s), ep.energy(params, spec, x, s)))
    value, energy = ours(x, state)
    np.testing.assert_allclose(value, phi, rtol=1e-12)
    np.testing.assert_allclose(energy, self_energy - phi, rtol=1e-12)


@pytest.mark.parametrize(
    ("pool", "feedback", "cost"),
    [
        ("avg", 1.0, "squared_error"),
        ("avg", 0.3, "cross_entropy"),
        ("max", 0.3, "squared_error"),
        (None, 0.3, "cross_entropy"),
    ],
)
def test_one_step_follows_the_derivative_of_phi(pool: Any, feedback: float, cost: Any) -> None:
    """Any error in the currents or the nudge, seen from outside.

    One synchronous linear step from any state is ``s + eps (alpha^(L-l) dPhi/ds_l - s)``, on the
    last layer with ``-beta dC/ds_L`` added.
    """
    epsilon, beta, label = 0.7, -0.4, 2
    spec = ep.NetworkSpec(
        (8, 6, 2),
        (ep.Conv(2, 1, pool=None), ep.Conv(3, 3, pool, padding="SAME"), ep.Dense(4), ep.Dense(3)),
        ep.Rate(epsilon, "linear"),
        cost,
        feedback,
    )
    params, state = make_params(spec), make_state(spec)
    x = jnp.asarray(np.random.default_rng(3).normal(size=spec.input_shape))

    @jax.jit
    def both(state: Any) -> Any:
        phases = ep.Phases(nudged=1, sweep="synchronous", coordinates="absolute")
        ours, _ = ep.nudged_phase(params, spec, x, label, state, beta, phases)
        L = len(state)
        drives = [reference_current(params, spec, x, state, l) for l in range(L)]
        y = one_hot(spec, jnp.asarray(label))
        drives[-1] += beta * reference_nudge(params, spec, state[-1], y)
        return ours, tuple(s + epsilon * (i - s) for s, i in zip(state, drives, strict=True))

    ours, expected = both(state)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_pack_and_unpack_of_a_state() -> None:
    """States of one layer laid out for another: every layer is read by the one above it."""
    spec = ep.NetworkSpec((10, 10, 1), (ep.Conv(2, 3), ep.Conv(3, 3), ep.Dense(2)), ep.Rate())
    state = make_state(spec)
    packed = network.pack(spec, state)
    assert [p.shape for p in packed] == [(2, 2, 8), (3,), (2,)]
    for a, b in zip(network.unpack(spec, packed), state, strict=True):
        np.testing.assert_array_equal(a, b)


def test_init_params_scale_with_fan_in() -> None:
    """A fan that counts outputs, or forgets the kernel's area; float64 asked for and not given."""
    spec = ep.NetworkSpec((8, 8, 8), (ep.Conv(40, 5), ep.Dense(100), ep.Dense(10)), ep.Rate())
    params = ep.init_params(jax.random.key(0), spec, gain=0.5, dtype=jnp.float64)
    for p, fan_in in zip(params, (5 * 5 * 8, 2 * 2 * 40, 100), strict=True):
        variance = 0.25 / fan_in
        # A uniform variable's square has variance 4/5 of its squared mean: five standard errors.
        tolerance = 5 * math.sqrt(0.8 / p["w"].size)
        assert abs(float(jnp.mean(p["w"] ** 2)) / variance - 1) < tolerance
        assert float(jnp.abs(p["w"]).max()) <= math.sqrt(3 * variance)
        assert not p["b"].any()
        assert p["w"].dtype == p["b"].dtype == jnp.float64
    default = jax.eval_shape(lambda: ep.init_params(jax.random.key(0), spec))
    assert {a.dtype for a in jax.tree.leaves(default)} == {jnp.dtype(jnp.float32)}


def test_equal_specifications_share_one_compiled_function() -> None:
    """A specification that is not hashed by value: every call of a training loop would compile."""
    traced = []

    def f(x: jax.Array, spec: ep.NetworkSpec) -> jax.Array:
        traced.append(spec)
        return x * spec.feedback

    jitted = jax.jit(f, static_argnames="spec")
    for layers in [(ep.Dense(3), ep.Dense(2)), [ep.Dense(3), ep.Dense(2)]]:
        jitted(jnp.ones(2), spec=ep.NetworkSpec((4,), layers, ep.Rate(), feedback=0.5))
    assert len(traced) == 1
    jitted(jnp.ones(2), spec=ep.NetworkSpec((4,), (ep.Dense(3), ep.Dense(2)), ep.Rate()))
    assert len(traced) == 2


@pytest.mark.parametrize("hidden", [1, 3, 6])
def test_a_network_starts_with_the_radius_asked_for(hidden: int) -> None:
    """At any depth, for inputs that were not there; what comes from the input keeps its gain."""
    layers = (*(ep.Dense(60) for _ in range(hidden)), ep.Dense(10))
    spec = ep.NetworkSpec((40,), layers, ep.Rate())
    drawn = ep.init_params(jax.random.key(0), spec, dtype=jnp.float64)
    params = ep.init_params(jax.random.key(0), spec, dtype=jnp.float64, radius=0.8)
    xs = jax.random.uniform(jax.random.key(1), (8, 40))
    radius = ep.diagnostics.contractivity(params, spec, xs).radius
    assert abs(float(radius.mean()) - 0.8) < 0.06
    np.testing.assert_array_equal(params[0]["w"], drawn[0]["w"])
    scales = [float(p["w"][0, 0] / d["w"][0, 0]) for p, d in zip(params, drawn, strict=True)]
    np.testing.assert_allclose(scales[1:], scales[1], rtol=1e-12)


def test_a_radius_is_of_a_loop_that_comes_to_rest() -> None:
    spec = ep.NetworkSpec((4,), (ep.Dense(3), ep.Dense(2)))
    for radius in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="radius is"):
            ep.init_params(jax.random.key(0), spec, radius=radius)
    with pytest.raises(ValueError, match="one layer"):
        ep.init_params(jax.random.key(0), ep.NetworkSpec((4,), (ep.Dense(2),)), radius=0.5)
