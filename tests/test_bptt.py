"""BPTT against sweeps written out one by one, with spikes as well, and what it keeps in memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    LinearNetwork,
    exact_gradient,
    flat,
    make_batch,
    make_params,
    one_hot,
    reference_cost,
    reference_current,
    relative_error,
)

import ep_jax as ep
from ep_jax.neurons import Clock

pytestmark = pytest.mark.usefixtures("x64")

bptt = jax.jit(ep.bptt_gradient, static_argnames=("spec", "phases", "tracked", "remat"))
stop = jax.lax.stop_gradient


def clip(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 1)


SIGMA = {"hard_sigmoid": clip, "tanh": jnp.tanh, "softplus": jax.nn.softplus, "linear": lambda x: x}


def groups(sweep: str, depth: int) -> list[list[int]]:
    """Layers that a sweep updates from the same signals."""
    if sweep == "synchronous":
        return [list(range(depth))]
    return [list(range(0, depth, 2)), list(range(1, depth, 2))]


def activation(spec: ep.NetworkSpec, l: int) -> Any:
    is_output = l == spec.depth - 1 and spec.cost == "squared_error"
    return SIGMA["linear" if is_output else spec.neuron.activation]


def batch_mean(spec: ep.NetworkSpec, xs: Any, ys: Any, last: Any) -> Any:
    """The batch-mean cost as a function of the parameters; `last` gives the last layer's state."""

    def mean_cost(params: Any) -> jax.Array:
        outputs = jax.vmap(lambda x: last(params, x))(xs)
        costs = jax.vmap(lambda s, y: reference_cost(params, spec, s, y))(
            outputs, one_hot(spec, ys)
        )
        return jnp.mean(costs)

    return mean_cost


def unrolled(spec: ep.NetworkSpec, xs: Any, ys: Any, sweep: str, sweeps: int, tracked: int) -> Any:
    """The mean cost after `sweeps` sweeps of rates, of which the last `tracked` have a gradient."""

    def last(params: Any, x: Any) -> jax.Array:
        s = [jnp.zeros(shape) for shape in spec.state_shapes]
        for t in range(sweeps):
            s = list(map(stop, s)) if t == sweeps - tracked else s
            for group in groups(sweep, spec.depth):
                old = tuple(s)
                for l in group:
                    s[l] = activation(spec, l)(reference_current(params, spec, x, old, l))
        return s[-1]

    return batch_mean(spec, xs, ys, last)


# Rates.


@pytest.mark.parametrize(
    ("sweep", "name", "pool", "cost", "tracked"),
    [
        ("synchronous", "hard_sigmoid", "avg", "squared_error", 3),
        ("alternating", "tanh", "avg", "cross_entropy", 3),
        ("synchronous", "softplus", "max", "cross_entropy", 4),
    ],
)
def test_gradient_of_unsettled_sweeps(
    sweep: Any, name: str, pool: Any, cost: Any, tracked: int
) -> None:
    """A sweep too many or too few, a detached part, a state that a truncation should have frozen.

    Four sweeps from zero settle nothing, so every one of them counts. Truncated to the last three,
    the state after the first is a constant and the parameters' earlier use has no gradient.
    """
    spec = ep.NetworkSpec(
        (6, 6, 1), (ep.Conv(2, 3, pool), ep.Dense(5), ep.Dense(4)), ep.Rate(activation=name),
        cost, 0.6,
    )  # fmt: skip
    params, (xs, ys) = make_params(spec), make_batch(spec, 2)
    reference = jax.value_and_grad(unrolled(spec, xs, ys, sweep, 4, tracked))
    value, expected = jax.jit(reference)(params)
    grads, info = bptt(params, spec, xs, ys, ep.Phases(free=4, sweep=sweep), tracked=tracked)
    np.testing.assert_allclose(info.cost, value, rtol=1e-12)
    np.testing.assert_allclose(flat(grads), flat(expected), atol=1e-13)
    assert all(np.linalg.norm(flat(g)) > 1e-3 for g in grads)


