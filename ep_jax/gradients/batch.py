"""What the gradients of a batch share: checked arguments, free phases, cost and answers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ep_jax import dynamics, network
from ep_jax.costs import cost, read_out, targets
from ep_jax.dynamics import Absolute, PhaseInfo, Swept
from ep_jax.network import LayerParams, Links, NetworkSpec, Params, State
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


class Checked(NamedTuple):
    """The arguments of a gradient, fit for use.

    Attributes:
        xs: inputs ``[B, ...]`` in the precision of the states.
        ys: one-hot targets ``[B, classes]``.
        estimator_key: the estimator's own key; ``None`` without a key.
        free_keys: a key for each example's free phase ``[B]``; ``None`` unless the neurons are
            stochastic.
        nudged_keys: likewise for its nudged phases.
    """

    xs: jax.Array
    ys: jax.Array
    estimator_key: jax.Array | None
    free_keys: jax.Array | None
    nudged_keys: jax.Array | None


def check(
    params: Params, spec: NetworkSpec, xs: jax.Array, ys: Any, phases: Phases, key: jax.Array | None
) -> Checked:
    """Raise where an argument of a gradient does not fit the others."""
    network.check_params(spec, params)
    dynamics.check_inputs(spec, xs)
    check_phases(spec, phases, key)
    batch = xs.shape[0]
    xs = network.as_precise_as(params[0]["w"], xs)
    estimator_key, phase_key = (None, None) if key is None else jax.random.split(key)
    free_keys, nudged_keys = None, None
    if spec.neuron.stochastic and phase_key is not None:
        free_keys, nudged_keys = jax.random.split(phase_key, (2, batch))
    ys = targets(spec, ys, xs.dtype, (batch,))
    return Checked(xs, ys, estimator_key, free_keys, nudged_keys)


class Free(NamedTuple):
    """The free phases of a batch, in working form.

    Attributes:
        links: the parameters in working form.
        drives: the input's drive of each example.
        state: the packed free states.
        swept: one more sweep of rate neurons from there.
        info: the `PhaseInfo` of each example.
    """

    links: Links
    drives: jax.Array
    state: State
    swept: Swept
    info: PhaseInfo


def settle(
    params: Params, spec: NetworkSpec, xs: jax.Array, phases: Phases, keys: jax.Array | None
) -> Free:
    """Settle every example freely."""
    links = network.link(params, spec)
    drives = jax.vmap(lambda x: network.input_drive(spec, links, x))(xs)
    found = dynamics.settle_batch(
        spec, phases, False, lambda drive: Absolute(spec, links, drive), (drives,), keys
    )
    return Free(links, drives, found.state, found.swept, found.info)


class Answer(NamedTuple):
    """Mean cost and answers ``[B, classes]`` at the free states; the read-out's gradient."""

    cost: jax.Array
    output: jax.Array
    readout_gradient: tuple[LayerParams, ...]


def answer(spec: NetworkSpec, links: Links, last: jax.Array, ys: jax.Array) -> Answer:
    """Cost and answers at the last layer's free states `last`.

    A read-out outside the dynamics has the gradient of the cost there, exactly: it comes along, as
    a tuple that is empty without one.
    """

    def mean_cost(readout: LayerParams | None) -> tuple[jax.Array, jax.Array]:
        here = links._replace(readout=readout)
        costs = jax.vmap(lambda s, y: cost(spec, here, s, y))(last, ys)
        return jnp.mean(costs), jax.vmap(lambda s: read_out(here, s))(last)

    if links.readout is None:
        return Answer(*mean_cost(None), ())
    (value, output), own = jax.value_and_grad(mean_cost, has_aux=True)(links.readout)
    return Answer(value, output, (own,))
