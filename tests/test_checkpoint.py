"""Weights and specifications on disk."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import ep_jax as ep
from ep_jax.checkpoint import from_json, to_json

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
    ep.NetworkSpec((8,), (ep.Dense(3),), neuron=ep.Bernoulli(average=3)),
    ep.NetworkSpec((8,), (ep.Dense(3),), neuron=ep.IntegrateFire(leak=0.9)),
]
PHASES = ep.Phases(free=7, nudged=3, beta=-0.2, estimator="one_sided", sweep="ordered")


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
        assert sorted(arrays.files) == sorted(f"layer{i}.{n}" for i in (1, 2, 3, 4) for n in "wb")
        np.testing.assert_array_equal(arrays["layer1.w"], params[0]["w"])


def damage_nothing_there(folder: Path) -> None:
    (folder / "weights.npz").unlink()


def damage_truncate(folder: Path) -> None:
    path = folder / "weights.npz"
    path.write_bytes(path.read_bytes()[:200])


def damage_garbage(folder: Path) -> None:
    (folder / "network.json").write_text("{")


def damage_newer(folder: Path) -> None:
    record = json.loads((folder / "network.json").read_text())
    (folder / "network.json").write_text(json.dumps(record | {"format": 999}))


def damage_foreign_arrays(folder: Path) -> None:
    np.savez(folder / "weights.npz", kernel=np.zeros(3))


def damage_other_network(folder: Path) -> None:
    record = json.loads((folder / "network.json").read_text())
    record["spec"]["layers"][0]["features"] = 5
    (folder / "network.json").write_text(json.dumps(record))


def damage_unknown_neuron(folder: Path) -> None:
    record = json.loads((folder / "network.json").read_text())
    record["spec"]["neuron"]["type"] = "Alien"
    (folder / "network.json").write_text(json.dumps(record))


def damage_nan(folder: Path) -> None:
    with np.load(folder / "weights.npz") as arrays:
        changed = {name: arrays[name] for name in arrays.files}
    changed["layer1.b"] = np.full_like(changed["layer1.b"], np.nan)
    np.savez(folder / "weights.npz", **changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing_there, "holds no weights.npz; expected"),
        (damage_truncate, "weights.npz is unreadable or foreign"),
        (damage_garbage, "network.json is unreadable or foreign"),
        (damage_newer, "format is 999; this version reads format 1"),
        (damage_foreign_arrays, r"arrays \['kernel'\]; expected"),
        (damage_other_network, r"layer1\.w.* has shape .*; expected|params\[0\].* has shape"),
        (damage_unknown_neuron, "type is 'Alien'; expected one of"),
        (damage_nan, "NaN or infinite"),
    ],
)
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
