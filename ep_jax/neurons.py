"""Neuron models: pure functions that turn what a layer receives into its next state and signal.

A model is a frozen, hashable dataclass with the five methods of `Neuron`; anything that has them
can be used, from any file, and the dynamics know nothing else about it. All of them relax an analog
state ``s`` towards its equilibrium; they differ in what they tell their neighbours about it, the
*signal*, which is what is sent through the weights:

- `Rate`: the state itself.
- `SigmaDelta`: spikes, decoded by a leaky trace (O'Connor, Gavves & Welling, AISTATS 2019; the
  neuron of Lin, Bal & Sengupta, ICONS 2024).
- `DeltaCode`: spikes that tell what the receivers do not know yet, at a resolution that follows
  how much that is; a fixed point, exact in the limit.
- `Bernoulli`: random spikes whose rate is the state.
- `IntegrateFire`: spikes of a leaky membrane whose trace is the state.

The damped step itself comes from the phase, as a function ``relax(s, current, epsilon)``: it knows
input, bias, nudge and bounds, and whether ``s`` is a state or (in displacement coordinates) the
displacement of one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp

from ep_jax import spikes
from ep_jax.checks import check_choice, check_integer, check_non_negative, check_number, told

Relax: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array | float], jax.Array]


class Clock(NamedTuple):
    """Where a step stands. All but `step`, `unit` and `error` are static.

    Attributes:
        step: 0-based number of the sweep within its phase.
        steps: number of sweeps of the phase.
        before: number of sweeps of the phases before this one, those of a straggler.
        layer: 1-based number of the layer.
        unit: scale of the state in this layer and phase: 1 in the free phase and in displacement
            coordinates, ``|beta| alpha^(L - l)`` in a nudged phase in absolute coordinates.
        error: in a nudged phase the output's error ``max |dC/ds_L|`` at the free state, else 1:
            what a nudged phase codes is of the size of ``unit * error``.
        neighbours_updated: whether neighbours that this layer listens to were updated in this very
            sweep.
        nudged: whether this is a nudged phase.
        displaced: whether ``s`` is a displacement, which may have either sign.
    """

    step: jax.Array
    steps: int
    before: int
    layer: int
    unit: jax.Array | float
    error: jax.Array | float
    neighbours_updated: bool
    nudged: bool
    displaced: bool


@runtime_checkable
class Neuron(Protocol):
    """What the dynamics ask of a model. A state is a pytree whose ``s`` is the analog state.

    A model whose state makes no damped step (`IntegrateFire`) says ``damped = False``, and is not
    over-relaxed.
    """

    @property
    def stochastic(self) -> bool:
        """Whether `step` needs a random key."""
        ...

    @property
    def activation(self) -> str:
        """Name of the hidden units' activation in `ACTIVATIONS`."""
        ...

    def start(self, s: jax.Array, current: jax.Array) -> Any:
        """A state at `s` of which the neighbours are told: `current` is what all of them cause.

        Its signal is `s`. One of zero is silent; a displacement (``clock.displaced``) of zero stays
        so while the current is zero.
        """
        ...

    def step(
        self, state: Any, current: jax.Array, relax: Relax, clock: Clock, key: jax.Array | None
    ) -> tuple[Any, jax.Array | None]:
        """One update: the next state and the spikes emitted (signed counts), or ``None``.

        Args:
            state: the layer's state.
            current: the weighted signals of its neighbours, without input, bias and nudge.
            relax: ``relax(s, current, epsilon)``, the damped step of the analog state.
            clock: where this step stands.
            key: a random key where the model is stochastic.
        """
        ...

    def signal(self, state: Any) -> jax.Array:
        """What goes through the weights."""
        ...

    def readout(self, state: Any) -> jax.Array:
        """What the gradient and the answer are read from."""
        ...


class Activation(NamedTuple):
    """A monotone activation ``sigma``.

    Attributes:
        apply: ``sigma(x)``.
        difference: ``sigma(x + h) - sigma(x)`` without cancellation, exact for small ``h``.
        bounds: the interval on which ``sigma`` is the projection, ``None`` where it is none. A
            damped step projects after damping, else it damps after ``sigma``.
    """

    apply: Callable[[jax.Array], jax.Array]
    difference: Callable[[jax.Array, jax.Array], jax.Array]
    bounds: tuple[float, float] | None = None


def _clip(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0.0, 1.0)


def _clip_difference(x: jax.Array, h: jax.Array) -> jax.Array:
    s = _clip(x)  # x - s is exactly 0 inside the interval, so h is kept to its last bit there
    return jnp.clip(h + (x - s), -s, 1.0 - s)


