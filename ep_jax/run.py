"""One training run, from a `Config` to the files it leaves.

This is where the loop of `ep_jax.loop` is driven and where input and output happen.

Files in the run's folder: ``config.json``, ``metrics.jsonl`` (a line an epoch), ``checkpoints/``,
and, at the end, ``result.json``, ``weights.npz``, ``figures/*.png`` and ``report.html``; with
``keep="best"`` also ``best/``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ep_jax import health, processes, selection
from ep_jax.checkpoint import Checkpoints, load_weights, save_weights
from ep_jax.claims import claimed
from ep_jax.data import Dataset, load
from ep_jax.descriptions import to_json
from ep_jax.evaluation import evaluate
from ep_jax.extras import extra
from ep_jax.files import (
    check_plain,
    check_unused,
    fingerprint,
    make_folder,
    own_path,
    write_atomically,
    write_json,
)
from ep_jax.loop import Record, Training, mean_record, records_of
from ep_jax.network import Params
from ep_jax.presets import CAME_LATER, Config
from ep_jax.progress import RunConsole, describe, progress, say, summary
from ep_jax.provenance import provenance
from ep_jax.training import TrainState

with extra("cli"):
    from rich.console import Console

HEED_WITHIN = 10.0
"""Seconds after which signals are looked at, or one step: schedulers kill half a minute after the
first one, and the checkpoint takes its time."""


class StoppedError(Exception):
    """A run was asked to stop, and has saved what it had.

    Attributes:
        signal: number of the signal that asked.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def train(
    config: Config,
    out: str | os.PathLike[str],
    *,
    data: Dataset | None = None,
    resume: bool = False,
    on_epoch: Callable[[Record], None] | None = None,
    console: Console | None = None,
) -> Record:
    """Train as `config` says and write everything into `out`.

    The training images less the validation split are learned; the test images are read once, at the
    end, for the result.

    Args:
        config: the run.
        out: folder for its files.
        data: what to learn; by default what ``config.dataset`` names.
        resume: go on from the last checkpoint in `out`; start afresh where there is none.
        on_epoch: called after each epoch with what it measured, a line of ``metrics.jsonl``.
        console: where progress is shown.

    Returns:
        The result, as in ``result.json``.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is not asked for; or another process is
            writing into it.
        ValueError: the configuration does not fit the data, or `out` holds another run's
            checkpoint.
        OSError: a file cannot be written; the last checkpoint stays.
        DivergedError: a state, gradient or parameter was not finite. The last checkpoint stays, no
            result is written.
        StoppedError: SIGTERM or Ctrl-C came. Where the run was, it can go on with `resume`.
    """
    out, console = own_path("out", out), console or RunConsole()
    if not processes.is_first():
        console = RunConsole(quiet=True)
    with contextlib.ExitStack() as held:
        error = None
        if processes.is_first():
            try:
                _take(out, resume, held)
            except (OSError, ValueError) as refused:
                error = refused
        processes.after_first(error)
        return _train(config, out, data, resume, on_epoch, console)


def _take(out: Path, resume: bool, held: contextlib.ExitStack) -> None:
    """Make the run's folder, for this job alone as long as it is `held`."""
    if not resume:
        if (out / "metrics.jsonl").exists() or (out / "checkpoints").exists():
            raise FileExistsError(f"out is {str(out)!r}, which holds a run; expected a new folder, "
                                  "or --resume to go on with that run")  # fmt: skip
        check_unused("out", out, "weights.npz", "result.json")
    check_plain("out", out)
    new = not out.exists()
    make_folder("out", out)
    if new:
        held.callback(_remove_if_empty, out)
    held.enter_context(claimed("out", out))


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it holds something
        folder.rmdir()


