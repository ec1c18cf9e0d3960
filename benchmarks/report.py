"""All benchmarks and one report.

    python benchmarks/report.py --out results/benchmarks --devices 2
    python benchmarks/report.py --out runs/benchmarks --quick

The same command on CPU, GPU and TPU. Writes a JSON file and a figure for each benchmark, and
report.md with the tables of all that lie in the folder. PyTorch is compared where it is installed
(``pip install -e '.[peer]'``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import memory
import scaling
import speed
import time_to_accuracy
import tyro
from rich.console import Console

from ep_jax.devices import divide_cpu
from ep_jax.files import write_atomically
from ep_jax.progress import say
from ep_jax.tables import markdown


@dataclass(frozen=True)
class Arguments:
    """All benchmarks and one report."""

    out: Path
    """Folder for JSON files, figures and report.md."""
    quick: bool = False
    """A look: few points, few calls, a fifth of an epoch."""
    parts: tuple[Literal["memory", "speed", "scaling", "time_to_accuracy"], ...] = (
        "memory",
        "speed",
        "scaling",
        "time_to_accuracy",
    )
    """What to run; the last takes longest."""
    devices: int = 1
    """Devices among which batches are divided, in the parts on speed and accuracy."""
    data_dir: str | None = None
    """Where MNIST data lie; by default TFDS_DATA_DIR."""


def speed_section(found: dict[str, Any]) -> str:
    """Times, rates, ratios."""
    rows = [
        (
            row["part"],
            row["name"],
            row.get("sweeps", "50/10"),
            f"{1e3 * row['seconds']:.1f} ({1e3 * row['low']:.1f}–{1e3 * row['high']:.1f})",
            f"{row['operations'] / 1e9:.1f}" if "operations" in row else "",
            f"{row['of_matmul']:.0%}" if "operations" in row else "",
            f"{row['compile_seconds']:.1f}" if "operations" in row else "",
        )
        for row in found["rows"]
    ]
    head = ("", "", "sweeps", "ms (quartiles)", "GFLOP", "of matmul rate", "compile s")
    ratios = [(n, f"{v:.2f}") for n, v in found["ratios"].items() if v is not None]
    return (
        f"## Speed\n\nBatch {found['batch']}; for gradients and training steps divided among "
        f"{found['devices']} devices, what a step is made of is timed on one; "
        f"a large float32 product runs at {found['matmul_rate'] / 1e9:.0f} GFLOP/s.\n\n"
        f"{markdown(head, rows)}\n{markdown(('ratio', ''), ratios)}\n![](speed.png)\n"
    )


def memory_section(found: dict[str, Any]) -> str:
    """The claims, and MiB against sweeps."""
    claims = markdown(("", "ratio"), ((n, f"{v:.3f}") for n, v in found["claims"].items()))
    along = [r for r in found["rows"] if r["axis"] == "sweeps"]
    sweeps = sorted({r["sweeps"] for r in along})
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for r in along:
        lines.setdefault((r["neuron"], r["method"]), {})[r["sweeps"]] = r["temporary"]
    rows = [
        (*name, *(f"{line[t] / memory.MIB:.1f}" for t in sweeps)) for name, line in lines.items()
    ]
    head = ("neurons", "method", *(f"T = {t}" for t in sweeps))
    return f"## Memory\n\nTemporaries, MiB.\n\n{markdown(head, rows)}\n{claims}\n![](memory.png)\n"


def scaling_section(found: dict[str, Any]) -> str:
    """Exponents, and sweeps against depth."""
    rows = [
        (method, *(f"{slopes[axis]:.2f}" for axis in scaling.AXES))
        for method, slopes in found["exponents"].items()
    ]
    needed: dict[str, dict[int, Any]] = {}
    for r in found["sweeps_needed"]:
        needed.setdefault(r["method"], {})[r["convolutions"]] = r["sweeps"]
    depths = sorted({r["convolutions"] for r in found["sweeps_needed"]})
    deep = [(m, *(line[n] or "more" for n in depths)) for m, line in needed.items()]
    return (
        f"## Scaling\n\nExponent of time against size.\n\n"
        f"{markdown(('', *scaling.AXES), rows)}\nSweeps of each phase for cosine .99 in every "
        f"layer, by number of convolutional layers.\n\n{markdown(('', *depths), deep)}\n"
        "![](scaling.png)\n"
    )


def accuracy_section(found: dict[str, Any]) -> str:
    """When each target was reached."""
    rows = []
    for row in found["rows"]:
        reached, last = row["reached"], row["curve"][-1]
        cells: tuple[str, ...] = ("not reached", "", "", "")
        if reached is not None:
            cells = (
                f"{reached['seconds']:.0f}",
                f"{reached['epochs']:.1f}",
                f"{reached['operations'] / 1e12:.1f}",
                f"{reached['spikes']:.1e}" if reached["spikes"] else "–",
            )
        end = (
            f"{last['val_error']:.2f} % after {last['epochs']:.1f} epochs, {last['seconds']:.0f} s"
        )
        rows.append((row["dataset"], row["name"], f"{row['target']:g} %", *cells, end))
    head = ("data", "method", "target", "seconds", "epochs", "TFLOP", "spikes", "at the end")
    return f"## Time to accuracy\n\n{markdown(head, rows)}\n![](time_to_accuracy.png)\n"


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "memory": memory_section,
    "speed": speed_section,
    "scaling": scaling_section,
    "time_to_accuracy": accuracy_section,
}


def report(folder: Path) -> str:
    """The tables of the benchmarks whose results lie in a folder."""
    text = "# Benchmarks\n"
    for name, section in SECTIONS.items():
        if (folder / f"{name}.json").exists():
            found = json.loads((folder / f"{name}.json").read_text())
            versions = ", ".join(f"{n} {v}" for n, v in found["versions"].items())
            made = f"{found['device']}; commit {found['commit']}; {versions}"
            text += f"\n{section(found)}\n*{made}*\n"
    return text


def main() -> None:
    """Run, gather, write."""
    arguments = tyro.cli(Arguments, description=__doc__)
    out, quick, devices = arguments.out, arguments.quick, arguments.devices
    divide_cpu(devices)
    for part in arguments.parts:
        # The first by default: the peak that a device reports is that of the process up to now.
        if part == "memory":
            memory.run(memory.Arguments(out, quick=quick))
        elif part == "speed":
            speed.run(speed.Arguments(out, quick=quick, devices=devices))
        elif part == "scaling":
            scaling.run(scaling.Arguments(out, quick=quick))
        else:
            time_to_accuracy.run(
                time_to_accuracy.Arguments(
                    out, quick=quick, devices=devices, data_dir=arguments.data_dir
                )
            )
    write_atomically(out / "report.md", report(out).encode())
    say(Console(), f"written to {out / 'report.md'}")


if __name__ == "__main__":
    main()
