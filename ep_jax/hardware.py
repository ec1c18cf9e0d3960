"""What a network would cost on hardware: operations, memory traffic and joules.

These are counts and not measurements. They say how many operations an inference or a step of
learning asks for, on a digital chip that keeps states and weights in memories and does nothing
twice or in vain. Energies are published ones of single operations. Absolute joules depend on the
chip; ratios between methods depend mostly on the counts. Every assumption is in `hardware_cost`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ep_jax.dynamics import PhaseInfo
from ep_jax.gradients.batch import GradientInfo
from ep_jax.network import NetworkSpec, parameters_of
from ep_jax.neurons import Neuron, first_step
from ep_jax.phases import Phases


class Energies(NamedTuple):
    """Energies of single operations, in picojoules.

    Attributes:
        multiply: a multiplication.
        add: an addition; a multiply-accumulate is one of each.
        state: a read or a write of a word of state memory.
        weight: a read or a write of a word of weight memory.
    """

    multiply: float
    add: float
    state: float
    weight: float


FLOAT32 = Energies(multiply=3.7, add=0.9, state=10.0, weight=10.0)
"""32-bit floating point in 45 nm at .9 V, states and weights in memories of 32 KB beside the
arithmetic, of which 64 bits take 20 pJ (Horowitz, ISSCC 2014)."""
INT8 = Energies(multiply=0.2, add=0.03, state=2.5, weight=2.5)
"""8-bit integers, else the same."""
FLOAT32_DRAM = FLOAT32._replace(weight=650.0)
"""32-bit floating point with weights in DRAM, of which 64 bits take 1.3 nJ or more."""


class Cost(NamedTuple):
    """What one example costs.

    Attributes:
        macs: multiply-accumulates.
        acs: accumulates, which spikes cause.
        spikes: unit spikes; a graded spike of size q counts as q of them.
        state_reads: words read from state memory.
        state_writes: words written to state memory.
        weight_reads: words read from weight memory.
        weight_writes: words written to weight memory.
        held: words that state memory must hold at once.
        joules: energy.
        memory_joules: the part of it that moves words from and to memory.
    """

    macs: float
    acs: float
    spikes: float
    state_reads: float
    state_writes: float
    weight_reads: float
    weight_writes: float
    held: float
    joules: float
    memory_joules: float

    @property
    def moved(self) -> float:
        """Words read from and written to all memories."""
        return self.state_reads + self.state_writes + self.weight_reads + self.weight_writes


class HardwareCost(NamedTuple):
    """What a network costs for each example; learning includes the inference.

    Attributes:
        inference: one free phase.
        ep: a step of learning by EP; ``None`` where nothing is known of a nudged phase.
        bptt: a step of learning by back-propagation through the same free phase.
        backprop: a step of learning by back-propagation in the feed-forward network of the same
            layers, without spikes and without feedback.
    """

    inference: Cost
    ep: Cost | None
    bptt: Cost
    backprop: Cost


class _Work(NamedTuple):
    """Counts that add up."""

    macs: float = 0.0
    acs: float = 0.0
    spikes: float = 0.0
    state_reads: float = 0.0
    state_writes: float = 0.0
    weight_reads: float = 0.0
    weight_writes: float = 0.0

    def plus(self, *others: _Work) -> _Work:
        return _Work(*map(sum, zip(self, *others, strict=True)))

    def times(self, factor: float) -> _Work:
        return _Work(*(factor * count for count in self))


def hardware_cost(
    spec: NetworkSpec,
    info: PhaseInfo | GradientInfo,
    phases: Phases | None = None,
    energies: Energies = FLOAT32,
) -> HardwareCost:
    """Operations, memory traffic and joules of an inference and of learning, for one example.

    Sweeps and spikes are those that `info` tells: with a tolerance or stragglers, the mean of what
    the examples took. With ``c_e`` products of an edge's drive (`ep_jax.Layer.connections`), ``N``
    units of ``w`` words each, ``T`` free and ``K`` nudged sweeps::

        product of an edge   c_e MACs; c_e weights and c_e states read, its results written
        rate sweep           the products of each link's drive and adjoint, and an update
        spiking sweep        one AC for each connection of each spike (read its weight, read and
                             write its target's current), and an update
        update               N w MACs; N (w + 2) states read, N w written
        inference            the input's products once, T sweeps, a read-out's product
        EP                   an inference, K sweeps and two products of the read-out in each for
                             each nudged phase, the contrast, the step of the weights
        contrast             2 c_e MACs of a link, c_e of an edge from the input or of the read-out,
                             two states read for each; N states written
        BPTT                 an inference that writes N w states in every sweep; backwards the T
                             sweeps, each reading what was written, in analog values: of each
                             product of a link one for the state and one for the weights
        backprop             one product of every edge forward, one for the state below (but the
                             input) and one for the weights backward, two updates of w = 1
        step of the weights  a MAC, a read and a write for each parameter
        joules               MACs (multiply + add) + ACs add + words read or written

    What is assumed:

    - One example is learned at a time, by plain gradient descent, in place.
    - No word is reused from a cache but the result that a product sums up. This favours nobody: an
      event-driven chip has no use for a cache, and a systolic array saves the same in EP, BPTT and
      backprop.
    - A write costs as much as a read. A unit's update is one MAC for each word of its state.
    - A spike reaches its targets above and below, through a pool as if there were none; pools'
      additions and comparisons are not counted, nor is the routing of spikes.
    - The input is analog and constant, so its products are made once.
    - The residual is a measurement, and no part of the network; nor is the sweep from which a
      displacement starts, since each neuron knows its current.
    - Products with states of zero are counted for rate neurons.
    - Holomorphic EP is complex: four MACs for one and two words for one.

    Args:
        spec: the network. A layer of your own is counted through its `connections`, a neuron model
            of your own through the words of its state and whether its step returns spikes.
        info: what phases told: a `PhaseInfo` of one example or of a batch, or the `GradientInfo`
            of `ep_jax.ep_gradient`, which knows the nudged phase as well.
        phases: their settings, for the number of nudged phases; by default there is one.
        energies: energies of single operations.

    Raises:
        TypeError: `info` is neither.

    References:
        Horowitz, *Computing's energy problem*, ISSCC 2014, for the energies. Lemaire et al., *An
        analytical estimation of spiking neural networks energy efficiency*, ICONIP 2022, for
        counting traffic as well as arithmetic.

    Example:
        >>> spec = NetworkSpec((8,), (ep_jax.Dense(4), ep_jax.Dense(2)), ep_jax.Rate())
        >>> params = ep_jax.init_params(jax.random.key(0), spec)
        >>> _, info = ep_jax.free_phase(params, spec, jnp.ones(8), Phases(free=10))
        >>> hardware_cost(spec, info).inference.macs  # 32, and 10 sweeps of 2 * 8 + 6
        252.0
    """
    if isinstance(info, GradientInfo):
        free, nudged = info.free, info.nudged
    elif isinstance(info, PhaseInfo):
        free, nudged = info, None
    else:
        raise TypeError(f"info is {type(info).__name__}; expected an ep_jax.PhaseInfo or an "
                        "ep_jax.GradientInfo")  # fmt: skip
    units, words = sum(_sizes(spec)), state_words(spec.neuron)
    inference = _inference(spec, free)
    held = units * (words + 2)
    learned = None
    if nudged is not None:
        points, pairs, complex_ = _points(phases)
        work = inference.plus(_nudged(spec, nudged, complex_).times(points))
        work = work.plus(_contrast(spec).times(pairs), _step(spec))
        learned = _cost(work, held + pairs * units, energies)
    sweeps = _mean(free.sweeps)
    return HardwareCost(
        inference=_cost(inference, held, energies),
        ep=learned,
        bptt=_cost(
            inference.plus(_backward(spec, sweeps), _step(spec)),
            held + (sweeps + 1) * units * words,
            energies,
        ),
        backprop=_cost(_feedforward(spec).plus(_step(spec)), 2 * units, energies),
    )


def recorded(
    phases: Phases,
    spikes: Sequence[jax.Array | float],
    spikes_nudged: Sequence[jax.Array | float] | None = None,
) -> PhaseInfo | GradientInfo:
    """What phases told of sweeps and spikes, from a record of them; the rest is zero.

    Args:
        phases: the phases: with a tolerance, their sweeps are the most there can be.
        spikes: spikes per neuron of each layer in a free phase.
        spikes_nudged: those in a nudged phase, where they are known.

    Example:
        >>> phases = Phases(stragglers=0.5, free=8, free_more=4)
        >>> float(recorded(phases, [1.0]).sweeps)  # half of the examples make four more
        10.0
    """
    free = _recorded(phases, False, spikes)
    if spikes_nudged is None:
        return free
    nothing = jnp.zeros(())
    return GradientInfo(nothing, nothing, free, _recorded(phases, True, spikes_nudged))


def _recorded(phases: Phases, nudged: bool, spikes: Sequence[jax.Array | float]) -> PhaseInfo:
    sweeps = phases.mean_sweeps(nudged)
    nothing = jnp.zeros(())
    zeros = (nothing,) * len(spikes)
    counts = tuple(map(jnp.asarray, spikes))
    return PhaseInfo(nothing, zeros, nothing, nothing, jnp.asarray(sweeps), nothing, counts, zeros)


def connections(spec: NetworkSpec) -> tuple[int, ...]:
    """Products of one drive of each layer of one example; its adjoint has as many.

    Connections, counted with those that share a weight. A folded average pool is counted as such.

    Example:
        >>> connections(NetworkSpec((8,), (ep_jax.Dense(4), ep_jax.Dense(2))))
        (32, 8)
    """
    within = zip(spec.layers[: spec.depth], spec.shapes, strict=False)
    return tuple(layer.connections(below) for layer, below in within)


def synaptic_operations(spec: NetworkSpec, spikes: Sequence[jax.Array | float]) -> float:
    """Additions that spikes cause at their targets, above and below; of one example.

    The drive by the input, which is no spike train, is not among them.

    Args:
        spec: the network.
        spikes: spikes per neuron of each layer, as in `ep_jax.PhaseInfo`.

    Example:
        >>> spec = NetworkSpec((8,), (ep_jax.Dense(4), ep_jax.Dense(2)))
        >>> synaptic_operations(spec, (1.5, 2.0))  # 8 connections, used in both directions
        28.0
    """
    reached = [0] * spec.depth
    for source, target, count in _edges(spec):
        if source >= 0:
            reached[source] += count
            reached[target] += count
    return float(sum(float(s) * n for s, n in zip(spikes, reached, strict=True)))


def is_spiking(neuron: Neuron) -> bool:
    """Whether the step of a neuron model returns spikes.

    Example:
        >>> is_spiking(ep_jax.Rate()), is_spiking(ep_jax.DeltaCode())
        (False, True)
    """
    key = jax.random.key(0) if neuron.stochastic else None

    def sent(s: jax.Array) -> jax.Array | None:
        return first_step(neuron, neuron.start(s, s), s, key)[1]

    return jax.eval_shape(sent, jax.ShapeDtypeStruct((2,), jnp.float32)) is not None


def state_words(neuron: Neuron) -> int:
    """Words of state that a unit of a neuron model carries from sweep to sweep.

    Example:
        >>> state_words(ep_jax.Rate()), state_words(ep_jax.DeltaCode())
        (1, 2)
    """
    two = jax.ShapeDtypeStruct((2,), jnp.float32)
    carried = jax.tree.leaves(jax.eval_shape(neuron.start, two, two))
    return sum(part.size == 2 for part in carried)  # not what a layer has once


# Counts. An edge is (source, target, connections); the input's source is -1.


@functools.cache
def _edges(spec: NetworkSpec) -> tuple[tuple[int, int, int], ...]:
    return tuple(
        (edge.source, edge.target, edge.layer.connections(spec.shapes[edge.source + 1]))
        for edge in spec.edges
    )


def _sizes(spec: NetworkSpec) -> list[int]:
    return [math.prod(shape) for shape in spec.state_shapes]


def _mean(value: jax.Array | float) -> float:
    """Of a batch, or of one example."""
    return float(np.mean(np.asarray(value)))


def _product(count: int, results: int) -> _Work:
    return _Work(macs=count, weight_reads=count, state_reads=count, state_writes=results)


def _outer(count: int) -> _Work:
    """Products of two states each, for the gradient of the weights."""
    return _Work(macs=count, state_reads=2 * count)


def _read_out(spec: NetworkSpec) -> int:
    """Connections of a read-out outside the dynamics."""
    return spec.layers[-1].connections(spec.shapes[-2]) if spec.has_readout else 0


def _answer(spec: NetworkSpec) -> _Work:
    """What the read-out says."""
    return _product(_read_out(spec), math.prod(spec.output_shape) if spec.has_readout else 0)


def _asked(spec: NetworkSpec) -> _Work:
    """What the read-out asks of the layer below it."""
    return _product(_read_out(spec), _sizes(spec)[-1] if spec.has_readout else 0)


def _sweeps(spec: NetworkSpec, sweeps: float) -> _Work:
    """The products of so many rate sweeps."""
    sizes = _sizes(spec)
    both = (
        _product(count, sizes[end])
        for source, target, count in _edges(spec)
        if source >= 0
        for end in (source, target)
    )
    return _Work().plus(*both).times(sweeps)


def _updates(units: int, words: int, sweeps: float) -> _Work:
    each = _Work(macs=words, state_reads=words + 2, state_writes=words)
    return each.times(units * sweeps)


def _phase(spec: NetworkSpec, info: PhaseInfo) -> _Work:
    """A phase, of what its sweeps say to each other."""
    sizes, sweeps = _sizes(spec), _mean(info.sweeps)
    own = _updates(sum(sizes), state_words(spec.neuron), sweeps)
    if not is_spiking(spec.neuron):
        return own.plus(_sweeps(spec, sweeps))
    rates = [_mean(s) for s in info.spikes]
    sent = sum(rate * size for rate, size in zip(rates, sizes, strict=True))
    caused = synaptic_operations(spec, rates)
    return own.plus(
        _Work(
            acs=caused,
            spikes=sent,
            weight_reads=caused,
            state_reads=caused,
            state_writes=caused,
        )
    )


def _inference(spec: NetworkSpec, free: PhaseInfo) -> _Work:
    sizes = _sizes(spec)
    inputs = (_product(c, sizes[target]) for source, target, c in _edges(spec) if source < 0)
    return _phase(spec, free).plus(*inputs, _answer(spec))


def _points(phases: Phases | None) -> tuple[int, int, bool]:
    """How many nudged phases and contrasts there are; whether they are complex."""
    estimator = "one_sided" if phases is None else phases.estimator
    if phases is not None and estimator == "holomorphic":
        points = phases.points // 2 + 1  # those in the upper half plane
        return points, points, True
    points = 2 if estimator == "symmetric" else 1
    apart = phases is not None and phases.coordinates == "displacement"
    return points, points if apart else 1, False


def _nudged(spec: NetworkSpec, info: PhaseInfo, complex_: bool) -> _Work:
    work = _phase(spec, info).plus(_answer(spec).plus(_asked(spec)).times(_mean(info.sweeps)))
    return work._replace(macs=2 * work.macs).times(2) if complex_ else work


def _contrast(spec: NetworkSpec) -> _Work:
    count = sum((2 if source >= 0 else 1) * c for source, _, c in _edges(spec)) + _read_out(spec)
    return _outer(count).plus(_Work(state_writes=sum(_sizes(spec))))


def _step(spec: NetworkSpec) -> _Work:
    size = sum(math.prod(p.shape) for p in jax.tree.leaves(parameters_of(spec)))
    return _Work(macs=size, weight_reads=size, weight_writes=size)


def _backward(spec: NetworkSpec, sweeps: float) -> _Work:
    """What BPTT adds to an inference: the tape, and the way back."""
    units, words = sum(_sizes(spec)), state_words(spec.neuron)
    tape = _Work(state_reads=units * words, state_writes=units * words).times(sweeps)
    links = sum(c for source, _, c in _edges(spec) if source >= 0)
    inputs = sum(c for source, _, c in _edges(spec) if source < 0)
    return tape.plus(
        _sweeps(spec, sweeps),
        _outer(2 * links).times(sweeps),
        _updates(units, words, sweeps),
        _outer(inputs + _read_out(spec)),
        _asked(spec),
    )


def _feedforward(spec: NetworkSpec) -> _Work:
    sizes, edges = _sizes(spec), _edges(spec)
    forward = (_product(c, sizes[target]) for _, target, c in edges)
    back = (_product(c, sizes[source]) for source, _, c in edges if source >= 0)
    weights = _outer(sum(c for *_, c in edges) + _read_out(spec))
    updates = _updates(sum(sizes), 1, 2)
    return updates.plus(*forward, *back, weights, _answer(spec), _asked(spec))


def _cost(work: _Work, held: float, energies: Energies) -> Cost:
    arithmetic = work.macs * (energies.multiply + energies.add) + work.acs * energies.add
    memory = (work.state_reads + work.state_writes) * energies.state
    memory += (work.weight_reads + work.weight_writes) * energies.weight
    return Cost(*work, held, 1e-12 * (arithmetic + memory), 1e-12 * memory)
