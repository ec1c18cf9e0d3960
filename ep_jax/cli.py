"""The command line: ``ep-jax train | evaluate | report | benchmark``.

Each command is a record of arguments and a function that takes it. A script that does no more than
one of them calls `command`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ep_jax.checkpoint import load_weights
from ep_jax.data import load
from ep_jax.devices import divide_cpu
from ep_jax.evaluation import evaluate
from ep_jax.extras import extra
from ep_jax.files import make_folder, own_path, write_json
from ep_jax.health import DivergedError
from ep_jax.logs import logging_to
from ep_jax.loop import Record
from ep_jax.presets import PRESETS, Config, about, config_of
from ep_jax.processes import join
from ep_jax.progress import say
from ep_jax.provenance import provenance
from ep_jax.run import StoppedError, train

with extra("cli"):
    import tyro
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Train:
    """Train a convolutional spiking network by Equilibrium Propagation."""

    out: Path
    """Folder for metrics, checkpoints, result, weights, figures and report."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    """The run: defaults are the preset's."""
    preset: str = "digits"
    """Complete run to start from; --list shows them."""
    resume: bool = False
    """Go on from the last checkpoint in the folder."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the records of epochs go as well; each is an extra."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes; srun and mpirun tell by themselves."""
    processes: int | None = None
    """How many processes train together."""
    process: int | None = None
    """Which of them this is, from 0."""
    list: bool = False
    """List the presets and do nothing else."""


@dataclass(frozen=True)
class Evaluate:
    """Test error of saved weights, at their own sweeps and at four times as many."""

    weights: Path
    """Folder of a training, or shipped weights."""
    dataset: str
    """digits, mnist, fashion_mnist or cifar10."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """File to write the result to."""
    data_dir: Path | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""


@dataclass(frozen=True)
class Report:
    """Write report.html for a finished run: one page with its figures, tables and settings."""

    run: Path
    """Folder of the run."""
    data_dir: Path | None = None
    """Where the data lie; by default TFDS_DATA_DIR."""


@dataclass(frozen=True)
class Benchmark:
    """Time and memory of a preset's gradient on this machine: EP, BPTT and backprop."""

    preset: str = "digits"
    """The run whose network and phases are measured."""
    batches: tuple[int, ...] = (64,)
    """Images in a batch; several are measured one after the other."""
    repeats: int = 10
    """Timed calls of each case."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """File to write the numbers to."""


Command = Train | Evaluate | Report | Benchmark


# What each command does.


def run_train(arguments: Train) -> None:
    """Train, and log where that is asked for."""
    join(arguments.coordinator, arguments.processes, arguments.process)
    divide_cpu(arguments.config.devices, arguments.processes or 1)
    out = own_path("out", arguments.out)
    with contextlib.ExitStack() as stack:
        logged = [
            stack.enter_context(logging_to(name, out, arguments.config)) for name in arguments.log
        ]

        def on_epoch(record: Record) -> None:
            for log in logged:
                log(record)

        train(arguments.config, out, resume=arguments.resume, on_epoch=on_epoch)


def run_evaluate(arguments: Evaluate) -> None:
    """Evaluate, print and write."""
    file = _new_file(arguments.json_file)
    params, spec, phases = load_weights(arguments.weights)
    data = load(arguments.dataset, data_dir=arguments.data_dir)
    result = evaluate(params, spec, phases, data)
    if file is not None:
        written = {"weights": str(arguments.weights), "dataset": arguments.dataset}
        write_json(file, written | result | provenance())
    print(json.dumps(result, indent=2))


def run_report(arguments: Report) -> None:
    """Write the page and say where it is."""
    from ep_jax.report import report  # Matplotlib is an extra

    path = report(arguments.run, data_dir=arguments.data_dir)
    say(Console(), f"written to {path}")


def run_benchmark(arguments: Benchmark) -> None:
    """Measure, print and write."""
    from ep_jax.benchmark import benchmark  # compiles nothing, but loads all gradients

    if arguments.preset not in PRESETS:
        raise ValueError(f"preset is {arguments.preset!r}; expected one of {', '.join(PRESETS)}")
    file, config = _new_file(arguments.json_file), PRESETS[arguments.preset]
    made_by = provenance()
    title = f"a gradient of {arguments.preset} on {made_by['device']}"
    table = Table("batch", "method", title=title)
    for name in ("ms (quartiles)", "of backprop", "MiB", "compile, s"):
        table.add_column(name, justify="right")
    rows = list(benchmark(config, arguments.batches, arguments.repeats))
    for row in rows:
        temporary = row["temporary"]
        table.add_row(
            str(row["batch"]),
            row["method"],
            f"{1e3 * row['seconds']:.2f} ({1e3 * row['low']:.2f}–{1e3 * row['high']:.2f})",
            f"{row['of_backprop']:.1f}",
            "–" if temporary is None else f"{temporary / 2**20:.1f}",
            f"{row['compile_seconds']:.1f}",
        )
    Console().print(table)
    if file is not None:
        write_json(file, {"preset": arguments.preset, "rows": rows} | made_by)


def _new_file(path: Path | None) -> Path | None:
    """The file that --json asks for, which is not there yet."""
    if path is None:
        return None
    file = own_path("json", path)
    if file.exists():
        raise FileExistsError(f"json is {str(file)!r}, which is there already; expected a new file")
    make_folder("json", file.parent)
    return file


# Words become arguments.


def list_presets() -> str:
    """The presets, one a line."""
    width = max(map(len, PRESETS))
    return "\n".join(f"{name:{width}}  {about(config)}" for name, config in PRESETS.items())


def _training_default(words: Sequence[str], prog: str) -> tuple[Train, list[str]]:
    """The arguments of `Train` as some words name them, and the other words.

    A preset, a neuron model and an optimiser decide which other arguments there are. A run that
    goes on begins with its own configuration.
    """
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, metavar="NAME")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--out")
    first.add_argument("--list", action="store_true")
    for name in ("neuron", "optimizer"):
        first.add_argument(f"--{name}")
    for name in ("layers", "skips"):
        first.add_argument(f"--{name}", nargs="*")
    named, rest = first.parse_known_args(words)
    if named.list:
        print(list_presets())
        sys.exit(0)
    out = None if named.out is None else own_path("out", named.out)
    if named.resume and out is not None and not named.preset and (out / "config.json").exists():
        config = config_of(out)
    else:
        config = PRESETS[named.preset or "digits"]
    own = {name: getattr(named, name) for name in ("neuron", "optimizer", "layers", "skips")}
    config = dataclasses.replace(config, **{k: v for k, v in own.items() if v is not None})
    default = Train(
        out=tyro.MISSING if out is None else out,
        config=config,
        preset=named.preset or "digits",
        resume=named.resume,
    )
    return default, rest


COMMANDS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "train": (Train, run_train),
    "evaluate": (Evaluate, run_evaluate),
    "report": (Report, run_report),
    "benchmark": (Benchmark, run_benchmark),
}
"""Each command's arguments, and what it does."""


