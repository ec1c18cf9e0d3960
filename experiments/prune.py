"""Saved weights without the units that (almost) no training image wakes.

python experiments/prune.py --weights runs/digits --dataset digits --out runs/digits_small
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from rich.console import Console

from ep_jax import load_weights, save_weights
from ep_jax.checks import check_non_negative
from ep_jax.data import load
from ep_jax.evaluation import evaluate
from ep_jax.files import write_json
from ep_jax.provenance import provenance
from ep_jax.pruning import activity, prune
from ep_jax.training import error_rate, predict


@dataclass(frozen=True)
class Arguments:
    """Saved weights without their silent units."""

    weights: Path
    """Folder of a training, or shipped weights."""
    dataset: str
    """digits, mnist or fashion_mnist: what the weights were trained on."""
    out: Path
    """Folder for the weights of the smaller network and result.json."""
    share: float = 0.0
    """A unit goes where no larger share of the training images wakes it; 0: where none does."""
    data_dir: Path | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""

    def __post_init__(self) -> None:
        check_non_negative("share", self.share, at_most=1.0)


def main() -> None:
    """Run, and say in one line what was wrong where the input was."""
    try:
        run(tyro.cli(Arguments, description=__doc__))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"prune.py: error: {error}")


def run(arguments: Arguments) -> None:
    """Prune, compare on the validation images, evaluate, write."""
    params, spec, phases = load_weights(arguments.weights)
    data = load(arguments.dataset, data_dir=arguments.data_dir)
    awake = activity(params, spec, phases.for_all(), data.train_images)
    keep = tuple(share > arguments.share for share in awake)
    networks = {"before": (params, spec), "after": prune(params, spec, keep)}
    answers = {
        name: predict(*network, phases, data.validation_images)[0]
        for name, network in networks.items()
    }
    result = {
        "weights": str(arguments.weights),
        "dataset": arguments.dataset,
        "share": arguments.share,
        **{
            name: {
                "units": [shape[-1] for shape in network[1].state_shapes],
                "parameters": sum(a.size for a in jax.tree.leaves(network[0])),
                "val_error": error_rate(answers[name], data.validation_labels),
            }
            for name, network in networks.items()
        },
        "changed_validation_answers": int((answers["before"] != answers["after"]).sum()),
        **evaluate(*networks["after"], phases, data),
        **provenance(),
    }
    save_weights(arguments.out, *networks["after"], phases)
    write_json(arguments.out / "result.json", result)
    Console().print_json(data=result)


if __name__ == "__main__":
    main()
