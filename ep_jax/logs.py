"""Records of epochs in TensorBoard and Weights & Biases, through their own writers.

Both are extras. Use `logging_to` as `on_epoch` of `ep_jax.run.train`::

    with logging_to("tensorboard", out, config) as on_epoch:
        train(config, out, on_epoch=on_epoch)
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ep_jax.checks import check_choice
from ep_jax.descriptions import to_json
from ep_jax.extras import extra
from ep_jax.files import make_folder
from ep_jax.presets import Config

LOGS = ("tensorboard", "wandb")
"""Where records can go."""
_NOT_LOGGED = ("epoch", "curve", "warnings")


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record by name; those of a layer under its number.

    Args:
        record: a line of ``metrics.jsonl``.
        prefix: what all names begin with.

    Example:
        >>> scalars({"epoch": 3, "loss": 0.5, "radius": {"mean": 0.8}, "activity": [0.1, 0.2]})
        {'loss': 0.5, 'radius/mean': 0.8, 'activity/layer1': 0.1, 'activity/layer2': 0.2}
    """
    found: dict[str, float] = {}
    for name, value in record.items():
        if not prefix and name in _NOT_LOGGED:
            continue
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list | tuple):
            layers = {f"layer{l}": v for l, v in enumerate(value, start=1)}
            found |= scalars(layers, f"{prefix}{name}/")
        elif value is not None:
            found[prefix + name] = float(value)
    return found


@contextlib.contextmanager
def logging_to(
    name: str, folder: Path, config: Config
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that logs the record of an epoch.

    Args:
        name: ``"tensorboard"`` writes into ``folder/tensorboard``; ``"wandb"`` starts a run of the
            project ``ep_jax``, named as the folder, and keeps its files in ``folder/wandb``. A
            training that resumes goes on in TensorBoard, and is a run of its own in W&B.
        folder: that of the training.
        config: what is trained.

    Raises:
        ModuleNotFoundError: the extra of that name is not installed.
    """
    check_choice("log", name, LOGS)
    with _WRITERS[name](folder, config) as write:
        yield lambda record: write(scalars(record), record["epoch"])


@contextlib.contextmanager
def _tensorboard(folder: Path, config: Config) -> Iterator[Any]:
    with extra("tensorboard"):
        summary = importlib.import_module("tensorboard.summary")
    make_folder("out", folder / "tensorboard")
    writer = summary.Writer(str(folder / "tensorboard"))

    def write(values: dict[str, float], epoch: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    del config  # it is in config.json, beside
    with contextlib.closing(writer):
        yield write


@contextlib.contextmanager
def _wandb(folder: Path, config: Config) -> Iterator[Any]:
    with extra("wandb"):
        wandb = importlib.import_module("wandb")
    make_folder("out", folder)
    name = folder.resolve().name
    with wandb.init(project="ep_jax", name=name, dir=str(folder), config=to_json(config)) as run:
        yield lambda values, epoch: run.log(values, step=epoch)


_WRITERS = {"tensorboard": _tensorboard, "wandb": _wandb}
