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
from typing import Annotated, Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

import ep_jax as ep
from ep_jax import training
from ep_jax.checkpoint import to_json, write_json
from ep_jax.data import Dataset, load
from ep_jax.gradients import GRADIENTS
from ep_jax.presets import PRESETS
from ep_jax.run import provenance

WEAK = PRESETS["mnist"].feedback

NEURONS: dict[str, ep.Neuron] = {
    "rate": ep.Rate(),
    "sigma-delta": ep.SigmaDelta(),
    "sigma-delta, pool on traces": ep.SigmaDelta(decode="signal"),
    "delta code": ep.DeltaCode(),
}
"""What the pool sees: the state, single spikes, decoded spikes, what a receiver knows."""


def phases_of(neuron: str, feedback: float) -> ep.Phases:
    """Feedback 1: the textbook's absolute coordinates; weak feedback: the presets' phases."""
    if feedback == 1.0:
        return ep.Phases(free=25, nudged=20, beta=0.3, sweep="alternating")
    quick = PRESETS["mnist"].phases
    slow = PRESETS["mnist_sigma_delta"].phases
    return slow if neuron.startswith("sigma-delta") else quick


Pool: TypeAlias = Literal["avg", "max"]
POOLS: tuple[Pool, ...] = ("avg", "max")


@dataclass(frozen=True)
class Training:
    """Train every combination under one budget and tabulate the test errors.

    A combination that has a result in the folder is not trained again, so that an interrupted
    command goes on where it was.
    """

    out: Path
    """Folder for the results of single trainings."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and order of the images."""
    steps: int = 300
    """Optimisation steps: the budget."""
    batch: int = 64
    """Images in a step."""
    channels: tuple[int, int] = (8, 16)
    """Channels of the two 5x5 convolutions."""
    hidden: int = 64
    """Units of the hidden dense layer."""
    learning_rate: float = 5e-3
    """Peak learning rate of AdamW."""
    gain: float = 0.6
    """Scale of the initial weights."""
    data_dir: str | None = None
    """Where MNIST lies; by default TFDS_DATA_DIR."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """File for the table."""

    def run(self) -> None:
        """Train what is missing, then tabulate."""
        data = load("mnist", data_dir=self.data_dir)
        rows = []
        for seed, cell in itertools.product(self.seeds, combinations()):
            file = self._file(cell, seed)
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                result = self._train(cell, seed, data)
                write_json(file, result)
                print(f"{cell.name}, seed {seed}: {result}", flush=True)
        for cell in combinations():
            results = [json.loads(self._file(cell, seed).read_text()) for seed in self.seeds]
            gathered = {name: [r[name] for r in results] for name in results[0]}
            rows.append(dataclasses.asdict(cell) | gathered)
        Console().print(_table(rows))
        if self.json_file is not None:
            config = dataclasses.asdict(self) | {
                "neurons": {name: to_json(neuron) for name, neuron in NEURONS.items()}
            }
            del config["out"], config["json_file"], config["data_dir"]
            write_json(self.json_file, {"config": config, "rows": rows} | provenance())

    def _file(self, cell: Cell, seed: int) -> Path:
        return self.out / f"{cell.name}-seed{seed}.json"

    def _train(self, cell: Cell, seed: int, data: Dataset) -> dict[str, Any]:
        """Errors in per cent after training; ``None`` where it diverged."""
        layers = (
            *(ep.Conv(channels, 5, cell.pool) for channels in self.channels),
            ep.Dense(self.hidden),
            ep.Dense(data.classes),
        )
        spec = ep.NetworkSpec(
            data.train_images.shape[1:],
            layers,
            NEURONS[cell.neuron],
            feedback=cell.feedback,
        )
        phases = phases_of(cell.neuron, cell.feedback)
        optimizer = training.make_optimizer(
            self.learning_rate,
            self.steps,
            layer_rates=(1.0,) * len(layers),
            weight_decay=PRESETS["mnist"].weight_decay,
        )
        init_key, step_key = jax.random.split(jax.random.key(seed))
        state = training.init_train_state(init_key, spec, optimizer, self.gain)
        steps = training.make_train_steps(
            spec, phases, optimizer, gradient=GRADIENTS[cell.gradient]
        )
        order = np.random.default_rng(seed).permutation(len(data.train_images))
        batches = np.resize(order, (self.steps, self.batch)).astype(np.int32)
        images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
        state, metrics = jax.jit(steps)(state, images, labels, jnp.asarray(batches), step_key)
        finite = bool(jnp.isfinite(optax.tree.norm(state.params)))
        answers, info = training.predict(state.params, spec, phases, data.test_images)
        held_out, _ = training.predict(state.params, spec, phases, data.validation_images)
        return {
            "test_error": training.error_rate(answers, data.test_labels) if finite else None,
            "val_error": training.error_rate(held_out, data.validation_labels) if finite else None,
            "last_loss": float(metrics.loss[-50:].mean()) if finite else None,
            "moving": float(info.moving) if finite else None,
        }


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    neuron: str
    pool: Pool
    gradient: str
    feedback: float

    @property
    def name(self) -> str:
        """A name for its folder."""
        neuron = self.neuron.replace(", ", "_").replace(" ", "_")
        return f"{neuron}-{self.pool}-{self.gradient}-{self.feedback:g}"


def combinations() -> list[Cell]:
    """All cells: EP against BPTT for rates and the paper's spikes, EP alone for what repairs it."""
    cells = [
        Cell(neuron, pool, gradient, feedback)
        for neuron in NEURONS
        for pool in POOLS
        for gradient in ("ep", "bptt")
        for feedback in (1.0, WEAK)
        if gradient == "ep" or neuron in ("rate", "sigma-delta")
    ]
    # An average pool does not care whether it acts on spikes or on traces.
    return [c for c in cells if not (c.pool == "avg" and c.neuron.endswith("traces"))]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="MNIST error in per cent: mean ± standard deviation over seeds")
    for column in ("neuron", "pool", "gradient", "feedback", "test", "validation"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["neuron"],
            row["pool"],
            row["gradient"],
            f"{row['feedback']:g}",
            _spread(row["test_error"]),
            _spread(row["val_error"]),
        )
    return table


def _spread(values: list[float | None]) -> str:
    finite = [v for v in values if v is not None]
    if len(finite) < len(values):
        return f"{len(values) - len(finite)} of {len(values)} diverged"
    return f"{np.mean(finite):.2f} ± {np.std(finite, ddof=1) if len(finite) > 1 else 0:.2f}"


def main() -> None:
    """Parse, run, and say in one line what was wrong where the input was."""
    try:
        tyro.extras.subcommand_cli_from_dict({"train": Training}).run()
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"pooling.py: error: {error}")


if __name__ == "__main__":
    main()
