"""Train a convolutional spiking network by Equilibrium Propagation: ``ep-jax train``.

    python experiments/train.py --preset digits --out runs/digits
    python experiments/train.py --preset mnist --epochs 1 --out runs/mnist --devices 2
    python experiments/train.py --neuron sigma_delta --neuron.lam 0.5 --out runs/sigma_delta

A preset is a complete run; every field of it can be overridden. --list shows the presets. --neuron
is rate, sigma_delta, delta_code, bernoulli, integrate_fire, or a class of your own, module:Class;
--optimizer is muon, adamw or sgd. --help shows the settings of those that are named before it.
"""

from __future__ import annotations

import sys

from ep_jax.cli import command


def main() -> None:
    """Train."""
    command("train", sys.argv[1:], "train.py", __doc__)


if __name__ == "__main__":
    main()
