"""The pictures of the documentation, each from a computation of the library.

    python docs/pictures.py            # all of them, into docs/images
    python docs/pictures.py codes      # one of them

`settling` shows the shipped MNIST network and needs MNIST (``TFDS_DATA_DIR``); the others need no
data.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

import ep_jax as ep
from ep_jax.data import load, to_float

HERE = Path(__file__).parent
INK, BLUE, RED, GREEN, GREY = "#22272e", "#2f6fb0", "#c8503c", "#2f8f5b", "#9aa3ad"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 144,
}


def bare(axis: Axes) -> None:
    """Without ticks and frame."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def settling(sweeps: int = 24) -> Figure:
    """The shipped MNIST network answers: of 64 validation images, one that takes long to decide."""
    params, spec, phases = ep.load_weights(HERE.parent / "pretrained" / "mnist")
    data = load("mnist")
    images, labels = to_float(data.validation_images[:64]), data.validation_labels[:64]
    phases = dataclasses.replace(phases.without_stragglers(), free=sweeps)

    @jax.jit
    @jax.vmap
    def run(x: jax.Array) -> Any:
        def look(now: ep.Snapshot) -> Any:
            spikes = [s.reshape(-1) for s in now.spikes]
            return now.state[-1], spikes, ep.energy(params, spec, x, now.state)

        return ep.free_phase(params, spec, x, phases, trace=look)[1].trace

    outputs, spikes, energies = jax.device_get(run(jnp.asarray(images)))
    right = outputs.argmax(-1) == labels[:, None]
    late = np.where(right[:, -1], sweeps - np.argmin(right[:, ::-1], 1), 0)
    late[right.all(1)] = 0
    chosen = int(late.argmax())
    output, energy = outputs[chosen], energies[chosen]

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    first, raster, falls, wins = figure.subplots(
        1, 4, gridspec_kw={"width_ratios": [0.8, 2.2, 1.2, 1.5]}
    )
    first.imshow(images[chosen, ..., 0], cmap="gray_r")
    bare(first)
    first.set_title("input")

    time = np.arange(1, sweeps + 1)
    bottom, shown = 0, 45
    for l, layer in enumerate(spikes, start=1):
        counts = layer[chosen]
        active = np.flatnonzero(np.abs(counts).sum(0))
        active = active[np.linspace(0, len(active) - 1, min(shown, len(active)), dtype=int)]
        for sign, colour in ((1, BLUE), (-1, RED)):
            when, who = np.nonzero(np.sign(counts[:, active]) == sign)
            size = 4.0 + 6.0 * (np.abs(counts[when, active[who]]) > 1)
            raster.scatter(time[when], bottom + who, s=size, c=colour, marker="|", linewidths=1.1)
        name = "output" if l == len(spikes) else f"layer {l}"
        raster.text(sweeps + 0.9, bottom + len(active) / 2, name, va="center", fontsize=8)
        bottom += len(active) + 8
    raster.set(xlim=(0.3, sweeps + 0.7), ylim=(-3, bottom), yticks=[], xlabel="sweep")
    raster.spines["left"].set_visible(False)
    raster.set_title("spikes (blue up, red down)")

    above = energy - energy[-1]
    falls.plot(time[:-1], np.maximum(above[:-1], 1e-7), color=INK, lw=1.5)
    falls.set(yscale="log", xlabel="sweep")
    falls.set_title("energy above its last value")

    winner = int(labels[chosen])
    order = np.argsort(output[-1])[::-1]
    rival = next(int(k) for k in order if k != winner)
    for k in range(output.shape[-1]):
        colour = BLUE if k == winner else RED if k == rival else GREY
        wins.plot(time, output[:, k], color=colour, lw=2 if colour != GREY else 0.8)
        if colour != GREY:
            wins.text(sweeps + 0.5, output[-1, k], f"{k}", color=colour, va="center", weight="bold")
    wins.set(xlabel="sweep")
    wins.set_title("the ten outputs")
    return figure


def two_units(weight: float, bias: float) -> tuple[ep.NetworkSpec, ep.Params]:
    """Two layers of one unit each, which excite each other by `weight`."""
    layers = (ep.Dense(1), ep.Dense(1))
    spec = ep.NetworkSpec((1,), layers, ep.Rate(), output="hard_sigmoid")
    one = jnp.ones((1, 1))
    params = (
        {"w": one, "b": jnp.array([bias])},
        {"w": weight * one, "b": jnp.array([bias])},
    )
    return spec, params


