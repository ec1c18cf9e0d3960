"""Train a convolutional spiking network by Equilibrium Propagation.

    python experiments/train.py --preset digits --out runs/digits
    python experiments/train.py --preset mnist --epochs 1 --out runs/mnist --devices 2

A preset is a complete run; every field of it can be overridden. See ep_jax/presets.py.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ep_jax.health import DivergedError
from ep_jax.presets import PRESETS, Config
from ep_jax.run import StoppedError, divide_cpu, train


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
    """The arguments of the command line, with the defaults of the preset they name."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="digits", choices=PRESETS)
    preset = first.parse_known_args(words)[0].preset
    default = Arguments(out=tyro.MISSING, config=PRESETS[preset], preset=preset)
    return tyro.cli(Arguments, args=words, default=default)


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
