"""Whether a training is well: what stops it, and what its user is warned of."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ep_jax.network import NetworkSpec
from ep_jax.presets import Config
from ep_jax.training import StepMetrics

UNSETTLED = 0.1
"""A phase whose last sweep still changes the state (in displacement coordinates: the displacement)
by more than this share has not settled."""
DEAD = 1e-4
"""A layer whose mean activity is below this is dead."""
SATURATED = 0.99
"""A layer of hard sigmoids whose mean activity is above this is saturated."""


class DivergedError(FloatingPointError):
    """Training met a number that is not finite."""


def check_finite(metrics: StepMetrics, epoch: int, before: int) -> None:
    """Raise where a number of a dispatch is not finite: in which step first, where in it, and why.

    A step computes free states, nudged states, gradient and new parameters in this order, so the
    first of these that is not finite is where it broke.

    Args:
        metrics: of the dispatch, stacked over its steps, on the host.
        epoch: number of the epoch, for the message.
        before: steps of the epoch before this dispatch.

    Raises:
        DivergedError: naming epoch, step, phase and layers.
    """
    # The cost comes last: it overflows earlier than the gradient, and is made of the free state.
    parts = {
        "state of the free phase": metrics.free.activity,
        "state of the nudged phase": metrics.nudged.activity if metrics.nudged else (),
        "gradient": metrics.gradient_norm,
        "parameters after the step": metrics.params_norm,
        "loss": (metrics.loss,),
    }
    finite = {name: np.isfinite(np.stack(v)) for name, v in parts.items() if len(v)}
    good = np.concatenate(list(finite.values())).all(0)
    if good.all():
        return
    step = int(np.argmin(good))
    name, layers = next((n, ok[:, step]) for n, ok in finite.items() if not ok[:, step].all())
    where = "" if name == "loss" else f" in layers {_layers(~layers)}"
    raise DivergedError(
        f"diverged in epoch {epoch}, step {before + step + 1}: {name} not finite{where} (loss "
        f"{metrics.loss[step]}); the last checkpoint is kept. A smaller learning rate or gain, "
        "weaker feedback or more sweeps may help"
    )


def complaints(record: Mapping[str, Any], spec: NetworkSpec, config: Config) -> dict[str, str]:
    """What to be warned of in the record of an epoch: a sentence for each kind of trouble.

    Phases that have not settled, since EP's gradient is right at a fixed point only, and hidden
    layers that are dead or saturated, since no gradient passes them.

    Args:
        record: a line of ``metrics.jsonl``.
        spec: the network.
        config: the run.
    """
    phases, ones = config.phases, (1.0,) * spec.depth
    looked_at = {}
    if config.gradient != "bptt":  # which is right wherever its sweeps end
        looked_at["free"] = (phases.free, record["residual"], record["activity"], ones)
    if config.gradient == "ep":
        units = ones
        if phases.coordinates == "displacement":
            units = tuple(phases.beta * spec.weight_of(l) for l in range(spec.depth))
        activity = record["activity_nudged"]
        looked_at["nudged"] = (phases.nudged, record["residual_nudged"], activity, units)
    said = {}
    for name, (sweeps, residual, activity, units) in looked_at.items():
        sizes = map(math.prod, spec.state_shapes)
        squares = (n * (u * a) ** 2 for n, u, a in zip(sizes, units, activity, strict=True))
        change = residual / max(math.sqrt(sum(squares)), sys.float_info.min)
        if change > UNSETTLED:
            said[f"{name} phase"] = (
                f"the {name} phase has not settled after {sweeps} sweeps: residual {residual:.2g}, "
                f"{100 * change:.0f} % of the {'state' if units is ones else 'displacement'}"
            )
    hidden = np.array(record["activity"][: len(spec.layers) - 1])
    bounded = spec.neuron.activation == "hard_sigmoid"
    affected = {"dead": hidden < DEAD, "saturated": bounded & (hidden > SATURATED)}
    for kind, layers in affected.items():
        if layers.any():
            rates = ", ".join(f"{rate:.3g}" for rate in hidden[layers])
            said[kind] = f"layers {_layers(layers)} are {kind}: firing rates {rates}"
    return said


def _layers(affected: np.ndarray) -> list[int]:
    """Numbers of the layers, from 1."""
    return [l for l, yes in enumerate(affected, start=1) if yes]
