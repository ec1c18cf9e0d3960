"""The quality of EP's gradient at feedback 1 against sweeps, codes and spikes.

    python experiments/frontier.py --early runs/mnist1 --late pretrained/mnist \\
        --runs runs/frontier --out results/frontier

--early and --late are weights of the preset mnist after one epoch and after all of them. Every
point is the agreement of EP's gradient with the exact one (of the rate network with the same
parameters, at its fixed point, in float64) on batches of 64 MNIST validation images, each compared
by itself.
The study is docs/studies/frontier.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from common import (
    Journal,
    agreements,
    command,
    exact_gradients,
    in_float64,
    plain,
    validation_batches,
)
from matplotlib.figure import Figure
from rich.console import Console

import ep_jax as ep
from ep_jax.data import load
from ep_jax.descriptions import to_json
from ep_jax.diagnostics import spikes_per_neuron
from ep_jax.files import fingerprint, new_folder, write_json
from ep_jax.presets import PRESETS
from ep_jax.progress import say
from ep_jax.provenance import provenance
from ep_jax.tables import markdown, spaced

PRESET = PRESETS["mnist"].phases
ALONE = replace(PRESET.without_stragglers(), limit=None)
"""The preset's phases without stragglers and without a limit."""
RATE, CODE = ep.Rate(), ep.DeltaCode()
CODES: dict[str, ep.Neuron] = {
    "rate": RATE,
    "3 levels": replace(CODE, levels=3),
    "5 levels": CODE,
    "7 levels": replace(CODE, levels=7),
    "3 levels, scheduled": ep.DeltaCode(
        quantum=0.5, decay=0.75, nudged_quantum=0.7, nudged_decay=0.65
    ),
}
SWEEPS = ((6, 4), (8, 6), (12, 8), (16, 12), (24, 16))
MORE = {"free_more": PRESET.free_more, "nudged_more": PRESET.nudged_more}
STRAGGLERS = ({}, *({"stragglers": share} | MORE for share in (0.0625, PRESET.stragglers, 0.25)))
QUANTA = (
    *({"scale": scale} for scale in (0.4, 0.6, 1.0, 1.4)),
    *({"shrink": shrink} for shrink in (0.3, 0.7)),
)
"""Settings of the self-scaling quantum beside the default of .8 and .5."""


@dataclass(frozen=True)
class Arguments:
    """The quality of EP's gradient at feedback 1 against sweeps, codes and spikes."""

    early: Path
    """Folder with the weights of one epoch of the preset mnist."""
    late: Path
    """Folder with the weights of all its epochs."""
    runs: Path
    """Folder for the rows measured so far: an interrupted command goes on."""
    out: Path
    """Folder for frontier.json and the figures."""
    batches: int = 12
    """Number of batches of 64 images."""
    data_dir: str | None = None
    """Where MNIST lies; by default TFDS_DATA_DIR."""


@dataclass(frozen=True)
class Subject:
    """Weights whose gradients are measured."""

    age: str
    spec: ep.NetworkSpec
    params: ep.Params
    exact: list[ep.Params]
    xs: np.ndarray
    ys: np.ndarray

    def first(self, batches: int) -> Subject:
        """The same weights and fewer batches."""
        less = {name: getattr(self, name)[:batches] for name in ("exact", "xs", "ys")}
        return replace(self, **less)


def points(age: str) -> Iterator[tuple[str, str, ep.Neuron, ep.Phases]]:
    """What is measured of a subject: part of the study, name, neuron model and phases.

    Early in training every network settles fast: there only the sweeps are of interest.
    """
    for name, neuron in CODES.items():
        for free, nudged in SWEEPS:
            yield "sweeps", name, neuron, replace(ALONE, free=free, nudged=nudged)
    if age == "early":
        return
    for name in ("rate", "5 levels"):
        for more in STRAGGLERS:
            yield "stragglers", name, CODES[name], replace(ALONE, **more)
        yield "limit", name, CODES[name], PRESET
        for relaxation in (1.0, 1.2, 1.4, 1.6, 1.7):
            at = replace(PRESET, limit=None, relaxation=relaxation)
            yield "relaxation", name, CODES[name], at
    for sweep in ("synchronous", "alternating", "ordered"):
        for free, nudged in SWEEPS:
            at = replace(ALONE, free=free, nudged=nudged, sweep=sweep, relaxation=1.0)
            yield "order", "rate", RATE, at
    for beta in (0.3, 0.1, 0.03, 0.01, 0.001):
        yield "beta", "5 levels", CODE, replace(PRESET, limit=None, beta=beta)
    for setting in QUANTA:
        name = f"5 levels, {' '.join(f'{k} {v}' for k, v in setting.items())}"
        yield "quantum", name, replace(CODE, **setting), replace(PRESET, limit=None)


