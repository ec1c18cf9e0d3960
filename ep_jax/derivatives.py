"""The settled network as a function that can be differentiated, by EP or otherwise.

`equilibrium` maps a batch to the settled states of the last layer. What stands before and behind it
may be anything that JAX differentiates: a head, a loss, an optimiser, another equilibrium. In
reverse mode it gets a cotangent ``g`` for its output, and *that is the nudge*: EP's nudged phase
relaxes under ``-beta <g, s_L>``, and the contrast of the two phases is the cotangent for parameters
and inputs. So the theorem of `ep_jax.gradients.ep` holds for any loss,

    dC/dtheta = -lim_{beta -> 0} psi(beta),   with  g = dC/ds_L  held fixed in place of C.

The cotangent of an example is brought to a largest entry of one before it nudges, and its size is
multiplied back: what comes out does not depend on the scale of the loss, and spikes, which have a
scale, code every cotangent alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, overload

import jax
import jax.numpy as jnp

from ep_jax import network
from ep_jax.checks import check_choice
from ep_jax.dynamics import FAR, PhaseInfo, mean_info
from ep_jax.gradients import bptt, ep, implicit
from ep_jax.gradients.batch import Free, Keys, check_batch, keys_of, settle
from ep_jax.network import NetworkSpec, Params
from ep_jax.numerics import beyond
from ep_jax.phases import Phases, check_nudge


class Settled(NamedTuple):
    """What a derivative rule makes of a batch.

    Attributes:
        output: the last layer's states ``[B, *shape]``.
        info: `PhaseInfo` of the free phases: the largest residuals of the batch, else means.
    """

    output: jax.Array
    info: PhaseInfo


class Derivative(Protocol):
    """A derivative rule of `equilibrium`: `EP`, `BPTT` or `Implicit`."""

    def settle(
        self, params: Params, spec: NetworkSpec, xs: jax.Array, phases: Phases, keys: Keys
    ) -> Settled:
        """Settle a batch; the output can be differentiated by parameters and inputs."""
        ...


@dataclass(frozen=True)
class EP:
    """Equilibrium Propagation: a second, nudged phase in place of a backward pass.

    Estimator, coordinates, sweeps and beta are those of the phases. Memory does not grow with the
    number of sweeps. In reverse mode only.

    Example:
        >>> spec = NetworkSpec((3,), (ep_jax.Dense(4), ep_jax.Dense(2)), neuron=ep_jax.Rate())
        >>> params = network.draw_params(jax.random.key(0), spec)
        >>> phases = Phases(free=20, nudged=20, estimator="symmetric")
        >>> def loss(xs):
        ...     return equilibrium(params, spec, xs, phases, derivative=EP()).sum()
        >>> jax.grad(loss)(jnp.ones((5, 3))).shape
        (5, 3)
    """

    def settle(
        self, params: Params, spec: NetworkSpec, xs: jax.Array, phases: Phases, keys: Keys
    ) -> Settled:
        """See `Derivative`."""
        check_nudge(spec, phases, phases.beta, xs.dtype)

        def backward(
            params: Params, xs: jax.Array, keys: Keys, free: Free, cotangents: jax.Array
        ) -> tuple[Params, jax.Array]:
            pulls, sizes = _normalized(cotangents)
            points = ep.nudges(phases, xs.shape[0], xs.dtype, keys.estimator)
            found = ep.contrast(
                spec, phases, free, points, lambda _, g: lambda s: g, pulls, keys.nudged
            )
            return jax.grad(found.psi, (0, 1))(params, xs, -sizes)

        return _settled_by(backward, params, spec, xs, phases, keys)


def _normalized(cotangents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cotangents ``[B, ...]`` with a largest entry of one, and their sizes ``[B]``."""
    sizes = jnp.max(jnp.abs(cotangents), axis=tuple(range(1, cotangents.ndim)))
    tiny = float(jnp.finfo(sizes.dtype).tiny)
    safe = jnp.clip(sizes, tiny, 0.25 / tiny)  # the reciprocals of others underflow
    pulls = cotangents / safe.reshape(-1, *(1,) * (cotangents.ndim - 1))
    return pulls, jnp.where(sizes == 0, sizes, safe)


