"""A user's own layer, neuron and cost: trained, saved, loaded elsewhere, told apart from broken."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from own import Lazy, Local, Softened, huber

import ep_jax as ep
from ep_jax.descriptions import from_json, to_json

LAZINESS: Any = np.float32(0.75)  # a number to us, though not to a type checker
SPEC = ep.NetworkSpec(
    (8, 8, 1),
    (Local(4), ep.Conv(6, 3, padding="SAME"), Softened(12), ep.Dense(3)),
    neuron=Lazy(LAZINESS),
    cost=huber,
    skips=(ep.Skip(1, 3, ep.Dense(12)),),
)
PHASES = ep.Phases(free=30, nudged=20, beta=0.01, estimator="one_sided")

ANSWER = """
import sys
import numpy as np
import ep_jax as ep
params, spec, phases = ep.load_weights(sys.argv[1])
xs = np.load(sys.argv[2])
np.save(sys.argv[3], ep.equilibrium(params, spec, xs, phases))
"""


def batch() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    ys = np.arange(48) % 3
    prototypes = rng.uniform(size=(3, 8, 8, 1))
    xs = prototypes[ys] + 0.05 * rng.normal(size=(48, 8, 8, 1))
    return jnp.asarray(xs, jnp.float32), jnp.asarray(ys)


@pytest.mark.slow
def test_own_parts_train_and_load_in_another_program(tmp_path: Path) -> None:
    """A part that only the library's own layers, neurons and costs survive."""
    xs, ys = batch()
    params = ep.init_params(jax.random.key(0), SPEC, 0.4)
    optimizer = ep.optimizers.make_optimizer(
        SPEC, ep.optimizers.Muon(), learning_rate=0.02, steps=40, weight_decay=0.1, cap=0.9
    )

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads, info = ep.ep_gradient(params, SPEC, xs, ys, PHASES)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, info.cost

    state, costs = optimizer.init(params), []
    for _ in range(40):
        params, state, cost = step(params, state)
        costs.append(float(cost))
    assert costs[-1] < 0.2 * costs[0]
    ours = ep.equilibrium(params, SPEC, xs, PHASES)
    assert (ours.argmax(-1) == ys).mean() > 0.95

    ep.save_weights(tmp_path, params, SPEC, PHASES)
    np.save(tmp_path / "xs.npy", xs)
    files = [str(tmp_path), str(tmp_path / "xs.npy"), str(tmp_path / "answer.npy")]
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r})\n{ANSWER}", *files]
    subprocess.run(command, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "answer.npy"), ours, atol=1e-6)


def test_what_cannot_be_imported_again_is_not_saved(tmp_path: Path) -> None:
    """Weights that nobody can load, found out when they are needed."""

    def local(output: Any, target: Any) -> Any:
        return ((output - target) ** 2).sum()

    spec = ep.NetworkSpec((2,), (ep.Dense(2),), ep.Rate(), cost=local)
    params = ep.init_params(jax.random.key(0), spec)
    with pytest.raises(ValueError, match=r"local.* cannot be saved.*top level of a module"):
        ep.save_weights(tmp_path, params, spec, PHASES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere:Lazy", "'nowhere:Lazy' cannot be imported"),
        ("own:Missing", "'own:Missing' cannot be imported"),
        ("own:huber", "'own:huber', which is no dataclass"),
    ],
)
def test_a_type_that_is_gone_is_named(path: str, said: str) -> None:
    """An ImportError from the middle of nowhere."""
    with pytest.raises(ValueError, match=said):
        from_json({"type": path})


def test_numpy_numbers_are_numbers() -> None:
    """A spec that a sweep over ``np.arange`` made, and JSON that refuses it."""
    size: Any = np.int64(3)
    units: Any = np.int32(2)
    half: Any = np.float32(0.5)
    spec = ep.NetworkSpec((size,), (ep.Dense(units),), ep.Rate(half), feedback=half)
    plain = ep.NetworkSpec((3,), (ep.Dense(2),), ep.Rate(0.5), feedback=0.5)
    assert from_json(json.loads(json.dumps(to_json(spec)))) == plain


