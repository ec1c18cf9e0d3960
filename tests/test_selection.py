"""When a run stops, and which weights it ends with: by the validation error alone."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from rich.console import Console

import ep_jax as ep
from ep_jax import run, selection
from ep_jax.data import load
from ep_jax.loop import Training
from ep_jax.presets import PRESETS, Config

TINY = dataclasses.replace(
    PRESETS["digits"],
    epochs=6,
    batch=200,
    train_images=400,
    layers=(ep.Dense(4),),
    neuron="rate",
    phases=ep.Phases(free=3, nudged=2),
)


def records(*errors: float) -> list[dict[str, float]]:
    return [{"val_error": error} for error in errors]


def test_the_first_of_the_best_epochs() -> None:
    """Of equal errors the earlier: what came after it was no better."""
    assert selection.best_epoch(records(3, 2, 4, 2)) == 2
    assert selection.best_epoch(records(1)) == 1


def test_patience() -> None:
    """Counted from the last fall, not from the last rise."""
    assert not selection.is_over([], 1)
    assert not selection.is_over(records(3, 2, 2), 2)
    assert selection.is_over(records(3, 2, 2, 2), 2)
    assert not selection.is_over(records(3, 2, 4, 1), 2)
    assert not selection.is_over(records(3, *[4] * 99), None)


def test_the_weights_of_the_best_epoch_alone_are_kept(tmp_path: Path) -> None:
    """An epoch that is made again, after a kill, must not have cost the one before."""
    spec = ep.NetworkSpec((2,), (ep.Dense(2),), ep.Rate())
    made = [ep.init_params(jax.random.key(seed), spec) for seed in range(3)]

    def keep(epoch: int, *errors: float) -> None:
        selection.keep_if_best(tmp_path, records(*errors), made[epoch], spec, ep.Phases())

    def there() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    keep(0, 3.0)
    keep(1, 3.0, 2.0)
    assert there() == {"epoch1", "epoch2"}  # until a checkpoint knows of the second
    selection.forget_others(tmp_path, records(3.0, 2.0))
    keep(2, 3.0, 2.0, 2.5)
    assert there() == {"epoch2"}
    chex.assert_trees_all_equal(ep.load_weights(tmp_path / "epoch2")[0], made[1])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs whose validation errors are given; what comes after the training is left out."""
    for name in ("_draw", "_report", "evaluate"):
        monkeypatch.setattr(run, name, lambda *args, **settings: {})
    monkeypatch.setattr(run, "summary", lambda *args: "")

    def plan(*errors: float) -> list[Any]:
        seen: list[Any] = []

        def validation_error(self: Training, state: Any) -> float:
            seen.append(jax.device_get(state.params))
            return errors[len(seen) - 1]

        monkeypatch.setattr(Training, "validation_error", validation_error)
        return seen

    return plan


def train(config: Config, out: Path, **options: Any) -> dict[str, Any]:
    return run.train(config, out, console=Console(file=io.StringIO()), **options)


def test_a_run_that_stops_early_ends_with_its_best_weights(
    scripted: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """The best was the second epoch; two without a fall came after it. Resumed, nothing changes."""
    config = dataclasses.replace(TINY, patience=2, keep="best")
    seen = scripted(9.0, 5.0, 6.0, 5.0)
    result = train(config, tmp_path / "out")
    assert (result["weights_of_epoch"], result["stopped_early"]) == (2, True)
    assert result["val_error"] == [9.0, 5.0, 6.0, 5.0]
    params, *_ = ep.load_weights(tmp_path / "out")
    chex.assert_trees_all_equal(params, seen[1])
    again = train(config, tmp_path / "out", resume=True)
    assert (len(seen), again["weights_of_epoch"]) == (4, 2)


def test_a_checkpoint_of_before_goes_on(
    scripted: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its identity lacks what came later; another choice of weights is another run."""
    scripted(*np.arange(6.0, 0.0, -1.0))
    config = dataclasses.replace(TINY, epochs=2)
    identity = run._identity

    def older(*args: Any) -> dict[str, Any]:
        return {k: v for k, v in identity(*args).items() if k not in ("patience", "keep")}

    with monkeypatch.context() as patched:
        patched.setattr(run, "_identity", older)
        train(config, tmp_path / "out")
    result = train(config, tmp_path / "out", resume=True)
    assert (result["weights_of_epoch"], result["stopped_early"]) == (2, False)
    with pytest.raises(ValueError, match="keep was 'last' and is now 'best'"):
        train(dataclasses.replace(config, keep="best"), tmp_path / "out", resume=True)


def test_the_loop_by_itself_is_the_run(scripted: Callable[..., list[Any]], tmp_path: Path) -> None:
    """What a hook sees of a run, a loop of one's own sees as well."""
    config, seen = dataclasses.replace(TINY, epochs=2), []
    scripted(2.0, 1.0, 2.0, 1.0)
    train(config, tmp_path / "out", on_epoch=seen.append)
    training = Training(config, load("digits"))
    state = training.compile(training.start())
    for epoch, expected in enumerate(seen, start=1):
        state, record = training.epoch(state, epoch)
        assert record | {"seconds": 0} == expected | {"seconds": 0}


@pytest.mark.parametrize("choice", [{"patience": 3}, {"keep": "best"}])
def test_nothing_to_choose_by(choice: dict[str, Any]) -> None:
    """Found out before anything is compiled."""
    config = dataclasses.replace(TINY, validation=0, **choice)
    with pytest.raises(ValueError, match=r"patience is .* without validation images; expected"):
        Training(config, load("digits", validation=0))


def test_settings_that_are_none() -> None:
    """A patience of nothing; weights of no epoch."""
    with pytest.raises(ValueError, match="patience is 0; expected an integer of at least 1"):
        dataclasses.replace(TINY, patience=0)
    with pytest.raises(ValueError, match="keep is 'first'; expected one of 'last', 'best'"):
        dataclasses.replace(TINY, keep="first")  # type: ignore
