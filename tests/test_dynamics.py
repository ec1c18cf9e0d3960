"""The phases: one fixed point for all sweeps and coordinates, energy, order, noise, own neurons."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    affine,
    cosine,
    exact_gradient,
    make_batch,
    make_params,
    make_state,
    one_hot,
    reference_cost,
    reference_current,
    reference_nudge,
    slow,
)

import ep_jax as ep
from ep_jax import phases as phases_
from ep_jax import relaxation

pytestmark = pytest.mark.usefixtures("x64")

CONVS = (ep.Conv(3, 3), ep.Conv(4, 2, pool=None), ep.Dense(6), ep.Dense(3))


def small(neuron: Any, feedback: float = 1.0, layers: Any = CONVS, cost: Any = "squared_error"):
    return ep.NetworkSpec((8, 8, 1), layers, neuron, cost, feedback)


def clip(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 1)


SIGMA = {"hard_sigmoid": clip, "tanh": jnp.tanh, "softplus": jax.nn.softplus}


def reference_drive(params: Any, spec: Any, x: Any, s: Any, l: int, beta: Any, y: Any) -> Any:
    """What layer `l` relaxes to from the state `s`: ``sigma(alpha^(L-l) dPhi/ds - beta dC/ds)``."""
    drive, is_last = reference_current(params, spec, x, s, l), l == len(s) - 1
    if is_last:
        drive = drive + beta * reference_nudge(params, spec, s[-1], y)
    linear = is_last and spec.cost == "squared_error"
    return drive if linear else SIGMA[spec.neuron.activation](drive)


# Order of the updates.

ORDERS = {
    ("synchronous", False): [[0, 1, 2, 3]],
    ("synchronous", True): [[0, 1, 2, 3]],
    ("alternating", False): [[0, 2], [1, 3]],
    ("alternating", True): [[3, 1], [2, 0]],
    ("ordered", False): [[0], [1], [2], [3]],
    ("ordered", True): [[3], [2], [1], [0]],
}


@pytest.mark.parametrize("sweep", ["synchronous", "alternating", "ordered"])
def test_sweeps_update_layers_in_their_order(sweep: Any) -> None:
    """Layers that hear old signals where new ones exist, or news that travels against the sweep.

    Three free and three nudged sweeps, state by state, against updates written out one by one.
    """
    spec = small(ep.Rate(), 0.6)
    params, (xs, ys) = make_params(spec), make_batch(spec, 1)
    x, y, beta = xs[0], one_hot(spec, ys)[0], 0.3

    @jax.jit
    def both(start: Any) -> Any:
        phases = ep.Phases(3, 3, sweep=sweep, coordinates="absolute")
        _, free = ep.free_phase(params, spec, x, phases, trace=lambda snapshot: snapshot.state)
        nudged = ep.nudged_phase(
            params, spec, x, y, start, beta, phases, trace=lambda snapshot: snapshot.state
        )[1]
        references = []
        for is_nudged in (False, True):
            s, states = list(start) if is_nudged else [0 * v for v in start], []
            for _ in range(3):
                for group in ORDERS[sweep, is_nudged]:
                    old = tuple(s)
                    for l in group:
                        s[l] = reference_drive(params, spec, x, old, l, beta * is_nudged, y)
                states.append(tuple(s))
            references.append(jax.tree.map(lambda *v: jnp.stack(v), *states))
        return (free.trace, nudged.trace), tuple(references)

    ours, expected = both(make_state(spec))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, expected)


@pytest.mark.parametrize(
    ("neuron", "sweep"),
    [
        (ep.Rate(0.8), "synchronous"),
        (ep.Rate(), "alternating"),
        (ep.Rate(), "ordered"),
        (ep.SigmaDelta(), "alternating"),
        slow(ep.SigmaDelta(decode="signal"), "ordered"),
        (ep.DeltaCode(), "ordered"),
        slow(ep.Bernoulli(), "alternating"),
        slow(ep.IntegrateFire(), "ordered"),
    ],
)
def test_the_opening_leaves_out_zeros_alone(
    neuron: Any, sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product left out that was not zero; a neuron model that is not silent at rest."""
    layers = (ep.Conv(3, 3, "max"), ep.Conv(4, 2, "avg"), ep.Dense(6), ep.Dense(3))
    spec = small(neuron, 0.5, layers)
    params, (xs, ys) = make_params(spec), make_batch(spec, 1)
    plan, lengths = phases_.plan, []

    def run(opening: bool) -> Any:
        def patched(spec: Any, phases: Any, nudged: bool, from_zero: bool) -> Any:
            found = plan(spec, phases, nudged, from_zero and opening)
            lengths.append(len(found))
            return found

        monkeypatch.setattr(relaxation, "plan", patched)
        phases = ep.Phases(4, 5, sweep=sweep, coordinates="displacement")
        key = jax.random.key(3)

        @jax.jit
        def both() -> Any:
            state, free = ep.free_phase(params, spec, xs[0], phases, key, lambda now: now.state)
            nudged, info = ep.nudged_phase(
                params, spec, xs[0], ys[0], state, 0.3, phases, key, lambda now: now.state
            )
            return state, free, nudged, info

        return both()

    with_opening, without = run(True), run(False)
    assert max(lengths[:2]) > 1
    assert lengths[2:] == [1, 1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), with_opening, without)


