"""One training run, from a `Config` to the files it leaves.

This is where the pure functions of `ep_jax.training` are driven and where input and output happen.

Files in the run's folder: ``config.json``, ``metrics.jsonl`` (a line an epoch), ``checkpoints/``,
and, at the end, ``result.json``, ``weights.npz`` with ``network.json``, and ``figures/*.png``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from ep_jax import health, plots, training
from ep_jax.checkpoint import Checkpoints, save_weights
from ep_jax.data import Dataset, check_dataset, load, to_float
from ep_jax.descriptions import to_json
from ep_jax.diagnostics import (
    AMBIGUOUS,
    contractivity,
    feedback_answers,
    spikes_per_neuron,
    synaptic_operations,
)
from ep_jax.dynamics import PhaseInfo
from ep_jax.files import make_folder, write_atomically, write_json
from ep_jax.gradients import GRADIENTS
from ep_jax.network import NetworkSpec, Params
from ep_jax.optimizers import make_optimizer
from ep_jax.phases import Phases
from ep_jax.presets import Config, spec_of
from ep_jax.training import Augmentation, StepMetrics

Record = dict[str, Any]
"""What one epoch measured: a line of ``metrics.jsonl``."""


class StoppedError(Exception):
    """A run was asked to stop, and has saved what it had.

    Attributes:
        signal: number of the signal that asked.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def train(
    config: Config,
    out: str | os.PathLike[str],
    *,
    data: Dataset | None = None,
    resume: bool = False,
    on_epoch: Callable[[Record], None] | None = None,
    console: Console | None = None,
) -> Record:
    """Train as `config` says and write everything into `out`.

    The training images less the validation split are learned; the test images are read once, at the
    end, for the result.

    Args:
        config: the run.
        out: folder for its files.
        data: what to learn; by default what ``config.dataset`` names.
        resume: go on from the last checkpoint in `out`; start afresh where there is none.
        on_epoch: called after each epoch with what it measured, a line of ``metrics.jsonl``.
        console: where progress is shown.

    Returns:
        The result, as in ``result.json``.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is not asked for.
        ValueError: the configuration does not fit the data, or `out` holds another run's
            checkpoint.
        OSError: a file cannot be written; the last checkpoint stays.
        DivergedError: a state, gradient or parameter was not finite. The last checkpoint stays, no
            result is written.
        StoppedError: SIGTERM or Ctrl-C came. Where the run was, it can go on with `resume`.
    """
    out, console = Path(out), console or Console()
    if not resume and ((out / "metrics.jsonl").exists() or (out / "checkpoints").exists()):
        raise FileExistsError(f"out is {str(out)!r}, which holds a run; expected a new folder, or "
                              "--resume to go on with that run")  # fmt: skip
    if data is None:
        data = load(config.dataset, validation=config.validation, data_dir=config.data_dir)
    check_dataset(data)
    if config.augmentation != Augmentation() and data.train_images.ndim != 4:
        raise ValueError(f"augmentation is {config.augmentation} for examples of shape "
                         f"{data.train_images.shape[1:]}; expected none, or images "
                         "(H, W, C)")  # fmt: skip
    if config.train_images is not None:
        if config.train_images > len(data.train_images):
            raise ValueError(f"train_images is {config.train_images}; expected at most the "
                             f"{len(data.train_images)} there are")  # fmt: skip
        kept = slice(config.train_images)
        data = data._replace(
            train_images=data.train_images[kept], train_labels=data.train_labels[kept]
        )
    spec = spec_of(config, data.train_images.shape[1:], data.classes)
    place = placements(config.devices)
    plan = _batches(config, data, epoch=0)
    optimizer = optimizer_of(config, spec, config.epochs * plan.shape[0] * plan.shape[1])
    key = jax.random.key(config.seed)
    init_key, step_key, eval_key = jax.random.split(key, 3)
    state = training.init_train_state(init_key, spec, optimizer, config.gain)
    steps = training.make_train_steps(
        spec,
        config.phases,
        optimizer,
        augmentation=config.augmentation,
        gradient=GRADIENTS[config.gradient],
    )

    make_folder("out", out)
    checkpoints = Checkpoints(out / "checkpoints", to_json(config))
    history: list[Record] = []  # of epochs
    pieces: list[Record] = []  # of dispatches of the epoch under way
    if resume and (found := checkpoints.restore(state)) is not None:
        state, progress = found
        history, pieces = progress["history"], progress["pieces"]
        console.print(f"resumed in epoch {len(history) + 1}, after {len(pieces)} of {len(plan)} "
                      "dispatches")  # fmt: skip
    write_json(out / "config.json", to_json(config))

    state, images, labels, step_key = jax.device_put(
        (state, data.train_images, data.train_labels, step_key), place.everywhere
    )
    began = time.perf_counter()
    compiled = (
        jax.jit(steps, donate_argnums=0, out_shardings=place.everywhere)
        .lower(state, images, labels, jax.device_put(plan[0], place.batches), step_key)
        .compile()
    )
    compile_seconds = time.perf_counter() - began

    def save() -> None:
        done = len(history) * len(plan) + len(pieces)
        checkpoints.save(done, state, {"history": history, "pieces": pieces})

    warned: set[str] = set()
    with _heeding_signals() as asked, _progress(console, config.epochs, len(plan)) as report:
        for epoch in range(len(history) + 1, config.epochs + 1):
            for i, batches in enumerate(_batches(config, data, epoch)[len(pieces) :], len(pieces)):
                began = time.perf_counter()
                batches = jax.device_put(batches, place.batches)
                state, metrics = compiled(state, images, labels, batches, step_key)
                metrics = jax.device_get(metrics)
                seconds = time.perf_counter() - began
                health.check_finite(metrics, epoch, i * plan.shape[1])
                mean = jax.tree.map(lambda values: float(values.mean()), metrics)
                pieces.append(_record(mean, spec) | {"seconds": seconds})
                if asked:
                    save()
                    raise _stopped(asked[0], epoch, state)
                if i + 1 < len(plan):
                    report(epoch, i + 1, _describe(pieces[-1]))
            # Answers are computed on one device, and the parameters lie on all.
            params = jax.device_get(state.params)
            answers, _ = training.predict(
                params, spec, config.phases, data.validation_images, eval_key
            ) if len(data.validation_images) else (None, None)  # fmt: skip
            record = {"epoch": epoch, "step": int(state.step)} | _mean(pieces)
            record["val_error"] = (
                None if answers is None else training.error_rate(answers, data.validation_labels)
            )
            record["radius"] = _radius(params, spec, data)
            record["warnings"] = health.complaints(record, spec, config)
            record["seconds"] = sum(piece["seconds"] for piece in pieces)
            record["curve"] = {name: [p[name] for p in pieces] for name in ("loss", "error")}
            history.append(record)
            pieces = []
            # Before the checkpoint: what comes after it is not made again when a run resumes.
            lines = "".join(json.dumps(r, allow_nan=False) + "\n" for r in history)
            write_atomically(out / "metrics.jsonl", lines.encode())
            save()
            report(
                epoch,
                len(plan),
                _describe(record)
                + _shown("  val ", record["val_error"], " %")
                + _shown("  radius ", (record["radius"] or {}).get("largest"), spec=".2f"),
            )
            for kind in record["warnings"].keys() - warned:
                console.print(f"warning: {record['warnings'][kind]}", style="yellow")
            warned |= record["warnings"].keys()
            if on_epoch is not None:
                on_epoch(record)
            if asked and epoch < config.epochs:
                raise _stopped(asked[0], epoch, state)
    checkpoints.close()

    params = jax.device_get(state.params)
    result = {
        **evaluate(params, spec, config.phases, data, eval_key),
        "val_error": [r["val_error"] for r in history],
        "last_epoch": {name: v for name, v in history[-1].items() if name != "curve"},
        "seconds_per_epoch": float(np.median([r["seconds"] for r in history])),
        "compile_seconds": compile_seconds,
        "dataset": data.name,
        "seed": config.seed,
        "config": to_json(config),
        **provenance(),
    }
    save_weights(out, params, spec, config.phases)
    write_json(out / "result.json", result)
    _draw(out / "figures", params, spec, config.phases, data, history, eval_key)
    console.print(_summary(config, data.name, spec, result, out))
    return result


