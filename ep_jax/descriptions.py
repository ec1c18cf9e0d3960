"""Descriptions of networks, phases and runs: as JSON in files, and as words on a command line.

A neuron, layer, pool or cost of your own is described by its import path, and imported when the
description is read: read those of people whom you trust.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ep_jax.conv import Conv
from ep_jax.costs import CrossEntropy, SquaredError
from ep_jax.layers import Dense
from ep_jax.network import NetworkSpec, Normalization, Skip
from ep_jax.neurons import Bernoulli, DeltaCode, IntegrateFire, Rate, SigmaDelta
from ep_jax.phases import Phases
from ep_jax.pools import AvgPool, GlobalAvgPool, MaxPool

RECORDS = {
    record.__name__: record
    for record in (
        *(NetworkSpec, Normalization, Skip, Conv, Dense, Phases),
        *(AvgPool, MaxPool, GlobalAvgPool, SquaredError, CrossEntropy),
        *(Rate, SigmaDelta, DeltaCode, Bernoulli, IntegrateFire),
    )
}
"""Records that are described by their name alone."""


def to_json(value: Any) -> Any:
    """A specification as JSON: a record becomes an object with its type's name under ``"type"``.

    What is not of this library has its import path as its name; a function is an object with
    ``"function"`` alone.

    Raises:
        ValueError: a type or function that could not be imported again.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        name = type(value).__name__
        own = type(value) is RECORDS.get(name) or type(value).__module__.startswith("ep_jax.")
        return {"type": name if own else _import_path(type(value)), **fields}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    if callable(value):
        return {"function": _import_path(value)}
    if value is None or isinstance(value, str | int | float | dict | os.PathLike):
        return value
    raise ValueError(f"{value!r} cannot be saved; expected a frozen dataclass, a function at the "
                     "top level of a module, numbers or text")  # fmt: skip


def _import_path(value: Any) -> str:
    """``module:name`` of a type or function; ``ValueError`` where it does not lead back to it."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if not module or module == "__main__" or not name or "<" in name:
        raise ValueError(
            f"{value!r} cannot be saved, since no other program could import it; expected a class "
            "or function at the top level of a module, not of the script itself"
        )
    path = f"{module}:{name}"
    if imported(path) != value:
        raise ValueError(f"{value!r} cannot be saved, since {path!r} leads to another one; "
                         "expected a class or function that is found by its name")  # fmt: skip
    return path


def from_json(value: Any, records: Mapping[str, Any] = RECORDS) -> Any:
    """The inverse of `to_json`.

    Args:
        value: what `to_json` made.
        records: types that are described by their name alone.

    Raises:
        ValueError: an unknown record, a field that is missing or unknown (a default of today is not
            what was meant), a value that the record refuses, or a type that cannot be imported.
    """
    if isinstance(value, list):
        return tuple(from_json(v, records) for v in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"function"}:
        return imported(value["function"])
    kind = value.get("type")
    if isinstance(kind, str) and kind in records:
        record: Any = records[kind]
    elif isinstance(kind, str) and ":" in kind:
        record = imported(kind)
        if not (isinstance(record, type) and dataclasses.is_dataclass(record)):
            raise ValueError(f"type is {kind!r}, which is no dataclass")
    else:
        raise ValueError(f"type is {kind!r}; expected one of {', '.join(records)}, or "
                         "'module:name'")  # fmt: skip
    fields = {field.name for field in dataclasses.fields(record) if field.init}
    given = value.keys() - {"type"}
    for names, what in ((fields - given, "lacks"), (given - fields, "has the unknown")):
        if names:
            raise ValueError(f"{kind} {what} {', '.join(sorted(names))}; expected its fields "
                             f"{', '.join(sorted(fields))}")  # fmt: skip
    try:
        return record(**{k: from_json(v, records) for k, v in value.items() if k != "type"})
    except TypeError as error:
        raise ValueError(f"{kind}: {error}") from error


def imported(path: Any) -> Any:
    """What an import path leads to."""
    module, _, name = str(path).partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be imported ({error}); expected a module in the "
                         "command's folder or on Python's path") from error  # fmt: skip
    return found


def read(name: str, text: str) -> Any:
    """The object that a text names by a call of Python with literal arguments.

    ``Conv(64, 3, pool=MaxPool(3, stride=2))`` is a layer, ``Skip(1, 3, Dense(12))`` a skip, and
    ``my_layers.Local(16)`` one of your own: a class ``Local`` of a module ``my_layers`` on Python's
    path. Nothing else is run.

    Args:
        name: of the argument that the text is.
        text: what came.

    Raises:
        ValueError, TypeError: naming the argument, where the text is no such call, or the call is
            refused.

    Example:
        >>> read("layers", "Conv(8, 3, padding='SAME')").padding
        'SAME'
    """
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"{name} is {text!r}; expected a call such as Conv(32, 5) or "
                         "my_module.MyLayer(8)") from error  # fmt: skip
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name} is {text!r}: {error}") from error


def _value(node: ast.expr) -> Any:
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise ValueError(
                f"{ast.unparse(node)!r} is neither a literal nor a call; expected numbers, strings "
                "and calls such as Conv(32, 5)"
            ) from None
    positional = [_value(a) for a in node.args]
    named = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    return _called(ast.unparse(node.func))(*positional, **named)


def _called(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if module:
        return imported(f"{module}:{name}")
    if path not in RECORDS:
        raise ValueError(f"{path!r} is not known; expected one of {', '.join(RECORDS)}, or a class "
                         "of your own as module.Class")  # fmt: skip
    return RECORDS[path]
