"""Weights and specifications on disk."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import attempt

import ep_jax as ep
from ep_jax.checkpoint import Checkpoints
from ep_jax.descriptions import from_json, to_json
from ep_jax.files import write_json
from ep_jax.training import TrainState

SPECS = [
    ep.NetworkSpec((8,), (ep.Dense(3),), neuron=ep.Rate(0.5, "tanh"), feedback=0.3),
    ep.NetworkSpec(
        (8, 8, 1),
        (
            ep.Conv(2, 3, pool="max", padding="SAME"),
            ep.Conv(3, 3, pool=None),
            ep.Dense(4),
            ep.Dense(2),
        ),
        neuron=ep.SigmaDelta(lam=0.4),
        cost="cross_entropy",
    ),
    ep.NetworkSpec((8,), (ep.Dense(3),), neuron=ep.DeltaCode(leak=True)),
    ep.NetworkSpec((8,), (ep.Dense(3),), neuron=ep.DeltaCode(decay=0.5, levels=5)),
    ep.NetworkSpec((8,), (ep.Dense(3),), neuron=ep.Bernoulli(average=3)),
    ep.NetworkSpec((8,), (ep.Dense(3),), neuron=ep.IntegrateFire(leak=0.9)),
]
PHASES = ep.Phases(
    free=7,
    nudged=3,
    beta=-0.2,
    estimator="one_sided",
    sweep="ordered",
    relaxation=1.4,
    tolerance=1e-3,
    stragglers=0.25,
    free_more=3,
    limit=10.0,
)


@pytest.mark.parametrize("spec", SPECS)
def test_weights_round_trip(spec: ep.NetworkSpec, tmp_path: Path) -> None:
    """Whatever was saved comes back: every field of the records, every bit of the arrays."""
    params = ep.init_params(jax.random.key(0), spec, dtype=np.float32)
    ep.save_weights(tmp_path, params, spec, PHASES)
    loaded, loaded_spec, loaded_phases = ep.load_weights(tmp_path)
    assert (loaded_spec, loaded_phases) == (spec, PHASES)
    assert hash(loaded_spec) == hash(spec)  # tuples, not lists
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_anyone_can_read_the_weights(tmp_path: Path) -> None:
    """Plain NumPy, one array per parameter, no pickles."""
    params = ep.init_params(jax.random.key(0), SPECS[1])
    ep.save_weights(tmp_path, params, SPECS[1], PHASES)
    with np.load(tmp_path / "weights.npz", allow_pickle=False) as arrays:
        names = [f"layer{i}.{n}" for i in (1, 2, 3, 4) for n in "wb"]
        assert sorted(arrays.files) == sorted((*names, "network"))
        np.testing.assert_array_equal(arrays["layer1.w"], params[0]["w"])
        assert json.loads(str(arrays["network"]))["spec"]["layers"][0]["type"] == "Conv"


def test_weights_of_format_1_mean_what_they_meant(tmp_path: Path) -> None:
    """A default of today that gets into a network of then: another code, another relaxation."""
    code = ep.DeltaCode(0.5, 0.6, 1.0, 0.7, 0.4)
    spec = ep.NetworkSpec((8,), (ep.Dense(4), ep.Dense(3)), neuron=code, feedback=0.05)
    arrays: dict[str, Any] = {
        f"layer{i}.{name}": value
        for i, p in enumerate(ep.init_params(jax.random.key(0), spec), 1)
        for name, value in p.items()
    }
    np.savez(tmp_path / "weights.npz", **arrays)
    record = {
        "format": 1,
        "spec": {
            "type": "NetworkSpec",
            "input_shape": [8],
            "layers": [{"type": "Dense", "features": 4}, {"type": "Dense", "features": 3}],
            "neuron": {
                "type": "DeltaCode",
                "quantum": 0.5,
                "decay": 0.6,
                "lag": 1.0,
                "nudged_quantum": 0.7,
                "nudged_decay": 0.4,
                "leak": False,
                "surrogate": "straight_through",
            },
            "cost": "squared_error",
            "feedback": 0.05,
        },
        "phases": {
            "type": "Phases",
            "free": 9,
            "nudged": 6,
            "beta": 0.03,
            "estimator": "one_sided",
            "sweep": "ordered",
            "coordinates": "displacement",
            "points": 4,
            "nudged_signals": "full",
        },
    }
    (tmp_path / "network.json").write_text(json.dumps(record))
    _, loaded, phases = ep.load_weights(tmp_path)
    assert loaded == spec
    assert (code.scheduled, code.levels) == (True, 3)
    assert phases == ep.Phases(
        free=9,
        nudged=6,
        beta=0.03,
        estimator="one_sided",
        sweep="ordered",
        coordinates="displacement",
        points=4,
        nudged_signals="full",
        relaxation=1.0,
        tolerance=None,
        stragglers=0.0,
        free_more=0,
        nudged_more=0,
        limit=None,
    )


def damage_nothing_there(folder: Path) -> None:
    (folder / "weights.npz").unlink()


def damage_truncate(folder: Path) -> None:
    path = folder / "weights.npz"
    path.write_bytes(path.read_bytes()[:200])


def described(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change what weights say of their network, which is JSON."""
    with np.load(folder / "weights.npz") as arrays:
        kept: dict[str, Any] = dict(arrays)
    record = change(json.loads(str(kept["network"])))
    text = record if isinstance(record, str) else json.dumps(record)
    kept["network"] = np.array(text)
    np.savez(folder / "weights.npz", **kept)


def damage_garbage(folder: Path) -> None:
    described(folder, lambda record: "{")


def damage_newer(folder: Path) -> None:
    described(folder, lambda record: record | {"format": 999})


