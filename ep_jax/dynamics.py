"""The phases: relaxation of the state, free and nudged, one ``lax.scan`` each.

A sweep updates every layer once. In what order it does so changes how fast the state settles, not
where: ``synchronous`` updates all layers from the same old signals, ``alternating`` every other
layer and then the rest, ``ordered`` one after the other, bottom-up in the free phase (as the input
travels) and top-down in the nudged one (as the error does). Each sweep computes the drive and the
adjoint of each layer once, so all cost the same.

The nudged phase exists in two coordinates with one fixed point. In *absolute* coordinates the state
itself relaxes under the nudge ``-beta dC/ds_L``. In *displacement* coordinates its displacement
relaxes, in units in which it is of order one in every layer::

    s_l = s0_l + beta_l D_l,   beta_l = beta alpha^(L - l)
    J_l = alpha A'_l(D_{l-1}) + A_{l+1}^T(D_{l+1}),   J_L = alpha A'_L(D_{L-1}) - dC/ds_L
    D_l = [sigma(I0_l + beta_l J_l) - sigma(I0_l)] / beta_l

with ``I0`` the currents of the free state, ``s0 = sigma(I0)`` and ``A'`` the drive without bias.
All maps between layers are affine, so this is exact at any beta; no small difference of large
numbers is formed, so it is exact in any precision. (A max pool is affine but for its winners; its
exact differences are in `ep_jax.network`.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ep_jax import network
from ep_jax.checks import check_choice, check_float_array, check_integer, check_number, known
from ep_jax.costs import cost_gradient, targets
from ep_jax.network import Links, NetworkSpec, Params, State, is_linear
from ep_jax.neurons import ACTIVATIONS, Activation, Clock, Relax, relax, relax_displacement

ESTIMATORS = ("one_sided", "random_sign", "symmetric", "holomorphic")
SWEEPS = ("synchronous", "alternating", "ordered")
COORDINATES = ("absolute", "displacement")
SIGNALS = ("full", "bfloat16")

MOVING = 1e-3
"""A unit counts as moving when a sweep changes it by more than this."""


@dataclass(frozen=True)
class Phases:
    """How the network is relaxed and how its gradient is estimated. Static under ``jit``.

    Attributes:
        free: sweeps of the free phase.
        nudged: sweeps of the nudged phase.
        beta: nudging strength, not 0.
        estimator: ``"one_sided"`` (free against beta), ``"random_sign"`` (free against plus or
            minus beta, drawn for each example), ``"symmetric"`` (plus against minus beta) or
            ``"holomorphic"`` (`points` complex betas on a circle; smooth activations only).
        sweep: ``"synchronous"``, ``"alternating"`` or ``"ordered"``.
        coordinates: ``"absolute"`` or ``"displacement"``, of the nudged phase.
        points: number of points of the holomorphic estimator.
        nudged_signals: ``"full"``, or ``"bfloat16"``: what goes through the weights in the nudged
            phase is rounded to 8 significant bits; states and sums keep their precision. A
            displacement can bear that. A free state cannot: the output's error, to which all that
            is learned is proportional, is a small difference.

    Example:
        >>> Phases(free=12, nudged=8, sweep="alternating", coordinates="displacement").beta
        0.1
    """

    free: int = 100
    nudged: int = 30
    beta: float = 0.1
    estimator: Literal["one_sided", "random_sign", "symmetric", "holomorphic"] = "symmetric"
    sweep: Literal["synchronous", "alternating", "ordered"] = "synchronous"
    coordinates: Literal["absolute", "displacement"] = "absolute"
    points: int = 4
    nudged_signals: Literal["full", "bfloat16"] = "full"

    def __post_init__(self) -> None:
        check_integer("Phases.free", self.free, at_least=1)
        check_integer("Phases.nudged", self.nudged, at_least=1)
        check_beta("Phases.beta", self.beta)
        check_choice("Phases.estimator", self.estimator, ESTIMATORS)
        check_choice("Phases.sweep", self.sweep, SWEEPS)
        check_choice("Phases.coordinates", self.coordinates, COORDINATES)
        check_integer("Phases.points", self.points, at_least=2)
        check_choice("Phases.nudged_signals", self.nudged_signals, SIGNALS)
        if self.estimator == "holomorphic" and self.nudged_signals != "full":
            raise ValueError(f"Phases.nudged_signals is {self.nudged_signals!r}; expected 'full' "
                             "with estimator='holomorphic', whose signals are complex")  # fmt: skip


class Snapshot(NamedTuple):
    """What a `trace` function sees after each sweep, in logical layout.

    Attributes:
        step: 0-based number of the sweep.
        state: tuple over layers of the analog states (in displacement coordinates: of ``D``).
        spikes: tuple over layers of the spikes emitted in this sweep; zeros for rate neurons.
        signals: tuple over layers of what goes through the weights.
        residual: ``|s_{t+1} - s_t|`` of this sweep.
    """

    step: jax.Array
    state: State
    spikes: State
    signals: State
    residual: jax.Array


Trace: TypeAlias = Callable[[Snapshot], Any]


class PhaseInfo(NamedTuple):
    """What a phase tells about itself.

    Attributes:
        residual: ``|s_{t+1} - s_t|`` over all layers, of the last sweep.
        moving: fraction of units that the last sweep changed by more than `MOVING`.
        spikes: tuple over layers of the spikes per neuron in the whole phase (0 for rate neurons).
        activity: tuple over layers of the mean ``|s|`` at the end (displacement coordinates:
            ``|D|``). Near 0 a layer is dead, at 1 a hard sigmoid is saturated; it is not finite
            where the state is not.
        trace: what the `trace` function returned, stacked over sweeps; ``None`` without one.
    """

    residual: jax.Array
    moving: jax.Array
    spikes: tuple[jax.Array, ...]
    activity: tuple[jax.Array, ...]
    trace: Any = None


def check_beta(name: str, beta: Any) -> None:
    """Raise where `beta` is known and no finite number other than 0."""
    if not known(beta):
        return
    beta = beta.item() if hasattr(beta, "item") and getattr(beta, "ndim", 1) == 0 else beta
    check_number(name, beta)
    if beta == 0:
        raise ValueError(f"{name} is 0; expected a nudging strength other than 0")


def check_phases(spec: NetworkSpec, phases: Phases, key: jax.Array | None) -> None:
    """Raise where `phases` or `key` do not suit `spec`."""
    if not isinstance(phases, Phases):
        raise TypeError(f"phases is {phases!r}; expected ep_jax.Phases")
    if phases.estimator == "holomorphic" and not is_holomorphic(spec):
        raise ValueError(f"estimator is 'holomorphic', but the network has {spec.neuron} or a max "
                         "pool, which are not smooth; expected Rate neurons with activation "
                         "'sigmoid', 'tanh', 'softplus' or 'linear' and no max pool")  # fmt: skip
    if key is None and spec.neuron.stochastic:
        raise ValueError(f"key is None; expected a random key for {spec.neuron}")


def is_holomorphic(spec: NetworkSpec) -> bool:
    """Whether the relaxation is a holomorphic function of its state."""
    return spec.neuron.activation != "hard_sigmoid" and all(map(is_linear, spec.layers))


def sweep_order(sweep: str, depth: int, nudged: bool) -> tuple[int, ...]:
    """The order in which a sweep updates the layers (0-based).

    Alternating sweeps begin with the layers that the news reaches first: those at an even distance
    from the input in the free phase, from the output in the nudged one.
    """
    if sweep == "alternating":
        first = (depth - 1) % 2 if nudged else 0
        return (*range(first, depth, 2), *range(1 - first, depth, 2))
    upwards = range(depth)
    return tuple(reversed(upwards)) if sweep == "ordered" and nudged else tuple(upwards)


class Update(NamedTuple):
    """One layer's turn in a sweep, and which neighbours have something to say to it.

    Attributes:
        layer: number of the layer, 0-based.
        below: whether it hears the layer below.
        above: whether it hears the layer above.
    """

    layer: int
    below: bool
    above: bool


OPENING = 2
"""Most sweeps at the start of a phase that are compiled by themselves, for what they leave out."""


def plan(
    spec: NetworkSpec, phases: Phases, nudged: bool, from_zero: bool
) -> tuple[tuple[Update, ...], ...]:
    """The updates of the first sweeps of a phase and, last, those of all others.

    A state of zero says nothing, and a displacement of zero stays so until the layer hears another
    one; products with such signals need not be made. Of twelve free and eight nudged alternating
    sweeps that is a tenth of all products.

    Args:
        spec: the network.
        phases: its phases.
        nudged: whether it is the nudged phase.
        from_zero: whether the phase starts from signals of zero (a displacement always does).

    Example:
        >>> spec = NetworkSpec((2,), (network.Dense(2), network.Dense(2)))
        >>> first, *_ = plan(spec, Phases(sweep="ordered"), nudged=False, from_zero=True)
        >>> first
        (Update(layer=0, below=False, above=False), Update(layer=1, below=True, above=False))
    """
    depth, displaced = spec.depth, nudged and phases.coordinates == "displacement"
    audible = [not from_zero] * depth
    sweeps: list[tuple[Update, ...]] = []
    while True:
        all_speak = all(audible)
        heard = audible if phases.sweep != "synchronous" else list(audible)
        updates = []
        for l in sweep_order(phases.sweep, depth, nudged):
            below = l > 0 and heard[l - 1]
            above = l + 1 < depth and heard[l + 1]
            if l + 1 < depth and displaced and not is_linear(spec.layers[l + 1]):
                above = above or heard[l]  # a winner that moves is news as well
            updates.append(Update(l, below, above))
            audible[l] = audible[l] or not displaced or below or above or l == depth - 1
        if all_speak or len(sweeps) < OPENING:
            sweeps.append(tuple(updates))
        if all_speak:
            return tuple(sweeps)


def activation_of(spec: NetworkSpec, l: int) -> Activation:
    """The activation of layer ``l`` (0-based): an output layer is linear."""
    is_output = l == spec.depth - 1 and spec.cost == "squared_error"
    return ACTIVATIONS["linear" if is_output else spec.neuron.activation]


def external(spec: NetworkSpec, links: Links, drive: jax.Array) -> State:
    """What layers receive besides signals: their bias, and the first one the input's `drive`."""
    return (links.biases[0] + drive, *links.biases[1:])


