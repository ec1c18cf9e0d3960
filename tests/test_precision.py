"""Products of low precision: where they are, and what they cost."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow

import ep_jax as ep
from ep_jax import convolution, network
from ep_jax.convolution import Window

SPEC = ep.NetworkSpec((8, 8, 1), (ep.Conv(4, 3), ep.Dense(8), ep.Dense(3)), ep.Rate())
PHASES = ep.Phases(30, 20)
GRADIENTS = [ep.ep_gradient, ep.bptt_gradient, ep.implicit_gradient]


def given() -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    params = ep.init_params(keys[0], SPEC, dtype=jnp.float32)
    xs = jax.random.uniform(keys[1], (8, *SPEC.input_shape), jnp.float32)
    return params, xs, jax.random.randint(keys[2], (8,), 0, 3)


def program(gradient: Any, precision: str, platform: str = "cuda") -> str:
    """What a compiler for a GPU is given."""
    phases: Any = replace(PHASES, precision=precision)
    run = jax.jit(lambda p, xs, ys: gradient(p, SPEC, xs, ys, phases)[0])
    return run.trace(*given()).lower(lowering_platforms=(platform,)).as_text()


def products(text: str) -> list[str]:
    return re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda g: g.__name__)
@pytest.mark.parametrize(("precision", "word"), [("float32", "HIGHEST"), ("tensorfloat32", "HIGH")])
def test_no_machine_chooses_the_precision(gradient: Any, precision: str, word: str) -> None:
    """A GPU that rounds float32 to 10 bits, or a TPU to 8, without having been asked."""
    found = products(program(gradient, precision))
    assert found
    for line in found:
        assert re.search(rf"\b{word}\b", line), line
        assert "bf16" not in line


@pytest.mark.parametrize("gradient", GRADIENTS[:2], ids=lambda g: g.__name__)
def test_products_of_bfloat16_add_up_in_float32(gradient: Any) -> None:
    """Products that are made in float32 all the same, or sums that are rounded."""
    found = products(program(gradient, "bfloat16"))
    low = [line for line in found if "bf16" in line]
    assert len(low) >= 4
    for line in low:
        types = re.search(r": \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>", line)
        assert types is not None, line
        *factors, total = (name.rpartition("x")[2] for name in types.groups())
        assert factors == ["bf16", "bf16"]
        assert total == "f32"


@pytest.mark.parametrize("neuron", [slow(ep.Rate()), ep.DeltaCode()])
def test_a_gradient_of_low_precision_is_that_of_a_network_nearby(neuron: ep.Neuron) -> None:
    """Links and signals are off by 2^-9 of themselves; a gradient that is off by much more."""
    params, xs, ys = given()
    spec = replace(SPEC, neuron=neuron)
    gradient = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))
    exact, _ = gradient(params, spec, xs, ys, PHASES)
    rounded, info = gradient(params, spec, xs, ys, replace(PHASES, precision="bfloat16"))
    assert info.free.residual < 0.01
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert b.dtype == jnp.float32
        assert np.linalg.norm(a - b) < 16 * 2**-9 * np.linalg.norm(a)
    assert not np.array_equal(exact[0]["w"], rounded[0]["w"])


@pytest.mark.parametrize("pad", [(0, 0), (1, 2)])
def test_the_native_transpose_is_the_transpose(pad: tuple[int, int]) -> None:
    """A kernel that is turned around the wrong way, or padded on the wrong side."""
    window, shape = Window(3, pad), (7, 6, 2)
    keys = jax.random.split(jax.random.key(0), 3)
    state, matrix = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (18, 5))
    said = convolution.native(window, state, matrix)
    field = jax.random.normal(keys[2], said.shape)
    back = convolution.native_transpose(window, shape, field, matrix)
    assert back.shape == shape
    np.testing.assert_allclose(jnp.vdot(said, field), jnp.vdot(state, back), rtol=1e-4)


def test_what_the_input_says_is_exact() -> None:
    """The input's weights rounded as well, for nothing: they are used once."""
    params, xs, _ = given()
    full, low = (network.prepare(params, SPEC, p) for p in ("float32", "bfloat16"))
    told = [network.input_drive(SPEC, prepared, xs[0])[0] for prepared in (full, low)]
    assert np.array_equal(np.asarray(told[0]), np.asarray(told[1]))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda g: g.__name__)
def test_programs_for_accelerators_hold_what_they_should(gradient: Any, platform: str) -> None:
    """Windows gathered as on a CPU, calls of the host, numbers of double precision."""
    if jax.config.read("jax_enable_x64"):
        pytest.skip("here numbers of double precision are asked for")
    text = program(gradient, "float32", platform)
    assert "stablehlo.convolution" in text
    assert "callback" not in text
    assert "f64" not in text
    # A loop a phase; the adjoint's asks for its residual.
    loops = {"ep_gradient": 2, "bptt_gradient": 2, "implicit_gradient": 2}
    assert len(re.findall(r"stablehlo\.while", text)) == loops[gradient.__name__]