def test_a_first_ordered_sweep_is_the_feed_forward_pass() -> None:
    """From zero, bottom-up: nobody has heard of the layer above; its reverse mode is backprop."""
    spec = small(ep.Rate(), 0.7)
    params, (xs, ys) = make_params(spec), make_batch(spec, 3)

    def answer(params: Any, x: Any) -> Any:
        for l, (layer, p) in enumerate(zip(spec.layers, params, strict=True)):
            x = affine(layer, p, x)
            x = x if l == spec.depth - 1 else clip(x)
        return x

    def cost(params: Any) -> Any:
        answers = jax.vmap(lambda x: answer(params, x))(xs)
        return 0.5 * jnp.mean(jnp.sum((answers - one_hot(spec, ys)) ** 2, -1))

    grads, info = ep.bptt_gradient(params, spec, xs, ys, ep.Phases(free=1, sweep="ordered"))
    np.testing.assert_allclose(info.cost, cost(params), rtol=1e-12)
    expected = jax.grad(cost)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), grads, expected)


@pytest.mark.parametrize(
    ("sweep", "epsilon", "power"),
    [
        ("synchronous", 1.0, 0.3),
        ("synchronous", 0.4, 0.0),
        ("alternating", 0.7, 0.0),
        ("ordered", 1.0, 0.0),
    ],
)
def test_all_sweeps_and_step_sizes_rest_at_one_point(
    sweep: Any, epsilon: float, power: float
) -> None:
    """A sweep or step size that moves the fixed point instead of the way there.

    At rest ``s = sigma(alpha^(L-l) dPhi/ds - beta dC/ds)``, whatever led there.
    """
    spec = small(ep.Rate(epsilon, "hard_sigmoid", power), 0.5)
    params, (xs, ys) = make_params(spec, gain=0.8), make_batch(spec, 1)
    x, y = xs[0], one_hot(spec, ys)[0]

    @jax.jit
    def gaps() -> Any:
        phases = ep.Phases(400, 400, sweep=sweep, coordinates="absolute")
        free, free_info = ep.free_phase(params, spec, x, phases)
        nudged, info = ep.nudged_phase(params, spec, x, y, free, 0.3, phases)
        rests = [
            [s - reference_drive(params, spec, x, state, l, beta, y) for l, s in enumerate(state)]
            for state, beta in ((free, 0.0), (nudged, 0.3))
        ]
        return rests, free_info.residual, info.residual, nudged[-1] - free[-1]

    rests, *residuals, moved = gaps()
    assert max(float(jnp.abs(gap).max()) for gap in jax.tree.leaves(rests)) < 1e-10
    assert max(map(float, residuals)) < 1e-10
    assert float(jnp.abs(moved).max()) > 0.01  # the nudge is felt


# Coordinates of the nudged phase.


