"""A batch in parts: the same gradient, in the memory of a part."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from helpers import slow

import ep_jax as ep

SPEC = ep.NetworkSpec((6, 6, 1), (ep.Conv(3, 3), ep.Dense(8), ep.Dense(3)), ep.Rate())
GRADIENTS = [ep.ep_gradient, ep.bptt_gradient, ep.implicit_gradient]


def given(spec: ep.NetworkSpec, batch: int = 12) -> tuple[Any, Any, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    params = ep.init_params(keys[0], spec)
    xs = jax.random.uniform(keys[1], (batch, *spec.input_shape), params[0]["w"].dtype)
    return params, spec, xs, jax.random.randint(keys[2], (batch,), 0, 3)


@pytest.mark.parametrize(
    ("gradient", "neuron"),
    [*((gradient, ep.Rate()) for gradient in GRADIENTS), (ep.ep_gradient, ep.Bernoulli())],
    ids=["ep", "bptt", "implicit", "stochastic"],
)
def test_parts_have_the_gradient_of_the_whole(gradient: Any, neuron: ep.Neuron) -> None:
    """A sum instead of a mean; examples of one part with targets or keys of another."""
    spec = ep.NetworkSpec(SPEC.input_shape, SPEC.layers, neuron)
    (params, _, xs, ys), phases, key = given(spec), ep.Phases(5, 4), jax.random.key(1)
    of = functools.partial(gradient, spec=spec, phases=phases)
    whole, about = jax.jit(of)(params, xs=xs, ys=ys, key=key)
    parts, told = jax.jit(functools.partial(of, microbatch=4))(params, xs=xs, ys=ys, key=key)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, parts, whole)
    jax.tree.map(close, told, about)


@pytest.mark.parametrize(
    "gradient", [ep.ep_gradient, slow(ep.bptt_gradient), slow(ep.implicit_gradient)]
)
def test_memory_is_that_of_a_part(gradient: Any) -> None:
    """States of all parts kept at once."""
    params, _, xs, ys = given(SPEC, 256)

    def memory(xs: jax.Array, ys: jax.Array, size: int | None) -> int:
        run = jax.jit(lambda p, xs, ys: gradient(p, SPEC, xs, ys, ep.Phases(8, 6), microbatch=size))
        needed = run.lower(params, xs, ys).compile().memory_analysis()
        assert needed is not None
        return needed.temp_size_in_bytes

    part, whole = memory(xs[:16], ys[:16], None), memory(xs, ys, None)
    batch = xs.nbytes + ys.nbytes  # is laid out anew
    assert memory(xs, ys, 16) < 1.1 * part + 2 * batch < whole


def test_random_signs_differ_from_part_to_part() -> None:
    """One sign for all parts: the estimator's bias does not average out."""
    params, _, xs, ys = given(SPEC)
    phases = ep.Phases(4, 3, beta=0.5, estimator="random_sign")

    @jax.jit
    def first(key: jax.Array) -> jax.Array:
        grads, _ = ep.ep_gradient(params, SPEC, xs, ys, phases, key, microbatch=6)
        return grads[0]["b"][0]

    signs = {first(jax.random.key(i)).item() for i in range(16)}
    assert len(signs) > 10  # of 2^12; where the parts shared their signs, of 2^6 at most


@pytest.mark.parametrize("size", [0, 5, 24])
def test_parts_that_do_not_fit_are_refused(size: int) -> None:
    """A rest that is dropped."""
    with pytest.raises(ValueError, match=f"microbatch is {size}; expected"):
        ep.ep_gradient(*given(SPEC), ep.Phases(2, 2), microbatch=size)


@pytest.mark.skipif(len(jax.local_devices()) < 2, reason="there is one device")
def test_each_part_is_divided_among_the_devices() -> None:
    """A part that lies on one device, while the others wait."""
    from ep_jax.devices import placements

    params, _, xs, ys = given(SPEC, 16)
    place = placements(2)
    xs, ys = jax.device_put((xs, ys), place.examples)
    params = jax.device_put(params, place.everywhere)

    def gradient(microbatch: int | None) -> Any:
        settings = {"spec": SPEC, "phases": ep.Phases(4, 3), "microbatch": microbatch}
        return jax.jit(lambda p, xs, ys: ep.ep_gradient(p, xs=xs, ys=ys, **settings)[0])

    run = gradient(4)
    wanted, found = gradient(None)(params, xs, ys), run(params, xs, ys)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, wanted)
    text = run.lower(params, xs, ys).compile().as_text() or ""
    assert "f32[4,2,6,6," in text  # of each of four parts two examples on each device
    assert not re.search("all-gather|all-to-all|collective-permute", text)
