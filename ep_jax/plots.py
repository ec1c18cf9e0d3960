"""Figures of trainings and relaxations; functions that draw return a Matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ep_jax.diagnostics import GDU
from ep_jax.dynamics import UNSETTLED, free_phase
from ep_jax.extras import extra
from ep_jax.network import NetworkSpec, Params, energy
from ep_jax.phases import Phases
from ep_jax.relaxation import Snapshot

with extra("plot"):
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


class Relaxation(NamedTuple):
    """A free phase seen sweep by sweep, averaged (spikes: one example).

    Attributes:
        energy: mean energy ``[T]``.
        change: mean ``|s_{t+1} - s_t|``, ``[T]``.
        spikes: tuple over layers of the spikes ``[T, ...]`` of the first example.
    """

    energy: np.ndarray
    change: np.ndarray
    spikes: tuple[np.ndarray, ...]


def record_free_phase(
    params: Params, spec: NetworkSpec, phases: Phases, xs: jax.Array, key: jax.Array
) -> Relaxation:
    """Run the free phase on a few examples with a trace of what happens.

    Args:
        params: parameters of `spec`.
        spec: the network.
        phases: how it settles.
        xs: inputs ``[B, *spec.input_shape]``.
        key: random key, for stochastic neurons.
    """

    def one(x: jax.Array, key: jax.Array) -> Any:
        def look(now: Snapshot) -> Any:
            return energy(params, spec, x, now.state), now.change, now.spikes

        return free_phase(params, spec, x, phases, key, trace=look)[1].trace

    energies, changes, spikes = jax.jit(jax.vmap(one))(xs, jax.random.split(key, len(xs)))
    first = tuple(np.asarray(layer[0]) for layer in spikes)
    return Relaxation(np.asarray(energies.mean(0)), np.asarray(changes.mean(0)), first)


@mpl.rc_context(_STYLE)
def learning_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, errors and spikes against epochs.

    Args:
        history: the records of ``metrics.jsonl``, one an epoch.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, error, spikes = figure.subplots(1, 3)
    epochs = [record["epoch"] for record in history]
    count = max(1, len(history[0]["curve"]["loss"]))
    fine = np.arange(1, count * len(history) + 1) / count
    curve = {k: np.concatenate([r["curve"][k] for r in history]) for k in ("loss", "error")}
    loss.semilogy(fine, curve["loss"], label="loss")
    loss.semilogy(epochs, [r["residual"] for r in history], "o--", ms=3, label="residual")
    loss.set(title="training loss, residual of the free phase")
    _legend_below(loss)
    error.plot(fine, curve["error"], alpha=0.6, label="training, running")
    validation = [(r["epoch"], r["val_error"]) for r in history if r["val_error"] is not None]
    if validation:
        error.plot(*zip(*validation, strict=True), "o-", ms=3, label="validation")
    error.set_yscale("symlog", linthresh=1.0)  # logarithmic above 1 %, and shows 0
    error.set(ylabel="per cent", title="error", ylim=(0, None))
    _legend_below(error)
    for phase in ("free", "nudged"):
        totals = [r[f"spikes_{phase}"] for r in history]
        if any(totals):
            spikes.semilogy(epochs, totals, "o-", ms=3, label=f"{phase} phase")
    spikes.set(title="spikes per neuron and phase")
    if spikes.lines:
        _legend_below(spikes)
    for axis in (loss, error, spikes):
        axis.set(xlabel="epoch", xlim=(0, epochs[-1] * 1.02))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _legend_below(axis: Any) -> None:
    """A legend that covers nothing; the best place inside takes long to find, and may cover it."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)


