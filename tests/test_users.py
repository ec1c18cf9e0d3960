"""What happened to users of neighbouring tools: each situation, and the right outcome."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow
from rich.console import Console

import ep_jax as ep
from ep_jax import claims, provenance, run, training
from ep_jax.data import Dataset, load
from ep_jax.files import own_path, write_json
from ep_jax.network import classify
from ep_jax.presets import PRESETS, Config

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
    spec = ep.NetworkSpec((2, 1, 1), (ep.Dense(3), ep.Dense(3)), ep.Rate())
    # The first output is infinite, and its feedback to the third hidden unit infinity times zero.
    huge = jnp.array([[3e38, 0.0, 0.0], [3e38, 0.0, 0.0], [0.0, 0.0, 1.0]])
    params = ({"w": jnp.zeros((2, 3)), "b": jnp.ones(3)}, {"w": huge, "b": jnp.zeros(3)})
    answers, _ = training.predict(params, spec, ep.Phases(12), np.zeros((4, 2, 1, 1), np.uint8))
    assert answers.tolist() == [-1] * 4
    assert training.error_rate(answers, np.zeros(4, int)) == 100


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
    """Rows of other settings in a new table; a line cut off that stops all that follows."""
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
    with pytest.raises(ValueError, match=r"made with the settings .*2.* and not with .*3"):
        common.Journal(path, {"batches": 3})


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run into a folder of an odd name, and what it printed."""
    out = tmp_path_factory.mktemp("odd") / "lr:x:1"
    console = Console(file=io.StringIO(), width=300)
    config = replace(TINY, epochs=1, steps_per_dispatch=3)
    data = load("digits")._replace(name="mine [/bold]")
    run.train(config, out, data=data, console=console)
    assert isinstance(console.file, io.StringIO)
    return out, console.file.getvalue()


def test_names_that_look_like_markup_are_shown_as_they_are(shown: tuple[Path, str]) -> None:
    """A traceback after a complete run, since its folder was called [/seed0]; an emoji for :x:."""
    out, text = shown
    assert str(out) in text
    assert "mine [/bold]: DeltaCode" in text


def test_the_lines_of_an_epoch_can_be_compared(shown: tuple[Path, str]) -> None:
    """Quarters of an epoch, then the whole of it: an error that falls seems to rise at its end."""
    out, text = shown
    (record,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    losses = [float(found) for found in re.findall(r"epoch 1/1 .* loss (\S+)", text)]
    pieces = np.array(record["curve"]["loss"])
    means = np.cumsum(pieces) / np.arange(1, len(pieces) + 1)
    assert len(losses) == len(pieces) == 4
    np.testing.assert_allclose(losses, means, atol=1e-4)


def test_a_file_is_replaced_where_its_name_leads(tmp_path: Path) -> None:
    """A link that becomes a file of its own; permissions that are the process's; rubbish left."""
    target = tmp_path / "data" / "real.json"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(target)
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}
    assert target.stat().st_mode & 0o777 == 0o640
    assert list(target.parent.iterdir()) == [target]


def test_devices_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    """``--json /dev/stdout``: a regular file in the place of a device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as other:
        read = other.submit(pipe.read_bytes)
        write_json(pipe, [1, 2])
        assert json.loads(read.result()) == [1, 2]
    assert pipe.is_fifo()


def test_the_first_error_is_the_one_that_is_told(tmp_path: Path) -> None:
    """Cleaning up that fails as well, and hides what went wrong."""
    with pytest.raises(
        OSError, match=r"x cannot be written: File name too long; expected a folder"
    ):
        write_json(tmp_path / ("x" * 300), 1)


SCRIPTS = {
    "train": ("weights.npz", ["--preset", "digits", "--out"]),
    "prune": ("weights.npz", ["--weights", "nowhere", "--dataset", "digits", "--out"]),
    "recurrence": ("recurrence.json", ["--weights", "nowhere", "--dataset", "digits", "--out"]),
    "anytime": ("anytime.json", ["--weights", "nowhere", "--dataset", "digits", "--out"]),
    "robustness": ("robustness.json", ["--weights", "nowhere", "--dataset", "digits", "--out"]),
    "gradient_check": ("check.json", ["--preset", "digits", "--out"]),
    "frontier": (
        "frontier.json",
        ["--early", "nowhere", "--late", "nowhere", "--runs", "nowhere", "--out"],
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_writes_over_a_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of another run, lost; found out before anything is computed."""
    file, words = SCRIPTS[name]
    (tmp_path / file).write_text("precious")
    monkeypatch.setattr("sys.argv", [f"{name}.py", *words, str(tmp_path)])
    with pytest.raises(SystemExit, match=rf"out is .* which holds {file}; expected a new folder"):
        importlib.import_module(name).main()
    assert (tmp_path / file).read_text() == "precious"


