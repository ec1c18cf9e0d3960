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
from ep_jax.loop import mean_record, records_of
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
            {
                "params": scaled(0, 1.0),
                "phases": ep.Phases(8, 6, 1e8, "one_sided", "ordered", "absolute"),
            },
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
    "residuals": [0.2, 0.01, 0.3],
    "mean_residual": 0.05,
    "unsettled": 0.4,
    "activity": [0.3, 0.2, 0.1],
    "residuals_nudged": [0.01, 0.02, 0.2],
    "mean_residual_nudged": 0.08,
    "unsettled_nudged": 0.1,
    "activity_nudged": [0.5, 0.5, 0.5],
    "gradient_norm": [0.1, 0.2, 0.3],
    "radius": {"mean": 0.6, "largest": 0.97, "ambiguous": 0.0, "images": 16},
}
"""A record of a training that is well: some images are late in some layers, as ever."""


def complaints(config: Any = CONFIG, spec: ep.NetworkSpec = SPEC, **changed: Any) -> dict[str, str]:
    return health.complaints(SETTLED | changed, spec, config)


def test_no_complaint_without_cause() -> None:
    """Warnings that everybody learns to ignore."""
    assert complaints() == {}


@pytest.mark.parametrize(
    ("phase", "suffix", "sweeps", "moved", "mean"),
    [("free", "", 8, "the state", 0.11), ("nudged", "_nudged", 6, "the displacement", 0.32)],
)
def test_an_unsettled_phase_is_told_with_its_layers_and_its_share(
    phase: str, suffix: str, sweeps: int, moved: str, mean: float
) -> None:
    """The other phase's residual, the largest for the mean, layers that have settled.

    A displacement may be off by .3: the sine of the angle whose cosine is .95.
    """
    unsettled: dict[str, Any] = {
        f"residuals{suffix}": [0.05, 0.5, 0.4],
        f"mean_residual{suffix}": mean,
        f"unsettled{suffix}": 0.71,
    }
    assert complaints(**unsettled) == {
        f"{phase} phase": f"the {phase} phase has not settled after {sweeps} sweeps: one more "
        f"would move {moved} by {100 * mean:.0f} % in the mean, and by more than 1 % in 71 % of "
        "the images; the furthest are layers [2, 3]"
    }
    # Less than the phase bears is no cause.
    borne: dict[str, Any] = unsettled | {f"mean_residual{suffix}": mean - 0.03}
    assert complaints(**borne) == {}
    # One image among many is none either: what is told of is the mean.
    one: dict[str, Any] = {f"residuals{suffix}": [0.0, 0.0, 1.0]}
    assert complaints(**one) == {}


def test_a_phase_that_the_gradient_does_not_need_may_end_anywhere() -> None:
    """BPTT is right wherever its sweeps end; the adjoint of implicit differentiation is no phase.

    A run by BPTT has no nudged phase in its record, and no residuals of one.
    """
    late: Any = {"mean_residual": 0.5, "residuals": [0.5, 0.5, 0.5]}
    record = {name: v for name, v in (SETTLED | late).items() if "nudged" not in name}
    assert health.complaints(record, SPEC, replace(CONFIG, gradient="bptt")) == {}
    said = complaints(replace(CONFIG, gradient="implicit"), mean_residual_nudged=0.5, **late)
    assert said.keys() == {"free phase"}


def test_a_gradient_that_vanishes_on_its_way_down_is_told() -> None:
    """A layer that is above the last one with a gradient, or a network that has learned all."""
    (said,) = complaints(gradient_norm=[0.0, 0.0, 0.3]).values()
    assert said.startswith("layers [1, 2] have a gradient of exactly zero below one that is not")
    (said,) = complaints(gradient_norm=[0.1, 0.0, 0.3]).values()
    assert said.startswith("layers [2] ")
    assert complaints(gradient_norm=[0.1, 0.3, 0.0]) == {}
    assert complaints(gradient_norm=[0.0, 0.0, 0.0]) == {}


def test_two_nudged_sweeps_of_three_layers_are_complained_of() -> None:
    """What the metrics of a training really hold, not what a record made by hand does.

    Synchronous sweeps take a nudge one layer down each, so it does not reach the lowest.
    """
    short = replace(PHASES, sweep="synchronous", nudged=2)
    params = ep.init_params(jax.random.key(1), SPEC)
    alive = tuple(p | {"b": p["b"] + 0.5} for p in params)
    record = mean_record(records_of(dispatch(alive, short), SPEC)) | {"radius": None}
    said = health.complaints(record, SPEC, replace(CONFIG, phases=short))
    assert said.keys() == {"nudged phase", "no gradient"}
    assert said["no gradient"].startswith("layers [1] ")
    assert "100 % of the images; the furthest are layers [1" in said["nudged phase"]


def test_a_relaxation_that_is_no_contraction_is_told() -> None:
    """A radius of the mean image, where the worst one is what diverges; a NaN that is below 1."""
    radius = {"mean": 0.8, "largest": 1.25, "ambiguous": 0.125, "images": 16}
    (said,) = complaints(radius=radius).values()
    assert "its spectral radius is 0.80 in the mean and 1.25 for the worst of 16 images" in said
    assert "and 12 % of them end in a state that depends on the start" in said
    assert complaints(radius=radius | {"largest": float("nan")}).keys() == {"not contractive"}
    assert complaints(radius=None) == {}  # there were no images to look at


@pytest.mark.parametrize(("rate", "kind"), [(0.0, "dead"), (0.999, "saturated")])
def test_silent_and_saturated_layers_are_told_with_their_rates(rate: float, kind: str) -> None:
    """Hidden layers; an output may be 0 for all it is worth."""
    (said,) = complaints(activity=[0.3, rate, 0.1]).values()
    assert said == f"layers [2] are {kind}: firing rates {rate:.3g}"
    assert complaints(activity=[0.3, 0.2, rate]) == {}
    smooth = replace(SPEC, neuron=ep.Rate(activation="softplus"))  # it has no upper bound
    assert len(complaints(spec=smooth, activity=[0.3, rate, 0.1])) == (kind == "dead")
