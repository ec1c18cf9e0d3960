"""The tables of results, from the result files of many runs.

    python experiments/results_table.py --results results/table          # of the documentation
    python experiments/results_table.py --results results/table --short  # of the README

A result file is the ``result.json`` of a run, kept as ``DATASET/NAME/seedN.json``; a row is a name,
over its seeds. Published results stand above them. What feedback does is measured on validation
images (`ep_jax.evaluation.recurrence_of`), by the rate network at its fixed point; older files lack
it.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common import command

from ep_jax.data import DATASETS
from ep_jax.presets import CAME_LATER, PRESETS
from ep_jax.tables import markdown, spaced


@dataclass(frozen=True)
class Arguments:
    """The tables of results."""

    results: Path
    """Folder with DATASET/NAME/seedN.json."""
    short: bool = False
    """The README's five rows."""


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; one value by itself, a dash for none."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "–"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


PUBLISHED: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "mnist": (
        ("O'Connor et al. 2019", "spiking, dense", "EP", "2.4"),
        ("Lin et al. 2024", "sigma-delta", "EP", "0.97"),
        ("Xiao et al. 2021 (IDE)", "spiking", "implicit", "0.47"),
        ("Ernoult et al. 2019", "rate", "EP", "1.0"),
    ),
    "fashion_mnist": (
        ("Lin et al. 2024", "sigma-delta", "EP", "8.89"),
        ("Xiao et al. 2021 (IDE)", "spiking", "implicit", "9.93"),
    ),
}
"""Work, neurons, gradient and test error in per cent, by data."""

PAPER = {
    dataset: next(error for work, _, _, error in works if work == "Lin et al. 2024")
    for dataset, works in PUBLISHED.items()
}
"""What the paper reaches that the library follows."""

HEAD = (
    "data",
    "run",
    "neurons",
    "gradient",
    "epochs; seeds",
    "sweeps",
    "feedback",
    "its share of the state, by layer",
    "spectral radius, mean; largest",
    "test error, %",
    "validation error; feedback cut, %",
    "spikes, free + nudged",
)


def sweeps(phases: dict[str, Any], phase: str) -> str:
    """Sweeps of a phase; in brackets those that its stragglers make beyond."""
    more = phases.get(f"{phase}_more")
    return f"{phases[phase]} (+{more})" if more else str(phases[phase])


def neurons(described: str | dict[str, Any]) -> str:
    """The neuron model in words; older files hold its name alone."""
    if isinstance(described, dict) and described.get("leak"):
        return "sigma-delta, closed loop"
    name = described["type"] if isinstance(described, dict) else described
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").lower()


def row(dataset: str, name: str, found: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """One line: the runs of one name, which differ in their seed alone."""
    configs = [{k: v for k, v in (CAME_LATER | f["config"]).items() if k != "seed"} for f in found]
    if any(config != configs[0] for config in configs):
        raise ValueError(f"{dataset}/{name} holds runs whose configurations differ in more than "
                         "the seed; expected runs of one preset")  # fmt: skip
    config = configs[0]
    ep_run = config["gradient"] == "ep"
    heard = [f["recurrence"] for f in found if "recurrence" in f]
    share, radius, cut = "–", "–", "–"
    if heard:
        layers = zip(*(h["share"] for h in heard), strict=True)
        share = spaced(map(statistics.mean, layers))
        mean = statistics.mean(h["radius_mean"] for h in heard)
        radius = f"{mean:.2f}; {max(h['radius_largest'] for h in heard):.2f}"
        cut = spread([h["error_cut"] for h in heard])
    held_out = spread([f["val_error"][-1] for f in found if f["val_error"][-1] is not None])
    free, nudged = (
        statistics.mean(f["last_epoch"][f"spikes_{phase}"] for f in found)
        for phase in ("free", "nudged")
    )
    return (
        dataset,
        f"`{name}`",
        neurons(config["neuron"]),
        "backprop" if "backprop" in name else config["gradient"].upper(),
        f"{config['epochs']}; {', '.join(str(f['seed']) for f in found)}",
        "/".join(sweeps(config["phases"], phase) for phase in ("free", "nudged")[: 1 + ep_run]),
        f"{config['feedback']:g}",
        share,
        radius,
        spread([f["test_error"] for f in found]),
        f"{held_out}; {cut}",
        (f"{free:.2f} + {nudged:.3f}" if ep_run else f"{free:.2f}") if free else "–",
    )


def published(dataset: str) -> list[tuple[str, ...]]:
    """What others report on a data set: a test error, and little else that could be compared."""
    rows = []
    for work, neurons, gradient, error in PUBLISHED.get(dataset, ()):
        known = {"data": dataset, "run": work, "neurons": neurons, "gradient": gradient}
        known["test error, %"] = error
        rows.append(tuple(known.get(column, "") for column in HEAD))
    return rows


def place(folder: Path) -> tuple[int, int, str]:
    """Where the row of a folder stands: data and presets in their own order, then by name."""

    def rank(names: Sequence[str], name: str) -> int:
        return names.index(name) if name in names else len(names)

    return rank(DATASETS, folder.parent.name), rank(list(PRESETS), folder.name), folder.name


SHORT = (
    ("mnist", "mnist", "spiking EP"),
    ("mnist", "mnist_sigma_delta", "spiking EP, the paper's neuron in a closed loop"),
    ("mnist", "mnist_backprop_weak", "backprop, rate neurons"),
    ("fashion_mnist", "fashion_mnist", "spiking EP"),
    ("fashion_mnist", "fashion_mnist_backprop_weak", "backprop, rate neurons"),
)
"""Data, preset and description of the README's rows."""
SHORT_HEAD = (
    "data",
    "network",
    "feedback",
    "its share of the state, by layer",
    "test error, %",
    "seeds",
    "published, %",
)


def short_table(results: Path) -> str:
    """The README's table in Markdown; it has what others report for the paper's own method."""
    rows = []
    for dataset, name, description in SHORT:
        files = sorted((results / dataset / name).glob("seed*.json"))
        if not files:
            raise ValueError(f"results is {str(results)!r}; expected {dataset}/{name}/seedN.json")
        long = dict(
            zip(HEAD, row(dataset, name, [json.loads(f.read_text()) for f in files]), strict=True)
        )
        ep_run = long["gradient"] == "EP"
        rows.append(
            (
                dataset,
                description,
                long["feedback"] if ep_run else "none",
                long["its share of the state, by layer"] if ep_run else "0",
                long["test error, %"],
                long["epochs; seeds"].split("; ")[1],
                PAPER[dataset] if ep_run else "",
            )
        )
    return markdown(SHORT_HEAD, rows)


def table(results: Path) -> str:
    """The table of the documentation in Markdown."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for folder in sorted(results.glob("*/*"), key=place):
        files = sorted(folder.glob("seed*.json"))
        if files:
            found = [json.loads(file.read_text()) for file in files]
            dataset = folder.parent.name
            rows.setdefault(dataset, published(dataset))
            rows[dataset].append(row(dataset, folder.name, found))
    if not rows:
        raise ValueError(f"results is {str(results)!r}; expected a folder with "
                         "DATASET/NAME/seedN.json")  # fmt: skip
    return markdown(HEAD, itertools.chain(*rows.values()))


def main() -> None:
    """Print it."""
    with command():
        asked = tyro.cli(Arguments, description=__doc__)
        print((short_table if asked.short else table)(asked.results), end="")


if __name__ == "__main__":
    main()