class Carry(NamedTuple):
    """All that a phase keeps from sweep to sweep.

    Attributes:
        t: number of sweeps done, int32. As a scanned input it would take memory for each sweep.
        states: a state of the neuron model for each layer.
        residual: see `PhaseInfo`; measured in the last sweep, or in each where there is a trace.
        moving: see `PhaseInfo`, measured likewise.
        spikes: spikes per neuron up to now, for each layer.
    """

    t: jax.Array
    states: list[Any]
    residual: jax.Array
    moving: jax.Array
    spikes: list[jax.Array]


Sweep: TypeAlias = Callable[[Carry, None], tuple[Carry, Any]]
"""``(carry, None) -> (carry, what the trace saw)``."""


class Sweeps(NamedTuple):
    """A phase that has not run yet.

    Attributes:
        carry: what it starts from.
        opening: its first sweeps, which leave out the products that are zero (`plan`).
        sweep: any other sweep; it may stand for those of the opening, too.
        length: number of its sweeps.
    """

    carry: Carry
    opening: tuple[Sweep, ...]
    sweep: Sweep
    length: int

    def run(self) -> tuple[Carry, Any]:
        """All sweeps; those after the opening in one scan that keeps its carry and nothing else."""
        carry, seen = self.carry, []
        opening = self.opening[: self.length]
        for sweep in opening:
            carry, now = sweep(carry, None)
            seen.append(jax.tree.map(lambda a: a[None], now))
        carry, rest = jax.lax.scan(self.sweep, carry, length=self.length - len(opening))
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen, rest)


