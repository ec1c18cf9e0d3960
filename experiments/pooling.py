"""Average against max pooling, rate against spiking neurons, EP against BPTT.

    python experiments/pooling.py gradients --runs runs/pooling --out results/pooling
    python experiments/pooling.py train --runs runs/pooling --out results/pooling

The first compares EP's gradients with exact ones and measures what a max pool does to spikes, the
second trains. With ``--regimes contractive`` the same of networks at feedback 1 that settle. The
study is docs/studies/pooling.md.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import (
    ADAMW,
    STATIC,
    STUDIED,
    Journal,
    command,
    compare,
    exact_gradients,
    finite,
    interval,
    learn,
    plain,
)
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import ep_jax as ep
from ep_jax import diagnostics, network, training
from ep_jax.data import Dataset, load, to_float
from ep_jax.descriptions import to_json
from ep_jax.files import new_folder, write_json
from ep_jax.gradients import GRADIENTS
from ep_jax.optimizers import Muon, Settings
from ep_jax.presets import PRESETS
from ep_jax.provenance import provenance

NEURONS: dict[str, ep.Neuron] = {
    "rate": ep.Rate(),
    "sigma-delta": ep.SigmaDelta(),
    "sigma-delta, pool on traces": ep.SigmaDelta(decode="signal"),
    "delta code": ep.DeltaCode(
        quantum=0.7, decay=0.6, lag=1.0, nudged_quantum=0.5, nudged_decay=0.5
    ),
}
"""What the pool sees: the state, single spikes, decoded spikes, what a receiver knows."""
SELF_SCALING: dict[str, ep.Neuron] = {
    "delta code": ep.DeltaCode(),
    "closed loop": ep.DeltaCode(leak=True),
}
"""At feedback 1 a code on a schedule freezes: those that follow the gaps, of five levels and
binary."""


CONSTANT = ep.SigmaDelta(epsilon=0.1, epsilon_power=0.0, epsilon_floor=0.0, lam=0.275,
                         lam_power=0.0, lam_floor=0.0, nudged_epsilon=0.1)  # fmt: skip
"""Sigma-delta neurons that never come to rest: constant leak and step size."""


@dataclass(frozen=True)
class Regime:
    """A strength of feedback, how the network settles there and what trains it."""

    feedback: float
    analog: ep.Phases
    """Of rate neurons and delta codes."""
    binary: ep.Phases
    """Of binary spikes."""
    learning: ep.Phases
    """As `analog`, in trainings."""
    learning_rate: float
    """Peak rate, chosen on validation images."""
    optimizer: Settings = ADAMW
    weight_decay: float = PRESETS["mnist_weak"].weight_decay
    gain: float = 0.6
    """Scale of the initial weights."""


_TEXTBOOK = ep.Phases(
    free=25,
    nudged=20,
    beta=0.3,
    estimator="symmetric",
    sweep="alternating",
    coordinates="absolute",
)
_LEARNING = replace(PRESETS["mnist_weak"].phases, free=12, nudged=8, sweep="alternating")
_CONTRACTIVE = replace(PRESETS["mnist"].phases.without_stragglers(), free=20, nudged=12)

Name: TypeAlias = Literal["textbook", "weak", "contractive"]
REGIMES: dict[Name, Regime] = {
    # The papers' feedback in absolute coordinates; 5e-3 made BPTT of the rate network end at 20 %.
    "textbook": Regime(1.0, _TEXTBOOK, _TEXTBOOK, _TEXTBOOK, 2e-3),
    # Weak feedback, and what settles there.
    "weak": Regime(
        feedback=0.05,
        analog=replace(_LEARNING, free=9, nudged=6, sweep="ordered"),
        binary=PRESETS["mnist_sigma_delta_weak"].phases,
        learning=_LEARNING,
        learning_rate=5e-3,
    ),
    # The papers' feedback, kept contractive by Muon, in displacement coordinates.
    "contractive": Regime(
        feedback=1.0,
        analog=_CONTRACTIVE,
        binary=replace(_CONTRACTIVE, free=40, nudged=20, sweep="alternating", relaxation=1.3),
        learning=_CONTRACTIVE,
        learning_rate=1e-2,
        optimizer=Muon(),
        weight_decay=PRESETS["mnist"].weight_decay,
        gain=PRESETS["mnist"].gain,
    ),
}


def neurons_of(regime: Name, known: dict[str, ep.Neuron]) -> dict[str, ep.Neuron]:
    """Those of `known` with the codes of the regime."""
    return known | SELF_SCALING if regime == "contractive" else known


def phases_of(neuron: str, regime: Regime, learning: bool = False) -> ep.Phases:
    """How a network of these neurons settles."""
    if neuron in ("rate", "delta code"):
        return regime.learning if learning else regime.analog
    return regime.binary


Pool: TypeAlias = Literal["avg", "max"]
POOLS: tuple[Pool, ...] = ("avg", "max")


@dataclass(frozen=True)
class Budget:
    """The network and how it is trained: the same for all."""

    steps: int = 300
    """Optimisation steps."""
    batch: int = 64
    """Images in a step."""
    channels: tuple[int, int] = (8, 16)
    """Channels of the two 5x5 convolutions."""
    hidden: int = 64
    """Units of the hidden dense layer."""


def described(
    regimes: Sequence[Name], budget: Budget, neurons: dict[str, ep.Neuron]
) -> dict[str, Any]:
    """All that decides a result, as JSON."""
    found = {}
    for name in regimes:
        codes = {code: to_json(neuron) for code, neuron in neurons_of(name, neurons).items()}
        found[name] = {part: to_json(value) for part, value in vars(REGIMES[name]).items()}
        found[name]["neurons"] = codes
    return {"budget": dataclasses.asdict(budget), "regimes": found}


def network_of(budget: Budget, pool: Pool, neuron: ep.Neuron, feedback: float) -> ep.NetworkSpec:
    """Two convolutions with one kind of pool, one hidden dense layer."""
    convolutions = (ep.Conv(channels, 5, pool) for channels in budget.channels)
    layers = (*convolutions, ep.Dense(budget.hidden), ep.Dense(10))
    return ep.NetworkSpec((28, 28, 1), layers, neuron, feedback=feedback)


def train(
    budget: Budget,
    regime: Regime,
    spec: ep.NetworkSpec,
    phases: ep.Phases,
    gradient: training.Gradient,
    data: Dataset,
    seed: int,
) -> tuple[ep.Params, training.StepMetrics]:
    """Train from scratch within the budget."""
    return learn(
        spec,
        phases,
        gradient,
        data,
        steps=budget.steps,
        batch=budget.batch,
        learning_rate=regime.learning_rate,
        weight_decay=regime.weight_decay,
        gain=regime.gain,
        seed=seed,
        optimizer=regime.optimizer,
    )


@dataclass(frozen=True)
class Training:
    """Train every combination under one budget and tabulate the errors.

    A combination that has a row is not trained again.
    """

    runs: Path
    """Folder for the rows measured so far: an interrupted command goes on."""
    out: Path
    """Folder for training.json, the table."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and order of the images."""
    budget: Budget = field(default_factory=Budget)
    """What each training may use."""
    regimes: tuple[Name, ...] = ("textbook", "weak")
    """Strengths of feedback, and how the networks settle there."""
    data_dir: str | None = None
    """Where MNIST lies; by default TFDS_DATA_DIR."""

    def run(self) -> None:
        """Train what is missing, then tabulate."""
        out = new_folder("out", self.out, "training.json")
        data = load("mnist", data_dir=self.data_dir)
        decides = described(tuple(REGIMES), self.budget, NEURONS)
        journal = Journal(self.runs / "training.jsonl", decides)
        rows = []
        for cell in combinations(self.regimes):
            row = dataclasses.asdict(cell)
            for seed in self.seeds:
                key = dataclasses.asdict(cell) | {"seed": seed}
                found = journal.row(key, lambda at=(cell, seed): self._train(*at, data))
                print(found, flush=True)
                for name in found.keys() - key.keys():
                    row.setdefault(name, []).append(found[name])
            rows.append(row)
        Console().print(_training_table(rows))
        statement = described(self.regimes, self.budget, NEURONS) | {"seeds": self.seeds}
        write_json(out / "training.json", statement | {"rows": rows} | provenance())

    def _train(self, cell: Cell, seed: int, data: Dataset) -> dict[str, Any]:
        """Errors in per cent after training; ``None`` where it diverged."""
        regime = REGIMES[cell.regime]
        neuron = neurons_of(cell.regime, NEURONS)[cell.neuron]
        spec = network_of(self.budget, cell.pool, neuron, regime.feedback)
        phases = phases_of(cell.neuron, regime, learning=True)
        gradient = GRADIENTS[cell.gradient]
        params, metrics = train(self.budget, regime, spec, phases, gradient, data, seed)
        kept = finite(params)
        answers, info = training.predict(params, spec, phases, data.test_images)
        return {
            "test_error": training.error_rate(answers, data.test_labels) if kept else None,
            "last_loss": float(metrics.loss[-50:].mean()) if kept else None,
            "moving": float(info.moving) if kept else None,
        }


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    neuron: str
    pool: Pool
    gradient: str
    regime: Name


