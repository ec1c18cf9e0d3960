"""Quantisers and their surrogate derivatives, which only reverse mode through spikes sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flat, make_batch, make_params

import ep_jax as ep
from ep_jax import spikes

pytestmark = pytest.mark.usefixtures("x64")


class Staircase(NamedTuple):
    """A quantiser, what it makes of `values` (ties included), and where its nearest steps are."""

    quantise: Any
    values: list[float]
    expected: list[float]
    steps: list[float]


EDGE = 2.0**-40  # a distance from a tie that float64 resolves
STAIRCASES = {
    "binary": Staircase(
        spikes.binary, [-3.0, 0.2, 0.5, 0.5 + EDGE, 4.0], [0, 0, 0, 1, 1], [0.5] * 5
    ),
    "fire": Staircase(spikes.fire, [-3.0, 1 - EDGE, 1.0, 1.3, 4.0], [0, 0, 1, 1, 1], [1.0] * 5),
    "ternary": Staircase(
        spikes.ternary,
        [-7.0, -1.4, -0.5, -0.5 - EDGE, -0.1, 0.3, 0.5, 0.5 + EDGE, 1.5, 1.6, 9.0],
        [-1, -1, 0, -1, 0, 0, 0, 1, 1, 1, 1],
        [-0.5, -0.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
    ),
    "rounded": Staircase(
        spikes.rounded,
        [-2.5, -1.7, -0.5, 0.2, 0.5, 1.5, 2.5, 3.1],
        [-2, -2, 0, 0, 0, 2, 2, 3],
        [-2.5, -1.5, -0.5, 0.5, 0.5, 1.5, 2.5, 3.5],
    ),
    "floored": Staircase(
        spikes.floored,
        [-1.2, -EDGE, 0.0, 0.3, 0.8, 1 - EDGE, 2.0, 2.1],
        [-2, -1, 0, 0, 0, 0, 2, 2],
        [-1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0],
    ),
}


def hat(distance: np.ndarray) -> np.ndarray:
    """Height 2 at the step, 0 from half a unit away: by linear interpolation, not by formula."""
    return np.interp(distance, [-0.5, 0.0, 0.5], [0.0, 2.0, 0.0])


def fast_sigmoid_slope(distance: np.ndarray) -> np.ndarray:
    """The slope of ``x / (1 + 2 |x|)``, whose range is 1, by the quotient rule."""
    size = 1 + 2 * np.abs(distance)
    return (size - distance * 2 * np.sign(distance)) / size**2


SLOPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "straight_through": np.ones_like,
    "triangle": hat,
    "fast_sigmoid": fast_sigmoid_slope,
}


@pytest.mark.parametrize("surrogate", spikes.SURROGATES)
@pytest.mark.parametrize("name", STAIRCASES)
def test_staircase_and_slope(name: str, surrogate: str) -> None:
    """Another threshold, tie or range; a slope centred elsewhere than at the nearest step.

    Forward and in reverse mode, the latter times what comes from above.
    """
    quantise, values, expected, steps = STAIRCASES[name]
    v = jnp.asarray(values)
    out, pull = jax.vjp(lambda v: quantise(v, surrogate), v)
    np.testing.assert_array_equal(out, expected)
    assert out.dtype == v.dtype
    above = np.linspace(-1, 3, len(values))
    slope = SLOPES[surrogate](np.asarray(values) - np.asarray(steps))
    np.testing.assert_allclose(pull(jnp.asarray(above))[0], above * slope, atol=1e-14)


@pytest.mark.parametrize("surrogate", spikes.SURROGATES)
def test_surrogate_integrates_to_the_height_of_its_step(surrogate: str) -> None:
    """A slope of another scale: gradients through n spikes would be off by its n-th power.

    Straight-through over the unit around a step, the hat over its support, the long tail over the
    whole line, mapped to an interval by ``x = u / (1 - u)``.
    """
    slope = spikes.SURROGATES[surrogate]
    if surrogate == "fast_sigmoid":
        u = np.linspace(0, 1, 20001)[:-1]
        x, weight = u / (1 - u), (1 - u) ** -2
        values = 2 * np.asarray(slope(jnp.asarray(x))) * weight
        values = np.append(values, 0.5)  # the limit of 2 x^2 (1 + 2 x)^-2
        grid = np.append(u, 1.0)
    else:
        grid = np.linspace(-0.5, 0.5, 20001)
        values = np.asarray(slope(jnp.asarray(grid)))
    assert abs(np.trapezoid(values, grid) - 1) < 1e-7


def test_ep_gradient_does_not_know_of_surrogates() -> None:
    """A surrogate that reaches EP, which differentiates nothing in time."""
    grads = []
    for surrogate in spikes.SURROGATES:
        spec = ep.NetworkSpec(
            (5,), (ep.Dense(6), ep.Dense(3)), ep.DeltaCode(surrogate=surrogate), feedback=0.4
        )
        params, (xs, ys) = make_params(spec), make_batch(spec, 2)
        run = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))
        grads.append(flat(run(params, spec, xs, ys, ep.Phases(8, 6))[0]))
    assert np.abs(grads[0]).max() > 0.1
    np.testing.assert_array_equal(grads[0], grads[1])
    np.testing.assert_array_equal(grads[0], grads[2])
