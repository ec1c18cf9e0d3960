"""Random damage and random words: files and command lines that nobody thought of."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train as train_script
from helpers import attempt
from hypothesis import given
from hypothesis import strategies as st

import ep_jax as ep
from ep_jax import cli
from ep_jax.data import load

SIZES = {
    "train-images-idx3-ubyte": (60, 2, 3),
    "train-labels-idx1-ubyte": (60,),
    "t10k-images-idx3-ubyte": (20, 2, 3),
    "t10k-labels-idx1-ubyte": (20,),
}

damages = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 400)),
    st.tuples(st.just("set"), st.integers(0, 400), st.integers(0, 255)),
    st.tuples(st.just("add"), st.binary(min_size=1, max_size=20)),
)


def damaged(content: bytes, how: tuple[Any, ...]) -> bytes:
    if how[0] == "cut":
        return content[: how[1]]
    if how[0] == "add":
        return content + how[1]
    at = how[1] % max(len(content), 1)
    return content[:at] + bytes([how[2]]) + content[at + 1 :]


def idx(shape: tuple[int, ...]) -> bytes:
    values = np.arange(np.prod(shape)) % 10
    head = bytes((0, 0, 8, len(shape))) + b"".join(n.to_bytes(4, "big") for n in shape)
    return head + values.astype(np.uint8).tobytes()


@given(st.sampled_from(sorted(SIZES)), st.booleans(), st.lists(damages, min_size=1, max_size=3))
def test_a_damaged_idx_file_is_named_or_harmless(
    file: str, zipped: bool, hows: list[tuple[Any, ...]]
) -> None:
    """Another exception than the one promised, or data of another size than the header says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for other, shape in SIZES.items():
            (folder / other).write_bytes(idx(shape))
        content = gzip.compress(idx(SIZES[file])) if zipped else idx(SIZES[file])
        for how in hows:
            content = damaged(content, how)
        (folder / file).unlink()
        (folder / (file + ".gz" * zipped)).write_bytes(content)
        cache = folder / "cache"
        data = attempt(lambda: load("mnist", data_dir=folder, validation=10, cache_dir=cache))
    if isinstance(data, ValueError):
        assert file in str(data)
    else:  # a pixel, a label, the time in a gzip header
        assert data.train_images.shape == (50, 2, 3, 1)
        assert data.test_images.shape == (20, 2, 3, 1)
        assert set(np.unique(data.train_labels)) <= set(range(10))


SPEC = ep.NetworkSpec((4,), (ep.Dense(3), ep.Dense(2)), ep.DeltaCode())


@given(st.lists(damages, min_size=1, max_size=3))
def test_damaged_weights_are_named_or_harmless(hows: list[tuple[Any, ...]]) -> None:
    """Arrays of another network, NaN, or an exception that names no file."""
    with tempfile.TemporaryDirectory() as folder:
        ep.save_weights(folder, ep.init_params(jax.random.key(0), SPEC), SPEC, ep.Phases())
        path = Path(folder) / "weights.npz"
        content = path.read_bytes()
        for how in hows:
            content = damaged(content, how)
        path.write_bytes(content)
        found = attempt(lambda: ep.load_weights(folder))
    if isinstance(found, ValueError):
        assert "weights.npz" in str(found)
    else:
        params, spec, _ = found
        like = jax.eval_shape(lambda key: ep.init_params(key, spec), jax.random.key(0))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda p: p.shape, like)
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(params))


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["type", "format", "spec", "phases", "layers",
                                                       "input_shape"]), inner, max_size=4),
                    max_leaves=8))  # fmt: skip
def test_any_json_is_refused_in_one_way(record: Any) -> None:
    """A specification that is none."""
    with tempfile.TemporaryDirectory() as folder:
        ep.save_weights(folder, ep.init_params(jax.random.key(0), SPEC), SPEC, ep.Phases())
        with np.load(Path(folder) / "weights.npz") as arrays:
            kept: dict[str, Any] = dict(arrays)
        kept["network"] = np.array(json.dumps(record))
        np.savez(Path(folder) / "weights.npz", **kept)
        with pytest.raises(ValueError, match=r"weights\.npz is unreadable or foreign"):
            ep.load_weights(folder)


FLAGS = ("--epochs", "--batch", "--feedback", "--seed", "--channels", "--kernels", "--hidden",
         "--neuron", "--gradient", "--phases.free", "--phases.beta", "--delta-code.decay",
         "--delta-code.leak", "--augmentation.shift", "--learning-rate", "--devices", "--gain",
         "--validation", "--layer-rates", "--nonsense", "--preset")  # fmt: skip
words = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(["0", "1", "-1", "3.5", "nan", "inf", "1e999", "", "rate", "True", "x"]),
    st.text(max_size=4),
)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@given(st.lists(words, min_size=1, max_size=6))
def test_any_command_line_is_understood_or_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: list[str]
) -> None:
    """A traceback, or a run that starts with what nobody meant."""
    started = []
    monkeypatch.setattr(cli, "train", lambda config, out, **_: started.append(config))
    monkeypatch.setattr(cli, "divide_cpu", lambda devices: None)
    monkeypatch.setattr("sys.argv", ["train.py", "--out", "nowhere", *line])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    try:
        train_script.main()
    except SystemExit as stop:
        printed = capsys.readouterr()
        said = stop.code if isinstance(stop.code, str) else printed.out + printed.err
        asked_for_help = stop.code in (0, None)
        assert said.strip() or asked_for_help
        assert "Traceback" not in said
    else:
        assert len(started) == 1
