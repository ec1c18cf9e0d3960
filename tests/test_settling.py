"""Over-relaxation, tolerance, stragglers, residuals: how a phase settles and how it tells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    LinearNetwork,
    cosine,
    exact_gradient,
    make_batch,
    make_params,
    one_hot,
    reference_current,
    relative_error,
    slow,
)

import ep_jax as ep
from ep_jax import diagnostics
from ep_jax.phases import optimal_relaxation

pytestmark = pytest.mark.usefixtures("x64")

LAYERS = (ep.Conv(3, 3), ep.Conv(4, 2, pool=None), ep.Dense(6), ep.Dense(3))
DISPLACED: Any = {"sweep": "ordered", "coordinates": "displacement"}
gradient = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))


def small(neuron: Any, feedback: float = 1.0, layers: Any = LAYERS) -> ep.NetworkSpec:
    return ep.NetworkSpec((8, 8, 1), layers, neuron, feedback=feedback)


def dense(neuron: Any, feedback: float = 1.0) -> ep.NetworkSpec:
    """Three layers that compile fast."""
    return ep.NetworkSpec((5,), (ep.Dense(8), ep.Dense(6), ep.Dense(3)), neuron, feedback=feedback)


def alive(spec: ep.NetworkSpec, gain: float = 0.6, seed: int = 2) -> Any:
    """Parameters with which most hidden units are neither 0 nor 1, so that all layers count.

    At full feedback `small` and `dense` have a radius of .8 to .9.
    """
    params = make_params(spec, seed, gain, bias=0.1)
    return (*({"w": p["w"], "b": p["b"] + 0.4} for p in params[:-1]), params[-1])


def chain(seed: int, radius: float) -> tuple[ep.NetworkSpec, Any]:
    """A linear network whose synchronous relaxation has this radius: it grows with the weights."""
    linear = ep.Rate(activation="linear")
    spec = ep.NetworkSpec((3,), (ep.Dense(5), ep.Dense(4), ep.Dense(3)), linear)
    params = make_params(spec, seed)
    system = LinearNetwork(params, 1.0, np.zeros(3), np.zeros(3))
    factor = radius / np.abs(np.linalg.eigvals(system.M)).max()
    return spec, tuple({"w": factor * p["w"], "b": p["b"]} for p in params)


# Over-relaxation.


@pytest.mark.parametrize("neuron", [ep.Rate(), ep.Rate(0.8), ep.Rate(activation="tanh")])
@pytest.mark.parametrize("sweep", ["alternating", "ordered"])
def test_over_relaxation_rests_at_the_same_point(neuron: Any, sweep: Any) -> None:
    """A step that moves the fixed point: free, and nudged in both coordinates."""
    spec = small(neuron, 0.6)
    params, (xs, ys) = alive(spec), make_batch(spec, 2)
    plain = ep.Phases(300, 300, 0.2, "symmetric", sweep, "absolute")

    @jax.jit
    def states(x: Any, y: Any) -> Any:
        found = []
        for coordinates in ("absolute", "displacement"):
            for omega in (1.0, 1.4):
                phases = replace(plain, relaxation=omega, coordinates=coordinates)
                free, _ = ep.free_phase(params, spec, x, phases)
                found.append((free, ep.nudged_phase(params, spec, x, y, free, 0.2, phases)[0]))
        return found

    first, *others = states(xs[0], ys[0])
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), other, first)


def test_a_step_is_omega_times_the_neurons_own() -> None:
    """A relaxation that replaces the neuron's step, or is applied twice.

    From zero ``s <- clip(omega epsilon I)``, and a nudged step from rest moves by as much.
    """
    spec = ep.NetworkSpec((4,), (ep.Dense(4),), ep.Rate(0.5), cost="squared_error")
    params = ({"w": jnp.eye(4), "b": jnp.zeros(4)},)
    x = jnp.asarray([0.1, 0.2, 0.4, 0.3])
    phases = ep.Phases(1, 1, 0.1, "one_sided", relaxation=1.6, **DISPLACED)
    (state,), _ = ep.free_phase(params, spec, x, phases)
    np.testing.assert_allclose(state, 0.8 * x, rtol=1e-14)
    (nudged,), _ = ep.nudged_phase(params, spec, x, 1, (x,), 0.1, phases)
    np.testing.assert_allclose(nudged, x - 0.8 * 0.1 * (x - jnp.eye(4)[1]), rtol=1e-13)


def test_youngs_optimum_shrinks_errors_by_omega_minus_one() -> None:
    """A sweep in another order, or an omega that is not consistent with Young's theory.

    A linear chain: the synchronous matrix has radius rho; ordered sweeps shrink errors by rho^2,
    over-relaxed ones at the optimum by omega - 1 (times a factor linear in the sweeps).
    """
    rho = 0.95
    spec, params = chain(seed=3, radius=rho)
    x, y = jnp.asarray([0.3, -0.2, 0.5]), np.zeros(3)
    system = LinearNetwork(params, 1.0, np.asarray(x), y)
    omega, rest = optimal_relaxation(rho), system.rest(0.0)

    def errors(relaxation: float, sweeps: int) -> np.ndarray:
        phases = ep.Phases(sweeps, sweep="ordered", relaxation=relaxation)
        _, info = ep.free_phase(
            params, spec, x, phases, trace=lambda seen: jnp.concatenate(seen.state) - rest
        )
        return np.linalg.norm(np.asarray(info.trace), axis=1)

    gauss = errors(1.0, 60)
    np.testing.assert_allclose(gauss[1:] / gauss[:-1], rho**2, rtol=0.2)
    np.testing.assert_allclose(gauss[-1] / gauss[-2], rho**2, rtol=1e-3)
    young = errors(omega, 40)
    assert (young[-1] / young[10]) ** (1 / 29) == pytest.approx(omega - 1, abs=0.06)
    assert np.argmax(young < 1e-6 * young[0]) * 3 < np.argmax(errors(1.0, 400) < 1e-6 * gauss[0])


# Residuals.


@pytest.mark.parametrize("feedback", [1.0, 0.1])
def test_residuals_are_those_of_the_rate_map(feedback: float) -> None:
    """The change of a sweep instead; another layer's; one that is weighted by ``alpha^(L - l)``."""
    spec = small(ep.DeltaCode(), feedback)
    params, (xs, ys) = alive(spec), make_batch(spec, 1)
    settle = jax.jit(ep.free_phase, static_argnames=("spec", "phases"))
    nudge = jax.jit(ep.nudged_phase, static_argnames=("spec", "phases"))
    state, info = settle(params, spec, xs[0], ep.Phases(4, sweep="ordered"))
    currents = [reference_current(params, spec, xs[0], state, l) for l in range(spec.depth)]
    swept = [*(jnp.clip(i, 0, 1) for i in currents[:-1]), currents[-1]]  # the output is linear
    expected = [
        np.linalg.norm(np.asarray(f - s)) / np.linalg.norm(np.asarray(s))
        for f, s in zip(swept, state, strict=True)
    ]
    np.testing.assert_allclose(info.residuals, expected, rtol=1e-10)
    assert min(expected) > 1e-3
    assert len(set(map(float, info.residuals))) == 4
    assert info.residual == max(info.residuals) == info.mean_residual
    # A displacement's, and the same of absolute coordinates: relative to what the nudge moved.
    found = []
    for coordinates in ("absolute", "displacement"):
        phases = ep.Phases(400, 1, 1e-3, sweep="ordered", coordinates=coordinates)
        rates = replace(spec, neuron=ep.Rate())
        free, _ = settle(params, rates, xs[0], replace(phases, coordinates="absolute"))
        found.append(nudge(params, rates, xs[0], ys[0], free, 1e-3, phases)[1])
    # The lowest layer has moved by beta alpha^3 = 1e-6 of a state of order one, to 1e-16.
    np.testing.assert_allclose(found[0].residuals, found[1].residuals, rtol=1e-6, atol=1e-9)
    assert found[0].residual > 1e-3


