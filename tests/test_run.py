"""Whole runs: the files they leave, resuming, diverging, and the two scripts."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow
from rich.console import Console

import ep_jax as ep
from ep_jax import evaluation, plots, run, training
from ep_jax.data import from_arrays, load, to_float
from ep_jax.descriptions import to_json
from ep_jax.gradients import GRADIENTS
from ep_jax.health import DivergedError
from ep_jax.loop import Training
from ep_jax.optimizers import link_norms
from ep_jax.presets import PRESETS, Config, spec_of

ROOT = Path(__file__).resolve().parent.parent
TINY = dataclasses.replace(
    PRESETS["digits"],
    epochs=3,
    batch=100,
    channels=(4,),
    kernels=(3,),
    hidden=(16,),
    phases=ep.Phases(free=6, nudged=4, sweep="alternating", coordinates="displacement"),
    augmentation=training.Augmentation(),
)


def train(config: Config, out: Path, **options: Any) -> dict[str, Any]:
    return run.train(config, out, console=Console(file=io.StringIO()), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a tiny network."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(TINY, out)
    return out


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs of which other files are looked at."""
    monkeypatch.setattr(run, "_draw", lambda *args: {})
    monkeypatch.setattr(run, "_report", lambda *args: None)


@pytest.fixture
def without_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs of which the training is looked at: it ends with the weights, not evaluated."""

    def finish(training: Training, state: Any, *rest: Any) -> Any:
        *_, out, _ = rest
        params = jax.device_get(state.params)
        ep.save_weights(out, params, training.spec, training.config.phases)
        return {"config": to_json(training.config)}

    monkeypatch.setattr(run, "_finish", finish)


def test_a_run_leaves_what_the_readme_says(finished: Path) -> None:
    """Result, metrics, weights and figures, with what is needed to repeat it."""
    result = json.loads((finished / "result.json").read_text())
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == [1, 2, 3]
    assert [m["val_error"] for m in metrics] == result["val_error"]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert result["config"]["seed"] == result["seed"] == 0
    assert result["seconds_per_epoch"] > 0
    assert {"commit", "versions", "device", "test_error", "test_error_4x"} <= result.keys()
    told = result["recurrence"]
    assert len(told["share"]) == 3
    assert all(0 <= told[f"error{what}"] <= 100 for what in ("", "_cut", "_mean", "_other"))
    assert 0 < told["radius_mean"] <= told["radius_largest"]
    for m in metrics:
        assert m["residual"] >= max(m["residuals"]) >= m["mean_residual"] > 0
        assert 0 <= m["unsettled"] <= 1
        assert 0 < m["radius"]["mean"] <= m["radius"]["largest"]
    assert {p.stem for p in (finished / "figures").glob("*.png")} == {
        *("learning_curve", "layers", "relaxation", "raster", "filters", "confusion", "wrong")
    }
    assert (finished / "report.html").stat().st_size > 100_000
    costs = result["hardware"]
    assert set(costs) == {"inference", "ep", "bptt", "backprop"}
    assert 0 < costs["inference"]["joules"] < costs["ep"]["joules"] < costs["bptt"]["joules"]
    assert (result["weights_of_epoch"], result["stopped_early"]) == (3, False)


def test_the_result_is_what_the_weights_give(finished: Path) -> None:
    """Weights loaded by anyone answer the test set as the result says."""
    params, spec, phases = ep.load_weights(finished)
    data = load("digits")
    result = json.loads((finished / "result.json").read_text())
    answers, _ = training.predict(params, spec, phases, data.test_images)
    assert training.error_rate(answers, data.test_labels) == result["test_error"]
    longer = dataclasses.replace(phases, free=4 * phases.free)
    answers, _ = training.predict(params, spec, longer, data.test_images)
    assert training.error_rate(answers, data.test_labels) == result["test_error_4x"]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "classes"), [((28, 20, 1), 26), ((32, 32, 3), 10)])
def test_a_run_on_ones_own_arrays(shape: tuple[int, ...], classes: int, tmp_path: Path) -> None:
    """Ten classes, grey or square images built in; a saved network that forgot how to normalise."""
    rng = np.random.default_rng(0)
    labels = np.arange(12 * classes) % classes
    prototypes = rng.integers(0, 256, (classes, *shape))
    images = np.clip(prototypes[labels] + rng.normal(0, 20, (len(labels), *shape)), 0, 255)
    images = images.astype(np.uint8)
    unseen = slice(10 * classes, None)
    data = from_arrays(
        "own", (images[: unseen.start], labels[: unseen.start]), (images[unseen], labels[unseen]),
        validation=classes,
    )  # fmt: skip
    config = dataclasses.replace(
        TINY,
        layers=(ep.Conv(4, 5, ep.AvgPool(3, stride=2)), ep.Dense(32)),
        epochs=8,
        batch=classes,
        normalization=ep.Normalization(mean=0.5, std=0.25),
    )
    seen: list[Any] = []
    result = train(config, tmp_path / "run", data=data, on_epoch=seen.append)
    assert [record["val_error"] for record in seen] == result["val_error"]
    assert (result["dataset"], result["config"]["dataset"]) == ("own", None)
    assert result["test_error"] < 20  # at chance it is 90 or more
    params, spec, phases = ep.load_weights(tmp_path / "run")
    assert spec.classes == classes
    answers, _ = training.predict(params, spec, phases, data.test_images)
    assert training.error_rate(answers, data.test_labels) == result["test_error"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [slow("bptt", "back-propagation through time"), ("implicit", "implicit differentiation")],
)
def test_a_run_by_another_gradient(
    name: Any, shown: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A run that uses EP all the same, or learns other images than the first so many.

    One step on all of the images that are left: the norms it writes are those of the gradient at
    the initial weights, of these images in any order.
    """
    config = dataclasses.replace(TINY, epochs=1, gradient=name, train_images=100)
    if name == "implicit":  # figures are drawn of the other run
        request.getfixturevalue("without_figures")
    console = Console(file=io.StringIO(), width=100)
    result = run.train(config, tmp_path, console=console)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["step"] == 1
    assert np.isfinite(list(flat_numbers(metrics))).all()
    assert np.isfinite(list(flat_numbers(result))).all()
    assert metrics["spikes_free"] > 0
    assert metrics["spikes_nudged"] == 0
    assert ("residual_nudged" in metrics) == (name == "implicit")
    assert isinstance(console.file, io.StringIO)
    assert shown in console.file.getvalue()
    data = load("digits")
    spec = spec_of(config, data.train_images.shape[1:], data.classes)
    params = ep.init_params(jax.random.split(jax.random.key(0), 3)[0], spec, config.gain)
    gradient = jax.jit(GRADIENTS[name], static_argnames=("spec", "phases"))
    xs, ys = to_float(jnp.asarray(data.train_images[:100])), jnp.asarray(data.train_labels[:100])
    grads, _ = gradient(params, spec, xs, ys, config.phases)
    norms = [np.sqrt(sum(float(jnp.sum(v**2)) for v in layer.values())) for layer in grads]
    np.testing.assert_allclose(metrics["gradient_norm"], norms, rtol=1e-5)


