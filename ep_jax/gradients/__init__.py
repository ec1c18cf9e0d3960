"""Gradients of the batch-mean cost: ways to one number, with one signature."""

from ep_jax.gradients.bptt import bptt_gradient
from ep_jax.gradients.ep import ep_gradient
from ep_jax.gradients.implicit import implicit_gradient

GRADIENTS = {"ep": ep_gradient, "bptt": bptt_gradient, "implicit": implicit_gradient}
"""The gradients a training can use, by name."""
