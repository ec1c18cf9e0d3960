"""Kill a training at random moments, resume it, and compare it with one that was left alone.

    python tools/kills.py --kills 20 --out runs/kills

Every killed run must end with the weights and metrics of the uninterrupted one, bit for bit. Half
of the kills come at a moment drawn from the whole run, from compilation to the report, half of them
while a checkpoint is being written. A run that was faster than its kill does not count. For a CPU,
whose results are bit-equal from run to run.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from ep_jax.files import write_json
from ep_jax.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = ("seconds", "seconds_per_epoch", "compile_seconds")
"""What differs between any two runs."""


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


def command(out: Path, epochs: int) -> list[str]:
    """A training that saves often: several dispatches an epoch."""
    return [
        *(sys.executable, str(ROOT / "experiments" / "train.py"), "--out", str(out), "--resume"),
        *("--preset", "digits", "--epochs", str(epochs), "--steps-per-dispatch", "8"),
    ]


def run(out: Path, epochs: int) -> None:
    """Train to the end."""
    done = subprocess.run(command(out, epochs), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{out} failed: {done.stderr}")


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


def kill(out: Path, epochs: int, moment: float, while_writing: bool) -> dict[str, Any] | None:
    """Kill a training `moment` seconds after it began, or at its next write after that.

    ``None`` where it had finished by then.
    """
    process = subprocess.Popen(
        command(out, epochs), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (out / "config.json").exists():
        time.sleep(0.001)
    began = time.monotonic()
    while process.poll() is None and time.monotonic() < began + moment:
        time.sleep(0.001)
    while while_writing and process.poll() is None and not writing(out):
        time.sleep(0.0005)
    in_write = writing(out)
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
        return None
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"{out} failed by itself")
    lines = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
    return {
        "seconds": time.monotonic() - began,
        "epochs_done": lines.count("\n"),
        "in_write": in_write,
    }


def ended(out: Path, last: str) -> float:
    """Seconds from the beginning of a run to its file `last`."""
    return (out / last).stat().st_mtime - (out / "config.json").stat().st_mtime


def main() -> None:
    """All kills; exit status 1 where a resumed run differs."""
    arguments = tyro.cli(Arguments, description=__doc__)
    whole = arguments.out / "whole"
    run(whole, arguments.epochs)
    expected = left_by(whole)
    random_moments = random.Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    for number in itertools.count():
        while_writing = len(rows) % 2 == 1
        length = ended(whole, "metrics.jsonl" if while_writing else "report.html")
        out = arguments.out / f"killed{number}"
        row = kill(out, arguments.epochs, random_moments.uniform(0, length), while_writing)
        if row is None:
            continue
        run(out, arguments.epochs)
        rows.append(row | {"equal": left_by(out) == expected})
        Console().print(f"{len(rows)}/{arguments.kills}", rows[-1])
        if len(rows) == arguments.kills:
            break
    equal = sum(row["equal"] for row in rows)
    found = {"kills": len(rows), "equal": equal, "epochs": arguments.epochs, "rows": rows}
    write_json(arguments.out / "kills.json", found | provenance())
    Console().print(f"{equal} of {len(rows)} resumed runs are bit-equal")
    sys.exit(equal != len(rows))


if __name__ == "__main__":
    main()
