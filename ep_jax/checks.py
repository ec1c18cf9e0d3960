"""Input checks: every message names the argument, what came and what was expected.

They run on static facts (types, shapes, settings) always, and on values only where these are known,
that is outside ``jit``, ``vmap`` and ``grad``: before anything is compiled.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def check_integer(name: str, value: Any, *, at_least: int) -> None:
    """`value` is an integer (no bool) of at least `at_least`, and of what JAX's 32 bits hold."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; expected an integer of at least {at_least}")
    if value < at_least:
        raise ValueError(f"{name} is {value}; expected an integer of at least {at_least}")
    if int(value) >= 2**32:
        raise ValueError(f"{name} is {value}; expected an integer below 2^32")


def check_seed(name: str, value: Any) -> None:
    """`value` is an integer of 32 bits: JAX drops what is beyond, so two seeds would be one."""
    check_integer(name, value, at_least=0)


def check_number(
    name: str, value: Any, *, above: float = -math.inf, at_most: float = math.inf
) -> None:
    """`value` is a finite real number in the half-open interval (above, at_most]."""
    if math.isfinite(at_most):
        expected = f"a finite number in ({above:g}, {at_most:g}]"
    else:
        expected = "a finite number" + (f" above {above:g}" if math.isfinite(above) else "")
    _check_real(name, value, expected)
    if not (math.isfinite(value) and above < float(value) <= at_most):
        raise ValueError(f"{name} is {value}; expected {expected}")


def check_non_negative(name: str, value: Any, *, at_most: float = math.inf) -> None:
    """`value` is a finite real number in the closed interval [0, at_most]."""
    bounded = math.isfinite(at_most)
    expected = f"a number in [0, {at_most:g}]" if bounded else "a finite number of at least 0"
    _check_real(name, value, expected)
    if not (math.isfinite(value) and 0 <= float(value) <= at_most):
        raise ValueError(f"{name} is {value}; expected {expected}")


def _check_real(name: str, value: Any, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; expected {expected}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """`value` is one of `choices`."""
    choices = tuple(choices)
    if not any(value is c or (type(value) is type(c) and value == c) for c in choices):
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def told(tree: Any) -> str:
    """The arrays of a tree as ``dtype[shape]``, and what is none by its type."""

    def one(leaf: Any) -> str:
        if not hasattr(leaf, "dtype"):
            return type(leaf).__name__
        return f"{leaf.dtype}{list(leaf.shape)}"

    return str(jax.tree.map(one, tree)).replace("'", "")


def known(value: Any) -> bool:
    """Whether the numbers of an array can be read (it is not being traced)."""
    return not isinstance(value, jax.core.Tracer)


def check_native(name: str, dtype: Any) -> None:
    """Numbers of `dtype` are what JAX takes: up to 8 bytes, in the byte order of the machine."""
    dtype = np.dtype(dtype)
    if not dtype.isnative or dtype.itemsize > 8:
        raise TypeError(f"{name} has dtype {dtype.str}; expected at most 8 bytes, in the byte "
                        "order of this machine: a.astype(a.dtype.newbyteorder('='))")  # fmt: skip


def check_key(name: str, key: Any) -> None:
    """`key` is one random key."""
    typed = jnp.issubdtype(getattr(key, "dtype", np.int32), jax.dtypes.prng_key)
    if not hasattr(key, "shape") or len(key.shape) != (0 if typed else 1):
        shape = f" of shape {key.shape}" if hasattr(key, "shape") else ""
        raise TypeError(f"{name} is {type(key).__name__}{shape}; expected one random key, as from "
                        "jax.random.key(0)")  # fmt: skip


def check_float_array(name: str, value: Any, shape: tuple[int | str, ...]) -> None:
    """`value` is a finite floating-point array of `shape`; a string in `shape` fits any size."""
    expected = f"a floating-point array of shape ({', '.join(map(str, shape))})"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name} is {type(value).__name__}; expected {expected}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        hint = ""
        if jnp.issubdtype(value.dtype, jnp.integer):
            hint = " (images: ep_jax.data.to_float scales uint8 pixels to [0, 1])"
        raise TypeError(f"{name} has dtype {value.dtype}; expected {expected}{hint}")
    fits = len(value.shape) == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {expected}")
    if known(value):
        bad = int(np.size(value) - np.isfinite(np.asarray(value, np.float64)).sum())
        if bad:
            raise ValueError(f"{name} holds {bad} values that are NaN or infinite; expected "
                             f"{expected} of finite numbers")  # fmt: skip
