"""What happened to users of neighbouring tools: each situation, and the right outcome."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import ep_jax as ep
from ep_jax import run, training
from ep_jax.network import classify
from ep_jax.presets import PRESETS

NEURONS = [
    ep.Rate(),
    ep.DeltaCode(),
    ep.DeltaCode(leak=True),
    ep.SigmaDelta(),
    ep.Bernoulli(),
    ep.IntegrateFire(),
]


@pytest.mark.usefixtures("nans_allowed")
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: type(n).__name__)
def test_a_pixel_that_is_not_a_number_is_no_answer(neuron: ep.Neuron) -> None:
    """Inside jit nothing raises; a spike that compares NaN with a threshold makes a class of it."""
    spec = ep.NetworkSpec((4,), (ep.Dense(5), ep.Dense(3)), neuron)
    params = ep.init_params(jax.random.key(0), spec)
    xs, ys = jnp.ones((2, 4)).at[0, 1].set(jnp.nan), jnp.array([0, 1])
    phases = ep.Phases(6, 4)

    @jax.jit
    def learned(xs: jax.Array) -> Any:
        return ep.ep_gradient(params, spec, xs, ys, phases, jax.random.key(1))

    grads, info = learned(xs)
    assert classify(info.output)[0] == -1
    assert classify(info.output)[1] >= 0
    assert not any(np.isfinite(g["w"]).all() for g in grads)


@pytest.mark.usefixtures("nans_allowed")
@pytest.mark.filterwarnings("ignore:overflow|invalid:RuntimeWarning")
def test_an_answer_that_is_not_a_number_is_wrong() -> None:
    """argmax makes class 0 of it, so a network that overflows is right for one image in ten."""
    spec = ep.NetworkSpec((2, 1, 1), (ep.Dense(2), ep.Dense(3)), ep.Rate())
    huge = jnp.array([[3e38, 3e38, 3e38], [-3e38, -3e38, -3e38]])
    params = ({"w": jnp.eye(2), "b": jnp.ones(2)}, {"w": huge, "b": jnp.zeros(3)})
    # The hidden units' feedback of infinity less infinity is not a number.
    images = np.full((4, 2, 1, 1), 255, np.uint8)
    answers, _ = training.predict(params, spec, ep.Phases(12), images)
    labels = np.zeros(4, int)
    assert answers.tolist() == [-1] * 4
    assert training.error_rate(answers, labels) == 100


@pytest.mark.usefixtures("nans_allowed")
@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_inside_jit_is_not_learned(label: int) -> None:
    """One-hot makes zeros of it, and the network unlearns all classes without a word."""
    spec = ep.NetworkSpec((4,), (ep.Dense(5), ep.Dense(3)), ep.Rate())
    params = ep.init_params(jax.random.key(0), spec)
    gradient = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))
    grads, info = gradient(params, spec, jnp.ones((2, 4)), jnp.array([0, label]), ep.Phases(6, 4))
    assert np.isnan(info.cost)
    assert all(np.isnan(g["w"]).any() for g in grads)


def test_a_journal_holds_rows_of_one_setting(tmp_path: Path) -> None:
    """Rows of other settings in a new table; a line cut off by a kill that stops all that follows."""
    path, made = tmp_path / "rows.jsonl", []

    def row(journal: common.Journal, name: str) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            made.append(name)
            return {"value": len(made)}

        return journal.row({"name": name}, make)

    first = common.Journal(path, {"batches": 2})
    row(first, "a")
    row(first, "b")
    with path.open("a") as file:
        file.write('{"name": "c", "val')
    again = common.Journal(path, {"batches": 2})
    assert row(again, "a")["value"] == 1
    assert row(again, "c")["value"] == 3
    assert made == ["a", "b", "c"]
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == again.rows
    with pytest.raises(ValueError, match="made with the settings .*2.* and not with .*3"):
        common.Journal(path, {"batches": 3})


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run into a folder of an odd name, and what it printed."""
    out = tmp_path_factory.mktemp("odd") / "runs[" / "seed0] lr:x:1"
    console = Console(file=io.StringIO(), width=300)
    config = replace(
        PRESETS["digits"],
        layers=(ep.Dense(8),),
        epochs=1,
        batch=100,
        steps_per_dispatch=3,
        phases=ep.Phases(3, 2),
    )
    run.train(config, out, console=console)
    assert isinstance(console.file, io.StringIO)
    return out, console.file.getvalue()


def test_names_that_look_like_markup_are_shown_as_they_are(shown: tuple[Path, str]) -> None:
    """A traceback after a complete run, since its folder was called [/seed0]; an emoji for :x:."""
    out, text = shown
    assert str(out) in text


def test_the_lines_of_an_epoch_can_be_compared(shown: tuple[Path, str]) -> None:
    """Quarters of an epoch, then the whole of it: an error that falls seems to rise at its end."""
    out, text = shown
    (record,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    losses = [float(found) for found in re.findall(r"epoch 1/1 .* loss (\S+)", text)]
    pieces = np.array(record["curve"]["loss"])
    means = np.cumsum(pieces) / np.arange(1, len(pieces) + 1)
    assert len(losses) == len(pieces) == 4
    np.testing.assert_allclose(losses, means, atol=1e-4)