@pytest.mark.parametrize(
    ("activation", "feedback", "cost"),
    [
        ("hard_sigmoid", 1.0, "squared_error"),
        ("hard_sigmoid", 0.1, "cross_entropy"),
        ("tanh", 0.1, "squared_error"),
        ("softplus", 1.0, "cross_entropy"),
    ],
)
def test_coordinates_rest_at_one_point(activation: str, feedback: float, cost: Any) -> None:
    """A term of the displacement (bounds, second order, attenuation, bias) that is missing."""
    spec = small(ep.Rate(activation=activation), feedback, cost=cost)
    # Small weights, as softplus does not saturate; large biases, so that some units do.
    params = make_params(spec, seed=8, gain=0.4, bias=0.6)
    xs, ys = make_batch(spec, 1)
    phases, shifted = (
        ep.Phases(300, 300, sweep="synchronous", coordinates=kind)
        for kind in ("absolute", "displacement")
    )
    x, y = xs[0], one_hot(spec, ys)[0]

    @jax.jit
    def states(beta: Any) -> Any:
        free, _ = ep.free_phase(params, spec, x, phases)
        absolute, _ = ep.nudged_phase(params, spec, x, y, free, beta, phases)
        displaced, _ = ep.nudged_phase(params, spec, x, y, free, beta, shifted)
        return free, absolute, displaced

    for beta in (-0.5, -1e-2, 1e-3, 0.5):
        free, absolute, displaced = states(beta)
        for a, b in zip(absolute, displaced, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)
        assert np.abs(absolute[-1] - free[-1]).max() > 0.02 * abs(beta)


def test_displacement_keeps_its_precision_in_float32() -> None:
    """A small difference of large numbers anywhere: in float32 the low layers drown in rounding.

    At alpha = .1 and beta = 1e-5 the lowest layer moves by 1e-7, the rounding of its state.
    """
    layers = (ep.Conv(3, 3), ep.Conv(4, 2, pool=None), ep.Dense(3))
    spec = small(ep.Rate(), 0.1, layers)
    params, (xs, ys) = make_params(spec, seed=6), make_batch(spec, 4)
    exact = exact_gradient(params, spec, xs, ys, 60)
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, xs))
    phases = ep.Phases(60, 60, 1e-5, "one_sided", coordinates="displacement")
    estimate = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))
    grads, _ = estimate(single[0], spec, single[1], ys, phases)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    assert min(cosine(g, e) for g, e in zip(grads, exact, strict=True)) > 0.9999
    absolute = replace(phases, coordinates="absolute")
    with pytest.raises(ValueError, match=r"1\.0e-07 reaches the lowest of 3 layers.*displacement"):
        estimate(single[0], spec, single[1], ys, absolute)
    # What is refused in single precision is right in double.
    grads, _ = estimate(params, spec, xs, ys, absolute)
    assert min(cosine(g, e) for g, e in zip(grads, exact, strict=True)) > 0.9999


# Signals of low precision.


def test_signals_are_rounded_and_states_are_not() -> None:
    """Rounding of states or sums, to other than 8 bits, or in the free phase.

    Through weights of one, a layer holds what it heard: in the free phase the hidden state itself,
    which rests at ``x + alpha h = h``; in the nudged phase a displacement is the rounded
    displacement above it, of the sweep before.
    """
    spec = ep.NetworkSpec((6,), (ep.Dense(6), ep.Dense(6)), ep.Rate(), feedback=0.5)
    identity = {"w": jnp.eye(6), "b": jnp.zeros(6)}
    params, x = (identity, identity), jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.4, 6))
    phases = ep.Phases(150, 9, 1e-3, sweep="synchronous", nudged_signals="bfloat16")

    def rounded(values: Any) -> np.ndarray:
        return np.asarray(values).astype(jnp.bfloat16).astype(np.float64)

    (hidden, output), _ = ep.free_phase(params, spec, x, phases)
    np.testing.assert_allclose(hidden, 2 * x, rtol=1e-14)
    np.testing.assert_allclose(output, 2 * x, rtol=1e-14)
    _, info = ep.nudged_phase(
        params, spec, x, 2, (hidden, output), 1e-3, phases, trace=lambda seen: seen.state
    )
    d_hidden, d_output = map(np.asarray, info.trace)
    np.testing.assert_allclose(d_hidden[1:], rounded(d_output[:-1]), rtol=1e-12)
    assert np.abs(d_output - rounded(d_output)).max() > 1e-4