@mpl.rc_context(_STYLE)
def layers(history: Sequence[Mapping[str, Any]]) -> Figure:
    """What each layer did in each epoch: residual and activity of its free phase, spikes.

    Args:
        history: the records of ``metrics.jsonl``.
    """
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    epochs = [record["epoch"] for record in history]
    shown = {
        "largest residual of the free phase": "residuals",
        "activity, mean |s|": "activity",
        "spikes per neuron, free phase": "spikes_free_per_layer",
    }
    for axis, (title, name) in zip(axes, shown.items(), strict=True):
        values = np.array([record[name] for record in history])
        for l, line in enumerate(values.T, start=1):
            axis.plot(epochs, line, "o-", ms=3, label=f"layer {l}")
        if (values > 0).all():
            axis.set_yscale("log")
        axis.set(title=title, xlabel="epoch", xlim=(0.5, epochs[-1] + 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].axhline(UNSETTLED, color="0.6", lw=0.8)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


@mpl.rc_context(_STYLE)
def confusion(answers: np.ndarray, labels: np.ndarray, classes: int) -> Figure:
    """How often each class was answered for each label.

    Args:
        answers: classes ``[N]``; -1 is no answer, and is not counted.
        labels: the right ones.
        classes: number of classes.
    """
    counts = np.zeros((classes, classes), int)
    there = answers >= 0
    np.add.at(counts, (labels[there], answers[there]), 1)
    side = float(np.clip(1.2 + 0.4 * classes, 3.2, 9.0))
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)  # a few mistakes are to be seen
    axis.grid(visible=False)
    axis.set(xlabel="answer", ylabel="label")
    if classes <= 20:
        axis.set(xticks=range(classes), yticks=range(classes))
        for row, column in np.argwhere(counts):
            colour = "white" if share[row, column] > 0.3 else "black"
            text = str(counts[row, column])
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