def flat_numbers(record: Any) -> Iterator[float]:
    """All numbers of a record."""
    if isinstance(record, dict | list):
        for value in record.values() if isinstance(record, dict) else record:
            yield from flat_numbers(value)
    elif isinstance(record, int | float):
        yield record


@pytest.mark.parametrize("preset", ["mnist", "mnist_rate"])
def test_a_free_phase_is_recorded_at_full_size(preset: str) -> None:
    """A program the compiler chokes on after hours of training; energy that rises.

    A jaxlib failed to compile just this one, of rate neurons.
    """
    config = PRESETS[preset]
    spec = spec_of(config, (28, 28, 1), 10)
    params = ep.init_params(jax.random.key(0), spec, config.gain)
    xs = jax.random.uniform(jax.random.key(1), (64, 28, 28, 1))
    seen = plots.record_free_phase(params, spec, config.phases, xs, jax.random.key(2))
    assert seen.energy.shape == (config.phases.free,)
    assert seen.energy[-1] < 0  # the energy of the zero state it starts from is 0
    assert [s.shape[1:] for s in seen.spikes] == list(spec.state_shapes)


@pytest.mark.slow
@pytest.mark.usefixtures("without_results")
@pytest.mark.skipif(len(jax.local_devices()) < 2, reason="there is one device")
def test_a_batch_divided_among_devices(tmp_path: Path) -> None:
    """Half a batch learned, or a mean over the devices of what is no mean."""
    config = dataclasses.replace(TINY, epochs=1, devices=2)
    one = train(dataclasses.replace(config, devices=1), tmp_path / "one")
    two = train(config, tmp_path / "two")
    records = [json.loads((tmp_path / n / "metrics.jsonl").read_text()) for n in ("one", "two")]
    # Sums in another order: float32 rounding, grown by ten steps of training.
    np.testing.assert_allclose(*(r["gradient_norm"] for r in records), rtol=1e-3)
    np.testing.assert_allclose(*(r["curve"]["loss"] for r in records), rtol=1e-3)
    assert (one["config"]["devices"], two["config"]["devices"]) == (1, 2)


