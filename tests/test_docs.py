"""The documentation says what is true: its code runs, its numbers are the results', no name misses.

What Sphinx itself checks (links, references, notebooks' outputs) is `make docs`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import results_table

import ep_jax as ep

HOME = Path(__file__).parent.parent
DOCS = HOME / "docs"
README = (HOME / "README.md").read_text()
PUBLIC_MODULES = ("diagnostics", *ep._LATER)
HOW_TO = sorted(
    [DOCS / "start.md", *(DOCS / "how_to").glob("*.md"), *(DOCS / "concepts").glob("*.md")]
)


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def own_names(module: str) -> Iterator[str]:
    """What a module defines for others, and not what it imports."""
    found = importlib.import_module(f"ep_jax.{module}")
    for name, value in vars(found).items():
        if not name.startswith("_") and getattr(value, "__module__", None) == found.__name__:
            yield name


# The README.


@pytest.mark.slow
def test_the_readmes_code_prints_what_it_shows() -> None:
    """A fault in the example, or in what it shows, would otherwise greet every new user."""
    (code,), (shown,) = blocks(README, "python"), blocks(README, "text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == shown


def test_the_readmes_table_is_that_of_the_results() -> None:
    """New results without ``results_table.py --short`` would leave the README behind."""
    assert results_table.short_table(HOME / "results" / "table") in README


def test_the_counts_of_a_study_are_those_of_its_results() -> None:
    page = (DOCS / "studies" / "forming.md").read_text()
    for file in (HOME / "results" / "forming").glob("*/forming.json"):
        for counts, images in zip(
            json.loads(file.read_text())["counts"].values(),
            ("whole", "a square hidden"),
            strict=True,
        ):
            wrong = (str(count) for name, count in counts.items() if name != "images")
            assert f"| `{file.parent.name}` | {images} | {' | '.join(wrong)} |" in page


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 900


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_a_page_outside_the_site_lead_somewhere(page: str) -> None:
    """Sphinx checks the links of the other pages."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (HOME / page).read_text())
    local = [link for link in links if not link.startswith("http")]
    assert not [link for link in local if not (HOME / link).exists()]


# The reference.


def documented() -> str:
    """Directives of the reference's pages with a whole name each."""
    pages = (page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    return re.sub(r":: (?!ep_jax\.)(\w+)", r":: ep_jax.\1", "\n".join(pages))


@pytest.mark.parametrize("name", ep.__all__)
def test_the_reference_has_every_name(name: str) -> None:
    """A name that is exported and on no page is one that no user finds."""
    if name in PUBLIC_MODULES:
        assert f".. automodule:: ep_jax.{name}\n" in documented()
        return
    module = getattr(getattr(ep, name), "__module__", "ep_jax")
    places = rf"(?:ep_jax|{re.escape(module)}|ep_jax\.network|ep_jax\.layers)"
    assert re.search(rf"\.\. auto\w+:: {places}\.{name}\n", documented())


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_the_reference_has_every_name_of_the_modules(module: str) -> None:
    """Autodoc lists the members that have a docstring, so the others would miss."""
    assert re.search(rf"\.\. automodule:: ep_jax\.{module}\n(?!   :no-members:)", documented())
    found = importlib.import_module(f"ep_jax.{module}")
    source = inspect.getsource(found)
    described = set(re.findall(r'^(\w+)(?:: .*)? = .*(?:\n[ )].*)*\n"""', source, re.MULTILINE))
    assert not [
        name
        for name in own_names(module)
        if name not in described and not inspect.getdoc(getattr(found, name))
    ]


@pytest.mark.parametrize("module", [*PUBLIC_MODULES, ""])
def test_no_parameter_is_undocumented(module: str) -> None:
    """Every parameter of a public function is named in its docstring, or in one it refers to."""
    found = importlib.import_module(f"ep_jax.{module}" if module else "ep_jax")
    names = list(own_names(module)) if module else ep.__all__
    functions = {n: f for n in names if inspect.isfunction(f := getattr(found, n))}
    missing = {
        name: lost
        for name, function in functions.items()
        if (lost := [p for p in inspect.signature(function).parameters if not said(p, function)])
    }
    assert not missing


def said(parameter: str, function: object) -> bool:
    """Whether a docstring names a parameter, or another's, to which it refers for its arguments."""
    text = inspect.getdoc(function) or ""
    refers = "Arguments: see" in text or "Args and example: as for" in text
    return refers or re.search(rf"\b{parameter}\b", text) is not None


# The pages.


@pytest.mark.slow
@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks one after the other, as a reader would run them; an included block comes first."""
    text = page.read_text()
    if "include} ../README.md" in text:
        text = README + text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(HOME / "pretrained")
    names: dict[str, object] = {}
    for block in blocks(text, "python"):
        exec(compile(block, page.name, "exec"), names)