def test_a_batch_tells_its_worst_example() -> None:
    """One unsettled example among many, lost in a mean."""
    spec = dense(ep.Rate())
    params, (xs, ys) = alive(spec), make_batch(spec, 8)
    phases = ep.Phases(6, 6, 0.01, "one_sided", **DISPLACED)
    _, batch = gradient(params, spec, xs, ys, phases)
    alone = [gradient(params, spec, xs[i : i + 1], ys[i : i + 1], phases)[1] for i in range(8)]
    for phase in ("free", "nudged"):
        whole, parts = getattr(batch, phase), [getattr(one, phase) for one in alone]
        worst = np.array([one.residual for one in parts])
        np.testing.assert_allclose(whole.residual, worst.max(), rtol=1e-9)
        np.testing.assert_allclose(whole.mean_residual, worst.mean(), rtol=1e-9)
        np.testing.assert_allclose(whole.unsettled, (worst > 1e-2).mean(), rtol=1e-12)
        layers = np.array([one.residuals for one in parts])
        np.testing.assert_allclose(whole.residuals, layers.max(0), rtol=1e-9)


def test_a_frozen_code_is_found_out() -> None:
    """A code that stops far from the fixed point, with nothing moving: its residual said 0.

    The scheduled quantum halves each sweep, faster than the state settles, until it is none.
    """
    spec = small(ep.DeltaCode(quantum=0.5, decay=0.3, lag=0.0))
    params, (xs, _) = alive(spec), make_batch(spec, 1)
    phases, settle = (
        ep.Phases(250, sweep="ordered"),
        jax.jit(ep.free_phase, static_argnames=("spec", "phases")),
    )
    state, info = settle(params, spec, xs[0], phases)
    rest, _ = settle(params, replace(spec, neuron=ep.Rate()), xs[0], phases)
    away = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(state, rest, strict=True)]
    assert max(away) > 0.05
    assert float(info.moving) == 0
    assert float(info.residual) > 0.02
    # The quantum that scales itself ends where the rates do.
    coded, info = settle(params, replace(spec, neuron=ep.DeltaCode()), xs[0], phases)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), coded, rest)
    assert float(info.residual) < 1e-7


