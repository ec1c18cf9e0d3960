"""Quantisers: what turns an analog value into spikes, and their surrogate derivatives.

A quantiser is a staircase: its derivative is zero almost everywhere, so reverse mode through spikes
needs a stand-in for it. Each function here takes the name of one of `SURROGATES`; forward it is the
plain staircase, and EP, which differentiates nothing in time, never asks for more.

A surrogate is a function of the distance to the nearest step of the staircase. Each integrates to
the height of that step, 1, over its range.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

Elementwise: TypeAlias = Callable[[jax.Array], jax.Array]
Quantiser: TypeAlias = Callable[[jax.Array, str], jax.Array]

SURROGATES: dict[str, Elementwise] = {
    "straight_through": jnp.ones_like,
    "triangle": lambda distance: jnp.maximum(2.0 - 4.0 * jnp.abs(distance), 0.0),
    "fast_sigmoid": lambda distance: (1.0 + 2.0 * jnp.abs(distance)) ** -2,
}
"""Surrogate derivatives by name.

- ``straight_through``: that of the identity (Bengio, Leonard & Courville, arXiv:1308.3432).
  Sigma-delta and delta codes transmit their analog value up to an error, and this is the derivative
  of what they transmit.
- ``triangle``: a hat around each step (Esser et al., PNAS 2016; Bellec et al., NeurIPS 2018).
- ``fast_sigmoid``: that of ``x / (1 + |x|)`` around each step, with long tails (Zenke & Ganguli,
  Neural Computation 2018).
"""


def _quantiser(staircase: Elementwise, distance: Elementwise) -> Quantiser:
    """`staircase` with a surrogate derivative; `distance` is that to its nearest step."""

    @functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
    def quantise(value: jax.Array, surrogate: str) -> jax.Array:
        del surrogate
        return staircase(value)

    @quantise.defjvp
    def _(
        surrogate: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (value,), (tangent,) = primals, tangents
        return staircase(value), SURROGATES[surrogate](distance(value)) * tangent

    return quantise


binary = _quantiser(lambda v: jnp.heaviside(v - 0.5, 0.0), lambda v: v - 0.5)
"""``1[v > 1/2]``; not a number of what is none."""

fire = _quantiser(lambda v: jnp.heaviside(v - 1.0, 1.0), lambda v: v - 1.0)
"""``1[v >= 1]``, likewise, the threshold of an integrate-and-fire neuron."""


@functools.cache
def graded(largest: int) -> Quantiser:
    """``clip(round(v), -largest, largest)``: up to so many unit spikes in one message.

    Example:
        >>> [float(q) for q in graded(2)(jnp.array([0.4, -0.6, 7.0]), "triangle")]
        [0.0, -1.0, 2.0]
    """

    def staircase(v: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(v), -largest, largest)

    def distance(v: jax.Array) -> jax.Array:
        size = jnp.abs(v)
        return size - 0.5 - jnp.clip(jnp.round(size - 0.5), 0, largest - 1)

    return _quantiser(staircase, distance)


ternary = graded(1)
"""``clip(round(v), -1, 1)``."""

rounded = _quantiser(jnp.round, lambda v: 0.5 - jnp.abs(v - jnp.round(v)))
"""The nearest integer."""

floored = _quantiser(jnp.floor, lambda v: v - jnp.round(v))
"""The integer below: of a value plus a uniform random number, an unbiased random rounding."""

bernoulli = _quantiser(lambda v: jnp.clip(jnp.floor(v), 0.0, 1.0), lambda v: v - 1.0)
"""`floored` in {0, 1}: of a probability plus a uniform random number, a random spike."""
