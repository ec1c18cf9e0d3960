"""Optimisers against their recursions by hand; norms of links against dense matrices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import affine, make_params

import ep_jax as ep
from ep_jax import diagnostics
from ep_jax.optimizers import (
    SGD,
    AdamW,
    CapState,
    Muon,
    Settings,
    cap_links,
    link_norms,
    make_optimizer,
    norms_of,
    orthogonalize,
    radius_bound,
)

pytestmark = pytest.mark.usefixtures("x64")

DENSE = ep.NetworkSpec((4,), (ep.Dense(3), ep.Dense(2)))
CONV = ep.NetworkSpec((6, 6, 2), (ep.Conv(3, 3, None), ep.Conv(20, 3), ep.Dense(3)))


def run(optimizer: optax.GradientTransformation, grads: list[Any], params: Any) -> list[Any]:
    """The updates of the parameters by these gradients, step by step."""
    state, found = optimizer.init(params), []
    for g in grads:
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, state = jax.jit(optimizer.update)(g, state, params)
        params = optax.apply_updates(params, updates)
        found.append(updates)
    return found


def cap_state(opt_state: Any) -> CapState:
    found = norms_of(opt_state)
    assert found is not None
    return found


def as_matrix(w: jax.Array) -> np.ndarray:
    return np.asarray(w, np.float64).reshape(-1, w.shape[-1])


def newton_schulz(x: np.ndarray, steps: int) -> np.ndarray:
    """As Jordan et al. write it: on the whole matrix."""
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x.T @ x
        x = x @ (3.4445 * np.eye(len(gram)) - 4.7750 * gram + 2.0315 * gram @ gram)
    return x


@pytest.mark.parametrize("settings", [AdamW(), AdamW(b1=0.7, b2=0.9)])
def test_adam_is_its_recursion_with_a_rate_per_layer_and_a_cosine(settings: AdamW) -> None:
    """Would catch a rate that ignores the layer, a schedule that does not end at 0."""
    params = make_params(DENSE)
    grads = [make_params(DENSE, seed) for seed in range(11)]
    optimizer = make_optimizer(
        DENSE, settings, learning_rate=0.01, steps=10, layer_rates=(1.0, 0.25)
    )
    found = run(optimizer, grads, params)
    for l, factor in enumerate((1.0, 0.25)):
        for name in ("w", "b"):
            m = v = np.zeros_like(params[l][name])
            for t, g in enumerate(grads):
                m = settings.b1 * m + (1 - settings.b1) * g[l][name]
                v = settings.b2 * v + (1 - settings.b2) * g[l][name] ** 2
                m_hat, v_hat = (x / (1 - b ** (t + 1)) for x, b in
                                ((m, settings.b1), (v, settings.b2)))  # fmt: skip
                rate = factor * 0.01 * 0.5 * (1 + np.cos(np.pi * t / 10))
                expected = -rate * m_hat / (np.sqrt(v_hat) + 1e-8)
                np.testing.assert_allclose(found[t][l][name], expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("settings", [AdamW(), Muon()])
def test_weight_decay_spares_biases_and_follows_rate_and_decay_of_the_layer(
    settings: Settings,
) -> None:
    """With no gradient a decoupled decay moves weights by -rate * decay * w and nothing else."""
    params = jax.tree.map(lambda p: jnp.full_like(p, 2.0), make_params(DENSE))
    optimizer = make_optimizer(
        DENSE,
        settings,
        learning_rate=0.01,
        steps=10,
        layer_rates=(1.0, 0.25),
        weight_decay=0.1,
        layer_decays=(0.5, 3.0),
    )
    (updates,) = run(optimizer, [jax.tree.map(jnp.zeros_like, params)], params)
    for layer, rate, decay in zip(updates, (0.01, 0.0025), (0.05, 0.3), strict=True):
        np.testing.assert_allclose(layer["w"], -rate * decay * 2.0, rtol=1e-6)
        np.testing.assert_array_equal(layer["b"], 0.0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_the_textbook_recursion(nesterov: bool) -> None:
    """``v <- mu v + g + decay w``; ``w <- w - rate v``, or with Nesterov ``rate (mu v + g)``."""
    params = make_params(DENSE)
    grads = [make_params(DENSE, seed) for seed in range(3)]
    optimizer = make_optimizer(
        DENSE, SGD(0.8, nesterov), learning_rate=0.01, steps=10, weight_decay=0.3
    )
    found = run(optimizer, grads, params)
    for name, decay in (("w", 0.3), ("b", 0.0)):
        w, v = np.asarray(params[1][name]), 0.0
        for t, g in enumerate(grads):
            push = g[1][name] + decay * w
            v = 0.8 * v + push
            rate = 0.01 * 0.5 * (1 + np.cos(np.pi * t / 10))
            step = -rate * (0.8 * v + push if nesterov else v)
            np.testing.assert_allclose(found[t][1][name], step, rtol=1e-6)
            w = w + step


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_steps_by_the_orthogonal_momentum_of_each_matrix(nesterov: bool) -> None:
    """Every singular value of a step is about the rate, a kernel's as ``[k * k * in, out]``.

    [.68, 1.21] is the range of the polynomial's fixed interval; a shape factor would leave it.
    """
    params = make_params(CONV)
    grads = [make_params(CONV, seed) for seed in (5, 6)]
    settings = Muon(0.9, nesterov, bias_rate=0.003)
    optimizer = make_optimizer(
        CONV, settings, learning_rate=0.02, steps=10**6, layer_rates=(1.0, 0.5, 1.0)
    )
    _, updates = run(optimizer, grads, params)
    for l, factor in enumerate((1.0, 0.5, 1.0)):
        first, second = (as_matrix(g[l]["w"]) for g in grads)
        momentum = 0.9 * first + second
        looked = 0.9 * momentum + second if nesterov else momentum
        step = as_matrix(updates[l]["w"]) / (-0.02 * factor)
        np.testing.assert_allclose(step, newton_schulz(looked, 5), atol=1e-6)
        singular = np.linalg.svd(step, compute_uv=False)
        assert 0.68 < singular.min() < singular.max() < 1.21


def test_biases_are_no_business_of_muons() -> None:
    """Adam's first step: the rate of biases times the sign, whatever the rate of weights."""
    params, grads = make_params(CONV), make_params(CONV, 5)
    settings = Muon(bias_rate=0.003)
    for rate in (0.02, 0.1):
        optimizer = make_optimizer(
            CONV, settings, learning_rate=rate, steps=9, layer_rates=(1.0, 0.5, 1.0)
        )
        (updates,) = run(optimizer, [grads], params)
        for u, g, factor in zip(updates, grads, (1.0, 0.5, 1.0), strict=True):
            expected = -0.003 * factor * np.sign(g["b"])
            np.testing.assert_allclose(u["b"], expected, rtol=1e-6)


