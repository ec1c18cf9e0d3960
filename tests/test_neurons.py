"""Neuron models: activations, codes and their error laws, and whole spiking phases in numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_params
from hypothesis import given
from hypothesis import strategies as st

import ep_jax as ep
from ep_jax.neurons import ACTIVATIONS, Clock, relax, relax_displacement

pytestmark = pytest.mark.usefixtures("x64")

STEPS = 30
unit_interval = st.floats(0, 1, allow_subnormal=False)
fractions = st.lists(unit_interval, min_size=STEPS, max_size=STEPS).map(np.array)
signed = st.lists(st.floats(-1, 1), min_size=STEPS, max_size=STEPS).map(np.array)


def clock(step: Any = 0, **other: Any) -> Clock:
    settings: dict[str, Any] = {
        "steps": STEPS, "before": 0, "layer": 1, "unit": 1.0, "error": 1.0,
        "neighbours_updated": False, "nudged": False, "displaced": False,
    }  # fmt: skip
    return Clock(step=jnp.asarray(step), **{**settings, **other})


def impose(target: jax.Array) -> Any:
    """A relaxation that puts the analog state where the test wants it."""
    return lambda s, current, epsilon: target


# Activations and their displacement form.

SIGMA = {
    "hard_sigmoid": lambda x: np.minimum(np.maximum(x, 0), 1),
    "linear": lambda x: x,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "softplus": lambda x: np.log1p(np.exp(x)),
}
SLOPE = {
    "hard_sigmoid": lambda x: (x > 0) & (x < 1),
    "linear": lambda x: 1,
    "sigmoid": lambda x: SIGMA["sigmoid"](x) * SIGMA["sigmoid"](-x),
    "tanh": lambda x: 1 / np.cosh(x) ** 2,
    "softplus": lambda x: SIGMA["sigmoid"](x),
}
inputs = st.lists(st.floats(-4, 4), min_size=8, max_size=8).map(np.array)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@given(x=inputs, h=inputs)
def test_difference_is_the_difference(name: str, x: np.ndarray, h: np.ndarray) -> None:
    """A displacement activation that is another function than its absolute one."""
    activation = ACTIVATIONS[name]
    np.testing.assert_allclose(activation.apply(jnp.asarray(x)), SIGMA[name](x), atol=1e-14)
    exact = SIGMA[name](x + h) - SIGMA[name](x)
    ours = activation.difference(jnp.asarray(x), jnp.asarray(h))
    np.testing.assert_allclose(ours, exact, atol=2e-14)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@given(x=inputs, sign=st.sampled_from([-1.0, 1.0]))
def test_difference_has_no_cancellation(name: str, x: np.ndarray, sign: float) -> None:
    """A difference of two large numbers: in float32 at h = 1e-9 nothing of it would be left.

    What may be left is the rounding of the slope, a few units of 1.2e-7.
    """
    h = sign * 1e-9
    x = np.where(np.minimum(abs(x), abs(x - 1)) < 1e-3, 0.5, x)  # away from kinks
    ours = ACTIVATIONS[name].difference(jnp.asarray(x, jnp.float32), jnp.full(8, h, jnp.float32))
    exact = SLOPE[name](np.float64(np.float32(x))) * h  # the next term is 1e-9 times smaller
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-6 * abs(h))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@given(
    base=inputs,
    d=inputs,
    drive=inputs,
    unit=st.sampled_from([-0.5, -0.03, 0.03, 0.5]),
    epsilon=st.sampled_from([0.3, 1.0]),
)
def test_displacement_step_is_the_absolute_step(
    name: str, base: Any, d: Any, drive: Any, unit: float, epsilon: float
) -> None:
    """Damping, bounds or units that differ between coordinates, at kinks and beyond them too."""
    s0 = SIGMA[name](base)
    before, driven = s0 + unit * d, base + unit * drive
    if name in ("hard_sigmoid", "linear"):
        after = SIGMA[name]((1 - epsilon) * before + epsilon * driven)
    else:
        after = (1 - epsilon) * before + epsilon * SIGMA[name](driven)
    activation, here, moved, push = ACTIVATIONS[name], *map(jnp.asarray, (base, d, drive))
    absolute = relax(activation, jnp.asarray(before), jnp.asarray(driven), epsilon)
    np.testing.assert_allclose(absolute, after, atol=1e-14)
    displaced = relax_displacement(activation, here, moved, push, unit, epsilon)
    np.testing.assert_allclose(displaced, (after - s0) / unit, atol=1e-12)


# Sigma-delta: predictive coding around a one-step quantiser.


def sigma_delta_run(neuron: ep.SigmaDelta, s: np.ndarray, fresh: bool, displaced: bool) -> Any:
    """Send the signal `s` [T, N] through a sender and a receiver joined by a weight of 1."""

    def body(carry: Any, inputs: Any) -> Any:
        sender, receiver = carry
        target, t = inputs
        now = clock(t, displaced=displaced, nudged=displaced)
        hears = clock(t, displaced=displaced, nudged=displaced, neighbours_updated=fresh)
        # The receiver listens after the sender spoke in this sweep (fresh), or before it.
        if not fresh:
            receiver, _ = neuron.step(receiver, neuron.signal(sender), impose(target), hears, None)
        sender, count = neuron.step(sender, jnp.zeros_like(target), impose(target), now, None)
        if fresh:
            receiver, _ = neuron.step(receiver, neuron.signal(sender), impose(target), hears, None)
        return (sender, receiver), (sender.error, neuron.signal(sender), count, receiver.trace)

    start = neuron.start(jnp.zeros(s.shape[1]), jnp.zeros(s.shape[1]))
    return jax.lax.scan(body, (start, start), (jnp.asarray(s), jnp.arange(len(s))))[1]


SIGMA_DELTAS = {
    "constant": ep.SigmaDelta(lam=0.3, lam_power=0.0, lam_floor=0.0),
    "polynomial": ep.SigmaDelta(lam=0.67, lam_power=0.578, lam_floor=0.0),
    "floor": ep.SigmaDelta(lam=0.9, lam_power=0.9, lam_floor=0.1),
}
run_sigma_delta = jax.jit(sigma_delta_run, static_argnums=(0, 2, 3))


def lambdas(neuron: ep.SigmaDelta, steps: int) -> np.ndarray:
    t = np.arange(1, steps + 1.0)
    return np.maximum(neuron.lam / t**neuron.lam_power, neuron.lam_floor)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("schedule", SIGMA_DELTAS)
@given(c=fractions)
def test_sigma_delta_error_law(schedule: str, fresh: bool, c: np.ndarray) -> None:
    """Encoder and decoder that are no inverses, a lambda taken at another index, a lost phi.

    Any signal ``s_t = (1 - lam) s_{t-1} + lam c_t`` with c in [0, 1] can be coded by spikes. With
    ``q = a + phi_{t-1} - phi_t`` the decoder's error obeys ``e_t = (1 - lam_t) e_{t-1} -
    lam_t (phi_t - phi_{t-1})``, and with |phi| <= 1/2 and constant lam its partial sums give
    ``|e| <= lam``.
    """
    neuron = SIGMA_DELTAS[schedule]
    lam, s = lambdas(neuron, STEPS), np.zeros(STEPS + 1)
    for t in range(STEPS):
        s[t + 1] = (1 - lam[t]) * s[t] + lam[t] * c[t]
    error, spikes, count, trace = run_sigma_delta(neuron, s[1:, None], fresh, False)
    assert set(np.unique(spikes)) <= {0.0, 1.0}
    np.testing.assert_array_equal(spikes, count)
    assert np.abs(error).max() <= 0.5
    # What the receiver holds after hearing of sweep t; without fresh news it hears one sweep late.
    decoded = trace[:, 0] if fresh else np.append(trace[1:, 0], np.nan)
    phi, e = 0.0, 0.0
    for t in range(STEPS if fresh else STEPS - 1):
        e = (1 - lam[t]) * e - lam[t] * (error[t, 0] - phi)
        phi = error[t, 0]
        np.testing.assert_allclose(decoded[t] - s[t + 1], e, atol=1e-13)
        if schedule == "constant":
            assert abs(decoded[t] - s[t + 1]) <= neuron.lam + 1e-12


@given(s=signed)
def test_signed_sigma_delta_error_law(s: np.ndarray) -> None:
    """The signed code of displacements: any signal, error at most ``lam * quantum``."""
    neuron = ep.SigmaDelta(lam=0.3, lam_power=0.0, nudged_quantum=0.25)
    error, spikes, count, trace = run_sigma_delta(neuron, s[:, None], True, True)
    np.testing.assert_array_equal(spikes, 0.25 * count)
    np.testing.assert_array_equal(count, np.round(count))
    assert np.abs(error).max() <= 0.125 + 1e-12
    assert np.abs(trace[:, 0] - s).max() <= 0.3 * 0.25 + 1e-12


@given(s=signed)
def test_sigma_delta_keeps_what_it_has_not_sent(s: np.ndarray) -> None:
    """A quantiser error that runs away where a signal is too fast for spikes of 0 or 1."""
    neuron = SIGMA_DELTAS["constant"]
    error, *_ = run_sigma_delta(neuron, 50 * s[:, None], True, False)
    assert np.abs(error).max() <= 0.5


# Delta code: a closed loop around what the receivers know.


def delta_run(neuron: ep.DeltaCode, s: np.ndarray, displaced: bool, layer: int) -> Any:
    def body(state: Any, inputs: Any) -> Any:
        target, t = inputs
        now = clock(t, layer=layer, displaced=displaced, nudged=displaced)
        state, count = neuron.step(state, jnp.zeros_like(target), impose(target), now, None)
        return state, (neuron.signal(state), count, neuron.readout(state))

    start = neuron.start(jnp.zeros(s.shape[1]), jnp.zeros(s.shape[1]))
    return jax.lax.scan(body, start, (jnp.asarray(s), jnp.arange(len(s))))[1]


run_delta = jax.jit(delta_run, static_argnums=(0, 2, 3))


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("displaced", [False, True])
@given(u=signed)
def test_ternary_delta_code_error_law(displaced: bool, layer: int, u: np.ndarray) -> None:
    """A spike that adds another quantum than the receiver does, a wrong schedule, a wrong lag.

    A signal with ``|s_{t+1} - s_t| <= 3/2 delta_{t+1} - 1/2 delta_t`` is tracked to half a quantum:
    one spike is enough for what is missing. What is known is the sum of the quanta sent.
    """
    neuron = ep.DeltaCode(0.7, 0.8, 2.0, nudged_quantum=0.5, nudged_decay=0.7)
    t = np.arange(STEPS)
    free = 0.7 * 0.8 ** np.maximum(0, t - 2.0 * (layer - 1))
    delta = 0.5 * 0.7**t if displaced else free
    room = 1.5 * delta - 0.5 * np.append(0.0, delta[:-1])
    s = np.cumsum(u * room)
    known, count, readout = run_delta(neuron, s[:, None], displaced, layer)
    assert set(np.unique(count)) <= {-1.0, 0.0, 1.0}
    np.testing.assert_allclose(known[:, 0], np.cumsum(delta * count[:, 0]), atol=1e-13)
    np.testing.assert_array_equal(readout[:, 0], s)
    assert (np.abs(known[:, 0] - s) <= 0.5 * delta * (1 + 1e-9) + 1e-14).all()


@given(c=fractions, largest=st.sampled_from([0.002, 0.02]))
def test_leaky_delta_code_error_law(c: np.ndarray, largest: float) -> None:
    """An open loop in place of the closed one, or a leak at the wrong end.

    With ``r' = (1 - d) r + d q`` and steps of s in [0, 1] of at most eta, ``|r - s|`` stays below
    ``max(d / 2, eta / d)``: the leak alone moves r by ``d r``, a spike by ``d (1 - r)``.
    """
    delta = 0.1
    neuron = ep.DeltaCode(delta, decay=1.0, leak=True)
    s = np.clip(np.cumsum((2 * c - 0.6) * largest), 0, 1)  # it starts at 0, where r does
    known, count, _ = run_delta(neuron, s[:, None], False, 1)
    assert set(np.unique(count)) <= {0.0, 1.0}
    before = np.append(0.0, known[:-1, 0])
    np.testing.assert_allclose(known[:, 0], (1 - delta) * before + delta * count[:, 0], atol=1e-14)
    bound = max(delta / 2, 1.4 * largest / delta)
    assert (np.abs(known[:, 0] - s) <= bound + 1e-12).all()


# Bernoulli: unbiased spikes.


@pytest.mark.parametrize("displaced", [False, True])
def test_bernoulli_spikes_are_unbiased(displaced: bool) -> None:
    """Spikes whose mean is not the state, or more than one quantum away from it."""
    neuron, draws = ep.Bernoulli(nudged_quantum=0.25), 4000
    values = np.array([-0.9, -0.3, 0.1, 0.6]) if displaced else np.array([0.0, 0.1, 0.6, 1.0])
    s = jnp.broadcast_to(jnp.asarray(values), (draws, 4))
    now = clock(3, displaced=displaced, nudged=displaced)
    state = neuron.start(jnp.zeros_like(s), jnp.zeros_like(s))
    state, count = neuron.step(state, jnp.zeros_like(s), impose(s), now, jax.random.key(0))
    quantum = 0.25 if displaced else 1.0
    q = np.asarray(neuron.signal(state))
    np.testing.assert_array_equal(q, quantum * np.asarray(count))
    assert np.abs(q - values).max() <= quantum
    below = values / quantum - np.floor(values / quantum)
    deviation = quantum * np.sqrt(below * (1 - below) / draws)  # of the mean of the draws
    assert (np.abs(q.mean(0) - values) <= 5 * deviation + 1e-12).all()


# Integrate-and-fire: what goes into the membrane comes out as spikes.


@pytest.mark.parametrize("displaced", [False, True])
@given(d=fractions)
def test_integrate_fire_conserves_its_input(displaced: bool, d: np.ndarray) -> None:
    """Trace and membrane share what came in: a reset to 0, unequal leaks, a late threshold."""
    neuron = ep.IntegrateFire(leak=0.9, nudged_quantum=0.25)
    drive = 2 * d - 1 if displaced else d
    now = clock(displaced=displaced, nudged=displaced)

    def step(state: Any, value: jax.Array) -> Any:
        state, _ = neuron.step(state, jnp.zeros(1), impose(value[None]), now, None)
        return state, (state.s, state.membrane, state.steps)

    start = neuron.start(jnp.zeros(1), jnp.zeros(1))
    s, membrane, steps = jax.lax.scan(step, start, jnp.asarray(drive))[1]
    powers = 0.9 ** np.arange(STEPS)
    came = np.array([drive[: t + 1][::-1] @ powers[: t + 1] for t in range(STEPS)])
    np.testing.assert_allclose(steps, np.cumsum(powers) + 0.9 * powers, rtol=1e-12)
    np.testing.assert_allclose(s[:, 0] * steps + membrane[:, 0], came, atol=1e-12)
    low, high = (-0.125, 0.125) if displaced else (0.0, 1.0)
    assert (membrane >= low - 1e-12).all()
    assert (membrane <= high + 1e-12).all()


def test_integrate_fire_settles_where_rates_do() -> None:
    """An output layer under a constant input: the trace is its clipped drive, to the leak."""
    spec = ep.NetworkSpec((1,), (ep.Dense(4),), ep.IntegrateFire(leak=0.99, average=1))
    drive = jnp.array([-0.5, 0.3, 0.8, 1.7])
    params = ({"w": drive[None], "b": jnp.zeros(4)},)
    state, _ = ep.free_phase(params, spec, jnp.ones(1), ep.Phases(free=1000))
    # |s - clip(drive)| <= |V| / N, with |V| <= 1 and N = 1 / (1 - leak).
    np.testing.assert_allclose(state[0], jnp.clip(drive, 0, 1), atol=0.0101)


# Whole phases of dense networks, step by step in numpy.


class Sender:
    """A neuron and what its receivers know of it, by the equations of the papers."""

    def __init__(self, neuron: Any, s: np.ndarray) -> None:
        self.neuron, self.s, self.known, self.phi = neuron, s, s.copy(), 0.0 * s
        self.quantum = 0.0

    def rates(self, now: int, nudged: bool) -> tuple[float, float]:
        """The step size and leak of the sweep number `now`, counted from 1 through both phases."""
        n = self.neuron
        if isinstance(n, ep.SigmaDelta):
            epsilon = max(n.epsilon / now**n.epsilon_power, n.epsilon_floor)
            return (n.nudged_epsilon if nudged else epsilon), lambdas(n, now)[-1]
        return 1.0, 0.0

    def send(
        self, s: np.ndarray, lam: float, delta: float, signed: bool, error: float
    ) -> np.ndarray:
        n, old, self.s = self.neuron, self.s, s
        if isinstance(n, ep.SigmaDelta):
            quantum = n.nudged_quantum * error if signed else 1.0
            v = self.phi + (s - (1 - lam) * old) / lam
            q = np.round(v / quantum) if signed else 1.0 * (v > 0.5)
            self.phi = np.clip(v - quantum * q, -quantum / 2, quantum / 2)
            self.known = (1 - lam) * self.known + lam * quantum * q
            return q
        leak = delta / error  # free of the output's error
        if not n.scheduled:
            gap = s - self.known
            energy = (gap**2).sum()
            size = np.sqrt((gap**4).sum() / energy) if energy else 0.0
            scale, shrink = (0.8, 0.5) if n.leak and signed else (n.scale, n.shrink)
            delta = max(scale * size, shrink * self.quantum)
            delta = leak = min(delta, 1.0) if n.leak and not signed else delta
            self.quantum = delta
        leak = min(leak, 1.0) if n.leak else 0.0
        kept = (1 - leak) * self.known
        # A displacement of which nothing is heard yet has no quantum either.
        v, m = (s - kept) / delta if delta else 0 * s, n.levels // 2
        q = 1.0 * (v > 0.5) if n.leak and not signed else np.clip(np.round(v), -m, m)
        self.known = kept + delta * q
        return q


def orders(sweep: str, L: int, nudged: bool) -> list[list[int]]:
    """Groups of layers that are updated from the same signals."""
    if sweep == "synchronous":
        return [list(range(L))]
    if sweep == "ordered":
        return [[l] for l in (reversed(range(L)) if nudged else range(L))]
    first = [l for l in range(L) if (L - 1 - l if nudged else l) % 2 == 0]
    return [first, [l for l in range(L) if l not in first]]


def simulate(
    params: Any,
    spec: ep.NetworkSpec,
    x: np.ndarray,
    sweep: str,
    steps: int,
    start: list[np.ndarray],
    before: int = 0,
    y: Any = None,
    beta: float = 0.0,
    displaced: bool = False,
) -> Any:
    """A phase of a dense network with squared error: states [T][L] and spikes [T][L]."""
    W, b = ([np.asarray(p[name]) for p in params] for name in ("w", "b"))
    n, alpha, L, nudged = spec.neuron, spec.feedback, len(W), y is not None
    beta_of = [beta * alpha ** (L - 1 - l) for l in range(L)]

    def current(signals: list[np.ndarray], l: int, up: float, down: float) -> np.ndarray:
        total = np.zeros(W[l].shape[1])
        if l:
            total = total + up * (signals[l - 1] @ W[l])
        return total + down * (W[l + 1] @ signals[l + 1]) if l + 1 < L else total

    given = [b[l] + (x @ W[0] if l == 0 else 0) for l in range(L)]
    bound = [lambda v: np.clip(v, 0, 1)] * (L - 1) + [lambda v: v]
    I0 = [current(start, l, 1, alpha) + given[l] for l in range(L)]
    s0 = [bound[l](I0[l]) for l in range(L)]
    senders = [Sender(n, 0.0 * s if displaced else s) for s in start]
    # Nudged quanta are in units of the output's error.
    error = np.abs((s0 if displaced else start)[-1] - y).max() if nudged else 1.0
    states, spikes = [], []
    for t in range(steps):
        counts: list[Any] = [None] * L
        for group in orders(sweep, L, nudged):
            heard = [sender.known for sender in senders]
            for l in group:
                epsilon, lam = senders[l].rates(before + t + 1, nudged)
                s = senders[l].s
                if displaced:
                    push = (y - s0[l] - beta * s) if l == L - 1 else 0.0
                    J = current(heard, l, alpha, 1) + push
                    here, drive = s0[l] + beta_of[l] * s, I0[l] + beta_of[l] * J
                    s = (bound[l](here + epsilon * (drive - here)) - s0[l]) / beta_of[l]
                else:
                    push = beta * (y - s) if nudged and l == L - 1 else 0.0
                    drive = current(heard, l, 1, alpha) + given[l] + push
                    s = bound[l](s + epsilon * (drive - s))
                delta = 0.0
                code: Any = n if isinstance(n, ep.DeltaCode) and n.scheduled else None
                if code and nudged:
                    delta = error * (1.0 if displaced else abs(beta_of[l]))
                    delta *= code.nudged_quantum * code.nudged_decay**t
                elif code:
                    delta = code.quantum * code.decay ** max(0.0, t - code.lag * l)
                counts[l] = senders[l].send(s, lam, delta, displaced, error)
        states.append([sender.s for sender in senders])
        spikes.append(counts)
    scale = beta_of if displaced else [1.0] * L
    base = s0 if displaced else [0.0] * L
    return states, spikes, scale, base


SPIKING = {
    "sigma-delta": ep.SigmaDelta(
        0.8, 0.2, 0.5, lam=0.4, lam_power=0.0, nudged_epsilon=0.8, average=5
    ),
    "sigma-delta, polynomial": ep.SigmaDelta(
        0.775, 0.313, 0.0, lam=0.67, lam_power=0.578, lam_floor=0.0, average=4
    ),
    "delta code": ep.DeltaCode(lag=1.5),
    "leaky delta code": ep.DeltaCode(decay=0.8, leak=True),
    "self-scaling": ep.DeltaCode(shrink=0.7),
    "self-scaling, leaky": ep.DeltaCode(leak=True, shrink=0.9, levels=3),
}
PHASES = [
    ("sigma-delta", "synchronous", "absolute", 0.3),
    ("sigma-delta", "ordered", "displacement", 0.3),
    ("sigma-delta", "ordered", "absolute", -0.3),
    ("sigma-delta, polynomial", "synchronous", "absolute", -0.3),
    ("sigma-delta, polynomial", "alternating", "displacement", 0.3),
    ("delta code", "synchronous", "displacement", -0.3),
    ("delta code", "alternating", "absolute", -0.3),
    ("delta code", "ordered", "displacement", 0.3),
    ("leaky delta code", "synchronous", "absolute", 0.3),
    ("leaky delta code", "alternating", "displacement", 0.3),
    ("self-scaling", "ordered", "displacement", 0.3),
    ("self-scaling", "synchronous", "absolute", -0.3),
    ("self-scaling, leaky", "alternating", "displacement", 0.3),
]


@pytest.mark.parametrize(("name", "sweep", "coordinates", "beta"), PHASES)
def test_spiking_phases_follow_the_equations(
    name: str, sweep: Any, coordinates: Any, beta: float
) -> None:
    """Every spike of both phases, against each neuron's equations with an explicit decoder.

    Catches news heard twice, late or never, clocks that restart, a start of the nudged phase at
    which receivers do not know the free state, and a read-out that is not the mean of the last
    `average` analog states.
    """
    neuron = SPIKING[name]
    spec = ep.NetworkSpec(
        (6,), (ep.Dense(8), ep.Dense(7), ep.Dense(6), ep.Dense(4)), neuron, feedback=0.5
    )
    params = make_params(spec, seed=4, gain=1.2)
    x, y = np.random.default_rng(5).uniform(size=6), np.eye(4)[1]
    T, K, displaced = 14, 9, coordinates == "displacement"
    phases = ep.Phases(T, K, sweep=sweep, coordinates=coordinates)

    def trace(snapshot: Any) -> Any:
        return snapshot.state, snapshot.spikes

    @jax.jit
    def ours(x: jax.Array, beta: jax.Array) -> Any:
        free, info = ep.free_phase(params, spec, x, phases, trace=trace)
        nudged, nudged_info = ep.nudged_phase(params, spec, x, y, free, beta, phases, trace=trace)
        return (free, info), (nudged, nudged_info)

    results = ours(jnp.asarray(x), jnp.asarray(beta))
    zero = [np.zeros(shape) for shape in spec.state_shapes]
    free = [np.asarray(s) for s in results[0][0]]
    runs = (
        simulate(params, spec, x, sweep, T, zero),
        simulate(params, spec, x, sweep, K, free, T, y, beta, displaced),
    )
    average = neuron.average if isinstance(neuron, ep.SigmaDelta) else 1
    for (readout, info), (states, spikes, scale, base) in zip(results, runs, strict=True):
        for l in range(4):
            s, q = (np.stack([step[l] for step in steps]) for steps in (states, spikes))
            np.testing.assert_array_equal(info.trace[1][l], q)
            np.testing.assert_allclose(info.trace[0][l], s, atol=1e-12)
            mean = base[l] + scale[l] * s[-average:].mean(0)
            np.testing.assert_allclose(readout[l], mean, atol=1e-12)
            np.testing.assert_allclose(info.spikes[l], np.abs(q).sum() / q.shape[1], rtol=1e-12)
        assert sum(float(v) for v in info.spikes) > 1  # the comparison is not of silence


def test_decoder_may_sit_on_either_side_of_affine_weights() -> None:
    """A leak of another sweep, or a decoded signal that lags or is forgotten between the phases.

    Decoding is linear, so before or after an affine map it gives the same numbers, and here the
    same spikes, in both phases and coordinates. A max pool is not affine: there the two differ.
    """
    found = {}
    sides: Any = [("avg", "current"), ("avg", "signal"), ("max", "current"), ("max", "signal")]
    nudges: Any = ((0.3, "displacement"), (-0.3, "absolute"))

    def spikes_of(seen: Any) -> Any:
        return seen.spikes

    for pool, decode in sides:
        layers = (ep.Conv(2, 3, padding="SAME"), ep.Conv(3, 3, pool, padding="SAME"), ep.Dense(3))
        neuron = ep.SigmaDelta(average=4, lam_floor=0.2, decode=decode)
        spec = ep.NetworkSpec((8, 8, 1), layers, neuron, feedback=0.5)
        params = make_params(spec, seed=4)
        x = jnp.asarray(np.random.default_rng(5).uniform(size=(8, 8, 1)))

        def run(spec: Any, pool: Any, params: Any, x: Any) -> Any:
            free = ep.Phases(12, 8, sweep="synchronous")
            runs = [ep.free_phase(params, spec, x, free, trace=spikes_of)]
            for beta, kind in nudges if pool == "avg" else ():
                args = params, spec, x, 1, runs[0][0], beta, replace(free, coordinates=kind)
                runs.append(ep.nudged_phase(*args, trace=spikes_of))
            return [(state, info.trace) for state, info in runs]

        found[pool, decode] = jax.jit(run, static_argnums=(0, 1))(spec, pool, params, x)
    current, signal = found["avg", "current"], found["avg", "signal"]
    for (state, spikes), (other, others) in zip(current, signal, strict=True):
        jax.tree.map(np.testing.assert_array_equal, spikes, others)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), state, other)
        assert sum(float(jnp.abs(q).sum()) for q in spikes) > 20
    (state, _), (other, _) = found["max", "current"][0], found["max", "signal"][0]
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(state, other, strict=True)) > 1e-2


@pytest.mark.parametrize("neuron", [ep.SigmaDelta(average=12), ep.Bernoulli(average=12)])
def test_short_phase_reads_the_mean_of_all_its_states(neuron: Any) -> None:
    """A phase shorter than the averaging window that divides by the window, or keeps its start."""
    spec = ep.NetworkSpec((6,), (ep.Dense(8), ep.Dense(4)), neuron)
    params, x = make_params(spec), jnp.linspace(0, 1, 6)
    state, info = ep.free_phase(
        params, spec, x, ep.Phases(free=5), jax.random.key(0), lambda snapshot: snapshot.state
    )
    for readout, states in zip(state, info.trace, strict=True):
        np.testing.assert_allclose(readout, states.mean(0), rtol=1e-12)


def contractive(seed: int, row_sum: float) -> tuple[ep.NetworkSpec, Any, np.ndarray, np.ndarray]:
    """A delta-coded dense network whose every unit hears at most `row_sum` for signals of 1.

    Returns the spec, parameters, input and the fixed point of the rate network, all layers joined.
    """
    spec = ep.NetworkSpec(
        (6,), (ep.Dense(9), ep.Dense(8), ep.Dense(4)), ep.DeltaCode(0.7, 0.8, 0.0), feedback=0.4
    )
    params = make_params(spec, seed)
    W = [np.asarray(p["w"]) for p in params]
    sums = [np.abs(w).sum(0) if l else 0 for l, w in enumerate(W)]
    sums = [
        s + 0.4 * np.abs(W[l + 1]).sum(1) if l + 1 < 3 else s for l, s in enumerate(sums)
    ]  # fmt: skip
    shrink = row_sum / max(np.max(s) for s in sums)
    params = tuple(
        {"w": p["w"] * (shrink if l else 1), "b": p["b"]} for l, p in enumerate(params)
    )  # fmt: skip
    x = np.random.default_rng(seed).uniform(size=6)
    W, b = ([np.asarray(p[name]) for p in params] for name in ("w", "b"))
    s = [np.zeros(n) for n in (9, 8, 4)]
    for _ in range(200):
        s = [
            np.clip(x @ W[0] + b[0] + 0.4 * W[1] @ s[1], 0, 1),
            np.clip(s[0] @ W[1] + b[1] + 0.4 * W[2] @ s[2], 0, 1),
            s[1] @ W[2] + b[2],
        ]
    return spec, params, x, np.concatenate(s)


def test_delta_coded_network_reaches_the_fixed_point_of_rates() -> None:
    """A code whose error does not fall with its quantum, as an open loop's does not.

    Let currents change by at most c for signals that change by 1, with ``c <= 3/2 decay - 1/2``.
    Then a signal moves by at most a quantum a sweep, every neuron is tracked to half a quantum, and
    ``e_t <= c (e_{t-1} + delta_{t-1} / 2)`` bounds the largest distance e to the fixed point.
    """
    c, steps = 0.69, 60
    spec, params, x, fixed = contractive(seed=3, row_sum=c)

    def distance(snapshot: Any) -> jax.Array:
        return jnp.max(jnp.abs(jnp.concatenate(snapshot.state) - fixed))

    phases = ep.Phases(free=steps, sweep="synchronous")
    _, info = ep.free_phase(params, spec, jnp.asarray(x), phases, trace=distance)
    e = c * np.abs(fixed).max()
    for t, seen in enumerate(np.asarray(info.trace)):
        assert seen <= e + 1e-12
        e = c * (e + 0.7 * 0.8**t / 2)
    assert e < 1e-4  # what the bound says is no empty promise


@pytest.mark.parametrize("sweep", ["alternating", "ordered"])
@pytest.mark.parametrize("row_sum", [0.7, 3.0])
def test_delta_coded_network_falls_silent(sweep: Any, row_sum: float) -> None:
    """Spikes at rest: a limit cycle, as open-loop sigma-delta has.

    With a constant quantum of 1/8 what is known lies on a lattice that contains 0 and 1. A sweep
    that never updates two neighbours at once takes single lattice steps down the (separable,
    convex) energy of each layer, so it ends after finitely many spikes, at any loop gain that
    leaves the energy bounded; then all states rest, off by ``e <= |K| (e + 1/16)``.
    """
    spec, params, x, fixed = contractive(seed=5, row_sum=row_sum)
    neuron = ep.DeltaCode(0.125, decay=1.0, lag=0.0)
    spec = ep.NetworkSpec(spec.input_shape, spec.layers, neuron, feedback=spec.feedback)
    state, info = ep.free_phase(
        params,
        spec,
        jnp.asarray(x),
        ep.Phases(free=150, sweep=sweep),
        trace=lambda seen: (sum(jnp.sum(jnp.abs(q)) for q in seen.spikes), seen.change),
    )
    spikes, change = info.trace
    assert spikes[:3].sum() > 10
    assert not spikes[-50:].any()
    assert change[-49:].max() < 1e-15  # rounding: the map is computed once more
    if row_sum < 1:
        distance = np.abs(np.concatenate(state) - fixed).max()
        assert distance <= row_sum / (1 - row_sum) / 16
