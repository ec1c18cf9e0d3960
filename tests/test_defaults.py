"""What a new user computes first: a gradient, with no setting but the layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow

import ep_jax as ep
from ep_jax.data import load, to_float

SAME = ep.Conv(8, 3, pool=None, padding="SAME")
TOP = (ep.Dense(32), ep.Dense(10))
POOLED = (ep.Conv(8, 5), ep.Conv(8, 3))


@pytest.mark.parametrize(
    ("shape", "layers", "neuron"),
    [
        ((8, 8, 1), (SAME, *TOP), ep.DeltaCode()),
        slow((8, 8, 1), (SAME, *TOP), ep.Rate(activation="tanh")),
        slow((8, 8, 1), (*6 * (SAME,), *TOP), ep.DeltaCode()),
        slow((28, 28, 1), (*POOLED, *TOP), ep.DeltaCode()),
        slow((32, 32, 3), (*POOLED, *TOP), ep.Rate()),
    ],
)
def test_the_first_gradient_is_right(shape: Any, layers: Any, neuron: Any) -> None:
    """Initial weights, sweeps, nudge or code whose gradient is another one, and nobody told."""
    spec = ep.NetworkSpec(shape, layers, neuron)
    params = ep.init_params(jax.random.key(0), spec)
    xs = np.random.default_rng(0).uniform(size=(16, *shape))
    if shape == (8, 8, 1):
        xs = to_float(load("digits").train_images[:16])
    xs, ys = jnp.asarray(xs, jnp.float32), jnp.arange(16) % 10
    grads, info = ep.ep_gradient(params, spec, xs, ys, ep.Phases())
    exact = ep.diagnostics.exact_gradient(params, spec, xs, ys)
    assert min(ep.diagnostics.compare(grads, exact).cosine) > 0.95
    assert info.free.unsettled == 0