def parse(words: Sequence[str], prog: str = "ep-jax") -> Command:
    """The arguments of a command line that begins with the name of a command.

    Example:
        >>> parse(["benchmark", "--batches", "16", "64"]).batches
        (16, 64)
    """
    words = list(words)
    default = Train(out=tyro.MISSING, config=PRESETS["digits"])
    if words[:1] == ["train"]:
        default, rest = _training_default(words[1:], f"{prog} train")
        words = ["train", *rest]
    return tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train", default=default)]  # type: ignore
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Benchmark, tyro.conf.subcommand("benchmark")],
        args=words,
        prog=prog,
        description="Equilibrium Propagation for convolutional spiking convergent RNNs. "
        "--help-verbose explains every argument.",
        compact_help=True,
    )


def main(words: Sequence[str]) -> None:
    """Parse, do it, and say in one line what was wrong where the input was."""
    with told_in_a_line("ep-jax"):
        arguments = parse(words)
        for kind, action in COMMANDS.values():
            if isinstance(arguments, kind):
                action(arguments)


def command(name: str, words: Sequence[str], prog: str, description: str | None) -> None:
    """One command by itself, for a script.

    Args:
        name: one of `COMMANDS`.
        words: its arguments.
        prog: what the script is called.
        description: what it says of itself.
    """
    kind, action = COMMANDS[name]
    with told_in_a_line(prog):
        default, words = (
            _training_default(words, prog) if name == "train" else (tyro.MISSING_NONPROP, words)
        )
        action(tyro.cli(kind, args=words, default=default, prog=prog, description=description))


@contextlib.contextmanager
def told_in_a_line(prog: str) -> Iterator[None]:
    """Errors of input as one line, and the exit status of a run that was asked to stop.

    Modules of one's own, which arguments may name, are looked for in the current folder as well.

    Args:
        prog: what the program is called.
    """
    if "" not in sys.path:
        sys.path.append("")  # last: a file there must not hide a module of a package
    try:
        yield
        sys.stdout.flush()
    except StoppedError as stop:
        print(f"{prog}: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal)  # as a shell reports it
    except BrokenPipeError:  # the reader went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, TypeError, OSError, ImportError, DivergedError) as error:
        sys.exit(f"{prog}: error: {error}")
