"""Whether a training is well: what stops it, and what its user is warned of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ep_jax.dynamics import FAR
from ep_jax.network import NetworkSpec
from ep_jax.presets import Config
from ep_jax.training import StepMetrics

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

    Phases that have not settled and relaxations that are no contraction, since EP's gradient is
    right at a fixed point only; gradients that vanish on their way down; hidden layers that are
    dead or saturated, since no gradient passes them.

    Args:
        record: a line of ``metrics.jsonl``.
        spec: the network.
        config: the run.
    """
    said: dict[str, str] = {}
    looked_at = {}
    if config.gradient != "bptt":  # which is right wherever its sweeps end
        looked_at["free"] = ("", config.phases.free)
    if config.gradient == "ep":
        looked_at["nudged"] = ("_nudged", config.phases.nudged)
    for name, (suffix, sweeps) in looked_at.items():
        residual, unsettled = record[f"mean_residual{suffix}"], record[f"unsettled{suffix}"]
        if not residual <= (bound := FAR[name]):
            layers = np.array(record[f"residuals{suffix}"])
            worst = layers >= min(bound, layers.max())
            said[f"{name} phase"] = (
                f"the {name} phase has not settled after {sweeps} sweeps: one more would move "
                f"{'the displacement' if name == 'nudged' else 'the state'} by "
                f"{100 * residual:.0f} % in the mean, and by more than 1 % in "
                f"{100 * unsettled:.0f} % of the images; the furthest are layers {_layers(worst)}"
            )
    norms = np.array(record["gradient_norm"])
    lost = (norms == 0) & (np.cumsum(norms[::-1])[::-1] > 0)
    if lost.any():
        said["no gradient"] = (
            f"layers {_layers(lost)} have a gradient of exactly zero below one that is not: more "
            "nudged sweeps let the nudge reach them"
        )
    if (radius := record.get("radius")) is not None and not radius["largest"] < 1.0:
        said["not contractive"] = (
            f"the relaxation is no contraction: its spectral radius is {radius['mean']:.2f} in the "
            f"mean and {radius['largest']:.2f} for the worst of {radius['images']} images, and "
            f"{100 * radius['ambiguous']:.0f} % of them end in a state that depends on the start. "
            "A cap on the links, weight decay or a smaller learning rate keep it one"
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