def _tanh_difference(x: jax.Array, h: jax.Array) -> jax.Array:
    return jnp.tanh(h) * (1.0 - jnp.tanh(x) * jnp.tanh(x + h))


def _softplus_difference(x: jax.Array, h: jax.Array) -> jax.Array:
    return jnp.log1p(jax.nn.sigmoid(x) * jnp.expm1(h))


ACTIVATIONS = {
    "hard_sigmoid": Activation(_clip, _clip_difference, bounds=(0.0, 1.0)),
    "linear": Activation(lambda x: x, lambda x, h: h, bounds=(-math.inf, math.inf)),
    "sigmoid": Activation(jax.nn.sigmoid, lambda x, h: 0.5 * _tanh_difference(0.5 * x, 0.5 * h)),
    "tanh": Activation(jnp.tanh, _tanh_difference),
    "softplus": Activation(jax.nn.softplus, _softplus_difference),
}
"""Activations by name: ``hard_sigmoid`` is ``clip(x, 0, 1)``, ``sigmoid`` the logistic function."""


def relax(
    activation: Activation, s: jax.Array, drive: jax.Array, epsilon: jax.Array | float
) -> jax.Array:
    """One damped step of ``s`` towards ``sigma(drive)``; ``epsilon = 1`` goes all the way.

    Projections (``hard_sigmoid``, ``linear``): ``sigma((1 - epsilon) s + epsilon drive)``, the
    projected gradient step on the energy; smooth ones: ``(1 - epsilon) s + epsilon sigma(drive)``.
    """
    if activation.bounds is not None:
        return activation.apply(_towards(s, drive, epsilon))
    return _towards(s, activation.apply(drive), epsilon)


def _towards(old: jax.Array, new: jax.Array, epsilon: jax.Array | float) -> jax.Array:
    """``(1 - epsilon) old + epsilon new``; a full step does not read `old`."""
    full = isinstance(epsilon, float) and epsilon == 1.0
    return new if full else old + epsilon * (new - old)


def relax_displacement(
    activation: Activation,
    base_drive: jax.Array,
    d: jax.Array,
    drive: jax.Array,
    unit: jax.Array | float,
    epsilon: jax.Array | float,
) -> jax.Array:
    """`relax` of ``s = s0 + unit * d`` written for ``d``, where ``s0 = sigma(base_drive)`` rests.

    It is written in units of `unit`: no small difference of large numbers is formed and nothing
    underflows, so it is exact at any `unit`, in any precision. For a projection on ``[lo, hi]`` it
    is ``clip((1 - epsilon) d + epsilon drive + epsilon (base_drive - s0) / unit, (lo - s0) / unit,
    (hi - s0) / unit)``.

    Args:
        activation: the activation.
        base_drive: what drove the unit to ``s0``.
        d: the displacement, in units of `unit`.
        drive: the displacement of the drive, in units of `unit`.
        unit: ``beta alpha^(L - l)``, of either sign.
        epsilon: the damping, or over-relaxation.
    """
    if activation.bounds is None:
        return _towards(d, activation.difference(base_drive, unit * drive) / unit, epsilon)
    moved = _towards(d, drive, epsilon)
    if not all(map(math.isfinite, activation.bounds)):
        return moved
    base = activation.apply(base_drive)
    large = float(jnp.finfo(base.dtype).max) / 4
    per_unit = jnp.clip(1.0 / jnp.asarray(unit, base.dtype), -large, large)  # one division for all
    ends = [(end - base) * per_unit for end in activation.bounds]
    beyond = epsilon * (base_drive - base) * per_unit  # exactly 0 inside the interval
    return jnp.clip(moved + beyond, jnp.minimum(*ends), jnp.maximum(*ends))


def _power_law(value: float, power: float, floor: float, t: jax.Array) -> jax.Array | float:
    """``max(value / t^power, floor)`` for ``t = 1., 2., ...``; constant where ``power`` is 0."""
    if power == 0.0:
        return max(value, floor)
    return jnp.maximum(value * t**-power, floor)


def _running_mean(mean: jax.Array, s: jax.Array, clock: Clock, window: int) -> jax.Array:
    """The mean of ``s`` over the sweeps of the phase's last `window` that are over; else ``s``."""
    over = jnp.maximum(clock.step - (clock.steps - min(window, clock.steps)), 0)
    return jnp.where(over > 0, mean + (s - mean) / (over.astype(s.dtype) + 1), s)


class RateState(NamedTuple):
    """State of a `Rate` layer: the activity ``s``."""

    s: jax.Array