def damage_foreign_arrays(folder: Path) -> None:
    np.savez(folder / "weights.npz", kernel=np.zeros(3))


def damage_other_network(folder: Path) -> None:
    def wider(record: Any) -> Any:
        record["spec"]["layers"][0]["features"] = 5
        return record

    described(folder, wider)


def damage_unknown_neuron(folder: Path) -> None:
    def alien(record: Any) -> Any:
        record["spec"]["neuron"]["type"] = "Alien"
        return record

    described(folder, alien)


def damage_nan(folder: Path) -> None:
    with np.load(folder / "weights.npz") as arrays:
        changed = {name: arrays[name] for name in arrays.files}
    changed["layer1.b"] = np.full_like(changed["layer1.b"], np.nan)
    np.savez(folder / "weights.npz", **changed)


DAMAGES: dict[Callable[[Path], None], str] = {
    damage_nothing_there: "holds no weights.npz; expected",
    damage_truncate: "weights.npz is unreadable or foreign",
    damage_garbage: "weights.npz is unreadable or foreign: Expecting property name",
    damage_newer: "format is 999; this version reads format 1 or 2 or 3 or 4",
    damage_foreign_arrays: "holds no network.json; expected",
    damage_other_network: r"layer1\.w.* has shape .*; expected|params\[0\].* has shape",
    damage_unknown_neuron: "type is 'Alien'; expected one of",
    damage_nan: "NaN or infinite",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.items())
def test_bad_weights_say_what_is_wrong(damage, message: str, tmp_path: Path) -> None:
    """One clear error, whatever happened to the files."""
    ep.save_weights(tmp_path, ep.init_params(jax.random.key(0), SPECS[0]), SPECS[0], PHASES)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ep.load_weights(tmp_path)


def test_json_of_a_record_names_its_type() -> None:
    """So that a file can be read by eye and by other programs."""
    written = json.loads(json.dumps(to_json(SPECS[2])))
    assert written["neuron"]["type"] == "DeltaCode"
    assert from_json(written) == SPECS[2]


def state_of(seed: int) -> TrainState:
    rng = np.random.default_rng(seed)
    params = tuple({"w": rng.normal(size=(64, 64)), "b": rng.normal(size=64)} for _ in range(2))
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    return TrainState(params, optax.adam(1e-3).init(params), jnp.asarray(seed, jnp.int32))


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond a few bytes, as on a disk without room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A failed write that goes unnoticed, or that takes what was there with it."""
    first, second = state_of(1), state_of(2)
    checkpoints = Checkpoints(tmp_path, {"seed": 0})
    checkpoints.save(1, first, {"epochs": 1})
    refused = pytest.raises(OSError, match=r"checkpoint 2 cannot be written to .* as it was")
    with full_disk(), refused:
        checkpoints.save(2, second, {"epochs": 2})
    found = Checkpoints(tmp_path, {"seed": 0}).restore(first)
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found[0], first)
    assert found[1] == {"epochs": 1}
    checkpoints.save(3, second, {"epochs": 3})  # there is room again
    found = Checkpoints(tmp_path, {"seed": 0}).restore(first)
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found[0], second)


def test_a_full_disk_leaves_the_last_file(tmp_path: Path) -> None:
    """The same for files that are replaced; and no remains of what was begun."""
    write_json(tmp_path / "a.json", [1])
    with full_disk(), pytest.raises(OSError, match=r"a\.json cannot be written: .* as it was"):
        write_json(tmp_path / "a.json", list(range(99)))
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """An error that does not say which argument is meant."""
    (tmp_path / "file").touch()
    params = ep.init_params(jax.random.key(0), SPECS[0])
    with pytest.raises(
        OSError, match=r"folder is '.*below', which cannot be made or .*: Not a dir"
    ):
        ep.save_weights(tmp_path / "file" / "below", params, SPECS[0], PHASES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2; this version reads format 3"),
        (
            {"identity": {"seed": 1}},
            "1 was written by another configuration: seed was 1 and is now 0",
        ),
        ({"identity": None}, "unreadable or foreign"),
        ({"progress": None, "format": None}, "format is None"),
    ],
)
def test_a_foreign_checkpoint_is_refused_and_kept(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """A newer format or another run: said, and not a byte of it changed."""
    Checkpoints(tmp_path, {"seed": 0}).save(1, state_of(1), {"epochs": 1})
    (file,) = [p for p in tmp_path.rglob("*") if p.is_file() and b'"identity"' in p.read_bytes()]
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, {"seed": 0}).restore(state_of(1))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    """The same configuration, but arrays of another shape."""
    Checkpoints(tmp_path, {}).save(1, state_of(1), {})
    other = jax.tree.map(lambda a: a[:1] if a.ndim else a, state_of(1))
    with pytest.raises(ValueError, match="unreadable or foreign"):
        Checkpoints(tmp_path, {}).restore(other)


def test_every_truncation_of_a_checkpoint_is_told(tmp_path: Path) -> None:
    """Each of its files cut in half, one at a time: an error, or all of the data all the same."""
    whole = tmp_path / "whole"
    Checkpoints(whole, {}).save(1, state_of(1), {"epochs": 1})

    told = 0
    for i, file in enumerate(p for p in sorted(whole.rglob("*")) if p.is_file()):
        copy = tmp_path / str(i)
        shutil.copytree(whole, copy)
        cut = copy / file.relative_to(whole)
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        found = attempt(lambda copy=copy: Checkpoints(copy, {}).restore(state_of(2)))
        if isinstance(found, ValueError):
            assert "unreadable or foreign" in str(found)
            told += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, found, (state_of(1), {"epochs": 1}))
    assert told >= 3
