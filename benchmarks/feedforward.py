"""Back-propagation in the feed-forward network of the same folded layers: the price to compare.

It is what the recurrent network becomes without feedback: ``s_l = sigma(A_l(s_{l-1}))``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import ep_jax as ep
from ep_jax import network


def feedforward_gradient(
    params: ep.Params,
    spec: ep.NetworkSpec,
    xs: jax.Array,
    ys: jax.Array,
    phases: ep.Phases | None = None,
    key: jax.Array | None = None,
) -> tuple[ep.Params, ep.GradientInfo]:
    """The gradient of the batch-mean cost, with the signature of the library's gradients."""
    del phases, key
    wanted = network.targets(spec, ys, xs.dtype, (len(xs),))

    def mean_cost(params: ep.Params) -> tuple[jax.Array, jax.Array]:
        prepared = network.prepare(params, spec)

        def one(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            drives = network.input_drive(spec, prepared, x)
            last = network.pass_from_below(spec, prepared, drives)[-1]
            cost = network.cost_of(spec, prepared, last, y)
            return cost, network.read_out(spec, prepared, last)

        costs, output = jax.vmap(one)(xs, wanted)
        return jnp.mean(costs), output

    (value, output), grads = jax.value_and_grad(mean_cost, has_aux=True)(params)
    zero = jnp.zeros(())
    every = (zero,) * spec.depth
    nothing = ep.PhaseInfo(zero, every, zero, zero, zero, zero, every, every)
    return grads, ep.GradientInfo(value, output, nothing)