def landscape(spec: ep.NetworkSpec, params: ep.Params, grid: jax.Array) -> jax.Array:
    """Energy of two units on a grid of their states, without input."""

    def height(first: jax.Array, second: jax.Array) -> jax.Array:
        return ep.energy(params, spec, jnp.zeros(1), (first[None], second[None]))

    return jax.vmap(jax.vmap(height))(*jnp.meshgrid(grid, grid))


def energy() -> Figure:
    """Energy of two units, and the sweeps from several starts."""
    figure = Figure(figsize=(8, 3.7), layout="constrained")
    grid = jnp.linspace(0, 1, 81)
    cases = (
        (0.6, 0.25, "weak loop: one fixed point"),
        (2.0, -0.5, "strong loop: two fixed points"),
    )
    for axis, (weight, bias, title) in zip(figure.subplots(1, 2), cases, strict=True):
        spec, params = two_units(weight, bias)
        x = jnp.zeros(1)
        height = landscape(spec, params, grid)
        axis.contourf(grid, grid, height, levels=24, cmap="Blues_r", alpha=0.85)
        axis.contour(
            grid, grid, height, levels=24, colors="white", linewidths=0.4, linestyles="solid"
        )
        phases = ep.Phases(free=25)
        for start in ((0.02, 0.55), (0.98, 0.1), (0.1, 0.98), (0.45, 0.9), (0.75, 0.02)):
            begin = tuple(jnp.array([s]) for s in start)
            halves: list[tuple[float, float]] = [start]
            _, info = ep.free_phase(
                params, spec, x, phases, trace=lambda now: now.state, start=begin
            )
            for first, second in zip(*(np.asarray(s)[:, 0] for s in info.trace), strict=True):
                halves += [(first, halves[-1][1]), (first, second)]
            axis.plot(*zip(*halves, strict=True), color=INK, lw=1)
            axis.plot(*start, "o", color="white", mec=INK, ms=5)
            axis.plot(*halves[-1], "o", color=RED, ms=7, zorder=5, clip_on=False)
        axis.set(xlabel="state of layer 1", ylabel="state of layer 2", aspect="equal")
        axis.set_title(title)
    return figure


def small_network(activation: str, width: int = 24) -> Any:
    """A dense network of three layers, in double precision, with eight inputs and labels."""
    layers = (ep.Dense(width), ep.Dense(width), ep.Dense(5))
    spec = ep.NetworkSpec((12,), layers, ep.Rate(activation=activation))  # type: ignore[arg-type]
    params = ep.init_params(jax.random.key(3), spec, 0.5, jnp.float64)
    xs = jax.random.uniform(jax.random.key(4), (8, 12), jnp.float64)
    return spec, params, xs, jnp.arange(8) % 5


def distance(found: Any, exact: Any) -> float:
    """Relative distance of two gradients, all parameters together."""
    squares = lambda tree: sum(float(jnp.sum(a**2)) for a in jax.tree.leaves(tree))  # noqa: E731
    return (squares(jax.tree.map(jnp.subtract, found, exact)) / squares(exact)) ** 0.5


def estimators() -> Figure:
    """Error of EP's gradient against the nudge, for each estimator, and where the nudge pulls."""
    with jax.enable_x64(True):
        spec, params, xs, ys = small_network("tanh")
        phases = ep.Phases(free=120, nudged=120)
        exact, _ = ep.implicit_gradient(params, spec, xs, ys, phases)
        errors: dict[str, list[float]] = {}
        betas = [0.01, 0.03, 0.1, 0.3]
        for estimator in ("one_sided", "symmetric", "holomorphic"):
            for beta in betas:
                now = dataclasses.replace(phases, estimator=estimator, beta=beta)
                grads, _ = ep.ep_gradient(params, spec, xs, ys, now)
                errors.setdefault(estimator, []).append(distance(grads, exact))

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    moves, axis = figure.subplots(1, 2)
    spec, params = two_units(0.6, 0.25)
    grid = jnp.linspace(0, 1, 81)
    x, height = jnp.zeros(1), landscape(spec, params, grid)
    moves.contour(grid, grid, height, levels=20, colors=GREY, linewidths=0.6, linestyles="solid")
    free, _ = ep.free_phase(params, spec, x, ep.Phases(free=60))
    moves.axhline(0.1, color=GREEN, lw=1, ls="--")
    moves.text(0.98, 0.12, "target of layer 2", color=GREEN, ha="right")
    moves.plot(*(float(s[0]) for s in free), "o", color=INK, ms=8, label="free fixed point")
    for beta in (0.1, 0.2, 0.4, 0.8):
        state, _ = ep.nudged_phase(
            params, spec, x, jnp.array([0.1]), free, beta, ep.Phases(nudged=60)
        )
        place = tuple(float(s[0]) for s in state)
        moves.plot(*place, "o", color=RED, ms=5)
        moves.annotate(f"$\\beta$ = {beta}", place, (6, -9), textcoords="offset points", fontsize=8)
    moves.plot([], [], "o", color=RED, ms=5, label="nudged fixed points")
    moves.set(xlabel="state of layer 1", ylabel="state of layer 2", aspect="equal")
    moves.legend(loc="upper left")

    names = {"one_sided": "one-sided", "symmetric": "symmetric", "holomorphic": "holomorphic"}
    for (estimator, values), colour in zip(errors.items(), (RED, BLUE, GREEN), strict=True):
        axis.loglog(betas, np.maximum(values, 1e-16), "o-", color=colour, ms=4)
        axis.annotate(
            names[estimator],
            (betas[0], values[0]),
            (0, 6),
            textcoords="offset points",
            color=colour,
        )
    axis.set(xlabel=r"nudging strength $\beta$")
    axis.set_title("relative error of EP's gradient")
    return figure