def test_settled_gradient_is_the_exact_one() -> None:
    """Anything that a long relaxation would bring in; labels, one-hot targets and no nudge."""
    spec = ep.NetworkSpec(
        (6, 6, 1), (ep.Conv(3, 3), ep.Dense(3)), ep.Rate(activation="tanh"), "cross_entropy", 0.5
    )
    params, (xs, ys) = make_params(spec, gain=0.7), make_batch(spec, 3)
    exact = exact_gradient(params, spec, xs, ys, 80)
    grads, info = bptt(params, spec, xs, one_hot(spec, ys), ep.Phases(free=80))
    assert relative_error(grads, exact) < 1e-12
    assert info.nudged is None
    assert float(info.free.residual) < 1e-12


def test_truncation_cuts_the_series_of_the_adjoint() -> None:
    """One sweep too many or too few tracked, or a truncation that tends to another gradient.

    In a linear network at rest, K tracked sweeps give exactly ``v_K = sum_(k<K) (M^T)^k dC/ds`` in
    place of ``v = (I - M^T)^-1 dC/ds``: what is missing falls like the K-th power of M's largest
    eigenvalue.
    """
    spec = ep.NetworkSpec(
        (4,), (ep.Dense(5), ep.Dense(4), ep.Dense(3)), ep.Rate(activation="linear"), feedback=0.7
    )
    params, (xs, ys) = make_params(spec, seed=7, gain=0.5), make_batch(spec, 1)
    net = LinearNetwork(params, 0.7, np.asarray(xs[0]), np.asarray(one_hot(spec, ys)[0]))
    phases = ep.Phases(free=200, sweep="synchronous")
    errors, kept = [], (1, 2, 15, 40)
    for tracked in kept:
        grads, _ = bptt(params, spec, xs, ys, phases, tracked=tracked)
        np.testing.assert_allclose(flat(grads), flat(net.truncated(tracked)), atol=1e-12)
        errors.append(relative_error(grads, net.exact()))
    radius = np.abs(np.linalg.eigvals(net.M)).max()
    rate = (errors[-1] / errors[-2]) ** (1 / (kept[-1] - kept[-2]))
    assert abs(rate / radius - 1) < 0.05, (errors, radius)


def test_rematerialisation_changes_nothing() -> None:
    """Segments that miss the remainder, run it twice, or restart the clock.

    One sweep, and a truncated number with a remainder beyond whole segments; the quantum of these
    neurons depends on the sweep.
    """
    spec = ep.NetworkSpec((5,), (ep.Dense(6), ep.Dense(3)), ep.DeltaCode(decay=0.8), feedback=0.6)
    params, (xs, ys) = make_params(spec), make_batch(spec, 2)
    for sweeps, tracked in ((1, 1), (11, 7)):
        (plain, info), (again, again_info) = (
            bptt(params, spec, xs, ys, ep.Phases(free=sweeps), tracked=tracked, remat=remat)
            for remat in (False, True)
        )
        np.testing.assert_allclose(flat(again), flat(plain), rtol=0, atol=1e-15)
        np.testing.assert_allclose(flat(again_info._asdict()), flat(info._asdict()), atol=1e-15)


def test_memory_of_every_variant() -> None:
    """Rematerialisation that keeps each sweep, or a truncation that keeps what it throws away.

    Full BPTT keeps at least a state of each sweep; in segments of the order of sqrt(T) of them,
    truncated those that are tracked.
    """
    spec = ep.NetworkSpec((64,), (ep.Dense(64), ep.Dense(64), ep.Dense(3)), ep.Rate())
    params = jax.eval_shape(lambda: ep.init_params(jax.random.key(0), spec))
    xs = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    ys = jax.ShapeDtypeStruct((32,), jnp.int32)

    def temporary(sweeps: int, **variant: Any) -> float:
        """In states of the batch."""
        lowered = bptt.lower(params, spec, xs, ys, ep.Phases(free=sweeps), **variant)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes / (4 * 32 * (64 + 64 + 3))

    full = temporary(400)
    remat = [temporary(sweeps, remat=True) for sweeps in (25, 400)]
    truncated = [temporary(sweeps, tracked=10) for sweeps in (25, 400)]
    assert full >= 400
    # 4 times as many sweeps a segment, and as many segments, of 16 times the sweeps.
    assert remat[1] <= 5 * remat[0]
    assert remat[1] < 0.25 * full
    assert truncated[1] <= 1.02 * truncated[0]


