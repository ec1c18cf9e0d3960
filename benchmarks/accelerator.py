"""What an accelerator is worth: everything about one GPU or TPU, in one call of a few minutes.

    python benchmarks/accelerator.py --out runs/accelerator
    python benchmarks/accelerator.py --out runs/accelerator --quick   # a look, on a CPU

Time and memory of training steps of the presets mnist and cifar10_vgg5, by EP (rate and spiking),
by BPTT with and without rematerialisation and by feed-forward backprop: at the presets' batch,
against the batch, in each precision, and with a batch settled in parts. Memory of a gradient
against the sweeps, and how far each precision leads from float64 on the CPU. Weights and images are
random: no data are needed. The JSON file is written after each case, so a session that ends early
keeps what it has measured.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from measure import (
    Gradient,
    compiled,
    jitted,
    matmul_call,
    matmul_rate,
    memory,
    own_peak,
    problem,
    rematerialised,
    timings,
    training_steps,
)
from rich.console import Console
from rich.table import Table

import ep_jax as ep
from ep_jax import diagnostics
from ep_jax.benchmark import spec_of_named
from ep_jax.files import write_json
from ep_jax.gradients.feedforward import feedforward_gradient
from ep_jax.phases import PRECISIONS
from ep_jax.presets import PRESETS, Config
from ep_jax.provenance import provenance

Network = Literal["mnist", "cifar10_vgg5"]
NETWORKS: tuple[Network, ...] = get_args(Network)
METHODS: dict[str, tuple[str, Gradient]] = {
    "backprop": ("_backprop", feedforward_gradient),
    "EP, rate": ("_rate", ep.ep_gradient),
    "EP, spiking": ("", ep.ep_gradient),
    "BPTT, rate, rematerialised": ("_rate_bptt", rematerialised),
    "BPTT, rate": ("_rate_bptt", ep.bptt_gradient),
}
"""Each method's preset, after the name of the network, and its gradient. Those that need least
memory come first: a device tells the peak of all so far."""
SWEEPS = (10, 100)
"""Sweeps of each phase at which the memory of a gradient is asked for."""
QUICK = {"batch": 4, "channels": 2, "hidden": 4}
"""What is left of a network for a look."""


@dataclass(frozen=True)
class Arguments:
    """What an accelerator is worth."""

    out: Path
    """Folder for accelerator.json."""
    networks: tuple[Network, ...] = NETWORKS
    """Presets that are measured."""
    repeats: int = 5
    """Timed calls of each case."""
    minutes: float = 9.0
    """No case begins later than this; what is left out is told."""
    quick: bool = False
    """A look: tiny networks, 2 calls, few cases."""


@dataclass(frozen=True)
class Case:
    """A training step to measure."""

    network: Network
    method: str
    batch: int
    precision: str
    microbatch: int | None = None


def config_of(network: Network, method: str, quick: bool) -> Config:
    """The run that a method trains a network by."""
    config = PRESETS[f"{network}{METHODS[method][0]}"]
    if not quick:
        return config
    return replace(
        config,
        batch=QUICK["batch"],
        channels=(QUICK["channels"],) * len(config.channels),
        hidden=(QUICK["hidden"],) * len(config.hidden),
    )


def cases(networks: tuple[Network, ...], quick: bool) -> list[Case]:
    """All methods as the presets are; then one thing is varied at a time. None comes twice."""
    return list(dict.fromkeys(_cases(networks, quick)))


def _cases(networks: tuple[Network, ...], quick: bool) -> Iterator[Case]:
    varied = ("EP, rate",) if quick else ("EP, rate", "EP, spiking", "backprop")
    for network in networks:
        config = config_of(network, "EP, rate", quick)
        usual, precision = config.batch, config.phases.precision
        for method in METHODS:
            yield Case(network, method, usual, precision)
        batches = (2 * usual,) if quick else (64, 256, 1024)
        for method in () if quick else varied:
            for batch in batches:
                yield Case(network, method, batch, precision)
            for other in PRECISIONS:
                yield Case(network, method, usual, other)
        parts = (usual,) if quick else (64, 256)
        for method in varied:
            if method != "backprop":  # its states are few
                for part in parts:
                    yield Case(network, method, batches[-1], precision, part)


def measure(case: Case, arguments: Arguments) -> dict[str, Any]:
    """Time and memory of a training step, or why the device refused it."""
    jax.clear_caches()  # programs of the cases before hold memory
    quick = arguments.quick
    config, gradient = config_of(case.network, case.method, quick), METHODS[case.method][1]
    config = replace(config, phases=replace(config.phases, precision=case.precision))
    if case.microbatch is not None:
        gradient = functools.partial(gradient, microbatch=case.microbatch)
    steps = 2 if quick else 4
    row = asdict(case)
    try:
        program = training_steps(config, gradient, case.batch, steps=steps)
        row |= {"compile_seconds": program.compile_seconds, **memory(program.made)}
        row["device_peak"] = own_peak(program)
        repeats = 2 if quick else arguments.repeats
        timing = timings({"step": program}, repeats, warmup=1)["step"]
    except jax.errors.JaxRuntimeError as error:  # a batch that does not fit is an answer, too
        return row | {"error": str(error).partition("\n")[0]}
    row |= {name: value / steps for name, value in timing._asdict().items()}
    return row | {"images_per_second": case.batch / row["seconds"]}


def sweeps(networks: tuple[Network, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """Temporaries of a gradient at two numbers of sweeps: only compiled."""
    for network in networks:
        for method in ("EP, rate", "BPTT, rate") if quick else METHODS:
            if method == "backprop":  # it has no sweeps
                continue
            config, gradient = config_of(network, method, quick), METHODS[method][1]
            spec = spec_of_named(config)
            params = jax.eval_shape(lambda spec=spec: ep.init_params(jax.random.key(0), spec))
            xs = jax.ShapeDtypeStruct((config.batch, *spec.input_shape), jnp.float32)
            ys = jax.ShapeDtypeStruct((config.batch,), jnp.int32)
            for count in SWEEPS:
                phases = replace(config.phases.without_stragglers(), free=count, nudged=count)
                made, seconds = compiled(jitted(gradient), params, spec, xs, ys, phases)
                yield {
                    "network": network,
                    "method": method,
                    "batch": config.batch,
                    "sweeps": count,
                    "compile_seconds": seconds,
                    **memory(made),
                }


def agreement(quick: bool) -> list[dict[str, Any]]:
    """Cosine and relative error of EP's gradient in each precision, layer by layer.

    Against the same sweeps in float64 on the CPU; the network is that of the preset mnist_rate.
    Without stragglers: which examples they are could depend on rounding. Empty where JAX was told
    to leave the CPU alone.
    """
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        return []
    config = config_of("mnist", "EP, rate", quick)
    spec = spec_of_named(config)
    phases = replace(config.phases.without_stragglers(), limit=None)
    params, xs, ys = jax.device_get(problem(spec, 4 if quick else 16))
    gradient = jitted(ep.ep_gradient)
    with jax.enable_x64(True), jax.default_device(cpu):
        doubled = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, xs))
        exact = jax.device_get(gradient(doubled[0], spec, doubled[1], ys, phases)[0])
    found = []
    for precision in PRECISIONS:
        grads, _ = gradient(params, spec, xs, ys, replace(phases, precision=precision))
        with jax.enable_x64(True), jax.default_device(cpu):
            told = diagnostics.compare(jax.device_get(grads), exact)
        found.append(
            {
                "precision": precision,
                "cosine": np.asarray(told.cosine).tolist(),
                "relative_error": np.asarray(told.relative_error).tolist(),
            }
        )
    return found


def run(arguments: Arguments) -> dict[str, Any]:
    """Measure everything, write it, return it."""
    began, quick = time.monotonic(), arguments.quick
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"quick": quick, "rows": [], "left_out": []} | provenance()

    def write() -> None:
        found["seconds"] = time.monotonic() - began
        write_json(arguments.out / "accelerator.json", found)

    size = 256 if quick else 4096
    for precision in PRECISIONS:
        timing = timings({"product": matmul_call(size, precision)}, arguments.repeats)["product"]
        found.setdefault("matmul_rate", {})[precision] = matmul_rate(timing, size)
    found["agreement"] = agreement(quick)
    write()
    for case in cases(arguments.networks, quick):
        if time.monotonic() - began > 60 * arguments.minutes:
            found["left_out"].append(asdict(case))
        else:
            found["rows"].append(measure(case, arguments))
        write()
    found["sweeps"] = []
    if not found["left_out"]:
        for row in sweeps(arguments.networks, quick):
            found["sweeps"].append(row)
            write()
    return found


def table(found: dict[str, Any]) -> Table:
    """What a reader wants to see."""
    rates = ", ".join(f"{n} {r / 1e12:.1f}" for n, r in found["matmul_rate"].items())
    made = Table(title=f"training steps on {found['device']}; a product, TFLOP/s: {rates}")
    for column in ("network", "method", "precision"):
        made.add_column(column)
    for column in ("batch", "part", "ms", "images/s", "temporary, MiB", "peak, MiB", "compile, s"):
        made.add_column(column, justify="right")
    for row in found["rows"]:
        told = [row["network"], row["method"], row["precision"], str(row["batch"])]
        told.append(str(row["microbatch"] or "–"))
        if "error" in row:
            made.add_row(*told, row["error"][:40])
            continue
        made.add_row(
            *told,
            f"{1e3 * row['seconds']:.2f}",
            f"{row['images_per_second']:.0f}",
            *("–" if row[n] is None else f"{row[n] / 2**20:.0f}" for n in MEMORY),
            f"{row['compile_seconds']:.1f}",
        )
    return made


MEMORY = ("temporary", "device_peak")


def main() -> None:
    """Measure, print, write."""
    Console().print(table(run(tyro.cli(Arguments, description=__doc__))))


if __name__ == "__main__":
    main()
