"""Kill a training at random moments, resume it, and compare it with one that was left alone.

    python tools/kills.py --kills 20 --out runs/kills
    python tools/kills.py --kills 10 --processes 2 --out runs/kills2

Every killed run must end with the weights and metrics of the uninterrupted one, bit for bit. Half
of the kills come at a moment drawn from the whole run, from compilation to the report, half of them
while a checkpoint is being written. A run that was faster than its kill does not count. For a CPU,
whose results are bit-equal from run to run.

Of several processes one is killed, drawn by lot. The others must end by themselves, and say why.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from ep_jax.files import write_json
from ep_jax.processes import SILENCE
from ep_jax.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = ("seconds", "seconds_per_epoch", "compile_seconds")
"""What differs between any two runs."""
PATIENCE = 4 * SILENCE
"""Seconds after which a process that still runs without the killed one is taken to hang."""
REASONS = ("another task died", "Connection closed by peer", "Connection reset by peer")
"""What JAX says where another process is gone: one of these is in the last words of the others."""


@dataclass(frozen=True)
class Arguments:
    """Kill, resume, compare."""

    out: Path
    """New folder for the runs and kills.json."""
    kills: int = 20
    """Runs to kill."""
    epochs: int = 40
    """Epochs of the digits preset."""
    seed: int = 0
    """Seed of the moments."""
    processes: int = 1
    """Processes that train together, with a device each."""


def addresses(processes: int) -> list[list[str]]:
    """What each process of a job on this machine is told of the others."""
    if processes == 1:
        return [[]]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{taken.getsockname()[1]}"
    shared = ["--coordinator", coordinator, "--processes", str(processes)]
    return [[*shared, "--process", str(i)] for i in range(processes)]


def start(out: Path, words: Sequence[str], processes: int) -> list[subprocess.Popen[bytes]]:
    """A training by so many processes, which write what they say to files beside `out`."""
    line = [sys.executable, str(ROOT / "experiments" / "train.py"), "--out", str(out), *words]
    out.parent.mkdir(parents=True, exist_ok=True)
    jobs = []
    for i, own in enumerate(addresses(processes)):
        with said_file(out, i).open("wb") as said:
            jobs.append(
                subprocess.Popen([*line, *own], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
            )
    return jobs


def said_file(out: Path, process: int) -> Path:
    """Where a process of a run writes what it says."""
    return out.with_name(f"{out.name}.process{process}.txt")


def words_of(arguments: Arguments) -> list[str]:
    """A training that saves often: several dispatches an epoch."""
    return [
        *("--resume", "--preset", "digits", "--epochs", str(arguments.epochs)),
        *("--steps-per-dispatch", "8", "--devices", str(arguments.processes)),
    ]


def run(out: Path, arguments: Arguments) -> None:
    """Train to the end."""
    jobs = start(out, words_of(arguments), arguments.processes)
    codes = [job.wait() for job in jobs]
    if any(codes):
        said = [said_file(out, i).read_text(errors="replace") for i in range(len(jobs))]
        raise RuntimeError(f"{out} failed: {said}")


def left_by(out: Path) -> tuple[dict[str, bytes], list[Any]]:
    """Weights to the bit, and metrics and result but for the clock."""

    def timeless(record: dict[str, Any]) -> dict[str, Any]:
        return {
            name: timeless(value) if isinstance(value, dict) else value
            for name, value in record.items()
            if name not in CLOCKS
        }

    with np.load(out / "weights.npz") as arrays:
        weights = {name: arrays[name].tobytes() for name in arrays.files}
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in (*lines, (out / "result.json").read_text())]
    return weights, [timeless(record) for record in records]


def writing(out: Path) -> bool:
    """Whether a checkpoint is being written: orbax gives it its name when it is whole."""
    return any("tmp" in path.name for path in (out / "checkpoints").glob("*"))


@dataclass(frozen=True)
class Blow:
    """When a run is killed, and which process of it.

    Attributes:
        moment: seconds after the run has begun.
        while_writing: at the next write of a checkpoint after that.
        victim: number of the process.
    """

    moment: float
    while_writing: bool
    victim: int


def kill(out: Path, arguments: Arguments, blow: Blow) -> dict[str, Any] | None:
    """Kill a training; ``None`` where it had finished by then."""
    jobs = start(out, words_of(arguments), arguments.processes)

    def alive() -> bool:
        return all(job.poll() is None for job in jobs)

    while alive() and not (out / "config.json").exists():
        time.sleep(0.001)
    began = time.monotonic()
    while alive() and time.monotonic() < began + blow.moment:
        time.sleep(0.001)
    while blow.while_writing and alive() and not writing(out):
        time.sleep(0.0005)
    in_write = writing(out)
    jobs[blow.victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code = jobs[blow.victim].wait()
    others = [survivor(job, said_file(out, i)) for i, job in enumerate(jobs) if i != blow.victim]
    if code == 0:
        return None
    if code != -signal.SIGKILL:
        raise RuntimeError(f"{out} failed by itself")
    lines = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
    row = {
        "seconds": killed - began,
        "epochs_done": lines.count("\n"),
        "in_write": in_write,
    }
    if others:
        row |= {"victim": blow.victim, "others": others, "until_all_end": time.monotonic() - killed}
    return row


def survivor(job: subprocess.Popen[bytes], said: Path) -> dict[str, Any]:
    """How a process ended whose fellow was killed: by itself, and telling why?

    One that had nothing left to do but to end may end well.
    """
    try:
        code = job.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()
        return {"ended": False, "told": False}
    words = said.read_text(errors="replace")
    return {"ended": True, "told": code == 0 or any(reason in words for reason in REASONS)}


def ended(out: Path, last: str) -> float:
    """Seconds from the beginning of a run to its file `last`."""
    return (out / last).stat().st_mtime - (out / "config.json").stat().st_mtime


def main() -> None:
    """All kills; exit status 1 where a resumed run differs or a process hangs."""
    arguments = tyro.cli(Arguments, description=__doc__)
    whole = arguments.out / "whole"
    run(whole, arguments)
    expected = left_by(whole)
    random_moments = random.Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    for number in itertools.count():
        while_writing = len(rows) % 2 == 1
        length = ended(whole, "metrics.jsonl" if while_writing else "report.html")
        out = arguments.out / f"killed{number}"
        moment = random_moments.uniform(0, length)
        victim = random_moments.randrange(arguments.processes) if arguments.processes > 1 else 0
        row = kill(out, arguments, Blow(moment, while_writing, victim))
        if row is None:
            continue
        run(out, arguments)
        rows.append(row | {"equal": left_by(out) == expected})
        Console().print(f"{len(rows)}/{arguments.kills}", rows[-1])
        if len(rows) == arguments.kills:
            break
    equal = sum(row["equal"] for row in rows)
    found = {"kills": len(rows), "equal": equal, "epochs": arguments.epochs, "rows": rows}
    found["processes"] = arguments.processes
    write_json(arguments.out / "kills.json", found | provenance())
    Console().print(f"{equal} of {len(rows)} resumed runs are bit-equal")
    others = [other for row in rows for other in row.get("others", ())]
    well = sum(other["ended"] and other["told"] for other in others)
    if others:
        Console().print(f"{well} of {len(others)} processes left alone ended and said why")
    sys.exit(equal != len(rows) or well != len(others))


if __name__ == "__main__":
    main()
