"""Train a convolutional spiking network by Equilibrium Propagation.

    python experiments/train.py --preset digits --out runs/digits
    python experiments/train.py --preset mnist --epochs 1 --out runs/mnist --devices 2
    python experiments/train.py --neuron sigma_delta --neuron.lam 0.5 --out runs/sigma_delta

A preset is a complete run; every field of it can be overridden. See ep_jax/presets.py. --neuron is
rate, sigma_delta, delta_code, bernoulli, integrate_fire, or a class of your own, module:Class;
--optimizer is muon, adamw or sgd. --help shows the settings of those that are named before it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ep_jax.devices import divide_cpu
from ep_jax.health import DivergedError
from ep_jax.presets import PRESETS, Config
from ep_jax.run import StoppedError, train


@dataclass(frozen=True)
class Arguments:
    """Train a convolutional spiking network by Equilibrium Propagation."""

    out: Path
    """Folder for metrics, checkpoints, result, weights and figures."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    """The run: defaults are the preset's."""
    preset: str = "digits"
    """Complete run to start from; one of ep_jax.presets.PRESETS."""
    resume: bool = False
    """Go on from the last checkpoint in the folder."""


def parse(words: list[str]) -> Arguments:
    """The arguments of the command line, with the defaults of what they name.

    A preset, a neuron model and an optimiser decide which other arguments there are.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="digits", choices=PRESETS)
    for name in ("neuron", "optimizer"):
        first.add_argument(f"--{name}")
    for name in ("layers", "skips"):
        first.add_argument(f"--{name}", nargs="*")
    named, words = first.parse_known_args(words)
    parts = {k: v for k, v in vars(named).items() if k != "preset" and v is not None}
    config = dataclasses.replace(PRESETS[named.preset], **parts)
    default = Arguments(out=tyro.MISSING, config=config, preset=named.preset)
    return tyro.cli(Arguments, args=words, default=default, description=__doc__)


def main() -> None:
    """Parse, train, and say in one line what was wrong where the input was."""
    try:
        arguments = parse(sys.argv[1:])
        divide_cpu(arguments.config.devices)
        train(arguments.config, arguments.out, resume=arguments.resume)
    except StoppedError as stop:
        print(f"train.py: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal)  # as a shell reports it
    except (ValueError, TypeError, OSError, DivergedError) as error:
        sys.exit(f"train.py: error: {error}")


if __name__ == "__main__":
    main()
