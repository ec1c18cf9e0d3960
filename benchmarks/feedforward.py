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
            s = x
            for l in range(spec.depth):
                below = network.input_drive(spec, links, x) if l == 0 else (
                    network.drive(spec, links, l, s)
                )  # fmt: skip
                s = activation_of(spec, l).apply(below + links.biases[l])
            return cost(spec, links, s, y), read_out(links, s)

        costs, output = jax.vmap(one)(xs, wanted)
        return jnp.mean(costs), output

    (value, output), grads = jax.value_and_grad(mean_cost, has_aux=True)(params)
    nothing = ep.PhaseInfo(*(jnp.zeros(()),) * 2, (jnp.zeros(()),) * spec.depth)
    return grads, ep.GradientInfo(value, output, nothing)