@dataclass(frozen=True)
class Rate:
    """Rate neurons: the signal is the state (Ernoult et al., NeurIPS 2019).

    ``s <- clip((1 - eps_t) s + eps_t (I(s) + b - beta dC/ds), 0, 1)``, with
    ``eps_t = epsilon / t^epsilon_power``.

    Attributes:
        epsilon: step size in (0, 1]; at 1 the relaxation is a plain fixed-point iteration.
        activation: ``"hard_sigmoid"``, ``"sigmoid"`` (logistic), ``"tanh"``, ``"softplus"`` or
            ``"linear"``.
        epsilon_power: exponent of the decay of the step size; 0 keeps it constant.

    Example:
        >>> Rate(activation="tanh").epsilon
        1.0
    """

    epsilon: float = 1.0
    activation: str = "hard_sigmoid"
    epsilon_power: float = 0.0
    stochastic = False

    def __post_init__(self) -> None:
        check_number("Rate.epsilon", self.epsilon, above=0.0, at_most=1.0)
        check_choice("Rate.activation", self.activation, ACTIVATIONS)
        check_non_negative("Rate.epsilon_power", self.epsilon_power)

    def start(self, s: jax.Array, current: jax.Array) -> RateState:
        """See `Neuron`."""
        del current
        return RateState(s)

    def step(
        self,
        state: RateState,
        current: jax.Array,
        relax: Relax,
        clock: Clock,
        key: jax.Array | None,
    ) -> tuple[RateState, None]:
        """See `Neuron`."""
        del key
        epsilon = _power_law(
            self.epsilon, self.epsilon_power, 0.0, clock.step.astype(state.s.real.dtype) + 1
        )
        return RateState(relax(state.s, current, epsilon)), None

    def signal(self, state: RateState) -> jax.Array:
        """See `Neuron`."""
        return state.s

    def readout(self, state: RateState) -> jax.Array:
        """See `Neuron`."""
        return state.s


class SigmaDeltaState(NamedTuple):
    """State of a `SigmaDelta` layer.

    Attributes:
        s: analog state.
        error: what the quantiser has not sent yet, ``phi`` in [-1/2, 1/2].
        spikes: the last spikes, ``q``; at the start of a phase the analog signal they stand for.
        trace: the decoded current, ``u``; where signals are decoded, the layer's decoded signal.
        mean: running average of ``s`` over the last steps of the phase.
    """

    s: jax.Array
    error: jax.Array
    spikes: jax.Array
    trace: jax.Array
    mean: jax.Array


