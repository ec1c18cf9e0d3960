"""What made a result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

import ep_jax


def provenance() -> dict[str, Any]:
    """Commit, versions and device: what made a result."""
    packages = ("jax", "jaxlib", "numpy", "optax")
    device = jax.devices()[0]
    return {
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
            "ep_jax": ep_jax.__version__,
        },
        "device": f"{device.platform}: {device.device_kind}, {os.cpu_count()} CPU cores",
    }


def _commit() -> str:
    """The commit of the checkout this package lies in, marked where it has uncommitted changes.

    Installed into an environment that lies in another project's checkout, it is of no commit.
    """
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        if Path(git("rev-parse", "--show-toplevel")) != here.parent:
            return "unknown"
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
