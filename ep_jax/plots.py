"""Figures of trainings and relaxations; functions that draw return a Matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ep_jax.dynamics import Phases, Snapshot, free_phase
from ep_jax.network import NetworkSpec, Params, energy

mpl.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
)


class Relaxation(NamedTuple):
    """A free phase seen sweep by sweep, averaged (spikes: one example).

    Attributes:
        energy: mean energy ``[T]``.
        residual: mean ``|s_{t+1} - s_t|``, ``[T]``.
        spikes: tuple over layers of the spikes ``[T, ...]`` of the first example.
    """

    energy: np.ndarray
    residual: np.ndarray
    spikes: tuple[np.ndarray, ...]


def record_free_phase(
    params: Params, spec: NetworkSpec, phases: Phases, xs: jax.Array, key: jax.Array
) -> Relaxation:
    """Run the free phase on a few examples ``[B, ...]`` with a trace of what happens."""

    def one(x: jax.Array, key: jax.Array) -> Any:
        def look(now: Snapshot) -> Any:
            return energy(params, spec, x, now.state), now.residual, now.spikes

        return free_phase(params, spec, x, phases, key, trace=look)[1].trace

    energies, residuals, spikes = jax.jit(jax.vmap(one))(xs, jax.random.split(key, len(xs)))
    first = tuple(np.asarray(layer[0]) for layer in spikes)
    return Relaxation(np.asarray(energies.mean(0)), np.asarray(residuals.mean(0)), first)


def learning_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, errors, residual and spikes against epochs, from the records of ``metrics.jsonl``."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    loss, error, spikes = figure.subplots(1, 3)
    epochs = [record["epoch"] for record in history]
    marker = "o" if len(epochs) < 16 else None
    loss.semilogy(epochs, [r["loss"] for r in history], marker=marker, label="loss")
    loss.semilogy(epochs, [r["residual"] for r in history], "--", marker=marker, label="residual")
    loss.set(xlabel="epoch", title="training loss, residual of the free phase")
    loss.legend()
    error.plot(epochs, [r["error"] for r in history], "--", marker=marker, label="training")
    error.plot(epochs, [r["val_error"] for r in history], marker=marker, label="validation")
    error.set(xlabel="epoch", ylabel="per cent", title="error", ylim=(0, None))
    if len(epochs) > 1:  # the first epochs would hide all later ones
        later = [r[k] for r in history[len(epochs) // 4 :] for k in ("error", "val_error")]
        error.set_ylim(0, 1.3 * max(*later, 0.1))
    error.legend()
    for phase, style in (("free", "-"), ("nudged", "--")):
        totals = [r[f"spikes_{phase}"] for r in history]
        if np.any(totals):
            spikes.semilogy(epochs, totals, style, marker=marker, label=f"{phase} phase")
    spikes.set(xlabel="epoch", title="spikes per neuron and phase")
    if spikes.lines:
        spikes.legend()
    return figure


def relaxation(record: Relaxation) -> Figure:
    """Energy and residual against sweeps of a free phase."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sweeps = np.arange(1, len(record.energy) + 1)
    left.plot(sweeps, record.energy)
    left.set(xlabel="sweep", title="energy $E$")
    right.semilogy(sweeps, np.maximum(record.residual, 1e-12))
    right.set(xlabel="sweep", title=r"residual $\|s_{t+1} - s_t\|$")
    return figure


def raster(spikes: Sequence[np.ndarray], image: np.ndarray, units: int = 60) -> Figure:
    """Spike raster of one free phase: the input, then for each layer up to `units` units.

    Args:
        spikes: tuple over layers of signed spikes ``[T, ...]``.
        image: the input ``[H, W, C]``.
        units: units shown of each layer, those that spike most.
    """
    figure = Figure(figsize=(2.6 * (len(spikes) + 1), 3.2), layout="constrained")
    first, *rest = figure.subplots(1, len(spikes) + 1)
    first.imshow(image.mean(-1), cmap="gray_r")
    first.set(title="input", xticks=[], yticks=[])
    first.grid(visible=False)
    for l, (axis, layer) in enumerate(zip(rest, spikes, strict=True), start=1):
        flat = layer.reshape(len(layer), -1)
        activity = np.abs(flat).sum(0)
        shown = np.sort(np.argsort(-activity, kind="stable")[:units])
        for sign, colour in ((1, "tab:blue"), (-1, "tab:red")):
            times, who = np.nonzero(np.sign(flat[:, shown]) == sign)
            axis.scatter(times + 1, who, s=5, marker="|", c=colour, linewidths=1)
        axis.set(
            title=f"layer {l}: {activity.mean():.2f} spikes/unit",
            xlabel="sweep",
            xlim=(0.5, len(layer) + 0.5),
            ylim=(-1, len(shown)),
            yticks=[],
        )
    return figure


def filters(params: Params) -> Figure | None:
    """The kernels of the first layer; ``None`` where it is not a convolution."""
    w = np.asarray(params[0]["w"])
    if w.ndim != 4:
        return None
    columns = min(8, w.shape[-1])
    rows = -(-w.shape[-1] // columns)
    figure = Figure(figsize=(0.8 * columns, 0.8 * rows + 0.5), layout="constrained")
    figure.suptitle("kernels of the first layer")
    limit = float(np.abs(w).max()) or 1.0
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, axis in enumerate(axes):
        axis.axis("off")
        if i < w.shape[-1]:
            axis.imshow(w[:, :, :, i].mean(2), cmap="RdBu_r", vmin=-limit, vmax=limit)
    return figure
