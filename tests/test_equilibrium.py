"""The EP gradient against closed forms, exact reverse-mode and its own definition."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    LinearNetwork,
    affine,
    exact_gradient,
    flat,
    make_batch,
    make_params,
    one_hot,
    reference_cost,
    relative_error,
    slow,
)

import ep_jax as ep

pytestmark = pytest.mark.usefixtures("x64")


def gradient(spec: ep.NetworkSpec, **settings: Any) -> Any:
    """A jitted ``(params, xs, ys, beta, key) -> (grads, info)``, one compilation for all beta.

    Sweeps are synchronous and coordinates absolute, as the papers have it, unless `settings` say.
    """
    settings = {"sweep": "synchronous", "coordinates": "absolute"} | settings

    @jax.jit
    def run(params: Any, xs: Any, ys: Any, beta: Any = 0.1, key: Any = None) -> Any:
        return ep.ep_gradient(params, spec, xs, ys, ep.Phases(beta=beta, **settings), key)

    return run


# A linear network: everything in closed form.


@pytest.mark.parametrize(
    ("feedback", "coordinates"), [(1.0, "absolute"), (0.3, "absolute"), (0.3, "displacement")]
)
def test_linear_network_in_closed_form(feedback: float, coordinates: Any) -> None:
    """Any wrong sign, transpose or power of alpha in currents, nudge or estimator, at any beta."""
    spec = ep.NetworkSpec(
        (4,), (ep.Dense(5), ep.Dense(6), ep.Dense(3)), ep.Rate(activation="linear"),
        feedback=feedback,
    )  # fmt: skip
    params, (xs, ys) = make_params(spec, seed=7, gain=0.4), make_batch(spec, 1)
    net = LinearNetwork(params, feedback, np.asarray(xs[0]), np.asarray(one_hot(spec, ys)[0]))
    phases = ep.Phases(300, 300, sweep="synchronous", coordinates=coordinates)

    @jax.jit
    def states(beta: Any) -> Any:
        free, _ = ep.free_phase(params, spec, xs[0], phases)
        return free, ep.nudged_phase(params, spec, xs[0], ys[0], free, beta, phases)[0]

    for beta in (0.5, -0.3):
        for ours, strength in zip(states(beta), (0, beta), strict=True):
            np.testing.assert_allclose(np.concatenate(ours), net.rest(strength), atol=1e-12)
    # (I + beta G) (y - s_L) does not depend on beta, with G the response of s_L to a push on it.
    G = np.linalg.inv(np.eye(14) - net.M)[net.at[-1], net.at[-1]]
    misses = [net.y - net.rest(beta)[net.at[-1]] for beta in (0, 0.5)]
    np.testing.assert_allclose(misses[0], misses[1] + 0.5 * G @ misses[1], atol=1e-12)
    for estimator in ("symmetric", "one_sided"):
        run = gradient(spec, free=300, nudged=300, estimator=estimator, coordinates=coordinates)
        for beta in (0.5, 0.01):
            grads, info = run(params, xs, ys, beta)
            assert relative_error(grads, net.estimate(beta, estimator == "symmetric")) < 1e-9
            np.testing.assert_allclose(info.cost, (misses[0] ** 2).sum() / 2, rtol=1e-12)
            np.testing.assert_allclose(info.output[0], net.y - misses[0], atol=1e-12)
    # With both errors at finite beta known, the limit is the closed form of the gradient.
    assert relative_error(net.estimate(1e-4, True), net.exact()) < 1e-7
    assert relative_error(net.estimate(0.5, True), net.exact()) > 1e-3


# Exact reverse-mode through the relaxation.

CONV = (ep.Conv(3, 3), ep.Dense(6), ep.Dense(3))
DEEP = (ep.Conv(3, 2, padding="SAME"), ep.Conv(2, 3, pool=None), ep.Dense(3))
MAX = (ep.Conv(3, 3, "max"), ep.Dense(5), ep.Dense(3))
SMOOTH = {
    "tanh": ("tanh", CONV, "squared_error", 1.0, "absolute"),
    "sigmoid, cross-entropy": ("sigmoid", DEEP, "cross_entropy", 0.3, "absolute"),
    "softplus, cross-entropy": ("softplus", CONV, "cross_entropy", 0.3, "displacement"),
    "tanh, max pool": ("tanh", MAX, "squared_error", 0.3, "absolute"),
}


def slope(betas: tuple[float, ...], errors: list[float]) -> float:
    return float(np.polyfit(np.log(betas), np.log(errors), 1)[0])


@pytest.mark.parametrize("name", SMOOTH)
def test_error_falls_as_theory_says(name: str) -> None:
    """Any estimator that is only nearly the gradient of the cost.

    Against reverse-mode through the converged relaxation: the symmetric estimate is an even
    function of beta, so its error is of order beta squared; one-sided it is of order beta. The
    read-out of cross-entropy, outside the dynamics, has the exact gradient.
    """
    activation, layers, cost, feedback, coordinates = SMOOTH[name]
    spec = ep.NetworkSpec((8, 8, 1), layers, ep.Rate(activation=activation), cost, feedback)
    params, (xs, ys) = make_params(spec, seed=1, gain=0.7), make_batch(spec, 3)
    exact = exact_gradient(params, spec, xs, ys, 120)
    betas = (1e-1, 1e-2, 1e-3)
    for estimator, order in (("symmetric", 2), ("one_sided", 1)):
        run = gradient(spec, free=120, nudged=120, estimator=estimator, coordinates=coordinates)
        grads = [run(params, xs, ys, beta)[0] for beta in betas]
        inside = slice(None if cost == "squared_error" else -1)
        errors = [relative_error(g[inside], exact[inside]) for g in grads]
        assert abs(slope(betas, errors) - order) < 0.1, errors
        if order == 2:
            assert errors[-1] < 1e-5
        if cost == "cross_entropy":
            assert relative_error(grads[0][-1], exact[-1]) < 1e-10


def test_hard_sigmoid_away_from_its_kinks() -> None:
    """Clipped units that learn, or units beside them that do not, in either coordinates."""
    spec = ep.NetworkSpec((8, 8, 1), CONV, ep.Rate(), feedback=0.5)
    params, (xs, ys) = make_params(spec, seed=2, gain=0.5, bias=0), make_batch(spec, 3)
    biases = (jnp.array([0.5, 2.0, -1.5]), jnp.array([0.5, 0.4, 2.5, -1.5, 0.6, 0.5]), jnp.zeros(3))
    params = tuple({"w": p["w"], "b": b} for p, b in zip(params, biases, strict=True))
    phases = ep.Phases(100, 100, sweep="synchronous", coordinates="absolute")

    @jax.jit
    @jax.vmap
    def clipped(x: Any, y: Any) -> Any:
        """Which units are clipped, free and at both nudges."""
        free, _ = ep.free_phase(params, spec, x, phases)
        nudged = [ep.nudged_phase(params, spec, x, y, free, b, phases)[0] for b in (0.02, -0.02)]
        sides = [jnp.concatenate([v.ravel() for v in s[:-1]]) for s in (free, *nudged)]
        return [jnp.where((s == 0) | (s == 1), s, -1) for s in sides]

    free, *nudged = map(np.asarray, clipped(xs, ys))
    assert (free == 0).sum() > 10  # kinks matter,
    assert (free == 1).sum() > 10
    assert (free == -1).sum() > 10
    assert all((free == side).all() for side in nudged)  # and no unit crosses one
    exact, betas = exact_gradient(params, spec, xs, ys, 100), (2e-2, 2e-3)
    for coordinates in ("absolute", "displacement"):
        run = gradient(spec, free=100, nudged=100, coordinates=coordinates)
        errors = [relative_error(run(params, xs, ys, beta)[0], exact) for beta in betas]
        assert abs(slope(betas, errors) - 2) < 0.1, errors
        assert errors[-1] < 1e-5


def test_coordinates_give_one_gradient() -> None:
    """A second-order term that is missing: at small beta nobody would see it."""
    layers = (ep.Dense(8), ep.Dense(7), ep.Dense(6), ep.Dense(3))
    spec = ep.NetworkSpec((5,), layers, ep.Rate(), feedback=0.3)
    params, (xs, ys) = make_params(spec, seed=3), make_batch(spec, 2)
    for estimator in ("symmetric", "one_sided"):
        absolute, displaced = (
            gradient(spec, free=200, nudged=200, estimator=estimator, coordinates=c)
            for c in ("absolute", "displacement")
        )
        for beta in (0.5, -0.05):
            a, b = (run(params, xs, ys, beta)[0] for run in (absolute, displaced))
            assert relative_error(b, a) < 1e-9


# Max pools in displacement coordinates.

SAME: Any = {"padding": "SAME"}
POOLED: dict[str, Any] = {
    "max over max": (
        (ep.Conv(2, 3, pool=None), ep.Conv(3, 3, "max", **SAME), ep.Conv(3, 3, "max", **SAME)), 5),
    "max over avg": ((ep.Conv(3, 3), ep.Conv(4, 3, "max", **SAME), ep.Dense(5)), 2),
}  # fmt: skip


def winners(spec: ep.NetworkSpec, params: Any, state: Any, l: int) -> jax.Array:
    """Which of its four units wins each window of the max-pooled layer ``l``."""
    pooled = spec.layers[l]
    assert isinstance(pooled, ep.Conv)
    layer = dataclasses.replace(pooled, pool=None)
    z = affine(layer, params[l], state[l - 1])
    windows = z.reshape(z.shape[0] // 2, 2, z.shape[1] // 2, 2, -1).transpose(0, 2, 4, 1, 3)
    return windows.reshape(-1, 4).argmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLED)
def test_displaced_max_pools_let_their_winners_move(name: str) -> None:
    """Winners held where they were, a minimum that should be a maximum, shares of a tie.

    Both coordinates run the same map, so they agree to rounding, whoever wins: at nudges of either
    sign (a negative one turns every maximum of displacements into a minimum), and in the gradient,
    of a batch of both signs. Inputs of low contrast let winners change. A kernel of zeros makes
    all of a channel's windows tie.
    """
    hidden, seed = POOLED[name]
    spec = ep.NetworkSpec((10, 10, 1), (*hidden, ep.Dense(3)), ep.Rate(), feedback=0.5)
    params, (xs, ys) = make_params(spec, seed, gain=0.9), make_batch(spec, 6)
    xs = 0.5 + 0.02 * (xs - 0.5)
    pooled = [l for l in range(3) if getattr(spec.layers[l], "pool", None) == "max"]
    params = tuple({"w": p["w"], "b": p["b"] + 0.4} for p in params)
    top = pooled[-1]
    tied = {"w": params[top]["w"].at[..., 0].set(0.0), "b": params[top]["b"]}
    params = (*params[:top], tied, *params[top + 1 :])
    both = [
        ep.Phases(400, 400, 0.4, "random_sign", "alternating", coordinates)
        for coordinates in ("absolute", "displacement")
    ]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def phases_of(x: Any, y: Any, beta: Any) -> Any:
        free, info = ep.free_phase(params, spec, x, both[0])
        nudged = [ep.nudged_phase(params, spec, x, y, free, beta, phases) for phases in both]
        moved = [
            jnp.sum(winners(spec, params, nudged[0][0], l) != winners(spec, params, free, l))
            for l in pooled
        ]
        residuals = info.residual, *(info.residual for _, info in nudged)
        return [state for state, _ in nudged], residuals, moved

    moves = []
    for beta in (-0.4, -0.1, 0.1, 0.4):
        (absolute, displaced), residuals, moved = phases_of(xs, ys, beta)
        for a, b in zip(absolute, displaced, strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-11)
        assert max(float(r.max()) for r in residuals) < 1e-11
        moves.append([int(m.sum()) for m in moved])
    negative, positive = np.sum(moves[:2], axis=0), np.sum(moves[2:], axis=0)
    assert negative.all(), moves
    assert positive.all(), moves
    if name == "max over max":
        run = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))
        a, b = (run(params, spec, xs, ys, phases, jax.random.key(0))[0] for phases in both)
        assert max(relative_error(q, p) for p, q in zip(a, b, strict=True)) < 1e-9
        assert float(jnp.linalg.norm(a[top]["w"][..., 0])) > 1e-3


@pytest.mark.parametrize("coordinates", ["absolute", "displacement"])
def test_max_pools_share_what_a_tie_gets(coordinates: Any) -> None:
    """One winner of a tie, or as many full winners as there are equals.

    On a uniform image the four units of each window are equal and, sharing equally, stay so: the
    maximum is the mean, and the network the average-pooled one, at any nudge.
    """
    networks: Any = [("max", coordinates), ("avg", "absolute")]
    found = []
    for pool, kind in networks:
        phases = ep.Phases(80, 80, 0.4, "one_sided", "synchronous", kind)
        layers = (ep.Conv(2, 3, pool=None), ep.Conv(3, 1, pool), ep.Dense(3))
        spec = ep.NetworkSpec((6, 6, 1), layers, ep.Rate(activation="softplus"), feedback=0.5)
        params, (_, ys) = make_params(spec, seed=1, gain=0.4), make_batch(spec, 2)
        xs = jnp.broadcast_to(jnp.array([0.3, 0.8]).reshape(2, 1, 1, 1), (2, 6, 6, 1))
        run = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))
        found.append(run(params, spec, xs, ys, phases)[0])
    np.testing.assert_allclose(flat(found[0]), flat(found[1]), rtol=0, atol=1e-13)
    assert all(np.linalg.norm(flat(g)) > 1e-3 for g in found[0])


# Estimators by their definition.


@pytest.mark.parametrize(
    ("activation", "cost", "feedback", "points", "coordinates", "betas"),
    [
        ("tanh", "squared_error", 0.5, 3, "absolute", (0.1, 0.05, 0.02)),
        ("sigmoid", "cross_entropy", 1.0, 4, "displacement", (0.5, 0.25, 0.1)),
    ],
)
def test_holomorphic_error_falls_with_the_number_of_points(
    activation: str, cost: Any, feedback: float, points: int, coordinates: Any, betas: Any
) -> None:
    """A point of the circle that is missing, counted twice or not conjugated away.

    N points on a circle integrate all powers of beta below the N-th exactly. What is left is the
    N-th power and those after it, which fall where beta is inside of psi's radius of convergence R,
    by ``(beta / R)^N`` for N points: with logistic units beta = 1/2 is well inside, so four points
    make less than a tenth of the error of two, the symmetric estimate.
    """
    spec = ep.NetworkSpec((6, 6, 1), CONV, ep.Rate(activation=activation), cost, feedback)
    params, (xs, ys) = make_params(spec, seed=1, gain=0.7), make_batch(spec, 3)
    exact = exact_gradient(params, spec, xs, ys, 120)
    inside = slice(None if cost == "squared_error" else -1)
    settings: Any = {"free": 120, "nudged": 120, "coordinates": coordinates}
    run = gradient(spec, estimator="holomorphic", points=points, **settings)
    grads = [run(params, xs, ys, beta)[0] for beta in betas]
    errors = [relative_error(g[inside], exact[inside]) for g in grads]
    assert abs(slope(betas, errors) - points) < 0.1, errors
    if points == 4:
        two = gradient(spec, estimator="symmetric", **settings)(params, xs, ys, 0.5)[0]
        assert errors[0] < 0.1 * relative_error(two[inside], exact[inside])
        assert relative_error(grads[0][-1], exact[-1]) < 1e-12


def test_holomorphic_estimates_agree_with_each_other() -> None:
    """A complex phase that is another map than the real one, in either coordinates.

    Two points are the symmetric estimate. The gradient is real, in the parameters' precision.
    """
    spec = ep.NetworkSpec(
        (5,), (ep.Dense(6), ep.Dense(4), ep.Dense(3)), ep.Rate(activation="softplus"),
        "cross_entropy", 0.5,
    )  # fmt: skip
    params, (xs, ys) = make_params(spec, gain=0.5), make_batch(spec, 2)
    settings: Any = {"free": 100, "nudged": 100}
    symmetric, two, three, displaced = (
        gradient(spec, estimator=estimator, points=points, coordinates=coordinates, **settings)
        for estimator, points, coordinates in (
            ("symmetric", 4, "absolute"),
            ("holomorphic", 2, "absolute"),
            ("holomorphic", 3, "absolute"),
            ("holomorphic", 3, "displacement"),
        )
    )
    for ours, expected in ((two, symmetric), (displaced, three)):
        (a, info), (b, other) = ours(params, xs, ys, 0.4), expected(params, xs, ys, 0.4)
        np.testing.assert_allclose(flat(a), flat(b), atol=1e-13)
        np.testing.assert_allclose(info.output, other.output, atol=1e-14)
    for dtype in (jnp.float32, jnp.float64):
        single = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), params)
        grads, info = jax.eval_shape(three, single, xs.astype(dtype), ys)
        assert {g.dtype for g in jax.tree.leaves((grads, info.cost))} == {jnp.dtype(dtype)}


def test_random_sign_draws_one_sided_estimates() -> None:
    """Signs shared by the batch, or divided out wrongly.

    Of each example the estimate is the one-sided one at +beta or -beta, and the mean of these two
    is the symmetric estimate, as ``(psi(beta) + psi(-beta)) / 2`` is its definition.
    """
    spec = ep.NetworkSpec((5,), (ep.Dense(6), ep.Dense(3)), ep.Rate(), feedback=0.5)
    params, (xs, ys) = make_params(spec), make_batch(spec, 3)
    one_sided, symmetric, random_sign = (
        gradient(spec, free=60, nudged=60, estimator=e)
        for e in ("one_sided", "symmetric", "random_sign")
    )
    alone = [(xs[i : i + 1], ys[i : i + 1]) for i in range(3)]
    sided = {
        sign: [flat(one_sided(params, *one, sign * 0.2)[0]) for one in alone] for sign in (1, -1)
    }
    mean = np.mean([sided[1], sided[-1]], axis=(0, 1))
    both = flat(symmetric(params, xs, ys, 0.2)[0])
    np.testing.assert_allclose(both, mean, atol=1e-12)
    drawn = set()
    for seed in range(12):
        estimate = flat(random_sign(params, xs, ys, 0.2, jax.random.key(seed))[0])
        matches = [
            signs
            for signs in itertools.product((1, -1), repeat=3)
            if np.allclose(
                estimate, np.mean([sided[s][i] for i, s in enumerate(signs)], 0), atol=1e-12
            )
        ]
        assert len(matches) == 1
        drawn |= set(matches)
    assert any(len(set(signs)) == 2 for signs in drawn)
    assert len(drawn) > 3


def test_batch_is_the_mean_of_its_examples() -> None:
    """A sum for a mean, examples that see each other, one label or nudge for all."""
    spec = ep.NetworkSpec((8, 8, 1), (ep.Conv(3, 3), ep.Dense(3)), ep.Rate(), "cross_entropy", 0.5)
    params, (xs, ys) = make_params(spec), make_batch(spec, 3)
    run = gradient(spec, free=8, nudged=6)
    grads, info = run(params, xs, ys)
    alone = [run(params, xs[i : i + 1], ys[i : i + 1]) for i in range(3)]
    mean = np.mean([flat(g) for g, _ in alone], 0)
    np.testing.assert_allclose(flat(grads), mean, atol=1e-12)
    infos = [(i.cost, i.free, i.nudged) for _, i in alone]
    means, largest = (jax.tree.map(lambda *v, f=f: f(v), *infos) for f in (np.mean, np.max))
    told = [  # a batch tells its largest residuals
        mean._replace(residual=most.residual, residuals=most.residuals)
        for mean, most in zip(means[1:], largest[1:], strict=True)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
        (info.cost, info.free, info.nudged),
        (means[0], *told),
    )
    np.testing.assert_allclose(info.output, jnp.concatenate([i.output for _, i in alone]))
    # The cost is that of the answers.
    phases = ep.Phases(free=8, sweep="synchronous")
    s = jax.jit(jax.vmap(lambda x: ep.free_phase(params, spec, x, phases)[0][-1]))(xs)
    costs = [reference_cost(params, spec, s[i], one_hot(spec, ys)[i]) for i in range(3)]
    np.testing.assert_allclose(info.cost, np.mean(costs), rtol=1e-12)
    logits = s.reshape(3, -1) @ params[-1]["w"] + params[-1]["b"][None]
    np.testing.assert_allclose(info.output, logits, rtol=1e-12)
    # Targets may be labels or one-hot.
    again, _ = run(params, xs, one_hot(spec, ys))
    np.testing.assert_allclose(flat(again), flat(grads), atol=1e-15)


@pytest.mark.parametrize("cost", ["squared_error", "cross_entropy"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_gradient_has_the_tree_and_dtypes_of_the_parameters(dtype: Any, cost: Any) -> None:
    """Gradients in another precision: optimisers would promote the parameters."""
    spec = ep.NetworkSpec((5,), (ep.Dense(6), ep.Dense(3)), ep.DeltaCode(), cost)
    params, (xs, ys) = make_params(spec), make_batch(spec, 2)
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    for data in (xs.astype(dtype), xs.astype(jnp.float32)):
        grads, _ = jax.eval_shape(
            lambda p, xs: ep.ep_gradient(p, spec, xs, ys, ep.Phases(2, 2)), params, data
        )
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        for g, p in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
            assert (g.dtype, g.shape) == (p.dtype, p.shape)


# Noise.


def test_phases_of_plus_and_minus_beta_share_their_noise() -> None:
    """Two keys for the two nudged phases: their difference over 2 beta would be of order 1 / beta.

    Example by example the noise is another one, and another key gives another estimate.
    """
    spec = ep.NetworkSpec((5,), (ep.Dense(8), ep.Dense(6), ep.Dense(3)), ep.Bernoulli())
    params, (xs, ys) = make_params(spec), make_batch(spec, 3)
    rate = ep.NetworkSpec(spec.input_shape, spec.layers, ep.Rate())
    scale = np.linalg.norm(flat(exact_gradient(params, rate, xs, ys, 60)))
    run = gradient(spec, free=30, nudged=20)
    first, info = run(params, xs, ys, 1e-8, jax.random.key(0))
    assert np.linalg.norm(flat(first)) < 100 * scale  # unshared: about 1e8
    assert np.isfinite(flat(info._asdict())).all()
    other, _ = run(params, xs, ys, 1e-8, jax.random.key(1))
    assert relative_error(first, other) > 1e-3
    same = run(params, jnp.stack([xs[0]] * 3), ys, 1e-8, jax.random.key(0))[1].output
    assert np.abs(np.diff(same, axis=0)).max() > 1e-3


def test_settled_delta_code_gives_the_gradient_of_rates() -> None:
    """A spiking phase whose fixed point or read-out is another than that of rates.

    With quanta down to 1e-9 both phases rest where rates do; one quantum over beta remains.
    """
    neuron = ep.DeltaCode(0.7, 0.8, 1.0, nudged_quantum=0.5, nudged_decay=0.8)
    spec, rate = (
        ep.NetworkSpec((8, 8, 1), CONV, n, feedback=0.2) for n in (neuron, ep.Rate())
    )  # fmt: skip
    params, (xs, ys) = make_params(spec, seed=1, gain=0.7), make_batch(spec, 2)
    settings = {"free": 100, "nudged": 90, "sweep": "ordered"}
    expected = gradient(rate, **settings)(params, xs, ys, 0.05)[0]
    for coordinates in ("absolute", "displacement"):
        run = gradient(spec, coordinates=coordinates, **settings)
        assert relative_error(run(params, xs, ys, 0.05)[0], expected) < 1e-5


def test_jit_changes_nothing() -> None:
    """A gradient that depends on where the boundary of compilation is."""
    spec = ep.NetworkSpec((5,), (ep.Dense(6), ep.Dense(3)), ep.Rate(), feedback=0.5)
    params, (xs, ys) = make_params(spec), make_batch(spec, 2)
    phases = ep.Phases(5, 4)
    plain, _ = ep.ep_gradient(params, spec, xs, ys, phases)
    jitted = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))
    static, _ = jitted(params, spec, xs, ys, phases)
    np.testing.assert_allclose(flat(static), flat(plain), atol=1e-13)


# Precision.


@pytest.mark.parametrize("of", [ep.ep_gradient, slow(ep.bptt_gradient), slow(ep.implicit_gradient)])
def test_images_of_less_precision_than_the_parameters(of: Any) -> None:
    """What is cut to the images' float32 on its way; numbers that both hold are chosen."""
    layers = (ep.Conv(2, 3), ep.Conv(2, 3, "max", "SAME"), ep.Dense(3))
    spec = ep.NetworkSpec((6, 6, 1), layers, ep.Rate(), feedback=0.2)
    params, (xs, ys) = make_params(spec), make_batch(spec, 3)
    single = jnp.asarray(xs, jnp.float32)
    phases = ep.Phases(20, 10, coordinates="displacement")
    run = jax.jit(of, static_argnums=(1, 4))
    mixed, _ = run(params, spec, single, ys, phases)
    double, _ = run(params, spec, single.astype(jnp.float64), ys, phases)
    assert {g.dtype for g in jax.tree.leaves(mixed)} == {jnp.dtype(jnp.float64)}
    np.testing.assert_allclose(flat(mixed), flat(double), rtol=1e-12, atol=1e-12)
