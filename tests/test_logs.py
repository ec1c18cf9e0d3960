"""Records of epochs in other people's tools."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ep_jax.logs import logging_to, scalars
from ep_jax.presets import PRESETS

RECORD = {
    "epoch": 2,
    "loss": 0.5,
    "val_error": None,
    "radius": {"mean": 0.8, "images": 16},
    "activity": [0.1, 0.2],
    "curve": {"loss": [1.0, 0.5]},
    "warnings": {"dead": "layers [1] are dead"},
}
EXPECTED = {
    "loss": 0.5,
    "radius/mean": 0.8,
    "radius/images": 16.0,
    "activity/layer1": 0.1,
    "activity/layer2": 0.2,
}


def test_the_numbers_of_a_record() -> None:
    """Texts, curves and what was not measured are left out."""
    assert scalars(RECORD) == EXPECTED
    assert scalars({"radius": None}) == {}


def test_tensorboard_shows_them(tmp_path: Path) -> None:
    """Read back by TensorBoard itself."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with logging_to("tensorboard", tmp_path, PRESETS["digits"]) as log:
        log(RECORD)
        log(RECORD | {"epoch": 3, "loss": 0.25})
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    tags = found.Tags()
    assert set(tags["tensors"] or tags["scalars"]) == set(EXPECTED)
    events = found.Tensors("loss") if tags["tensors"] else found.Scalars("loss")
    assert [event.step for event in events] == [2, 3]


def test_wandb_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of its own, with the configuration, which ends with the training."""
    seen: list[Any] = []

    class Run:
        """What `wandb.init` returns."""

        def __enter__(self) -> Run:
            return self

        def __exit__(self, *_: Any) -> None:
            seen.append("finished")

        def log(self, values: dict[str, float], step: int) -> None:
            seen.append((values, step))

    def init(**given: Any) -> Run:
        seen.append(given)
        return Run()

    wandb = types.ModuleType("wandb")
    monkeypatch.setattr(wandb, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with logging_to("wandb", tmp_path / "my_run", PRESETS["digits"]) as log:
        log(RECORD)
    given, logged, ended = seen
    assert (given["name"], given["config"]["dataset"]) == ("my_run", "digits")
    assert logged == (EXPECTED, 2)
    assert ended == "finished"


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_log_that_is_not_installed(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is trained, with the extra's name."""
    for module in list(sys.modules):
        if module.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"is not installed; expected the extra '{name}'"
    with (
        pytest.raises(ModuleNotFoundError, match=said),
        logging_to(name, tmp_path, PRESETS["digits"]),
    ):
        pass


def test_a_log_that_is_none(tmp_path: Path) -> None:
    """It is named."""
    with (
        pytest.raises(ValueError, match="log is 'mlflow'; expected one of 'tensorboard', 'wandb'"),
        logging_to("mlflow", tmp_path, PRESETS["digits"]),
    ):
        pass
