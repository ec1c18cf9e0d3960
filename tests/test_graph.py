"""Strides, dilation, groups, pools of any window, and skips, where the other tests have none.

That EP's gradient approaches the exact one on them is in `test_derivatives`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import affine, make_batch, make_params, make_state, one_hot, reference_current

import ep_jax as ep

pytestmark = pytest.mark.usefixtures("x64")

SKIPS = ep.NetworkSpec(
    (11, 8, 2),
    (
        ep.Conv(4, 3, stride=2, pool=None, padding="SAME"),
        ep.Conv(6, 3, pool=ep.MaxPool(2, stride=1), padding="SAME", groups=2),
        ep.Conv(5, 2, pool=ep.AvgPool(2, stride=1), padding="SAME", dilation=2),
        ep.Dense(4),
        ep.Dense(3),
    ),
    ep.Rate(),
    feedback=0.7,
    skips=(
        ep.Skip(1, 3, ep.Conv(5, 3, pool=None)),
        ep.Skip(0, 4, ep.Dense(4)),
        ep.Skip(2, 5, ep.Dense(3)),
    ),
)


@pytest.mark.parametrize(
    "layer",
    [
        ep.Conv(3, 3, stride=2, pool=None),
        ep.Conv(3, 2, stride=3, pool=None, padding="SAME"),
        ep.Conv(3, 3, dilation=2, pool=None, padding="SAME"),
        ep.Conv(4, 3, groups=2, pool=None),
        ep.Conv(4, 3, pool="avg", padding="SAME", groups=4, stride=2),
        ep.Conv(3, 2, pool=ep.AvgPool(3, stride=2)),
        ep.Conv(3, 3, pool=ep.MaxPool(3, stride=2), padding="SAME"),
        ep.Conv(3, 2, pool=ep.MaxPool(2, stride=3)),
        ep.Conv(3, 3, pool=ep.GlobalAvgPool()),
    ],
    ids=str,
)
def test_a_layer_and_its_transpose_equal_lax(layer: Any) -> None:
    """A stride, dilation, group or window on the wrong axis or side; a transpose of another map."""
    below = (12, 7, 4)
    p = layer.init(jax.random.key(0), below, 1.0, jnp.float64) | {"b": jnp.zeros(layer.features)}
    rng = np.random.default_rng(1)
    s = jnp.asarray(rng.normal(size=below))
    exact, transpose = jax.vjp(lambda s: affine(layer, p, s), s)
    field = jnp.asarray(rng.normal(size=exact.shape))
    prepared, packed = layer.prepare(p, below), layer.pack(below, s)
    assert layer.output_shape(below) == exact.shape
    np.testing.assert_allclose(layer.drive(prepared, packed), exact, atol=1e-12)
    told = layer.unpack(below, layer.pull(prepared, packed, field))
    np.testing.assert_allclose(told, transpose(field)[0], atol=1e-12)


def test_skips_rest_where_the_energy_is_stationary() -> None:
    """A skip that a sweep, a coordinate or one of its two ends forgets, or attenuates otherwise.

    At rest ``s = sigma(alpha^(L-l) dPhi/ds)``, whatever led there, with Phi by ``jax.lax``.
    """
    params, (xs, ys) = make_params(SKIPS, gain=0.6), make_batch(SKIPS, 1)
    x, y, beta = xs[0], one_hot(SKIPS, ys)[0], 0.3

    def gap(state: Any, beta: float) -> Any:
        currents = [reference_current(params, SKIPS, x, state, l) for l in range(SKIPS.depth)]
        rest = [jnp.clip(current, 0, 1) for current in currents[:-1]]
        rest.append(currents[-1] + beta * (y - state[-1]))
        return [a - b for a, b in zip(state, rest, strict=True)]

    def settled(sweep: Any, coordinates: Any, omega: float = 1.0) -> Any:
        phases = ep.Phases(300, 300, sweep=sweep, coordinates=coordinates, relaxation=omega)
        free, _ = ep.free_phase(params, SKIPS, x, phases)
        return free, ep.nudged_phase(params, SKIPS, x, y, free, beta, phases)[0]

    @jax.jit
    def everything() -> Any:
        found = [
            settled("synchronous", "absolute"),
            settled("alternating", "displacement"),
            settled("ordered", "displacement", 1.3),
        ]
        free, nudged = found[0]
        gaps = [gap(free, 0.0), gap(nudged, beta)]
        return found, gaps

    (first, *others), gaps = everything()
    assert max(float(jnp.abs(gap).max()) for gap in jax.tree.leaves(gaps)) < 1e-10
    assert float(jnp.abs(first[1][0] - first[0][0]).max()) > 1e-4  # the nudge comes all the way
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), first, other)


@pytest.mark.parametrize("sweep", ["alternating", "ordered"])
def test_energy_never_rises_with_skips(sweep: Any) -> None:
    """Layers that a skip links, updated at once; a skip that only one of its ends hears."""
    params, state = make_params(SKIPS, seed=4, gain=1.2), make_state(SKIPS)
    x = make_batch(SKIPS, 1)[0][0]

    @jax.jit
    def energies() -> jax.Array:
        phases = ep.Phases(40, sweep=sweep)
        seen = ep.free_phase(
            params,
            SKIPS,
            x,
            phases,
            trace=lambda now: ep.energy(params, SKIPS, x, now.state),
            start=state,
        )[1]
        return jnp.append(ep.energy(params, SKIPS, x, state), seen.trace)

    found = np.asarray(energies())
    assert (np.diff(found) <= 1e-13 * np.abs(found).max()).all()
    assert found[-1] < found[0] - 0.01
