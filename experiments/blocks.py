"""Equilibrium blocks with batch norm between them, trained end to end by three derivative rules.

    python experiments/blocks.py --out results/blocks/digits
    python experiments/blocks.py --dataset fashion_mnist --rules ep --epochs 5 \\
        --augmentation.flip --runs runs/blocks --out results/blocks/fashion_mnist

A block is a convergent recurrent network of two layers at feedback 1 (`ep_jax.nnx`): the first one
of convolutions, the second one dense. What comes before and after it is feed-forward, so the model
is a feedforward-tied energy-based model (Nest & Ernoult 2024, arXiv:2409.06108). Its gradient
chains: what a block's rule says of its inputs is the cotangent of the block below. Of each rule the
table tells the errors, the seconds and the temporary memory of a training step, and of each block
the mean residual of its free phase, the share of its states that feedback makes and its largest
spectral radius.

A block of two layers has one link in its loop, so its radius is at most that link's norm. After
each step the link is scaled to the norm `--strength` (Miyato et al. 2018, arXiv:1802.05957, do so
with a discriminator's layers). Below 1 each image has one fixed point, near which few sweeps come;
and the training can't do away with the feedback. What this costs elsewhere, the size of the
outputs, the batch norm after each block takes away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from common import command, muon, plain
from flax import nnx
from rich.table import Table

import ep_jax as ep
from ep_jax import diagnostics, network, training
from ep_jax.checkpoint import Checkpoints
from ep_jax.data import Dataset, load, to_float
from ep_jax.descriptions import to_json
from ep_jax.files import fingerprint, new_folder, write_json
from ep_jax.nnx import Equilibrium
from ep_jax.optimizers import link_norms
from ep_jax.presets import NEURONS
from ep_jax.progress import RunConsole
from ep_jax.provenance import provenance
from ep_jax.tables import spaced
from ep_jax.training import Augmentation

RULES: dict[str, ep.Derivative] = {"ep": ep.EP(), "bptt": ep.BPTT(), "implicit": ep.Implicit()}


@dataclass(frozen=True)
class Settings:
    """Which blocks, and how they are trained."""

    out: Path
    """Folder for the result."""
    runs: Path | None = None
    """Folder for checkpoints, one an epoch: an interrupted command goes on."""
    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits"
    """Images to learn."""
    data_dir: str | None = None
    """Where the data lie, see experiments/train.py."""
    rules: tuple[Literal["ep", "bptt", "implicit"], ...] = ("ep", "bptt", "implicit")
    """Derivative rules, each of which trains a model from the same start."""
    channels: tuple[int, int] = (32, 64)
    """Channels of the block of convolutions; each of them halves height and width."""
    units: tuple[int, int] = (256, 128)
    """Units of the dense block."""
    neuron: Literal["rate", "sigma_delta", "delta_code"] = "delta_code"
    """Neuron model of all blocks."""
    phases: ep.Phases = field(
        default_factory=lambda: ep.Phases(
            free=12, nudged=8, beta=0.02, estimator="one_sided", relaxation=1.4
        )
    )
    """How the blocks settle."""
    epochs: int = 20
    """Passes over the training images."""
    batch: int = 32
    """Images in a step."""
    train_images: int | None = None
    """Learn from the first so many training images only."""
    learning_rate: float = 0.004
    """Peak rate of Muon; it decays to 0 along a cosine."""
    weight_decay: float = 0.5
    """Decoupled weight decay of the matrices."""
    gain: float = 0.3
    """Scale of the initial weights."""
    strength: float = 0.95
    """Norm of the link between the layers of a block; from 1 on it proves nothing."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """How the training images are varied."""
    seed: int = 0
    """Seed of weights and order of the images."""


def specs_of(
    input_shape: tuple[int, ...],
    channels: tuple[int, int],
    units: tuple[int, int],
    neuron: ep.Neuron,
) -> list[ep.NetworkSpec]:
    """Two blocks at feedback 1, of two convolutions and of two dense layers."""

    def block(below: tuple[int, ...], *layers: ep.Layer) -> ep.NetworkSpec:
        return ep.NetworkSpec(below, layers, neuron, feedback=1.0, output=neuron.activation)

    lower, upper = channels
    first = block(input_shape, ep.Conv(lower, 5, padding="SAME"), ep.Conv(upper, 3, padding="SAME"))
    return [first, block(first.state_shapes[-1], *map(ep.Dense, units))]


class Blocks(nnx.Module):
    """A batch norm and an equilibrium block for each of `specs`; a batch norm and the head."""

    def __init__(
        self,
        specs: Sequence[ep.NetworkSpec],
        classes: int,
        phases: ep.Phases,
        rule: ep.Derivative,
        gain: float = 0.3,
        dtype: Any = jnp.float32,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        def norm(shape: tuple[int, ...]) -> nnx.BatchNorm:
            return nnx.BatchNorm(shape[-1], momentum=0.9, param_dtype=dtype, dtype=dtype, rngs=rngs)

        self.norms = nnx.List(norm(spec.input_shape) for spec in specs)
        self.blocks = nnx.List(
            Equilibrium(spec, phases, rule, gain=gain, dtype=dtype, rngs=rngs) for spec in specs
        )
        top = specs[-1].state_shapes[-1]
        self.last_norm = norm(top)
        self.head = nnx.Linear(math.prod(top), classes, param_dtype=dtype, dtype=dtype, rngs=rngs)

    def __call__(self, xs: jax.Array) -> tuple[jax.Array, list[ep.PhaseInfo]]:
        """Logits of images, and how the free phase of each block ended."""
        infos = []
        for norm, body in zip(self.norms, self.blocks, strict=True):
            xs, info = body.with_info(norm(xs))
            infos.append(info)
        return self.head(self.last_norm(xs).reshape(len(xs), -1)), infos

    def inputs(self, xs: jax.Array) -> list[jax.Array]:
        """What enters each block."""
        entering = []
        for norm, body in zip(self.norms, self.blocks, strict=True):
            entering.append(norm(xs))
            xs = body(entering[-1])
        return entering


class Told(NamedTuple):
    """What a training step tells: the loss, and the mean residual of each block."""

    loss: jax.Array
    residuals: list[jax.Array]


def hold(model: Blocks, strength: float) -> None:
    """Scale the link of each block to the norm `strength`."""
    for body in model.blocks:
        [norm] = link_norms(body.params, body.spec, iterations=20)
        link = body.layers[1]["w"]
        link[...] *= strength / norm


def make_step(augmentation: Augmentation, strength: float) -> Any:
    """``(model, optimizer, images, labels, key) -> Told``, compiled: one step on uint8 images."""

    def step(model: Blocks, optimizer: Any, images: jax.Array, labels: jax.Array, key: Any) -> Told:
        xs = training.augment(key, to_float(images), augmentation)

        def loss(model: Blocks) -> tuple[jax.Array, list[ep.PhaseInfo]]:
            logits, infos = model(xs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), infos

        (value, infos), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, grads)
        hold(model, strength)
        return Told(value, [info.mean_residual for info in infos])

    return nnx.jit(step, donate_argnums=(0, 1))


@nnx.jit
def answers(model: Blocks, images: np.ndarray) -> jax.Array:
    """The classes of uint8 images."""
    return network.classify(model(jnp.asarray(to_float(images)))[0])


def error(model: Blocks, images: np.ndarray, labels: np.ndarray, batch: int = 500) -> float:
    """Share of wrong answers, in per cent; what is left of whole batches is a batch of its own."""
    parts = [answers(model, images[i : i + batch]) for i in range(0, len(images), batch)]
    return training.error_rate(np.concatenate(parts), labels)


def train(settings: Settings, data: Dataset, rule: str, console: RunConsole) -> dict[str, Any]:
    """Train a model by one rule; what the table tells of it."""
    model = Blocks(
        specs_of(
            data.train_images.shape[1:],
            settings.channels,
            settings.units,
            NEURONS[settings.neuron](),
        ),
        data.classes,
        settings.phases,
        RULES[rule],
        settings.gain,
        rngs=nnx.Rngs(settings.seed),
    )
    hold(model, settings.strength)

    def order(epoch: int) -> np.ndarray:
        """The images of each step ``[steps, batch]``."""
        rng = np.random.default_rng([settings.seed, epoch])
        return training.epoch_batches(rng, len(data.train_images), settings.batch, 10**9)[0]

    first_epoch = order(0)
    steps = len(first_epoch)
    optimizer = nnx.Optimizer(
        model,
        muon(settings.learning_rate, settings.epochs * steps, settings.weight_decay),
        wrt=nnx.Param,
    )
    step, key = make_step(settings.augmentation, settings.strength), jax.random.key(settings.seed)
    first = first_epoch[0]
    compiled = step.lower(
        model, optimizer, data.train_images[first], data.train_labels[first], key
    ).compile()
    analysis = compiled.memory_analysis()
    epochs: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if settings.runs is not None:
            identity = described(settings) | {"data": fingerprint(*data[1:])}
            del identity["rules"]  # each has a folder of its own
            checkpoints = Checkpoints(settings.runs / rule, identity)
            stack.callback(checkpoints.close)
            epochs = resumed(checkpoints, model, optimizer)
        for epoch in range(len(epochs), settings.epochs):
            model.train()
            seconds, told = [], []
            for i, batch in enumerate(order(epoch)):
                began = time.perf_counter()
                own = jax.random.fold_in(key, epoch * steps + i)
                images, labels = data.train_images[batch], data.train_labels[batch]
                told.append(jax.block_until_ready(compiled(model, optimizer, images, labels, own)))
                seconds.append(time.perf_counter() - began)
            model.eval()
            record = {
                "loss": float(np.mean([t.loss for t in told])),
                "residuals": [float(r) for r in told[-1].residuals],
                "val_error": error(model, data.validation_images, data.validation_labels),
                "step_seconds": float(np.median(seconds)),
            }
            epochs.append(record)
            if checkpoints is not None:
                checkpoints.save(epoch, arrays(model, optimizer), {"epochs": epochs})
            residuals = " ".join(f"{r:.1e}" for r in record["residuals"])
            console.print(f"{rule}  epoch {epoch + 1}/{settings.epochs}  loss "
                          f"{record['loss']:.3f}  residuals {residuals}  val "
                          f"{record['val_error']:.2f} %")  # fmt: skip
    model.eval()
    return {
        "rule": rule,
        "test_error": error(model, data.test_images, data.test_labels),
        "val_error": [e["val_error"] for e in epochs],
        "step_seconds": float(np.median([e["step_seconds"] for e in epochs])),
        "temporary_bytes": getattr(analysis, "temp_size_in_bytes", None),
        "residuals": epochs[-1]["residuals"],
        **recurrence(model, data.validation_images[:128]),
    }


def arrays(model: Blocks, optimizer: Any) -> list[jax.Array]:
    """All that a training changes."""
    return jax.tree.leaves(nnx.state((model, optimizer)))


def resumed(checkpoints: Checkpoints, model: Blocks, optimizer: Any) -> list[dict[str, Any]]:
    """Take up the last checkpoint; the records of the epochs until then."""
    found = checkpoints.restore(arrays(model, optimizer))
    if found is None:
        return []
    leaves, done = found
    form = jax.tree.structure(nnx.state((model, optimizer)))
    nnx.update((model, optimizer), jax.tree.unflatten(form, leaves))
    return done["epochs"]


def recurrence(model: Blocks, images: np.ndarray) -> dict[str, Any]:
    """Of each block: the share of its states that feedback makes, and its largest radius."""
    found: dict[str, Any] = {"share": [], "radius": []}
    for body, xs in zip(model.blocks, model.inputs(jnp.asarray(to_float(images))), strict=True):
        share = diagnostics.recurrence(body.params, body.spec, xs).share
        found["share"].append([float(s) for s in share])
        found["radius"].append(
            float(diagnostics.contractivity(body.params, body.spec, xs).radius.max())
        )
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows, side by side."""
    made = Table("rule", "test", "validation", "step", "memory", "residuals", "share", "radius")
    for row in rows:
        made.add_row(
            row["rule"],
            f"{row['test_error']:.2f} %",
            f"{row['val_error'][-1]:.2f} %",
            f"{1e3 * row['step_seconds']:.0f} ms",
            f"{row['temporary_bytes'] / 2**20:.1f} MiB" if row["temporary_bytes"] else "-",
            " ".join(f"{r:.0e}" for r in row["residuals"]),
            "; ".join(map(spaced, row["share"])),
            spaced(row["radius"]),
        )
    return made


def described(settings: Settings) -> dict[str, Any]:
    """All that decides a result, as JSON."""
    fields = {f.name for f in dataclasses.fields(Settings)} - {"out", "runs", "data_dir"}
    return {name: to_json(getattr(settings, name)) for name in sorted(fields)}


def main() -> None:
    """Train by each rule, tell and write."""
    with command():
        run(tyro.cli(Settings, description=__doc__))


def run(settings: Settings) -> None:
    """See `main`."""
    console = RunConsole()
    out = new_folder("out", settings.out, "blocks.json")
    data = load(settings.dataset, data_dir=settings.data_dir)
    if settings.train_images is not None:
        kept = slice(settings.train_images)
        data = data._replace(
            train_images=data.train_images[kept], train_labels=data.train_labels[kept]
        )
    rows = [train(settings, data, rule, console) for rule in settings.rules]
    result = plain({"rows": rows, "settings": described(settings)}) | provenance()
    write_json(out / "blocks.json", result)
    console.print(table(rows))


if __name__ == "__main__":
    main()
