"""How Sphinx builds the documentation: ``make docs``."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "ep_jax"
author = "The ep_jax authors"
copyright = "2026, The ep_jax authors"  # noqa: A001 - Sphinx reads this name
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
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "py:obj"  # names in backticks are linked where there is something to link to

html_theme = "sphinx_book_theme"
html_title = "ep_jax"
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
templates_path: list[str] = []
