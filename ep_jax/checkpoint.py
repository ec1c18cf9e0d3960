"""Weights anyone can load, and checkpoints from which a training resumes.

A weights folder holds ``weights.npz``, one array per parameter (``layer1.w``, ``layer1.b``, ...
from the input up), and ``network.json``, the specification and phases they were trained with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ep_jax.dynamics import Phases
from ep_jax.layers import Conv, Dense
from ep_jax.network import NetworkSpec, Params, check_params
from ep_jax.neurons import Bernoulli, DeltaCode, IntegrateFire, Rate, SigmaDelta
from ep_jax.training import TrainState

FORMAT = 1
"""Version of what is written; a newer one is refused."""

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


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


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
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        f"layer{i}.{name}": np.asarray(value)
        for i, layer in enumerate(params, start=1)
        for name, value in layer.items()
    }
    temporary = folder / f".weights.{os.getpid()}.npz"
    np.savez(temporary, **arrays)
    os.replace(temporary, folder / "weights.npz")
    write_json(
        folder / "network.json",
        {"format": FORMAT, "spec": to_json(spec), "phases": to_json(phases)},
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
        _check_format(record)
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
    except (
        ValueError, TypeError, KeyError, AttributeError, OSError, EOFError, zipfile.BadZipFile
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path} is unreadable or foreign: {error}; expected {expected}"
        ) from error


def _check_format(record: Any) -> None:
    found = record.get("format")
    if found != FORMAT:
        raise ValueError(f"format is {found!r}; this version reads format {FORMAT}")


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

    def save(self, epoch: int, state: TrainState, history: list[dict[str, Any]]) -> None:
        """Keep the state after `epoch` epochs and what was measured so far."""
        record = {"format": FORMAT, "identity": self._identity, "history": history}
        self._manager.save(
            epoch,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
            ),
        )

    def restore(self, like: TrainState) -> tuple[int, TrainState, list[dict[str, Any]]] | None:
        """Epochs done, state and history of the last checkpoint; ``None`` where there is none.

        Args:
            like: a state of the same structure.

        Raises:
            ValueError: the checkpoint is unreadable, of a newer version or of another run.
        """
        epoch = self._manager.latest_step()
        if epoch is None:
            return None
        path = self._folder / str(epoch)
        with _explained(path, "a checkpoint of this run"):
            record = self._manager.restore(
                epoch, args=ocp.args.Composite(record=ocp.args.JsonRestore())
            )["record"]
            _check_format(record)
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
                epoch, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]
        return epoch, state, record["history"]

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.close()