def divide_cpu(devices: int) -> None:
    """Make the cores of a CPU so many devices; GPUs and TPUs are what they are.

    It comes before JAX's first use, and does nothing after it.
    """
    with contextlib.suppress(RuntimeError):  # `placements` tells what is missing
        jax.config.update("jax_num_cpu_devices", devices)


class Placements(NamedTuple):
    """Where arrays lie when a batch is divided among devices.

    Attributes:
        everywhere: the same on all devices.
        examples: ``[B, ...]``, divided.
        batches: ``[steps, B]``, each step divided.
    """

    everywhere: NamedSharding
    examples: NamedSharding
    batches: NamedSharding


def placements(devices: int) -> Placements:
    """How to divide batches among so many devices; ``ValueError`` where there are fewer.

    Example:
        >>> x = jax.device_put(jnp.ones((4, 2)), placements(1).examples)
    """
    here = jax.local_devices()
    if devices > len(here):
        raise ValueError(
            f"devices is {devices}; expected at most the {len(here)} that JAX has here. "
            "The cores of a CPU are one device, unless "
            f"ep_jax.run.divide_cpu({devices}) comes before JAX's first use"
        )
    mesh = Mesh(here[:devices], ("batch",))
    axes = ((), ("batch",), (None, "batch"))
    return Placements(*(NamedSharding(mesh, PartitionSpec(*names)) for names in axes))


