"""How Sphinx builds these pages: `make docs`."""

from __future__ import annotations

import mixbits

project = "mixbits"
author = copyright = "the authors of mixbits"
release = version = mixbits.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = [
    "myst.xref_missing",  # links to code, recipes and results lead to files of the repository, not to pages
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"

html_theme = "furo"
html_title = f"mixbits {release}"