def test_a_nudge_that_has_not_arrived_is_told() -> None:
    """Two synchronous sweeps reach two layers: the gradients below are zero, and nobody said so."""
    spec = small(ep.Rate(), 0.002)
    params, (xs, ys) = alive(spec), make_batch(spec, 3)
    phases = ep.Phases(40, 2, 0.1, "one_sided", "synchronous", "displacement")
    grads, info = gradient(params, spec, xs, ys, phases)
    assert [float(jnp.abs(g["w"]).max()) > 0 for g in grads] == [False, False, True, True]
    assert info.nudged is not None
    assert float(info.nudged.residual) == 1.0
    assert float(info.nudged.unsettled) == 1.0


# Tolerance.


@pytest.mark.parametrize("neuron", [ep.Rate(), ep.DeltaCode()])
def test_a_phase_stops_at_its_tolerance(neuron: Any) -> None:
    """A limit on the output alone, one that is never reached, or sweeps that are not told.

    Of 398 sweeps, looked at every four and after the last, the first look is after two.
    """
    spec = dense(neuron)
    params, (xs, ys) = alive(spec), make_batch(spec, 4)
    endless = ep.Phases(398, 201, 0.05, "one_sided", **DISPLACED)
    loose = replace(endless, tolerance=1e-3)
    _, info = gradient(params, spec, xs, ys, loose)
    assert info.nudged is not None
    for phase, most in ((info.free, 398), (info.nudged, 201)):
        assert float(phase.residual) < 1e-3
        assert 4 <= float(phase.sweeps) < most / 2

    @jax.jit
    @jax.vmap
    def look(x: Any) -> Any:
        _, ended = ep.free_phase(params, spec, x, loose)
        _, seen = ep.free_phase(params, spec, x, replace(endless, free=98), None, lambda s: s.state)
        swept = jax.vmap(
            lambda s: [reference_current(params, spec, x, s, l) for l in range(spec.depth)]
        )(seen.trace)
        return ended.sweeps, seen.trace, swept

    sweeps, states, drives = look(xs)
    np.testing.assert_allclose(info.free.sweeps, np.mean(sweeps))
    drives = [*(np.clip(d, 0, 1) for d in drives[:-1]), drives[-1]]
    residuals = [
        np.linalg.norm(d - s, axis=-1) / np.linalg.norm(s, axis=-1)
        for d, s in zip(drives, map(np.asarray, states), strict=True)
    ]
    looks = np.arange(2, 98, 4)
    settled = np.max(residuals, axis=0)[:, looks - 1] < 1e-3
    np.testing.assert_array_equal(sweeps, looks[settled.argmax(1)])
    assert settled[:, -1].all()
    _, info = gradient(params, spec, xs, ys, replace(endless, free=6, tolerance=1e-12))
    assert float(info.free.sweeps) == 6


