"""Optimiser, augmentation, dispatches and evaluation."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ep_jax as ep
from ep_jax import training
from ep_jax.data import to_float

SPEC = ep.NetworkSpec((6, 6, 1), (ep.Conv(2, 3), ep.Dense(3)), neuron=ep.DeltaCode(), feedback=0.5)
PHASES = ep.Phases(free=8, nudged=5, sweep="alternating", coordinates="displacement")


def images_and_labels(count: int = 12) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.integers(0, 256, (count, 6, 6, 1), dtype=np.uint8)),
        jnp.asarray(rng.integers(0, 3, count, dtype=np.int32)),
    )


def update(
    optimizer: optax.GradientTransformation, grads: ep.Params, state: Any, params: ep.Params
) -> tuple[ep.Params, Any]:
    """``optimizer.update``, whose updates have the type of the parameters."""
    updates, state = optimizer.update(grads, state, params)
    return cast(ep.Params, updates), state


def test_an_epoch_holds_every_example_and_equal_dispatches() -> None:
    """Would catch a dropped remainder, which hides images from training."""
    batches = training.epoch_batches(
        np.random.default_rng(1), examples=103, batch=8, steps_per_dispatch=5
    )
    assert set(batches.ravel().tolist()) == set(range(103))
    # 13 steps are needed; 3 dispatches of 5 are the fewest that hold them.
    assert batches.shape == (3, 5, 8)
    assert len(set(batches.ravel()[:103].tolist())) == 103  # no example comes twice before the end


def test_learning_rate_per_layer_and_schedule() -> None:
    """Adam's first step is the learning rate times the sign; the cosine ends at 0."""
    params = ({"w": jnp.ones(3), "b": jnp.ones(1)}, {"w": jnp.ones(2), "b": jnp.ones(1)})
    grads: ep.Params = jax.tree.map(lambda p: 7.0 * p, params)
    optimizer = training.make_optimizer(0.01, 10, layer_rates=(1.0, 0.25))
    state = optimizer.init(params)
    first, state = update(optimizer, grads, state, params)
    np.testing.assert_allclose(first[0]["w"], -0.01, rtol=1e-5)
    np.testing.assert_allclose(first[1]["b"], -0.0025, rtol=1e-5)
    for _ in range(9):
        _, state = update(optimizer, grads, state, params)
    last, _ = update(optimizer, grads, state, params)
    assert float(jnp.abs(last[0]["w"]).max()) == 0.0


def test_weight_decay_spares_biases() -> None:
    """With no gradient AdamW moves weights by -rate * decay * w and nothing else."""
    params = ({"w": jnp.full(3, 2.0), "b": jnp.full(1, 2.0)},)
    optimizer = training.make_optimizer(0.01, 10, layer_rates=(1.0,), weight_decay=0.1)
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = update(optimizer, nothing, optimizer.init(params), params)
    np.testing.assert_allclose(updates[0]["w"], -0.01 * 0.1 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(updates[0]["b"], 0.0)


def test_shifts_stay_in_bounds_and_keep_the_picture() -> None:
    """A bright pixel in the middle lands within the bound, everywhere in it, and stays whole."""
    images = jnp.zeros((400, 9, 9, 1)).at[:, 4, 4].set(1.0)
    moved = training.augment(jax.random.key(0), images, shift=2, flip=False)
    where = np.argwhere(np.asarray(moved[..., 0]) > 0)
    assert len(where) == 400
    offsets = {(int(i) - 4, int(j) - 4) for _, i, j in where}
    assert offsets == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


def test_flips_mirror_left_to_right_about_half_the_time() -> None:
    """Would catch a flip along the wrong axis, or one coin for the whole batch."""
    images = jnp.zeros((400, 5, 5, 1)).at[:, 1, 0].set(1.0)
    flipped = np.asarray(training.augment(jax.random.key(0), images, shift=0, flip=True))[..., 0]
    mirrored = flipped[:, 1, 4] == 1.0
    assert ((flipped[:, 1, 0] == 1.0) ^ mirrored).all()
    assert 150 < mirrored.sum() < 250  # 5 standard deviations around 200


def test_many_steps_in_one_dispatch_are_the_same_steps() -> None:
    """A scan over batches is a loop over batches: same order, keys and optimiser state."""
    images, labels = images_and_labels()
    optimizer = training.make_optimizer(0.01, 6, layer_rates=(1.0, 1.0))
    steps = jax.jit(training.make_train_steps(SPEC, PHASES, optimizer, shift=1, flip=True))
    key = jax.random.key(3)
    batches = jnp.asarray(np.random.default_rng(0).integers(0, 12, (6, 4)))
    start = training.init_train_state(jax.random.key(0), SPEC, optimizer)
    together, _ = steps(start, images, labels, batches, key)
    one_by_one = start
    for batch in batches:
        one_by_one, _ = steps(one_by_one, images, labels, batch[None], key)
    assert int(together.step) == 6
    for a, b in zip(
        jax.tree.leaves(together.params), jax.tree.leaves(one_by_one.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_training_step_follows_the_gradient_of_the_library() -> None:
    """One step without augmentation is the optimiser's update with ep_gradient's gradient."""
    images, labels = images_and_labels(4)
    optimizer = training.make_optimizer(0.01, 5, layer_rates=(1.0, 1.0))
    state = training.init_train_state(jax.random.key(0), SPEC, optimizer)
    steps = jax.jit(training.make_train_steps(SPEC, PHASES, optimizer))
    after, metrics = steps(state, images, labels, jnp.arange(4)[None], jax.random.key(1))
    grads, info = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))(
        state.params, SPEC, to_float(images), labels, PHASES
    )
    updates, _ = optimizer.update(grads, state.opt_state, state.params)
    expected = optax.apply_updates(state.params, updates)
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics.loss[0], info.cost, rtol=1e-5)
    wrong = np.mean(np.asarray(info.output.argmax(-1)) != np.asarray(labels))
    np.testing.assert_allclose(metrics.error[0], 100 * wrong)


def test_predictions_are_the_argmax_of_the_free_phase() -> None:
    """For a number of images that the batch does not divide, in their order."""
    images, _ = images_and_labels(11)
    params = ep.init_params(jax.random.key(2), SPEC)
    answers, info = training.predict(params, SPEC, PHASES, images, batch=4)
    settle = jax.jit(jax.vmap(lambda x: ep.free_phase(params, SPEC, x, PHASES)))
    state, own = settle(to_float(images))
    np.testing.assert_array_equal(answers, np.asarray(state[-1].argmax(-1)))
    np.testing.assert_allclose(info.spikes[0], own.spikes[0].mean(), rtol=1e-5)


def test_predict_refuses_images_it_would_misread() -> None:
    """Floats would be scaled twice."""
    params = ep.init_params(jax.random.key(2), SPEC)
    with pytest.raises(ValueError, match=r"images has dtype float32 .* expected uint8"):
        training.predict(params, SPEC, PHASES, np.zeros((2, 6, 6, 1), np.float32))
