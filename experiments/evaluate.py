"""Test error of saved weights, at their own sweeps and at four times as many: ``ep-jax evaluate``.

python experiments/evaluate.py --weights runs/digits --dataset digits --json out.json
"""

from __future__ import annotations

import sys

from ep_jax.cli import command


def main() -> None:
    """Evaluate, print and write."""
    command("evaluate", sys.argv[1:], "evaluate.py", __doc__)


if __name__ == "__main__":
    main()