def _change(change: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of squares, and number of units that count as moving: one pass, nothing kept."""
    zero = np.zeros((), change.dtype)
    square, moving = jax.lax.reduce(
        (change**2, (change > MOVING).astype(change.dtype)),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(change.ndim)),
    )
    return square, moving


def _sweeps(
    spec: NetworkSpec,
    phases: Phases,
    *,
    start: State,
    start_currents: State,
    relaxes: tuple[Relax, ...],
    nudged: bool,
    displaced: bool,
    from_zero: bool,
    current: Callable[[Update, State], jax.Array],
    units: tuple[jax.Array | float, ...],
    error: jax.Array | float,
    key: jax.Array | None,
    trace: Trace | None,
) -> Sweeps:
    """A phase of any kind."""
    neuron, depth = spec.neuron, spec.depth
    steps = phases.nudged if nudged else phases.free
    *opening, full = plan(spec, phases, nudged, from_zero)
    in_place = phases.sweep != "synchronous"
    sizes = [s.size for s in start]
    zero = jnp.zeros((), start[-1].real.dtype)

    rounded = nudged and phases.nudged_signals == "bfloat16"

    def signal(state: Any) -> jax.Array:
        sent = neuron.signal(state)
        return jax.lax.reduce_precision(sent, 8, 7) if rounded else sent

    def update(
        states: list[Any], t: jax.Array, updates: tuple[Update, ...]
    ) -> tuple[list[Any], list[jax.Array]]:
        before = list(map(signal, states))
        new, latest = list(states), list(before)
        spikes = [zero] * depth
        updated: set[int] = set()
        for turn in updates:
            l = turn.layer
            heard = tuple(latest if in_place else before)
            # The barrier makes the current once; without it XLA repeats the adjoint's sums wherever
            # the neuron model reads it.
            incoming = jax.lax.optimization_barrier(current(turn, heard))
            clock = Clock(
                step=t,
                steps=steps,
                before=phases.free if nudged else 0,
                layer=l + 1,
                unit=1.0 if displaced else jnp.abs(units[l]),
                error=error,
                fresh=in_place and bool(updated & {l - 1, l + 1}),
                nudged=nudged,
                displaced=displaced,
            )
            dice = None if key is None else jax.random.fold_in(jax.random.fold_in(key, t), l)
            new[l], sent = neuron.step(states[l], incoming, relaxes[l], clock, dice)
            latest[l] = signal(new[l])
            updated.add(l)
            if sent is not None:
                spikes[l] = sent
        return new, spikes

    def sweep(
        updates: tuple[Update, ...], number: int | None, carry: Carry, _: None
    ) -> tuple[Carry, Any]:
        """One sweep; its `number` where it is known before the program runs."""
        t, states = carry.t, carry.states
        new, spikes = update(states, t, updates)

        def measure() -> tuple[jax.Array, jax.Array]:
            # What is only looked at costs no memory in reverse mode.
            before, after = jax.lax.stop_gradient((states, new))
            scale = units if displaced else (1.0,) * depth
            squares, moved = zero, zero
            for a, b, unit in zip(before, after, scale, strict=True):
                square, count = _change(jnp.abs(b.s - a.s))
                squares, moved = squares + jnp.abs(unit) ** 2 * square, moved + count
            return jnp.sqrt(squares), moved / sum(sizes)

        # Nobody sees them before the last sweep, unless a trace is asked for.
        if trace is not None or number == steps - 1:
            residual, moving = measure()
        elif number is not None:
            residual, moving = zero, zero
        else:
            residual, moving = jax.lax.cond(t == steps - 1, measure, lambda: (zero, zero))
        spikes = jax.lax.stop_gradient(spikes)
        counts = [
            n + jnp.sum(jnp.abs(q)) / z for n, q, z in zip(carry.spikes, spikes, sizes, strict=True)
        ]
        seen = None
        if trace is not None:
            full = tuple(jnp.broadcast_to(q, s.shape) for q, s in zip(spikes, start, strict=True))
            seen = trace(
                Snapshot(
                    step=t,
                    state=network.unpack(spec, tuple(state.s for state in new)),
                    spikes=network.unpack(spec, full),
                    signals=network.unpack(spec, tuple(map(signal, new))),
                    residual=residual,
                )
            )
        return Carry(t + 1, new, residual, moving, counts), seen

    states = [neuron.start(s, i) for s, i in zip(start, start_currents, strict=True)]
    return Sweeps(
        Carry(jnp.zeros((), jnp.int32), states, zero, zero, [zero] * depth),
        tuple(functools.partial(sweep, updates, t) for t, updates in enumerate(opening)),
        functools.partial(sweep, full, None),
        steps,
    )


def conclude(spec: NetworkSpec, carry: Carry, trace: Any = None) -> tuple[State, PhaseInfo]:
    """What a phase that ended with `carry` returns: the packed read-out and a `PhaseInfo`."""
    state = tuple(map(spec.neuron.readout, carry.states))
    spikes, activity = tuple(carry.spikes), mean_size(state)
    return state, PhaseInfo(carry.residual, carry.moving, spikes, activity, trace)


def mean_size(state: State) -> tuple[jax.Array, ...]:
    """Mean ``|s|`` of each layer, only to be looked at: no derivative flows through it."""
    return tuple(jnp.mean(jnp.abs(s)) for s in jax.lax.stop_gradient(state))


def _absolute(
    spec: NetworkSpec,
    links: Links,
    drive: jax.Array,
    nudge: Callable[[jax.Array], jax.Array] | None,
) -> tuple[Relax, ...]:
    """The damped steps of the layers in absolute coordinates, with a `nudge` on the last one."""
    given = external(spec, links, drive)

    def layer(l: int) -> Relax:
        def step(s: jax.Array, current: jax.Array, epsilon: jax.Array | float) -> jax.Array:
            total = current + given[l]
            if nudge is not None and l == spec.depth - 1:
                total = total + nudge(s)
            return relax(activation_of(spec, l), s, total, epsilon)

        return step

    return tuple(map(layer, range(spec.depth)))


def _current(spec: NetworkSpec, links: Links) -> Callable[[Update, State], jax.Array]:
    """What a layer receives in absolute coordinates."""

    def current(turn: Update, signals: State) -> jax.Array:
        gains = (float(turn.below), spec.feedback * turn.above)
        return network.current(spec, links, turn.layer, signals, *gains)

    return current


def free_sweeps(
    spec: NetworkSpec,
    links: Links,
    drive: jax.Array,
    phases: Phases,
    key: jax.Array | None,
    trace: Trace | None = None,
    start: State | None = None,
) -> Sweeps:
    """The free phase in working form, not run: packed state, input's drive computed beforehand."""
    zeros = network.pack(spec, tuple(jnp.zeros(s, drive.dtype) for s in spec.state_shapes))
    start_currents = zeros
    if start is not None:
        start_currents = network.currents(spec, links, start, 1.0, spec.feedback)
    return _sweeps(
        spec,
        phases,
        start=zeros if start is None else start,
        start_currents=start_currents,
        relaxes=_absolute(spec, links, drive, None),
        nudged=False,
        displaced=False,
        from_zero=start is None,
        current=_current(spec, links),
        units=(1.0,) * spec.depth,
        error=1.0,
        key=key,
        trace=trace,
    )


def settle_free(
    spec: NetworkSpec,
    links: Links,
    drive: jax.Array,
    phases: Phases,
    key: jax.Array | None,
    trace: Trace | None = None,
    start: State | None = None,
) -> tuple[State, PhaseInfo]:
    """`free_phase` in working form."""
    phase = free_sweeps(spec, links, drive, phases, key, trace, start)
    return conclude(spec, *phase.run())


def settle_nudged(
    spec: NetworkSpec,
    links: Links,
    drive: jax.Array,
    y: jax.Array,
    state: State,
    beta: jax.Array | float,
    phases: Phases,
    key: jax.Array | None,
    trace: Trace | None = None,
) -> tuple[State, PhaseInfo]:
    """The nudged phase in absolute coordinates and working form, from the packed free `state`."""

    def nudge(s: jax.Array) -> jax.Array:
        return -beta * cost_gradient(links, s, y)

    phase = _sweeps(
        spec,
        phases,
        start=state,
        start_currents=network.currents(spec, links, state, 1.0, spec.feedback),
        relaxes=_absolute(spec, links, drive, nudge),
        nudged=True,
        displaced=False,
        from_zero=False,
        current=_current(spec, links),
        units=tuple(beta * spec.weight_of(l) for l in range(spec.depth)),
        error=output_error(links, state[-1], y),
        key=key,
        trace=trace,
    )
    return conclude(spec, *phase.run())


def output_error(links: Links, last: jax.Array, y: jax.Array) -> jax.Array:
    """``max |dC/ds_L|`` at the free state: the size of a displacement, in its own units.

    Spiking neurons scale the quantum of a nudged phase by it, so that what is learned from an
    example is coded as finely where its error is small as where it is large.
    """
    size = jnp.max(jnp.abs(cost_gradient(links, last, y)))
    return jnp.maximum(size, jnp.finfo(size.dtype).eps)  # what is below rounding is no error


class Base(NamedTuple):
    """What a displacement starts from, packed: the free state ``s0`` and its currents ``I0``.

    Attributes:
        state: ``s0 = sigma(I0)``: one synchronous sweep of rate neurons, the map whose fixed point
            the network relaxes to.
        currents: ``I0``, with input and bias.
        behind: see `ep_jax.network.behind`, of each layer; ``None`` without max pool.
    """

    state: State
    currents: State
    behind: tuple[jax.Array | None, ...]


def base_of(spec: NetworkSpec, links: Links, drive: jax.Array, state: State) -> Base:
    """The base of a displacement: ``I0 = I(state)`` with input and bias, and ``s0 = sigma(I0)``."""
    signals = network.currents(spec, links, state, 1.0, spec.feedback)
    currents = tuple(map(jnp.add, external(spec, links, drive), signals))
    base = tuple(activation_of(spec, l).apply(current) for l, current in enumerate(currents))
    contests = (network.behind(spec, links, l, base[l - 1]) for l in range(1, spec.depth))
    return Base(base, currents, (None, *contests))


def settle_displacement(
    spec: NetworkSpec,
    links: Links,
    y: jax.Array,
    base: Base,
    beta: jax.Array | float,
    phases: Phases,
    key: jax.Array | None,
    trace: Trace | None = None,
) -> tuple[State, PhaseInfo]:
    """The nudged phase in displacement coordinates and working form: ``D``, packed."""
    units = tuple(beta * spec.weight_of(l) for l in range(spec.depth))

    def layer(l: int) -> Relax:
        def step(d: jax.Array, current: jax.Array, epsilon: jax.Array | float) -> jax.Array:
            if l == spec.depth - 1:
                current = current - cost_gradient(links, base.state[l] + beta * d, y)
            # Tied to what changes, so that XLA makes what sigma needs of the base anew in each
            # sweep: that is cheaper than keeping it.
            current, base_current = jax.lax.optimization_barrier((current, base.currents[l]))
            return relax_displacement(
                activation_of(spec, l), base_current, d, current, units[l], epsilon
            )

        return step

    def current(turn: Update, signals: State) -> jax.Array:
        l = turn.layer
        total = jnp.zeros_like(signals[l])
        if turn.below:
            moved = network.drive_difference(
                spec, links, l, signals[l - 1], base.behind[l], units[l - 1]
            )
            total = total + spec.feedback * moved
        if turn.above:
            total = total + network.feedback_difference(
                spec,
                links,
                l,
                signals[l],
                (signals[l + 1], base.state[l + 1]),
                base.behind[l + 1],
                (units[l], units[l + 1]),
            )
        return total

    at_rest = tuple(map(jnp.zeros_like, base.state))
    phase = _sweeps(
        spec,
        phases,
        start=at_rest,
        start_currents=at_rest,
        relaxes=tuple(map(layer, range(spec.depth))),
        nudged=True,
        displaced=True,
        from_zero=True,
        current=current,
        units=units,
        error=output_error(links, base.state[-1], y),
        key=key,
        trace=trace,
    )
    return conclude(spec, *phase.run())


def free_phase(
    params: Params,
    spec: NetworkSpec,
    x: jax.Array,
    phases: Phases,
    key: jax.Array | None = None,
    trace: Trace | None = None,
    start: State | None = None,
) -> tuple[State, PhaseInfo]:
    """Relax the network freely (``beta = 0``), from zero state unless `start` is given.

    Args:
        params: parameters of `spec`.
        spec: the network.
        x: one input, floating point, of shape ``spec.input_shape``.
        phases: ``phases.free`` sweeps of the kind ``phases.sweep``.
        key: random key; stochastic neurons need one.
        trace: called with a `Snapshot` after each sweep; what it returns is stacked over sweeps in
            ``info.trace``. Nothing is stored per sweep without it.
        start: state to start from; spiking neurons start with receivers that know it.

    Returns:
        The state, a tuple over layers of arrays ``[H, W, C]`` or ``[N]`` (for spiking neurons the
        read-out of the analog states), and a `PhaseInfo`.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or value.

    Example:
        >>> spec = NetworkSpec((2,), (network.Dense(2),), neuron=ep_jax.Rate())
        >>> params = ({"w": jnp.eye(2), "b": jnp.zeros(2)},)
        >>> state, info = free_phase(params, spec, jnp.array([0.5, 0.25]), Phases(free=3))
        >>> [float(s) for s in state[-1]]
        [0.5, 0.25]
    """
    network.check_example(spec, params, x, start)
    check_phases(spec, phases, key)
    links = network.link(params, spec)
    drive = network.input_drive(spec, links, x)
    packed = None if start is None else network.pack(spec, tuple(start))
    state, info = settle_free(spec, links, drive, phases, key, trace, packed)
    return network.unpack(spec, state), info


def nudged_phase(
    params: Params,
    spec: NetworkSpec,
    x: jax.Array,
    y: jax.Array | int,
    state: State,
    beta: jax.Array | float,
    phases: Phases,
    key: jax.Array | None = None,
    trace: Trace | None = None,
) -> tuple[State, PhaseInfo]:
    """Relax the network nudged by ``-beta dC/ds_L``, from the free `state`.

    Spiking neurons start with receivers that know `state`, so the phases at plus and minus beta
    start alike; give both the same `key`.

    Args:
        params: parameters of `spec`.
        spec: the network.
        x: one input, floating point, of shape ``spec.input_shape``.
        y: its target: an integer label, or one-hot ``[classes]``.
        state: the free state, from `free_phase`.
        beta: nudging strength, not 0; it may be traced.
        phases: ``phases.nudged`` sweeps of the kind ``phases.sweep`` in ``phases.coordinates``.
        key: random key; stochastic neurons need one.
        trace: as for `free_phase`.

    Returns:
        The nudged state (in either coordinates) and a `PhaseInfo`.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or value.

    Example:
        >>> spec = NetworkSpec((2,), (network.Dense(2),), neuron=ep_jax.Rate())
        >>> params = ({"w": jnp.eye(2), "b": jnp.zeros(2)},)
        >>> x, free = jnp.array([0.5, 0.0]), (jnp.array([0.5, 0.0]),)
        >>> state, info = nudged_phase(params, spec, x, 0, free, 0.5, Phases(nudged=40))
        >>> [round(float(s), 4) for s in state[-1]]
        [0.6667, 0.0]
    """
    network.check_example(spec, params, x, state)
    check_phases(spec, phases, key)
    check_beta("beta", beta)
    x = network.as_precise_as(params[0]["w"], x)
    target = targets(spec, y, x.dtype)
    links = network.link(params, spec)
    drive = network.input_drive(spec, links, x)
    packed = network.pack(spec, tuple(state))
    if phases.coordinates == "absolute":
        nudged, info = settle_nudged(spec, links, drive, target, packed, beta, phases, key, trace)
    else:
        base = base_of(spec, links, drive, packed)
        d, info = settle_displacement(spec, links, target, base, beta, phases, key, trace)
        nudged = displaced_state(spec, base, d, beta)
    return network.unpack(spec, nudged), info


def displaced_state(spec: NetworkSpec, base: Base, d: State, beta: jax.Array | float) -> State:
    """``s_l = s0_l + beta alpha^(L - l) D_l``."""
    return tuple(
        s + beta * spec.weight_of(l) * v for l, (s, v) in enumerate(zip(base.state, d, strict=True))
    )


def check_inputs(spec: NetworkSpec, xs: jax.Array) -> None:
    """Raise where a batch of inputs does not fit `spec`."""
    check_float_array("xs", xs, ("batch", *spec.input_shape))
    if not len(xs):
        raise ValueError("xs holds no example; expected at least one")