def combinations(regimes: Sequence[Name]) -> list[Cell]:
    """All cells: EP against BPTT for rates and the paper's spikes, EP alone for what repairs it."""
    cells = [
        Cell(neuron, pool, gradient, regime)
        for regime in regimes
        for neuron in neurons_of(regime, NEURONS)
        for pool in POOLS
        for gradient in ("ep", "bptt")
        if gradient == "ep" or neuron in ("rate", "sigma-delta")
    ]
    # An average pool does not care whether it acts on spikes or on traces.
    return [c for c in cells if not (c.pool == "avg" and c.neuron.endswith("traces"))]


def _training_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="MNIST error in per cent: mean ± standard deviation over seeds")
    for column in ("neuron", "pool", "gradient", "regime", "test error"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["neuron"],
            row["pool"],
            row["gradient"],
            row["regime"],
            _spread(row["test_error"]),
        )
    return table


def _spread(values: list[float | None]) -> str:
    kept = [v for v in values if v is not None]
    if len(kept) < len(values):
        return f"{len(values) - len(kept)} of {len(values)} diverged"
    return f"{np.mean(kept):.2f} ± {np.std(kept, ddof=1) if len(kept) > 1 else 0:.2f}"


CODES: dict[str, ep.Neuron] = {
    "rate": ep.Rate(),
    "constant": CONSTANT,
    "constant, pool on traces": replace(CONSTANT, decode="signal"),
    "decaying": ep.SigmaDelta(),
    "decaying, pool on traces": ep.SigmaDelta(decode="signal"),
    "delta code": STUDIED,
}
"""Rates, sigma-delta with constant and with decaying steps, and the delta code."""


