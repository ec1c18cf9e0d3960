"""Equilibrium blocks in a flax model: one gradient by three rules, and the experiment with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_loss
import pytest
from flax import nnx
from helpers import relative_error

import ep_jax as ep
from ep_jax.data import load, to_float
from ep_jax.training import Augmentation


def gradient(rule: ep.Derivative) -> tuple[Any, jax.Array]:
    """Of a model of two blocks by all of its parameters, in float64; the first block's residual."""
    phases = ep.Phases(free=200, nudged=200, beta=1e-3)
    specs = blocks.specs_of((4, 8, 2), (3, 4), (5, 4), ep.Rate(activation="tanh"))
    model = blocks.Blocks(specs, 3, phases, rule, gain=0.6, dtype=jnp.float64, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    xs, ys = jnp.asarray(rng.uniform(size=(5, 4, 8, 2))), jnp.arange(5) % 3

    def loss(model: blocks.Blocks) -> tuple[jax.Array, Any]:
        logits, infos = model(xs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ys).sum(), infos

    grads, infos = nnx.jit(nnx.grad(loss, has_aux=True))(model)
    return nnx.to_pure_dict(grads), infos[0].residual


# flax keeps the running averages of batch norm in float32.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
def test_three_rules_agree_on_blocks() -> None:
    """A rule that loses a block's cotangent on its way down, through batch norm and block below."""
    with jax.enable_x64(True):
        exact, residual = gradient(ep.Implicit())
        assert residual < 1e-12
        assert np.linalg.norm(exact["blocks"][0]["layers"][0]["w"]) > 1e-3
        assert relative_error(gradient(ep.BPTT())[0], exact) < 1e-9
        assert relative_error(gradient(ep.EP())[0], exact) < 1e-5


@pytest.mark.slow
def test_blocks_train_by_ep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command as a user gives it: it learns, and tells what it measured."""
    words = "--rules ep --epochs 3 --channels 8 16 --units 64 32 --neuron rate --learning-rate 0.01"
    monkeypatch.setattr("sys.argv", ["blocks.py", *words.split(), "--out", str(tmp_path)])
    blocks.main()
    [row] = json.loads((tmp_path / "blocks.json").read_text())["rows"]
    assert row["val_error"][-1] < 45  # half of what chance gives; it has had three epochs
    assert np.min(row["share"]) > 0.05
    assert np.max(row["radius"]) < 1
    assert np.max(row["residuals"]) < 1e-2


@pytest.mark.slow
def test_memory_of_a_step_does_not_grow_with_the_sweeps() -> None:
    """A rule that keeps what the sweeps pass through, as BPTT's does."""
    found = {}
    for rule in ("ep", "bptt"):
        for sweeps in (10, 50):
            phases = ep.Phases(free=sweeps, nudged=sweeps, estimator="one_sided")
            specs = blocks.specs_of((8, 8, 1), (4, 8), (16, 8), ep.Rate())
            model = blocks.Blocks(specs, 10, phases, blocks.RULES[rule], rngs=nnx.Rngs(0))
            optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
            step = blocks.make_step(Augmentation(), strength=0.8)
            images, labels = np.zeros((8, 8, 8, 1), np.uint8), np.zeros(8, np.int32)
            compiled = step.lower(model, optimizer, images, labels, jax.random.key(0)).compile()
            found[rule, sweeps] = compiled.memory_analysis().temp_size_in_bytes
    assert found["ep", 50] <= found["ep", 10]
    state = 8 * 4 * (4 * 4 * 4 + 2 * 2 * 8)  # bytes of a batch's states in the block below
    assert found["bptt", 50] - found["bptt", 10] > 40 * state


@pytest.mark.slow
def test_blocks_that_were_interrupted_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A moment of the optimiser, a running average or a random number that a checkpoint lacks."""
    small = blocks.Settings(
        tmp_path / "whole",
        rules=("ep",),
        channels=(4, 8),
        units=(16, 8),
        neuron="rate",
        epochs=2,
        train_images=64,
    )
    blocks.run(small)
    halves = replace(small, out=tmp_path / "halves", runs=tmp_path / "runs")
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "error", interrupted_at(2, blocks.error))
        with pytest.raises(KeyboardInterrupt):
            blocks.run(halves)
    blocks.run(halves)
    whole, half = (
        json.loads((tmp_path / name / "blocks.json").read_text())["rows"][0]
        for name in ("whole", "halves")
    )
    for name in ("val_error", "test_error", "residuals", "share", "radius"):
        assert whole[name] == half[name]


def interrupted_at(call: int, function: Any) -> Any:
    """The function, but its `call`-th call ends the program."""
    calls = iter(range(1, call + 1))

    def called(*arguments: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)

    return called


@pytest.mark.slow
def test_a_network_learns_under_a_loss_of_ones_own() -> None:
    """A hinge loss, whose cotangent is zero for most examples, through batch norm and a head."""
    scores = jnp.array([[2.0, 0.5, 1.5], [0.0, 3.0, 1.0]])
    assert own_loss.margin(scores, jnp.array([0, 1])).tolist() == [0.5, 0.0]
    data = load("digits")
    images, labels = jnp.asarray(to_float(data.train_images)), jnp.asarray(data.train_labels)
    model = own_loss.learn(own_loss.margin, 10, images, labels, steps=100)
    said = model(jnp.asarray(to_float(data.validation_images))).argmax(-1)
    assert (said != data.validation_labels).mean() < 0.1
