"""Costs: functions of what a network answers and of its target.

A cost of your own is a plain function ``cost(output, target)`` of one example that returns a
scalar, or a frozen dataclass that can be called like one. Its gradient is `jax.grad`'s. It has to
be hashable, since it is static under ``jit``, and importable, where a network is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp

Cost: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""``(output, target) -> scalar``, of one example."""


@dataclass(frozen=True)
class SquaredError:
    """``1/2 |output - target|^2``: with it the output layer is part of the dynamics, and linear."""

    def __call__(self, output: jax.Array, target: jax.Array) -> jax.Array:
        """The cost of one example."""
        return 0.5 * jnp.sum((output - target) ** 2)


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the soft-max of the logits ``output`` with a target distribution."""

    def __call__(self, output: jax.Array, target: jax.Array) -> jax.Array:
        """The cost of one example; complex logits are those of a holomorphic nudge."""
        shifted = output - jax.lax.stop_gradient(output.real.max())
        return jnp.sum(target) * jnp.log(jnp.sum(jnp.exp(shifted))) - jnp.sum(target * shifted)


COSTS: dict[str, Cost] = {"squared_error": SquaredError(), "cross_entropy": CrossEntropy()}
"""Costs that have names. With ``cross_entropy`` a network has a read-out unless it says not."""


def gradient(cost: Cost, output: jax.Array, target: jax.Array) -> jax.Array:
    """``dC / d output``; of a complex output the complex derivative.

    Args:
        cost: a cost.
        output: the output of one example.
        target: its target.
    """
    holomorphic = jnp.iscomplexobj(output)
    return jax.grad(lambda o: cost(o, target), holomorphic=holomorphic)(output)
