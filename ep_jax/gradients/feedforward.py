"""Back-propagation in the feed-forward network of the same layers: what EP's price is held against.

It is what the recurrent network becomes without feedback: ``s_l = sigma(A_l(s_{l-1}))``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ep_jax import network
from ep_jax.dynamics import PhaseInfo
from ep_jax.gradients.batch import GradientInfo
from ep_jax.network import NetworkSpec, Params
from ep_jax.phases import Phases


def feedforward_gradient(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    ys: jax.Array,
    phases: Phases | None = None,
    key: jax.Array | None = None,
) -> tuple[Params, GradientInfo]:
    """The gradient of the batch-mean cost without feedback, by reverse mode.

    It has the signature of the library's other gradients; of `phases` only the precision is used,
    and `key` is not. Spikes play no part: neurons are those of the rate twin.

    Args:
        params: parameters of `spec`.
        spec: the network.
        xs: inputs, floating point, ``[B, *spec.input_shape]``.
        ys: integer labels ``[B]``, or targets ``[B, ...]`` of the answers' shape.
        phases: its products have their precision, by default that of the parameters.
        key: not used.

    Example:
        >>> spec = NetworkSpec((3,), (ep_jax.Dense(4), ep_jax.Dense(2)))
        >>> params = network.draw_params(jax.random.key(0), spec)
        >>> grads, info = feedforward_gradient(params, spec, jnp.ones((5, 3)), jnp.arange(5) % 2)
        >>> grads[0]["w"].shape, info.output.shape
        ((3, 4), (5, 2))
    """
    del key
    phases = phases or Phases()
    wanted = network.targets(spec, ys, xs.dtype, (len(xs),))

    def mean_cost(params: Params) -> tuple[jax.Array, jax.Array]:
        prepared = network.prepare(params, spec, phases.precision)

        def one(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            drives = network.input_drive(spec, prepared, x)
            last = network.pass_from_below(spec, prepared, drives)[-1]
            cost = network.cost_of(spec, prepared, last, y)
            return cost, network.read_out(spec, prepared, last)

        costs, output = jax.vmap(one)(xs, wanted)
        return jnp.mean(costs), output

    with phases.products():
        (value, output), grads = jax.value_and_grad(mean_cost, has_aux=True)(params)
    zero = jnp.zeros(())
    every = (zero,) * spec.depth
    nothing = PhaseInfo(zero, every, zero, zero, zero, zero, every, every)
    return grads, GradientInfo(value, output, nothing)
