"""What holds for every network: random small ones, in float64."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flat, make_batch, make_params, relative_error
from hypothesis import given
from hypothesis import strategies as st

import ep_jax as ep

pytestmark = pytest.mark.usefixtures("x64")

# Every example is another network, so another program to compile.
few = hypothesis.settings(max_examples=8)

RATES = (ep.Rate(), ep.Rate(0.7, "tanh"))
SPIKING = (ep.DeltaCode(), ep.DeltaCode(leak=True), ep.SigmaDelta(), ep.IntegrateFire())
seeds = st.integers(0, 9)


@st.composite
def networks(draw: Any, neurons: Any, pools: Any = ("avg", "max", None)) -> ep.NetworkSpec:
    """Up to two convolutions that fit each other, up to one hidden layer, an output."""
    side = draw(st.sampled_from([5, 6, 8]))
    shape, layers = (side, side, draw(st.integers(1, 2))), []
    for _ in range(draw(st.integers(0, 2))):
        kernel, padding = draw(st.integers(1, 3)), draw(st.sampled_from(["VALID", "SAME"]))
        height = side - (kernel - 1 if padding == "VALID" else 0)
        if height < 1:
            break
        pool = None if height % 2 else draw(st.sampled_from(pools))
        layers.append(ep.Conv(draw(st.integers(1, 3)), kernel, pool, padding))
        side = height // 2 if pool else height
    layers += [ep.Dense(draw(st.integers(1, 4))) for _ in range(draw(st.integers(0, 1)))]
    layers.append(ep.Dense(draw(st.integers(2, 3))))
    costs = ["squared_error", "cross_entropy"] if len(layers) > 1 else ["squared_error"]
    cost, feedback = draw(st.sampled_from(costs)), draw(st.sampled_from([0.1, 0.5, 1.0]))
    return ep.NetworkSpec(shape, tuple(layers), draw(st.sampled_from(neurons)), cost, feedback)


phases = st.builds(
    ep.Phases,
    free=st.integers(2, 9),
    nudged=st.integers(2, 6),
    beta=st.sampled_from([0.05, -0.3]),
    estimator=st.sampled_from(["one_sided", "symmetric"]),
    sweep=st.sampled_from(["synchronous", "alternating", "ordered"]),
    coordinates=st.sampled_from(["absolute", "displacement"]),
)


def gradient(params: Any, spec: ep.NetworkSpec, xs: Any, ys: Any, phases: ep.Phases) -> Any:
    run = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))
    return run(params, spec, xs, ys, phases)[0]


@pytest.mark.slow
@few
@given(
    networks([ep.Rate(activation="tanh"), ep.Rate(activation="sigmoid")], ["avg", None]),
    st.sampled_from(["absolute", "displacement"]),
    seeds,
)
def test_ep_is_bptt_at_rest(spec: ep.NetworkSpec, coordinates: Any, seed: int) -> None:
    """The theorem: at a fixed point, for beta -> 0, EP's gradient is that of BPTT.

    The error of the symmetric estimate is of order beta squared.
    """
    params = make_params(spec, seed, gain=0.4)
    xs, ys = make_batch(spec, 2, seed)
    settled = ep.Phases(120, 120, 1e-3, "symmetric", coordinates=coordinates)
    exact, _ = jax.jit(ep.bptt_gradient, static_argnames=("spec", "phases"))(
        params, spec, xs, ys, settled
    )
    assert relative_error(gradient(params, spec, xs, ys, settled), exact) < 1e-4


@pytest.mark.slow
@few
@given(networks(RATES + SPIKING, ["avg"]), phases, seeds)
def test_folded_is_unfolded(spec: ep.NetworkSpec, phases: ep.Phases, seed: int) -> None:
    """The fold is another order of the same sums, whatever else the network is."""
    layers = [replace(a, fold=False) if isinstance(a, ep.Conv) else a for a in spec.layers]
    params, (xs, ys) = make_params(spec, seed), make_batch(spec, 2, seed)
    found = gradient(params, spec, xs, ys, phases)
    plain = gradient(params, replace(spec, layers=tuple(layers)), xs, ys, phases)
    assert relative_error(found, plain) < 1e-9


@pytest.mark.slow
@few
@given(networks(RATES + SPIKING), phases, seeds)
def test_a_batch_is_its_examples_in_any_order(
    spec: ep.NetworkSpec, phases: ep.Phases, seed: int
) -> None:
    """Examples that see each other: each is alone among copies of itself."""
    params, (xs, ys) = make_params(spec, seed), make_batch(spec, 3, seed)
    found = gradient(params, spec, xs, ys, phases)
    order = np.array([2, 0, 1])
    assert relative_error(gradient(params, spec, xs[order], ys[order], phases), found) < 1e-9
    copies = np.arange(3)[:, None].repeat(3, 1)
    alone = [gradient(params, spec, xs[i], ys[i], phases) for i in copies]
    mean = jax.tree.map(lambda *g: sum(g) / 3, *alone)
    assert relative_error(mean, found) < 1e-9


def with_permuted_channels(spec: ep.NetworkSpec, tree: Any, l: int, order: np.ndarray) -> Any:
    """Parameters, or their gradient, with the channels of layer `l` in another order."""
    here, above = dict(tree[l]), dict(tree[l + 1])
    here = {name: value[..., order] for name, value in here.items()}
    if isinstance(spec.layers[l + 1], ep.Conv):
        above["w"] = above["w"][:, :, order]
    else:
        shape = spec.shapes[l + 1]
        above["w"] = above["w"].reshape(*shape, -1)[..., order, :].reshape(above["w"].shape)
    return (*tree[:l], here, above, *tree[l + 2 :])


@pytest.mark.slow
@few
@given(networks(RATES + SPIKING), phases, seeds)
def test_channels_have_no_order(spec: ep.NetworkSpec, phases: ep.Phases, seed: int) -> None:
    """Axes that are mixed up between layers, layouts and flattening."""
    hypothesis.assume(len(spec.layers) > 1)
    params, (xs, ys) = make_params(spec, seed), make_batch(spec, 2, seed)
    found = gradient(params, spec, xs, ys, phases)
    hypothesis.assume(np.linalg.norm(flat(found)) > 0)  # two sweeps may say nothing at all
    for l in range(len(spec.layers) - 1):
        order = np.roll(np.arange(spec.state_shapes[l][-1]), 1)
        permuted = with_permuted_channels(spec, params, l, order)
        expected = with_permuted_channels(spec, found, l, order)
        assert relative_error(gradient(permuted, spec, xs, ys, phases), expected) < 1e-9


@pytest.mark.slow
@few
@given(networks(RATES), phases, seeds)
def test_single_precision_is_enough(spec: ep.NetworkSpec, phases: ep.Phases, seed: int) -> None:
    """A constant of another type; a state that float32 cannot hold.

    Free states of a contractive network: no rounding error grows.
    """
    params, (xs, _) = make_params(spec, seed, gain=0.4), make_batch(spec, 1, seed)
    settle = jax.jit(ep.free_phase, static_argnames=("spec", "phases"))
    state, _ = settle(params, spec, xs[0], phases)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), (params, xs[0]))
    found, info = settle(single[0], spec, single[1], phases)
    assert {a.dtype for a in jax.tree.leaves((found, info.residual))} == {np.dtype(np.float32)}
    for a, b in zip(found, state, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@given(networks(RATES + SPIKING), phases, seeds)
def test_saved_is_loaded(spec: ep.NetworkSpec, phases: ep.Phases, seed: int) -> None:
    """A field that is not written, or comes back as something else."""
    params = make_params(spec, seed)
    with tempfile.TemporaryDirectory() as folder:
        ep.save_weights(folder, params, spec, phases)
        loaded, loaded_spec, loaded_phases = ep.load_weights(folder)
    assert (loaded_spec, loaded_phases) == (spec, phases)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
