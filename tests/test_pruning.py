"""A network without its silent units is the same network."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flat, make_batch, make_params

import ep_jax as ep
from ep_jax.pruning import activity, prune

pytestmark = pytest.mark.usefixtures("x64")

SPEC = ep.NetworkSpec(
    (8, 8, 2),
    (ep.Conv(5, 3, padding="SAME"), ep.Conv(4, 3, padding="SAME"), ep.Dense(6), ep.Dense(3)),
    feedback=0.3,
)
SILENT = ([0, 3], [1], [2, 5])


def silenced(spec: ep.NetworkSpec) -> Any:
    """Random parameters, and biases that nothing lifts above zero where a unit is silent."""
    layers = [dict(p) for p in make_params(spec)]
    for p, units in zip(layers, SILENT, strict=False):
        p["b"] = p["b"].at[np.array(units)].set(-50.0)
    return tuple(layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("neuron", "cost", "estimator", "coordinates"),
    [
        (ep.Rate, "cross_entropy", "one_sided", "displacement"),
        (ep.DeltaCode, "squared_error", "one_sided", "displacement"),
        (ep.SigmaDelta, "squared_error", "symmetric", "absolute"),
    ],
)
def test_silent_units_take_no_part(
    neuron: Any, cost: Any, estimator: Any, coordinates: Any
) -> None:
    """Inputs that shift by a channel, positions mixed with channels, a layer cut on one side only.

    States, energy and EP gradients of the units that stay are the same; those of the others are 0.
    """
    spec = replace(SPEC, neuron=neuron(), cost=cost)
    phases = ep.Phases(12, 8, 0.1, estimator, coordinates=coordinates)
    params = silenced(spec)
    xs, ys = make_batch(spec, 6)
    images = np.asarray(255 * xs, np.uint8)

    keep = tuple(share > 0 for share in activity(params, spec, phases, images, batch=4))
    for units, silent in zip(keep, SILENT, strict=True):
        assert not units[silent].any()
    alive = (*keep, np.ones(spec.classes, bool))

    @functools.partial(jax.jit, static_argnums=1)
    def measure(params: Any, spec: Any, xs: Any) -> Any:
        states = jax.vmap(lambda x: ep.free_phase(params, spec, x, phases)[0])(xs)
        energies = jax.vmap(lambda x, state: ep.energy(params, spec, x, state))(xs, states)
        return states, energies, ep.ep_gradient(params, spec, xs, ys, phases)[0]

    xs = jnp.asarray(images / 255)
    states, energies, grads = measure(params, spec, xs)
    fewer, energies_of_fewer, grads_of_fewer = measure(*prune(params, spec, keep), xs)
    for whole, part, units in zip(states, fewer, alive, strict=False):
        np.testing.assert_allclose(part, whole[..., units], atol=1e-12)
    np.testing.assert_allclose(energies_of_fewer, energies, rtol=1e-12)
    np.testing.assert_allclose(flat(grads_of_fewer), flat(prune(grads, spec, keep)[0]), atol=1e-10)
    for g, units in zip(grads, alive, strict=True):
        assert not np.asarray(g["b"])[~units].any()


def test_a_unit_that_is_awake_in_passing_counts() -> None:
    """States looked at in the end only: what a unit said before would be missing.

    ``s_1 = [1/2 - s_2]``, ``s_2 = [1 - s_1]`` at feedback 1: 1/2 after one sweep, then 0 for good.
    """
    spec = ep.NetworkSpec((1,), (ep.Dense(1), ep.Dense(1), ep.Dense(1)), ep.Rate())
    weights, biases = (0.5, -1.0, 0.0), (0.0, 1.0, 0.0)
    params = tuple(
        {"w": jnp.full((1, 1), w), "b": jnp.full(1, b)}
        for w, b in zip(weights, biases, strict=True)
    )
    phases = ep.Phases(free=10, sweep="synchronous")
    images = np.array([[255], [0], [0], [0]], np.uint8)
    state, _ = ep.free_phase(params, spec, jnp.ones(1), phases)
    assert float(state[0][0]) == 0
    share = activity(params, spec, phases, images)
    np.testing.assert_array_equal(share, [[0.25], [1.0]])