# Spikes.


def heard_of(neuron: Any, old: Any, s: Any, layer: int, t: int) -> Any:
    """What receivers know after a sweep ``{"s", "known", ...}``; spikes are constants."""
    new = dict(old, s=s)
    if isinstance(neuron, ep.SigmaDelta):
        value = old["error"] + (s - (1 - neuron.lam) * old["s"]) / neuron.lam
        q = jnp.where(value > 0.5, 1.0, 0.0)
        new["error"] = jnp.clip(value - q, -0.5, 0.5)
        new["known"] = (1 - neuron.lam) * old["known"] + neuron.lam * q
    elif isinstance(neuron, ep.DeltaCode):
        code: Any = neuron
        delta = code.quantum * code.decay ** max(0.0, t - code.lag * layer)
        kept = (1 - delta) * old["known"] if neuron.leak else old["known"]
        value = (s - kept) / delta
        q = jnp.where(value > 0.5, 1.0, 0.0) if neuron.leak else jnp.clip(jnp.round(value), -1, 1)
        new["known"] = kept + delta * q
    else:
        membrane = neuron.leak * old["error"] + s
        new["known"] = jnp.where(membrane >= 1, 1.0, 0.0)
        new["error"] = jnp.clip(membrane - new["known"], -1, 1)
    return new


def straight_through(spec: ep.NetworkSpec, xs: Any, ys: Any, sweep: str, sweeps: int) -> Any:
    """The mean cost of a spiking phase in which a signal has the derivative of what it stands for.

    The spikes of the trajectory are constants: a signal is what receivers know plus ``s - stop(s)``
    of the analog value that they are told of (a rate; of integrate-and-fire, what goes into the
    membrane).
    """
    neuron, settings = spec.neuron, vars(spec.neuron)
    fires = isinstance(neuron, ep.IntegrateFire)
    epsilon, leak = settings.get("epsilon", 1.0), settings.get("leak", 0.0)

    def last(params: Any, x: Any) -> jax.Array:
        zeros = [jnp.zeros(shape) for shape in spec.state_shapes]
        told: list[Any] = [{"s": z, "known": z, "error": z} for z in zeros]
        signals, s, total, length, output = list(zeros), list(zeros), zeros[-1], 1.0, []
        for t in range(sweeps):
            for group in groups(sweep, spec.depth):
                old = tuple(signals)
                for l in group:
                    drive = reference_current(params, spec, x, old, l)
                    bounded = activation(spec, l)
                    s[l] = bounded((0 if fires else (1 - epsilon) * s[l]) + epsilon * drive)
                    told[l] = heard_of(neuron, told[l], stop(s[l]), l, t)
                    signals[l] = told[l]["known"] + (s[l] - stop(s[l]))
            if fires:
                total, length = leak * total + signals[-1], leak * length + 1
                output.append(total / length)
            else:
                output.append(s[-1])
        return jnp.mean(jnp.stack(output[-settings.get("average", 1) :]), axis=0)

    return batch_mean(spec, xs, ys, last)


