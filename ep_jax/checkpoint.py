"""Weights anyone can load, and checkpoints from which a training resumes.

A weights folder holds ``weights.npz``, one array per parameter (``layer1.w``, ``layer1.b``, ...
from the input up), and ``network.json``, the specification and phases they were trained with.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from ep_jax.layers import Dense
from ep_jax.network import NetworkSpec, Params, check_params
from ep_jax.neurons import Bernoulli, DeltaCode, IntegrateFire, Rate, SigmaDelta
from ep_jax.phases import Phases
from ep_jax.training import TrainState

WEIGHTS_FORMAT = 2
"""Version of the weights folders that are written.

Format 1 is read as well. It knows no over-relaxation, tolerance, stragglers and limit of `Phases`,
whose defaults are to have none, and a `DeltaCode` with a schedule alone, all of whose numbers it
holds.
"""
CHECKPOINT_FORMAT = 2
"""Version of the checkpoints that are written; another one is refused."""

_RECORDS = {
    record.__name__: record
    for record in (
        *(NetworkSpec, Conv, Dense, Phases),
        *(Rate, SigmaDelta, DeltaCode, Bernoulli, IntegrateFire),
    )
}


def to_json(value: Any) -> Any:
    """A specification as JSON: a record becomes an object with its type's name under ``"type"``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`, for the library's own records.

    Raises:
        ValueError: an unknown record or field, or a value the record refuses.
    """
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if kind not in _RECORDS:
        raise ValueError(f"type is {kind!r}; expected one of {', '.join(_RECORDS)}")
    try:
        return _RECORDS[kind](**{k: from_json(v) for k, v in value.items() if k != "type"})
    except TypeError as error:
        raise ValueError(f"{kind}: {error}") from error


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


def save_weights(
    folder: str | os.PathLike[str], params: Params, spec: NetworkSpec, phases: Phases
) -> None:
    """Write ``weights.npz`` and ``network.json`` into `folder`, for `load_weights`.

    Example:
        >>> save_weights("my_network", params, spec, phases)  # doctest: +SKIP
        >>> params, spec, phases = load_weights("my_network")  # doctest: +SKIP
    """
    check_params(spec, params)
    folder = Path(folder)
    make_folder("folder", folder)
    arrays: dict[str, Any] = {
        f"layer{i}.{name}": np.asarray(value)
        for i, layer in enumerate(params, start=1)
        for name, value in layer.items()
    }
    with _replacing(folder / "weights.npz") as file:
        np.savez(file, **arrays)
    write_json(
        folder / "network.json",
        {"format": WEIGHTS_FORMAT, "spec": to_json(spec), "phases": to_json(phases)},
    )


def load_weights(folder: str | os.PathLike[str]) -> tuple[Params, NetworkSpec, Phases]:
    """Load what a training wrote, or shipped weights.

    Args:
        folder: a folder with ``weights.npz`` and ``network.json``.

    Returns:
        Parameters, network and phases.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is unreadable, from a newer version, or does not fit the other one.
    """
    folder = Path(folder)
    for name in ("network.json", "weights.npz"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder is {str(folder)!r}, which holds no {name}; expected a "
                                    "folder that experiments/train.py wrote")  # fmt: skip
    with _explained(folder / "network.json", "the specification of a network"):
        record = json.loads((folder / "network.json").read_text())
        _check_format(record, 1, WEIGHTS_FORMAT)
        spec, phases = from_json(record["spec"]), from_json(record["phases"])
        if not isinstance(spec, NetworkSpec) or not isinstance(phases, Phases):
            raise ValueError("no NetworkSpec and Phases")
    with _explained(folder / "weights.npz", f"the weights of {len(spec.layers)} layers"):
        with (folder / "weights.npz").open("rb") as file, np.load(file) as arrays:
            names = {f"layer{i}.{n}" for i in range(1, len(spec.layers) + 1) for n in "wb"}
            if set(arrays.files) != names:
                raise ValueError(f"arrays {sorted(arrays.files)}; expected {sorted(names)}")
            params = tuple(
                {name: jnp.asarray(arrays[f"layer{i}.{name}"]) for name in "wb"}
                for i in range(1, len(spec.layers) + 1)
            )
        check_params(spec, params)
    return params, spec, phases


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
