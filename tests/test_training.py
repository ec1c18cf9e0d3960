"""Augmentation, dispatches and evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ep_jax as ep
from ep_jax import training
from ep_jax.data import to_float
from ep_jax.optimizers import AdamW, make_optimizer
from ep_jax.training import Augmentation

SPEC = ep.NetworkSpec((6, 6, 1), (ep.Conv(2, 3), ep.Dense(3)), neuron=ep.DeltaCode(), feedback=0.5)
PHASES = ep.Phases(free=8, nudged=5, sweep="alternating", coordinates="displacement")


def images_and_labels(count: int = 12) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.integers(0, 256, (count, 6, 6, 1), dtype=np.uint8)),
        jnp.asarray(rng.integers(0, 3, count, dtype=np.int32)),
    )


def test_an_epoch_holds_every_example_and_equal_dispatches() -> None:
    """Would catch a dropped remainder, which hides images from training."""
    batches = training.epoch_batches(
        np.random.default_rng(1), examples=103, batch=8, steps_per_dispatch=5
    )
    assert set(batches.ravel().tolist()) == set(range(103))
    # 13 steps are needed; 3 dispatches of 5 are the fewest that hold them.
    assert batches.shape == (3, 5, 8)
    assert len(set(batches.ravel()[:103].tolist())) == 103  # no example comes twice before the end


def test_shifts_stay_in_bounds_and_keep_the_picture() -> None:
    """A bright pixel in the middle lands within the bound, everywhere in it, and stays whole."""
    images = jnp.zeros((400, 9, 9, 1)).at[:, 4, 4].set(1.0)
    moved = training.augment(jax.random.key(0), images, Augmentation(shift=2))
    where = np.argwhere(np.asarray(moved[..., 0]) > 0)
    assert len(where) == 400
    offsets = {(int(i) - 4, int(j) - 4) for _, i, j in where}
    assert offsets == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


def test_flips_mirror_left_to_right_about_half_the_time() -> None:
    """Would catch a flip along the wrong axis, or one coin for the whole batch."""
    images = jnp.zeros((400, 5, 5, 1)).at[:, 1, 0].set(1.0)
    flipped = np.asarray(training.augment(jax.random.key(0), images, Augmentation(flip=True)))
    flipped = flipped[..., 0]
    mirrored = flipped[:, 1, 4] == 1.0
    assert ((flipped[:, 1, 0] == 1.0) ^ mirrored).all()
    assert 150 < mirrored.sum() < 250  # 5 standard deviations around 200


def deformed_ramps(seed: int, how: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    """An image whose two channels are row and column, and 200 of it that are varied."""
    rows, columns = np.meshgrid(np.arange(21.0), np.arange(21.0), indexing="ij")
    image = np.stack([rows, columns], axis=-1)
    images = jnp.asarray(np.broadcast_to(image, (200, *image.shape)))
    return image, np.asarray(training.augment(jax.random.key(seed), images, how))


def slopes(how: Augmentation) -> np.ndarray:
    """The matrices of 200 deformations, ``[200, 2, 2]``, from what they make of two linear ramps.

    Linear interpolation keeps a ramp a ramp: its slopes in the middle of the image are a row of the
    matrix by which positions are multiplied.
    """
    _, varied = deformed_ramps(5, how)
    np.testing.assert_allclose(varied[:, 10, 10], 10.0, atol=1e-3)  # turns about the middle
    down, right = varied[:, 12, 10] - varied[:, 8, 10], varied[:, 10, 12] - varied[:, 10, 8]
    return np.stack([down, right], axis=-1) / 4


def test_rotations_turn_by_up_to_the_angle_about_the_middle() -> None:
    """Would catch degrees taken for radians, or an angle that is always positive."""
    matrices = slopes(Augmentation(rotate=30.0))
    unit = np.broadcast_to(np.eye(2), matrices.shape)
    np.testing.assert_allclose(matrices @ matrices.transpose(0, 2, 1), unit, atol=1e-4)
    np.testing.assert_allclose(np.linalg.det(matrices), 1.0, atol=1e-4)
    angles = np.rad2deg(np.arcsin(matrices[:, 1, 0]))
    assert np.abs(angles).max() <= 30.01
    # Uniform: 5 standard errors around the mean 0 and the standard deviation 30 / sqrt(3).
    assert abs(angles.mean()) < 5 * 30 / np.sqrt(3 * 200)
    assert abs(angles.std() * np.sqrt(3) / 30 - 1) < 5 * np.sqrt(0.2 / 200)


def test_scales_and_shears_stay_within_their_bounds() -> None:
    """Height and width change by factors of their own; a shear keeps the area."""
    matrices = slopes(Augmentation(scale=0.25))
    np.testing.assert_allclose(matrices[:, 0, 1], 0.0, atol=1e-4)
    np.testing.assert_allclose(matrices[:, 1, 0], 0.0, atol=1e-4)
    factors = matrices[:, [0, 1], [0, 1]]
    assert 0.8 - 1e-4 <= factors.min() < 0.82
    assert 1.22 < factors.max() <= 1.25 + 1e-4
    assert abs(np.corrcoef(factors.T)[0, 1]) < 5 / np.sqrt(200)
    matrices = slopes(Augmentation(shear=20.0))
    np.testing.assert_allclose(np.linalg.det(matrices), 1.0, atol=1e-4)
    assert np.abs(matrices[:, 1, 0]).max() <= np.tan(np.deg2rad(20.0)) + 1e-4
    assert matrices[:, 1, 0].min() < 0 < matrices[:, 1, 0].max()


def test_warps_are_smooth_and_as_large_as_they_say() -> None:
    """A warp of 1 moves pixels by about one pixel, its neighbours nearly alike, nowhere on average.

    The ramps tell where each pixel comes from. Independent displacements of neighbours would differ
    by 1.4 standard deviations; between knots four pixels apart it is about a third of that.
    """
    image, varied = deformed_ramps(6, Augmentation(warp=1.0))
    moved = (varied - image)[:, 6:15, 6:15]  # nothing from outside comes so far
    assert 0.5 < moved.std() < 1.1
    assert abs(moved.mean()) < 5 * 1.0 / np.sqrt(200)
    assert np.diff(moved, axis=1).std() < 0.6 * moved.std()
    assert np.diff(moved, axis=2).std() < 0.6 * moved.std()


def test_erasing_takes_one_square_out() -> None:
    """Holes are squares of the side, cut at the edges, anywhere; the rest stays."""
    images = jnp.ones((400, 9, 9, 2))
    erased = np.asarray(training.augment(jax.random.key(7), images, Augmentation(erase=3)))
    np.testing.assert_array_equal(erased[..., 0], erased[..., 1])
    holes = erased[..., 0] == 0.0
    assert set(np.unique(erased)) == {0.0, 1.0}
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    np.testing.assert_array_equal(holes.sum((1, 2)), heights * widths)
    # The middle is anywhere in the image: 7 of 9 places leave a whole side, 2 cut it to 2.
    assert set(heights) == set(widths) == {2, 3}
    assert abs((heights == 3).mean() - 7 / 9) < 5 * np.sqrt(7 / 9 * 2 / 9 / 400)
    assert holes.any(0).all()


def test_images_are_varied_each_on_its_own_and_deformations_keep_a_blank_one_blank() -> None:
    """Would catch one key for the whole batch, and interpolation that lets the border in."""
    how = Augmentation(shift=2, rotate=15.0, scale=0.1, shear=5.0, warp=0.5, flip=True, erase=4)
    images = jnp.asarray(np.random.default_rng(3).uniform(size=(1, 12, 12, 1)).repeat(8, 0))
    varied = np.asarray(training.augment(jax.random.key(8), images, how))
    assert len({image.tobytes() for image in varied}) == 8
    blank = training.augment(jax.random.key(8), jnp.zeros((8, 12, 12, 1)), how)
    np.testing.assert_array_equal(blank, 0.0)
    same = training.augment(jax.random.key(8), images, Augmentation())
    np.testing.assert_array_equal(same, images)


def test_many_steps_in_one_dispatch_are_the_same_steps() -> None:
    """A scan over batches is a loop over batches: same order, keys and optimiser state."""
    images, labels = images_and_labels()
    optimizer = make_optimizer(SPEC, AdamW(), learning_rate=0.01, steps=6)
    varied = Augmentation(shift=1, rotate=10.0, flip=True, erase=2)
    steps = jax.jit(training.make_train_steps(SPEC, PHASES, optimizer, augmentation=varied))
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


@pytest.mark.parametrize("drawn", ["images", "phases"])
def test_every_step_draws_its_own_numbers(drawn: str) -> None:
    """The same images in each step, and a gradient that tells what it saw in place of the cost."""
    images, labels = images_and_labels()

    def seen(params: Any, spec: Any, xs: Any, ys: Any, phases: Any, key: Any) -> Any:
        grads, info = ep.ep_gradient(params, spec, xs, ys, phases)
        saw = jnp.mean(xs[:, :3]) if drawn == "images" else jax.random.uniform(key)
        return grads, info._replace(cost=saw)

    optimizer = make_optimizer(SPEC, AdamW(), learning_rate=0.01, steps=5)
    start = training.init_train_state(jax.random.key(0), SPEC, optimizer)
    steps = training.make_train_steps(
        SPEC, PHASES, optimizer, augmentation=Augmentation(erase=3), gradient=seen
    )
    batches = jnp.tile(jnp.arange(4), (5, 1))
    _, metrics = jax.jit(steps)(start, images, labels, batches, jax.random.key(3))
    assert len(set(metrics.loss.tolist())) == 5


def test_a_training_step_follows_the_gradient_of_the_library() -> None:
    """One step without augmentation is the optimiser's update with ep_gradient's gradient.

    The optimiser is told how many images of the free phase are unsettled.
    """
    images, labels = images_and_labels(4)
    phases = replace(PHASES, free=3)  # too few
    optimizer = make_optimizer(SPEC, AdamW(), learning_rate=0.01, steps=5, shrink=0.1)
    state = training.init_train_state(jax.random.key(0), SPEC, optimizer)
    steps = jax.jit(training.make_train_steps(SPEC, phases, optimizer))
    after, metrics = steps(state, images, labels, jnp.arange(4)[None], jax.random.key(1))
    grads, info = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))(
        state.params, SPEC, to_float(images), labels, phases
    )
    assert float(info.free.unsettled) > 0
    told: Any = optimizer
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        updates, _ = told.update(
            grads, state.opt_state, state.params, unsettled=info.free.unsettled
        )
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


def test_stragglers_are_found_within_each_batch() -> None:
    """Eleven images in batches of four and one of three: all of them go on, or some settle less."""
    images, _ = images_and_labels(11)
    params = ep.init_params(jax.random.key(2), SPEC)
    some = replace(PHASES, stragglers=0.9, free_more=4)  # which rounds up to all of a batch
    long = replace(PHASES, free=12)
    (answers, info), (expected, at_once) = (
        training.predict(params, SPEC, phases, images, batch=4) for phases in (some, long)
    )
    np.testing.assert_array_equal(answers, expected)
    assert float(info.sweeps) == 12
    np.testing.assert_allclose(info.spikes, at_once.spikes, rtol=1e-5)


def test_predict_refuses_images_it_would_misread() -> None:
    """Integers that are no pixels, which nobody has scaled; floats are what a network sees."""
    params = ep.init_params(jax.random.key(2), SPEC)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 1), np.uint8)
    with pytest.raises(TypeError, match=r"images has dtype int32; expected uint8"):
        training.predict(params, SPEC, PHASES, pixels.astype(np.int32))
    first, second = (
        training.predict(params, SPEC, PHASES, images)[0]
        for images in (pixels, pixels.astype(np.float32) / 255)
    )
    np.testing.assert_array_equal(first, second)