def _train(
    config: Config,
    out: Path,
    data: Dataset | None,
    resume: bool,
    on_epoch: Callable[[Record], None] | None,
    console: Console,
) -> Record:
    """See `train`; the folder is there, and nobody else's."""
    if data is None:
        if config.dataset is None:
            raise ValueError("config.dataset is None, and no data are given; expected one of them")
        data = load(config.dataset, validation=config.validation, data_dir=config.data_dir)
    elif data.name != config.dataset:
        config = replace(config, dataset=None)  # it is of other data, and so say the records
    training = Training(config, data)
    writes = processes.is_first()
    keeps_best = writes and config.keep == "best"
    state = training.start()
    came_later = CAME_LATER | {"random": _RANDOM}
    checkpoints = Checkpoints(out / "checkpoints", _identity(config, data), came_later)
    made_by = [provenance()]
    history: list[Record] = []  # of epochs
    steps: list[Record] = []  # of the epoch under way
    dispatches, each, _ = training.dispatches(0).shape
    if resume and (found := checkpoints.restore(state)) is not None:
        state, done = found
        history, steps = done["history"], done["steps"]
        made_by = [p for p in done["made_by"] if p != made_by[0]] + made_by
        say(console, f"resumed in epoch {len(history) + 1}, after {len(steps)} of "
            f"{dispatches * each} steps")  # fmt: skip
    if writes:
        write_json(out / "config.json", to_json(config))
    state = training.compile(state)

    def save() -> None:
        done = {"history": history, "steps": steps, "made_by": made_by}
        checkpoints.save(int(state.step), state, done)

    warned: set[str] = set()
    at_once = 1  # step: nobody knows yet how long it takes
    with _heeding_signals() as asked, progress(console, config.epochs, dispatches) as report:
        for epoch in range(len(history) + 1, config.epochs + 1):
            if selection.is_over(history, config.patience):
                best = selection.best_epoch(history)
                say(console, f"stopped after epoch {epoch - 1}: the lowest validation error was "
                    f"that of epoch {best}")  # fmt: skip
                break
            plan = np.concatenate(training.dispatches(epoch))
            while (before := len(steps)) < len(plan):
                some = plan[before : min(before + at_once, (before // each + 1) * each)]
                began = time.perf_counter()
                state, metrics = training.steps(state, some)
                seconds = (time.perf_counter() - began) / len(some)
                health.check_finite(metrics, epoch, before)
                # All processes of a job do the same.
                seconds, stop, save_now = processes.largest(seconds, asked.stop or 0, asked.save)
                at_once = max(1, int(HEED_WITHIN / seconds))
                steps += [r | {"seconds": seconds} for r in records_of(metrics, training.spec)]
                if len(steps) < len(plan):  # the end of an epoch saves anyway
                    if stop or save_now:
                        save()
                    if stop:
                        raise _stopped(int(stop), epoch, state)
                    if len(steps) % each == 0:
                        # The mean since the epoch began, as its last line is of all of it.
                        report(epoch, len(steps) // each, describe(mean_record(steps)))
                if save_now:
                    asked.save = False
            record = training.epoch_record(state, epoch, steps)
            history.append(record)
            steps = []
            # Before the checkpoint: what comes after it is not made again when a run resumes.
            lines = "".join(json.dumps(r, allow_nan=False) + "\n" for r in history)
            if writes:
                write_atomically(out / "metrics.jsonl", lines.encode())
            if keeps_best:
                params = jax.device_get(state.params)
                selection.keep_if_best(out / "best", history, params, training.spec, config.phases)
            save()
            if keeps_best:
                selection.forget_others(out / "best", history)
            report(epoch, dispatches, describe(record))
            for kind in record["warnings"].keys() - warned:
                say(console, f"warning: {record['warnings'][kind]}", "yellow")
            warned |= record["warnings"].keys()
            if on_epoch is not None and writes:
                on_epoch(copy.deepcopy(record))  # which is theirs to change
            (stop,) = processes.largest(asked.stop or 0)
            if stop and epoch < config.epochs:
                raise _stopped(int(stop), epoch, state)
    checkpoints.close()
    return _finish(training, state, history, made_by, out, console)


def _identity(config: Config, data: Dataset) -> dict[str, Any]:
    """What decides a run, so that it must be the same for a run to resume.

    Not where the data lie, but what they are; how JAX makes random numbers; and not among how many
    devices a batch is divided.
    """
    decides = to_json(config)
    del decides["data_dir"], decides["devices"]
    random = {name: getattr(jax.config, f"jax_{name}") for name in _RANDOM}
    return decides | {"data": fingerprint(*data[1:]), "random": random}


_RANDOM = {"default_prng_impl": "threefry2x32", "threefry_partitionable": True}
"""JAX's settings that decide random numbers, as they are by default: as in runs that lack them."""


def _finish(
    training: Training,
    state: TrainState,
    history: list[Record],
    made_by: list[Record],
    out: Path,
    console: Console,
) -> Record:
    """Evaluate, and write result, weights and figures."""
    config, spec, data = training.config, training.spec, training.data
    params, epoch = jax.device_get(state.params), len(history)
    if config.keep == "best":
        epoch = selection.best_epoch(history)
        params, *_ = load_weights(selection.folder_of(out / "best", epoch))
    if processes.is_first():
        save_weights(out, params, spec, config.phases)  # before anything that may fail
    result = {
        **evaluate(
            params,
            spec,
            config.phases,
            data,
            training.eval_key,
            spikes_nudged=history[-1].get("spikes_nudged_per_layer"),
        ),
        "val_error": [r["val_error"] for r in history],
        "weights_of_epoch": epoch,
        "stopped_early": len(history) < config.epochs,
        "last_epoch": {name: v for name, v in history[-1].items() if name != "curve"},
        "seconds_per_epoch": float(np.median([r["seconds"] for r in history])),
        "compile_seconds": training.compile_seconds,
        "dataset": data.name,
        "seed": config.seed,
        "config": to_json(config),
        **made_by[-1],
        "resumed_from": made_by[:-1],  # other versions, or another machine
    }
    if not processes.is_first():
        return result
    write_json(out / "result.json", result)
    # The run is complete: what fails now is told, and no more.
    figures: dict[str, Any] = {}
    for what, show in (
        ("figures", lambda: figures.update(_draw(out, training, params, history))),
        ("report.html", lambda: _report(out, result, history, figures)),
        ("the summary", lambda: console.print(summary(config, data.name, spec, result, out))),
    ):
        try:
            show()
        except Exception as error:  # from a full disk to a terminal that cannot show a line
            warnings.warn(f"{what} failed: {error!r}; the result is in {out}", stacklevel=2)
    return result


@dataclass
class Asked:
    """What signals have asked a run for.

    Attributes:
        stop: number of the signal that asked to stop.
        save: whether to save and go on: schedulers warn before they kill.
    """

    stop: int | None = None
    save: bool = False


@contextlib.contextmanager
def _heeding_signals() -> Iterator[Asked]:
    """What SIGTERM and Ctrl-C (stop) and SIGUSR1 (save, and go on) ask for, as they come.

    A second Ctrl-C ends the program at once. A signal that is ignored stays so: background jobs of
    a script ignore Ctrl-C. Outside the main thread, where Python allows no handlers, nothing is
    ever asked for.
    """
    asked = Asked()

    def heed(number: int, _: Any) -> None:
        if number == signal.SIGUSR1:
            asked.save = True
        elif asked.stop == number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            asked.stop = number

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {n: signal.signal(n, heed) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(number: int, epoch: int, state: TrainState) -> StoppedError:
    return StoppedError(
        f"stopped by {signal.Signals(number).name} in epoch {epoch}, after step {state.step}; "
        "saved, and goes on with --resume",
        number,
    )


# Matplotlib is an extra, and slow to load.


def _draw(out: Path, training: Training, params: Params, history: list[Record]) -> dict[str, Any]:
    """Write the figures and return them. Test images are for the result alone."""
    from ep_jax.report import figures_of

    spec, phases = training.spec, training.config.phases
    figures = figures_of(params, spec, phases, history, training.data, training.eval_key)
    (out / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out / "figures" / f"{name}.png", dpi=150)
    return figures


def _report(out: Path, result: Record, history: list[Record], figures: dict[str, Any]) -> None:
    from ep_jax.report import write

    write(out, result, history, figures)
