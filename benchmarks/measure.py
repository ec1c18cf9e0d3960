"""What the benchmarks share: the network, the methods, times, memory, operations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

import ep_jax as ep
from ep_jax import phases as phases_
from ep_jax import training
from ep_jax.benchmark import CLASSES, spec_of_named
from ep_jax.devices import placements
from ep_jax.diagnostics import connections
from ep_jax.gradients.ep import nudges
from ep_jax.loop import optimizer_of
from ep_jax.measuring import Timing
from ep_jax.measuring import compiled as compiled
from ep_jax.measuring import device_peak as device_peak
from ep_jax.measuring import memory as memory
from ep_jax.measuring import timings as timings
from ep_jax.presets import PRESETS, Config, spec_of

SHAPE = (28, 28, 1)
LAYERS = (ep.Conv(32, 5), ep.Conv(64, 5), ep.Dense(128), ep.Dense(10))
RATE = ep.NetworkSpec(SHAPE, LAYERS, ep.Rate())
"""The textbook's network: rate neurons, feedback 1."""
TEXTBOOK = ep.Phases(
    free=50,
    nudged=10,
    beta=0.1,
    estimator="symmetric",
    sweep="synchronous",
    coordinates="absolute",
)
"""The textbook's phases."""
PRESET = PRESETS["mnist"]
SPIKING = spec_of(PRESET, SHAPE, 10)
ALIKE = PRESET.phases.without_stragglers()
"""The preset's phases, with as many sweeps for all: BPTT knows no stragglers."""

Gradient = Callable[..., Any]


def derived(
    params: ep.Params,
    spec: ep.NetworkSpec,
    xs: jax.Array,
    ys: jax.Array,
    phases: ep.Phases,
    key: jax.Array | None = None,
) -> tuple[ep.Params, ep.PhaseInfo]:
    """`ep_jax.ep_gradient` by `jax.grad` through `ep_jax.equilibrium`, the cost being a loss."""

    def cost(params: ep.Params) -> tuple[jax.Array, ep.PhaseInfo]:
        output, info = ep.equilibrium(params, spec, xs, phases, key, info=True)
        targets = jax.nn.one_hot(ys, spec.classes, dtype=output.dtype)
        return jnp.sum((output - targets) ** 2) / (2 * len(xs)), info

    return jax.grad(cost, has_aux=True)(params)


truncated = functools.partial(ep.bptt_gradient, tracked=10)
rematerialised = functools.partial(ep.bptt_gradient, remat=True)


def jitted(gradient: Gradient) -> Any:
    """A gradient of the library, ready to be called or lowered."""
    return jax.jit(gradient, static_argnames=("spec", "phases"))


class Problem(NamedTuple):
    """Parameters and a batch."""

    params: ep.Params
    xs: jax.Array
    ys: jax.Array


def deep(convolutions: int, neuron: ep.Neuron) -> ep.NetworkSpec:
    """3x3 convolutions of 16 channels, pools after the first two, two dense layers on top."""
    layers = (
        *(ep.Conv(16, 3, "avg" if i < 2 else None, padding="SAME") for i in range(convolutions)),
        ep.Dense(64),
        ep.Dense(10),
    )
    return ep.NetworkSpec(SHAPE, layers, neuron, feedback=PRESET.feedback)


def network_at(point: Mapping[str, Any], neuron: ep.Neuron) -> ep.NetworkSpec:
    """The network of a point of a scaling axis.

    Along ``depth`` it is `deep`; elsewhere the MNIST network, ``width`` times as wide.
    """
    if point["axis"] == "depth":
        return deep(point["convolutions"], neuron)
    width = point["width"]
    wide = (replace(layer, features=int(width * layer.features)) for layer in LAYERS[:-1])
    return ep.NetworkSpec(SHAPE, (*wide, LAYERS[-1]), neuron, feedback=PRESET.feedback)


def problem(spec: ep.NetworkSpec, batch: int, seed: int = 0) -> Problem:
    """Random parameters of `spec` and a random batch."""
    keys = jax.random.split(jax.random.key(seed))
    xs = jax.random.uniform(keys[1], (batch, *spec.input_shape))
    return Problem(ep.init_params(keys[0], spec), xs, jnp.arange(batch) % spec.classes)