def feedback() -> Figure:
    """One set of weights under feedback of any strength: radius, and share of the state."""
    spec = ep.NetworkSpec((12,), (ep.Dense(48), ep.Dense(48), ep.Dense(10)), ep.Rate())
    params = ep.init_params(jax.random.key(0), spec, 0.62)
    xs = jax.random.uniform(jax.random.key(1), (64, 12))
    alphas = np.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0])
    radii, shares = [], []
    for alpha in alphas:
        now = dataclasses.replace(spec, feedback=float(alpha))
        shares.append(np.asarray(ep.diagnostics.recurrence(params, now, xs).share))
        radii.append(np.asarray(ep.diagnostics.contractivity(params, now, xs, starts=1).radius))
    figure = Figure(figsize=(5.6, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.fill_between(alphas, np.min(radii, 1), np.max(radii, 1), color=BLUE, alpha=0.25, lw=0)
    left.plot(alphas, np.mean(radii, 1), "o-", color=BLUE, ms=4)
    left.axhline(1, color=RED, lw=1, ls="--")
    left.set_title("spectral radius (range over inputs)")
    for l, colour in enumerate((BLUE, GREEN, RED)):
        right.plot(alphas, np.array(shares)[:, l], "o-", color=colour, ms=4, label=f"layer {l + 1}")
    right.set_title("share of the state by feedback")
    right.legend()
    for axis in (left, right):
        axis.set(xscale="log", xlabel=r"feedback $\alpha$", ylim=(0, None))
    return figure


def relaxation() -> Figure:
    """Distance to the fixed point sweep by sweep, for orders of sweeps and over-relaxations."""
    with jax.enable_x64(True):
        spec = ep.NetworkSpec((12,), (ep.Dense(48), ep.Dense(48), ep.Dense(10)), ep.Rate())
        params = ep.init_params(jax.random.key(0), spec, 0.62, jnp.float64)
        x = jax.random.uniform(jax.random.key(1), (12,), jnp.float64)
        rest, _ = ep.free_phase(params, spec, x, ep.Phases(free=400))
        radius = float(ep.diagnostics.spectral_radius(params, spec, x, rest))
        best = ep.diagnostics.suggest_phases(params, spec, x[None]).relaxation
        cases = (
            ("synchronous", 1.0, GREY, "all layers at once"),
            ("ordered", 1.0, BLUE, "one after the other"),
            ("ordered", round(best, 2), RED, f"the same, over-relaxed, $\\omega$ = {best:.2f}"),
        )
        curves = []
        for sweep, omega, _, _ in cases:
            phases = ep.Phases(free=60, sweep=sweep, relaxation=omega)  # type: ignore[arg-type]
            _, info = ep.free_phase(params, spec, x, phases, trace=lambda now: now.state)
            steps = zip(info.trace, rest, strict=True)
            off = sum(np.sum((np.asarray(s) - np.asarray(r)) ** 2, -1) for s, r in steps)
            size = sum(np.sum(np.asarray(r) ** 2) for r in rest)
            curves.append(np.sqrt(off / size))
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for (_, _, colour, label), curve in zip(cases, curves, strict=True):
        axis.semilogy(np.arange(1, 61), np.maximum(curve, 1e-13), color=colour, lw=1.8, label=label)
    axis.axhline(1e-3, color=GREY, lw=0.8, ls="--")
    axis.set(xlabel="sweep", ylim=(1e-10, 1))
    axis.set_title(f"relative distance to the fixed point (spectral radius {radius:.2f})")
    axis.legend()
    return figure


def displacement() -> Figure:
    """What rounding leaves of the gradient in float32, in either coordinates."""
    with jax.enable_x64(True):
        spec, params, xs, ys = small_network("hard_sigmoid")
        phases = ep.Phases(free=150, nudged=150, estimator="one_sided")
        exact, _ = ep.implicit_gradient(params, spec, xs, ys, phases)
        single = jax.tree.map(lambda a: a.astype(jnp.float32), (params, xs))
        betas = 10.0 ** np.arange(-5, 0)
        errors: dict[str, list[float]] = {"absolute": [], "displacement": []}
        for coordinates, values in errors.items():
            for beta in betas:
                now = dataclasses.replace(phases, coordinates=coordinates, beta=float(beta))
                grads, _ = ep.ep_gradient(single[0], spec, single[1], ys, now)
                values.append(distance(jax.tree.map(lambda a: a.astype(float), grads), exact))
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for (name, values), colour in zip(errors.items(), (RED, BLUE), strict=True):
        axis.loglog(betas, values, "o-", color=colour, lw=1.8, ms=4, label=f"{name} coordinates")
    axis.set(xlabel=r"nudging strength $\beta$")
    axis.set_title("relative error of EP's gradient in float32")
    axis.legend()
    return figure


def codes() -> Figure:
    """A unit and what its receivers know of it; and a code that freezes beside one that cannot."""
    spec = ep.NetworkSpec((12,), (ep.Dense(48), ep.Dense(48), ep.Dense(10)))
    params = ep.init_params(jax.random.key(0), spec, 0.62)
    x = jax.random.uniform(jax.random.key(1), (12,))
    phases = ep.Phases(free=40)
    twin = ep.diagnostics.rate_twin(spec)
    rest, _ = ep.free_phase(params, twin, x, ep.Phases(free=400))

    def run(neuron: ep.DeltaCode) -> Any:
        now = dataclasses.replace(spec, neuron=neuron)
        return ep.free_phase(params, now, x, phases, trace=lambda seen: seen)[1].trace

    seen = run(ep.DeltaCode())
    frozen = run(ep.DeltaCode(quantum=0.7, decay=0.5))
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    spikes, shown = np.asarray(seen.spikes[1]), 16
    busy = (np.abs(spikes[:shown]).sum(0) + 4 * (spikes[:shown] < 0).sum(0)) * (spikes[0] != 0)
    unit = int(np.argmax(busy))
    time = np.arange(1, 41)
    state, sent = np.asarray(seen.state[1])[:, unit], np.asarray(seen.signals[1])[:, unit]
    left.plot(time[:shown], state[:shown], color=INK, lw=1.5, label="its activity")
    left.step(
        time[:shown], sent[:shown], where="mid", color=BLUE, lw=1.5, label="what its receivers know"
    )
    low, high = min(state.min(), sent.min()), max(state.max(), sent.max())
    floor, step = low - 0.25 * (high - low), 0.05 * (high - low)
    for t in np.flatnonzero(spikes[:shown, unit]):
        count = int(spikes[t, unit])
        colour = BLUE if count > 0 else RED
        left.plot([t + 1, t + 1], [floor, floor + step * abs(count)], color=colour, lw=2)
    left.text(0.2, floor + 2.4 * step, "spikes (blue up, red down)", fontsize=8)
    left.set(xlabel="sweep", xlim=(0, shown + 0.5))
    left.set_title("a unit of the second layer")
    left.legend(loc="center right")
    size = sum(np.sum(np.asarray(r) ** 2) for r in rest)
    for trace, colour, label in (
        (frozen, RED, "a quantum that halves by the clock"),
        (seen, BLUE, "a quantum that follows the gaps"),
    ):
        steps = zip(trace.state, rest, strict=True)
        off = sum(np.sum((np.asarray(s) - np.asarray(r)) ** 2, -1) for s, r in steps)
        right.semilogy(time, np.sqrt(off / size), color=colour, lw=1.8, label=label)
    right.set(xlabel="sweep")
    right.set_title("relative distance to the fixed point")
    right.legend()
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "energy": energy,
    "estimators": estimators,
    "feedback": feedback,
    "relaxation": relaxation,
    "displacement": displacement,
    "codes": codes,
    "settling": settling,
}


def main() -> None:
    """Draw those that are named, or all."""
    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        with mpl.rc_context(STYLE):
            file = folder / f"{name}.png"
            PICTURES[name]().savefig(file)
        drawn = Image.open(file).convert("RGB")  # a palette makes it a third of the size
        drawn.quantize(256, method=Image.Quantize.MAXCOVERAGE).save(file, optimize=True)
        print(file)


if __name__ == "__main__":
    main()
