"""``python -m ep_jax``, and the command ``ep-jax``."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line, or one line about the extra that it needs."""
    try:
        from ep_jax import cli
    except ModuleNotFoundError as error:
        sys.exit(f"ep-jax: error: {error}")
    cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
