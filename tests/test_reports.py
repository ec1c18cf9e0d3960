"""Public reports on neighbouring projects, tried here: each situation, and the right outcome.

The reports are named in docs/robustness.md.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ep_jax as ep
from ep_jax import claims, diagnostics, training
from ep_jax.data import from_arrays, load
from ep_jax.evaluation import evaluate
from ep_jax.loop import Training
from ep_jax.optimizers import link_norms, orthogonalize
from ep_jax.presets import PRESETS, Config
from ep_jax.run import train

ROOT = Path(__file__).parent.parent
SPEC = ep.NetworkSpec((4,), (ep.Dense(6), ep.Dense(3)), ep.Rate())
PHASES = ep.Phases(free=6, nudged=4)


@pytest.fixture
def params() -> ep.Params:
    """Of `SPEC`."""
    return ep.init_params(jax.random.key(0), SPEC)


@pytest.mark.parametrize("exponent", [-35, -30, -20, -19, -18, -10, 0, 18, 30])
def test_muon_does_not_care_how_small_a_gradient_is(exponent: int) -> None:
    """A layer that died: its momentum shrinks for hundreds of steps, and its squares underflow."""
    matrix = jax.random.normal(jax.random.key(0), (16, 8))
    found = orthogonalize(matrix * 10.0**exponent)
    np.testing.assert_allclose(found, orthogonalize(matrix), atol=1e-3)
    assert not orthogonalize(0 * matrix).any()


@pytest.mark.parametrize("exponent", [-30, -20, -12, 0, 15])
def test_a_measurement_does_not_care_about_the_scale(params: ep.Params, exponent: int) -> None:
    """Gradients that are tiny late in a training, and links that decayed."""
    a, b = (ep.init_params(jax.random.key(seed), SPEC) for seed in (1, 2))
    scaled = [jax.tree.map(lambda v: v * 10.0**exponent, tree) for tree in (a, b)]
    unscaled = diagnostics.compare(a, b)
    for found, expected in zip(diagnostics.compare(*scaled), unscaled, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert abs(diagnostics.compare(scaled[0], scaled[0]).total_cosine - 1) < 1e-5
    seeds, exact = (jax.tree.map(lambda *v: jnp.stack(v), *pair) for pair in ((a, b), (a, a)))
    spread = diagnostics.bias_and_variance(seeds, exact)
    tiny = diagnostics.bias_and_variance(
        *(jax.tree.map(lambda v: v * 10.0**exponent, tree) for tree in (seeds, exact))
    )
    for found, expected in zip(tiny, spread, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    small = jax.tree.map(lambda v: v * 10.0**exponent, params)
    np.testing.assert_allclose(
        link_norms(small, SPEC), 10.0**exponent * link_norms(params, SPEC), rtol=1e-4
    )


def test_answers_and_labels_are_compared_one_by_one(params: ep.Params) -> None:
    """Labels as a column broadcast: an error of 300 per cent."""
    right, none = np.array([0, 1, 2, 0]), np.array([], int)
    assert training.error_rate(right, right) == 0
    for answers, labels in ((right, right[:, None]), (right, right[:1]), (none, none)):
        with pytest.raises(ValueError, match="predictions has shape"):
            training.error_rate(answers, labels)
    data = from_arrays("own", (np.ones((9, 4)), right[:1].repeat(9)), (np.ones((4, 4)), right),
                       validation=3)  # fmt: skip
    with pytest.raises(ValueError, match=r"data.test_labels has shape \(4, 1\)"):
        evaluate(params, SPEC, PHASES, data._replace(test_labels=right[:, None]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y[:, None]), r"train's labels has shape \(10, 1\)"),
        (lambda x, y: (x, np.eye(10)), r"train's labels has shape \(10, 10\)"),
        (lambda x, y: (x, ["cat", "dog"] * 5), "dtype <U3; expected integers"),
        (lambda x, y: (x, y * np.nan), "dtype float64; expected integers"),
        (lambda x, y: (object(), y), r"images of shape \(\)"),
        (lambda x, y: None, "train is NoneType; expected a pair"),
        (lambda x, y: (x.astype(np.longdouble), y), "expected at most 8 bytes"),
    ],
)
def test_data_of_ones_own_are_looked_at_first(change: Any, message: str) -> None:
    """Before anything is computed with them."""
    good = np.ones((10, 4)), np.arange(10) % 3
    if np.dtype(np.longdouble).itemsize <= 8 and "bytes" in message:
        pytest.skip("no long double here")
    with pytest.raises((ValueError, TypeError), match=message):
        from_arrays("own", change(*good), good, validation=2)


def test_data_in_another_byte_order_are_turned(params: ep.Params) -> None:
    """As from FITS, HDF5 or MATLAB; a function of this library says which order it wants."""
    xs: Any = np.linspace(0, 1, 40).reshape(10, 4).astype(">f4")
    ys: Any = (np.arange(10) % 3).astype(">i4")
    data = from_arrays("own", (xs, ys), (xs, ys), validation=2)
    assert data.test_images.dtype == np.float32
    np.testing.assert_array_equal(data.test_images, xs)
    with pytest.raises(TypeError, match="images has dtype >f4; expected"):
        training.predict(params, SPEC, PHASES, xs)
    with pytest.raises(TypeError, match="xs has dtype >f4; expected"):
        ep.ep_gradient(params, SPEC, xs, jnp.asarray(data.test_labels), PHASES)
    with pytest.raises(TypeError, match="images is list; expected an array"):
        training.predict(params, SPEC, PHASES, xs.tolist())


@pytest.mark.usefixtures("nans_allowed")
def test_what_is_not_a_number_has_not_settled(params: ep.Params) -> None:
    """A comparison with NaN is false, whichever way one asks."""
    xs, ys = jnp.ones((5, 4)).at[0, 0].set(jnp.nan), jnp.array([0, 1, 2, 0, 1])
    gradient = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))
    _, info = gradient(params, SPEC, xs, ys, replace(PHASES, free=60))
    np.testing.assert_allclose(info.free.unsettled, 1 / 5)
    answer = jax.jit(ep.equilibrium, static_argnames=("spec", "phases"))
    with pytest.warns(ep.NotSettledWarning):
        answer(params, SPEC, xs, replace(PHASES, free=60)).block_until_ready()


def test_a_second_derivative_by_implicit_differentiation_is_refused(params: ep.Params) -> None:
    """There is none; through EP's rule and through the sweeps there is."""
    tanh = replace(SPEC, neuron=ep.Rate(activation="tanh"), feedback=0.5)
    phases = ep.Phases(free=60, nudged=40, beta=1e-3)

    def second(derivative: ep.Derivative) -> jax.Array:
        def f(x: jax.Array) -> jax.Array:
            return jnp.sum(ep.equilibrium(params, tanh, x, phases, derivative=derivative) ** 2)

        return jax.jacrev(jax.grad(f))(jnp.full((1, 4), 0.3))

    with pytest.raises(TypeError, match=r"expected derivative=ep_jax.BPTT\(\)"):
        second(ep.Implicit())
    assert jnp.isfinite(second(ep.BPTT())).all()