def optimizer_of(config: Config, spec: NetworkSpec, steps: int) -> optax.GradientTransformation:
    """The optimiser of `config` for a training of so many steps."""
    return make_optimizer(
        spec,
        config.optimizer,
        learning_rate=config.learning_rate,
        steps=steps,
        layer_rates=config.layer_rates,
        weight_decay=config.weight_decay,
        layer_decays=config.layer_decays,
        warmup=config.warmup,
        cap=config.cap,
        shrink=config.shrink,
    )


def evaluate(
    params: Params, spec: NetworkSpec, phases: Phases, data: Dataset, key: jax.Array | None = None
) -> Record:
    """Test error in per cent at the phases' free sweeps and at four times as many, and recurrence.

    The two errors agree where the answers come from an equilibrium and not from a transient. That
    they do not come from a feed-forward network, `recurrence_of` tells.

    Returns:
        ``test_error``, ``test_error_4x``; of one inference: ``spikes_per_neuron`` of each layer,
        and ``synaptic_operations``; and ``recurrence``.
    """
    answers, info = training.predict(params, spec, phases, data.test_images, key)
    answers_4x, _ = training.predict(params, spec, phases.longer(4), data.test_images, key)
    return {
        "test_error": training.error_rate(answers, data.test_labels),
        "test_error_4x": training.error_rate(answers_4x, data.test_labels),
        "spikes_per_neuron": [float(s) for s in info.spikes],
        "synaptic_operations": synaptic_operations(spec, info.spikes),
        "recurrence": recurrence_of(params, spec, data),
    }


def recurrence_of(
    params: Params, spec: NetworkSpec, data: Dataset, images: int = 2000, radii: int = 256
) -> Record:
    """What feedback does in a trained network: to the states and answers of its rate twin.

    On validation images, or on training images where there are none.

    Args:
        params: parameters.
        spec: the network.
        data: where the images come from.
        images: most images whose states and answers are looked at.
        radii: most images whose relaxation is looked at.

    Returns:
        ``feedback``; ``share`` of each layer's state that feedback makes; errors in per cent at the
        fixed point, ``error``, and in one pass from below with the feedback ``error_cut``, replaced
        by its mean over the images (``error_mean``) or by another image's (``error_other``);
        ``radius_mean`` and ``radius_largest`` of the relaxation, and the share of the images whose
        fixed point depends on the start, ``ambiguous``.
    """
    held_out = len(data.validation_images) > 0
    pixels = data.validation_images if held_out else data.train_images
    labels = (data.validation_labels if held_out else data.train_labels)[:images]
    xs = jnp.asarray(to_float(pixels[:images]))
    found = _answers_under(params, spec, xs)
    errors = {
        name: training.error_rate(np.asarray(answers), labels)
        for name, answers in zip(found._fields[1:], found[1:], strict=True)
    }
    relaxation = _relaxation(params, spec, xs[:radii])
    return {
        "feedback": spec.feedback,
        "share": [float(share) for share in found.share],
        "error": errors["own"],
        **{f"error_{name}": errors[name] for name in ("cut", "mean", "other")},
        "radius_mean": relaxation["mean"],
        "radius_largest": relaxation["largest"],
        "ambiguous": relaxation["ambiguous"],
        "images": len(xs),
    }


_answers_under = jax.jit(feedback_answers, static_argnames=("spec", "phases"))
_contractivity = jax.jit(
    functools.partial(contractivity, starts=1), static_argnames=("spec", "phases")
)