@dataclass(frozen=True)
class Gradients:
    """EP's gradients against exact ones, and what a max pool does to spikes.

    Weights are random, or trained as rate networks with exact gradients, so that no neuron model is
    favoured.
    """

    runs: Path
    """Folder for the rows measured so far: an interrupted command goes on."""
    out: Path
    """Folder for gradients.json and the figures."""
    seeds: int = 5
    """Number of seeds of weights and images."""
    budget: Budget = field(default_factory=lambda: Budget(steps=150))
    """How the trained weights come about."""
    regimes: tuple[Name, ...] = ("textbook", "weak")
    """Strengths of feedback, and how the networks settle there."""
    data_dir: str | None = None
    """Where MNIST lies; by default TFDS_DATA_DIR."""

    def run(self) -> None:
        """Measure everything, print, draw, write."""
        out = new_folder("out", self.out, "gradients.json")
        data = load("mnist", data_dir=self.data_dir)
        decides = described(tuple(REGIMES), self.budget, CODES) | {"seeds": self.seeds}
        journal, rows = Journal(self.runs / "gradients.jsonl", decides), []
        for regime, pool, trained in itertools.product(self.regimes, POOLS, (False, True)):

            @functools.cache
            def cases(pool: Pool = pool, regime: Name = regime, trained: bool = trained) -> Any:
                return [self._case(pool, regime, trained, s, data) for s in range(self.seeds)]

            for code, sweeps in itertools.product(neurons_of(regime, CODES), ("few", "many")):
                if pool == "avg" and code.endswith("traces"):
                    continue
                if sweeps == "many" and code in ("rate", "delta code"):
                    continue  # they have settled
                key = {"regime": regime, "pool": pool, "trained": trained}
                key |= {"neuron": code, "sweeps": sweeps}
                row = journal.row(
                    key,
                    lambda cases=cases, at=(pool, regime, code, sweeps): _measure(
                        self.budget, *at, cases()
                    ),
                )
                print(_line(row), flush=True)
                rows.append(row)
        statement = described(self.regimes, self.budget, CODES) | {"seeds": self.seeds}
        write_json(out / "gradients.json", statement | {"rows": rows} | provenance())
        _draw_gradients(rows, self.regimes).savefig(out / "gradients.png", dpi=150)
        _draw_mechanism(rows).savefig(out / "mechanism.png", dpi=150)

    def _case(self, pool: Pool, name: Name, trained: bool, seed: int, data: Dataset) -> Case:
        regime = REGIMES[name]
        spec = network_of(self.budget, pool, ep.Rate(), regime.feedback)
        if trained:
            relaxation = regime.analog.relaxation
            settled = ep.Phases(free=30, sweep="alternating", relaxation=relaxation)
            gradient = functools.partial(ep.implicit_gradient, max_sweeps=60)
            params, _ = train(self.budget, regime, spec, settled, gradient, data, seed)
        else:
            params = ep.init_params(jax.random.key(seed), spec, regime.gain)
        picked = np.random.default_rng(seed).choice(len(data.validation_images), 64, replace=False)
        xs = np.asarray(to_float(data.validation_images[picked]))
        ys = data.validation_labels[picked]
        (exact,) = exact_gradients(params, spec, xs[None], ys[None])
        twin = jax.jit(jax.vmap(lambda x: ep.free_phase(params, spec, x, diagnostics.SETTLED)[0]))(
            xs
        )
        first = jax.tree.map(lambda s: s[:8], twin)
        radius = jax.vmap(lambda x, s: diagnostics.spectral_radius(params, spec, x, s))
        return Case(params, xs, ys, exact, twin, float(radius(xs[:8], first).max()))