# Stragglers.


CONSTANT: Any = {"epsilon_power": 0.0, "epsilon_floor": 0.0}


@pytest.mark.parametrize(
    "neuron",
    [
        ep.Rate(epsilon_power=0.3),
        ep.DeltaCode(),
        slow(ep.DeltaCode(decay=0.8)),
        slow(ep.SigmaDelta(lam_power=0.0, **CONSTANT)),
        slow(ep.Bernoulli(**CONSTANT)),
        slow(ep.IntegrateFire()),
    ],
    ids=str,
)
def test_stragglers_go_on_where_they_were(neuron: Any) -> None:
    """A code that begins anew, a clock or random numbers that do, a mean over other sweeps.

    With all examples as stragglers, everything is as with all sweeps at once. (A schedule that
    counts on through the nudged phase counts the sweeps that all make: none here does.)
    """
    spec = dense(neuron, 0.5)
    params, (xs, ys) = alive(spec), make_batch(spec, 3)
    every = ep.Phases(12, 10, 0.05, "one_sided", **DISPLACED)
    on = replace(every, free=5, nudged=4, stragglers=0.99, free_more=7, nudged_more=6)
    at_once, resumed = (
        gradient(params, spec, xs, ys, phases, jax.random.key(3)) for phases in (every, on)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), resumed, at_once)
    assert float(resumed[1].free.sweeps) == 12


def test_the_least_settled_are_the_stragglers() -> None:
    """The best settled ones, examples mixed up, or those of another phase.

    After four sweeps the two worst of eight go on for nine, and of the nudged phase (in which
    others may be the worst) the two worst for six.
    """
    spec = dense(ep.Rate())
    params, (xs, ys) = alive(spec), make_batch(spec, 8)
    few = ep.Phases(4, 3, 0.05, "one_sided", **DISPLACED)
    more = replace(few, stragglers=0.25, free_more=9, nudged_more=6)

    @jax.jit
    def alone(x: Any, y: Any) -> Any:
        found = []
        for free in (4, 13):
            state, info = ep.free_phase(params, spec, x, replace(few, free=free))
            nudged = [
                ep.nudged_phase(params, spec, x, y, state, 0.05, replace(few, nudged=n))[1]
                for n in (3, 9)
            ]
            found.append((state[-1], info.residual, [i.residual for i in nudged]))
        return found

    short, long = jax.vmap(alone)(xs, ys)
    _, info = gradient(params, spec, xs, ys, more)
    slow = np.argsort(short[1])[-2:]
    late = np.isin(np.arange(8), slow)
    output = np.where(late[:, None], long[0], short[0])
    np.testing.assert_allclose(info.output, output, atol=1e-12)
    assert (np.abs(long[0] - short[0]).max(1) > 1e-4).all()
    np.testing.assert_allclose(info.free.residual, np.where(late, long[1], short[1]).max())
    np.testing.assert_allclose(info.free.sweeps, (6 * 4 + 2 * 13) / 8)
    # The nudged phase starts from these, and has stragglers of its own.
    three, nine = (np.where(late, a, b) for a, b in zip(long[2], short[2], strict=True))
    nudged_late = np.isin(np.arange(8), np.argsort(three)[-2:])
    assert info.nudged is not None
    expected = np.where(nudged_late, nine, three)
    np.testing.assert_allclose(info.nudged.residual, expected.max(), rtol=1e-9)
    np.testing.assert_allclose(info.nudged.mean_residual, expected.mean(), rtol=1e-9)
    np.testing.assert_allclose(info.nudged.sweeps, (6 * 3 + 2 * 9) / 8)