@mpl.rc_context(_STYLE)
def wrong(
    images: np.ndarray, answers: np.ndarray, labels: np.ndarray, shown: int = 32
) -> Figure | None:
    """Images that were answered wrongly; ``None`` where there are none, or they are no images.

    Args:
        images: ``[N, H, W, C]``.
        answers: classes ``[N]``.
        labels: the right ones.
        shown: how many at most, the first ones.
    """
    mistaken = np.flatnonzero(answers != labels)[:shown]
    if not len(mistaken) or images.ndim != 4:
        return None
    columns = min(8, len(mistaken))
    rows = -(-len(mistaken) // columns)
    figure = Figure(figsize=(1.2 * columns, 1.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, i in zip(axes, mistaken, strict=False):
        _show(axis, images[i])
        said = "none" if answers[i] < 0 else answers[i]
        axis.set_title(f"{labels[i]}, not {said}", fontsize=9)
    return figure


def _show(axis: Any, image: np.ndarray) -> None:
    """An image in its colours, or in grey where it has not three; a vector as a line."""
    if image.ndim != 3:
        axis.plot(image.ravel(), color="0.3", lw=1)
    elif image.shape[-1] == 3:
        low, high = image.min(), image.max()
        axis.imshow((image - low) / max(high - low, 1e-12) if image.dtype != np.uint8 else image)
    else:
        axis.imshow(image.mean(-1), cmap="gray_r")


@mpl.rc_context(_STYLE)
def relaxation(record: Relaxation) -> Figure:
    """Energy and change against sweeps of a free phase.

    The energy is shown above its last value: weak feedback weighs lower layers with
    ``alpha^(l - L)``, so its absolute size says little.

    Args:
        record: from `record_free_phase`.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sweeps = np.arange(1, len(record.energy) + 1)
    above = record.energy - record.energy[-1]
    left.plot(sweeps[:-1], above[:-1], "o-", ms=3)
    left.set_yscale("log" if (above[:-1] > 0).all() and len(above) > 1 else "symlog")
    left.set(xlabel="sweep", title="energy above its last value, $E_t - E_T$")
    right.semilogy(sweeps, np.maximum(record.change, 1e-12), "o-", ms=3)
    right.set(xlabel="sweep", title=r"change $\|s_{t+1} - s_t\|$")
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@mpl.rc_context(_STYLE)
def raster(spikes: Sequence[np.ndarray], image: np.ndarray, units: int = 60) -> Figure:
    """Spike raster of one free phase: the input, then for each layer up to `units` units.

    Args:
        spikes: tuple over layers of signed spikes ``[T, ...]``.
        image: the input ``[H, W, C]`` or ``[features]``.
        units: most units shown of each layer, evenly spaced among those that spike.
    """
    figure = Figure(figsize=(2.6 * (len(spikes) + 1), 3.2), layout="constrained")
    first, *rest = figure.subplots(1, len(spikes) + 1)
    _show(first, image)
    first.set(title="input", xticks=[], yticks=[])
    first.grid(visible=False)
    for l, (axis, layer) in enumerate(zip(rest, spikes, strict=True), start=1):
        flat = layer.reshape(len(layer), -1)
        activity = np.abs(flat).sum(0)
        active = np.flatnonzero(activity)
        shown = active[np.linspace(0, len(active) - 1, min(units, len(active)), dtype=int)]
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


@mpl.rc_context(_STYLE)
def filters(params: Params) -> Figure | None:
    """The kernels of the first layer; ``None`` where it is not a convolution.

    Args:
        params: parameters of a network.
    """
    w = np.asarray(params[0].get("w", 0.0))  # a layer of one's own may call its weights otherwise
    if w.ndim != 4:
        return None
    columns = min(8, w.shape[-1])
    rows = -(-w.shape[-1] // columns)
    size = (max(0.8 * columns, 2.6), 0.8 * rows + 0.5)  # the title has to fit as well
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle("kernels of the first layer")
    limit = float(np.abs(w).max()) or 1.0
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, axis in enumerate(axes):
        axis.axis("off")
        if i < w.shape[-1]:
            axis.imshow(w[:, :, :, i].mean(2), cmap="RdBu_r", vmin=-limit, vmax=limit)
    return figure


@mpl.rc_context(_STYLE)
def gdu(curves: GDU, shown: int = 4) -> Figure:
    """EP's updates (dashed) on BPTT's gradients (solid), sweep by sweep, for each layer.

    Args:
        curves: from `ep_jax.diagnostics.gdu`.
        shown: units (of any example) and weights drawn of each layer: those that are updated most.
    """
    depth = len(curves.ep_state)
    figure = Figure(figsize=(3.0 * depth, 5.4), layout="constrained")
    axes = figure.subplots(2, depth, squeeze=False)
    for l in range(depth):
        pairs = {
            "drive of a unit": (curves.ep_state[l], curves.bptt_state[l]),
            "weight": (curves.ep_params[l]["w"], curves.bptt_params[l]["w"]),
        }
        for axis, (what, pair) in zip(axes[:, l], pairs.items(), strict=True):
            ep, bptt = (np.asarray(a).reshape(len(a), -1) for a in pair)
            most = np.argsort(-np.abs(bptt).max(0))[:shown]
            sweeps = np.arange(1, len(ep) + 1)
            for i, unit in enumerate(most):
                axis.plot(sweeps, bptt[:, unit], color=f"C{i}", alpha=0.5, lw=3)
                axis.plot(sweeps, ep[:, unit], "--", color=f"C{i}", lw=1.2)
            axis.set_title(f"layer {l + 1}, {what}", loc="right", fontsize=10)
            axis.set(xlabel="sweep")
            axis.ticklabel_format(axis="y", scilimits=(-2, 2))
    axes[0, 0].plot([], [], color="0.4", alpha=0.5, lw=3, label="BPTT")
    axes[0, 0].plot([], [], "--", color="0.4", lw=1.2, label="EP")
    axes[0, 0].legend()
    return figure


@mpl.rc_context(_STYLE)
def agreement(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Cosine and norm ratio per layer of several gradients; every batch is a point.

    Args:
        results: for each name ``cosine`` and ``norm_ratio``, ``[batches, layers]``, as in
            `ep_jax.diagnostics.Agreement`.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, found) in enumerate(results.items()):
        cosine, ratio = np.asarray(found["cosine"]), np.asarray(found["norm_ratio"])
        layers = np.arange(1, cosine.shape[1] + 1) + 0.12 * (i - (len(results) - 1) / 2)
        for axis, values in ((left, 1 - cosine), (right, ratio)):
            axis.plot(np.tile(layers, len(values)), values.ravel(), ".", color=f"C{i}", alpha=0.4)
            axis.plot(layers, values.mean(0), "_", ms=12, mew=2, color=f"C{i}", label=name)
    left.set(yscale="log", title="1 - cosine with the exact gradient", xlabel="layer")
    right.set(yscale="log", title="norm over that of the exact gradient", xlabel="layer")
    right.axhline(1, color="0.6", lw=0.8)
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
