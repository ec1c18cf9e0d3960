"""Initial parameters: of a given scale, or of a given loop gain."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ep_jax import dynamics, network
from ep_jax.checks import check_key, check_number
from ep_jax.diagnostics import rate_twin, spectral_radius
from ep_jax.network import NetworkSpec, Params
from ep_jax.phases import Phases

_INPUTS = 4
_SETTLED = Phases(free=40, sweep="ordered", relaxation=1.4)
_WEAK = 0.01
"""Scale of the links at which the correction begins: there is no loop to speak of."""
_CORRECTIONS, _CORRECTION = 8, 0.9
"""How often the scale is corrected, and the power of the correction."""


def init_params(
    key: jax.Array,
    spec: NetworkSpec,
    gain: float = 0.5,
    dtype: Any = jnp.float32,
    radius: float | None = None,
) -> Params:
    """Random parameters: weights uniform with standard deviation ``gain / sqrt(fan_in)``, no bias.

    With `radius`, the links between layers are then scaled by one factor, such that the relaxation
    starts with that spectral radius (`ep_jax.diagnostics.spectral_radius`), the largest of four
    random inputs' in [0, 1]. One gain makes a deep network settle slower than a shallow one; one
    radius makes them alike. What comes from the input keeps its gain: it is not part of the loop.

    Args:
        key: random key.
        spec: the network.
        gain: scale of the weights. Large gains with strong feedback make a network multistable;
            with small ones the states of a deep network fade away.
        dtype: floating-point type of the parameters.
        radius: spectral radius of the relaxation, at most .999, that the network starts with; by
            default what `gain` gives.

    Returns:
        A tuple over layers, then over skips, of dictionaries. Those of `Conv` and `Dense` hold
        ``w`` and ``b``.

    Example:
        >>> layers = (ep_jax.Dense(64), ep_jax.Dense(64), ep_jax.Dense(10))
        >>> spec = ep_jax.NetworkSpec((32,), layers)
        >>> [p["w"].shape for p in ep_jax.init_params(jax.random.key(0), spec)]
        [(32, 64), (64, 64), (64, 10)]
        >>> params = ep_jax.init_params(jax.random.key(0), spec, radius=0.8)
        >>> x = jax.random.uniform(jax.random.key(1), (32,))
        >>> state, _ = ep_jax.free_phase(params, spec, x, ep_jax.Phases())
        >>> round(float(ep_jax.diagnostics.spectral_radius(params, spec, x, state)), 1)
        0.8
    """
    check_key("key", key)
    params = network.draw_params(key, spec, gain, dtype)
    if radius is None:
        return params
    check_number("radius", radius, above=0.0, at_most=0.999)
    if spec.depth < 2:
        raise ValueError("radius is given, but the network has one layer and no loop")
    return _with_radius(params, spec, radius, jax.random.fold_in(key, len(params)))


def _with_radius(params: Params, spec: NetworkSpec, radius: float, key: jax.Array) -> Params:
    """Links scaled until the radius is right.

    The radius is proportional to the scale of the links, but for the units that a stronger loop
    moves to their bounds or away from them. So the scale is corrected by the ratio of what is asked
    for and what is there, a little less than in full, which comes from below: links that are far
    too strong hold all units at their bounds, where the radius is 0.
    """
    xs = jax.random.uniform(key, (_INPUTS, *spec.input_shape), network.precision_of(params))
    twin = rate_twin(spec)

    def scaled(scale: jax.Array) -> Params:
        return (params[0], *jax.tree.map(lambda p: (scale * p).astype(p.dtype), params[1:]))

    def measured(scale: jax.Array) -> jax.Array:
        now = scaled(scale)

        def one(x: jax.Array) -> jax.Array:
            state, _ = dynamics.free_phase(now, twin, x, _SETTLED)
            return spectral_radius(now, spec, x, state, iterations=50)

        return jnp.max(jax.vmap(one)(xs))

    def corrected(_: int, scale: jax.Array) -> jax.Array:
        found = measured(scale)
        return scale * jnp.where(found > 0, radius / found, 1.0) ** _CORRECTION

    return scaled(jax.lax.fori_loop(0, _CORRECTIONS, corrected, jnp.asarray(_WEAK, xs.dtype)))
