"""The benchmarks: what they count and compare is what they say; the clock is not tested."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerator
import jax
import jax.numpy as jnp
import measure
import numpy as np
import pytest
import scaling
import time_to_accuracy

import ep_jax as ep
from ep_jax.gradients.feedforward import feedforward_gradient
from ep_jax.phases import PRECISIONS
from ep_jax.presets import PRESETS, spec_of

TINY = ep.NetworkSpec(
    (8, 8, 1), (ep.Conv(3, 3), ep.Conv(4, 2, pool=None), ep.Dense(6), ep.Dense(3)), ep.Rate()
)


def test_operations_of_a_tiny_network_by_hand() -> None:
    """Folded: 2x2 blocks and a 4x4 kernel, so 2x2 windows of 4 channels at 3x3 positions."""
    first = 2 * 9 * (2 * 2 * 4) * 3
    second = 2 * 4 * (2 * 2 * 3) * 4
    dense = [2 * 16 * 6, 2 * 6 * 3]
    assert measure.products(TINY) == [first, second, *dense]
    sweep = 2 * (second + sum(dense))
    phases = replace(measure.TEXTBOOK, free=5, nudged=3)
    # Synchronous, from zero: in the first sweep nobody hears anyone.
    assert measure.phase_operations(TINY, phases) == 4 * sweep
    assert measure.phase_operations(TINY, phases, nudged=True) == 3 * sweep
    # Ordered, from zero: first, each layer hears the one that has something to say.
    once = ep.Phases(free=1, nudged=1, sweep="ordered", coordinates="displacement")
    assert measure.phase_operations(TINY, once) == sweep // 2
    assert measure.phase_operations(TINY, once, nudged=True) == sweep // 2
    everything = first + sweep // 2
    assert measure.feedforward_operations(TINY, 7) == 7 * (2 * everything + sweep // 2)
    # Each phase ends with a sweep that tells its residual.
    expected = first + (4 + 1) * sweep + 2 * (3 + 1) * sweep + 2 * everything
    assert measure.ep_operations(TINY, phases, 7) == 7 * expected
    assert measure.implicit_operations(TINY, phases, 1, 10) == 3 * first + (4 + 11 + 2) * sweep
    assert measure.bptt_operations(TINY, phases, 1) == 2 * first + (1 + 3 * 4) * sweep
    assert measure.bptt_operations(TINY, phases, 1, 2) == 2 * first + (1 + 4 + 2 * 2) * sweep


def test_operations_of_stragglers_by_hand() -> None:
    """A quarter of eight goes on, and is looked at once more; a displacement has one nudge."""
    sweep = 2 * sum(measure.products(TINY)[1:])
    phases = ep.Phases(
        free=3, nudged=2, estimator="one_sided", stragglers=0.25, free_more=4, nudged_more=5
    )
    free = 8 * (measure.phase_operations(TINY, phases) + sweep) + 2 * (4 + 1) * sweep
    assert measure.settling_operations(TINY, phases, 8) == free
    own = measure.phase_operations(TINY, phases, nudged=True)
    nudged = 8 * (own + sweep) + 2 * (5 + 1) * sweep
    first = measure.products(TINY)[0]
    weights = 8 * (first + sweep)
    assert measure.ep_operations(TINY, phases, 8) == 8 * first + free + nudged + weights


def test_lower_bound_by_hand() -> None:
    """Parameters once; state, nudged states and drive for each example, four bytes a number."""
    units = 27 + 16 + 6 + 3
    params = 27 + 3 + 48 + 4 + 96 + 6 + 18 + 3
    symmetric = measure.TEXTBOOK
    assert measure.lower_bound(TINY, symmetric, 5) == 4 * (params + 5 * (4 * units + 27))
    one = ep.Phases(estimator="one_sided", coordinates="displacement", sweep="ordered")
    assert measure.lower_bound(TINY, one, 5) == 4 * (params + 5 * (3 * units + 27 + 27))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_backprop_is_the_gradient_of_the_feed_forward_network() -> None:
    """The price EP is compared with: one ordered sweep of BPTT from zero is the same."""
    params = jax.tree.map(lambda a: a.astype(float), ep.init_params(jax.random.key(0), TINY))
    xs = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1))
    ys = jnp.arange(4) % 3
    grads, info = feedforward_gradient(params, TINY, xs, ys)
    once = ep.Phases(free=1, sweep="ordered")
    expected, reference = ep.bptt_gradient(params, TINY, xs, ys, once)
    np.testing.assert_allclose(info.cost, reference.cost, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), grads, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_the_peer_computes_the_same_gradients() -> None:
    """PyTorch's EP and truncated BPTT, and a gradient that differs is refused."""
    import peer

    layers = (ep.Conv(3, 3), ep.Dense(6), ep.Dense(3))
    spec = ep.NetworkSpec((8, 8, 1), layers, ep.Rate())
    params = ep.init_params(jax.random.key(0), spec, 0.7, jnp.float64)
    xs, ys = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1)), jnp.arange(4) % 3
    phases = replace(measure.TEXTBOOK, free=30, nudged=20)
    theirs = peer.Peer(params, spec, xs, ys)
    ours, _ = ep.ep_gradient(params, spec, xs, ys, phases)
    peer.check_equal(ours, theirs.as_params(theirs.ep_gradient(phases)))
    exact, _ = ep.bptt_gradient(params, spec, xs, ys, phases, tracked=10)
    peer.check_equal(exact, theirs.as_params(theirs.bptt_gradient(phases, 10)))
    with pytest.raises(AssertionError, match="layer 1"):
        peer.check_equal(jax.tree.map(lambda g: 1.01 * g, ours), ours)


