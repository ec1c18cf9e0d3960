"""Norms and comparisons that stay true where a number is tiny or none."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all numbers of a tree, whose squares may underflow or overflow.

    Example:
        >>> bool(jnp.isclose(norm(jnp.array([3e-30, 4e-30])), 5e-30))
        True
    """
    leaves = [jnp.abs(leaf) for leaf in jax.tree.leaves(tree)]
    size = jnp.max(jnp.stack([jnp.max(leaf, initial=0) for leaf in leaves]))
    scale = jnp.where(size > 0, size, 1)
    return size * jnp.sqrt(sum(jnp.sum((leaf / scale) ** 2) for leaf in leaves))


def beyond(values: jax.Array, bound: float) -> jax.Array:
    """Where values are above a bound, or are no numbers, as 0 or 1 of their precision.

    Example:
        >>> beyond(jnp.array([0.1, 2.0, jnp.nan]), 1.0).tolist()
        [0.0, 1.0, 1.0]
    """
    return 1 - (values <= bound).astype(values.dtype)