def test_more_devices_than_there_are(tmp_path: Path) -> None:
    """A run that silently takes fewer devices."""
    here = len(jax.local_devices())
    config = dataclasses.replace(TINY, batch=96, devices=2 * here)
    said = rf"devices is {2 * here}; expected at most the {here} .*divide_cpu\({2 * here}\)"
    with pytest.raises(ValueError, match=said):
        train(config, tmp_path / "run")
    with pytest.raises(ValueError, match="devices is 3; expected a divisor of the batch"):
        dataclasses.replace(TINY, devices=3)


def test_more_training_images_than_there_are(tmp_path: Path) -> None:
    """A limit that nobody notices: a run on fewer images than its record says."""
    config = dataclasses.replace(TINY, train_images=999)
    with pytest.raises(ValueError, match="train_images is 999; expected at most the 998 there"):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class KilledError(Exception):
    """Stands for a machine that went away."""


@pytest.mark.usefixtures("without_results")
def test_a_resumed_run_is_the_uninterrupted_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the third epoch, resumed: every bit of the weights and every metric is the same."""
    predict, calls = training.predict, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KilledError
        return predict(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(training, "predict", dies)
        with pytest.raises(KilledError):
            train(TINY, tmp_path / "out")
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "out" / "result.json").exists()
    train(TINY, tmp_path / "out", resume=True)
    assert same_as(finished, tmp_path / "out")


@pytest.mark.usefixtures("without_results")
def test_a_run_with_muon_and_a_cap_learns_resumes_and_keeps_to_it(tmp_path: Path) -> None:
    """The state of this optimiser is another one; its links stay below the cap."""
    config = dataclasses.replace(TINY, optimizer="muon", learning_rate=0.05, cap=0.5)
    train(config, tmp_path / "out")
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[-1]["loss"] < records[0]["loss"]
    assert max(record["links_capped"] for record in records) > 0
    params, spec, _ = ep.load_weights(tmp_path / "out")
    assert (link_norms(params, spec) < 0.5 * 1.02).all()
    train(config, tmp_path / "out", resume=True)  # from the last checkpoint: nothing to do
    again, _, _ = ep.load_weights(tmp_path / "out")
    chex.assert_trees_all_equal(again, params)


def same_as(finished: Path, resumed: Path) -> bool:
    """Whether weights and metrics agree to the last bit; only the clock may differ."""
    with np.load(finished / "weights.npz") as a, np.load(resumed / "weights.npz") as b:
        weights = all(a[name].tobytes() == b[name].tobytes() for name in a.files)
    lines = [(f / "metrics.jsonl").read_text().splitlines() for f in (finished, resumed)]
    records = [[json.loads(line) | {"seconds": None} for line in run] for run in lines]
    return weights and records[0] == records[1]


def test_every_epoch_and_seed_has_its_own_order() -> None:
    """One order for all epochs: each batch would hold the same images for the whole training."""
    data = load("digits")
    orders = [
        Training(dataclasses.replace(TINY, seed=seed), data).dispatches(epoch).ravel()
        for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1))
    ]
    for other in orders[1:3]:
        assert np.mean(orders[0] == other) < 0.05
    np.testing.assert_array_equal(orders[0], orders[3])


@pytest.fixture
def in_foreground() -> Iterator[None]:
    """Where Ctrl-C is heard; the tests themselves may run in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_foreground", "without_results")
