"""Time and memory of a run's gradient on this machine: EP against BPTT and backprop.

Weights and images are random: what a gradient costs does not depend on them (but for a tolerance,
which random images meet sooner or later than others).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ep_jax.checks import check_integer
from ep_jax.diagnostics import rate_twin
from ep_jax.gradients.bptt import bptt_gradient
from ep_jax.gradients.ep import ep_gradient
from ep_jax.gradients.feedforward import feedforward_gradient
from ep_jax.initialization import init_params
from ep_jax.measuring import compiled, memory, timings
from ep_jax.network import NetworkSpec
from ep_jax.phases import Phases
from ep_jax.presets import Config, spec_of

SHAPES = {
    "digits": (8, 8, 1),
    "mnist": (28, 28, 1),
    "fashion_mnist": (28, 28, 1),
    "cifar10": (32, 32, 3),
}
"""Shapes of the images of each data set."""
CLASSES = 10
"""Classes of each of them."""


class Method(NamedTuple):
    """A gradient, and what it is taken of."""

    gradient: Callable[..., Any]
    spec: NetworkSpec
    phases: Phases


def spec_of_named(config: Config) -> NetworkSpec:
    """The network of a run for the data set that it names, which need not be there.

    Args:
        config: the run.

    Raises:
        ValueError: it names none.
    """
    if config.dataset is None:
        raise ValueError("config.dataset is None; expected the name of a data set")
    return spec_of(config, SHAPES[config.dataset], CLASSES)


def methods_of(config: Config) -> dict[str, Method]:
    """EP as the run does it, and what it is compared with.

    BPTT goes through the free phase, with as many sweeps for all examples as a straggler makes.
    Backprop is that of the rate network without feedback.

    Args:
        config: the run whose network and phases they are of.

    Example:
        >>> from ep_jax.presets import PRESETS
        >>> {name: m.phases.free for name, m in methods_of(PRESETS["mnist"]).items()}
        {'EP': 11, 'BPTT': 31, 'backprop': 11}
    """
    spec = spec_of_named(config)
    alike = replace(config.phases.for_all(), tolerance=None, limit=None)
    return {
        "EP": Method(ep_gradient, spec, config.phases),
        "BPTT": Method(bptt_gradient, spec, alike),
        "backprop": Method(feedforward_gradient, rate_twin(spec), config.phases),
    }


def benchmark(config: Config, batches: Sequence[int], repeats: int = 10) -> Iterator[Any]:
    """Measure each method at each size of a batch.

    Args:
        config: the run.
        batches: images in a batch.
        repeats: timed calls of each case; the methods take turns.

    Yields:
        A record for each batch and method: ``batch``, ``method``, ``seconds`` (median) and its
        quartiles ``low`` and ``high``, ``of_backprop`` (ratio of the medians), bytes that the
        compiler reserved for temporaries, ``temporary``, and ``compile_seconds``.
    """
    check_integer("repeats", repeats, at_least=1)
    for batch in batches:
        check_integer("batches", batch, at_least=1)
        yield from _at(config, batch, repeats)


def _at(config: Config, batch: int, repeats: int) -> list[dict[str, Any]]:
    calls: dict[str, Callable[[], Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    for name, (gradient, spec, phases) in methods_of(config).items():
        keys = jax.random.split(jax.random.key(0))
        params = init_params(keys[0], spec, config.gain)
        xs = jax.random.uniform(keys[1], (batch, *spec.input_shape))
        ys = jnp.arange(batch) % CLASSES
        jitted = jax.jit(gradient, static_argnames=("spec", "phases"))
        made, seconds = compiled(jitted, params, spec, xs, ys, phases, keys[0])
        calls[name] = lambda made=made, of=(params, xs, ys, keys[0]): made(*of)
        records[name] = {
            "batch": batch,
            "method": name,
            "temporary": memory(made)["temporary"],
            "compile_seconds": seconds,
        }
    found = timings(calls, repeats)
    reference = found["backprop"].seconds
    return [
        record | found[name]._asdict() | {"of_backprop": found[name].seconds / reference}
        for name, record in records.items()
    ]