def measure(
    subject: Subject, neuron: ep.Neuron, phases: ep.Phases, doubled: bool = False
) -> dict[str, Any]:
    """Agreement, spikes and cost of a gradient, in float64 where it is `doubled`."""
    spec = replace(subject.spec, neuron=neuron)
    gradient = jax.jit(
        lambda params, xs, ys, key: ep.ep_gradient(params, spec, xs, ys, phases, key)
    )
    with jax.enable_x64(doubled):
        params = in_float64(subject.params) if doubled else subject.params
        xs = subject.xs.astype(np.float64) if doubled else subject.xs
        found, info = agreements(gradient, params, xs, subject.ys, subject.exact)
    assert info.nudged is not None
    return {
        **found._asdict(),
        "spikes_free": spikes_per_neuron(spec, info.free.spikes),
        "spikes_free_per_layer": np.stack(info.free.spikes),
        "spikes_nudged": spikes_per_neuron(spec, info.nudged.spikes),
        "unsettled": float(info.free.unsettled),
        # What a gradient costs on any machine.
        "sweeps": phases.mean_sweeps(nudged=False) + phases.mean_sweeps(nudged=True),
    }


def tell(row: dict[str, Any]) -> None:
    """A line on the terminal."""
    phases = row["phases"]
    print(
        f"{row['age']:6} {row['part']:10} {row['what']:20} {phases['free']}+{phases['nudged']} "
        f"omega {phases['relaxation']} beta {phases['beta']} {phases['sweep']} "
        f"{phases['coordinates']}: median {np.round(cosines(row), 3)} mean "
        f"{np.mean(_all(row)[:, 0]):.3f} lowest {np.min(_all(row)[:, 0]):.3f} spikes "
        f"{row['spikes_free']:.2f} + {row['spikes_nudged']:.2f} sweeps {row['sweeps']:.1f}",
        flush=True,
    )


def precisions() -> Iterator[tuple[str, ep.Phases]]:
    """How exact the numbers of a gradient are, and its phases, long enough for most images."""
    for coordinates in ("displacement", "absolute"):
        for beta in (0.1, 1e-3, 1e-4):
            phases = replace(ALONE, free=60, nudged=40, beta=beta, coordinates=coordinates)
            yield "float64", phases
            yield "float32", phases
            yield "bfloat16 signals", replace(phases, nudged_signals="bfloat16")


def study(subject: Subject, journal: Journal) -> None:
    """All measurements of one subject."""
    for part, what, neuron, phases in points(subject.age):
        key = {"part": part, "what": what, "age": subject.age, "phases": to_json(phases)}
        row = journal.row(key, lambda n=neuron, p=phases: measure(subject, n, p))
        tell(row)
    if subject.age == "early":
        return
    few = subject.first(4)  # what rounding does is the same in every batch
    for what, phases in precisions():
        key = {"part": "precision", "what": what, "age": subject.age, "phases": to_json(phases)}
        tell(journal.row(key, lambda w=what, p=phases: measure(few, RATE, p, w == "float64")))


def _all(row: dict[str, Any]) -> np.ndarray:
    """Cosines ``[batches, layers]``; 0 where the estimate is nothing at all."""
    return np.nan_to_num(np.asarray(row["cosine"], float))


def cosines(row: dict[str, Any]) -> np.ndarray:
    """Cosine of each layer, median of the batches."""
    return np.median(_all(row), axis=0)


SETTINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "slowest": lambda r: f"1/{1 / p:.0f}" if (p := r["phases"]["stragglers"]) else "–",
    "limit": lambda r: r["phases"]["limit"] or "–",
    "ω": lambda r: r["phases"]["relaxation"],
    "β": lambda r: r["phases"]["beta"],
    "sweeps": lambda r: f"{r['sweeps']:.1f}",
}
"""A column of a table, and what it tells of a row."""


def table(rows: list[dict[str, Any]], parts: Sequence[str], settings: Sequence[str]) -> str:
    """The rows of some parts of the study, late in training, in Markdown."""
    cells = [
        (
            row["what"],
            *(SETTINGS[name](row) for name in settings),
            spaced(cosines(row), 3),
            spaced(_all(row).mean(0)),
            f"{_all(row).min():.2f}",
            f"{row['spikes_free']:.1f} + {row['spikes_nudged']:.1f}" if row["spikes_free"] else "–",
        )
        for row in rows
        if row["part"] in parts and row["age"] == "late"
    ]
    return markdown(("neurons", *settings, "median", "mean", "lowest", "spikes"), cells)


