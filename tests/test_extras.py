"""What works without the optional packages, and what is said where one is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ep_jax
from ep_jax.extras import extra


def test_a_missing_package_names_its_extra() -> None:
    """With the command that installs it."""
    said = r"matplotlib is not installed; expected the extra 'plot': pip install 'ep_jax\[plot\]'"
    with pytest.raises(ModuleNotFoundError, match=said), extra("plot"):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


def test_a_missing_module_of_our_own_is_no_extra() -> None:
    """A broken installation says what it is."""
    with pytest.raises(ModuleNotFoundError, match=r"^No module named"), extra("plot"):
        raise ModuleNotFoundError("No module named 'ep_jax.x'", name="ep_jax.x")


WITHOUT = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in ("matplotlib", "sklearn", "tyro", "tensorboard", "wandb"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import jax, jax.numpy as jnp
import ep_jax as ep

spec = ep.NetworkSpec((3,), (ep.Dense(4), ep.Dense(2)))
params = ep.init_params(jax.random.key(0), spec)
grads, info = ep.ep_gradient(params, spec, jnp.ones((2, 3)), jnp.array([0, 1]), ep.Phases(4, 3))
assert ep.diagnostics.hardware_cost(spec, info).ep.joules > 0
for module, name in (("plots", "plot"), ("report", "plot"), ("cli", "cli")):
    try:
        importlib.import_module(f"ep_jax.{module}")
    except ModuleNotFoundError as error:
        assert f"ep_jax[{name}]" in str(error), error
    else:
        raise AssertionError(module)
try:
    ep.data.load("digits")
except ModuleNotFoundError as error:
    assert "ep_jax[digits]" in str(error), error
import ep_jax.run
sys.argv = ["ep-jax"]
from ep_jax.__main__ import main
main()
"""


def test_the_core_needs_no_extra() -> None:
    """Gradients and runs; a command line that cannot work says why in a line."""
    root = Path(ep_jax.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ep-jax: error: tyro is not installed")


def test_the_version_is_said_once() -> None:
    """The package's, the citation's and that of the changelog's latest release."""
    root = Path(__file__).parent.parent
    assert f"\nversion: {ep_jax.__version__}\n" in (root / "CITATION.cff").read_text()
    assert f"\n## {ep_jax.__version__} " in (root / "CHANGELOG.md").read_text()