def divided(given: Problem, devices: int) -> Problem:
    """The same with the batch divided among devices."""
    place = placements(devices)
    params = jax.device_put(given.params, place.everywhere)
    return Problem(params, *jax.device_put((given.xs, given.ys), place.examples))


class Program(NamedTuple):
    """A compiled program and what it is called with."""

    made: Any
    given: tuple[Any, ...]
    compile_seconds: float

    def __call__(self) -> Any:
        return self.made(*self.given)


STEPS = 10
"""Training steps of a dispatch."""


def training_steps(
    config: Config, gradient: Gradient, batch: int, devices: int = 1, steps: int = STEPS
) -> Program:
    """A dispatch of training steps: gather, augment, gradient, the run's optimiser."""
    place = placements(devices)
    spec = spec_of_named(config)
    optimizer = optimizer_of(config, spec, 1000)
    run = training.make_train_steps(
        spec, config.phases, optimizer, augmentation=config.augmentation, gradient=gradient
    )
    state = training.init_train_state(jax.random.key(0), spec, optimizer, config.gain)
    keys = jax.random.split(jax.random.key(1))
    images = jax.random.randint(keys[0], (2048, *spec.input_shape), 0, 256).astype(jnp.uint8)
    labels = jnp.arange(2048, dtype=jnp.int32) % CLASSES
    batches = jax.random.randint(keys[1], (steps, batch), 0, 2048)
    given = jax.device_put((state, images, labels), place.everywhere)
    given = (*given, *jax.device_put((batches, keys[0]), (place.batches, place.everywhere)))
    made, seconds = compiled(jax.jit(run, out_shardings=place.everywhere), *given)
    return Program(made, given, seconds)


# Time.


def matmul_call(size: int = 2048, precision: str = "float32") -> Callable[[], Any]:
    """A large product, of ``2 size^3`` operations, in a precision of `ep_jax.Phases`."""
    low = precision == "bfloat16"
    a = jnp.ones((size, size), jnp.bfloat16 if low else jnp.float32)
    multiply = jax.jit(functools.partial(jnp.dot, precision=None if low else precision))
    return lambda: multiply(a, a)


def matmul_rate(timing: Timing, size: int = 2048) -> float:
    """Operations per second of `matmul_call`."""
    return 2 * size**3 / timing.seconds


def label_sizes(axis: Axes, sizes: Iterable[float]) -> None:
    """Ticks of a logarithmic x-axis at the sizes that were measured, and nowhere else."""
    sizes = sorted(set(sizes))
    axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())


# Memory.


def own_peak(call: Callable[[], Any]) -> int | None:
    """Bytes that the device held at most during a call, where it tells.

    It tells the highest of all so far: ``None`` where the call did not raise it.
    """
    before = device_peak()
    if before is None:
        return None
    jax.block_until_ready(call())
    peak = device_peak()
    return peak if peak != before else None


