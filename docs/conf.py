"""Sphinx configuration: ``sphinx-build -W docs docs/_build/html``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import sphinx_autosummary_accessors

import xchmv2

HERE = Path(__file__).parent

project = "xchmv2"
author = "The xchmv2 developers"
copyright = author
release = version = xchmv2.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_autosummary_accessors",
]
templates_path = [sphinx_autosummary_accessors.templates_path]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "attrs_block"]
myst_heading_anchors = 3


os.environ.pop("MPLBACKEND", None)  # a kernel draws into its notebook
# An unchanged notebook does not run again; XCHMV2_DOCS_EXECUTE=off runs none.
nb_execution_mode = os.environ.get("XCHMV2_DOCS_EXECUTE", "cache")
nb_execution_cache_path = str(HERE / "_build" / "notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 600
# Interactive maps have an HTML form besides the one of holoviews' own front end.
suppress_warnings = ["mystnb.unknown_mime_type"]
# Progress bars of finished cells carry no information.
nb_output_stderr = "remove"

autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

html_theme = "pydata_sphinx_theme"
html_title = "xchmv2"
html_static_path = ["_static"]
html_css_files = ["xchmv2.css"]
html_theme_options: dict[str, Any] = {
    "navbar_align": "left",
    "show_toc_level": 2,
    "header_links_before_dropdown": 6,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
html_sidebars = {"index": []}
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Sphinx reads only docs/, while users look for notebooks at the top of the repository.
_NOTEBOOKS = HERE / "notebooks"
_NOTEBOOKS.mkdir(exist_ok=True)
for _path in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
    _copy = _NOTEBOOKS / _path.name
    if not _copy.exists() or _copy.read_bytes() != _path.read_bytes():
        shutil.copy(_path, _copy)