class Case(NamedTuple):
    """Weights, images, labels; the rate network's exact gradient, states and spectral radius."""

    params: ep.Params
    xs: np.ndarray
    ys: np.ndarray
    exact: ep.Params
    twin: ep.State
    radius: float


def _measure(
    budget: Budget, pool: Pool, name: Name, code: str, sweeps: str, cases: list[Case]
) -> dict[str, Any]:
    """Agreement with the exact gradient and the mechanism, one number for each seed."""
    regime = REGIMES[name]
    spec = network_of(budget, pool, neurons_of(name, CODES)[code], regime.feedback)
    phases = phases_of(code, regime)
    if sweeps == "many":
        phases = replace(phases, free=4 * phases.free, nudged=3 * phases.nudged)
    gradient = jax.jit(ep.ep_gradient, static_argnames=STATIC)
    look = jax.jit(_mechanism, static_argnames=STATIC)
    found: dict[str, list[Any]] = {}
    for case in cases:
        grads, info = gradient(case.params, spec, case.xs, case.ys, phases)
        agreement = compare(grads, case.exact)
        seen = {
            "cosine": float(agreement.total_cosine),
            "norm_ratio": float(agreement.total_norm_ratio),
            "layer_cosines": np.asarray(agreement.cosine).tolist(),
            "moving": float(info.free.moving),
            "spectral_radius": case.radius,
        }
        seen |= plain(look(case.params, spec, case.xs, case.twin, phases))
        for name, value in seen.items():
            found.setdefault(name, []).append(value)
    return {"phases": to_json(phases)} | found


LAST = 10
"""Sweeps at the end of the free phase in which the mechanism is observed."""


def _mechanism(
    params: ep.Params, spec: ep.NetworkSpec, xs: jax.Array, twin: ep.State, phases: ep.Phases
) -> dict[str, jax.Array]:
    """What the second layer's pool does in the last sweeps of the free phase, mean of a batch.

    Returns:
        ``bias``: mean over time of the drive that the pool makes of its signals, less the drive it
        makes of the read-out of the same neurons, mean over units, relative to that drive's
        root-mean-square; ``bias_rms`` the root-mean-square over units of the same;
        ``winner_moves``: share of the windows whose winner changes in a sweep (0 for an average
        pool); ``routed_wrong``: share of time in which the winner is not that of the read-out;
        ``state_error``: distance from the rate network's fixed point `twin`, relative, per layer.
    """
    prepared, edge = network.prepare(params, spec), spec.edges[1]

    def seen_by_pool(state: ep.State) -> tuple[jax.Array, jax.Array]:
        packed = network.pack(spec, state)
        pooled = network.drive(spec, prepared, edge, packed[0])
        behind = network.context(spec, prepared, edge, packed[0])  # of a max pool: by position
        if behind is None:
            return pooled, jnp.zeros(pooled.shape, jnp.int32)
        return pooled, behind.argmax(0)

    def one(x: jax.Array) -> tuple[Any, ...]:
        state, info = ep.free_phase(
            params, spec, x, phases, trace=lambda now: seen_by_pool(now.signals)
        )
        pooled, winners = (seen[-LAST:] for seen in info.trace)
        true, true_winners = seen_by_pool(state)
        # Equal windows (all silent) have no winner to speak of.
        moves = jnp.mean(winners[1:] != winners[:-1])
        wrong = jnp.mean(winners != true_winners[None])
        return state, pooled.mean(0) - true, true, moves, wrong

    states, gap, true, moves, wrong = jax.vmap(one)(xs)
    errors = [
        jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(b**2)) for a, b in zip(states, twin, strict=True)
    ]
    scale = jnp.sqrt(jnp.mean(true**2))
    return {
        "bias": jnp.mean(gap) / scale,
        "bias_rms": jnp.sqrt(jnp.mean(gap**2)) / scale,
        "winner_moves": jnp.mean(moves),
        "routed_wrong": jnp.mean(wrong),
        "state_error": jnp.stack(errors),
    }


