"""How Sphinx builds the documentation: ``make docs``."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes

import ep_jax

HOME = Path(__file__).parent.parent
sys.path.insert(0, str(HOME / "experiments"))

import frontier  # noqa: E402 - of this repository
import recurrence  # noqa: E402
from results_table import table  # noqa: E402

project = "ep_jax"
author = "The ep_jax authors"
copyright = "2026, The ep_jax authors"
release = version = version_of("ep_jax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # formulas without the network
]
exclude_patterns = ["_build"]
source_suffix = {".md": "myst-nb"}

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "substitution"]
measured = recurrence.results(HOME / "results" / "recurrence")
myst_substitutions = {
    "results_table": table(HOME / "results" / "table"),
    "recurrence_table": recurrence.summary(measured),
    "recurrence_sweeps": recurrence.more_sweeps(measured),
    **frontier.tables(HOME / "results" / "frontier"),
}
myst_heading_anchors = 3

# Only the notebooks, which name a kernel, are executed, and only where they changed.
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 900
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# A name in backticks is linked where there is something of that name; see `resolve`.
default_role = "py:obj"
nitpick_ignore_regex = [
    # Other projects' names, and types that are no part of the interface.
    (r"py:.*", r"(jax|jaxlib|numpy|np|optax|flax|nnx|rich|matplotlib)\..*"),
    (r"py:.*", r"(collections|os|pathlib|typing)\..*"),
    (r"py:obj", r"ep_jax\.__version__"),
    (r"py:class", r"ep_jax\.(.*\._\w+|network\.Edge)"),
]

html_theme = "sphinx_book_theme"
html_title = "ep_jax"
html_context = {"default_mode": "auto"}
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
html_static_path = ["_static"]
html_css_files = ["ep_jax.css"]
templates_path: list[str] = []


def resolve(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Find the target of a name in backticks that is none in its own module.

    A plain name in small letters that nothing is called by is an argument or a field: it is shown
    as code.
    """
    if node.get("refdomain") != "py" or node.get("reftype") not in ("obj", "exc"):
        return None
    name = node["reftarget"]
    if name in ep_jax.__all__ or not name.islower():
        node["refspecific"] = True  # in whatever module it is
        domain = env.get_domain("py")
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)
    return content if name.isidentifier() else None


def link(app: Any, page: Any) -> None:
    """Link the names of the library that a page shows as code, so that a wrong one fails."""
    for code in list(page.findall(nodes.literal)):
        name = code.astext()
        inside = isinstance(code.parent, (addnodes.pending_xref, nodes.reference))
        if re.fullmatch(r"ep_jax(\.\w+)+", name) and not inside:
            known = {"refdomain": "py", "reftype": "obj", "reftarget": name, "refexplicit": False}
            known |= {"refdoc": app.env.docname, "refwarn": True}
            code.replace_self(addnodes.pending_xref("", code.deepcopy(), **known))


def describe_attribute(
    app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]
) -> None:
    """Keep a field's first sentence: napoleon takes what is before a colon as a type."""
    if what in ("attribute", "data", "property") and lines:
        lines[:0] = ["..", ""]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", resolve)
    app.connect("doctree-read", link)
    app.connect("autodoc-process-docstring", describe_attribute, priority=400)
