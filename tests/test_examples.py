"""Every example of a docstring runs. (Pages: test_docs.py.)"""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import pytest

import ep_jax as ep

MODULES = [m.name for m in pkgutil.walk_packages(ep.__path__, "ep_jax.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    """With the names that ``from ep_jax import *`` gives, jax and jnp."""
    module = importlib.import_module(name)
    names = vars(ep) | vars(module) | {"ep_jax": ep, "jax": jax, "jnp": jnp}
    assert doctest.testmod(module, globs=names).failed == 0


def test_every_public_function_has_an_example() -> None:
    """So that the test above has something to run."""
    public = [getattr(ep, name) for name in ep.__all__]
    functions = [f for f in public if callable(f) and f.__module__.startswith("ep_jax")]
    missing = [
        f.__name__
        for f in functions
        if ">>>" not in (f.__doc__ or "") and not issubclass_of_tuple(f) and f is not ep.Neuron
    ]
    assert set(missing) <= {"energy", "load_weights"}  # they name their twin's example


def issubclass_of_tuple(value: object) -> bool:
    """Whether it is a record that the library returns; users do not make these."""
    return isinstance(value, type) and issubclass(value, tuple)