def grid(rows: list[dict[str, Any]], part: str, age: str, line: str, column: str) -> str:
    """The median of the worst layer against two settings, in Markdown."""

    def setting(row: dict[str, Any], name: str) -> str:
        phases = row["phases"]
        if name == "sweeps":
            return f"{phases['free']} + {phases['nudged']}"
        return str(row[name] if name in row else phases[name])

    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if (row["part"], row["age"]) == (part, age):
            cell = f"{cosines(row).min():.3f}"
            found.setdefault(setting(row, line), {})[setting(row, column)] = cell
    columns = list(next(iter(found.values())))
    return markdown(
        ("", *columns), ((name, *(of[c] for c in columns)) for name, of in found.items())
    )


def tables(folder: Path) -> dict[str, str]:
    """The tables of the study, by name, from its result in `folder`."""
    rows = json.loads((folder / "frontier.json").read_text())["rows"]
    displaced, absolute = (
        [row for row in rows if row["phases"]["coordinates"] == coordinates]
        for coordinates in ("displacement", "absolute")
    )
    return {
        "frontier_early": grid(rows, "sweeps", "early", "what", "sweeps"),
        "frontier_late": grid(rows, "sweeps", "late", "what", "sweeps"),
        "frontier_order": grid(rows, "order", "late", "sweep", "sweeps"),
        "frontier_stragglers": table(rows, ("stragglers", "limit"), ("slowest", "limit", "sweeps")),
        "frontier_relaxation": table(rows, ("relaxation",), ("ω",)),
        "frontier_beta": table(rows, ("beta",), ("β",)),
        "frontier_quantum": table(rows, ("quantum",), ()),
        "frontier_displaced": grid(displaced, "precision", "late", "what", "beta"),
        "frontier_absolute": grid(absolute, "precision", "late", "what", "beta"),
    }


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """The figures."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    columns = (("early", "sweeps"), ("late", "sweeps"), ("late", "spikes"))
    for axis, (age, against) in zip(axes, columns, strict=True):
        for i, name in enumerate(CODES):
            line = [r for r in rows if (r["part"], r["what"], r["age"]) == ("sweeps", name, age)]
            if against == "spikes" and name == "rate":
                continue
            x = [
                r["phases"]["free"] + r["phases"]["nudged"]
                if against == "sweeps"
                else r["spikes_free"]
                for r in line
            ]
            miss = [max(1 - cosines(r)[0], 1e-6) for r in line]
            axis.plot(x, miss, "o-", color=f"C{i}", label=name)
        label = "sweeps, free + nudged" if against == "sweeps" else "spikes a neuron, free phase"
        axis.set(xlabel=label, yscale="log", title=f"{age} in training")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="1 - cosine, lowest layer, median")
    axes[0].legend(fontsize=8)
    figure.savefig(out / "codes.png", dpi=150)


def main() -> None:
    """Parse, run, and say in one line what was wrong where the input was."""
    with command():
        run(tyro.cli(Arguments, description=__doc__))


def run(arguments: Arguments) -> None:
    """Measure, draw, write."""
    out = new_folder("out", arguments.out, "frontier.json")
    data = load("mnist", data_dir=arguments.data_dir)
    xs, ys = validation_batches(data, arguments.batches, 64)
    networks = {
        age: ep.load_weights(folder)
        for age, folder in (("early", arguments.early), ("late", arguments.late))
    }
    weights = {
        age: fingerprint(*jax.tree.leaves(params)) for age, (params, _, _) in networks.items()
    }
    journal = Journal(
        arguments.runs / "frontier.jsonl", {"batches": arguments.batches, "weights": weights}
    )
    for age, (params, spec, _) in networks.items():
        exact = exact_gradients(params, spec, xs, ys)
        study(Subject(age, spec, params, exact, xs, ys), journal)
    made = provenance()  # before files of the checkout change
    draw(journal.rows, out)
    statement = dataclasses.asdict(arguments)
    del statement["runs"], statement["out"], statement["data_dir"]
    statement |= {age: getattr(arguments, age).name for age in ("early", "late")}
    statement["neurons"] = {name: to_json(n) for name, n in CODES.items()}
    write_json(out / "frontier.json", plain(statement) | {"rows": journal.rows} | made)
    say(Console(), f"written to {out}")


if __name__ == "__main__":
    main()