def test_low_precision_is_enough_for_displacements() -> None:
    """A signal that is a small difference of large numbers: 8 bits would leave nothing of it.

    At beta = 1e-3 that is what absolute coordinates send, so there it does.
    """
    spec = small(ep.Rate(activation="tanh"), 0.3, (ep.Conv(3, 3), ep.Dense(6), ep.Dense(3)))
    params, (xs, ys) = make_params(spec, gain=0.8), make_batch(spec, 3)
    run = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))
    kinds: Any = [
        {"coordinates": "displacement"},
        {"coordinates": "displacement", "nudged_signals": "bfloat16"},
        {"coordinates": "absolute", "nudged_signals": "bfloat16"},
    ]
    exact, displaced, absolute = (
        run(params, spec, xs, ys, ep.Phases(40, 40, 1e-3, **kind))[0] for kind in kinds
    )
    assert min(cosine(a, b) for a, b in zip(displaced, exact, strict=True)) > 0.999
    assert min(cosine(a, b) for a, b in zip(absolute, exact, strict=True)) < 0.9


# Phases that start somewhere.


@pytest.mark.parametrize("sweep", ["synchronous", "alternating"])
def test_a_free_phase_goes_on_from_a_state(sweep: Any) -> None:
    """A start that is ignored, or laid out as no layer reads it."""
    spec = small(ep.Rate(0.7), 0.6, (ep.Conv(3, 3, padding="SAME"), ep.Conv(2, 3), ep.Dense(3)))
    params, (xs, _) = make_params(spec), make_batch(spec, 1)

    @jax.jit
    def both() -> Any:
        whole, four, three = (ep.Phases(free=n, sweep=sweep) for n in (7, 4, 3))
        half, _ = ep.free_phase(params, spec, xs[0], four)
        at_once, info = ep.free_phase(params, spec, xs[0], whole)
        return ep.free_phase(params, spec, xs[0], three, start=half), (at_once, info), half

    gone_on, at_once, half = both()
    assert (float(gone_on[1].sweeps), float(at_once[1].sweeps)) == (3, 7)
    gone_on = gone_on[0], gone_on[1]._replace(sweeps=at_once[1].sweeps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), gone_on, at_once)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(half, at_once[0], strict=True)) > 1e-3


@pytest.mark.parametrize("neuron", [ep.DeltaCode(), ep.SigmaDelta()])
def test_spiking_neurons_start_with_receivers_that_know_the_state(neuron: Any) -> None:
    """Receivers that begin with nothing: the first sweep would leave the state.

    At the fixed point of rates, told of in full, all drives are what they should be.
    """
    layers = (ep.Conv(3, 3), ep.Dense(6), ep.Dense(3))
    spec, rate = small(neuron, 0.5, layers), small(ep.Rate(), 0.5, layers)
    params, (xs, _) = make_params(spec, gain=0.8), make_batch(spec, 1)
    fixed, _ = ep.free_phase(params, rate, xs[0], ep.Phases(free=200))
    one = ep.Phases(free=1, sweep="synchronous")
    state, info = ep.free_phase(params, spec, xs[0], one, start=fixed)
    assert float(info.residual) < 1e-13
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), state, fixed)


# Energy.


@pytest.mark.parametrize(
    ("sweep", "epsilon", "pool"),
    [
        ("synchronous", 0.05, "avg"),
        ("alternating", 1.0, "avg"),
        ("alternating", 1.0, "max"),
        ("ordered", 1.0, "max"),
    ],
)
def test_energy_never_rises(sweep: Any, epsilon: float, pool: Any) -> None:
    """Currents that are no gradient of the energy, feedback of another strength than Phi's, kinks.

    A hard-sigmoid layer with its neighbours held at rest minimises E exactly at a full step (and
    beneath a max pool a bound of E that touches it, as its drive is convex), so sweeps that never
    update two neighbours at once never raise E, at any loop gain. Synchronous steps need to be
    small. Under a nudge of beta < 1 the same holds for ``E + beta C``.
    """
    layers = (ep.Conv(3, 3, pool), ep.Conv(4, 2, pool=None), ep.Dense(6), ep.Dense(3))
    spec = small(ep.Rate(epsilon), 0.7, layers)
    params, (xs, ys) = make_params(spec, seed=9, gain=1.5), make_batch(spec, 1)
    x, y, beta = xs[0], one_hot(spec, ys)[0], 0.4

    def total(s: Any) -> Any:
        return ep.energy(params, spec, x, s) + beta * reference_cost(params, spec, s[-1], y)

    @jax.jit
    def traces() -> Any:
        phases = ep.Phases(60, 60, sweep=sweep, coordinates="absolute")
        free, info = ep.free_phase(
            params, spec, x, phases, trace=lambda seen: ep.energy(params, spec, x, seen.state)
        )
        nudged = ep.nudged_phase(
            params, spec, x, y, free, beta, phases, trace=lambda seen: total(seen.state)
        )[1]
        return info.trace, jnp.append(total(free), nudged.trace)

    free, nudged = map(np.asarray, traces())
    free = np.append(0.0, free)  # the energy of the zero state
    for energies in (free, nudged):
        scale = 1e-13 * np.abs(energies).max()
        assert (np.diff(energies) <= scale).all()
        assert energies[-1] < energies[0] - 0.01


