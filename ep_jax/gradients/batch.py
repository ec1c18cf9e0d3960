"""What the gradients of a batch share: checked arguments, free phases, cost and answers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ep_jax import dynamics, network
from ep_jax.coordinates import Absolute, Swept
from ep_jax.dynamics import PhaseInfo
from ep_jax.layers import LayerParams
from ep_jax.network import NetworkSpec, Params, Prepared, State
from ep_jax.phases import Phases, check_phases


class GradientInfo(NamedTuple):
    """What a gradient tells about itself.

    Attributes:
        cost: mean cost of the batch at the free states.
        output: answers of the free phase ``[B, classes]`` (output layer or logits).
        free: `PhaseInfo` of the free phases: the largest residuals of the batch, else the mean.
        nudged: that of the nudged phases (implicit differentiation: of the adjoint ones); ``None``
            where there are none.
        limited: share of the examples whose displacement was scaled down (``phases.limit``).
    """

    cost: jax.Array
    output: jax.Array
    free: PhaseInfo
    nudged: PhaseInfo | None = None
    limited: jax.Array | None = None


class Keys(NamedTuple):
    """The random keys of a batch.

    Attributes:
        estimator: the estimator's own key; ``None`` without a key.
        free: a key for each example's free phase ``[B]``; ``None`` unless neurons are stochastic.
        nudged: likewise for its nudged phases.
    """

    estimator: jax.Array | None
    free: jax.Array | None
    nudged: jax.Array | None


def keys_of(spec: NetworkSpec, key: jax.Array | None, batch: int) -> Keys:
    """The keys of a batch, from one."""
    if key is None:
        return Keys(None, None, None)
    estimator, phases = jax.random.split(key)
    if not spec.neuron.stochastic:
        return Keys(estimator, None, None)
    free, nudged = jax.random.split(phases, (2, batch))
    return Keys(estimator, free, nudged)


def check_batch(
    params: Params, spec: NetworkSpec, xs: jax.Array, phases: Phases, key: jax.Array | None
) -> jax.Array:
    """Raise where an argument does not fit the others.

    Returns:
        The inputs in the precision of the states.
    """
    network.check_params(spec, params)
    dynamics.check_inputs(spec, xs)
    check_phases(spec, phases, key)
    return network.as_precise_as(jax.tree.leaves(params)[0], xs)


class Checked(NamedTuple):
    """The arguments of a gradient, fit for use.

    Attributes:
        xs: inputs ``[B, ...]`` in the precision of the states.
        ys: targets ``[B, ...]`` of the answer's shape.
        keys: the random keys.
    """

    xs: jax.Array
    ys: jax.Array
    keys: Keys


def check(
    params: Params, spec: NetworkSpec, xs: jax.Array, ys: Any, phases: Phases, key: jax.Array | None
) -> Checked:
    """Raise where an argument of a gradient does not fit the others."""
    xs = check_batch(params, spec, xs, phases, key)
    batch = xs.shape[0]  # which may be symbolic, where len would refuse
    ys = network.targets(spec, ys, xs.dtype, (batch,))
    return Checked(xs, ys, keys_of(spec, key, batch))


class Free(NamedTuple):
    """The free phases of a batch.

    Attributes:
        prepared: the parameters in prepared form.
        drives: what the input says to each layer, of each example.
        state: the packed free states.
        swept: one more sweep of rate neurons from there.
    """

    prepared: Prepared
    drives: tuple[jax.Array | None, ...]
    state: State
    swept: Swept


def settle(
    params: Params, spec: NetworkSpec, xs: jax.Array, phases: Phases, keys: jax.Array | None
) -> tuple[Free, PhaseInfo]:
    """Settle every example freely; the info is that of each."""
    prepared = network.prepare(params, spec)
    drives = jax.vmap(lambda x: network.input_drive(spec, prepared, x))(xs)
    found = dynamics.settle_batch(
        spec, phases, False, lambda *drives: Absolute(spec, prepared, drives), drives, keys
    )
    return Free(prepared, drives, found.state, found.swept), found.info


class Answer(NamedTuple):
    """Mean cost and answers ``[B, ...]`` at the free states; the read-out's gradient."""

    cost: jax.Array
    output: jax.Array
    readout_gradient: LayerParams | None


def answer(spec: NetworkSpec, prepared: Prepared, last: jax.Array, ys: jax.Array) -> Answer:
    """Cost and answers at the last layer's free states `last`.

    A read-out outside the dynamics has the gradient of the cost there, exactly: it comes along.
    """

    def mean_cost(readout: LayerParams | None) -> tuple[jax.Array, jax.Array]:
        here = prepared._replace(readout=readout)
        costs = jax.vmap(lambda s, y: network.cost_of(spec, here, s, y))(last, ys)
        return jnp.mean(costs), jax.vmap(lambda s: network.read_out(spec, here, s))(last)

    if prepared.readout is None:
        return Answer(*mean_cost(None), None)
    (value, output), own = jax.value_and_grad(mean_cost, has_aux=True)(prepared.readout)
    return Answer(value, output, own)


def with_readout(spec: NetworkSpec, gradient: Params, found: Answer) -> Params:
    """A gradient of the dynamics' parameters, with that of the read-out in its place."""
    if found.readout_gradient is None:
        return gradient
    before, after = gradient[: spec.depth], gradient[spec.depth + 1 :]
    return (*before, found.readout_gradient, *after)
