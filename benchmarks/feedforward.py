"""Back-propagation in the feed-forward network of the same folded layers: the price to compare.

It is what the recurrent network becomes without feedback: ``s_l = sigma(A_l(s_{l-1}))``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import ep_jax as ep
from ep_jax import network
from ep_jax.costs import cost, read_out, targets
from ep_jax.dynamics import activation_of


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
    wanted = targets(spec, ys, xs.dtype, (len(xs),))

    def mean_cost(params: ep.Params) -> tuple[jax.Array, jax.Array]:
        links = network.link(params, spec)

        def one(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            def unit(l: int, drive: jax.Array) -> jax.Array:
                return activation_of(spec, l).apply(drive + links.biases[l])

            s = unit(0, network.input_drive(spec, links, x))
            for l in range(1, spec.depth):
                s = unit(l, network.drive(spec, links, l, s))
            return cost(spec, links, s, y), read_out(links, s)

        costs, output = jax.vmap(one)(xs, wanted)
        return jnp.mean(costs), output

    (value, output), grads = jax.value_and_grad(mean_cost, has_aux=True)(params)
    zero = jnp.zeros(())
    every = (zero,) * spec.depth
    nothing = ep.PhaseInfo(zero, every, zero, zero, zero, zero, every, every)
    return grads, ep.GradientInfo(value, output, nothing)