# Weak feedback, deep networks, low precision.


@pytest.mark.parametrize(
    ("depth", "dtype", "beta", "worst"),
    [(17, jnp.float32, 1e-3, 1e-4), (4, jnp.float16, 0.03, 0.02)],
)
def test_weak_feedback_underflows_nowhere(
    depth: int, dtype: Any, beta: float, worst: float
) -> None:
    """Units that are rounded to 0: gradients of 0 or NaN in the lowest layers, without a word.

    At alpha = .002 the lowest of 17 layers moves by 1e-46 under the nudge. In the limit of weak
    feedback the gradient is that of back-propagation, here in float64, and the symmetric estimate
    ``1 / (1 - beta^2)`` of it.
    """
    spec = ep.NetworkSpec(
        (6,), (ep.Dense(8),) * (depth - 1) + (ep.Dense(3),), ep.Rate(), feedback=0.002
    )
    params, (xs, ys) = alive(spec), make_batch(spec, 5)
    phases = ep.Phases(4, 3, beta, "symmetric", **DISPLACED)
    back = jax.jit(ep.bptt_gradient, static_argnames=("spec", "phases"))
    exact = back(params, spec, xs, ys, ep.Phases(12, sweep="ordered"))[0]
    less = jax.tree.map(lambda a: a.astype(dtype), (params, xs))
    grads, info = gradient(less[0], spec, less[1], ys, phases)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    for found, true in zip(grads, exact, strict=True):
        assert relative_error(found, true) < worst
    assert info.nudged is not None
    assert np.isfinite(float(info.nudged.residual))


# The self-scaling code.


def test_the_energy_weighted_quantum_bounds_the_gap() -> None:
    """A quantum of another size: ``scale sqrt(sum g^4 / sum g^2)``, and no faster than `shrink`."""
    code = ep.DeltaCode(scale=0.7, shrink=0.6, levels=5)
    gap = jnp.asarray([0.4, -0.1, 0.0, 0.05])
    g = np.asarray(gap)
    size = 0.7 * np.sqrt((g**4).sum() / (g**2).sum())
    from ep_jax.neurons import Clock

    clock = Clock(jnp.asarray(3), 9, 0, 1, 1.0, 1.0, False, False, False)
    delta, _ = code.resolution(clock, gap, jnp.asarray(0.0))
    np.testing.assert_allclose(delta, size, rtol=1e-12)
    delta, _ = code.resolution(clock, gap, jnp.asarray(5.0))
    np.testing.assert_allclose(delta, 3.0, rtol=1e-12)
    # In a nudged phase the same in its own units, however small they are.
    small_clock = clock._replace(unit=1e-80, error=1e-80)
    delta, _ = code.resolution(small_clock, 1e-160 * gap, jnp.asarray(0.0))
    np.testing.assert_allclose(delta, 1e-160 * size, rtol=1e-9)
    state = code.start(jnp.zeros(4), jnp.zeros(4))
    new, count = code.step(state, gap, lambda s, i, e: i, clock, None)
    np.testing.assert_array_equal(count, np.clip(np.round(g / size), -2, 2))
    np.testing.assert_allclose(new.known, size * np.asarray(count), rtol=1e-12)


@pytest.mark.parametrize(
    "code",
    [
        ep.DeltaCode(),
        ep.DeltaCode(levels=3, scale=1.3),
        ep.DeltaCode(leak=True, scale=2.0, shrink=0.9),
    ],
)
def test_a_self_scaling_code_learns_what_rates_do(code: Any) -> None:
    """A code that freezes, or one that is fine in the free phase alone; every loss scale."""
    spec = dense(code)
    *hidden, last = alive(spec)
    # Answers within [0, 1]: a binary code has no other values.
    params = (*hidden, {"w": 0.3 * last["w"], "b": last["b"] + 0.4})
    xs, ys = make_batch(spec, 4)
    exact = exact_gradient(params, replace(spec, neuron=ep.Rate()), xs, ys, 200)
    phases = ep.Phases(120, 80, 1e-3, "one_sided", **DISPLACED)
    grads, info = gradient(params, spec, xs, ys, phases)
    assert min(cosine(g, e) for g, e in zip(grads, exact, strict=True)) > 0.99
    assert 0 < float(info.output.min()) < float(info.output.max()) < 1
    assert float(info.free.residual) < 0.02


