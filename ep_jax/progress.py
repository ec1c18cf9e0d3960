"""What a training run shows while it goes on, and at its end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ep_jax.extras import extra
from ep_jax.loop import Record
from ep_jax.network import NetworkSpec
from ep_jax.presets import Config
from ep_jax.tables import spaced

with extra("cli"):
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column, Table
    from rich.text import Text

Report: TypeAlias = Callable[[int, int, str], None]


class RunConsole(Console):
    """A console that a run outlives: where its reader goes away, the run goes on in silence."""

    def on_broken_pipe(self) -> None:
        """Instead of ending the program."""
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):  # what is still in a buffer has no reader
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a text as it is: names that users gave may look like markup."""
    console.print(text, style=style, markup=False, emoji=False, soft_wrap=True)


@contextlib.contextmanager
def progress(console: Console, epochs: int, dispatches: int) -> Iterator[Report]:
    """A progress bar on a terminal; elsewhere a line a quarter of an epoch, fit for a log file.

    A file that is told to show colours (FORCE_COLOR) is no terminal: nothing there can be erased.
    """
    if not (console.is_terminal and console.file.isatty()):

        def line(epoch: int, done: int, text: str) -> None:
            if done * 4 // dispatches > (done - 1) * 4 // dispatches:
                say(console, f"epoch {epoch}/{epochs}  {done}/{dispatches}  {text}")

        yield line
        return
    columns = (
        TextColumn("epoch {task.fields[epoch]}", table_column=Column(min_width=11, no_wrap=True)),
        BarColumn(8),
        TimeRemainingColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiled", total=epochs * dispatches, epoch=f"1/{epochs}")

        def move(epoch: int, done: int, text: str) -> None:
            completed = (epoch - 1) * dispatches + done
            bar.update(task, completed=completed, description=text, epoch=f"{epoch}/{epochs}")
            if done == dispatches:  # the bar forgets, and may be too narrow for all of it
                say(console, f"epoch {epoch}/{epochs}  {text}")

        yield move


def _shown(name: str, value: float | None, unit: str = "", spec: str = ".3g") -> str:
    return "" if value is None else f"{name}{value:{spec}}{unit}"


def describe(record: Record) -> str:
    """A record in a line; that of an epoch has the validation error and the radius as well."""
    return (
        f"loss {record['loss']:.4f}  error {record['error']:.2f} %  "
        f"residual {record['mean_residual']:.1e}"
        + _shown("+", record.get("mean_residual_nudged"), spec=".1e")
        + f"  unsettled {100 * record['unsettled']:.1f}"
        + _shown("+", _percent(record.get("unsettled_nudged")), spec=".1f")
        + f" %  spikes {record['spikes_free']:.2f}+{record['spikes_nudged']:.2f}"
        + _shown("  capped ", record.get("links_capped"), " links", ".1f")
        + _shown("  limited ", _percent(record.get("limited")), " %", ".1f")
        + _shown("  val ", record.get("val_error"), " %")
        + _shown("  radius ", (record.get("radius") or {}).get("largest"), spec=".2f")
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


_METHODS = {
    "ep": "Equilibrium Propagation",
    "bptt": "back-propagation through time",
    "implicit": "implicit differentiation",
}
_SHORT = {"ep": "EP", "bptt": "BPTT", "backprop": "backprop"}


def summary(config: Config, dataset: str, spec: NetworkSpec, result: Record, out: Path) -> Table:
    """The result as a table."""
    validation = result["val_error"][-1]
    spikes = spaced(result["spikes_per_neuron"])
    method = _METHODS[config.gradient]
    title = Text(f"{dataset}: {type(config.neuron).__name__}, {method}")
    table = Table(title=title, min_width=60)
    table.add_column("")
    table.add_column("result", justify="right")
    table.add_row("test error", f"{result['test_error']:.2f} %")
    table.add_row("test error at 4x the sweeps", f"{result['test_error_4x']:.2f} %")
    if validation is not None:
        table.add_row("validation error, last epoch", f"{validation:.2f} %")
    table.add_row("spikes per neuron and image, by layer", spikes)
    heard = result["recurrence"]
    share = spaced(heard["share"])
    radius = f"{heard['radius_mean']:.2f}, {heard['radius_largest']:.2f}"
    errors = [heard[name] for name in ("error", "error_cut", "error_other")]
    table.add_row(
        "feedback, share of each layer's state that it makes", f"{spec.feedback:g}; {share}"
    )
    table.add_row("spectral radius, mean and largest", radius)
    table.add_row(
        "validation error; feedback cut; another image's",
        "; ".join(f"{error:.2f} %" for error in errors),
    )
    for name, cost in result["hardware"].items():
        what = "an inference" if name == "inference" else f"learning an image by {_SHORT[name]}"
        table.add_row(f"{what}, estimated for 45 nm", f"{1e6 * cost['joules']:.3g} µJ")
    nudged = f" + {config.phases.nudged} nudged" if config.gradient == "ep" else ""
    table.add_row("sweeps", f"{config.phases.free} free{nudged}")
    table.add_row("layers", " - ".join(str(s) for s in map(np.prod, spec.state_shapes)))
    table.add_row("seconds an epoch", f"{result['seconds_per_epoch']:.1f}")
    table.add_row("written to", Text(str(out)))
    return table