@dataclass(frozen=True)
class BPTT:
    """Back-propagation through the sweeps of the free phase: forward and reverse mode.

    Attributes:
        tracked: differentiate the last so many sweeps only, by default all.
        remat: keep the state of every sqrt(tracked)-th sweep alone and compute the others again.

    Example:
        >>> spec = NetworkSpec((3,), (ep_jax.Dense(4), ep_jax.Dense(2)), neuron=ep_jax.Rate())
        >>> params = network.draw_params(jax.random.key(0), spec)
        >>> settled = lambda xs: equilibrium(params, spec, xs, Phases(free=20), derivative=BPTT())
        >>> jax.jacfwd(settled)(jnp.ones((5, 3))).shape
        (5, 2, 5, 3)
    """

    tracked: int | None = None
    remat: bool = False

    def settle(
        self, params: Params, spec: NetworkSpec, xs: jax.Array, phases: Phases, keys: Keys
    ) -> Settled:
        """See `Derivative`."""
        tracked = bptt.check_tracked(spec, phases, self.tracked, self.remat)
        prepared = network.prepare(params, spec, phases.precision)
        output, info = bptt.settled(prepared, spec, xs, phases, keys.free, tracked, self.remat)
        return Settled(output, mean_info(info))


@dataclass(frozen=True)
class Implicit:
    """Implicit differentiation at the settled state (recurrent back-propagation).

    Attributes:
        tolerance: see `ep_jax.implicit_gradient`.
        max_sweeps: most sweeps of the adjoint.

    Example:
        >>> spec = NetworkSpec((3,), (ep_jax.Dense(4), ep_jax.Dense(2)), neuron=ep_jax.Rate())
        >>> params = network.draw_params(jax.random.key(0), spec)
        >>> def loss(xs):
        ...     return equilibrium(params, spec, xs, Phases(free=40), derivative=Implicit()).sum()
        >>> jax.grad(loss)(jnp.ones((5, 3))).shape
        (5, 3)
    """

    tolerance: float | None = None
    max_sweeps: int = 1000

    def __post_init__(self) -> None:
        implicit.check_adjoint(self.tolerance, self.max_sweeps)

    def settle(
        self, params: Params, spec: NetworkSpec, xs: jax.Array, phases: Phases, keys: Keys
    ) -> Settled:
        """See `Derivative`."""

        def backward(
            params: Params, xs: jax.Array, keys: Keys, free: Free, cotangents: jax.Array
        ) -> tuple[Params, jax.Array]:
            del keys
            free = free._replace(prepared=network.prepare(params, spec))  # see `implicit_gradient`
            v, _ = implicit.adjoints(spec, free, cotangents, self.tolerance, self.max_sweeps)
            ones = jnp.ones(xs.shape[0], xs.dtype)
            return jax.grad(implicit.pulled, (0, 2))(params, spec, xs, free.state, v, ones)

        return _settled_by(backward, params, spec, xs, phases, keys)


Backward: TypeAlias = Callable[[Params, jax.Array, Keys, Free, jax.Array], tuple[Params, jax.Array]]
"""``(params, xs, keys, free, cotangents) -> (of params, of xs)``: a rule for reverse mode."""


def _settled_by(
    backward: Backward,
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    phases: Phases,
    keys: Keys,
) -> Settled:
    """The settled batch, whose derivative in reverse mode is `backward`."""

    def forward(params: Params, xs: jax.Array, keys: Keys) -> tuple[Settled, Any]:
        free, info = settle(params, spec, xs, phases, keys.free)
        kept = (params, xs, keys, free.state, free.swept)
        return Settled(free.state[-1], mean_info(info)), kept

    def reverse(kept: Any, cotangent: Settled) -> tuple[Params, jax.Array, None]:
        params, xs, keys, state, swept = kept
        with phases.products():  # this is traced later than what `equilibrium` does
            prepared = network.prepare(params, spec, phases.precision)
            drives = jax.vmap(lambda x: network.input_drive(spec, prepared, x))(xs)
            free = Free(prepared, drives, state, swept)
            return *backward(params, xs, keys, free, cotangent.output), None

    settled = jax.custom_vjp(lambda *args: forward(*args)[0])
    settled.defvjp(forward, reverse)
    return settled(params, xs, keys)


