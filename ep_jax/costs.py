"""Cost functions ``C(s_L, y)``, their targets, and the prediction they read.

Squared error ``C = 1/2 |s_L - y|^2`` reads the last layer of the dynamics. Cross-entropy
``C = CE(softmax(W s_L + b), y)`` has a read-out ``W, b`` outside the dynamics (Laborieux et al.,
Frontiers in Neuroscience 2021), so that ``s_L`` is the last hidden layer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ep_jax.checks import check_float_array, known
from ep_jax.network import Links, NetworkSpec


def read_out(links: Links, last: jax.Array) -> jax.Array:
    """What the network answers: the output layer, or the logits, ``[classes]``; argmax decides."""
    if links.readout is None:
        return last
    return last.reshape(-1) @ links.readout["w"] + links.readout["b"]


def cost(spec: NetworkSpec, links: Links, last: jax.Array, y: jax.Array) -> jax.Array:
    """``C(s_L, y)`` of one example, a scalar; `y` is one-hot."""
    answer = read_out(links, last)
    if spec.cost == "cross_entropy":
        return optax.softmax_cross_entropy(answer, y)
    return 0.5 * jnp.sum((answer - y) ** 2)


def cost_gradient(links: Links, last: jax.Array, y: jax.Array) -> jax.Array:
    """``dC/ds_L``: minus beta times this is the nudge on the last layer of the dynamics."""
    answer = read_out(links, last)
    if links.readout is None:
        return answer - y
    return (links.readout["w"] @ (jax.nn.softmax(answer) - y)).reshape(last.shape)


def targets(spec: NetworkSpec, y: Any, dtype: jnp.dtype, batch: tuple[int, ...] = ()) -> jax.Array:
    """Targets ``[*batch, classes]`` from one-hot (or soft) targets or integer labels ``[*batch]``.

    Raises:
        ValueError, TypeError: wrong shape, or a label outside ``0 .. classes - 1``.
    """
    name = "ys" if batch else "y"
    y = np.asarray(y) if isinstance(y, int | list | tuple) else y
    if not hasattr(y, "dtype"):
        raise TypeError(f"{name} is {type(y).__name__}; expected integer labels or one-hot targets")
    if tuple(y.shape) == (*batch, spec.classes):
        y = jnp.asarray(y, dtype)
        check_float_array(name, y, y.shape)
        return y
    if tuple(y.shape) != batch or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(
            f"{name} has shape {tuple(y.shape)} and dtype {y.dtype}; expected integer labels of "
            f"shape {batch} or floating-point one-hot targets of shape {(*batch, spec.classes)}"
        )
    if known(y):
        wrong = np.asarray(y)[(np.asarray(y) < 0) | (np.asarray(y) >= spec.classes)]
        if wrong.size:
            raise ValueError(f"{name} holds the label {wrong.flat[0]}; expected labels in "
                             f"0 .. {spec.classes - 1}")  # fmt: skip
    return jax.nn.one_hot(y, spec.classes, dtype=dtype)