@dataclass(frozen=True)
class SigmaDelta:
    """Sigma-delta neurons with predictive coding, the paper's model (open loop).

    Sources: O'Connor, Gavves & Welling, *Training a Spiking Neural Network with Equilibrium
    Propagation* (AISTATS 2019); Lin, Bal & Sengupta (ICONS 2024). Per step, with spikes ``q`` of
    the neighbours::

        u = (1 - lam) u + lam I(q)                          decoder, on the weighted sum of spikes
        s' = clip((1 - eps) s + eps (u + b + nudge), 0, 1)
        a = (s' - (1 - lam) s) / lam                        predictive encoder, inverts the decoder
        q = 1[phi + a > 1/2],  phi = phi + a - q            sigma-delta quantiser

    The decoded signal differs from ``s`` by at most about ``lam``. The read-out is the average of
    ``s`` over the last `average` steps. ``lam_t = max(lam / t^lam_power, lam_floor)`` with ``t``
    counted from 1, on through the nudged phase; a power of 0 keeps it constant. Encoder and decoder
    use the ``lam_t`` of the sweep in which a spike was sent (in an ordered sweep with a decaying
    schedule, where a layer hears new spikes from one side and old ones from the other, of the new).

    The decoder is linear, so it may as well sit before the weights (``decode="signal"``): the same
    numbers for every affine layer. Max pooling is not: after the decoder it sees traces, before it
    single spikes.

    In displacement coordinates, where values have either sign, the quantiser is a signed one with
    steps of `nudged_quantum`.

    Attributes:
        epsilon: step size of the free phase in (0, 1].
        epsilon_power: exponent of its decay.
        epsilon_floor: its lower bound.
        lam: leak of encoder and decoder in (0, 1].
        lam_power: exponent of its decay.
        lam_floor: its lower bound, which sets the noise floor.
        nudged_epsilon: step size of the nudged phase.
        nudged_quantum: quantum of the signed code in displacement coordinates, in units of the
            output's error.
        average: number of last steps the read-out averages.
        decode: where the decoder sits: on the weighted ``"current"`` (the paper's), or on the
            ``"signal"`` before weights and pool.
        surrogate: derivative of the quantiser in reverse mode (`ep_jax.spikes`): EP needs none.

    Example:
        >>> SigmaDelta(lam=0.275, lam_power=0.0, epsilon=0.1, epsilon_power=0.0).lam
        0.275
    """

    epsilon: float = 1.0
    epsilon_power: float = 0.2
    epsilon_floor: float = 0.6
    lam: float = 0.9
    lam_power: float = 0.9
    lam_floor: float = 0.1
    nudged_epsilon: float = 1.0
    nudged_quantum: float = 0.1
    average: int = 12
    decode: Literal["current", "signal"] = "current"
    surrogate: str = "straight_through"
    activation = "hard_sigmoid"
    stochastic = False

    def __post_init__(self) -> None:
        for name in ("epsilon", "lam", "nudged_epsilon"):
            check_number(f"SigmaDelta.{name}", getattr(self, name), above=0.0, at_most=1.0)
        for name in ("epsilon_power", "lam_power"):
            check_non_negative(f"SigmaDelta.{name}", getattr(self, name))
        for name in ("epsilon_floor", "lam_floor"):
            check_non_negative(f"SigmaDelta.{name}", getattr(self, name), at_most=1.0)
        check_number("SigmaDelta.nudged_quantum", self.nudged_quantum, above=0.0)
        check_integer("SigmaDelta.average", self.average, at_least=1)
        check_choice("SigmaDelta.decode", self.decode, ("current", "signal"))
        check_choice("SigmaDelta.surrogate", self.surrogate, spikes.SURROGATES)

    def leak(self, t: jax.Array) -> jax.Array | float:
        """``lam_t`` of the sweep number `t`, counted from 1 at the start of the free phase."""
        return _power_law(self.lam, self.lam_power, self.lam_floor, t)

    def start(self, s: jax.Array, current: jax.Array) -> SigmaDeltaState:
        """See `Neuron`."""
        nothing = jnp.zeros_like(s)
        trace = current if self.decode == "current" else s
        return SigmaDeltaState(s, error=nothing, spikes=s, trace=trace, mean=s)

    def step(
        self,
        state: SigmaDeltaState,
        current: jax.Array,
        relax: Relax,
        clock: Clock,
        key: jax.Array | None,
    ) -> tuple[SigmaDeltaState, jax.Array]:
        """See `Neuron`."""
        del key
        now = (clock.before + clock.step).astype(state.s.dtype) + 1
        sent = self.leak(now)
        heard = sent if clock.neighbours_updated else self.leak(jnp.maximum(now - 1, 1.0))
        trace, decoded = state.trace, current
        if self.decode == "current":
            trace = decoded = trace + heard * (current - trace)
        if clock.nudged:
            epsilon: jax.Array | float = self.nudged_epsilon
        else:
            epsilon = _power_law(self.epsilon, self.epsilon_power, self.epsilon_floor, now)
        s = relax(state.s, decoded, epsilon)
        value = state.error + (s - (1.0 - sent) * state.s) / sent
        quantum = self.nudged_quantum * clock.error if clock.displaced else 1.0
        quantise = spikes.rounded if clock.displaced else spikes.binary
        count = quantise(value / quantum, self.surrogate)
        error = jnp.clip(value - quantum * count, -0.5 * quantum, 0.5 * quantum)
        emitted = quantum * count
        if self.decode == "signal":
            trace = trace + sent * (emitted - trace)
        mean = _running_mean(state.mean, s, clock, self.average)
        return SigmaDeltaState(s, error, emitted, trace, mean), count

    def signal(self, state: SigmaDeltaState) -> jax.Array:
        """See `Neuron`."""
        return state.spikes if self.decode == "current" else state.trace

    def readout(self, state: SigmaDeltaState) -> jax.Array:
        """See `Neuron`."""
        return state.mean


class DeltaCodeState(NamedTuple):
    """State of a `DeltaCode` layer.

    Attributes:
        s: analog state.
        known: what its receivers know of it, ``r``.
        quantum: the last quantum ``delta``, a scalar; 0 before the first.
    """

    s: jax.Array
    known: jax.Array
    quantum: jax.Array


_SIGNED = {"scale": 0.8, "shrink": 0.5}
_BINARY = {"scale": 2.0, "shrink": 0.85}
"""How a quantum scales itself where nothing is said."""
_SCHEDULE = {
    "quantum": 0.7,
    "decay": 0.6,
    "lag": 1.0,
    "nudged_quantum": 0.5,
    "nudged_decay": 0.5,
}
"""A schedule's settings where only some of them are given."""


