"""The command line: what each command is given, and what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ep_jax as ep
from ep_jax import benchmark, cli
from ep_jax.descriptions import to_json
from ep_jax.files import write_json
from ep_jax.presets import PRESETS, Config


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is printed before the program ends by itself."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert not stopped.value.code
    return capsys.readouterr().out


def test_the_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with what it does."""
    text = shown(capsys, "--help")
    for name, (kind, _) in cli.COMMANDS.items():
        assert name in text
        assert kind.__doc__.split()[0] in text


def test_help_is_short_and_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    """A line an argument, under the part of the run that it belongs to."""
    text = shown(capsys, "train", "--help")
    for group in ("phases", "neuron", "optimizer", "augmentation"):
        assert f"{group} options" in text
    assert len(text.splitlines()) < 150


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """One a line, with what it is; no folder is asked for."""
    lines = shown(capsys, "train", "--list").splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert "Rate, BPTT, feedback 1" in next(line for line in lines if "mnist_rate_bptt " in line)


def test_a_shell_completes(capsys: pytest.CaptureFixture[str]) -> None:
    """The script that tyro makes knows the commands and their arguments."""
    text = shown(capsys, "--tyro-print-completion", "bash")
    assert "ep-jax" in text
    assert "--phases.free" in text


def test_a_training_is_a_preset_with_changes() -> None:
    """What is named decides the defaults of what is not."""
    words = "train --preset mnist --neuron rate --phases.free 3 --log wandb tensorboard --out x"
    arguments = cli.parse(words.split())
    assert isinstance(arguments, cli.Train)
    expected = dataclasses.replace(
        PRESETS["mnist"],
        neuron=ep.Rate(),
        phases=dataclasses.replace(PRESETS["mnist"].phases, free=3),
    )
    assert arguments.config == expected
    assert (arguments.log, arguments.out, arguments.resume) == (
        ("wandb", "tensorboard"),
        Path("x"),
        False,
    )


def test_the_other_commands() -> None:
    """Their arguments reach them."""
    words = "evaluate --weights w --dataset digits --json out.json"
    assert cli.parse(words.split()) == cli.Evaluate(Path("w"), "digits", Path("out.json"))
    assert cli.parse(["report", "--run", "r"]) == cli.Report(Path("r"))
    words = "benchmark --preset mnist --batches 1 2 --repeats 3"
    assert cli.parse(words.split()) == cli.Benchmark("mnist", (1, 2), 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --out x --epochs 0", "epochs is 0; expected an integer"),
        ("evaluate --weights nowhere --dataset digits", "holds no weights.npz"),
        ("report --run nowhere", "ep-jax: error: folder is 'nowhere', which holds no result.json"),
        ("benchmark --preset nope", "ep-jax: error: preset is 'nope'; expected one of digits"),
    ],
)
def test_bad_input_is_a_line(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(words.split())
    assert said in str(stopped.value.code) + capsys.readouterr().err


def test_a_module_of_the_current_folder_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a page of the documentation does; an installed command has no folder of its own."""
    (tmp_path / "layers_of_this_folder.py").write_text(
        "import ep_jax\n\nclass Own(ep_jax.Dense):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    words = ("--layers", "layers_of_this_folder.Own(4)", "--epochs", "0", "--out", "run")
    with pytest.raises(SystemExit, match="epochs is 0"):
        cli.main(("train", *words))


def test_epochs_are_logged_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each log gets each record, and is closed."""
    seen: list[Any] = []

    @contextlib.contextmanager
    def logging_to(name: str, folder: Path, config: Config) -> Iterator[Any]:
        yield lambda record: seen.append((name, record))
        seen.append((name, folder))

    def train(config: Config, out: Path, *, resume: bool, on_epoch: Any) -> None:
        on_epoch("a record")

    monkeypatch.setattr(cli, "logging_to", logging_to)
    monkeypatch.setattr(cli, "train", train)
    out = tmp_path / "out"
    cli.main(["train", "--out", str(out), "--log", "tensorboard", "wandb"])
    assert seen[:2] == [("tensorboard", "a record"), ("wandb", "a record")]
    assert set(seen[2:]) == {("tensorboard", out), ("wandb", out)}


def test_a_benchmark_compares_the_methods() -> None:
    """At each size: EP and BPTT of one network, and backprop of its rate twin."""
    config = dataclasses.replace(
        PRESETS["digits"], layers=(ep.Dense(4),), phases=ep.Phases(3, 2, sweep="ordered")
    )
    rows = list(benchmark.benchmark(config, (2, 4), repeats=1))
    assert [(row["batch"], row["method"]) for row in rows] == [
        (batch, method) for batch in (2, 4) for method in ("EP", "BPTT", "backprop")
    ]
    for row in rows:
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["of_backprop"] > 0
    assert rows[2]["of_backprop"] == 1
    methods = benchmark.methods_of(PRESETS["mnist"])
    assert methods["EP"].phases == PRESETS["mnist"].phases
    assert methods["BPTT"].phases.free == 31
    assert isinstance(methods["backprop"].spec.neuron, ep.Rate)


def test_a_run_goes_on_with_its_own_settings(tmp_path: Path) -> None:
    """A resume that asks for every option again, or that begins with another preset's."""
    config = dataclasses.replace(
        PRESETS["fashion_mnist"], optimizer="sgd", epochs=3, skips=("Skip(1, 3, Dense(256))",)
    )
    write_json(tmp_path / "config.json", to_json(config))
    words = ["train", "--out", str(tmp_path), "--resume"]

    def asked(*more: str) -> Config:
        arguments = cli.parse([*words, *more])
        assert isinstance(arguments, cli.Train)
        assert (arguments.out, arguments.resume) == (tmp_path, True)
        return arguments.config

    assert asked() == config
    assert asked("--devices", "2") == dataclasses.replace(config, devices=2)
    assert asked("--preset", "mnist") == PRESETS["mnist"]
    words.pop()
    arguments = cli.parse(words)
    assert isinstance(arguments, cli.Train)
    assert arguments.config == PRESETS["digits"]
    assert not arguments.resume


def test_settings_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    """A run that goes on with something else than it began with."""
    (tmp_path / "config.json").write_text('{"type": "Phases"}')
    with pytest.raises(ValueError, match=r"config\.json is no configuration of this version"):
        cli.parse(["train", "--out", str(tmp_path), "--resume"])
