"""Wrong input is refused before anything runs: the message names it, what came and what fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ep_jax as ep
from ep_jax import presets
from ep_jax.phases import optimal_relaxation
from ep_jax.pruning import prune
from ep_jax.training import Augmentation, predict

SPEC = ep.NetworkSpec((6, 6, 1), (ep.Conv(2, 3), ep.Dense(4), ep.Dense(3)), ep.Rate())
PARAMS: Any = tuple(
    {"w": np.zeros(shape, np.float32), "b": np.zeros(shape[-1], np.float32)}
    for shape in [(3, 3, 1, 2), (8, 4), (4, 3)]
)
STATE: Any = tuple(np.zeros(shape, np.float32) for shape in [(2, 2, 2), (4,), (3,)])
KEEP: Any = (np.ones(2, bool), np.ones(4, bool))
X: Any = np.zeros((6, 6, 1), np.float32)
XS, YS = np.zeros((5, 6, 6, 1), np.float32), np.array([0, 1, 2, 1, 0])
MAX_POOLED = ep.NetworkSpec((6, 6, 1), (ep.Conv(2, 3, "max"), ep.Dense(4), ep.Dense(3)), ep.Rate())
NOISY = ep.NetworkSpec((6, 6, 1), SPEC.layers, ep.Bernoulli())
FIRING = ep.NetworkSpec((6, 6, 1), SPEC.layers, ep.IntegrateFire())
PHASES = ep.Phases(2, 2)

# Choices are checked at run time, where no type checker looks.
Phases: Any = ep.Phases
Spec: Any = ep.NetworkSpec
Conv: Any = ep.Conv
DeltaCode: Any = ep.DeltaCode
SigmaDelta: Any = ep.SigmaDelta
Config: Any = presets.Config


class Half:
    """The beginning of a neuron model."""

    activation = "hard_sigmoid"
    stochastic = False
    start = step = ep.Rate.step


class Changing(Half):
    """A whole one that may change, so that it has no hash."""

    signal = readout = ep.Rate.signal
    __hash__: Any = None


class Odd(Half):
    """One of an activation that nobody knows."""

    activation = "relu"
    signal = readout = ep.Rate.signal


class Alone(ep.Rate):
    """One that forgets to say that it sends no spikes."""

    step: Any = lambda *arguments: ep.Rate.step(*arguments)[0]


class Summed(ep.Rate):
    """One whose layers say one number."""

    def signal(self, state: Any) -> Any:
        return state.s.sum()


class Nameless(ep.Rate):
    """One whose state is the array itself."""

    def start(self, s: Any, current: Any) -> Any:
        del current
        return s


class Growing(ep.Rate):
    """One whose state becomes another one."""

    step: Any = lambda self, state, *others: ((state, state), None)


class Mistyped(ep.Rate):
    """One that asks for what is not there."""

    def readout(self, state: Any) -> Any:
        return state.S


class ChangingCost:
    """A cost that may change."""

    __hash__: Any = None

    def __call__(self, output: Any, target: Any) -> Any:
        return output - target


def changed(layer: int, name: str, value: Any) -> Any:
    return tuple({**p, name: value} if l == layer else p for l, p in enumerate(PARAMS))


def with_entry(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[3] = value
    return array


NAN_STATE: Any = (with_entry(STATE[0], np.nan), *STATE[1:])


def gradient(of: Any = ep.ep_gradient, **other: Any) -> Any:
    settings = {"params": PARAMS, "spec": SPEC, "xs": XS, "ys": YS, "phases": PHASES, **other}
    return of(**settings)


def free(**other: Any) -> Any:
    return ep.free_phase(**{"params": PARAMS, "spec": SPEC, "x": X, "phases": PHASES, **other})


def nudged(**other: Any) -> Any:
    settings = {
        "params": PARAMS, "spec": SPEC, "x": X, "y": 1, "state": STATE, "beta": 0.1,
        "phases": PHASES, **other,
    }  # fmt: skip
    return ep.nudged_phase(**settings)


Case = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]

# What the message has to name: the argument, what came, what was expected.
CASES: dict[str, Case] = {
    # Inputs.
    "x of another size": (
        lambda: free(x=X[:5]), ValueError, ("x ", "(5, 6, 1)", "(6, 6, 1)")),
    "x with a batch axis": (
        lambda: free(x=XS), ValueError, ("x ", "(5, 6, 6, 1)", "(6, 6, 1)")),
    "x of integers": (
        lambda: free(x=X.astype(np.uint8)), TypeError, ("x ", "uint8", "floating-point")),
    "x with NaN": (
        lambda: nudged(x=with_entry(X, np.nan)), ValueError, ("x ", "1 values", "NaN", "finite")),
    "x as a list": (
        lambda: free(x=X.tolist()), TypeError, ("x ", "list", "(6, 6, 1)")),
    "xs without a batch axis": (
        lambda: gradient(xs=X), ValueError, ("xs ", "(6, 6, 1)", "(batch, 6, 6, 1)")),
    "xs of another size": (
        lambda: gradient(xs=XS[:, :4]), ValueError, ("xs ", "(5, 4, 6, 1)", "(batch, 6, 6, 1)")),
    "xs of integers": (
        lambda: gradient(xs=XS.astype(np.int32)), TypeError, ("xs ", "int32", "floating-point")),
    "xs with NaN": (
        lambda: gradient(xs=with_entry(XS, np.nan)), ValueError, ("xs ", "NaN", "finite")),
    "xs with infinity": (
        lambda: gradient(xs=with_entry(XS, np.inf)), ValueError, ("xs ", "infinite", "finite")),
    "an empty batch": (
        lambda: gradient(xs=XS[:0], ys=YS[:0]), ValueError, ("xs ", "no example", "at least one")),
    # Targets.
    "a negative label": (
        lambda: gradient(ys=YS - 1), ValueError, ("ys ", "-1", "0 .. 2")),
    "a label too large": (
        lambda: gradient(ys=YS + 1), ValueError, ("ys ", "3", "0 .. 2")),
    "labels for another batch": (
        lambda: gradient(ys=YS[:4]), ValueError, ("ys ", "(4,)", "(5,)")),
    "labels as floats": (
        lambda: gradient(ys=YS * 1.0), ValueError, ("ys ", "float64", "integer")),
    "one-hot targets of other classes": (
        lambda: gradient(ys=np.zeros((5, 4))), ValueError, ("ys ", "(5, 4)", "(5, 3)")),
    "one-hot targets with NaN": (
        lambda: gradient(ys=with_entry(np.zeros((5, 3)), np.nan)), ValueError,
        ("ys ", "NaN", "finite")),
    "a label too large, alone": (
        lambda: nudged(y=3), ValueError, ("y ", "3", "0 .. 2")),
    "a target as text": (
        lambda: nudged(y="cat"), TypeError, ("y ", "str", "labels")),
    # Parameters.
    "too few layers of params": (
        lambda: free(params=PARAMS[:2]), ValueError, ("params ", "2 layers", "3 layers")),
    "params of another network": (
        lambda: gradient(params=changed(1, "w", np.zeros((9, 4)))), ValueError,
        ("params[1]['w'] ", "(9, 4)", "(8, 4)")),
    "a layer of another precision": (
        lambda: free(params=changed(1, "b", np.zeros(4, np.float16))), TypeError,
        ("params[1]['b'] ", "float16", "float32", "params[0]['b']")),
    "a bias of another size": (
        lambda: nudged(params=changed(2, "b", np.zeros(2))), ValueError,
        ("params[2]['b'] ", "(2,)", "(3)")),
    "params without a bias": (
        lambda: free(params=({"w": 0}, *PARAMS[1:])), ValueError, ("params[0] ", "'w'", "'b'")),
    "params with NaN": (
        lambda: gradient(params=changed(0, "w", with_entry(PARAMS[0]["w"], np.nan))), ValueError,
        ("params[0]['w'] ", "NaN", "finite")),
    "params of integers": (
        lambda: free(params=changed(0, "w", PARAMS[0]["w"].astype(int))), TypeError,
        ("params[0]['w'] ", "int64", "floating-point")),
    "params as a dict": (
        lambda: free(params=PARAMS[0]), ValueError, ("params ", "dict", "3 layers")),
    "a gain of zero": (
        lambda: ep.init_params(jax.random.key(0), SPEC, gain=0.0), ValueError,
        ("gain ", "0.0", "above 0")),
    # States.
    "a state of another network": (
        lambda: nudged(state=(*STATE[:2], STATE[1])), ValueError, ("state[2] ", "(4,)", "(3)")),
    "too few layers of state": (
        lambda: nudged(state=STATE[:2]), ValueError, ("state ", "2 layers", "3 arrays")),
    "a state with NaN": (
        lambda: ep.energy(PARAMS, SPEC, X, NAN_STATE), ValueError,
        ("state[0] ", "NaN", "finite")),
    "phi of a wrong state": (
        lambda: ep.phi(PARAMS, SPEC, X, STATE[::-1]), ValueError,
        ("state[0] ", "(3,)", "(2, 2, 2)")),
    # Phases.
    "beta of zero": (
        lambda: Phases(beta=0.0), ValueError, ("Phases.beta ", "0", "other than 0")),
    "beta of NaN": (
        lambda: Phases(beta=np.nan), ValueError, ("Phases.beta ", "nan", "finite")),
    "beta as text": (
        lambda: Phases(beta="0.1"), TypeError, ("Phases.beta ", "'0.1'", "number")),
    "a phase nudged by zero": (
        lambda: nudged(beta=0), ValueError, ("beta ", "0", "other than 0")),
    "a phase nudged by an array of zero": (
        lambda: nudged(beta=np.zeros(())), ValueError, ("beta ", "0", "other than 0")),
    "no free steps": (
        lambda: Phases(free=0), ValueError, ("Phases.free ", "0", "at least 1")),
    "negative nudged steps": (
        lambda: Phases(nudged=-3), ValueError, ("Phases.nudged ", "-3", "at least 1")),
    "steps as a float": (
        lambda: Phases(free=10.0), TypeError, ("Phases.free ", "10.0", "integer")),
    "steps as a bool": (
        lambda: Phases(free=True), TypeError, ("Phases.free ", "True", "integer")),
    "an unknown estimator": (
        lambda: Phases(estimator="centered"), ValueError,
        ("Phases.estimator ", "'centered'", "'symmetric'")),
    "an unknown sweep": (
        lambda: Phases(sweep="random"), ValueError, ("Phases.sweep ", "'random'", "'ordered'")),
    "unknown coordinates": (
        lambda: Phases(coordinates="polar"), ValueError,
        ("Phases.coordinates ", "'polar'", "'displacement'")),
    **{
        f"phases as a dict, {of.__name__}": (
            lambda of=of: gradient(of=of, phases={"free": 2}), TypeError,
            ("phases ", "{'free': 2}", "Phases"))
        for of in (ep.ep_gradient, ep.bptt_gradient, ep.implicit_gradient)
    },
    "one point on a circle": (
        lambda: Phases(points=1), ValueError, ("Phases.points ", "1", "at least 2")),
    "unknown signals": (
        lambda: Phases(nudged_signals="int8"), ValueError,
        ("Phases.nudged_signals ", "'int8'", "'full', 'bfloat16'")),
    "complex signals of low precision": (
        lambda: Phases(estimator="holomorphic", nudged_signals="bfloat16"), ValueError,
        ("Phases.nudged_signals ", "'bfloat16'", "'full'", "'holomorphic'", "complex")),
    **{
        f"holomorphic EP of {name}": (
            lambda spec=spec: gradient(spec=spec, phases=Phases(2, 2, estimator="holomorphic")),
            ValueError, ("estimator ", "'holomorphic'", str(spec.neuron), "max", "'tanh'"))
        for name, spec in {
            "hard sigmoids": SPEC, "spikes": Spec((6, 6, 1), SPEC.layers, ep.DeltaCode()),
            "a max pool": MAX_POOLED,
        }.items()
    },
    "noise without a key": (
        lambda: free(spec=NOISY), ValueError, ("key ", "None", "random key", "Bernoulli")),
    "a gradient of noise without a key": (
        lambda: gradient(spec=NOISY), ValueError, ("key ", "None", "random key", "Bernoulli")),
    "random signs without a key": (
        lambda: gradient(phases=Phases(2, 2, estimator="random_sign")), ValueError,
        ("key ", "None", "random key", "random_sign")),
    "a relaxation of two": (
        lambda: Phases(relaxation=2.0), ValueError, ("Phases.relaxation ", "2.0", "below 2")),
    "a relaxation of zero": (
        lambda: Phases(relaxation=0.0), ValueError, ("Phases.relaxation ", "0.0", "above 0")),
    "over-relaxed synchronous sweeps": (
        lambda: Phases(relaxation=1.2, sweep="synchronous"), ValueError,
        ("Phases.relaxation ", "1.2", "'synchronous'", "at most 1", "'ordered'")),
    "over-relaxed spike trains": (
        lambda: free(spec=FIRING, phases=Phases(relaxation=1.2)), ValueError,
        ("phases.relaxation ", "1.2", "expected 1", "IntegrateFire")),
    "a tolerance of nothing": (
        lambda: Phases(tolerance=0.0), ValueError, ("Phases.tolerance ", "0.0", "above 0")),
    "stragglers without further sweeps": (
        lambda: Phases(stragglers=0.25), ValueError,
        ("Phases.stragglers ", "0.25", "free_more 0", "or neither")),
    "further sweeps of no stragglers": (
        lambda: Phases(nudged_more=4), ValueError,
        ("Phases.stragglers ", "0.0", "nudged_more 4", "or neither")),
    "all of a batch as stragglers": (
        lambda: Phases(stragglers=1.0, free_more=3), ValueError,
        ("Phases.stragglers ", "1.0", "less than 1")),
    "a limit on states": (
        lambda: Phases(limit=3.0, coordinates="absolute"), ValueError,
        ("Phases.limit ", "3.0", "'absolute'", "'displacement'")),
    **{
        f"a nudge that is lost in rounding, {name}": (
            lambda call=call: call(phases=Phases(2, 2, 1e-6, coordinates="absolute")), ValueError,
            ("beta ", "1e-06", "lowest of 3 layers", "float32", "'displacement'"))
        for name, call in {
            "gradient": gradient, "phase": lambda **other: nudged(beta=1e-6, **other),
        }.items()
    },
    "the optimum for what is no contraction": (
        lambda: optimal_relaxation(1.0), ValueError, ("radius ", "1.0", "less than 1")),
    # The settings of each gradient.
    **{
        f"BPTT of {name} sweeps": (
            lambda phases=phases: gradient(of=ep.bptt_gradient, phases=phases), ValueError,
            (f"phases.{setting} ", "expected", "through time"))
        for name, setting, phases in (
            ("unknown numbers of", "tolerance", Phases(tolerance=1e-3)),
            ("different numbers of", "stragglers", Phases(stragglers=0.5, free_more=3)),
        )
    },
    "no sweeps tracked": (
        lambda: gradient(tracked=0, of=ep.bptt_gradient), ValueError,
        ("tracked ", "0", "at least 1")),
    "more sweeps tracked than there are": (
        lambda: gradient(tracked=3, of=ep.bptt_gradient), ValueError,
        ("tracked ", "3", "at most", "2 sweeps")),
    "rematerialisation as text": (
        lambda: gradient(remat="yes", of=ep.bptt_gradient), ValueError,
        ("remat ", "'yes'", "True, False")),
    "a tolerance of zero": (
        lambda: gradient(tolerance=0.0, of=ep.implicit_gradient), ValueError,
        ("tolerance ", "0.0", "above 0")),
    "no sweeps of the adjoint": (
        lambda: gradient(max_sweeps=0, of=ep.implicit_gradient), ValueError,
        ("max_sweeps ", "0", "at least 1")),
    # Diagnostics.
    "GDU curves of other sweeps": (
        lambda: gradient(
            phases=Phases(2, 2, sweep="alternating", coordinates="absolute"),
            of=ep.diagnostics.gdu),
        ValueError, ("phases ", "'alternating'", "'synchronous'")),
    "GDU curves of displacements": (
        lambda: gradient(phases=Phases(2, 2, sweep="synchronous"), of=ep.diagnostics.gdu),
        ValueError, ("phases ", "'displacement'", "'absolute'")),
    "no power iterations": (
        lambda: ep.diagnostics.spectral_radius(PARAMS, SPEC, X, STATE, iterations=0), ValueError,
        ("iterations ", "0", "at least 1")),
    "contractivity from nowhere": (
        lambda: ep.diagnostics.contractivity(PARAMS, SPEC, jnp.asarray(XS), starts=0), ValueError,
        ("starts ", "0", "at least 1")),
    "recurrence of one image": (
        lambda: ep.diagnostics.recurrence(PARAMS, SPEC, jnp.asarray(XS[:1])), ValueError,
        ("xs ", "one example", "two or more")),
    "phases that settle nothing": (
        lambda: ep.diagnostics.suggest_phases(PARAMS, SPEC, jnp.asarray(XS), tolerance=0.0),
        ValueError, ("tolerance ", "0.0", "above 0")),
    # Runs.
    "an unknown gradient": (
        lambda: Config(gradient="adam"), ValueError, ("gradient ", "'adam'", "'bptt'")),
    "a neuron model that is a class": (
        lambda: Spec((4,), (ep.Dense(2),), ep.Rate), TypeError,
        ("neuron ", "<class 'ep_jax.neurons.Rate'>", "ep_jax.Rate()")),
    "half a neuron model": (
        lambda: Spec((4,), (ep.Dense(2),), Half()), TypeError,
        ("neuron ", "without readout, signal", "ep_jax.Rate()")),
    "a neuron model that may change": (
        lambda: Spec((4,), (ep.Dense(2),), Changing()), TypeError,
        ("neuron ", "no hash", "frozen")),
    "a neuron model of an unknown activation": (
        lambda: Spec((4,), (ep.Dense(2),), Odd()), ValueError,
        ("neuron.activation ", "'relu'", "'hard_sigmoid'")),
    "a neuron model that returns no spikes": (
        lambda: Spec((4,), (ep.Dense(2),), Alone()), TypeError,
        ("neuron.step ", "RateState(s=float32[3])", "or None where there are none")),
    "a neuron model whose signal is one number": (
        lambda: Spec((4,), (ep.Dense(2),), Summed()), TypeError,
        ("neuron.signal ", "float32[]", "float32[3]")),
    "a neuron model whose state has no name": (
        lambda: Spec((4,), (ep.Dense(2),), Nameless()), TypeError,
        ("neuron.start ", "returns float32[3]", "a field s")),
    "a neuron model whose state changes its form": (
        lambda: Spec((4,), (ep.Dense(2),), Growing()), TypeError,
        ("neuron.step ", "(RateState(s=float32[3]), RateState(s=float32[3]))", "expected Rate")),
    "a neuron model with a slip of the pen": (
        lambda: Spec((4,), (ep.Dense(2),), Mistyped()), TypeError,
        ("neuron.readout ", "AttributeError", "'S'")),
    "a cost that may change": (
        lambda: Spec((4,), (ep.Dense(2),), cost=ChangingCost()), TypeError,
        ("cost ", "no hash", "frozen")),
    "a warm-up without end": (
        lambda: Config(warmup=1.0), ValueError, ("warmup ", "1.0", "less than 1")),
    "answers in batches of none": (
        lambda: predict(PARAMS, SPEC, Phases(), np.zeros((2, *SPEC.input_shape), np.uint8),
                        batch=-1),
        ValueError, ("batch ", "-1", "at least 1")),
    "a seed that JAX would cut": (
        lambda: Config(seed=2**32), ValueError, ("seed ", "4294967296", "below 2^32")),
    "a shift that leaves nothing": (
        lambda: Augmentation(shift=8).check((8, 9, 1)), ValueError,
        ("augmentation.shift ", "8", "(8, 9, 1)", "less than 8")),
    "a square larger than the image": (
        lambda: Augmentation(erase=9).check((8, 9, 1)), ValueError,
        ("augmentation.erase ", "9", "(8, 9, 1)", "less than 8")),
    "augmentation of what is no image": (
        lambda: Augmentation(flip=True).check((8,)), ValueError,
        ("augmentation ", "flip=True", "(8,)", "(H, W, C)")),
    "no images to learn": (
        lambda: Config(train_images=0), ValueError, ("train_images ", "0", "at least 1")),
    # Networks.
    **{
        f"feedback of {value}": (
            lambda value=value: Spec((4,), (ep.Dense(2),), ep.Rate(), feedback=value), ValueError,
            ("feedback ", str(value), "(0, 1]"))
        for value in (0, -1, 1.5, np.nan)
    },
    "feedback as text": (
        lambda: Spec((4,), (ep.Dense(2),), feedback="1"), TypeError,
        ("feedback ", "'1'", "number")),
    "an unknown cost": (
        lambda: Spec((4,), (ep.Dense(2),), cost="mse"), ValueError,
        ("cost ", "'mse'", "'squared_error'")),
    "an unknown pool": (
        lambda: Conv(2, 3, "mean"), ValueError, ("Conv.pool ", "'mean'", "'avg'")),
    "an unknown padding": (
        lambda: Conv(2, 3, padding="same"), ValueError, ("Conv.padding ", "'same'", "'SAME'")),
    "an unknown activation": (
        lambda: ep.Rate(activation="relu"), ValueError,
        ("Rate.activation ", "'relu'", "'hard_sigmoid'")),
    "a pool that does not divide": (
        lambda: Spec((7, 6, 1), (ep.Conv(2, 3), ep.Dense(2))), ValueError,
        ("Conv", "(7, 6, 1)", "AvgPool", "5x4")),
    "a kernel larger than its input": (
        lambda: Spec((6, 4, 1), (ep.Conv(2, 5), ep.Dense(2))), ValueError,
        ("Conv", "kernel", "(6, 4, 1)")),
    "a convolution on a vector": (
        lambda: Spec((9,), (ep.Conv(2, 3), ep.Dense(2))), ValueError,
        ("Conv", "(9,)", "(H, W, C)")),
    "a convolution above a dense layer": (
        lambda: Spec((9,), (ep.Dense(4), ep.Conv(2, 3), ep.Dense(2))), ValueError,
        ("Conv", "(4,)", "(H, W, C)")),
    "no layers": (
        lambda: Spec((4,), ()), TypeError, ("layers ", "()", "non-empty")),
    "something else as a layer": (
        lambda: Spec((4,), (3, ep.Dense(2))), TypeError, ("layers ", "3", "Dense")),
    "a read-out with no dynamics": (
        lambda: Spec((4,), (ep.Dense(2),), cost="cross_entropy"), ValueError,
        ("layers ", "one layer", "expected two", "cross_entropy")),
    "an input size of zero": (
        lambda: Spec((0, 6, 1), (ep.Dense(2),)), ValueError, ("input_shape ", "0", "at least 1")),
    "an input shape that is a number": (
        lambda: Spec(4, (ep.Dense(2),)), TypeError, ("input_shape ", "4", "tuple")),
    "a class for a neuron": (
        lambda: Spec((4,), (ep.Dense(2),), "Rate"), TypeError,
        ("neuron ", "'Rate'", "ep_jax.Rate()")),
    "no features": (
        lambda: ep.Dense(0), ValueError, ("Dense.features ", "0", "at least 1")),
    "a kernel of zero": (
        lambda: Conv(2, 0), ValueError, ("Conv.kernel ", "0", "at least 1")),
    # Pruning.
    "units to keep of another network": (
        lambda: prune(PARAMS, SPEC, KEEP[:1]), ValueError,
        ("keep ", "[('bool', (2,))]", "booleans", "[2, 4]")),
    "shares in the place of units to keep": (
        lambda: prune(PARAMS, SPEC, tuple(k / 2 for k in KEEP)), ValueError,
        ("keep ", "float64", "booleans")),
    "a layer of which nothing is kept": (
        lambda: prune(PARAMS, SPEC, (KEEP[0], ~KEEP[1])), ValueError,
        ("keep ", "no unit", "[2]", "one or more")),
    # Neurons.
    "a step size of zero": (
        lambda: ep.Rate(0.0), ValueError, ("Rate.epsilon ", "0.0", "(0, 1]")),
    "a step size above one": (
        lambda: ep.SigmaDelta(epsilon=1.5), ValueError, ("SigmaDelta.epsilon ", "1.5", "(0, 1]")),
    "no leak": (
        lambda: ep.SigmaDelta(lam=0.0), ValueError, ("SigmaDelta.lam ", "0.0", "(0, 1]")),
    "a growing step size": (
        lambda: ep.Rate(epsilon_power=-1.0), ValueError,
        ("Rate.epsilon_power ", "-1.0", "at least 0")),
    "a mean of nothing": (
        lambda: ep.SigmaDelta(average=0), ValueError, ("SigmaDelta.average ", "0", "at least 1")),
    "a quantum of zero": (
        lambda: ep.DeltaCode(quantum=0.0), ValueError, ("DeltaCode.quantum ", "0.0", "above 0")),
    "a growing quantum": (
        lambda: ep.DeltaCode(decay=1.1), ValueError, ("DeltaCode.decay ", "1.1", "(0, 1]")),
    "a negative lag": (
        lambda: ep.DeltaCode(lag=-1.0), ValueError, ("DeltaCode.lag ", "-1.0", "at least 0")),
    "an even number of levels": (
        lambda: DeltaCode(levels=4), ValueError, ("DeltaCode.levels ", "4", "odd")),
    "one level": (
        lambda: DeltaCode(levels=1), ValueError, ("DeltaCode.levels ", "1", "at least 3")),
    "a scale of zero": (
        lambda: DeltaCode(scale=0.0), ValueError, ("DeltaCode.scale ", "0.0", "above 0")),
    "a quantum that has to grow": (
        lambda: DeltaCode(shrink=1.5), ValueError, ("DeltaCode.shrink ", "1.5", "(0, 1]")),
    "a leak that is no switch": (
        lambda: DeltaCode(leak=0.1), ValueError, ("DeltaCode.leak ", "0.1", "True")),
    "a decoder elsewhere": (
        lambda: SigmaDelta(decode="x"), ValueError,
        ("SigmaDelta.decode ", "'x'", "'current', 'signal'")),
    **{
        f"an unknown surrogate of {model.__name__}": (
            lambda model=model: model(surrogate="nope"), ValueError,
            (f"{model.__name__}.surrogate ", "'nope'", "'straight_through'"))
        for model in (ep.SigmaDelta, ep.DeltaCode, ep.Bernoulli, ep.IntegrateFire)
    },
}  # fmt: skip


BATCHED: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "inputs without a batch axis": ({"xs": X}, ValueError, ("xs ", "(batch, 6, 6, 1)")),
    "inputs of integers": ({"xs": XS.astype(np.uint8)}, TypeError, ("xs ", "uint8")),
    "inputs with NaN": ({"xs": with_entry(XS, np.nan)}, ValueError, ("xs ", "NaN")),
    "an empty batch": ({"xs": XS[:0], "ys": YS[:0]}, ValueError, ("xs ", "no example")),
    "a label too large": ({"ys": YS + 1}, ValueError, ("ys ", "3", "0 .. 2")),
    "labels for another batch": ({"ys": YS[:4]}, ValueError, ("ys ", "(4,)", "(5,)")),
    "too few layers": ({"params": PARAMS[:2]}, ValueError, ("params ", "2 layers")),
    "params with NaN": (
        {"params": changed(0, "w", with_entry(PARAMS[0]["w"], np.nan))}, ValueError,
        ("params[0]['w'] ", "NaN")),
    "noise without a key": ({"spec": NOISY}, ValueError, ("key ", "None", "Bernoulli")),
}  # fmt: skip


def built_too_early(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a phase was built from wrong input")


@pytest.mark.usefixtures("nans_allowed")
@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that is missing, comes after the phases were built, or leaves the user guessing."""
    monkeypatch.setattr(jax.lax, "scan", built_too_early)
    call, error, said = CASES[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(said[0]), message
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize("of", [ep.bptt_gradient, ep.implicit_gradient, ep.diagnostics.gdu])
@pytest.mark.parametrize("name", BATCHED)
def test_every_gradient_refuses_a_bad_batch(
    name: str, of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that one of the gradients leaves out: bad inputs, targets, parameters or no key."""
    wrong, error, said = BATCHED[name]
    monkeypatch.setattr(jax.lax, "scan", built_too_early)
    with pytest.raises(error) as caught:
        gradient(of=of, **wrong)
    message = str(caught.value)
    assert message.startswith(said[0]), message
    assert [part for part in said if part not in message] == [], message


def test_right_input_is_let_through() -> None:
    """Checks that refuse what fits: labels of any integer type, lists, numpy or jax arrays."""
    labels = YS.astype(np.uint8), jnp.asarray(YS), YS.tolist()
    for ys in (*labels, np.eye(3)[YS], np.eye(3, dtype=int)[YS]):
        jax.eval_shape(lambda ys=ys: gradient(ys=ys))
    for y in (1, np.int64(1), jnp.asarray(1), np.array([0.2, 0.8, 0.0])):
        jax.eval_shape(lambda y=y: nudged(y=y, beta=jnp.asarray(-0.5)))
    jax.eval_shape(lambda: gradient(params=list(PARAMS)))


def test_shapes_are_checked_under_jit() -> None:
    """Checks that hold outside ``jit`` only, where a wrong batch would broadcast."""
    with pytest.raises(ValueError, match=r"ys has shape \(4,\)"):
        jax.jit(lambda ys: gradient(ys=ys))(YS[:4])
    with pytest.raises(ValueError, match=r"xs has shape \(6, 6, 1\)"):
        jax.jit(lambda xs: gradient(xs=xs))(X)
    with pytest.raises(TypeError, match="xs has dtype uint8"):
        jax.jit(lambda xs: gradient(xs=xs))(XS.astype(np.uint8))
