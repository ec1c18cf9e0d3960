"""Test error of saved weights, at the sweeps they were trained with and at four times as many.

python experiments/evaluate.py --weights runs/digits --dataset digits --json out.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ep_jax import load_weights
from ep_jax.data import load
from ep_jax.evaluation import evaluate
from ep_jax.files import write_json
from ep_jax.provenance import provenance


@dataclass(frozen=True)
class Arguments:
    """Test error of saved weights."""

    weights: Path
    """Folder of a training, or shipped weights."""
    dataset: str
    """digits, mnist or fashion_mnist."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """File to write the result to."""
    data_dir: Path | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""


def main() -> None:
    """Evaluate, print and write."""
    try:
        arguments = tyro.cli(Arguments, description=__doc__)
        params, spec, phases = load_weights(arguments.weights)
        data = load(arguments.dataset, data_dir=arguments.data_dir)
        result = evaluate(params, spec, phases, data)
        if arguments.json_file is not None:
            written = {"weights": str(arguments.weights), "dataset": arguments.dataset}
            write_json(arguments.json_file, written | result | provenance())
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"evaluate.py: error: {error}")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