def lower_bound(spec: ep.NetworkSpec, phases: ep.Phases, batch: int) -> int:
    """Bytes EP cannot do without: parameters, the input's drive, the live copies of the state.

    Live in the nudged phases are, for each nudge, what the neurons carry and the new states of the
    layers that are updated at once; and what the contrast needs of the free phase: in displacement
    coordinates its state and currents, in absolute ones its state, unless it cancels. Stragglers
    and residuals come after the sweeps and are not counted.
    """
    params = jax.eval_shape(lambda: ep.init_params(jax.random.key(0), spec))
    state = [jax.ShapeDtypeStruct(s, jnp.float32) for s in spec.state_shapes]
    carried = [jax.eval_shape(spec.neuron.start, s, s) for s in state]
    depth = spec.depth
    at_once = {
        "synchronous": [range(depth)],
        "alternating": [range(0, depth, 2), range(1, depth, 2)],
        "ordered": [[l] for l in range(depth)],
    }[phases.sweep]
    new = max(_bytes([state[l] for l in group]) for group in at_once)
    key = jax.random.key(0)
    betas = jax.eval_shape(lambda: nudges(phases, 1, jnp.dtype("float32"), key).betas)
    points = len(betas) * (betas.dtype.itemsize // 4)
    if phases.coordinates == "displacement":
        kept = 2
    else:
        kept = 0 if phases.estimator in ("symmetric", "holomorphic") else 1
    an_example = points * (_bytes(carried) + new) + kept * _bytes(state) + _bytes(state[0])
    return _bytes(params) + batch * an_example


def _bytes(tree: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


# Operations: multiplications and additions of the products with the weights.


def products(spec: ep.NetworkSpec) -> list[int]:
    """Operations of one drive of each layer, of one example; its adjoint has as many."""
    return [2 * n for n in connections(spec)]


def phase_operations(
    spec: ep.NetworkSpec, phases: ep.Phases, *, nudged: bool = False, sweeps: int | None = None
) -> int:
    """Operations of a phase of one example; products with what is known to be zero are not made."""
    cost = [2 * e.layer.connections(spec.shapes[e.source + 1]) for e in spec.edges]
    sweeps = (phases.nudged if nudged else phases.free) if sweeps is None else sweeps
    from_zero = not nudged or phases.coordinates == "displacement"
    plan = phases_.plan(spec, phases, nudged, from_zero)
    total = 0
    for i in range(sweeps):
        for turn in plan[min(i, len(plan) - 1)]:
            total += sum(cost[edge.number] for edge in (*turn.below, *turn.above))
    return total


def settling_operations(
    spec: ep.NetworkSpec, phases: ep.Phases, batch: int, *, nudged: bool = False
) -> int:
    """Operations of a phase of a batch: all its sweeps, the stragglers', and those that tell.

    At the end one more sweep tells the residual, of every example and once more of each straggler.
    (A free one also is where a displacement starts from.) With a tolerance it is what the phase
    takes at most, without the looks on the way.
    """
    sweep = 2 * sum(products(spec)[1:])
    more = phases.more(nudged)
    slow = phases.straggling(batch) if more else 0
    own = phase_operations(spec, phases, nudged=nudged)
    return batch * (own + sweep) + slow * (more + 1) * sweep


def ep_operations(spec: ep.NetworkSpec, phases: ep.Phases, batch: int) -> int:
    """Operations of `ep_jax.ep_gradient`: input, phases, weight gradients."""
    cost = products(spec)
    key = jax.random.key(0)
    points = len(nudges(phases, 1, jnp.dtype("float32"), key).betas)
    free = settling_operations(spec, phases, batch)
    nudged = points * settling_operations(spec, phases, batch, nudged=True)
    if phases.coordinates == "displacement":  # of drives of s0 by D, and of D by s0
        weights = points * (sum(cost) + sum(cost[1:]))
    else:
        lone = phases.estimator not in ("symmetric", "holomorphic")
        weights = (points + lone) * sum(cost)
    return free + nudged + batch * (cost[0] + weights)


def implicit_operations(
    spec: ep.NetworkSpec, phases: ep.Phases, batch: int, adjoint_sweeps: int
) -> int:
    """Operations of `ep_jax.implicit_gradient`, at so many sweeps of the adjoint.

    It is linearised at the sweep that tells the residual. One sweep comes after those of the
    adjoint, and two weight gradients of each layer but the first: of its drive and of its adjoint.
    """
    cost = products(spec)
    sweep = 2 * sum(cost[1:])
    free = settling_operations(spec, phases, batch)
    return free + batch * (cost[0] + adjoint_sweeps * sweep + 2 * (cost[0] + sweep))


def bptt_operations(
    spec: ep.NetworkSpec, phases: ep.Phases, batch: int, tracked: int | None = None
) -> int:
    """Operations of `ep_jax.bptt_gradient`: each tracked product has two in reverse mode.

    The last sweep, which tells the residual, has none.
    """
    cost = products(spec)
    tracked = phases.free if tracked is None else tracked
    free = phase_operations(spec, phases)
    before = phase_operations(spec, phases, sweeps=phases.free - tracked)
    return batch * (2 * cost[0] + free + 2 * sum(cost[1:]) + 2 * (free - before))


def feedforward_operations(spec: ep.NetworkSpec, batch: int) -> int:
    """Operations of feed-forward backprop: forward, weight gradients, adjoints."""
    cost = products(spec)
    return batch * (2 * sum(cost) + sum(cost[1:]))