@overload
def equilibrium(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    phases: Phases,
    key: jax.Array | None = None,
    derivative: Derivative = ...,
    *,
    info: Literal[False] = False,
) -> jax.Array: ...


@overload
def equilibrium(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    phases: Phases,
    key: jax.Array | None = None,
    derivative: Derivative = ...,
    *,
    info: Literal[True],
) -> tuple[jax.Array, PhaseInfo]: ...


def equilibrium(
    params: Params,
    spec: NetworkSpec,
    xs: jax.Array,
    phases: Phases,
    key: jax.Array | None = None,
    derivative: Derivative = EP(),
    *,
    info: bool = False,
) -> jax.Array | tuple[jax.Array, PhaseInfo]:
    """The settled states of the last layer, as a function that can be differentiated.

    Not jitted: wrap it, or what calls it, with ``spec``, ``phases`` and ``derivative`` static. The
    cost of `spec` plays no part, and a read-out outside the dynamics is left to the caller.

    Args:
        params: parameters of `spec`.
        spec: the network.
        xs: inputs, floating point, ``[B, *spec.input_shape]``.
        phases: sweeps of the free phase; for `EP` those of the nudged one, its nudge, estimator
            and coordinates as well.
        key: random key, for stochastic neurons and ``estimator="random_sign"``.
        derivative: `EP`, `BPTT` or `Implicit`.
        info: return the `PhaseInfo` of the free phases as well. It is not differentiated. Without
            it the program itself warns where the state is far from settled, by a callback to the
            host: a program that is to be exported, or kept in JAX's cache on disk, asks for it.

    Returns:
        States ``[B, *spec.state_shapes[-1]]``, and the info where it is asked for.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or value.

    Warns:
        NotSettledWarning: see `info`.

    Example:
        >>> spec = NetworkSpec((3,), (ep_jax.Dense(4), ep_jax.Dense(2)), neuron=ep_jax.Rate())
        >>> params = network.draw_params(jax.random.key(0), spec)
        >>> def loss(params, xs):
        ...     output = equilibrium(params, spec, xs, Phases(free=20, nudged=20))
        ...     return jnp.sum(jnp.tanh(output))
        >>> grads, of_inputs = jax.grad(loss, (0, 1))(params, jnp.ones((5, 3)))
        >>> grads[0]["w"].shape, of_inputs.shape
        ((3, 4), (5, 3))
    """
    xs = check_batch(params, spec, xs, phases, key)
    if isinstance(derivative, type) or not hasattr(derivative, "settle"):
        raise TypeError(f"derivative is {derivative!r}; expected ep_jax.EP(), ep_jax.BPTT() or "
                        "ep_jax.Implicit()")  # fmt: skip
    check_choice("info", info, (True, False))
    with phases.products():
        found = derivative.settle(params, spec, xs, phases, keys_of(spec, key, xs.shape[0]))
    # The last layer's packed state is its logical one: no layer above reads it.
    if info:
        return found.output, jax.lax.stop_gradient(found.info)
    _warn_if_far(found.info, phases.free)
    return found.output


class NotSettledWarning(UserWarning):
    """An equilibrium is none: its free phase ended far from the fixed point.

    Example: an error instead, in the tests of a project, say.

        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", NotSettledWarning)
    """


def _warn_if_far(info: PhaseInfo, sweeps: int) -> None:
    """Have the running program say so where the mean residual of a batch is above a bound."""
    residual, bound = jax.lax.stop_gradient(info.mean_residual), FAR["free"]

    def warn(residual: jax.Array) -> None:
        if not residual <= bound:  # a `cond` under `vmap` takes both ways
            warnings.warn(
                f"the equilibrium has not settled after {sweeps} sweeps: one more would move the "
                f"state by {100 * float(residual):.0f} % in the mean. Derivatives by EP and by "
                "implicit differentiation are right at a fixed point only. More sweeps, smaller "
                "weights or weaker feedback help; info=True returns this number instead",
                NotSettledWarning,
                stacklevel=2,
            )

    far = beyond(residual, bound) > 0
    jax.lax.cond(far, lambda r: jax.debug.callback(warn, r), lambda r: None, residual)
