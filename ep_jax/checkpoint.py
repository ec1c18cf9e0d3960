"""Weights anyone can load, and checkpoints from which a training resumes.

A weights folder holds ``weights.npz``: one array per parameter (``layer1.w``, ``layer1.b``, ...
from the input up, ``skip1.w``, ...), and the specification and phases that they were trained with,
as JSON. All of it is one file, so that it is there whole or not at all. (Earlier versions kept the
JSON beside it, in ``network.json``.)

A neuron, layer, pool or cost of your own is kept by its import path (``package.module:Name``), and
imported when the weights are loaded: load those of people whom you trust.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ep_jax.conv import Conv
from ep_jax.costs import CrossEntropy, SquaredError
from ep_jax.layers import Dense
from ep_jax.network import NetworkSpec, Params, Skip, check_params, parameters_of
from ep_jax.neurons import Bernoulli, DeltaCode, IntegrateFire, Rate, SigmaDelta
from ep_jax.phases import Phases
from ep_jax.pools import AvgPool, GlobalAvgPool, MaxPool
from ep_jax.training import TrainState

WEIGHTS_FORMAT = 3
"""Version of the weights that are written.

Formats 1 and 2 are read as well; their specification is in ``network.json``. Format 2 knows
no skips and no stride, dilation and groups of `Conv`, whose defaults are to have none. Format 1
knows no over-relaxation, tolerance, stragglers and limit of `Phases` either, and a `DeltaCode` with
a schedule alone, all of whose numbers it holds.
"""
CHECKPOINT_FORMAT = 2
"""Version of the checkpoints that are written; another one is refused."""

_RECORDS = {
    record.__name__: record
    for record in (
        *(NetworkSpec, Skip, Conv, Dense, Phases),
        *(AvgPool, MaxPool, GlobalAvgPool, SquaredError, CrossEntropy),
        *(Rate, SigmaDelta, DeltaCode, Bernoulli, IntegrateFire),
    )
}


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
        own = type(value) is _RECORDS.get(name) or type(value).__module__.startswith("ep_jax.")
        return {"type": name if own else _import_path(type(value)), **fields}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    if callable(value):
        return {"function": _import_path(value)}
    return value


def _import_path(value: Any) -> str:
    """``module:name`` of a type or function; ``ValueError`` where it leads nowhere else."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if not module or module == "__main__" or not name or "<" in name:
        raise ValueError(
            f"{value!r} cannot be saved, since no other program could import it; expected a class "
            "or function at the top level of a module, not of the script itself"
        )
    return f"{module}:{name}"


def from_json(value: Any) -> Any:
    """The inverse of `to_json`.

    Raises:
        ValueError: an unknown record or field, a value that the record refuses, or a type that
            cannot be imported.
    """
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"function"}:
        return imported(value["function"])
    kind = value.get("type")
    if kind in _RECORDS:
        record = _RECORDS[kind]
    elif isinstance(kind, str) and ":" in kind:
        record = imported(kind)
        if not dataclasses.is_dataclass(record):
            raise ValueError(f"type is {kind!r}, which is no dataclass")
    else:
        raise ValueError(f"type is {kind!r}; expected one of {', '.join(_RECORDS)}, or "
                         "'module:name'")  # fmt: skip
    try:
        return record(**{k: from_json(v) for k, v in value.items() if k != "type"})
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
        raise ValueError(f"{path!r} cannot be imported ({error}); expected its module on Python's "
                         "path, as where it was saved") from error  # fmt: skip
    return found


