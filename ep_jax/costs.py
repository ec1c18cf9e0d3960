"""Costs: functions of what a network answers and of its target.

A cost of your own is a plain function ``cost(output, target)`` of one example that returns a
scalar, or a frozen dataclass that can be called like one. Its gradient is `jax.grad`'s. It has to
be hashable, since it is static under ``jit``, and importable, where a network is saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp

from ep_jax.checks import told

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


@functools.lru_cache(maxsize=256)
def check_cost(cost: str | Cost, shape: tuple[int, ...]) -> None:
    """Raise unless a cost of one's own is a real scalar, as traced on an answer of a shape.

    Raises:
        TypeError: it fails, or returns something else.
    """
    if isinstance(cost, str):
        return
    one = jax.ShapeDtypeStruct(shape, jnp.float32)
    try:
        found = jax.eval_shape(cost, one, one)
    except Exception as error:  # whatever a user's code may do
        raise TypeError(f"cost is {cost!r}, which fails on an answer and a target of shape {shape}:"
                        f" {type(error).__name__}: {error}") from error  # fmt: skip
    if getattr(found, "shape", None) != () or not jnp.issubdtype(found.dtype, jnp.floating):
        raise TypeError(f"cost is {cost!r}, which returns {told(found)} for an answer and a target "
                        f"of shape {shape}; expected a real scalar, of one example")  # fmt: skip


def gradient(cost: Cost, output: jax.Array, target: jax.Array) -> jax.Array:
    """``dC / d output``; of a complex output the complex derivative.

    Args:
        cost: a cost.
        output: the output of one example.
        target: its target.
    """
    holomorphic = jnp.iscomplexobj(output)
    return jax.grad(lambda o: cost(o, target), holomorphic=holomorphic)(output)
