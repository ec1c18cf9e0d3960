"""The tools: faults are found wherever their text is, and tables are tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import mutants
import pytest
import robustness_tables

from ep_jax.tables import markdown


def test_every_fault_has_its_place() -> None:
    """A text that was edited, or that occurs twice: its mutant would change nothing, or the wrong
    place.
    """
    texts = mutants.sources(mutants.ROOT / "ep_jax")
    for mutant in mutants.MUTANTS.values():
        assert mutant.old != mutant.new
        mutants.place(mutant, texts)


def test_faults_survive_a_renaming(tmp_path: Path) -> None:
    """All modules in another folder, under other names."""
    package = tmp_path / "package"
    for number, file in enumerate(mutants.sources(mutants.ROOT / "ep_jax")):
        moved = package / "inner" / f"module{number}.py"
        moved.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, moved)
    mutant = mutants.MUTANTS["nudge_sign"]
    before = mutants.sources(package)
    changed = mutants.mutate(mutant, package)
    assert changed.parent.name == "inner"
    after = mutants.sources(package)
    differing = [file for file in before if before[file] != after[file]]
    assert differing == [package / changed]
    assert mutant.new in after[package / changed]


def test_a_text_that_is_gone_or_ambiguous(tmp_path: Path) -> None:
    """It is told before hours of testing."""
    mutant = mutants.Mutant("a fault", "old text", "new text", "test_x.py")
    for times in (0, 2):
        (tmp_path / "a.py").write_text("old text\n" * times)
        with pytest.raises(ValueError, match=f"'old text' {times} times; expected once"):
            mutants.mutate(mutant, tmp_path)


def test_tables() -> None:
    """A bar in a cell ends no column."""
    assert markdown(("a", "b"), [(1, "x|y")]) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n"
    row = {"fault": "no feedback", "file": "network.py", "caught_by": "tests/test_dynamics.py::t"}
    lines = robustness_tables.mutants({"rows": {"n": row, "m": row | {"caught_by": None}}})
    assert "| no feedback | `network.py` | `test_dynamics.py::t` |" in lines
    assert "| no feedback | `network.py` | **not caught** |" in lines
