"""Layers against ``jax.lax``: convolution, pools, the folded average pool, and their adjoints."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import affine, make_params, make_state, reference_phi, slow
from jax.test_util import check_grads

import ep_jax as ep
from ep_jax import conv, convolution, network

pytestmark = pytest.mark.usefixtures("x64")


def close(ours: Any, exact: Any) -> None:
    np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-12)


def conv_on_conv(
    kernel: int, padding: Any, pool: Any, fold: bool, feedback: float = 0.5
) -> ep.NetworkSpec:
    """A network whose second layer is the one under test, on a state with several channels.

    Sides are the smallest that fit a 2x3 or 3x2 output, so odd where an even kernel is VALID.
    """
    grow = kernel - 1 if padding == "VALID" else 0
    h, w = (4, 6) if kernel % 3 else (6, 4)
    if pool is None:
        h, w = h - 1, w  # without a pool, odd sides are legal
    below = ep.Conv(1 + kernel % 3, 1, pool=None)
    tested = ep.Conv(2 + kernel % 2, kernel, pool=pool, padding=padding, fold=fold)
    return ep.NetworkSpec(
        (h + grow, w + grow, 2), (below, tested, ep.Dense(2)), ep.Rate(), feedback=feedback
    )


CASES = [
    *[(k, padding, "avg", True) for k in range(1, 7) for padding in ("VALID", "SAME")],
    (2, "VALID", "avg", False),
    (3, "SAME", "avg", False),
    (2, "SAME", "max", False),
    (5, "VALID", "max", False),
    (2, "VALID", None, False),
    (3, "SAME", None, False),
]


@pytest.mark.parametrize(("kernel", "padding", "pool", "fold"), CASES)
def test_drive_and_derivatives_equal_lax(kernel: int, padding: str, pool: Any, fold: bool) -> None:
    """A wrong fold, packing, padding side or flattening order, in the drive or any derivative.

    Phi is linear in every A_l, so dPhi/ds_l holds the layer's values, and the derivatives by
    weights, input and the state below hold its adjoints.
    """
    spec = conv_on_conv(kernel, padding, pool, fold)
    params, state = make_params(spec, seed=kernel), make_state(spec)
    x = jnp.asarray(np.random.default_rng(3).normal(size=spec.input_shape))

    @jax.jit
    def both(params: Any, x: Any, state: Any) -> Any:
        ours = jax.value_and_grad(lambda p, x, s: ep.phi(p, spec, x, s), (0, 1, 2))
        lax = jax.value_and_grad(lambda p, x, s: reference_phi(p, spec, x, s), (0, 1, 2))
        return ours(params, x, state), lax(params, x, state)

    ours, lax = both(params, x, state)
    jax.tree.map(close, ours, lax)


@pytest.mark.parametrize(
    ("padding", "pool"), [("VALID", "avg"), ("SAME", "avg"), ("SAME", "max"), ("VALID", None)]
)
def test_feedback_is_the_derivative_of_the_drive(padding: Any, pool: Any) -> None:
    """An adjoint that is not that of the pool, or feedback in the wrong layout."""
    spec = conv_on_conv(3, padding, pool, fold=True)
    params = make_params(spec)
    here, above, _ = make_state(spec)

    def pairing(s: jax.Array) -> jax.Array:  # <A_2(s_1), s_2> by lax
        return jnp.sum(affine(spec.layers[1], params[1], s) * above)

    def ours(here: jax.Array) -> jax.Array:
        prepared = network.prepare(params, spec)
        packed = network.pack(spec, (here, above, jnp.zeros(2)))
        result = network.pull(spec, prepared, spec.edges[1], packed[0], packed[1])
        return network.unpack(spec, (result, packed[1], jnp.zeros(2)))[0]

    close(jax.jit(ours)(here), jax.jit(jax.grad(pairing))(here))


@pytest.mark.parametrize(
    ("padding", "pool", "fold"),
    [
        ("VALID", "avg", True),
        ("SAME", "avg", True),
        ("SAME", "avg", False),
        ("SAME", None, False),
        ("VALID", "max", False),
    ],
)
def test_feedback_is_adjoint(padding: Any, pool: Any, fold: bool) -> None:
    """Drive and feedback that are no pair: ``<A'(s) u, v> = <u, A'(s)^T v>``.

    For a max pool ``A'(s) u`` is the central difference, exact where no winner changes.
    """
    spec = conv_on_conv(3, padding, pool, fold)
    prepared, edge = network.prepare(make_params(spec), spec), spec.edges[1]
    rng = np.random.default_rng(5)
    s, u, v = (
        *(network.pack(spec, make_state(spec, seed))[0] for seed in (2, 6)),
        jnp.asarray(rng.normal(size=network.pack(spec, make_state(spec))[1].shape)),
    )
    step = 1e-6  # far below the gaps between random competitors in a window

    @jax.jit
    def pairings() -> tuple[jax.Array, jax.Array]:
        plus = network.drive(spec, prepared, edge, s + step * u)
        minus = network.drive(spec, prepared, edge, s - step * u)
        forth = jnp.sum((plus - minus) / (2 * step) * v)
        return forth, jnp.sum(u * network.pull(spec, prepared, edge, s, v))

    forth, back = pairings()
    np.testing.assert_allclose(forth, back, rtol=1e-8)  # rounding 1e-16 / step


@pytest.mark.parametrize("fold", [True, False])
def test_adjoint_of_the_average_pool_divides_by_four(fold: bool) -> None:
    """Upsampling without the 1/4 of the mean, the classical slip of an inverse pool."""
    spec = ep.NetworkSpec(
        (4, 2, 1), (ep.Conv(1, 1, pool=None), ep.Conv(1, 1, fold=fold), ep.Dense(1)), ep.Rate()
    )
    params = make_params(spec)
    params = (params[0], {"w": jnp.ones((1, 1, 1, 1)), "b": jnp.zeros(1)}, params[2])
    prepared = network.prepare(params, spec)
    state = (jnp.zeros((4, 2, 1)), jnp.array([8.0, 12.0]).reshape(2, 1, 1), jnp.zeros(1))
    here, above, _ = network.pack(spec, state)
    spread = network.pull(spec, prepared, spec.edges[1], here, above)
    spread = network.unpack(spec, (spread, above, jnp.zeros(1)))[0]
    assert spread[..., 0].tolist() == [[2, 2], [2, 2], [3, 3], [3, 3]]


def test_adjoint_of_the_max_pool_goes_to_the_winner() -> None:
    """Feedback through a max pool that is spread, or routed by another state than the current."""
    spec = ep.NetworkSpec(
        (2, 2, 1), (ep.Conv(1, 1, pool=None), ep.Conv(1, 1, pool="max"), ep.Dense(1)), ep.Rate()
    )
    params = make_params(spec)
    params = (params[0], {"w": -2 * jnp.ones((1, 1, 1, 1)), "b": jnp.zeros(1)}, params[2])
    here = jnp.array([[0.4, 0.3], [0.1, 0.2]])[..., None]  # the weight is negative: .1 wins
    state = network.pack(spec, (here, jnp.full((1, 1, 1), 5.0), jnp.zeros(1)))
    routed = network.pull(spec, network.prepare(params, spec), spec.edges[1], *state[:2])
    assert routed[..., 0].tolist() == [[0, 0], [-10, 0]]


@pytest.mark.parametrize(
    ("layer", "below", "blocked"),
    [
        (ep.Conv(2, 3), (6, 8, 3), True),
        (ep.Conv(2, 2), (5, 7, 3), False),
        (ep.Conv(2, 3, padding="SAME"), (6, 8, 3), False),
        (ep.Conv(2, 3, pool="max"), (6, 8, 3), False),
        (ep.Dense(2), (6, 8, 3), False),
    ],
)
def test_unpack_inverts_pack(layer: Any, below: tuple[int, ...], blocked: bool) -> None:
    """A state that comes out of a phase permuted; blocks of two that are not the 2x2 windows."""
    state = jnp.arange(np.prod(below), dtype=float).reshape(below)
    packed = layer.pack(below, state)
    assert (layer.unpack(below, packed) == state).all()
    if blocked:
        assert packed.shape == (below[0] // 2, below[1] // 2, 4 * below[2])
        assert sorted(packed[1, 2].tolist()) == sorted(state[2:4, 4:6].ravel().tolist())


def test_shapes_follow_lax() -> None:
    """Output shapes off by one for even kernels and odd sides."""
    for layer, below in [
        (ep.Conv(3, 4), (9, 7, 2)),
        (ep.Conv(3, 4, padding="SAME"), (8, 6, 2)),
        (ep.Conv(1, 2, pool=None), (9, 7, 2)),
        (ep.Conv(5, 5, pool="max"), (8, 10, 2)),
    ]:
        p = layer.init(jax.random.key(0), below, 1.0, float)
        assert layer.output_shape(below) == affine(layer, p, jnp.zeros(below)).shape


@pytest.mark.parametrize(
    ("layer", "below"),
    [
        (ep.Conv(3, 3), (8, 8, 2)),  # folded, in blocks
        (ep.Conv(3, 3, padding="SAME"), (6, 4, 2)),  # framed on all sides
        slow(ep.Conv(3, 2, padding="SAME"), (6, 4, 2)),  # folded, padded on one side in the blocks
        (ep.Conv(2, 5, padding="SAME"), (6, 6, 17)),  # one position of the window at a time
        slow(ep.Conv(3, 2), (5, 7, 2)),  # folded, but odd: framed by a row and a column of zeros
        slow(ep.Conv(3, 3, padding="SAME"), (6, 4, 20)),  # the same, one position at a time
        (ep.Conv(2, 1), (4, 4, 65)),
        slow(ep.Conv(3, 4, "max", "SAME"), (6, 4, 2)),
    ],
)
def test_all_ways_to_convolve_are_one(layer: Any, below: tuple[int, ...]) -> None:
    """A way that only another backend, or only differentiation, takes; a wrong derivative of one.

    Each is held against the others, forward and back, and the derivatives of `convolve` and
    `adjoint`, in both modes, against finite differences.
    """
    rng = np.random.default_rng(0)
    window = layer._window(below)
    read = functools.partial(layer._read, below)
    packed = layer.pack(below, jnp.asarray(rng.normal(size=below)))
    matrix = layer.prepare(layer.init(jax.random.key(0), below, 1.0, float), below).matrix
    kernel = functools.partial(conv.Kernel, below=below)
    out = layer._convolve(kernel(matrix), packed)
    for way in (
        convolution.looped,
        convolution.looped_rows,
        convolution.unrolled,
        convolution.native,
    ):
        close(way(window, read(packed), matrix), out)
    field = jnp.asarray(rng.normal(size=out.shape))
    back = layer._adjoint(kernel(matrix), field)
    assert back.shape == packed.shape
    for way in (convolution.unrolled, convolution.native):
        told = convolution.transposed(window, read(packed).shape, way, field, matrix)
        close(jax.linear_transpose(read, packed)(told)[0], back)
    check_grads(lambda p, m: layer._convolve(kernel(m), p), (packed, matrix), order=1)
    check_grads(lambda f, m: layer._adjoint(kernel(m), f), (field, matrix), order=1)
