"""The settled network as a flax module.

Imported by name (``import ep_jax.nnx``), since flax takes a while to load.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ep_jax.derivatives import EP, Derivative, equilibrium
from ep_jax.dynamics import PhaseInfo
from ep_jax.initialization import init_params
from ep_jax.network import NetworkSpec, Params
from ep_jax.phases import Phases


class Equilibrium(nnx.Module):
    """`ep_jax.equilibrium` with its parameters, as a layer of a flax model.

    A batch goes in, the settled states of the last layer come out; `nnx.grad` through it is by EP
    (or by another rule). Parameters are ``nnx.Param``, so `nnx.Optimizer` trains them with all
    others.

    Args:
        spec: the network.
        phases: how it settles, and how EP nudges it.
        derivative: `ep_jax.EP`, `ep_jax.BPTT` or `ep_jax.Implicit`.
        gain: scale of the initial weights, see `ep_jax.init_params`.
        dtype: floating-point type of the parameters.
        rngs: ``params`` makes the initial weights. Stochastic neurons and ``random_sign`` draw from
            its stream ``phases``, and keep it.

    Example:
        >>> spec = ep_jax.NetworkSpec((3,), (ep_jax.Dense(8), ep_jax.Dense(4)), ep_jax.Rate())
        >>> class Model(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.body = Equilibrium(spec, Phases(free=20, nudged=20), rngs=rngs)
        ...         self.head = nnx.Linear(4, 2, rngs=rngs)
        ...     def __call__(self, xs):
        ...         return self.head(self.body(xs))
        >>> model = Model(nnx.Rngs(0))
        >>> grads = nnx.grad(lambda model: model(jnp.ones((5, 3))).sum())(model)
        >>> grads["body"]["layers"][0]["w"].shape
        (3, 8)
    """

    def __init__(
        self,
        spec: NetworkSpec,
        phases: Phases,
        derivative: Derivative = EP(),  # noqa: B008 - it is frozen
        *,
        gain: float = 0.5,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.spec, self.phases, self.derivative = spec, phases, derivative
        params = init_params(rngs.params(), spec, gain, dtype)
        self.layers = nnx.List(
            nnx.Dict({name: nnx.Param(value) for name, value in p.items()}) for p in params
        )
        draws = spec.neuron.stochastic or phases.estimator == "random_sign"
        self.rngs = rngs.fork() if draws else None

    @property
    def params(self) -> Params:
        """The parameters as the library's functions take them."""
        return tuple({name: value[...] for name, value in p.items()} for p in self.layers)

    def __call__(self, xs: jax.Array) -> jax.Array:
        """The settled states of the last layer, ``[B, *spec.state_shapes[-1]]``."""
        return equilibrium(self.params, self.spec, xs, self.phases, self._key(), self.derivative)

    def with_info(self, xs: jax.Array) -> tuple[jax.Array, PhaseInfo]:
        """The same, and the `PhaseInfo` of the free phases."""
        return equilibrium(
            self.params, self.spec, xs, self.phases, self._key(), self.derivative, info=True
        )

    def _key(self) -> jax.Array | None:
        return None if self.rngs is None else self.rngs.phases()
