"""What trained networks would cost on hardware, as the tables of their model cards.

    python experiments/hardware.py --weights pretrained/mnist pretrained/mnist_weak
    python experiments/hardware.py --weights runs/mnist --energies int8

Nothing is computed but the counts: spikes are those of the result file beside the weights (of the
test images in the free phase, of the last epoch's training images in the nudged one), sweeps those
of the phases, of which a straggler makes more. With a tolerance they are the most there can be.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from common import command

import ep_jax as ep
from ep_jax.hardware import FLOAT32, FLOAT32_DRAM, INT8, HardwareCost, hardware_cost, recorded
from ep_jax.tables import markdown

ENERGIES = {"float32": FLOAT32, "float32_dram": FLOAT32_DRAM, "int8": INT8}
HEAD = ("of an image", "MACs, 10⁶", "ACs, 10⁶", "words moved, 10⁶", "words held, 10³", "µJ")
TITLES = {
    "inference": "inference",
    "ep": "learning by EP",
    "bptt": "learning by BPTT",
    "backprop": "learning by feed-forward backprop",
}


@dataclass(frozen=True)
class Arguments:
    """What trained networks would cost on hardware."""

    weights: tuple[Path, ...]
    """Folders of trainings, or shipped weights."""
    energies: Literal["float32", "float32_dram", "int8"] = "float32"
    """Energies of single operations, see ep_jax/hardware.py."""


def cost_of(folder: Path, energies: str) -> HardwareCost:
    """The cost of a network that lies in a folder, from what its result file says of it."""
    _, spec, phases = ep.load_weights(folder)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    sent = result.get("last_epoch", {}).get("spikes_nudged_per_layer")  # older ones do not tell
    info = recorded(phases, result["spikes_per_neuron"], sent)
    return hardware_cost(spec, info, phases, ENERGIES[energies])


def table(cost: HardwareCost) -> str:
    """A cost as Markdown."""
    rows = []
    for name, title in TITLES.items():
        found = getattr(cost, name)
        if found is not None:
            counts = (found.macs / 1e6, found.acs / 1e6, found.moved / 1e6, found.held / 1e3)
            rows.append((title, *(f"{n:.1f}" for n in counts), f"{1e6 * found.joules:.0f}"))
    return markdown(HEAD, rows)


def main() -> None:
    """Print them."""
    with command():
        arguments = tyro.cli(Arguments, description=__doc__)
        for folder in arguments.weights:
            print(f"{folder}\n\n{table(cost_of(folder, arguments.energies))}")


if __name__ == "__main__":
    main()