def provenance() -> Record:
    """Commit, versions and device: what made a result."""
    packages = ("jax", "jaxlib", "numpy", "optax", "ep_jax")
    device = jax.devices()[0]
    return {
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
        "device": f"{device.platform}: {device.device_kind}, {os.cpu_count()} CPU cores",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return "unknown"


def _commit() -> str:
    """The commit of the checkout this package lies in, marked where it has uncommitted changes."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _batches(config: Config, data: Dataset, epoch: int) -> np.ndarray:
    rng = np.random.default_rng([config.seed, epoch])
    return training.epoch_batches(
        rng, len(data.train_images), config.batch, config.steps_per_dispatch
    )


def _mean(pieces: list[Record]) -> Record:
    return {name: np.mean([p[name] for p in pieces], axis=0).tolist() for name in pieces[0]}


@contextlib.contextmanager
def _heeding_signals() -> Iterator[list[int]]:
    """A list to which SIGTERM and Ctrl-C add themselves, instead of ending the program.

    A second Ctrl-C ends it at once. A signal that is ignored stays so: background jobs of a script
    ignore Ctrl-C. Outside the main thread, where Python allows no handlers, the list stays empty.
    """
    asked: list[int] = []

    def heed(number: int, _: Any) -> None:
        if number in asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    heard = (n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN)
    before = {n: signal.signal(n, heed) for n in heard}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(number: int, epoch: int, state: training.TrainState) -> StoppedError:
    return StoppedError(
        f"stopped by {signal.Signals(number).name} in epoch {epoch}, after step {state.step}; "
        "saved, and goes on with --resume",
        number,
    )


def _record(mean: StepMetrics, spec: NetworkSpec) -> Record:
    record = {
        "loss": mean.loss,
        "error": mean.error,
        **_settled(mean.free, ""),
        "moving": mean.free.moving,
        "spikes_free": spikes_per_neuron(spec, mean.free.spikes),
        "spikes_nudged": 0.0,
        "spikes_free_per_layer": list(mean.free.spikes),
        "activity": list(mean.free.activity),
        "gradient_norm": list(mean.gradient_norm),
        "params_norm": list(mean.params_norm),
    }
    if mean.nudged is not None:
        record |= _settled(mean.nudged, "_nudged")
        record["activity_nudged"] = list(mean.nudged.activity)
        record["spikes_nudged"] = spikes_per_neuron(spec, mean.nudged.spikes)
        record["spikes_nudged_per_layer"] = list(mean.nudged.spikes)
    if mean.limited is not None:
        record["limited"] = mean.limited
    if mean.links is not None:
        record["link_norms"] = list(mean.links.norms)
        record["links_capped"] = mean.links.capped
    return record


def _settled(info: PhaseInfo, suffix: str) -> Record:
    """How well a phase settled: largest residual of a batch, its mean, share of unsettled images.

    ``residuals`` is the largest of each layer.
    """
    return {
        f"residual{suffix}": info.residual,
        f"residuals{suffix}": list(info.residuals),
        f"mean_residual{suffix}": info.mean_residual,
        f"unsettled{suffix}": info.unsettled,
    }


RADIUS_IMAGES = 16
"""Validation images on which the spectral radius is looked at after each epoch."""


def _radius(params: Params, spec: NetworkSpec, data: Dataset) -> Record | None:
    """Spectral radius of some validation images, and the share whose state depends on the start.

    ``None`` without validation images.
    """
    if not len(data.validation_images):
        return None
    xs = jnp.asarray(to_float(data.validation_images[:RADIUS_IMAGES]))
    return _relaxation(params, spec, xs) | {"images": len(xs)}


def _relaxation(params: Params, spec: NetworkSpec, xs: jax.Array) -> Record:
    """Spectral radius, ``mean`` and ``largest``; share of images with an ``ambiguous`` state."""
    found = _contractivity(params, spec, xs)
    return {
        "mean": float(found.radius.mean()),
        "largest": float(found.radius.max()),
        "ambiguous": float((found.disagreement > AMBIGUOUS).mean()),
    }


def _shown(name: str, value: float | None, unit: str = "", spec: str = ".3g") -> str:
    return "" if value is None else f"{name}{value:{spec}}{unit}"


def _describe(record: Record) -> str:
    return (
        f"loss {record['loss']:.4f}  error {record['error']:.2f} %  "
        f"residual {record['mean_residual']:.1e}"
        + _shown("+", record.get("mean_residual_nudged"), spec=".1e")
        + f"  unsettled {100 * record['unsettled']:.1f}"
        + _shown("+", _percent(record.get("unsettled_nudged")), spec=".1f")
        + f" %  spikes {record['spikes_free']:.2f}+{record['spikes_nudged']:.2f}"
        + _shown("  capped ", record.get("links_capped"), " links", ".1f")
        + _shown("  limited ", _percent(record.get("limited")), " %", ".1f")
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


Report = Callable[[int, int, str], None]


@contextlib.contextmanager
def _progress(console: Console, epochs: int, dispatches: int) -> Iterator[Report]:
    """A progress bar on a terminal; elsewhere a line a quarter of an epoch, fit for a log file."""
    if not console.is_terminal:

        def line(epoch: int, done: int, text: str) -> None:
            if done * 4 // dispatches > (done - 1) * 4 // dispatches:
                console.print(
                    f"epoch {epoch}/{epochs}  {done}/{dispatches}  {text}", soft_wrap=True
                )

        yield line
        return
    columns = (
        TextColumn("epoch {task.fields[epoch]}", table_column=Column(min_width=11, no_wrap=True)),
        BarColumn(8),
        TimeRemainingColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiled", total=epochs * dispatches, epoch=f"1/{epochs}")

        def move(epoch: int, done: int, text: str) -> None:
            completed = (epoch - 1) * dispatches + done
            bar.update(task, completed=completed, description=text, epoch=f"{epoch}/{epochs}")
            if done == dispatches:  # the bar forgets, and may be too narrow for all of it
                console.print(f"epoch {epoch}/{epochs}  {text}", soft_wrap=True)

        yield move


def _draw(
    folder: Path,
    params: Params,
    spec: NetworkSpec,
    phases: Phases,
    data: Dataset,
    history: list[Record],
    key: jax.Array,
) -> None:
    folder.mkdir(exist_ok=True)
    # Validation images: the test set is for the result alone.
    some = data.validation_images[:64] if len(data.validation_images) else data.train_images[:64]
    xs = jnp.asarray(to_float(some))
    seen = plots.record_free_phase(params, spec, phases, xs, key)
    figures = {
        "learning_curve": plots.learning_curve(history),
        "relaxation": plots.relaxation(seen),
        "raster": plots.raster(seen.spikes, some[0]),
        "filters": plots.filters(params),
    }
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=150)


_METHODS = {
    "ep": "Equilibrium Propagation",
    "bptt": "back-propagation through time",
    "implicit": "implicit differentiation",
}


def _summary(config: Config, dataset: str, spec: NetworkSpec, result: Record, out: Path) -> Table:
    validation = result["val_error"][-1]
    spikes = " ".join(f"{s:.2f}" for s in result["spikes_per_neuron"])
    method = _METHODS[config.gradient]
    table = Table(title=f"{dataset}: {type(config.neuron).__name__}, {method}", min_width=60)
    table.add_column("")
    table.add_column("result", justify="right")
    table.add_row("test error", f"{result['test_error']:.2f} %")
    table.add_row("test error at 4x the sweeps", f"{result['test_error_4x']:.2f} %")
    if validation is not None:
        table.add_row("validation error, last epoch", f"{validation:.2f} %")
    table.add_row("spikes per neuron and image, by layer", spikes)
    heard = result["recurrence"]
    share = " ".join(f"{s:.2f}" for s in heard["share"])
    radius = f"{heard['radius_mean']:.2f}, {heard['radius_largest']:.2f}"
    errors = [heard[name] for name in ("error", "error_cut", "error_other")]
    table.add_row(
        "feedback, share of each layer's state that it makes", f"{spec.feedback:g}; {share}"
    )
    table.add_row("spectral radius, mean and largest", radius)
    table.add_row(
        "validation error; feedback cut; another image's",
        "; ".join(f"{error:.2f} %" for error in errors),
    )
    nudged = f" + {config.phases.nudged} nudged" if config.gradient == "ep" else ""
    table.add_row("sweeps", f"{config.phases.free} free{nudged}")
    table.add_row("layers", " - ".join(str(s) for s in map(np.prod, spec.state_shapes)))
    table.add_row("seconds an epoch", f"{result['seconds_per_epoch']:.1f}")
    table.add_row("written to", str(out))
    return table
