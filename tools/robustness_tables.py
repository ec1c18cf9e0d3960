"""The tables of docs/robustness.md, from what kills.py, matrix.py and mutants.py found.

python tools/robustness_tables.py --results results/robustness
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ep_jax.tables import markdown


@dataclass(frozen=True)
class Arguments:
    """The tables of docs/robustness.md."""

    results: Path
    """Folder with kills.json, matrix.json and mutants.json."""


def kills(found: dict[str, Any]) -> str:
    """A line for each moment: while a checkpoint was being written, and at any other."""
    moments = {"while a checkpoint was being written": True, "at another moment": False}
    rows = []
    for moment, in_write in moments.items():
        here = [row["equal"] for row in found["rows"] if row["in_write"] is in_write]
        rows.append((moment, str(len(here)), str(sum(here))))
    return markdown(("killed", "runs", "bit-equal in the end"), rows)


def matrix(found: dict[str, Any]) -> str:
    """A line for each way to run the suite."""
    rows = found["rows"].values()
    return markdown(
        ("rule", "versions", "result"),
        [(row["rule"], row["versions"], row["summary"]) for row in rows],
    )


def mutants(found: dict[str, Any]) -> str:
    """A line for each fault."""
    rows = found["rows"].values()
    return markdown(
        ("fault", "file", "caught by"),
        [(row["fault"], f"`{row['file']}`", _test(row["caught_by"])) for row in rows],
    )


def _test(caught_by: str | None) -> str:
    """The test's name, without its folder."""
    return f"`{caught_by.removeprefix('tests/')}`" if caught_by else "**not caught**"


def main() -> None:
    """Print them."""
    results = tyro.cli(Arguments, description=__doc__).results
    for table in (kills, matrix, mutants):
        found = json.loads((results / f"{table.__name__}.json").read_text())
        print(table(found))


if __name__ == "__main__":
    main()