@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_a_run_that_is_asked_to_stop_loses_nothing(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch: it saves, says so, and goes on as if it had not been stopped."""
    config = dataclasses.replace(TINY, epochs=2, steps_per_dispatch=2)
    train(config, tmp_path / "whole")
    check = run.health.check_finite

    def asks(metrics: Any, epoch: int, before: int) -> None:
        check(metrics, epoch, before)
        if (epoch, before) == (2, 4):  # the third of five dispatches
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(run.health, "check_finite", asks)
        with pytest.raises(run.StoppedError, match=rf"{number.name} in epoch 2, after step 16;"):
            train(config, tmp_path / "out")
    assert signal.getsignal(number) not in (None, signal.SIG_IGN)
    assert not (tmp_path / "out" / "result.json").exists()
    console = Console(file=io.StringIO())
    run.train(config, tmp_path / "out", resume=True, console=console)
    assert isinstance(console.file, io.StringIO)
    assert "resumed in epoch 2, after 6 of 10 steps" in console.file.getvalue()
    assert same_as(tmp_path / "whole", tmp_path / "out")


@pytest.mark.usefixtures("in_foreground")
def test_an_ignored_signal_stays_ignored() -> None:
    """Ctrl-C in the terminal of a script whose background job this is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with run._heeding_signals() as asked:
        os.kill(os.getpid(), signal.SIGINT)
    assert asked.stop is None
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.usefixtures("in_foreground")
def test_a_second_ctrl_c_does_not_wait() -> None:
    """A run that hangs and cannot be ended from the keyboard."""
    with run._heeding_signals() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.stop == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_nothing_is_compiled_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape or a setting that changes from epoch to epoch."""
    make = training.make_train_steps

    def once(*args: Any, **settings: Any) -> Any:
        # Once for the shapes of its metrics, and once to be compiled.
        return chex.assert_max_traces(make(*args, **settings), n=2)

    monkeypatch.setattr(training, "make_train_steps", once)
    answers: Any = training._answers
    radii: Any = evaluation._contractivity
    before, looked = answers._cache_size(), radii._cache_size()
    train(dataclasses.replace(TINY, hidden=(11,)), tmp_path / "out")
    # Validation and test images in one program, test images at four times the sweeps in another;
    # images of a look after each epoch and of the one for the result.
    assert answers._cache_size() - before == 2
    assert radii._cache_size() - looked == 2


def test_a_run_is_never_overwritten(finished: Path) -> None:
    """Without --resume a folder that holds a run is refused, and left as it was."""
    before = (finished / "weights.npz").read_bytes()
    with pytest.raises(FileExistsError, match=r"out is .* holds a run; expected a new folder"):
        train(TINY, finished)
    assert (finished / "weights.npz").read_bytes() == before


def test_another_runs_checkpoint_is_refused(finished: Path) -> None:
    """What differs is named."""
    other = dataclasses.replace(TINY, hidden=(17,))
    with pytest.raises(ValueError, match=r"hidden was \[16\] and is now \[17\]"):
        train(other, finished, resume=True)


@pytest.mark.usefixtures("without_results")
def test_an_unreadable_checkpoint_is_an_error(tmp_path: Path) -> None:
    """Not a silent fresh start, which would lose the run."""
    out = tmp_path / "out"
    train(dataclasses.replace(TINY, epochs=1), out)
    damaged = 0
    for path in (out / "checkpoints").rglob("*"):
        if path.is_file() and "record" in path.parts[-2]:
            path.write_bytes(b"\x00")
            damaged += 1
    assert damaged
    with pytest.raises(ValueError, match=r"checkpoints.* is unreadable or foreign"):
        train(dataclasses.replace(TINY, epochs=1), out, resume=True)


@pytest.mark.usefixtures("nans_allowed")
@pytest.mark.filterwarnings("ignore:overflow|invalid:RuntimeWarning")
def test_a_run_that_diverges_says_where_and_writes_no_result(tmp_path: Path) -> None:
    """No NaN ever reaches a result."""
    hopeless = dataclasses.replace(TINY, learning_rate=1e30, steps_per_dispatch=4)
    with pytest.raises(DivergedError, match=r"epoch 1, step 1: parameters .* layers \["):
        train(hopeless, tmp_path / "out")
    assert not (tmp_path / "out" / "result.json").exists()
    assert not (tmp_path / "out" / "weights.npz").exists()


def script(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / name), *words], capture_output=True, text=True
    )


@pytest.mark.slow
def test_evaluate_script_agrees_with_the_result(finished: Path, tmp_path: Path) -> None:
    """What a reader runs to check a claim."""
    out = tmp_path / "out.json"
    done = script(
        "evaluate.py", "--weights", str(finished), "--dataset", "digits", "--json", str(out)
    )
    assert done.returncode == 0, done.stderr
    checked = json.loads(out.read_text())
    result = json.loads((finished / "result.json").read_text())
    assert checked["test_error"] == result["test_error"]
    assert checked["test_error_4x"] == result["test_error_4x"]


@pytest.mark.slow
def test_train_script_overrides_a_preset(tmp_path: Path) -> None:
    """The command of the README, with fields overridden at every level."""
    done = script(
        "train.py",
        *("--preset", "digits", "--seed", "3", "--epochs", "1", "--out", str(tmp_path / "out")),
        *("--channels", "4", "--kernels", "3", "--hidden", "16", "--feedback", "0.2"),
        *("--phases.free", "6", "--neuron.decay", "0.5"),
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "result.json").read_text())["config"]
    assert (config["seed"], config["epochs"], config["channels"]) == (3, 1, [4])
    assert (config["phases"]["free"], config["neuron"]["decay"]) == (6, 0.5)
    assert "loss" in done.stdout
    assert "residual" in done.stdout


BAD_WORDS: list[tuple[list[str], str]] = [
    (["--preset", "nope"], "invalid choice: 'nope'"),
    (["--feedback", "2"], "feedback is 2.0; expected a finite number in (0, 1]"),
    (["--phases.beta", "0"], "beta is 0"),
    (["--kernels", "3"], "expected one kernel for each"),
    (["--padding", "VALID", "--kernels", "2", "2"], "does not fit"),
    (["--dataset", "mnist", "--data-dir", "/nowhere"], "download_and_prepare"),
    (["--devices", "7"], "devices is 7; expected a divisor of the batch"),
    (["--epochs", "0"], "epochs is 0; expected an integer of at least 1"),
    (["--epochs", "three"], "three"),
    (["--epochs"], "--epochs"),
    (["--learning-rate", "nan"], "learning_rate is nan; expected a finite number"),
    (["--layer-rates", "1", "2"], "expected a factor for each of the 4 layers"),
    (["--validation", "998000"], "validation is 998000; expected an integer of at least 0"),
    (["--train-images", "999"], "train_images is 999; expected at most the 998 there are"),
    (["--augmentation.rotate", "200"], "rotate is 200.0; expected a number in [0, 180]"),
    (["--neuron.decay", "2"], "DeltaCode.decay is 2.0; expected a finite number in (0, 1]"),
    (["--phases.sweep", "random"], "random"),
    (["--patience", "0"], "patience is 0; expected an integer of at least 1"),
    (["--keep", "first"], "first"),
    (["--log", "mlflow"], "mlflow"),
    (["--nonsense", "1"], "--nonsense"),
]


@pytest.mark.parametrize(("words", "message"), BAD_WORDS)
def test_train_script_explains_bad_input(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, no traceback, before anything is compiled."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    script_module = importlib.import_module("train")
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit) as stopped:
        script_module.main()
    shown = " ".join((str(stopped.value) + capsys.readouterr().err).split())
    assert message in shown
    assert not (tmp_path / "out").exists()
