"""Presets: the networks that they name, first gradients, programs that a GPU can be given."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ep_jax as ep
from ep_jax import training
from ep_jax.gradients import GRADIENTS
from ep_jax.loop import Training, optimizer_of
from ep_jax.network import parameters_of
from ep_jax.presets import PRESETS, spec_of

SHAPE = (32, 32, 3)
STATES = {
    "cifar10": ((16, 16, 64), (8, 8, 128), (4, 4, 256), (10,)),
    "cifar10_vgg5": ((16, 16, 128), (8, 8, 256), (4, 4, 512), (2, 2, 512), (10,)),
}
SHIPPED = 4e6
"""Bytes that weights in the repository may have."""


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("cifar10")])
def test_every_method_has_the_same_layers(name: str) -> None:
    """A method that is compared with another one of more units."""
    small = "cifar10_vgg5" if "vgg5" in name else "cifar10"
    spec = spec_of(PRESETS[name], SHAPE, 10)
    assert spec.state_shapes == STATES[small]
    size = sum(np.prod(a.shape) for a in jax.tree.leaves(parameters_of(spec)))
    assert (4 * size < SHIPPED) == (small == "cifar10")


def test_inputs_are_centred_and_as_large_as_those_of_mnist() -> None:
    """Channels in another order, or bytes in place of [0, 1]: pixels of CIFAR-10 are near .47."""
    told = PRESETS["cifar10"].normalization(jnp.full(SHAPE, 0.47))
    np.testing.assert_allclose(told, 0.0, atol=0.05)
    span = PRESETS["cifar10"].normalization(jnp.ones(3)) - PRESETS["cifar10"].normalization(
        jnp.zeros(3)
    )
    np.testing.assert_allclose(span, 4 / 3, rtol=0.1)


@pytest.mark.parametrize(
    "name", ["cifar10_vgg5", "cifar10_vgg5_rate_bptt", "cifar10_vgg5_backprop"]
)
def test_a_training_step_of_full_size_lowers_for_a_gpu(name: str) -> None:
    """A program that only a GPU would have refused; windows gathered as on a CPU."""
    config = PRESETS[name]
    spec = spec_of(config, SHAPE, 10)
    optimizer = optimizer_of(config, spec, 100)
    steps = training.make_train_steps(
        spec,
        config.phases,
        optimizer,
        augmentation=config.augmentation,
        gradient=GRADIENTS[config.gradient],
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(
        lambda key: training.init_train_state(key, spec, optimizer, config.gain), key
    )
    images = jax.ShapeDtypeStruct((1000, *SHAPE), jnp.uint8)
    labels = jax.ShapeDtypeStruct((1000,), jnp.int32)
    batches = jax.ShapeDtypeStruct((2, config.batch), jnp.int32)
    traced = jax.jit(steps).trace(state, images, labels, batches, key)
    after, metrics = traced.out_info
    shapes = [jax.tree.map(lambda a: a.shape, tree) for tree in (state.params, after.params)]
    assert shapes[0] == shapes[1]
    assert metrics.loss.shape == (2,)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.convolution" in text
    assert "callback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10_vgg5", "cifar10_vgg5_rate"])
def test_a_step_of_few_channels_learns(name: str) -> None:
    """A pool that leaves nothing of an image; an optimiser that leaves weights where they are."""
    config = replace(PRESETS[name], channels=(2, 2, 2, 2), batch=4, epochs=1, steps_per_dispatch=1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    none, labels = images[:0], np.arange(4)
    data = ep.data.Dataset("own", 10, images, labels, none, labels[:0], images, labels)
    taught = Training(config, data)
    before = jax.device_get((start := taught.start()).params)
    state, metrics = taught.steps(taught.compile(start), taught.dispatches(1)[0])
    assert np.isfinite(metrics.loss).all()
    for a, b in zip(before, state.params, strict=True):
        assert np.linalg.norm(a["w"] - b["w"]) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist_feedforward", "fashion_mnist_feedforward"])
def test_a_control_without_feedback_settles(name: str) -> None:
    """Over-relaxed: nothing comes back, so every sweep beyond a full step adds to the error."""
    config = replace(PRESETS[name], channels=(8, 16), hidden=(32,))
    spec = spec_of(config, (28, 28, 1), 10)
    params = ep.init_params(jax.random.key(0), spec, config.gain)
    xs = jax.random.uniform(jax.random.key(1), (32, 28, 28, 1))
    ys = jnp.arange(32) % 10
    found, _ = jax.jit(lambda params: ep.ep_gradient(params, spec, xs, ys, config.phases))(params)
    exact = ep.diagnostics.exact_gradient(params, spec, xs, ys)
    assert min(ep.diagnostics.compare(found, exact).cosine) > 0.95
