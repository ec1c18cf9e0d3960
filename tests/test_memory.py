"""Memory of the EP gradient: the claim it exists for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import ep_jax as ep


@pytest.mark.parametrize(
    ("neuron", "coordinates"),
    [
        (ep.Rate(), "absolute"),
        (ep.Rate(), "displacement"),
        (ep.DeltaCode(), "absolute"),
        (ep.DeltaCode(), "displacement"),
    ],
)
def test_memory_does_not_grow_with_the_number_of_sweeps(neuron: Any, coordinates: Any) -> None:
    """Anything that is kept for each sweep: states stacked by a scan, an unrolled loop."""
    spec = ep.NetworkSpec((16, 16, 1), (ep.Conv(32, 3), ep.Dense(32), ep.Dense(3)), neuron)
    params = jax.eval_shape(lambda: ep.init_params(jax.random.key(0), spec))
    xs = jax.ShapeDtypeStruct((32, 16, 16, 1), jnp.float32)
    ys = jax.ShapeDtypeStruct((32,), jnp.int32)
    sizes = []
    for steps in (10, 1000):
        phases = ep.Phases(steps, steps, coordinates=coordinates)
        lowered = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases")).lower(
            params, spec, xs, ys, phases
        )
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        sizes.append(analysis.temp_size_in_bytes)
    # All of it is a few copies of the batch of states, so even one number that an example kept of
    # each sweep (4 bytes * 32 examples * 1000) would exceed the two per cent.
    assert 0.02 * min(sizes) < 4 * 32 * 900
    assert max(sizes) <= 1.02 * min(sizes), sizes
