"""The page of a run: whole in itself, whatever is missing, and true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import ep_jax as ep
from ep_jax import plots
from ep_jax.files import write_json
from ep_jax.report import CAPTIONS, page, report

RECORD = {
    "curve": {"loss": [1.0, 0.5], "error": [50.0, 20.0]},
    "residual": 0.1,
    "residuals": [0.1, 0.02],
    "activity": [0.3, 0.2],
    "spikes_free": 1.0,
    "spikes_nudged": 0.5,
    "spikes_free_per_layer": [1.0, 2.0],
    "warnings": {"dead": "layers [1] are dead: firing rates <0"},
}
HISTORY = [RECORD | {"epoch": epoch, "val_error": 9.0 / epoch} for epoch in (1, 2)]
COST = dict.fromkeys(("macs", "acs", "spikes", "held", "memory_joules"), 1234567.0) | {
    f"{of}_{way}": 1000.0 for of in ("state", "weight") for way in ("reads", "writes")
}
RESULT: dict[str, Any] = {
    "test_error": 4.25,
    "test_error_4x": 4.5,
    "val_error": [9.0, 4.5],
    "weights_of_epoch": 2,
    "stopped_early": True,
    "recurrence": {
        "feedback": 1.0,
        "share": [0.25, 0.5],
        "error": 4.0,
        "error_cut": 40.0,
        "error_mean": 30.0,
        "error_other": 90.0,
        "radius_mean": 0.8,
        "radius_largest": 0.95,
        "ambiguous": 0.01,
        "images": 100,
    },
    "hardware": {"inference": COST | {"joules": 2.5e-6}, "bptt": COST | {"joules": 1e-3}},
    "config": {"dataset": "digits", "neuron": {"type": "DeltaCode"}},
    "versions": {"python": "3.11"},
    "device": "cpu: <cpu>",
    "commit": "abc",
}


def test_a_page_says_what_the_result_says() -> None:
    """Numbers in the wrong unit, or of another epoch."""
    text = page("a <run>", RESULT, HISTORY, {})
    assert "<h1>a &lt;run&gt;</h1>" in text
    for said in ("4.25 %", "4.50 %", "2 (stopped early)", "40.00 %", "90.00 %", "1.00 %"):
        assert said in text
    assert "<td class=number>2.5</td>" in text
    assert "<td class=number>1e+03</td>" in text
    assert "1,234,567" in text
    assert "4,000" in text  # words moved
    assert "firing rates &lt;0" in text
    assert "learning by EP" not in text  # nothing is known of it


def test_a_page_asks_for_nothing() -> None:
    """No script, style, font or picture from elsewhere: it is read on a train, or by mail."""
    figures = {"learning_curve": plots.learning_curve(HISTORY), "layers": plots.layers(HISTORY)}
    text = page("run", RESULT, HISTORY, figures)
    assert text.count("<img ") == 2
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', text))
    assert re.findall(r'href="([^"]*)"', text) == ["data:,"]
    assert "<script" not in text
    assert "url(" not in text
    assert CAPTIONS["layers"] in text
    again = {"learning_curve": plots.learning_curve(HISTORY), "layers": plots.layers(HISTORY)}
    assert page("run", RESULT, HISTORY, again) == text


def test_an_older_result_has_a_page() -> None:
    """Parts that were not written yet are left out."""
    later = ("hardware", "recurrence", "weights_of_epoch", "stopped_early", "versions")
    text = page("run", {k: v for k, v in RESULT.items() if k not in later}, HISTORY, {})
    assert "4.25 %" in text
    assert "Cost on hardware" not in text
    assert "What feedback does" not in text


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    """It is named, with what it lacks."""
    with pytest.raises(FileNotFoundError, match=r"holds no result\.json; expected the folder of"):
        report(tmp_path)


def test_a_page_without_the_images_says_so(tmp_path: Path) -> None:
    """Figures that are missing, and nobody knows why."""
    spec = ep.NetworkSpec((4,), (ep.Dense(3), ep.Dense(2)))
    ep.save_weights(tmp_path, ep.init_params(jax.random.key(0), spec), spec, ep.Phases())
    write_json(tmp_path / "result.json", RESULT | {"dataset": "own"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in HISTORY))
    with pytest.warns(UserWarning, match=r"data of its own \('own'\).*data=\.\.\."):
        path = report(tmp_path)
    assert "confusion" not in path.read_text()


def test_confusion_counts() -> None:
    """Rows are labels, columns answers; an answer that is none is not counted."""
    answers, labels = np.array([0, 0, 1, -1, 1]), np.array([0, 1, 1, 1, 0])
    figure = plots.confusion(answers, labels, 3)
    at = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in figure.axes[0].texts}
    assert at == {(0, 0): "1", (0, 1): "1", (1, 0): "1", (1, 1): "1"}


def test_wrong_images_are_those_that_are_wrong() -> None:
    """With the label and the answer above them; none at all are no figure."""
    images = np.zeros((4, 5, 5, 3), np.uint8)
    figure = plots.wrong(images, np.array([0, 2, -1, 3]), np.array([0, 1, 2, 3]))
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == ["1, not 2", "2, not none"]
    assert plots.wrong(images, np.arange(4), np.arange(4)) is None
    vectors = np.zeros((2, 6), np.float32)
    assert plots.wrong(vectors, np.zeros(2), np.ones(2)) is None
    assert plots.raster([np.ones((3, 4))], vectors[0]) is not None