@dataclass(frozen=True)
class DeltaCode:
    """Closed-loop delta code whose quantum follows what is left to tell, or a schedule.

    A neuron keeps what its receivers know of it, ``r``, and spikes for what they do not, the gap::

        s' = clip(I(r) + b + nudge, 0, 1)
        q = clip(round((s' - r) / delta_t), -m, m),   r' = r + delta_t q

    Receivers hold ``I(r)``, to which a spike adds its weight times ``delta_t``. With ``2 m + 1``
    levels a message is of up to ``m`` unit spikes; three levels are a ternary code.

    **The quantum scales itself** (the default)::

        delta_t = max(scale * sqrt(sum gap^4 / sum gap^2), shrink * delta_{t-1})

    over the units of a layer, for each example: the root mean square gap, weighted by its energy.
    (The largest gap is set by one outlier; the plain mean square is far too small, since most gaps
    are zero.) It is refined as fast as the state settles and no faster, in both phases alike. On a
    chip it takes two sums over a layer, which neurons with a gap contribute to, and one broadcast a
    sweep. A `scale` of 2 or more can leave all gaps below half a quantum, and no one spikes.

    **A schedule** (any of `quantum`, `decay`, `lag`, `nudged_quantum`, `nudged_decay` is given)
    refines by a global clock, ``quantum * decay^max(0, t - lag * (l - 1))`` in the free phase:
    deeper layers refine later, since they move later. In the nudged phase it is ``e nudged_quantum
    * nudged_decay^t`` in displacement coordinates, with ``e = max |dC/ds_L|`` the error of the
    output (one number an example, broadcast), and that times ``|beta| alpha^(L - l)`` in absolute
    ones. It needs no sums. But a clock that refines faster than an example settles leaves it behind
    for good: the code freezes away from the fixed point, and only `PhaseInfo.residual` tells.

    **With `leak`** the code is a binary one, the sigma-delta neuron with a closed loop: receivers
    forget, ``q = 1[(s' - (1 - l_t) r) / delta_t > 1/2]``, ``r' = (1 - l_t) r + delta_t q``, where
    the leak ``l_t`` is the quantum, at most 1 (of a schedule's nudged phase: without ``e``). It is
    `SigmaDelta` but for one factor: what a neuron has not sent, ``phi = (s - r) / l``, leaks with
    the trace, ``phi' = (1 - l) phi + a - q``, so it always is what the receivers do not know, even
    while the leak changes. A spike raises ``r`` by at most the leak, and silence lowers it by the
    leak times ``r``, so a leak that follows the gap is larger than it, and shrinks slowly: `scale`
    and `shrink` are 2 and .85 by default. Their values are those of the free phase. A displacement
    has either sign, so its code is signed and as without leak, whose defaults it takes.

    Attributes:
        quantum: first quantum of a scheduled free phase.
        decay: its factor a step.
        lag: steps by which each layer starts to refine after the one below.
        nudged_quantum: first quantum of a scheduled nudged phase, in units of the output's error.
        nudged_decay: its factor a step.
        leak: whether ``r`` leaks (binary code) or not.
        surrogate: derivative of the quantiser in reverse mode (`ep_jax.spikes`): EP needs none.
        levels: number of values of a message, odd: 3 is ternary, 5 is ``-2 ... 2``. By default 5,
            with a schedule 3. A binary code (`leak`) has them for displacements alone.
        scale: the quantum over the energy-weighted gap, by default .8, with leak 2.
        shrink: the quantum becomes at most so much smaller in a sweep, by default .5, with leak
            .85.

    Example:
        >>> DeltaCode().levels, DeltaCode(decay=0.8).levels, DeltaCode(decay=0.8).quantum
        (5, 3, 0.7)
        >>> DeltaCode().scale, DeltaCode(leak=True).scale
        (0.8, 2.0)
    """

    quantum: float | None = None
    decay: float | None = None
    lag: float | None = None
    nudged_quantum: float | None = None
    nudged_decay: float | None = None
    leak: bool = False
    surrogate: str = "straight_through"
    levels: int | None = None
    scale: float | None = None
    shrink: float | None = None
    activation = "hard_sigmoid"
    stochastic = False

    def __post_init__(self) -> None:
        if self.scheduled:
            for name, default in _SCHEDULE.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, default)
            for name in ("quantum", "nudged_quantum"):
                check_number(f"DeltaCode.{name}", getattr(self, name), above=0.0)
            for name in ("decay", "nudged_decay"):
                check_number(f"DeltaCode.{name}", getattr(self, name), above=0.0, at_most=1.0)
            check_non_negative("DeltaCode.lag", self.lag)
        if self.levels is None:
            object.__setattr__(self, "levels", 3 if self.scheduled else 5)
        check_integer("DeltaCode.levels", self.levels, at_least=3)
        if self.levels is not None and self.levels % 2 == 0:
            raise ValueError(f"DeltaCode.levels is {self.levels}; expected an odd number: as many "
                             "positive as negative ones, and zero")  # fmt: skip
        check_choice("DeltaCode.leak", self.leak, (True, False))
        for name, default in (_BINARY if self.leak else _SIGNED).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_number("DeltaCode.scale", self.scale, above=0.0)
        check_number("DeltaCode.shrink", self.shrink, above=0.0, at_most=1.0)
        if self.leak and self.scheduled:  # the quantum is the leak as well
            check_number("DeltaCode.quantum", self.quantum, above=0.0, at_most=1.0)
        check_choice("DeltaCode.surrogate", self.surrogate, spikes.SURROGATES)

    @property
    def scheduled(self) -> bool:
        """Whether the quantum follows a schedule."""
        return any(getattr(self, name) is not None for name in _SCHEDULE)

    def _scaling(self, displaced: bool) -> tuple[float, float]:
        """`scale` and `shrink`; of a binary code's displacements those of a signed one."""
        if self.leak and displaced:
            return _SIGNED["scale"], _SIGNED["shrink"]
        assert self.scale is not None
        assert self.shrink is not None
        return self.scale, self.shrink

    def resolution(
        self, clock: Clock, gap: jax.Array, before: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The quantum ``delta_t`` and the leak ``l_t`` (where there is one) of a step.

        Args:
            clock: where the step stands.
            gap: what the receivers do not know, before they forget.
            before: the last quantum.
        """
        one = jnp.asarray(clock.unit * clock.error, gap.dtype)  # the size of what is coded
        floor = jnp.finfo(gap.dtype).eps * one  # a finer spike has no effect
        if not self.scheduled:
            gap = jax.lax.stop_gradient(gap) * (1.0 / one)
            squares = gap * gap
            energy = jnp.sum(squares)
            size = jnp.sqrt(jnp.sum(squares * squares) / jnp.where(energy > 0, energy, 1.0))
            scale, shrink = self._scaling(clock.displaced)
            delta = jnp.maximum(scale * one * size, shrink * before)
            if self.leak and not clock.displaced:
                delta = jnp.minimum(delta, 1.0)
            delta = jnp.maximum(delta, floor)
            return delta, jnp.minimum(delta, 1.0)
        assert self.quantum is not None
        assert self.decay is not None
        assert self.lag is not None
        assert self.nudged_quantum is not None
        assert self.nudged_decay is not None
        t = clock.step.astype(gap.dtype)
        if clock.nudged:
            leak = clock.unit * self.nudged_quantum * self.nudged_decay**t
            return jnp.maximum(clock.error * leak, floor), leak
        delta = self.quantum * self.decay ** jnp.maximum(t - self.lag * (clock.layer - 1), 0.0)
        return jnp.maximum(delta, floor), delta

    def start(self, s: jax.Array, current: jax.Array) -> DeltaCodeState:
        """See `Neuron`."""
        del current
        return DeltaCodeState(s, s, jnp.zeros((), s.dtype))

    def step(
        self,
        state: DeltaCodeState,
        current: jax.Array,
        relax: Relax,
        clock: Clock,
        key: jax.Array | None,
    ) -> tuple[DeltaCodeState, jax.Array]:
        """See `Neuron`."""
        del key
        s = relax(state.s, current, 1.0)
        delta, leak = self.resolution(clock, s - state.known, state.quantum)
        kept = (1.0 - leak) * state.known if self.leak else state.known
        value = (s - kept) * (1.0 / delta)  # one division for all units
        if self.leak and not clock.displaced:
            count = spikes.binary(value, self.surrogate)
        else:
            assert self.levels is not None
            count = spikes.graded(self.levels // 2)(value, self.surrogate)
        return DeltaCodeState(s, kept + delta * count, delta), count

    def signal(self, state: DeltaCodeState) -> jax.Array:
        """See `Neuron`."""
        return state.known

    def readout(self, state: DeltaCodeState) -> jax.Array:
        """See `Neuron`."""
        return state.s


class BernoulliState(NamedTuple):
    """State of a `Bernoulli` layer: analog state ``s``, last spikes, running average of ``s``."""

    s: jax.Array
    spikes: jax.Array
    mean: jax.Array


@dataclass(frozen=True)
class Bernoulli:
    """Stochastic neurons: a unit of state ``s`` spikes with probability ``s`` at every step.

    ``s' = clip((1 - eps_t) s + eps_t (I(q) + b + nudge), 0, 1)``, ``q ~ Bernoulli(s')``, with
    ``eps_t = max(epsilon / t^epsilon_power, epsilon_floor)`` counted on through the nudged phase,
    so that the noise averages out. The phases at plus and minus beta draw the same random numbers.
    As in stochastic EP (arXiv:2511.11320). In displacement coordinates, where values have either
    sign, the spikes are the state rounded at random to a multiple of `nudged_quantum`.

    Attributes:
        epsilon: first step size in (0, 1].
        epsilon_power: exponent of its decay.
        epsilon_floor: its lower bound.
        nudged_quantum: quantum of the signed code in displacement coordinates, in units of the
            output's error.
        average: number of last steps the read-out averages.
        surrogate: derivative of the quantiser in reverse mode (`ep_jax.spikes`): EP needs none.

    Example:
        >>> Bernoulli().stochastic
        True
    """

    epsilon: float = 1.0
    epsilon_power: float = 0.7
    epsilon_floor: float = 0.02
    nudged_quantum: float = 0.1
    average: int = 20
    surrogate: str = "straight_through"
    activation = "hard_sigmoid"
    stochastic = True

    def __post_init__(self) -> None:
        check_number("Bernoulli.epsilon", self.epsilon, above=0.0, at_most=1.0)
        check_non_negative("Bernoulli.epsilon_power", self.epsilon_power)
        check_non_negative("Bernoulli.epsilon_floor", self.epsilon_floor, at_most=1.0)
        check_number("Bernoulli.nudged_quantum", self.nudged_quantum, above=0.0)
        check_integer("Bernoulli.average", self.average, at_least=1)
        check_choice("Bernoulli.surrogate", self.surrogate, spikes.SURROGATES)

    def start(self, s: jax.Array, current: jax.Array) -> BernoulliState:
        """See `Neuron`."""
        del current
        return BernoulliState(s, s, s)

    def step(
        self,
        state: BernoulliState,
        current: jax.Array,
        relax: Relax,
        clock: Clock,
        key: jax.Array | None,
    ) -> tuple[BernoulliState, jax.Array]:
        """See `Neuron`."""
        if key is None:
            raise ValueError("key is None; expected a random key for Bernoulli neurons")
        now = (clock.before + clock.step).astype(state.s.dtype) + 1
        s = relax(
            state.s, current, _power_law(self.epsilon, self.epsilon_power, self.epsilon_floor, now)
        )
        quantum = self.nudged_quantum * clock.error if clock.displaced else 1.0
        uniform = jax.random.uniform(key, s.shape, s.dtype)
        quantise = spikes.floored if clock.displaced else spikes.bernoulli
        count = quantise(s / quantum + uniform, self.surrogate)
        mean = _running_mean(state.mean, s, clock, self.average)
        return BernoulliState(s, quantum * count, mean), count

    def signal(self, state: BernoulliState) -> jax.Array:
        """See `Neuron`."""
        return state.spikes

    def readout(self, state: BernoulliState) -> jax.Array:
        """See `Neuron`."""
        return state.mean


class IntegrateFireState(NamedTuple):
    """State of an `IntegrateFire` layer.

    Attributes:
        s: the trace of the spikes, ``A / N``.
        membrane: potential ``V``.
        total: ``A``, the leaky sum of the spikes.
        steps: ``N``, the leaky number of steps; a scalar.
        spikes: the last spikes; at the start of a phase the analog signal they stand for.
        mean: running average of ``s`` over the last steps of the phase.
    """

    s: jax.Array
    membrane: jax.Array
    total: jax.Array
    steps: jax.Array
    spikes: jax.Array
    mean: jax.Array


@dataclass(frozen=True)
class IntegrateFire:
    """Leaky integrate-and-fire neurons with a reset by subtraction and a trace.

    With ``d = clip(I(q) + b + nudge, 0, 1)`` and threshold 1::

        V = leak V + d,   q = 1[V >= 1],   V = V - q
        A = leak A + q,   N = leak N + 1,  s = A / N

    Membrane and trace leak alike, so ``s`` differs from the leaky average of ``d`` by ``V / N``
    alone: at equilibrium ``s = clip(I(s) + b + nudge, 0, 1)`` up to ``1 - leak``. It needs some
    times ``1 / (1 - leak)`` steps. A spike train is never negative, so an output unit is bounded,
    too. In displacement coordinates, where values have either sign, the neuron sends signed spikes
    of `nudged_quantum`.

    Attributes:
        leak: factor on membrane and trace a step, in (0, 1].
        nudged_quantum: quantum of the signed code in displacement coordinates, in units of the
            output's error.
        average: number of last steps the read-out averages.
        surrogate: derivative of the quantiser in reverse mode (`ep_jax.spikes`): EP needs none.

    Example:
        >>> IntegrateFire(leak=0.98).average
        20
    """

    leak: float = 0.97
    nudged_quantum: float = 0.1
    average: int = 20
    surrogate: str = "straight_through"
    activation = "hard_sigmoid"
    stochastic = False
    damped = False  # its state is a trace of spikes and makes no step, so nothing to over-relax

    def __post_init__(self) -> None:
        check_number("IntegrateFire.leak", self.leak, above=0.0, at_most=1.0)
        check_number("IntegrateFire.nudged_quantum", self.nudged_quantum, above=0.0)
        check_integer("IntegrateFire.average", self.average, at_least=1)
        check_choice("IntegrateFire.surrogate", self.surrogate, spikes.SURROGATES)

    def start(self, s: jax.Array, current: jax.Array) -> IntegrateFireState:
        """See `Neuron`."""
        del current
        return IntegrateFireState(
            s, membrane=jnp.zeros_like(s), total=s, steps=jnp.ones((), s.dtype), spikes=s, mean=s
        )

    def step(
        self,
        state: IntegrateFireState,
        current: jax.Array,
        relax: Relax,
        clock: Clock,
        key: jax.Array | None,
    ) -> tuple[IntegrateFireState, jax.Array]:
        """See `Neuron`."""
        del key
        quantum = self.nudged_quantum * clock.error if clock.displaced else 1.0
        membrane = self.leak * state.membrane + relax(state.s, current, 1.0)
        fire = spikes.rounded if clock.displaced else spikes.fire
        number = fire(membrane / quantum, self.surrogate)
        # An output unit is not clipped, and cannot tell what is beyond its range.
        left = jnp.clip(membrane - quantum * number, -quantum, quantum)
        total = self.leak * state.total + quantum * number
        steps = self.leak * state.steps + 1.0
        s = total / steps
        mean = _running_mean(state.mean, s, clock, self.average)
        return IntegrateFireState(s, left, total, steps, quantum * number, mean), number

    def signal(self, state: IntegrateFireState) -> jax.Array:
        """See `Neuron`."""
        return state.spikes

    def readout(self, state: IntegrateFireState) -> jax.Array:
        """See `Neuron`."""
        return state.mean


def first_step(neuron: Neuron, state: Any, current: jax.Array, key: jax.Array | None) -> Any:
    """A model's first step in a free phase, for what is asked of it without a network."""

    def damped(s: jax.Array, current: jax.Array, epsilon: jax.Array | float) -> jax.Array:
        return s + epsilon * (current - s)

    clock = Clock(jnp.zeros((), jnp.int32), 2, 0, 1, 1.0, 1.0, False, False, False)
    return neuron.step(state, current, damped, clock, key)