CONSTANT: Any = {"epsilon_power": 0.0, "lam_power": 0.0}
SPIKING = {
    "sigma-delta": (ep.SigmaDelta(0.7, lam=0.4, average=3, **CONSTANT), "synchronous"),
    "delta code": (ep.DeltaCode(decay=0.8), "alternating"),
    "integrate and fire": (ep.IntegrateFire(0.9, average=3), "synchronous"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPIKING)
def test_straight_through_is_the_derivative_of_what_is_told(name: str) -> None:
    """An error that is not told, a decoder without gradient, a clock that a truncation restarts.

    Straight through a quantiser, spikes have the derivative of the encoder's input, and the decoder
    inverts the encoder (with a constant leak in every sweep), so what receivers know has the
    derivative of the analog state, while its value is that of the spikes: exactly.
    """
    neuron, sweep = SPIKING[name]
    spec = ep.NetworkSpec((5,), (ep.Dense(6), ep.Dense(5), ep.Dense(3)), neuron, feedback=0.6)
    params, (xs, ys) = make_params(spec, seed=4), make_batch(spec, 2)
    value, expected = jax.jit(jax.value_and_grad(straight_through(spec, xs, ys, sweep, 6)))(params)
    grads, info = bptt(params, spec, xs, ys, ep.Phases(free=6, sweep=sweep))
    assert sum(map(float, info.free.spikes)) > 1
    np.testing.assert_allclose(info.cost, value, rtol=1e-12)
    np.testing.assert_allclose(flat(grads), flat(expected), atol=1e-12)
    assert all(np.linalg.norm(flat(g)) > 1e-3 for g in grads)


@pytest.mark.parametrize(
    "neuron",
    [
        ep.SigmaDelta(),
        ep.DeltaCode(),
        ep.DeltaCode(leak=True),
        ep.DeltaCode(decay=0.6),
        ep.IntegrateFire(),
        ep.Bernoulli(),
    ],
    ids=lambda neuron: type(neuron).__name__,
)
def test_signal_of_a_neuron_has_the_derivative_of_its_state(neuron: Any) -> None:
    """A bound on spikes that halves their derivative: a minimum at a tie has only half of it.

    From rest one sweep to a target: decoded with a leak, a signal's derivative is ``1 / lam`` of
    it, as the encoder inverts the decoder; the other models send the target itself.
    """
    target = jnp.linspace(0.05, 0.95, 19)
    now = Clock(
        jnp.asarray(0), 9, 0, 1, 1.0, 1.0, neighbours_updated=False, nudged=False, displaced=False
    )

    def sent(target: jax.Array) -> jax.Array:
        state = neuron.start(jnp.zeros(19), jnp.zeros(19))
        state, _ = neuron.step(
            state, jnp.zeros(19), lambda s, current, epsilon: target, now, jax.random.key(0)
        )
        return neuron.signal(state)

    gain = 1 / neuron.lam if isinstance(neuron, ep.SigmaDelta) else 1.0
    np.testing.assert_allclose(jax.jacobian(sent)(target), gain * np.eye(19), atol=1e-12)


@pytest.mark.parametrize(
    ("neuron", "other"),
    [
        (ep.SigmaDelta(average=3), "fast_sigmoid"),
        (ep.DeltaCode(), "triangle"),
        (ep.Bernoulli(average=3), "triangle"),
        (ep.IntegrateFire(average=3), "fast_sigmoid"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_surrogates_change_the_gradient_alone(neuron: Any, other: str) -> None:
    """A surrogate that moves the trajectory, or a gradient that is NaN.

    (A division by zero in the branch of a ``where`` that is not taken does that, in the running
    mean of the read-out before its window begins.)
    """
    layers = (ep.Dense(8), ep.Dense(3))
    grads, infos = [], []
    for surrogate in ("straight_through", other):
        model = type(neuron)(**{**vars(neuron), "surrogate": surrogate})
        spec = ep.NetworkSpec((5,), layers, model, feedback=0.6)
        params, (xs, ys) = make_params(spec), make_batch(spec, 2)
        run = functools.partial(bptt, params, spec, xs, ys, ep.Phases(free=7))
        g, info = run(jax.random.key(0))
        assert np.isfinite(flat(g)).all()
        assert np.linalg.norm(flat(g)) > 1e-3
        grads.append(flat(g))
        infos.append(info)
        if surrogate == other:
            np.testing.assert_array_equal(flat(run(jax.random.key(0))[0]), flat(g))
            another = flat(run(jax.random.key(1))[0])
            assert (relative_error(another, flat(g)) > 0.01) == neuron.stochastic
    jax.tree.map(np.testing.assert_array_equal, *infos)
    assert relative_error(*grads) > 0.01