# What a phase tells about itself.


def test_info_is_what_the_trace_shows() -> None:
    """Changes or counts of another sweep, of one layer only, or in the wrong unit."""
    spec = small(ep.Rate(0.5), 0.5)
    params, (xs, _) = make_params(spec), make_batch(spec, 1)
    displaced = ep.Phases(7, 3, sweep="synchronous", coordinates="displacement")

    def look(snapshot: Any) -> Any:
        return snapshot.state, snapshot.step, snapshot.change

    @jax.jit
    def run() -> Any:
        free, info = ep.free_phase(params, spec, xs[0], displaced, trace=look)
        args = params, spec, xs[0], jnp.array(2), free, 0.2, displaced
        return free, info, ep.nudged_phase(*args, trace=look)[1]

    @jax.jit
    def unseen() -> Any:
        return ep.free_phase(params, spec, xs[0], displaced)

    free, *infos = run()
    units = 0.2 * 0.5 ** np.arange(3, -1, -1)
    for info, steps, scale in zip(infos, (7, 3), (np.ones(4), units), strict=True):
        states, numbers, residuals = info.trace
        np.testing.assert_array_equal(numbers, np.arange(steps))
        changes = [np.diff(np.asarray(s).reshape(steps, -1), axis=0) for s in states]
        squares = sum((c**2).sum(1) * u**2 for c, u in zip(changes, scale, strict=True))
        np.testing.assert_allclose(residuals[1:], np.sqrt(squares), rtol=1e-12)
        assert float(info.sweeps) == steps
        moving = np.concatenate([np.abs(c[-1]) > 1e-3 for c in changes])
        np.testing.assert_allclose(info.moving, moving.mean(), rtol=1e-12)
        assert [float(v) for v in info.spikes] == [0, 0, 0, 0]
    # A trace changes nothing but what is seen.
    plain, plain_info = unseen()
    for a, b in zip(plain, free, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)
    np.testing.assert_allclose(plain_info.residual, infos[0].residual, rtol=1e-9)
    assert plain_info.trace is None


@pytest.mark.parametrize("neuron", [ep.SigmaDelta(), ep.Bernoulli()])
def test_vmap_is_a_loop(neuron: Any) -> None:
    """Examples of a batch that see each other."""
    spec = small(neuron, 0.5, (ep.Conv(3, 3), ep.Dense(3)))
    params, (xs, ys) = make_params(spec), make_batch(spec, 3)
    keys, phases = jax.random.split(jax.random.key(0), 3), ep.Phases(8, 6)

    def both(x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        free, info = ep.free_phase(params, spec, x, phases, key)
        return free, info, ep.nudged_phase(params, spec, x, y, free, 0.2, phases, key)

    batched, alone = jax.jit(jax.vmap(both))(xs, ys, keys), jax.jit(both)
    for i in range(3):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-12),
            batched,
            alone(xs[i], ys[i], keys[i]),
        )


# Noise.


def bernoulli_gap(sweep: Any) -> tuple[float, float]:
    """Largest gap between two nudged phases at +-1e-9, with one key and with two."""
    spec = small(ep.Bernoulli(), 0.5)
    params, (xs, ys) = make_params(spec), make_batch(spec, 1)
    free = make_state(spec)

    @jax.jit
    def nudged(beta: jax.Array, key: jax.Array) -> Any:
        phases = ep.Phases(10, 10, sweep=sweep, coordinates="absolute")
        return ep.nudged_phase(params, spec, xs[0], ys[0], free, beta, phases, key)[0]

    keys, beta = jax.random.split(jax.random.key(3)), jnp.asarray(1e-9)
    plus, minus, other = nudged(beta, keys[0]), nudged(-beta, keys[0]), nudged(-beta, keys[1])

    def gap(a: Any, b: Any) -> float:
        return max(float(jnp.abs(u - v).max()) for u, v in zip(a, b, strict=True))

    return gap(plus, minus), gap(plus, other)


