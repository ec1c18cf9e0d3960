"""The settled network as a function: three derivative rules, for parameters and inputs."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flat, make_batch, make_params, relative_error, slow
from jax.flatten_util import ravel_pytree
from own import Local, Softened

import ep_jax as ep
from ep_jax import diagnostics

pytestmark = pytest.mark.usefixtures("x64")


def blockwise(cost: Any = "squared_error") -> ep.NetworkSpec:
    """Two skips, one of them from the input, strides, dilation, groups, three kinds of pools."""
    layers = (
        ep.Conv(4, 3, stride=2, pool=None, padding="SAME"),
        ep.Conv(6, 3, pool=ep.AvgPool(3, stride=2), padding="SAME", groups=2),
        ep.Conv(5, 2, pool=None, padding="SAME", dilation=2),
        ep.Dense(3),
    )
    skips = (
        ep.Skip(1, 3, ep.Conv(5, 3, pool=None, stride=2)),
        ep.Skip(0, 4, ep.Dense(3)),
    )
    return ep.NetworkSpec(
        (14, 9, 2), layers, ep.Rate(activation="tanh"), cost, feedback=0.7, skips=skips
    )


SPECS = {
    "skips": blockwise(),
    "folded pool": ep.NetworkSpec(
        (8, 6, 2),
        (ep.Conv(4, 3, padding="SAME"), ep.Dense(5), ep.Dense(3)),
        ep.Rate(activation="tanh"),
        feedback=0.6,
    ),
    "a user's layers": ep.NetworkSpec(
        (8, 6, 2),
        (Local(4), ep.Conv(3, 2, pool=ep.GlobalAvgPool()), Softened(6), ep.Dense(3)),
        ep.Rate(activation="tanh"),
        feedback=0.8,
    ),
    "ends in a convolution": ep.NetworkSpec(
        (6, 6, 1),
        (ep.Conv(3, 3, pool=None), ep.Conv(2, 3, pool=None)),
        ep.Rate(activation="sigmoid"),
        output="tanh",
    ),
}


def start(spec: ep.NetworkSpec, gain: float = 0.4) -> tuple[Any, jax.Array]:
    """Random parameters, of which no bias is zero, and inputs."""
    rng = np.random.default_rng(0)
    params = ep.init_params(jax.random.key(0), spec, gain, jnp.float64)
    params = jax.tree.map(lambda p: p + 0.05 * jnp.asarray(rng.normal(size=p.shape)), params)
    return params, jnp.asarray(rng.uniform(size=(3, *spec.input_shape)))


def gradients(spec: ep.NetworkSpec, derivative: Any, **settings: Any) -> Any:
    """``(params, xs, scale) -> gradients`` of a loss that no cost of the library is."""
    settings = {"free": 150, "nudged": 150} | settings
    phases = ep.Phases(**settings)
    readout = jnp.asarray(np.random.default_rng(1).normal(size=spec.state_shapes[-1]))

    def loss(params: Any, xs: jax.Array, scale: Any) -> jax.Array:
        output = ep.equilibrium(params, spec, xs, phases, derivative=derivative)
        weights = jnp.arange(1.0, 4.0).reshape(-1, *(1,) * readout.ndim)  # an example's own
        return scale * jnp.sum(weights * jnp.log(jnp.cosh(output - readout)))

    return jax.jit(jax.grad(loss, (0, 1)))


@pytest.mark.parametrize(
    ("name", "coordinates"),
    [
        ("ends in a convolution", "displacement"),
        *(slow(name, "displacement") for name in list(SPECS)[:-1]),
        slow("skips", "absolute"),
    ],
)
def test_ep_approaches_the_exact_derivative(name: str, coordinates: Any) -> None:
    """Any term of psi, any sign, transpose, skip or power of alpha; of parameters and of inputs.

    The error of the symmetric estimator is of second order in beta, that of the other of first.
    """
    spec = SPECS[name]
    params, xs = start(spec)
    exact = gradients(spec, ep.Implicit())(params, xs, 1.0)
    through_time = gradients(spec, ep.BPTT())(params, xs, 1.0)
    assert relative_error(through_time, exact) < 1e-9
    for estimator, order in (("symmetric", 2), ("one_sided", 1)):
        errors = [
            relative_error(
                gradients(spec, ep.EP(), beta=beta, estimator=estimator, coordinates=coordinates)(
                    params, xs, 1.0
                ),
                exact,
            )
            for beta in (0.02, 0.01)
        ]
        assert errors[1] < 0.02
        assert abs(np.log2(errors[0] / errors[1]) - order) < 0.1


def test_the_scale_of_a_loss_is_a_factor() -> None:
    """A nudge that grows with the loss, so that a sum and a mean give other directions."""
    spec = SPECS["skips"]
    params, xs = start(spec)
    run = gradients(spec, ep.EP(), free=40, nudged=40, beta=0.5, estimator="one_sided")
    one = run(params, xs, 1.0)
    for scale in (1e-6, 1e6):
        scaled = jax.tree.map(lambda g, scale=scale: g / scale, run(params, xs, scale))
        assert relative_error(scaled, one) < 1e-12


def test_cotangents_at_the_ends_of_a_precision_give_numbers() -> None:
    """Their reciprocals underflow: large ones gave zeros, tiny ones no number."""
    spec = ep.NetworkSpec((3,), (ep.Dense(4), ep.Dense(2)), ep.Rate())
    params = ep.init_params(jax.random.key(0), spec, dtype=jnp.float32)
    xs, phases = jnp.ones((2, 3), jnp.float32), ep.Phases(free=20, nudged=20)

    @jax.jit
    def pulled(size: jax.Array) -> Any:
        _, back = jax.vjp(lambda p: ep.equilibrium(p, spec, xs, phases), params)
        return ravel_pytree(back(jnp.full((2, 2), size)))[0]

    one = pulled(jnp.float32(1.0))
    large = pulled(jnp.float32(1e38))
    np.testing.assert_allclose(np.asarray(large, np.float64) / 1e38, one, rtol=1e-5, atol=1e-6)
    assert jnp.abs(pulled(jnp.float32(1e-39))).max() < 1e-37


@pytest.mark.slow
def test_an_output_that_nobody_pulls_at_has_no_derivative() -> None:
    """A division by the size of a cotangent that is zero."""
    spec = SPECS["skips"]
    params, xs = start(spec)

    def first(params: Any, xs: jax.Array) -> jax.Array:
        return ep.equilibrium(params, spec, xs, ep.Phases(free=20, nudged=20))[0].sum()

    of_params, of_inputs = jax.grad(first, (0, 1))(params, xs)
    assert np.isfinite(flat(of_params)).all()
    assert (of_inputs[0] != 0).any()
    assert (of_inputs[1:] == 0).all()


@pytest.mark.parametrize(
    "derivative", [slow(ep.EP()), slow(ep.BPTT(tracked=9, remat=True)), slow(ep.Implicit())]
)
def test_it_composes_with_what_jax_does_to_functions(derivative: Any) -> None:
    """A rule that `vmap` over seeds, a checkpoint, a scan or another precision breaks."""
    spec = SPECS["ends in a convolution"]
    phases = ep.Phases(free=30, nudged=30, beta=0.01)
    xs = start(spec)[1]
    seeds = jax.vmap(lambda k: ep.init_params(k, spec, 0.5, jnp.float64))(
        jax.random.split(jax.random.key(1), 2)
    )

    def loss(params: Any, xs: jax.Array) -> jax.Array:
        settled = jax.checkpoint(
            lambda p, xs: ep.equilibrium(p, spec, xs, phases, derivative=derivative)
        )
        return jnp.sum(settled(params, xs) ** 2)

    both = jax.jit(jax.vmap(jax.grad(loss), (0, None)))(seeds, xs)
    for seed in (0, 1):
        alone = jax.jit(jax.grad(loss))(jax.tree.map(lambda p, s=seed: p[s], seeds), xs)
        assert relative_error(jax.tree.map(lambda g, s=seed: g[s], both), alone) < 1e-12

    def descend(params: Any, xs: jax.Array) -> tuple[Any, None]:
        grads = jax.grad(loss)(params, xs)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

    single = jax.tree.map(lambda p: p[0].astype(jnp.float32), seeds)
    moved, _ = jax.jit(lambda p, xs: jax.lax.scan(descend, p, xs))(
        single, jnp.stack([xs, xs]).astype(jnp.float32)
    )
    assert all(np.isfinite(flat(moved)))
    assert jax.tree.leaves(moved)[0].dtype == jnp.float32


@pytest.mark.slow
def test_the_info_comes_along_and_is_not_differentiated() -> None:
    """Residuals of another phase; a derivative that goes through them."""
    spec = SPECS["folded pool"]
    params, xs = start(spec)
    phases = ep.Phases(free=3, nudged=3)

    def told(params: Any, share: float) -> jax.Array:
        output, info = ep.equilibrium(params, spec, xs, phases, info=True)
        return output.sum() + share * info.residual

    _, free = ep.ep_gradient(params, spec, xs, jnp.arange(3), phases)
    assert told(params, 1.0) - told(params, 0.0) == pytest.approx(free.free.residual)
    without, with_info = (jax.grad(told)(params, share) for share in (0.0, 5.0))
    assert relative_error(with_info, without) == 0


WAYS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda p, xs: jax.jit(jax.vmap(f, (None, 0)))(p, jnp.stack([xs, xs])),
    "grad of a checkpoint": lambda f: jax.jit(jax.grad(jax.checkpoint(f))),
}


@pytest.mark.parametrize(
    ("derivative", "way"),
    [
        *((ep.EP(), way) for way in WAYS),
        *((rule, "grad of a checkpoint") for rule in (ep.BPTT(), ep.Implicit())),
    ],
)
def test_a_caller_who_never_looks_is_warned(derivative: Any, way: str) -> None:
    """Derivatives of a state that is far from its fixed point, without a word; a false alarm."""
    spec = SPECS["folded pool"]
    params, xs = start(spec, gain=0.7)

    def run(free: int) -> None:
        phases = ep.Phases(free=free, nudged=5)

        def f(params: Any, xs: jax.Array) -> jax.Array:
            return ep.equilibrium(params, spec, xs, phases, derivative=derivative).sum()

        jax.block_until_ready(WAYS[way](f)(params, xs))
        jax.effects_barrier()

    with pytest.warns(ep.NotSettledWarning, match=r"not settled after 1 sweeps: .* state by \d+ %"):
        run(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(60)


@pytest.mark.slow
def test_spiking_networks_learn_as_by_ep_gradient() -> None:
    """Spikes that code a cotangent more coarsely than they do a cost's."""
    spec = ep.NetworkSpec((8, 6, 2), SPECS["folded pool"].layers, feedback=1.0)
    params = make_params(spec, gain=0.35)
    xs, ys = make_batch(spec, 8)
    phases = ep.Phases(free=30, nudged=20, estimator="one_sided", relaxation=1.2)
    targets = jnp.eye(3)[ys]

    def loss(params: Any) -> jax.Array:
        output = ep.equilibrium(params, spec, xs, phases)
        return 0.5 * jnp.mean(jnp.sum((output - targets) ** 2, -1))

    exact = diagnostics.exact_gradient(params, spec, xs, ys)
    ours = diagnostics.compare(jax.jit(jax.grad(loss))(params), exact).cosine
    textbook = diagnostics.compare(ep.ep_gradient(params, spec, xs, ys, phases)[0], exact).cosine
    assert (ours > textbook - 0.01).all()
    assert (ours > 0.99).all()


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"derivative": "ep"}, TypeError, "derivative is 'ep'; expected ep_jax.EP()"),
        ({"info": 1}, ValueError, "info is 1; expected one of True, False"),
        (
            {"derivative": ep.BPTT(), "phases": ep.Phases(tolerance=1e-3)},
            ValueError,
            "phases.tolerance is 0.001; expected None",
        ),
        ({"derivative": ep.BPTT(tracked=99)}, ValueError, "tracked is 99; expected at most the 60"),
        ({"xs": jnp.ones((2, 5))}, ValueError, "xs has shape (2, 5); expected"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, error: Any, said: str) -> None:
    """An error of JAX's own, from the middle of a phase."""
    spec = ep.NetworkSpec((3,), (ep.Dense(2),), ep.Rate())
    params = ep.init_params(jax.random.key(0), spec)
    given = {"xs": jnp.ones((2, 3), jnp.float32), "phases": ep.Phases()} | arguments
    with pytest.raises(error) as caught:
        ep.equilibrium(params, spec, **given)
    assert said in str(caught.value)
