"""What stops a training, and what it warns of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ep_jax as ep
from ep_jax import health, training
from ep_jax.optimizers import AdamW, make_optimizer
from ep_jax.presets import PRESETS

LAYERS = (ep.Dense(5), ep.Dense(4), ep.Dense(3))
SPEC = ep.NetworkSpec((6,), LAYERS, ep.Rate(), feedback=0.1)
PHASES = ep.Phases(8, 6, 0.1, "one_sided", "ordered", "displacement")
CONFIG = replace(PRESETS["digits"], channels=(), kernels=(), hidden=(5, 4), phases=PHASES)


def dispatch(params: Any, phases: ep.Phases = PHASES, learning_rate: float = 1e-3) -> Any:
    """Metrics of four steps from `params`."""
    optimizer = make_optimizer(SPEC, AdamW(), learning_rate=learning_rate, steps=4)
    state = training.TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    images = np.random.default_rng(0).integers(0, 256, (8, 6), np.uint8)
    batches = np.arange(32, dtype=np.int32).reshape(4, 8) % 8
    run = jax.jit(training.make_train_steps(SPEC, phases, optimizer))
    labels = np.arange(8) % 3
    return jax.device_get(run(state, images, labels, batches, jax.random.key(0))[1])


def scaled(layer: int, factor: float, gain: float = 1.0) -> Any:
    params = ep.init_params(jax.random.key(1), SPEC, gain)
    grown = {name: factor * value for name, value in params[layer].items()}
    return tuple(grown if l == layer else p for l, p in enumerate(params))


@pytest.fixture(scope="module")
def healthy() -> Any:
    return dispatch(scaled(0, 1.0))


def test_a_healthy_training_passes(healthy: Any) -> None:
    """A check that finds fault with everything."""
    health.check_finite(healthy, epoch=1, before=0)


@pytest.mark.usefixtures("nans_allowed")
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        # What makes each part the first that is not finite.
        ({"params": scaled(2, 1e38, gain=9.0)}, r"step 11: state of the free phase .* layers \["),
        (  # an output that steps past its target by 1e8 times its distance, each sweep
            {"params": scaled(0, 1.0), "phases": ep.Phases(8, 6, 1e8, "one_sided", "ordered")},
            r"step 11: state of the nudged phase .* layers \[",
        ),
        (
            {"params": scaled(0, 1.0), "learning_rate": 1e39},
            r"step 11: parameters after the step .* layers \[1, 2, 3\]",
        ),
    ],
)
def test_a_divergence_is_told_where_it_began(broken: dict[str, Any], said: str) -> None:
    """A phase, layer or step that is not the first one, or none at all."""
    with pytest.raises(health.DivergedError, match=said):
        health.check_finite(dispatch(**broken), epoch=2, before=10)


@pytest.mark.parametrize("part", ["free", "nudged", "gradient_norm", "params_norm", "loss"])
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_every_number_is_looked_at(part: str, step: int, value: float, healthy: Any) -> None:
    """One value of one layer at one step, everything else in order."""
    metrics = healthy
    at = np.arange(4) == step
    if part == "loss":
        metrics = metrics._replace(loss=np.where(at, value, metrics.loss))
    else:
        old = getattr(metrics, part)
        values = list(old.activity if part in ("free", "nudged") else old)
        values[1] = np.where(at, value, values[1])
        new = old._replace(activity=tuple(values)) if part in ("free", "nudged") else tuple(values)
        metrics = metrics._replace(**{part: new})
    names = {"gradient_norm": "gradient", "params_norm": "parameters"}
    said = rf"epoch 3, step {step + 1}: .*{names.get(part, part)}.* not finite"
    said += "" if part == "loss" else r" in layers \[2\]"
    with pytest.raises(health.DivergedError, match=said):
        health.check_finite(metrics, epoch=3, before=0)


SETTLED = {
    "residual": 0.01,
    "activity": [0.3, 0.2, 0.1],
    "residual_nudged": 1e-5,
    "activity_nudged": [0.5, 0.5, 0.5],
}


def complaints(config: Any = CONFIG, spec: ep.NetworkSpec = SPEC, **changed: Any) -> dict[str, str]:
    return health.complaints(SETTLED | changed, spec, config)


def test_no_complaint_without_cause() -> None:
    """Warnings that everybody learns to ignore."""
    assert complaints() == {}


def test_an_unsettled_phase_is_told_with_residual_and_sweeps() -> None:
    """A residual that is large for a state may be small for another: it is set against its size.

    The state has norm sqrt(5 .3^2 + 4 .2^2 + 3 .1^2) = .80; the displacement, in state units of
    .1 (.01, .1, 1), has .1 (5 .005^2 + 4 .05^2 + 3 .5^2)^(1/2) = .087.
    """
    (said,) = complaints(residual=0.4).values()
    assert "free phase has not settled after 8 sweeps: residual 0.4, 50 % of the state" in said
    (said,) = complaints(residual_nudged=0.02).values()
    assert "nudged phase has not settled after 6 sweeps: residual 0.02, 23 % of the disp" in said
    assert complaints(residual=0.07) == {}
    still = replace(CONFIG, phases=replace(PHASES, coordinates="absolute"))
    assert complaints(still, residual_nudged=0.02) == {}
    assert complaints(replace(CONFIG, gradient="bptt"), residual=0.4) == {}


@pytest.mark.parametrize(("rate", "kind"), [(0.0, "dead"), (0.999, "saturated")])
def test_silent_and_saturated_layers_are_told_with_their_rates(rate: float, kind: str) -> None:
    """Hidden layers; an output may be 0 for all it is worth."""
    (said,) = complaints(activity=[0.3, rate, 0.1]).values()
    assert said == f"layers [2] are {kind}: firing rates {rate:.3g}"
    assert complaints(activity=[0.3, 0.2, rate]) == {}
    smooth = replace(SPEC, neuron=ep.Rate(activation="softplus"))  # it has no upper bound
    assert len(complaints(spec=smooth, activity=[0.3, rate, 0.1])) == (kind == "dead")