def test_noise_of_a_nudged_phase_is_its_key() -> None:
    """A key that depends on beta, or is not used. With one key, states at +-beta differ by beta."""
    shared, apart = bernoulli_gap("alternating")
    assert shared < 1e-7
    assert apart > 0.01


def test_noise_differs_between_layers_and_sweeps() -> None:
    """One key for all sweeps or layers: the noise would not average out.

    Units of probability 1/2 in two layers without weights: two sequences of independent fair coins
    agree in half of their draws, with five standard deviations of sqrt(n) / 2.
    """
    spec = ep.NetworkSpec((2,), (ep.Dense(50), ep.Dense(50), ep.Dense(50)), ep.Bernoulli())
    zero = jax.tree.map(jnp.zeros_like, make_params(spec))
    params = tuple({"w": p["w"], "b": p["b"] + 0.5} for p in zero)
    _, info = ep.free_phase(
        params, spec, jnp.zeros(2), ep.Phases(30), jax.random.key(1), lambda seen: seen.spikes
    )
    a, b, c = map(np.asarray, info.trace)
    pairs = [(a, b), (b, c), (a, c), (a[1:], a[:-1]), (a[1:], b[:-1]), (b[2:], b[:-2])]
    pairs += [(v[:, 1:], v[:, :-1]) for v in (a, b, c)]
    for u, v in pairs:
        assert abs((u == v).sum() - u.size / 2) < 2.5 * u.size**0.5


# A neuron model of one's own.


class CoarseState(NamedTuple):
    """A rate and what is told of it."""

    s: jax.Array
    told: jax.Array


@dataclass(frozen=True)
class CoarseRate:
    """Rate neurons whose receivers hear the rate rounded to a grid."""

    levels: float = 4.0
    activation = "hard_sigmoid"
    stochastic = False

    def start(self, s: jax.Array, current: jax.Array) -> CoarseState:
        return CoarseState(s, jnp.round(s * self.levels) / self.levels)

    def step(
        self, state: Any, current: Any, relax: Any, clock: Any, key: Any
    ) -> tuple[CoarseState, None]:
        return self.start(relax(state.s, current, 1.0), current), None

    def signal(self, state: CoarseState) -> jax.Array:
        return state.told

    def readout(self, state: CoarseState) -> jax.Array:
        return state.s


def test_a_neuron_model_of_ones_own() -> None:
    """Dynamics that know their neuron models by name, or send the state in place of the signal.

    The free state rests where currents of the rounded state lead. As the grid gets fine its
    gradient becomes that of rates: an error of the signals of 2^-41, over 2 beta.
    """
    layers = (ep.Dense(8), ep.Dense(6), ep.Dense(3))
    spec = small(CoarseRate(), 0.3, layers)
    params, (xs, ys) = make_params(spec), make_batch(spec, 2)
    free, info = ep.free_phase(params, spec, xs[0], ep.Phases(60, sweep="alternating"))
    assert float(info.moving) == 0
    assert float(info.residual) > 1e-3  # at rest, and not where rates would be
    told = tuple(jnp.round(4 * s) / 4 for s in free)
    y = one_hot(spec, ys)[0]
    drives = jax.jit(
        lambda told: [reference_drive(params, spec, xs[0], told, l, 0.0, y) for l in range(3)]
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), list(free), drives(told)
    )
    absolute = ep.Phases(60, 60, 0.1, sweep="ordered", coordinates="absolute")
    displaced = ep.Phases(60, 60, 0.1, sweep="ordered", coordinates="displacement")
    fine = small(CoarseRate(2.0**40), 0.3, layers)
    rates = small(ep.Rate(), 0.3, layers)
    run = jax.jit(ep.ep_gradient, static_argnames=("spec", "phases"))
    rate, *coarse = (
        run(params, spec, xs, ys, phases)[0]
        for spec, phases in ((rates, absolute), (fine, absolute), (fine, displaced))
    )
    for grads in coarse:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), grads, rate)
