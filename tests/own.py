"""What users add, each in a few lines of a file of their own: layers, a neuron model, a cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import ep_jax as ep


@dataclass(frozen=True)
class Local(ep.Layer):
    """A user's layer: each position of a state has a small kernel of its own, without sharing."""

    features: int
    size: int = 2

    def output_shape(self, below: tuple[int, ...]) -> tuple[int, ...]:
        return (below[0] // self.size, below[1] // self.size, self.features)

    def init(self, key: Any, below: tuple[int, ...], gain: float, dtype: Any) -> Any:
        height, width, _ = self.output_shape(below)
        fan_in = self.size**2 * below[2]
        w = jax.random.normal(key, (height, width, fan_in, self.features), dtype)
        return {"w": gain * w / fan_in**0.5, "b": jnp.zeros(self.features, dtype)}

    def drive(self, prepared: Any, s: jax.Array) -> jax.Array:
        n, (height, width) = self.size, prepared["w"].shape[:2]
        patches = s[: n * height, : n * width].reshape(height, n, width, n, -1)
        patches = patches.transpose(0, 2, 1, 3, 4).reshape(height, width, -1)
        return jnp.einsum("hwi,hwio->hwo", patches, prepared["w"])

    def matrices(self, params: Any) -> dict[str, int]:
        return {"w": 2}


@dataclass(frozen=True)
class Softened(ep.Dense):
    """A user's layer that is not linear in the state below."""

    linear = False

    def drive(self, prepared: Any, s: jax.Array) -> jax.Array:
        return jnp.tanh(s) @ prepared

    def pull(self, prepared: Any, here: jax.Array, field: jax.Array) -> jax.Array:
        return ep.Layer.pull(self, prepared, here, field)

    def bound(self) -> tuple[ep.Layer, float]:
        return ep.Dense(self.features), 1.0  # tanh brings no two states further apart


class LazyState(NamedTuple):
    s: jax.Array


@dataclass(frozen=True)
class Lazy:
    """A user's neuron: rate neurons that go a part of the way."""

    step_size: float = 0.8
    activation = "hard_sigmoid"
    stochastic = False

    def start(self, s: jax.Array, current: jax.Array) -> LazyState:
        return LazyState(s)

    def step(self, state: LazyState, current: Any, relax: Any, clock: Any, key: Any) -> Any:
        return LazyState(relax(state.s, current, self.step_size)), None

    def signal(self, state: LazyState) -> jax.Array:
        return state.s

    def readout(self, state: LazyState) -> jax.Array:
        return state.s


def huber(output: jax.Array, target: jax.Array) -> jax.Array:
    """A user's cost: squared where the error is small, linear where it is large."""
    error = jnp.abs(output - target)
    return jnp.sum(jnp.where(error < 0.5, error**2 / 2, 0.5 * error - 0.125))