def test_a_schedule_ends_at_rounding() -> None:
    """1/delta overflows after 175 sweeps at a decay of .6: BPTT was NaN, and spikes were noise.

    At weak feedback the state settles faster than the quantum shrinks, so nothing is left to tell.
    """
    spec = dense(ep.DeltaCode(quantum=0.7, decay=0.6), 0.1)
    params, (xs, ys) = alive(spec), make_batch(spec, 2)
    single: Any = jax.tree.map(lambda a: a.astype(jnp.float32), (params, xs))
    run = jax.jit(ep.bptt_gradient, static_argnames=("spec", "phases"))
    short, long = (
        run(single[0], spec, single[1], ys, ep.Phases(free=n, sweep="ordered")) for n in (60, 260)
    )
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(long[0]))
    assert min(cosine(a, b) for a, b in zip(short[0], long[0], strict=True)) > 0.999
    spikes = [np.asarray(info.free.spikes) for _, info in (short, long)]
    np.testing.assert_allclose(spikes[1], spikes[0], atol=1)


# What one example may contribute.


def test_the_limit_scales_what_is_far_beyond_the_median() -> None:
    """A limit on the wrong side, of the batch instead of the example, or one that bends directions.

    Output errors are equal; displacements are 1, 2, 4 and 100 long; the median is 3, the limit 6.
    """
    from ep_jax.gradients.ep import limit_displacements

    sizes = jnp.asarray([1.0, 2.0, 4.0, 100.0])
    direction = jnp.asarray([0.6, 0.8])
    d = (sizes[None, :, None] * direction,)
    (limited,), share = limit_displacements(d, jnp.full(4, 0.5), 2.0)
    np.testing.assert_allclose(
        limited[0], np.array([1.0, 2.0, 4.0, 6.0])[:, None] * np.asarray(direction), rtol=1e-12
    )
    assert float(share) == 0.25
    spec = dense(ep.Rate())
    params, (xs, ys) = alive(spec), make_batch(spec, 6)
    phases = ep.Phases(60, 60, 1e-3, "one_sided", **DISPLACED)
    free, _ = gradient(params, spec, xs, ys, phases)
    wide, info = gradient(params, spec, xs, ys, replace(phases, limit=1e6))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), wide, free)
    assert info.limited is not None
    assert float(info.limited) == 0


# What feedback does.


def test_recurrence_of_a_linear_network_is_a_solve() -> None:
    """Feedback that is not cut, is cut twice, or is another's of the wrong layer."""
    spec, params = chain(seed=0, radius=0.9)
    xs = np.random.default_rng(0).uniform(size=(6, 3))
    system = [LinearNetwork(params, 1.0, x, np.zeros(3)) for x in xs]
    rests = np.array([s.rest(0.0) for s in system])
    up, at = system[0], system[0].at
    down = np.zeros_like(up.M)
    for l in range(2):
        down[at[l], at[l + 1]] = up.M[at[l], at[l + 1]]
    heard = rests @ down.T

    def answers(feedback: np.ndarray) -> np.ndarray:
        forward = np.eye(len(up.c)) - (up.M - down)
        constants = np.array([s.c for s in system]) + feedback
        return np.linalg.solve(forward, constants.T).T

    cut = answers(np.zeros_like(heard))
    found = diagnostics.recurrence(params, spec, jnp.asarray(xs))
    share = [np.linalg.norm((rests - cut)[:, a]) / np.linalg.norm(rests[:, a]) for a in at]
    np.testing.assert_allclose(found.share, share, rtol=1e-8)
    own = rests[:, at[-1]].argmax(1)
    for name, feedback in (
        ("cut", np.zeros_like(heard)),
        ("mean", np.broadcast_to(heard.mean(0), heard.shape)),
        ("other", np.roll(heard, 1, 0)),
    ):
        expected = (answers(feedback)[:, at[-1]].argmax(1) != own).mean()
        np.testing.assert_allclose(getattr(found, name), expected)


