"""Average against max pooling, rate against spiking neurons, EP against BPTT.

python experiments/pooling.py train --out runs/pooling --json results/pooling/training.json
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import ep_jax as ep
from ep_jax.checkpoint import to_json, write_json
from ep_jax.presets import PRESETS, Config
from ep_jax.run import DivergedError, provenance, train

TEXTBOOK = ep.Phases(free=25, nudged=20, beta=0.3, sweep="alternating")
"""The papers' form: feedback 1, absolute coordinates, both nudges."""

DISPLACED = ep.Phases(
    free=25,
    nudged=12,
    beta=0.1,
    estimator="one_sided",
    sweep="alternating",
    coordinates="displacement",
)
"""The presets' form: weak feedback, displacement coordinates, one nudge."""

FEEDBACKS = {1.0: TEXTBOOK, PRESETS["mnist"].feedback: DISPLACED}

NEURONS: dict[str, dict[str, Any]] = {
    "rate": {"neuron": "rate"},
    "sigma-delta": {"neuron": "sigma_delta"},
    "sigma-delta, pool on traces": {
        "neuron": "sigma_delta",
        "sigma_delta": ep.SigmaDelta(decode="signal"),
    },
    "delta code": {"neuron": "delta_code"},
}
"""What the pool sees: the state, single spikes, decoded spikes, what a receiver knows."""


@dataclass(frozen=True)
class Training:
    """Train every combination under one budget and tabulate the test errors.

    A combination that has a result in the folder is not trained again, so that an interrupted
    command goes on where it was.
    """

    out: Path
    """Folder for the runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and order of the images."""
    images: int = 19_200
    """Training images, each seen once: the budget."""
    channels: tuple[int, ...] = (8, 16)
    """Channels of the two convolutions."""
    hidden: tuple[int, ...] = (64,)
    """Units of the hidden dense layers."""
    data_dir: str | None = None
    """Where MNIST lies; by default TFDS_DATA_DIR."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """File for the table."""

    def run(self) -> None:
        """Train what is missing, then tabulate."""
        cells = list(combinations())
        rows = []
        for seed, cell in itertools.product(self.seeds, cells):
            folder = self.out / cell.name / f"seed{seed}"
            if not (folder / "result.json").exists():
                print(f"--- {cell.name}, seed {seed}", flush=True)
                try:
                    train(self._config(cell, seed), folder, resume=True)
                except DivergedError as error:
                    print(error)
        for cell in cells:
            results = [
                json.loads(path.read_text())
                for seed in self.seeds
                if (path := self.out / cell.name / f"seed{seed}" / "result.json").exists()
            ]
            rows.append(dataclasses.asdict(cell) | _summary(results, len(self.seeds)))
        Console().print(_table(rows))
        if self.json_file is not None:
            config = to_json(self._config(cells[0], self.seeds[0]))
            budget = {"seeds": self.seeds, "images": self.images, "config": config}
            write_json(self.json_file, budget | {"rows": rows} | provenance())

    def _config(self, cell: Cell, seed: int) -> Config:
        preset = PRESETS["mnist"]
        return dataclasses.replace(
            preset,
            **NEURONS[cell.neuron],
            data_dir=self.data_dir,
            train_images=self.images,
            epochs=1,
            channels=self.channels,
            hidden=self.hidden,
            shift=0,
            seed=seed,
            pool=cell.pool,
            gradient=cell.gradient,
            feedback=cell.feedback,
            phases=FEEDBACKS[cell.feedback],
        )


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    neuron: str
    pool: Literal["avg", "max"]
    gradient: Literal["ep", "bptt"]
    feedback: float

    @property
    def name(self) -> str:
        """A name for its folder."""
        neuron = self.neuron.replace(", ", "_").replace(" ", "_")
        return f"{neuron}-{self.pool}-{self.gradient}-{self.feedback:g}"


def combinations() -> list[Cell]:
    """All cells: EP against BPTT for rates and the paper's spikes, EP alone for what repairs it."""
    pools, feedbacks = ("avg", "max"), tuple(FEEDBACKS)
    full = itertools.product(("rate", "sigma-delta"), pools, ("ep", "bptt"), feedbacks)
    # An average pool does not care whether it acts on spikes or on traces.
    traces = itertools.product(("sigma-delta, pool on traces",), ("max",), ("ep",), feedbacks)
    code = itertools.product(("delta code",), pools, ("ep",), feedbacks)
    return [Cell(*cell) for cell in itertools.chain(full, traces, code)]


def _summary(results: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    errors = [r["test_error"] for r in results]
    longer = [r["test_error_4x"] for r in results]
    return {
        "test_errors": errors,
        "test_errors_4x": longer,
        "diverged": seeds - len(results),
        "spikes_per_neuron": [float(np.mean(r["spikes_per_neuron"])) for r in results],
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="MNIST test error in per cent: mean ± standard deviation over seeds")
    for column in ("neuron", "pool", "gradient", "feedback", "error", "at 4x the sweeps"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["neuron"],
            row["pool"],
            row["gradient"],
            f"{row['feedback']:g}",
            _spread(row["test_errors"]),
            _spread(row["test_errors_4x"]),
        )
    return table


def _spread(values: list[float]) -> str:
    if not values:
        return "diverged"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.2f}"


def main() -> None:
    """Parse, run, and say in one line what was wrong where the input was."""
    try:
        tyro.extras.subcommand_cli_from_dict({"train": Training}).run()
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"pooling.py: error: {error}")


if __name__ == "__main__":
    main()
