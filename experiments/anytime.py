"""Error, spikes and synaptic operations after every sweep of an inference.

    python experiments/anytime.py --weights pretrained/mnist_weak --dataset mnist --out runs/anytime

The network answers early and refines: one free phase of four times the usual sweeps, whose output
is read after each of them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.console import Console
from rich.table import Table

import ep_jax as ep
from ep_jax import network
from ep_jax.data import load, to_float
from ep_jax.diagnostics import spikes_per_neuron, synaptic_operations
from ep_jax.files import write_json
from ep_jax.provenance import provenance
from ep_jax.relaxation import Snapshot
from ep_jax.training import error_rate


@dataclass(frozen=True)
class Arguments:
    """Error, spikes and synaptic operations after every sweep."""

    weights: Path
    """Folder of a training, or shipped weights."""
    dataset: str
    """digits, mnist or fashion_mnist."""
    out: Path
    """Folder for anytime.json and anytime.png."""
    data_dir: Path | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""
    batch: int = 100
    """Images in flight at once."""


def follow(
    params: ep.Params, spec: ep.NetworkSpec, phases: ep.Phases, images: np.ndarray, batch: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """The answers ``[T, N]`` after each of T sweeps, and spikes per neuron by then ``[T, layers]``.

    Args:
        params: parameters of `spec`.
        spec: the network.
        phases: its ``free`` sweeps are T.
        images: uint8 ``[N, H, W, C]``.
        batch: images in flight at once.
    """
    prepared = network.prepare(params, spec)

    def look(now: Snapshot) -> tuple[jax.Array, jax.Array]:
        spikes = jnp.stack([jnp.mean(jnp.abs(s)) for s in now.spikes])
        return network.read_out(spec, prepared, now.state[-1]).argmax(-1), spikes

    def one(given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        image, key = given
        own = key if spec.neuron.stochastic else None
        return ep.free_phase(params, spec, to_float(image), phases, own, trace=look)[1].trace

    keys = jax.random.split(jax.random.key(0), len(images))
    run = jax.jit(lambda images, keys: jax.lax.map(one, (images, keys), batch_size=batch))
    answers, spikes = run(jnp.asarray(images), keys)
    return np.asarray(answers).T, np.cumsum(np.asarray(spikes).mean(0), axis=0)


def draw(rows: list[dict[str, Any]], usual: int, most: int) -> Figure:
    """Error against sweeps and spikes; the usual sweeps and the stragglers' are marked."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    sweeps, spikes = figure.subplots(1, 2, sharey=True)
    errors = [r["error"] for r in rows]
    for axis, name, label in (
        (sweeps, "sweep", "sweeps"),
        (spikes, "spikes_per_neuron", "spikes per neuron and image"),
    ):
        values = [r[name] for r in rows]
        axis.plot(values, errors, "o-", ms=3)
        for marked in {usual, most}:
            axis.axvline(values[marked - 1], color="0.6", ls="--", lw=1)
        axis.set(xlabel=label, yscale="log")
        axis.grid(alpha=0.3, which="both")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(ScalarFormatter())
    sweeps.set(ylabel="test error, %")
    return figure


def run(arguments: Arguments) -> dict[str, Any]:
    """Measure, write, return."""
    params, spec, phases = ep.load_weights(arguments.weights)
    data = load(arguments.dataset, data_dir=arguments.data_dir)
    most = phases.for_all()
    longer = most.longer(4)
    answers, spikes = follow(params, spec, longer, data.test_images, arguments.batch)
    rows = [
        {
            "sweep": t,
            "error": error_rate(now, data.test_labels),
            "spikes_per_neuron": spikes_per_neuron(spec, sent.tolist()),
            "spikes_per_layer": sent.tolist(),
            "synaptic_operations": synaptic_operations(spec, sent.tolist()),
        }
        for t, (now, sent) in enumerate(zip(answers, spikes, strict=True), start=1)
    ]
    found = {
        "weights": str(arguments.weights),
        "dataset": arguments.dataset,
        "usual_sweeps": phases.free,
        "most_sweeps": most.free,
        "rows": rows,
    }
    made = provenance()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "anytime.json", found | made)
    draw(rows, phases.free, most.free).savefig(arguments.out / "anytime.png", dpi=150)
    return found


def table(found: dict[str, Any]) -> Table:
    """A line a sweep."""
    made = Table(title=f"{found['dataset']}: the answer after each sweep")
    for column in ("sweeps", "error, %", "spikes per neuron", "synaptic operations"):
        made.add_column(column, justify="right")
    for row in found["rows"]:
        made.add_row(
            str(row["sweep"]),
            f"{row['error']:.2f}",
            f"{row['spikes_per_neuron']:.2f}",
            f"{row['synaptic_operations']:.2e}",
        )
    return made


def main() -> None:
    """Measure, print, write."""
    try:
        Console().print(table(run(tyro.cli(Arguments, description=__doc__))))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"anytime.py: error: {error}")


if __name__ == "__main__":
    main()
