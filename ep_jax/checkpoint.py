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
import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ep_jax.descriptions import from_json, to_json
from ep_jax.files import make_folder, own_path, replacing
from ep_jax.network import NetworkSpec, Params, check_params, parameters_of, precision_of
from ep_jax.phases import Phases

State = TypeVar("State")

WEIGHTS_FORMAT = 4
"""Version of the weights that are written.

Formats 1 and 2 are read as well; their specification is in ``network.json``.
"""
_SINCE: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "Phases": {
            "relaxation": 1.0,
            "tolerance": None,
            "stragglers": 0.0,
            "free_more": 0,
            "nudged_more": 0,
            "limit": None,
        },
        "DeltaCode": {"levels": 3, "scale": 0.8, "shrink": 0.5},  # all were scheduled
    },
    3: {
        "NetworkSpec": {
            "skips": [],
            "readout": None,
            "output": None,
            "normalization": {"type": "Normalization", "mean": [0.0], "std": [1.0]},
        },
        "Conv": {"stride": 1, "dilation": 1, "groups": 1},
    },
    4: {"Phases": {"precision": "float32"}},
}
"""Fields that came with a format, and what weights of before mean: not the defaults of today."""
CHECKPOINT_FORMAT = 3
"""Version of the checkpoints that are written; another one is refused."""


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
    folder = own_path("folder", folder)
    precision = precision_of(params).name
    described = {
        "format": WEIGHTS_FORMAT,
        "dtype": precision,
        "spec": to_json(spec),
        "phases": to_json(phases),
    }
    make_folder("folder", folder)
    arrays: dict[str, Any] = {
        f"{owner}.{name}": _plain(np.asarray(value))
        for owner, p in zip(_owners(spec), params, strict=True)
        for name, value in p.items()
    }
    arrays[DESCRIPTION] = np.array(json.dumps(described))
    with replacing(folder / "weights.npz") as file:
        np.savez(file, **arrays)
    (folder / "network.json").unlink(missing_ok=True)  # of an earlier version: it is of no use now


_BITS = {"bfloat16": np.uint16}
"""Types that NumPy's files do not know: what their bits are written as."""


def _plain(array: np.ndarray) -> np.ndarray:
    bits = _BITS.get(array.dtype.name)
    return array if bits is None else array.view(bits)


def _typed(array: np.ndarray, precision: str | None) -> jax.Array:
    """An array as it was saved; `precision` is ``None`` where its own is what it was.

    Raises:
        ValueError: this session of JAX would round it.
    """
    if precision in _BITS:
        array = array.view(jnp.dtype(precision))
    array = array.astype(array.dtype.newbyteorder("="))  # written on another kind of machine
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError("float64, which JAX would round to float32; expected JAX_ENABLE_X64=1")
    return jnp.asarray(array)


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
    folder = own_path("folder", folder)
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
        _check_format(record, 1, 2, 3, WEIGHTS_FORMAT)
        record = _completed(record, record["format"])
        spec, phases = from_json(record["spec"]), from_json(record["phases"])
        if not isinstance(spec, NetworkSpec) or not isinstance(phases, Phases):
            raise ValueError("no NetworkSpec and Phases")
    with _explained(weights, f"the weights of {len(spec.layers)} layers"):
        owners, wanted = _owners(spec), parameters_of(spec)
        names = {f"{owner}.{n}" for owner, p in zip(owners, wanted, strict=True) for n in p}
        if arrays.keys() != names:
            raise ValueError(f"arrays {sorted(arrays)}; expected {sorted(names)}")
        params = tuple(
            {name: _typed(arrays[f"{owner}.{name}"], record.get("dtype")) for name in p}
            for owner, p in zip(owners, wanted, strict=True)
        )
        check_params(spec, params)
    return params, spec, phases


def _completed(record: Any, version: int) -> Any:
    """A description of a format with the fields that came later."""
    if isinstance(record, list):
        return [_completed(value, version) for value in record]
    if not isinstance(record, dict):
        return record
    found = {name: _completed(value, version) for name, value in record.items()}
    for since, added in _SINCE.items():
        if version < since:
            found = added.get(str(found.get("type")), {}) | found
    return found


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
        came_later: what it means where a checkpoint of before lacks an entry.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], came_later: Mapping[str, Any] | None = None
    ) -> None:
        self._identity, self._came_later = identity, dict(came_later or {})
        self._folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, number: int, state: Any, progress: dict[str, Any]) -> None:
        """Keep the state, and how far the run has come, as JSON.

        Args:
            number: of the checkpoint, larger than that of the last one.
            state: what training carries, a tree of arrays.
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

    def restore(self, like: State) -> tuple[State, dict[str, Any]] | None:
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
            before = self._came_later | record["identity"]
            differing = {
                k: (before.get(k), v) for k, v in self._identity.items() if before.get(k) != v
            }
        if differing:
            came = "; ".join(f"{k} was {a!r} and is now {b!r}" for k, (a, b) in differing.items())
            raise ValueError(f"{path} was written by another configuration: {came}; expected the "
                             "options that the run began with, or another folder")  # fmt: skip
        with _explained(path, "a checkpoint of this run"):
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            state = self._manager.restore(
                number, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]
        return state, record["progress"]

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.close()