@pytest.mark.slow
def test_suggested_phases_settle_every_input() -> None:
    """An omega of another radius; sweeps that are enough for most, or more than are needed."""
    spec = dense(ep.Rate())
    params, (xs, ys) = alive(spec), make_batch(spec, 6)
    phases = diagnostics.suggest_phases(params, spec, xs, tolerance=1e-3)
    radius = float(diagnostics.contractivity(params, spec, xs).radius.max())
    assert phases.relaxation == pytest.approx(optimal_relaxation(radius), abs=1e-6)

    @jax.jit
    @jax.vmap
    def away(x: Any) -> Any:
        """The furthest layer after each sweep."""
        rest, _ = ep.free_phase(params, spec, x, diagnostics.SETTLED)
        _, info = ep.free_phase(params, spec, x, phases, trace=lambda seen: seen.state)
        gaps = [
            jnp.linalg.norm(a - b, axis=-1) / jnp.linalg.norm(b)
            for a, b in zip(info.trace, rest, strict=True)
        ]
        return jnp.max(jnp.stack(gaps), axis=0)

    furthest = np.asarray(away(xs)).max(0)
    assert furthest[-1] < 1e-3 <= furthest[-2]
    exact = exact_gradient(params, spec, xs, ys, 300)
    grads, _ = gradient(params, spec, xs, ys, replace(phases, beta=1e-4))
    assert min(cosine(g, e) for g, e in zip(grads, exact, strict=True)) > 0.999
    with pytest.raises(ValueError, match="max_sweeps is 2, after which the free phase"):
        diagnostics.suggest_phases(params, spec, xs, max_sweeps=2)
    loud = make_params(spec, gain=3.0)
    with pytest.raises(ValueError, match=r"spectral radius of .*expected less than 1"):
        diagnostics.suggest_phases(loud, replace(spec, neuron=ep.Rate(activation="linear")), xs)


def test_feedback_strength_is_a_change_of_variables() -> None:
    """An alpha that is more than the size of couplings against the neurons' ranges.

    ``z_l = alpha^(-(L - l) / 2) s_l`` turns a linear alpha-network into the textbook's with links
    ``sqrt(alpha) W_l``, while input weights and biases scale with their layer: states, gradients
    and spectral radius are the same up to these factors. (Bounds scale along; the library has one
    range for all layers, so the activation here has none.)
    """
    alpha, layers = 0.3, (ep.Dense(5), ep.Dense(4), ep.Dense(3))
    spec = ep.NetworkSpec((3,), layers, ep.Rate(activation="linear"), feedback=alpha)
    twin = replace(spec, feedback=1.0)
    params, (xs, ys) = make_params(spec, gain=0.5), make_batch(spec, 3)
    scale = [alpha ** (-(2 - l) / 2) for l in range(3)]
    links = [scale[0], alpha**0.5, alpha**0.5]
    textbook = tuple(
        {"w": k * p["w"], "b": c * p["b"]} for k, c, p in zip(links, scale, params, strict=True)
    )
    phases = ep.Phases(300, 300, 0.1, "symmetric", **DISPLACED)
    for x in xs:
        ours, _ = ep.free_phase(params, spec, x, phases)
        theirs, _ = ep.free_phase(textbook, twin, x, phases)
        for s, z, c in zip(ours, theirs, scale, strict=True):
            np.testing.assert_allclose(c * s, z, rtol=1e-10)
        radius = [
            float(diagnostics.spectral_radius(p, n, x, s, 300))
            for p, n, s in ((params, spec, ours), (textbook, twin, theirs))
        ]
        np.testing.assert_allclose(*radius, rtol=1e-6)
    ours, _ = gradient(params, spec, xs, ys, phases)
    theirs, _ = gradient(textbook, twin, xs, ys, phases)
    for a, b, k, c in zip(ours, theirs, links, scale, strict=True):
        np.testing.assert_allclose(a["w"], k * b["w"], rtol=1e-8)
        np.testing.assert_allclose(a["b"], c * b["b"], rtol=1e-8)
    assert one_hot(spec, ys).shape == (3, 3)