def _line(row: dict[str, Any]) -> str:
    def show(name: str) -> str:
        mean, half = interval(row[name])
        return f"{name} {mean:.3f} ± {half:.3f}"

    names = ("cosine", "norm_ratio", "winner_moves", "routed_wrong", "bias", "bias_rms")
    where = "trained" if row["trained"] else "initial"
    head = f"{row['regime']}, {row['pool']}, {where}, {row['neuron']}, {row['sweeps']}"
    return f"{head}: " + ", ".join(map(show, names))


def _codes(rows: list[dict[str, Any]]) -> list[str]:
    """The codes of the rows, in their order."""
    return list(dict.fromkeys(row["neuron"] for row in rows))


def _draw_gradients(rows: list[dict[str, Any]], regimes: Sequence[Name]) -> Figure:
    """Total cosine of every code, with confidence intervals; one panel for regime and weights."""
    figure = Figure(figsize=(11, 0.5 + 3 * len(regimes)), layout="constrained")
    axes = figure.subplots(len(regimes), 2, sharex=True, sharey=True, squeeze=False)
    names = _codes(rows)
    for (i, regime), (j, trained) in itertools.product(
        enumerate(regimes), enumerate((False, True))
    ):
        axis = axes[i, j]
        for pool, colour in zip(POOLS, ("tab:blue", "tab:red"), strict=True):
            for sweeps, mark in (("few", "o"), ("many", "s")):
                chosen = [
                    r
                    for r in rows
                    if (r["regime"], r["trained"], r["pool"], r["sweeps"])
                    == (regime, trained, pool, sweeps)
                ]
                places = [names.index(r["neuron"]) for r in chosen]
                shift = (0.1 if pool == "max" else -0.1) + (0.05 if sweeps == "many" else -0.05)
                means, halves = zip(*(interval(r["cosine"]) for r in chosen), strict=True)
                axis.errorbar(
                    np.array(places) + shift,
                    means,
                    halves,
                    fmt=mark,
                    ms=5,
                    color=colour,
                    mfc=colour if sweeps == "few" else "white",
                    label=f"{pool} pool, {sweeps} sweeps",
                    capsize=2,
                )
        axis.set(title=f"{regime}, {'trained' if trained else 'initial'} weights")
        axis.axhline(1, color="0.7", lw=0.8)
        axis.set_xticks(range(len(names)), [n.replace(", ", ",\n") for n in names], fontsize=8)
        axis.set_ylabel("cosine with the exact gradient")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    return figure


def _draw_mechanism(rows: list[dict[str, Any]]) -> Figure:
    """The cosine against what the pool does to its signals."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    names = {
        "bias": "mean error of the pooled drive / its rms",
        "winner_moves": "share of winners that move in a sweep",
        "routed_wrong": "share of time the wrong unit wins",
    }
    for axis, (name, label) in zip(figure.subplots(1, 3, sharey=True), names.items(), strict=True):
        for pool, mark in (("avg", "o"), ("max", "^")):
            for i, code in enumerate(_codes(rows)):
                chosen = [r for r in rows if r["pool"] == pool and r["neuron"] == code]
                axis.plot(
                    [np.mean(r[name]) for r in chosen],
                    [np.mean(r["cosine"]) for r in chosen],
                    mark,
                    color=f"C{i}",
                    alpha=0.7,
                    label=f"{code}, {pool}" if chosen else None,
                )
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    figure.axes[0].set(ylabel="cosine with the exact gradient")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8
    )
    return figure


def main() -> None:
    """Parse, run, and say in one line what was wrong where the input was."""
    with command():
        tyro.extras.subcommand_cli_from_dict({"gradients": Gradients, "train": Training}).run()


if __name__ == "__main__":
    main()