class Changing:
    """A neuron whose attributes may change: hashable, by its identity."""

    activation, stochastic, eps = "hard_sigmoid", False, 0.5
    start, step, signal, readout = (getattr(ep.Rate(), n) for n in ("start", "step", "signal",
                                                                    "readout"))  # fmt: skip


def test_what_may_change_is_not_static() -> None:
    """A compiled program would answer as before the change."""
    with pytest.raises(TypeError, match=r"neuron is .*expected a frozen dataclass"):
        ep.NetworkSpec((4,), (ep.Dense(3),), Changing())  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Scaled:
    """A cost with a method of the class."""

    k = 1.0

    @classmethod
    def cost(cls, output: jax.Array, target: jax.Array) -> jax.Array:
        """Squared error times `k`."""
        return cls.k * jnp.sum((output - target) ** 2)


class FiveTimes(Scaled):
    """Inherits the method, and its name."""

    k = 5.0


@functools.wraps(Scaled.cost)
def renamed(output: jax.Array, target: jax.Array) -> jax.Array:
    """Says that it is another one."""
    return 3 * Scaled.cost(output, target)


@pytest.mark.parametrize("cost", [FiveTimes.cost, renamed], ids=["inherited", "wraps"])
def test_what_is_saved_is_what_was_used(cost: Any, params: ep.Params, tmp_path: Path) -> None:
    """An import path that leads to another function would load another cost."""
    with pytest.raises(ValueError, match="leads to another one"):
        ep.save_weights(tmp_path, params, replace(SPEC, cost=cost), PHASES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", [0, np.uint32(1), jax.random.split(jax.random.key(0), 5)])
def test_a_key_is_one_key(key: Any, params: ep.Params) -> None:
    """A seed, or a batch of keys, in place of it."""
    with pytest.raises(TypeError, match=r"key is .*expected one random key"):
        ep.init_params(key, SPEC)
    with pytest.raises(TypeError, match=r"key is .*expected one random key"):
        ep.ep_gradient(params, SPEC, jnp.ones((2, 4)), jnp.array([0, 1]), PHASES, key)


def small(**changes: Any) -> Config:
    """A run of seconds."""
    sizes: dict[str, Any] = {"channels": (), "kernels": (), "hidden": (6,), "batch": 32}
    return replace(
        PRESETS["digits"],
        **sizes | {"epochs": 1, "train_images": 64, "validation": 40},
        neuron=ep.Rate(),
        phases=PHASES,
        **changes,
    )


@pytest.fixture
def other_keys() -> Any:
    """JAX draws by another algorithm meanwhile."""
    name = "jax_default_prng_impl"
    before = getattr(jax.config, name)
    yield lambda: jax.config.update(name, "rbg")
    jax.config.update(name, before)


def test_a_run_does_not_go_on_with_other_random_numbers(other_keys: Any, tmp_path: Path) -> None:
    """A variable of the environment that a cluster sets decides what a seed means."""

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(replace(small(), epochs=2), tmp_path, on_epoch=stop)
    other_keys()
    with pytest.raises(ValueError, match=r"random"):
        train(replace(small(), epochs=2), tmp_path, resume=True)


def test_a_record_is_the_hooks_to_change(tmp_path: Path) -> None:
    """What a callback takes out of it is still in the file."""
    result = train(small(keep="best"), tmp_path, on_epoch=dict.clear)
    [record] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [record["val_error"]] == result["val_error"]


def test_a_training_is_compiled_as_often_as_one_likes() -> None:
    """A cell of a notebook that is run again."""
    training = Training(small(), load("digits"))
    training.compile(training.start())
    state = training.compile(training.start())
    state, metrics = training.steps(state, training.dispatches(1)[0])
    assert np.isfinite(metrics.loss).all()


def test_a_path_that_is_empty_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell variable that is not set."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="out is empty"):
        train(small(), "")
    assert not list(tmp_path.iterdir())


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system such as exFAT, or a mounted bucket."""

    def link(*_: Any, **__: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)


def test_a_folder_is_claimed_where_files_have_no_links(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a file that is made or is there already."""
    without_links(monkeypatch)
    with (
        claims.claimed("out", tmp_path),
        pytest.raises(FileExistsError, match="has held"),
        claims.claimed("out", tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "{"])
def test_a_damaged_claim_is_void_in_time(text: str, tmp_path: Path) -> None:
    """The power went before the data reached the disk."""
    claim = tmp_path / claims.NAME
    claim.write_text(text)
    with pytest.raises(FileExistsError, match=r"unknown.*Delete"), claims.claimed("out", tmp_path):
        pass
    before = time.time() - 2 * claims.FORGOTTEN_AFTER
    os.utime(claim, (before, before))
    with claims.claimed("out", tmp_path):
        pass


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="no namespaces here")
def test_a_claim_of_another_container_is_no_dead_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the same name, on the same machine: its process numbers mean nothing here."""
    own = claims._own()
    monkeypatch.setattr(os, "readlink", lambda _: "pid:[1]")
    there = claims._own()
    monkeypatch.undo()
    assert own["host"] != there["host"]
    (tmp_path / claims.NAME).write_text(json.dumps(there | {"process": 2**30}))
    with pytest.raises(FileExistsError, match="has held"), claims.claimed("out", tmp_path):
        pass


def test_every_name_that_is_told_is_there() -> None:
    """``ep_jax.devices.divide_cpu`` was in a message and in the docs, and not in the package."""
    files = [*ROOT.glob("ep_jax/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    told = {n for f in files for n in re.findall(r"\bep_jax\.((?:\w+\.)*\w+)", f.read_text())}
    missing = set()
    for name in sorted(told):
        found: Any = ep
        for part in name.split("."):
            try:
                found = getattr(found, part)
            except AttributeError:
                try:  # a module that was not asked for yet
                    found = importlib.import_module(f"{found.__name__}.{part}")
                except (ImportError, AttributeError):
                    missing.add(name)
                    break
    assert not missing
    assert {"devices", "processes", "run"} <= set(dir(ep))


def test_a_folder_of_tensorflow_datasets_that_lacks_a_file_is_named(tmp_path: Path) -> None:
    """Its description was not copied; there is data."""
    version = tmp_path / "mnist" / "3.0.1"
    version.mkdir(parents=True)
    (version / "mnist-train.array_record-00000-of-00001").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3\.0\.1 lacks dataset_info\.json"):
        load("mnist", data_dir=tmp_path)