def make_folder(name: str, path: Path) -> None:
    """Make the folder that the argument `name` asks for, where it is not there yet."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{name} is {str(path)!r}, which cannot be made: {error.strerror}; expected a folder "
            "that is there, or in a place that may be written to"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    with _replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is written and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror or error}; expected a folder with room "
            "that may be written to. What was there is as it was"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


DESCRIPTION = "network"
"""Name of the array that holds the specification."""


def save_weights(
    folder: str | os.PathLike[str], params: Params, spec: NetworkSpec, phases: Phases
) -> None:
    """Write ``weights.npz`` into `folder`, for `load_weights`.

    Raises:
        ValueError, TypeError: the parameters are not those of `spec`, or `spec` holds something
            that could not be imported again.
        OSError: a file cannot be written. What was there is as it was.

    Example:
        >>> save_weights("my_network", params, spec, phases)  # doctest: +SKIP
        >>> params, spec, phases = load_weights("my_network")  # doctest: +SKIP
    """
    check_params(spec, params)
    folder = Path(folder)
    described = {"format": WEIGHTS_FORMAT, "spec": to_json(spec), "phases": to_json(phases)}
    make_folder("folder", folder)
    arrays = {
        f"{owner}.{name}": np.asarray(value)
        for owner, p in zip(_owners(spec), params, strict=True)
        for name, value in p.items()
    }
    with _replacing(folder / "weights.npz") as file:
        np.savez(file, **arrays, **{DESCRIPTION: np.array(json.dumps(described))})
    (folder / "network.json").unlink(missing_ok=True)  # of an earlier version: it is of no use now


def _owners(spec: NetworkSpec) -> list[str]:
    """Names of what has parameters."""
    layers = [f"layer{i}" for i in range(1, len(spec.layers) + 1)]
    return layers + [f"skip{i}" for i in range(1, len(spec.skips) + 1)]


def load_weights(folder: str | os.PathLike[str]) -> tuple[Params, NetworkSpec, Phases]:
    """Load what a training wrote, or shipped weights.

    Args:
        folder: a folder with ``weights.npz`` (and ``network.json``, from versions that kept the
            specification there).

    Returns:
        Parameters, network and phases.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is unreadable, from a newer version, or does not fit the other one; or
            a type of the network cannot be imported.
    """
    folder = Path(folder)
    weights, description = folder / "weights.npz", folder / "network.json"
    if not weights.is_file():
        raise _missing(folder, weights.name)
    with (
        _explained(weights, "the weights of a network"),
        weights.open("rb") as file,
        np.load(file) as found,
    ):
        arrays = dict(found)
    record = arrays.pop(DESCRIPTION, None)
    if record is None and not description.is_file():
        raise _missing(folder, description.name)
    with _explained(
        weights if record is not None else description, "the specification of a network"
    ):
        record = json.loads(description.read_text() if record is None else str(record))
        _check_format(record, 1, 2, WEIGHTS_FORMAT)
        spec, phases = from_json(record["spec"]), from_json(record["phases"])
        if not isinstance(spec, NetworkSpec) or not isinstance(phases, Phases):
            raise ValueError("no NetworkSpec and Phases")
    with _explained(weights, f"the weights of {len(spec.layers)} layers"):
        owners, wanted = _owners(spec), parameters_of(spec)
        names = {f"{owner}.{n}" for owner, p in zip(owners, wanted, strict=True) for n in p}
        if arrays.keys() != names:
            raise ValueError(f"arrays {sorted(arrays)}; expected {sorted(names)}")
        params = tuple(
            {name: jnp.asarray(arrays[f"{owner}.{name}"]) for name in p}
            for owner, p in zip(owners, wanted, strict=True)
        )
        check_params(spec, params)
    return params, spec, phases


def _missing(folder: Path, name: str) -> FileNotFoundError:
    return FileNotFoundError(f"folder is {str(folder)!r}, which holds no {name}; expected a "
                             "folder that experiments/train.py wrote")  # fmt: skip


@contextlib.contextmanager
def _explained(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever reading `path` raises into one clear ValueError."""
    try:
        yield
    # Which exception it is depends on the damage and on the library that reads.
    except Exception as error:
        raise ValueError(
            f"{path} is unreadable or foreign: {_brief(error)}; expected {expected}"
        ) from error


def _brief(error: Exception) -> str:
    """Its first line, without the pages that some libraries add."""
    return textwrap.shorten(str(error).partition("\n")[0], 300, placeholder=" ...")


def _check_format(record: Any, *known: int) -> None:
    found = record.get("format")
    if found not in known:
        formats = " or ".join(map(str, known))
        raise ValueError(f"format is {found!r}; this version reads format {formats}")


class Checkpoints:
    """The checkpoints of one training run, on disk through orbax; the last two are kept.

    Args:
        folder: where they lie.
        identity: what must be the same for a run to resume, as JSON: its configuration.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._identity = identity
        self._folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, number: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Keep the state, and how far the run has come, as JSON.

        Args:
            number: of the checkpoint, larger than that of the last one.
            state: what training carries.
            progress: what else is needed to go on.

        Raises:
            OSError: it cannot be written; the checkpoints before it are as they were.
        """
        record = {"format": CHECKPOINT_FORMAT, "identity": self._identity, "progress": progress}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        try:
            self._manager.save(number, args=items)
        # Which exception it is depends on the library that writes.
        except Exception as error:
            raise OSError(
                f"checkpoint {number} cannot be written to {self._folder}: {_brief(error)}; "
                "expected a folder with room that may be written to. The checkpoint before it is "
                "as it was"
            ) from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """State and progress of the last checkpoint; ``None`` where there is none.

        Args:
            like: a state of the same structure.

        Raises:
            ValueError: the checkpoint is unreadable, of a newer version or of another run.
        """
        number = self._manager.latest_step()
        if number is None:
            return None
        path = self._folder / str(number)
        with _explained(path, "a checkpoint of this run"):
            record = self._manager.restore(
                number, args=ocp.args.Composite(record=ocp.args.JsonRestore())
            )["record"]
            _check_format(record, CHECKPOINT_FORMAT)
            differing = {
                k: (record["identity"].get(k), v)
                for k, v in self._identity.items()
                if record["identity"].get(k) != v
            }
            if differing:
                came = "; ".join(
                    f"{k} was {a!r} and is now {b!r}" for k, (a, b) in differing.items()
                )
                raise ValueError(f"it was written by another configuration: {came}")
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            state = self._manager.restore(
                number, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]
        return state, record["progress"]

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.close()
