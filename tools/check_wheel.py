"""The wheel in empty environments, without the repository: does what a user gets work?

    python tools/check_wheel.py

The first environment has no extra: the library is imported and computes a gradient, and the command
line says which extra it needs. The second has those of the command line, figures and digits: it
trains for an epoch, evaluates, writes a report and measures. Packages are those of constraints.txt.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent

CORE = """
import jax, jax.numpy as jnp
import ep_jax as ep

spec = ep.NetworkSpec((3,), (ep.Dense(4), ep.Dense(2)))
params = ep.init_params(jax.random.key(0), spec)
xs, ys = jnp.ones((2, 3)), jnp.array([0, 1])
grads, info = ep.ep_gradient(params, spec, xs, ys, ep.Phases(4, 3))
assert jnp.isfinite(grads[0]["w"]).all()
assert ep.diagnostics.hardware_cost(spec, info).ep.joules > 0
print("ep_jax", ep.__version__)
"""


def run(words: Sequence[str | Path], folder: Path, status: int = 0) -> str:
    """What a command prints; its exit status has to be `status`.

    Raises:
        RuntimeError: it ended with another one.
    """
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=folder, env=clean, capture_output=True, text=True)
    if done.returncode != status:
        shown = " ".join(map(str, words))
        raise RuntimeError(f"{shown} ended with {done.returncode}: {done.stdout}{done.stderr}")
    Console().print(f"[green]as expected[/]: {' '.join(map(str, words[:3]))}")
    return done.stdout + done.stderr


def environment(folder: Path, what: str) -> Path:
    """The programs of an environment with one package in it."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    pins = ("-c", ROOT / "constraints.txt")
    run([programs / "python", "-m", "pip", "install", "-q", *pins, what], folder)
    return programs


def main() -> None:
    """Build the wheel, use it, and end with status 1 where something fails."""
    tyro.cli(lambda: None, description=__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], folder)
        (wheel,) = folder.glob("*.whl")
        core = environment(folder / "core", str(wheel))
        run([core / "python", "-c", CORE], folder)
        said = run([core / "ep-jax", "--help"], folder, status=1)
        if "ep_jax[cli]" not in said:
            raise RuntimeError(f"ep-jax says {said!r}; expected the name of its extra")
        full = environment(folder / "full", f"{wheel}[cli,digits,plot]")
        command = full / "ep-jax"
        run([command, "train", "--preset", "digits", "--epochs", "1", "--out", "run"], folder)
        run([command, "evaluate", "--weights", "run", "--dataset", "digits"], folder)
        (folder / "run" / "report.html").unlink()
        run([command, "report", "--run", "run"], folder)
        run([command, "benchmark", "--batches", "8", "--repeats", "1"], folder)
        if not (folder / "run" / "report.html").is_file():
            raise RuntimeError("ep-jax report wrote no report.html")


if __name__ == "__main__":
    main()
