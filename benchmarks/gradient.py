"""Time and memory of one gradient, by EP and by BPTT, against the matmul rate of the same run.

    python benchmarks/gradient.py --json gradient.json

The network is 32C5-P2-64C5-P2-FC128-FC10 on 28 x 28 inputs. Compile time is apart; times are
medians of calls that waited for their result. Operations are the multiplications and additions of
the sweeps, two products a layer and sweep, counted from the specification; a tracked sweep needs
twice as many again in reverse, for the adjoints of its two products and of their weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

import ep_jax as ep
from ep_jax import network
from ep_jax.checkpoint import write_json
from ep_jax.presets import PRESETS, spec_of
from ep_jax.run import provenance

LAYERS = (ep.Conv(32, 5), ep.Conv(64, 5), ep.Dense(128), ep.Dense(10))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time and memory of one gradient, by EP and by BPTT."""

    batch: int = 64
    """Images in a batch."""
    repeats: int = 15
    """Timed calls; the median counts."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """File to write the numbers to."""


class Case(NamedTuple):
    """What is timed: a gradient of a network, and how many sweeps' worth of products it needs."""

    gradient: Callable[..., Any]
    spec: ep.NetworkSpec
    phases: ep.Phases
    sweeps: int


def cases() -> dict[str, Case]:
    """The textbook's EP, unfolded and folded, the spiking preset, and BPTT."""
    unfolded = (
        *(dataclasses.replace(c, fold=False) for c in LAYERS if isinstance(c, ep.Conv)),
        *LAYERS[2:],
    )
    textbook = ep.Phases(free=50, nudged=10)
    rate = ep.NetworkSpec((28, 28, 1), LAYERS, neuron=ep.Rate())
    preset = PRESETS["mnist"]
    spiking = spec_of(preset, (28, 28, 1), 10)
    both = textbook.free + 2 * textbook.nudged
    tracked = functools.partial(ep.bptt_gradient, tracked=10)
    free, nudged = preset.phases.free, preset.phases.nudged
    return {
        "EP, rate, symmetric, T = 50/10": Case(ep.ep_gradient, rate, textbook, both),
        "the same, pool not folded": Case(
            ep.ep_gradient, dataclasses.replace(rate, layers=unfolded), textbook, both
        ),
        "BPTT, rate, T = 50, 10 tracked": Case(tracked, rate, textbook, textbook.free + 2 * 10),
        "BPTT, rate, T = 50": Case(ep.bptt_gradient, rate, textbook, 3 * textbook.free),
        "the same, rematerialised": Case(
            functools.partial(ep.bptt_gradient, remat=True), rate, textbook, 4 * textbook.free
        ),
        "preset mnist (spiking EP)": Case(ep.ep_gradient, spiking, preset.phases, free + nudged),
        "BPTT of its free phase": Case(ep.bptt_gradient, spiking, preset.phases, 3 * free),
    }


def seconds(function: Callable[..., Any], *args: Any, repeats: int) -> float:
    """Median time of a call, its result awaited, after one that is not counted."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def operations(spec: ep.NetworkSpec, sweeps: int, batch: int) -> int:
    """Multiplications and additions in so many sweeps: drives and adjoints."""
    links = jax.eval_shape(lambda: network.link(ep.init_params(jax.random.key(0), spec), spec))
    positions = [
        math.prod(shape[:-1]) * (1 if fold_counts(layer) else 4)
        for layer, shape in zip(spec.layers, spec.state_shapes, strict=False)
    ]
    sweep = sum(
        2 * 2 * places * matrix.size
        for places, matrix in zip(positions[1:], links.matrices[1:], strict=True)
    )
    return batch * sweep * sweeps


def fold_counts(layer: ep.Conv | ep.Dense) -> bool:
    """Whether a layer's products are made once per unit of its state, not per unpooled position."""
    return isinstance(layer, ep.Dense) or layer.pool is None or (layer.pool == "avg" and layer.fold)


def matmul_rate(repeats: int) -> float:
    """Operations per second of a large float32 product."""
    a = jnp.ones((2048, 2048))
    return 2 * 2048**3 / seconds(jax.jit(jnp.dot), a, a, repeats=repeats)


def measure(case: Case, batch: int, repeats: int) -> dict[str, Any]:
    """Time, compile time, operations and temporary memory (where it is told) of one gradient."""
    _, spec, phases, sweeps = case
    params = ep.init_params(jax.random.key(0), spec)
    xs = jax.random.uniform(jax.random.key(1), (batch, *spec.input_shape))
    ys = jnp.arange(batch) % spec.classes
    gradient = jax.jit(case.gradient, static_argnames=("spec", "phases"))
    began = time.perf_counter()
    compiled = gradient.lower(params, spec, xs, ys, phases).compile()
    compile_seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    return {
        "seconds": seconds(compiled, params, xs, ys, repeats=repeats),
        "compile_seconds": compile_seconds,
        "operations": operations(spec, sweeps, batch),
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
    }


def main() -> None:
    """Measure, print, write."""
    arguments = tyro.cli(Arguments)
    rate = matmul_rate(arguments.repeats)
    table = Table(title=f"one gradient, batch {arguments.batch}; matmul {rate / 1e9:.0f} GFLOP/s")
    table.add_column("case", no_wrap=True)
    for column in ("ms", "compile s", "GFLOP", "of matmul", "temp. MiB"):
        table.add_column(column, justify="right")
    measured = {}
    for name, case in cases().items():
        found = measure(case, arguments.batch, arguments.repeats)
        measured[name] = found
        temporary = found["temporary_bytes"]
        table.add_row(
            name,
            f"{1e3 * found['seconds']:.1f}",
            f"{found['compile_seconds']:.1f}",
            f"{found['operations'] / 1e9:.1f}",
            f"{found['operations'] / found['seconds'] / rate:.0%}",
            "-" if temporary is None else f"{temporary / 2**20:.1f}",
        )
    Console().print(table)
    if arguments.json_file is not None:
        numbers = {"batch": arguments.batch, "matmul_rate": rate, "cases": measured}
        write_json(arguments.json_file, numbers | provenance())


if __name__ == "__main__":
    main()
