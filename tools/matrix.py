"""The suite under stricter rules, other precisions, other versions and more devices.

    python tools/matrix.py --out runs/matrix
    python tools/matrix.py --out runs/matrix --only tracer_leaks python3.13

Rows that ask for another Python make an environment of their own, with the interpreter found on the
path; a Python that is not there is reported as such.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from ep_jax.files import write_json
from ep_jax.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One way to run the suite."""

    rule: str
    settings: dict[str, str] = field(default_factory=dict)
    """Environment variables."""
    python: str = ""
    """Interpreter, where it is not this one."""
    requirements: tuple[str, ...] = ()
    """What is installed beside or instead of the pinned versions."""
    pinned: bool = True
    """Whether constraints.txt holds."""


ROWS = {
    "default": Row("as users run it"),
    "float64": Row("double precision throughout, one device",
                   {"JAX_ENABLE_X64": "1", "EP_JAX_TEST_DEVICES": "1"}),
    "four_devices": Row("four devices", {"EP_JAX_TEST_DEVICES": "4"}),
    "debug_nans": Row("every NaN an error", {"JAX_DEBUG_NANS": "1"}),
    "strict": Row("no implicit promotion of dtypes or ranks",
                  {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}),
    # The check has every call of a jitted function traced and compiled anew.
    "tracer_leaks": Row("leaked tracers an error (4 examples of each property)",
                        {"JAX_CHECK_TRACER_LEAKS": "1", "EP_JAX_TEST_EXAMPLES": "4"}),
    "python3.12": Row("Python 3.12, oldest supported jax", python="python3.12",
                      requirements=("jax==0.10.0", "jaxlib==0.10.0"), pinned=False),
    "python3.13": Row("Python 3.13, newest jax, newest of all else", python="python3.13",
                      pinned=False),
}  # fmt: skip

VERSIONS = (
    "import jax, platform; print(f'Python {platform.python_version()}, jax {jax.__version__}')"
)


@dataclass(frozen=True)
class Arguments:
    """The suite under many rules."""

    out: Path
    """Folder for matrix.json."""
    only: tuple[str, ...] = ()
    """Names of rows, run anew; by default all that are not in the file yet."""
    workers: int = 2
    """Processes of pytest."""


def interpreter(row: Row, folder: Path) -> str | None:
    """The Python of a row, with what it needs installed; ``None`` where there is none."""
    if not row.python:
        return sys.executable
    base = shutil.which(row.python)
    if base is None or subprocess.run([base, "--version"], capture_output=True).returncode:
        return None
    subprocess.run([base, "-m", "venv", folder], check=True)
    pins = ["-c", "constraints.txt"] if row.pinned else []
    command = [folder / "bin" / "python", "-m", "pip", "install", "-q", *pins, "-e", ".[dev]"]
    subprocess.run([*command, *row.requirements], cwd=ROOT, check=True)
    return str(folder / "bin" / "python")


def run(row: Row, workers: int) -> dict[str, Any]:
    """Run the suite once."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        python = interpreter(row, Path(folder))
        if python is None:
            return {"versions": "–", "summary": f"no {row.python} here", "failed": []}
        command = [python, "-m", "pytest", "-q", "-n", str(workers), "-p", "no:cacheprovider"]
        told = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True)
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | row.settings, capture_output=True, text=True
        )
    lines = re.findall(r"^.*\b(?:passed|failed|error)\b.* in .*$", done.stdout, re.MULTILINE)
    return {
        "versions": told.stdout.strip(),
        "returncode": done.returncode,
        "summary": lines[-1].strip("= ") if lines else done.stderr[-500:],
        "failed": re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE),
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    """Run all rows; exit status 1 where one fails."""
    arguments = tyro.cli(Arguments, description=__doc__)
    file = arguments.out / "matrix.json"
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else {}
    for name in arguments.only or [name for name in ROWS if name not in rows]:
        row = {"rule": ROWS[name].rule} | run(ROWS[name], arguments.workers)
        made_by = provenance()
        rows[name] = row | {"commit": made_by["commit"]}
        Console().print(name, rows[name], soft_wrap=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(file, {"rows": rows} | made_by)
    sys.exit(any(row.get("returncode", 0) for row in rows.values()))


if __name__ == "__main__":
    main()
