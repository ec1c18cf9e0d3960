"""When a run stops before its last epoch, and which weights it ends with.

Both are decided by the validation error, never by the test images.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ep_jax.checkpoint import save_weights
from ep_jax.network import NetworkSpec, Params
from ep_jax.phases import Phases


def best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """The first epoch of the lowest validation error, counted from 1.

    Args:
        history: the records of ``metrics.jsonl``.

    Example:
        >>> best_epoch([{"val_error": 3.0}, {"val_error": 2.0}, {"val_error": 2.0}])
        2
    """
    errors = [record["val_error"] for record in history]
    return 1 + errors.index(min(errors))


def is_over(history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether the validation error has not fallen for `patience` epochs; ``None`` waits for ever.

    Example:
        >>> is_over([{"val_error": 2.0}, {"val_error": 3.0}], patience=1)
        True
    """
    return patience is not None and bool(history) and len(history) - best_epoch(history) >= patience


def folder_of(folder: Path, epoch: int) -> Path:
    """Where the weights of an epoch lie."""
    return folder / f"epoch{epoch}"


def keep_if_best(
    folder: Path,
    history: Sequence[Mapping[str, Any]],
    params: Params,
    spec: NetworkSpec,
    phases: Phases,
) -> None:
    """Write the weights of the last epoch into `folder` where no other has a lower error."""
    if best_epoch(history) == len(history):
        save_weights(folder_of(folder, len(history)), params, spec, phases)


def forget_others(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Remove what is not the best epoch's.

    It comes after the checkpoint that knows of the best epoch: a run that dies in between makes
    its last epoch again, and the one before may be the best after all.
    """
    best = folder_of(folder, best_epoch(history))
    for other in folder.glob("epoch*"):
        if other != best:
            shutil.rmtree(other)