@functools.lru_cache(maxsize=256)
def check_neuron(neuron: Neuron) -> None:
    """Raise where a model's methods do not fit each other, as traced on a layer of three units.

    Raises:
        TypeError: a method fails, or returns something else than `Neuron` says.
    """
    s = jax.ShapeDtypeStruct((3,), jnp.result_type(float))
    key = jax.eval_shape(jax.random.key, 0) if neuron.stochastic else None

    def traced(method: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return jax.eval_shape(function, *arguments)
        except Exception as error:  # whatever a user's code may do
            raise TypeError(f"neuron.{method} of {neuron!r} fails on a layer of three units: "
                            f"{type(error).__name__}: {error}") from error  # fmt: skip

    def check(method: str, what: str, found: Any, expected: Any) -> None:
        if _form(found) != _form(expected):
            raise TypeError(f"neuron.{method} of {neuron!r} returns {what}{told(found)} on a "
                            f"layer of three units; expected {told(expected)}")  # fmt: skip

    state = traced("start", neuron.start, s, s)
    if not hasattr(state, "s"):
        raise TypeError(f"neuron.start of {neuron!r} returns {told(state)}; expected a state with "
                        "a field s, the analog state")  # fmt: skip
    check("start", "a state whose s is ", state.s, s)
    stepped = traced("step", functools.partial(first_step, neuron), state, s, key)
    if not isinstance(stepped, tuple) or len(stepped) != 2:
        raise TypeError(f"neuron.step of {neuron!r} returns {told(stepped)}; expected the next "
                        "state and the spikes, or None where there are none")  # fmt: skip
    check("step", "a state of ", stepped[0], state)
    if stepped[1] is not None and getattr(stepped[1], "shape", None) != s.shape:
        raise TypeError(f"neuron.step of {neuron!r} returns spikes of {told(stepped[1])} on a "
                        f"layer of three units; expected {told(s)}")  # fmt: skip
    check("signal", "", traced("signal", neuron.signal, state), s)
    check("readout", "", traced("readout", neuron.readout, state), s)


def _form(tree: Any) -> Any:
    """What must be the same of two trees of arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