def test_evaluation_writes_over_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--json runs/digits/result.json``: the training's own result, lost."""
    file = tmp_path / "result.json"
    file.write_text("precious")
    words = ["--weights", "nowhere", "--dataset", "digits", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
    with pytest.raises(SystemExit, match=r"json is .* which is there already"):
        importlib.import_module("evaluate").main()
    assert file.read_text() == "precious"


@pytest.mark.parametrize("where", ["spec", "phases"])
def test_no_field_of_saved_weights_is_made_up(where: str, tmp_path: Path) -> None:
    """A default of today in the place of a field that is gone: another network, without a word."""
    spec = ep.NetworkSpec((2,), (ep.Dense(2),), ep.Rate())
    params = ep.init_params(jax.random.key(0), spec)
    ep.save_weights(tmp_path, params, spec, ep.Phases())
    with np.load(tmp_path / "weights.npz") as found:
        arrays: dict[str, Any] = dict(found)
    record = json.loads(str(arrays["network"]))
    for field in record[where].keys() - {"type"}:
        changed = json.loads(json.dumps(record))
        del changed[where][field]
        arrays["network"] = np.array(json.dumps(changed))
        np.savez(tmp_path / "weights.npz", **arrays)
        with pytest.raises(ValueError, match=rf"lacks {field}; expected its fields"):
            ep.load_weights(tmp_path)
    record[where]["colour"] = "red"
    arrays["network"] = np.array(json.dumps(record))
    np.savez(tmp_path / "weights.npz", **arrays)
    with pytest.raises(ValueError, match="has the unknown colour"):
        ep.load_weights(tmp_path)


def test_a_home_folder_is_found_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--out=~/runs`` makes a folder called ~; without a home there is a traceback."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert own_path("out", "~/runs") == tmp_path / "runs"

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(ValueError, match="out is '~/runs', and there is no home folder here"):
        own_path("out", "~/runs")


TINY = replace(
    PRESETS["digits"], layers=(ep.Dense(8),), epochs=2, batch=100, phases=ep.Phases(3, 2)
)


class KilledError(Exception):
    """Stands for a machine that went away."""


@pytest.fixture
def unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end after their last epoch, not evaluated."""
    monkeypatch.setattr(run, "_finish", lambda *_: {})


def killed(out: Path, data: Dataset, config: Config = TINY) -> None:
    """A run that went away after its first epoch."""

    def dies(record: Any) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        run.train(config, out, data=data, on_epoch=dies, console=Console(file=io.StringIO()))


@pytest.mark.usefixtures("unfinished")
def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    """Other images under the same name, as many as before: half of each is learned."""
    data = load("digits")
    killed(tmp_path, data)
    swapped = data.train_images.copy()
    swapped[0] = 16 - swapped[0]
    with pytest.raises(ValueError, match="written by another configuration: data was '"):
        run.train(TINY, tmp_path, data=data._replace(train_images=swapped), resume=True)


@pytest.mark.usefixtures("unfinished")
@pytest.mark.skipif(len(jax.local_devices()) < 2, reason="there is one device")
def test_a_run_goes_on_where_the_data_moved_and_devices_came(tmp_path: Path) -> None:
    """What decides nothing, and blocks a resume all the same."""
    data = load("digits")
    killed(tmp_path, data)
    moved = replace(TINY, data_dir="/somewhere/else", devices=2)
    seen: list[Any] = []
    run.train(moved, tmp_path, data=data, resume=True, on_epoch=seen.append)
    assert [record["epoch"] for record in seen] == [2]


@pytest.mark.usefixtures("unfinished")
def test_a_warning_from_the_scheduler_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGUSR1, whose default is to end the program."""
    config = replace(TINY, steps_per_dispatch=2)
    check, calls = run.health.check_finite, []

    def warns(*args: Any) -> None:
        check(*args)
        calls.append(sorted(p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run.health, "check_finite", warns)
        run.train(config, tmp_path, data=load("digits"), console=Console(file=io.StringIO()))
    assert calls[1] == []
    assert calls[2] == ["2"]  # after two of five dispatches
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_path_that_reads_as_a_pattern_is_refused(tmp_path: Path) -> None:
    """Checkpoints that are written and can never be read."""
    with pytest.raises(ValueError, match=r"out is .*, which holds \[ \]; expected a path without"):
        run.train(TINY, tmp_path / "sweep[lr=0.1]")
    assert list(tmp_path.iterdir()) == []


def test_the_commit_is_of_this_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed inside a user's repository: that one's commit of today."""
    package = tmp_path / "env" / "ep_jax" / "provenance.py"
    package.parent.mkdir(parents=True)
    package.touch()
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "mine"]):
        author = ["-c", "user.name=me", "-c", "user.email=me@here"]
        subprocess.run(["git", *author, *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(package))
    assert provenance.provenance()["commit"] == "unknown"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", ">f4"])
def test_weights_of_any_precision_load_as_they_were_saved(dtype: str, tmp_path: Path) -> None:
    """bfloat16 that comes back as bytes, float64 as float32, or another byte order as noise."""
    spec = ep.NetworkSpec((3,), (ep.Dense(4), ep.Dense(2)), ep.Rate())
    with jax.enable_x64(dtype == "float64"):
        params = ep.init_params(jax.random.key(0), spec)
        host = jax.tree.map(lambda p: np.asarray(p, jnp.dtype(dtype)), params)
        ep.save_weights(tmp_path, host, spec, ep.Phases())
        loaded, _, _ = ep.load_weights(tmp_path)
        for saved, found in zip(jax.tree.leaves(host), jax.tree.leaves(loaded), strict=True):
            assert found.dtype == saved.dtype.newbyteorder("=")
            np.testing.assert_array_equal(np.asarray(found), saved)


def test_weights_that_this_session_would_round_are_refused(tmp_path: Path) -> None:
    """float64 weights in a program without it: other answers than those that were measured."""
    spec = ep.NetworkSpec((3,), (ep.Dense(2),), ep.Rate())
    with jax.enable_x64(True):
        params = ep.init_params(jax.random.key(0), spec, dtype=jnp.float64)
        ep.save_weights(tmp_path, params, spec, ep.Phases())
    if not jax.config.read("jax_enable_x64"):
        with pytest.raises(ValueError, match="would round to float32; expected JAX_ENABLE_X64=1"):
            ep.load_weights(tmp_path)


@pytest.mark.parametrize(("part", "what"), [("_draw", "figures"), slow("_report", "report.html")])
def test_a_complete_run_does_not_fail_by_its_figures(
    part: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After hours of training: a traceback, an exit status of 1, and nobody knows what there is."""

    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(run, part, full)
    monkeypatch.setattr(run, "evaluate", lambda *_, **__: {"test_error": 1.0})  # no summary
    said = rf"{what} failed: .*No space left.*; the result is in"
    with pytest.warns(UserWarning, match=said):
        result = run.train(replace(TINY, epochs=1), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (tmp_path / "report.html").is_file() == (part == "_draw")  # without figures, if need be


def test_weights_are_there_before_anything_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that runs out of memory, and takes the training with it."""

    def fails(*args: Any, **settings: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(run, "evaluate", fails)
    with pytest.raises(MemoryError):
        run.train(replace(TINY, epochs=1), tmp_path)
    assert ep.load_weights(tmp_path)[1].classes == 10


def test_an_output_that_cannot_be_written_is_found_out_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that may only be read, found out when there is a result to write."""
    words = ["--weights", "nowhere", "--dataset", "digits", "--json", "/proc/nobody/out.json"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
    with pytest.raises(SystemExit, match="json is '/proc/nobody', which cannot be made or written"):
        importlib.import_module("evaluate").main()


def test_a_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    """Two runs into one folder, at the same moment or one after the other: their results mixed."""
    with claims.claimed("out", tmp_path):
        with (
            pytest.raises(FileExistsError, match=rf"which process {os.getpid()} on .* has held"),
            claims.claimed("out", tmp_path),
        ):
            pass
        with pytest.raises(FileExistsError, match="expected a folder of its own for each run"):
            run.train(TINY, tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []
    with claims.claimed("out", tmp_path):
        pass


def left_behind(folder: Path, age: float = 0.0, **changed: Any) -> None:
    """The claim of a run that was killed, or lives elsewhere."""
    file = folder / claims.NAME
    file.write_text(json.dumps(claims._own() | changed))
    then = time.time() - age
    os.utime(file, (then, then))


def held(folder: Path) -> bool:
    try:
        with claims.claimed("out", folder):
            return False
    except FileExistsError:
        return True


def test_the_claim_of_a_dead_process_is_no_claim(tmp_path: Path) -> None:
    """A folder that a kill locked for ever; a number that came again, here or on another host."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    left_behind(tmp_path, process=gone.pid)
    assert not held(tmp_path)
    left_behind(tmp_path, began="1")  # a process of this number lives, and is another one
    assert not held(tmp_path)
    left_behind(tmp_path, host="elsewhere", process=gone.pid)
    assert held(tmp_path)
    left_behind(tmp_path, age=2 * claims.FORGOTTEN_AFTER, host="elsewhere")
    assert not held(tmp_path)


def test_of_many_who_see_a_dead_claim_one_gets_it(tmp_path: Path) -> None:
    """A claim that two take over, since both have seen that its owner is dead."""
    left_behind(tmp_path, began="1")
    start, got, done = threading.Barrier(8), [], threading.Barrier(8)

    def take() -> None:
        start.wait()
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(FileExistsError):
                stack.enter_context(claims.claimed("out", tmp_path))
                got.append(1)
            done.wait()

    with ThreadPoolExecutor(8) as threads:
        for _ in range(8):
            threads.submit(take)
    assert len(got) == 1
    assert list(tmp_path.iterdir()) == []


SHORT = """
import sys
from dataclasses import replace
import ep_jax as ep
from ep_jax import run
from ep_jax.data import load
from ep_jax.presets import PRESETS
run._finish = lambda *_: {}  # what it says before counts
config = replace(PRESETS["digits"], layers=(ep.Dense(8),), epochs=2, batch=100)
run.train(config, sys.argv[1], data=load("digits"))
"""


def spoken(out: Path, *, reader: str = "cat", **settings: str) -> tuple[int, str, str]:
    """A short training whose output somebody reads: its own exit status, and what it said."""
    words = [sys.executable, "-c", SHORT, str(out)]
    line = " ".join(map(shlex.quote, words))
    done = subprocess.run(
        ["bash", "-c", f"{line} | {reader}; exit ${{PIPESTATUS[0]}}"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_log_that_is_told_to_be_coloured_erases_nothing(tmp_path: Path) -> None:
    """FORCE_COLOR in a scheduler's log of narrow lines: a bar drawn a thousand times."""
    settings = {"FORCE_COLOR": "1", "COLUMNS": "20", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    code, said, error = spoken(tmp_path / "out", **settings)
    assert code == 0, error
    assert not re.search(r"\x1b\[\d*[A-KJ]|\r", said)
    assert "epoch 2/2" in re.sub(r"\x1b\[[\d;]*m", "", said)


@pytest.mark.slow
def test_a_run_outlives_its_reader(tmp_path: Path) -> None:
    """``train.py | head -1``: a traceback, and the run is lost."""
    code, _, error = spoken(tmp_path / "out", reader="head -c 1")
    assert code == 0, error
    assert "Error" not in error
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_dispatch_is_over_before_a_scheduler_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of a hundred slow steps takes minutes; half a minute after SIGTERM comes SIGKILL."""
    seen: list[int] = []
    steps = run.Training.steps

    def slow(self: Any, state: Any, batches: Any) -> Any:
        seen.append(len(batches))
        clock[0] += 4.0 * len(batches)
        return steps(self, state, batches)

    clock = [0.0]
    monkeypatch.setattr(run.Training, "steps", slow)
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(run, "_finish", lambda *_: {})
    run.train(replace(TINY, epochs=1, batch=10), tmp_path, data=load("digits"))
    whole = len(np.concatenate(run.Training(replace(TINY, batch=10), load("digits")).dispatches(1)))
    assert sum(seen) == whole
    assert max(seen) == 2  # of four seconds each, and ten are heeded
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert record["seconds"] == pytest.approx(4.0 * whole)


def test_a_trace_of_numbers_is_stacked() -> None:
    """A float instead of an array: a traceback from inside."""
    spec = ep.NetworkSpec((4,), (ep.Dense(5), ep.Dense(3)), ep.Rate())
    params = ep.init_params(jax.random.key(0), spec)
    x, phases = jnp.ones(4), ep.Phases(5)
    _, info = ep.free_phase(params, spec, x, phases, trace=lambda now: {"a": 1.0, "b": now.step})
    assert info.trace["a"].tolist() == [1.0] * 5
    assert info.trace["b"].tolist() == [0, 1, 2, 3, 4]
    odd: Any = lambda now: object()  # noqa: E731
    with pytest.raises(TypeError, match=r"trace returned <object .*; expected arrays or numbers"):
        ep.free_phase(params, spec, x, phases, trace=odd)


@pytest.mark.parametrize(
    "gradient", [ep.ep_gradient, ep.bptt_gradient, ep.implicit_gradient], ids=lambda g: g.__name__
)
def test_a_gradient_is_exported_for_any_batch(gradient: Any) -> None:
    """``len`` of a symbolic size: a traceback from inside."""
    spec = ep.NetworkSpec((6, 6, 1), (ep.Conv(2, 3), ep.Dense(3)), ep.Rate())
    params = ep.init_params(jax.random.key(0), spec)
    (size,) = jax.export.symbolic_shape("b")
    dtype = params[0]["w"].dtype
    given = (
        params,
        jax.ShapeDtypeStruct((size, 6, 6, 1), dtype),
        jax.ShapeDtypeStruct((size,), jnp.int32),
    )
    here = (params, jnp.ones((2, 6, 6, 1), dtype), jnp.array([0, 1], jnp.int32))
    compiled = jax.jit(lambda p, xs, ys: gradient(p, spec, xs, ys, ep.Phases(5, 3))[0])
    exported = jax.export.export(compiled)(*given)
    jax.tree.map(np.testing.assert_array_equal, exported.call(*here), compiled(*here))
    slowest = ep.Phases(5, 3, stragglers=0.5, free_more=2, nudged_more=2)
    unsized = jax.jit(lambda p, xs, ys: gradient(p, spec, xs, ys, slowest)[0])
    with pytest.raises(ValueError, match=r"stragglers is 0\.5.* expected 0"):
        jax.export.export(unsized)(*given)


@pytest.mark.slow
@pytest.mark.parametrize("neuron", [ep.Rate(), ep.DeltaCode()], ids=["rate", "code"])
def test_gradients_are_the_same_without_jit(neuron: ep.Neuron) -> None:
    """``JAX_DISABLE_JIT=1``, with which people look for their errors."""
    spec = ep.NetworkSpec((4,), (ep.Dense(5), ep.Dense(3)), neuron)
    params = ep.init_params(jax.random.key(0), spec)
    xs, ys, key = jnp.ones((2, 4)), jnp.array([0, 1]), jax.random.key(1)
    for gradient, phases in (
        (ep.ep_gradient, ep.Phases(4, 4, tolerance=1e-3)),
        (ep.bptt_gradient, ep.Phases(2)),
        (ep.implicit_gradient, ep.Phases(2)),
    ):
        compiled = jax.jit(gradient, static_argnames=("spec", "phases"))
        wanted, _ = compiled(params, spec, xs, ys, phases, key)
        with jax.disable_jit():
            found, _ = gradient(params, spec, xs, ys, phases, key)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@dataclass(frozen=True)
class Rounded(ep.Rate):
    """A neuron of a user's whose spikes have no surrogate derivative."""

    def signal(self, state: Any) -> jax.Array:
        """Whole numbers."""
        return jnp.round(state.s)


def test_bptt_through_what_has_no_derivative_says_so() -> None:
    """A gradient of zeros below the output, without a word."""
    spec = ep.NetworkSpec((4,), (ep.Dense(5), ep.Dense(3)), Rounded())
    params = ep.init_params(jax.random.key(0), spec)
    xs, ys, phases = jnp.ones((2, 4)), jnp.array([0, 1]), ep.Phases(3, 2)
    with pytest.raises(ValueError, match=r"neuron is Rounded.* expected one with a surrogate"):
        ep.bptt_gradient(params, spec, xs, ys, phases)
    with pytest.raises(ValueError, match="neuron is Rounded"):
        jax.jit(lambda p: ep.equilibrium(p, spec, xs, phases, derivative=ep.BPTT()))(params)
    ep.ep_gradient(params, spec, xs, ys, phases)  # which needs no derivative of a spike
