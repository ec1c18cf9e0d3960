"""The whole life of a run, of any configuration: killed, resumed, moved, evaluated, pruned."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import ep_jax as ep
from ep_jax import run
from ep_jax.data import load
from ep_jax.evaluation import evaluate
from ep_jax.optimizers import SGD, AdamW, Muon
from ep_jax.presets import PRESETS, Config
from ep_jax.pruning import activity, prune
from ep_jax.training import Augmentation, error_rate, predict

DATA = load("digits")
SOME = DATA._replace(
    train_images=DATA.train_images[:60],
    train_labels=DATA.train_labels[:60],
    validation_images=DATA.validation_images[:20],
    validation_labels=DATA.validation_labels[:20],
    test_images=DATA.test_images[:30],
    test_labels=DATA.test_labels[:30],
)
NEURONS = (
    ep.Rate(),
    ep.DeltaCode(),
    ep.DeltaCode(levels=3, leak=True),
    ep.SigmaDelta(),
    ep.Bernoulli(),
    ep.IntegrateFire(),
)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Small runs of all kinds."""
    gradient = draw(st.sampled_from(["ep", "ep", "bptt", "implicit"]))
    stragglers = 0.0 if gradient == "bptt" else draw(st.sampled_from([0.0, 0.25]))
    phases = ep.Phases(
        free=draw(st.integers(2, 5)),
        nudged=draw(st.integers(1, 4)),
        estimator=draw(st.sampled_from(["one_sided", "random_sign", "symmetric"])),
        coordinates=draw(st.sampled_from(["absolute", "displacement"])),
        sweep=draw(st.sampled_from(["ordered", "alternating", "synchronous"])),
        beta=0.1,
        stragglers=stragglers,
        free_more=2 if stragglers else 0,
        nudged_more=2 if stragglers else 0,
    )
    convolutions = draw(st.sampled_from([(), (3,)]))
    return replace(
        PRESETS["digits"],
        seed=draw(st.integers(0, 2**32 - 1)),
        epochs=2,
        batch=draw(st.sampled_from([10, 16, 60])),
        steps_per_dispatch=draw(st.sampled_from([1, 3, 100])),
        channels=convolutions,
        kernels=(3,) * len(convolutions),
        pool=draw(st.sampled_from(["avg", "max"])),
        hidden=draw(st.sampled_from([(6,), (6, 5)])),
        neuron=draw(st.sampled_from(NEURONS)),
        cost=draw(st.sampled_from(["squared_error", "cross_entropy"])),
        feedback=draw(st.sampled_from([0.1, 1.0])),
        optimizer=draw(st.sampled_from([Muon(), AdamW(), SGD()])),
        gradient=gradient,
        phases=phases,
        augmentation=draw(st.sampled_from([Augmentation(), Augmentation(shift=1, rotate=5.0)])),
    )


class KilledError(Exception):
    """Stands for a machine that goes away."""


def train(config: Config, out: Path, resume: bool = False) -> Any:
    return run.train(config, out, data=SOME, resume=resume, console=Console(file=io.StringIO()))


def killed(config: Config, out: Path, step: int) -> None:
    """A run that goes away after a step, saved or not."""
    check = run.health.check_finite

    def dies(metrics: Any, epoch: int, before: int) -> None:
        check(metrics, epoch, before)
        steps = -(-len(SOME.train_images) // config.batch)
        if (epoch - 1) * steps + before >= step:
            raise KilledError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run.health, "check_finite", dies)
        with pytest.raises(KilledError):
            train(config, out)


def without_clocks(record: dict[str, Any]) -> dict[str, Any]:
    clocks = ("seconds", "seconds_per_epoch", "compile_seconds", "last_epoch", "resumed_from")
    return {name: value for name, value in record.items() if name not in clocks}


@pytest.mark.slow
@hypothesis.settings(max_examples=2, deadline=None)
@given(configs(), st.integers(0, 1_000_000))
def test_the_life_of_a_run(config: Config, when: int) -> None:
    """Killed twice and moved between: the same weights as undisturbed, which answer alike."""
    steps = 2 * -(-len(SOME.train_images) // config.batch)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "_draw", lambda *_: {})
        patched.setattr(run, "_report", lambda *_: None)
        folder = Path(name)
        result = train(config, folder / "whole")
        out = folder / "here"
        killed(config, out, when % steps)
        out = Path(shutil.move(out, folder / "there"))
        with pytest.MonkeyPatch.context() as dying:
            dying.setattr(run, "_finish", lambda *_: {})  # goes away before the result
            train(config, out, resume=True)
        again = train(config, out, resume=True)

        params, spec, phases = ep.load_weights(out)
        whole, *_ = ep.load_weights(folder / "whole")
        jax.tree.map(np.testing.assert_array_equal, params, whole)
        assert without_clocks(again) == without_clocks(result)
        lines = [(folder / which / "metrics.jsonl").read_text().splitlines()
                 for which in ("whole", "there")]  # fmt: skip
        for one, other in zip(*lines, strict=True):
            assert without_clocks(json.loads(one)) == without_clocks(json.loads(other))

        key = jax.random.key(0)
        said = evaluate(params, spec, phases, SOME, key)
        answers, _ = predict(params, spec, phases, SOME.test_images, key)
        assert error_rate(answers, SOME.test_labels) == said["test_error"]
        awake = activity(params, spec, phases.for_all(), SOME.train_images)
        small, lean = prune(params, spec, tuple(share >= 0.0 for share in awake))
        assert lean == spec  # all units are kept
        jax.tree.map(np.testing.assert_array_equal, small, params)