@pytest.mark.parametrize(("shape", "rank"), [((300, 40), 40), ((300, 40), 3), ((25, 32), 25)])
def test_orthogonalize_in_single_precision(shape: tuple[int, int], rank: int) -> None:
    """The Gram matrix squares the condition number; what is lost must not be blown up."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(shape[0], rank)), rng.normal(size=(rank, shape[1]))
    x = jnp.asarray((left * np.logspace(0, -4, rank)) @ right, jnp.float32)
    found = np.asarray(orthogonalize(x), np.float64)
    error = found - newton_schulz(np.asarray(x, np.float64), 5)
    assert np.linalg.norm(error, 2) < 5e-3  # of an operator norm of about one
    many = np.linalg.svd(np.asarray(orthogonalize(x, 10)), compute_uv=False)
    assert many.max() < 1.21
    np.testing.assert_array_equal(orthogonalize(jnp.zeros(shape)), 0.0)


def linked(*layers: ep.Conv | ep.Dense) -> ep.NetworkSpec:
    return ep.NetworkSpec((8, 8, 1), (*layers, ep.Dense(3)))


LINKED = {
    "dense": ep.NetworkSpec((5,), (ep.Dense(7), ep.Dense(6), ep.Dense(4))),
    "folded": linked(ep.Conv(3, 3, None), ep.Conv(4, 3)),
    "unfolded": linked(ep.Conv(3, 3, None), ep.Conv(4, 3, fold=False)),
    "same": linked(ep.Conv(3, 3, padding="SAME"), ep.Conv(4, 3, padding="SAME")),
    "max": linked(ep.Conv(3, 3, None), ep.Conv(4, 3, "max")),
    "read-out": ep.NetworkSpec((5,), (ep.Dense(7), ep.Dense(6), ep.Dense(4)), cost="cross_entropy"),
    "skips": ep.NetworkSpec(
        (4, 4, 2),
        (ep.Conv(3, 3, None, "SAME"), ep.Conv(4, 3), ep.Dense(5), ep.Dense(3)),
        skips=(
            ep.Skip(0, 2, ep.Conv(4, 3)),
            ep.Skip(1, 3, ep.Dense(5)),
            ep.Skip(2, 4, ep.Dense(3)),
        ),
    ),
}


def exact_norms(params: Any, spec: ep.NetworkSpec) -> np.ndarray:
    """Largest singular values of the drives as dense matrices; of a max pool, without the pool."""
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    norms = []
    for edge in spec.links:
        layer, own = edge.layer, params[edge.params_index]
        if isinstance(layer, ep.Conv) and layer.pool == "max":
            layer = ep.Conv(layer.features, layer.kernel, None, layer.padding)
        below = jnp.zeros(spec.state_shapes[edge.source])
        dense = jax.jacobian(lambda s, layer=layer, own=own: affine(layer, own, s))(below)
        norms.append(np.linalg.norm(np.asarray(dense).reshape(-1, below.size), 2))
    return np.array(norms)


def relaxed(name: str, feedback: float) -> ep.NetworkSpec:
    """With rate neurons."""
    spec = LINKED[name]
    return dataclasses.replace(spec, neuron=ep.Rate(), cost="squared_error", feedback=feedback)


@pytest.mark.parametrize("name", LINKED)
def test_norms_of_links_are_largest_singular_values(name: str) -> None:
    """Would catch a drive without its pool, the input's layer, a read-out counted in."""
    params = make_params(LINKED[name])
    found = jax.jit(link_norms, static_argnums=(1, 2))(params, LINKED[name], 400)
    np.testing.assert_allclose(found, exact_norms(params, LINKED[name]), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [("folded", jnp.float32), *((name, jnp.float64) for name in LINKED)]
)
def test_links_stay_below_the_cap(name: str, dtype: Any) -> None:
    """Gradients that push all links up: without the cap their norms more than double."""
    spec = LINKED[name]
    start = jax.tree.map(lambda p: p.astype(dtype), make_params(spec))

    def train(cap: float | None) -> Any:
        optimizer = make_optimizer(spec, SGD(), learning_rate=0.02, steps=60, cap=cap)

        def step(carry: Any, seed: jax.Array) -> Any:
            params, state = carry
            noise = ep.init_params(jax.random.key(seed), spec, dtype=dtype)
            grads = jax.tree.map(lambda p, n: -p - 0.5 * n, params, noise)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def steps(params: Any) -> Any:
            return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(40))[0]

        return jax.jit(steps)(start)

    (free, nothing), (held, state) = train(None), train(0.9)
    assert norms_of(nothing) is None
    found = cap_state(state)
    norms = exact_norms(held, spec)
    assert (exact_norms(free, spec) > 2 * 0.9).all()
    assert (norms < 0.9 * 1.01).all()
    np.testing.assert_allclose(found.norms, norms, rtol=0.01)
    assert found.norms.dtype == held[1]["w"].dtype == dtype
    assert int(found.capped) == len(norms)  # all were pushed up in the last step, too
    rounding = 100 * float(jnp.finfo(dtype).eps)  # two programs, which XLA fuses in two ways
    for l in range(len(spec.layers)):  # what is no link learns as ever, and so do biases
        names = ["b"] if 0 < l < spec.depth else ["w", "b"]
        for part in names:
            np.testing.assert_allclose(held[l][part], free[l][part], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", LINKED)
def test_a_cap_that_holds_every_link_touches_nothing_else(name: str) -> None:
    """Biases, the input's layer and a read-out keep their updates to the bit."""
    spec = LINKED[name]
    params, updates = make_params(spec), make_params(spec, 5)
    capped = cap_links(spec, 1e-3)
    found: Any
    found, state = capped.update(updates, capped.init(params), params)
    links = {edge.params_index for edge in spec.links}
    assert int(cap_state(state).capped) == len(links) > 0
    for l, (held, given) in enumerate(zip(found, updates, strict=True)):
        for part, update in given.items():
            same = np.array_equal(held[part], update)
            assert same == (l not in links or part == "b"), (l, part)


def test_a_cap_leaves_what_is_below_it_alone() -> None:
    """Links that are weak enough get the very updates they would get without it."""
    params = make_params(LINKED["folded"])
    updates = make_params(LINKED["folded"], 5)
    together = jax.tree.map(jnp.add, params, updates)
    cap = float(exact_norms(together, LINKED["folded"]).max()) + 0.01
    capped = cap_links(LINKED["folded"], cap)
    found, state = capped.update(updates, capped.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, updates)
    assert int(cap_state(state).capped) == 0


@pytest.mark.parametrize("name", ["folded", "read-out"])
def test_links_shrink_by_the_share_of_unsettled_images(name: str) -> None:
    """Input weights, biases or a read-out that shrink as well; a sign that makes links grow.

    Without a gradient a step takes learning rate times decay times ``unsettled`` of the links off
    and nothing else; where all have settled, or nobody says, none.
    """
    spec = LINKED[name]
    params = make_params(spec)
    optimizer: Any = make_optimizer(spec, SGD(), learning_rate=0.1, steps=9, shrink=4.0)
    still = jax.tree.map(jnp.zeros_like, params)
    for told, expected in (({"unsettled": 0.25}, 0.1), ({"unsettled": 0.0}, 0.0), ({}, 0.0)):
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = optimizer.update(still, optimizer.init(params), params, **told)
        for l, (u, p) in enumerate(zip(updates, params, strict=True)):
            part = expected if 0 < l < spec.depth else 0.0
            np.testing.assert_allclose(u["w"], -part * p["w"], rtol=1e-12, atol=1e-15)
            np.testing.assert_array_equal(u["b"], 0.0)


def test_dead_links_have_norm_zero_and_wake_up() -> None:
    """A power iteration through a matrix of zeros must keep its vector."""
    spec = LINKED["dense"]
    params = jax.tree.map(jnp.zeros_like, make_params(spec))
    capped = cap_links(spec, 0.5, iterations=50)
    state = capped.init(params)
    np.testing.assert_array_equal(cap_state(state).norms, 0.0)
    updates, state = capped.update(make_params(spec), state, params)
    np.testing.assert_allclose(exact_norms(updates, spec), 0.5, rtol=1e-6)


def test_bound_on_the_radius_is_the_matrix_of_norms() -> None:
    """Equal norms have a closed form; no links, no radius."""
    rng = np.random.default_rng(0)
    norms = rng.uniform(0.1, 2.0, 4)
    # Another way: the product of block norms with no symmetry, ``c_l`` below and ``alpha c_l``
    # above the diagonal.
    matrix = np.diag(norms, -1) + 0.3 * np.diag(norms, 1)
    largest = np.abs(np.linalg.eigvals(matrix)).max()
    np.testing.assert_allclose(radius_bound(jnp.asarray(norms), 0.3), largest, rtol=1e-9)
    for L in (2, 3, 6):
        bound = radius_bound(jnp.full(L - 1, 0.7), 1.0)
        np.testing.assert_allclose(bound, 1.4 * np.cos(np.pi / (L + 1)), rtol=1e-9)
    assert radius_bound(jnp.zeros(0), 1.0) == 0.0


@pytest.mark.parametrize("name", ["dense", "folded", "max", "skips"])
def test_no_spectral_radius_is_above_the_bound(name: str) -> None:
    """The bound comes from norms alone, the radius from the Jacobian at the fixed point."""
    spec = relaxed(name, feedback=0.5)

    @jax.jit
    def both(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        state, _ = ep.free_phase(params, spec, x, ep.Phases(free=100))
        bound = radius_bound(link_norms(params, spec, 300), spec.feedback, spec.skips)
        return diagnostics.spectral_radius(params, spec, x, state), bound

    found = []
    for seed in range(6):
        x = jnp.asarray(np.random.default_rng(seed).uniform(size=spec.input_shape))
        found.append(both(make_params(spec, seed), x))
    radii, bounds = np.array(found).T
    assert radii.max() > 0.2  # not all are silent
    assert (radii <= bounds * (1 + 1e-9)).all()


def test_the_bound_is_the_radius_of_a_linear_skip() -> None:
    """A skip that is left out of the bound, or weakened by the wrong power of the feedback."""
    layers = (ep.Dense(2), ep.Dense(1), ep.Dense(1))
    spec = ep.NetworkSpec(
        (1,), layers, ep.Rate(), feedback=0.25, skips=(ep.Skip(1, 3, ep.Dense(1)),)
    )
    params = make_params(spec, gain=0.1, bias=0.0)
    for l in (1, 2):
        params[l]["w"] = jnp.zeros_like(params[l]["w"])
    params[0]["b"] = jnp.full(2, 0.5)
    state, _ = ep.free_phase(params, spec, jnp.zeros(1), ep.Phases(free=50))
    radius = diagnostics.spectral_radius(params, spec, jnp.zeros(1), state)
    np.testing.assert_allclose(radius, 0.25 * exact_norms(params, spec)[2], rtol=1e-6)
    bound = radius_bound(link_norms(params, spec), 0.25, spec.skips)
    np.testing.assert_allclose(bound, radius, rtol=1e-6)


def test_the_bound_is_the_radius_of_two_linear_layers() -> None:
    """Of one link between units that are not clipped: ``sqrt(alpha) |A|``, and no less."""
    spec = ep.NetworkSpec((4,), (ep.Dense(3), ep.Dense(2)), ep.Rate(), feedback=0.25)
    params = make_params(spec, gain=0.1, bias=0.0)
    params[0]["b"] = jnp.full(3, 0.5)
    state, _ = ep.free_phase(params, spec, jnp.zeros(4), ep.Phases(free=50))
    radius = diagnostics.spectral_radius(params, spec, jnp.zeros(4), state)
    np.testing.assert_allclose(radius, 0.5 * exact_norms(params, spec)[0], rtol=1e-6)
    np.testing.assert_allclose(radius_bound(link_norms(params, spec), 0.25), radius, rtol=1e-6)


@pytest.mark.parametrize("name", ["dense", "folded"])
def test_below_one_every_order_of_sweeps_finds_the_same_fixed_point(name: str) -> None:
    """Links as strong as they may be for the bound .9, with symmetric feedback."""
    spec = relaxed(name, feedback=1.0)
    params = make_params(spec)
    cap = cap_links(spec, 0.9 / (2 * np.cos(np.pi / 4)), iterations=300)
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, state = cap.update(nothing, cap.init(params), params)
    assert int(cap_state(state).capped) == 2
    params: Any = optax.apply_updates(params, updates)
    x = jnp.asarray(np.random.default_rng(3).uniform(size=spec.input_shape))
    ends = [
        np.concatenate([np.ravel(s) for s in ep.free_phase(params, spec, x, phases)[0]])
        for phases in (
            ep.Phases(free=300, sweep="synchronous"),
            ep.Phases(free=300, sweep="alternating"),
            ep.Phases(free=300, sweep="ordered"),
        )
    ]
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdamW(b1=1.0), r"AdamW.b1 is 1.0; expected a number below 1"),
        (lambda: SGD(momentum=-0.1), r"SGD.momentum is -0.1; expected a number in \[0, 1\]"),
        (lambda: Muon(ns_steps=0), r"Muon.ns_steps is 0; expected an integer of at least 1"),
        (lambda: cap_links(DENSE, 0.0), r"cap is 0.0; expected a finite number above 0"),
        (
            lambda: make_optimizer(DENSE, AdamW(), learning_rate=0.1, steps=9, layer_rates=(1.0,)),
            r"layer_rates is \(1.0,\); expected a factor for each of the 2 layers, or none",
        ),
        (
            lambda: cap_links(DENSE, 1.0).update(
                (), cap_links(DENSE, 1.0).init(make_params(DENSE))
            ),
            "params is None; expected the parameters",
        ),
    ],
)
def test_bad_settings_are_told(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_optimizer_is_told() -> None:
    name: Any = "adam"
    with pytest.raises(TypeError, match="settings is 'adam'; expected AdamW, Muon or SGD"):
        make_optimizer(DENSE, name, learning_rate=0.1, steps=9)