def test_own_layers_have_what_an_optimiser_and_a_chip_ask_for() -> None:
    """Defaults that count shared weights once, or take a stack of matrices for one."""
    assert Local(4).connections((8, 8, 1)) == 4 * 4 * (4 * 1) * 4
    assert Softened(5).connections((6,)) == 30
    params = ep.init_params(jax.random.key(0), SPEC, 0.4)
    muon = ep.optimizers.make_optimizer(
        SPEC, ep.optimizers.Muon(nesterov=False, momentum=0.0), learning_rate=1.0, steps=1
    )
    updates, _ = muon.update(params, muon.init(params), params)
    sizes = jnp.linalg.svd(updates[0]["w"], compute_uv=False)  # of each position's own matrix
    assert ((sizes > 0.6) & (sizes < 1.25)).all()
    one = dataclasses.replace(SPEC, skips=())
    assert ep.diagnostics.synaptic_operations(SPEC, (1.0, 0, 0, 0)) == (
        ep.diagnostics.synaptic_operations(one, (1.0, 0, 0, 0)) + 4 * 4 * 4 * 12
    )


def test_weights_of_another_name_are_no_picture() -> None:
    """All figures of a run failed where its first layer had no ``w``."""
    assert ep.plots.filters(({"u": jnp.ones((4, 2)), "v": jnp.ones((2, 3))},)) is None


@dataclass(frozen=True)
class Faulty(ep.Layer):
    """Three units with one fault, by name."""

    fault: str
    linear: bool = True

    def output_shape(self, below: Any) -> Any:
        return {"shape": 3, "empty": (0,)}.get(self.fault, (3,))

    def init(self, key: Any, below: Any, gain: Any, dtype: Any) -> Any:
        params = {"w": jnp.ones((*below, 3), dtype), "b": jnp.zeros(3, dtype)}
        return {"list": [params["w"]], "none": {}}.get(self.fault, params)

    def drive(self, prepared: Any, s: jax.Array) -> jax.Array:
        field = s @ prepared["w"]
        match self.fault:
            case "affine":
                return field + prepared["b"]
            case "clipped":
                return jnp.maximum(field, 0)
            case "wide":
                return jnp.append(field, 0)
            case "coarse":
                return field.astype(jnp.bfloat16)
            case "error":
                return prepared["v"]
        return field


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("shape", "output_shape returns 3 above a state of shape (2,); expected a tuple"),
        ("empty", "output_shape returns (0,)"),
        ("list", "init returns [float32[2, 3]]; expected a dict"),
        ("none", "init returns {}; expected a dict"),
        ("affine", "drive of a state of zeros is not zero; expected a drive that is linear"),
        ("clipped", "drive has no transpose"),
        ("wide", "drive returns float32[4] above a state of shape (2,); expected float32[3]"),
        ("coarse", "drive returns bfloat16[3]"),
        ("error", "drive fails above a state of shape (2,): KeyError: 'v'"),
    ],
)
def test_a_layer_whose_methods_do_not_fit_is_refused(fault: str, said: str) -> None:
    """An affine drive was accepted, and its gradient in displacement coordinates was wrong."""
    with pytest.raises((TypeError, ValueError), match=re.escape(said)):
        ep.NetworkSpec((2,), (Faulty(fault), ep.Dense(2)))
    if fault in ("affine", "clipped"):
        assert ep.NetworkSpec((2,), (Faulty(fault, linear=False), ep.Dense(2))).classes == 2


@pytest.mark.parametrize(
    ("cost", "said"),
    [
        (lambda output, target: output - target, "returns float32[2]"),
        (lambda output, target: None, "returns None"),
        (lambda output, target: jnp.argmax(output), "returns int32[]"),
        (lambda output: output.sum(), "fails on an answer and a target of shape (2,): TypeError"),
    ],
)
def test_a_cost_that_is_no_real_scalar_is_refused(cost: Any, said: str) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        ep.NetworkSpec((2,), (ep.Dense(3), ep.Dense(2)), cost=cost)