@pytest.mark.parametrize(
    ("errors", "expected"),
    [([3.0, 0.9, 1.1, 0.8, 0.7], 3), ([0.9, 0.8], 0), ([0.9, 1.0], None), ([2.0], None)],
)
def test_an_error_that_rises_again_has_not_stayed_below(
    errors: list[float], expected: int | None
) -> None:
    """Below for good, not for once; at the target is not below."""
    curve: list[dict[str, Any]] = [{"val_error": e, "at": i} for i, e in enumerate(errors)]
    found = time_to_accuracy.first_stays_below(curve, 1.0)
    assert (found and found["at"]) == expected


def test_exponents() -> None:
    """A quadratic has the slope 2."""
    np.testing.assert_allclose(scaling.exponent([1, 2, 8], [3, 12, 192]), 2.0)


def test_cases_of_an_accelerator_vary_one_thing() -> None:
    """A case that is measured twice, or a method or a precision that is left out."""
    found = accelerator.cases(accelerator.NETWORKS, quick=False)
    assert len(found) == len(set(found))
    for network in accelerator.NETWORKS:
        config = PRESETS[network]
        usual = (config.batch, config.phases.precision, None)
        own = [case for case in found if case.network == network]
        assert {case.method for case in own} == set(accelerator.METHODS)
        assert {case.precision for case in own} == set(PRECISIONS)
        for case in own:
            other = (case.batch, case.precision, case.microbatch)
            changed = [a != b for a, b in zip(other, usual, strict=True)]
            # Parts are those of the largest batch.
            assert sum(changed) - (case.microbatch is not None) <= 1
            assert case.microbatch is None or case.batch % case.microbatch == 0


@pytest.mark.slow
def test_what_the_accelerators_script_writes(tmp_path: Path) -> None:
    """A case that fails where nobody can look; a number that is none, or is another one's."""
    arguments = accelerator.Arguments(tmp_path, ("mnist",), minutes=600, quick=True)
    accelerator.run(arguments)
    found = json.loads((tmp_path / "accelerator.json").read_text())
    assert {"device", "versions", "commit", "seconds", "matmul_rate"} <= set(found)
    assert found["left_out"] == []
    wanted = accelerator.cases(arguments.networks, quick=True)
    assert len(found["rows"]) == len(wanted)
    for row, case in zip(found["rows"], wanted, strict=True):
        assert "error" not in row, row
        assert (row["method"], row["batch"]) == (case.method, case.batch)
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        np.testing.assert_allclose(row["images_per_second"] * row["seconds"], row["batch"])
        assert row["compile_seconds"] > 0
        assert row["temporary"] > 0
    # EP keeps nothing of a sweep; BPTT at least the states of each of the 90 that come on top.
    of = {(row["method"], row["sweeps"]): row["temporary"] for row in found["sweeps"]}
    few, many = accelerator.SWEEPS
    assert of["EP, rate", few] == of["EP, rate", many]
    config = accelerator.config_of("mnist", "BPTT, rate", quick=True)
    state = sum(map(math.prod, spec_of(config, (28, 28, 1), 10).state_shapes))
    more = of["BPTT, rate", many] - of["BPTT, rate", few]
    assert more >= (many - few) * config.batch * 4 * state
    # Rounding to 24 and to 8 bits, grown by sweeps that contract.
    errors = {row["precision"]: max(row["relative_error"]) for row in found["agreement"]}
    assert errors["float32"] < 1e-3 < errors["bfloat16"] < 0.5


def test_no_case_begins_after_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that ends with nothing written; a case that is missing and nobody knows."""
    monkeypatch.setattr(accelerator, "agreement", lambda quick: [])
    arguments = accelerator.Arguments(tmp_path, minutes=0, quick=True)
    accelerator.run(arguments)
    found = json.loads((tmp_path / "accelerator.json").read_text())
    assert found["rows"] == []
    assert len(found["left_out"]) == len(accelerator.cases(arguments.networks, quick=True))


def test_backprop_has_the_precision_that_is_asked_for() -> None:
    """A GPU that rounds products of backprop, which is then compared with exact ones of EP."""
    params = ep.init_params(jax.random.key(0), TINY)
    xs, ys = jnp.ones((2, 8, 8, 1)), jnp.arange(2)
    for precision, word in (("float32", "HIGHEST"), ("tensorfloat32", "HIGH")):
        phases: Any = replace(ep.Phases(), precision=precision)
        traced = jax.jit(lambda p, phases=phases: feedforward_gradient(p, TINY, xs, ys, phases)[0])
        text = traced.trace(params).lower(lowering_platforms=("cuda",)).as_text()
        products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
        assert products
        assert all(re.search(rf"\b{word}\b", line) for line in products)
