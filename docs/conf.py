"""Sphinx's settings for these pages: `make docs` builds them, with warnings as errors.

The pages are Markdown (MyST), and read well without a build, too. Nothing of the packages is
imported: `docs/make_*.py` write the reference pages, and tests hold them to the code.
"""

import pathlib
import tomllib

_REPO = pathlib.Path(__file__).resolve().parents[1]
_PROJECT = tomllib.loads((_REPO / "pyproject.toml").read_text())["project"]

project = "m1_jax"
author = "the authors of m1_jax"
copyright = f"2026, {author}"

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["_build"]
smartquotes = False  # it makes one dash of the two before a flag
nitpicky = True  # a reference that leads nowhere is a warning, and `make docs` fails

myst_enable_extensions = ["dollarmath"]
# Links to headings, such as (serving.md#exactness), as GitHub makes them.
myst_heading_anchors = 4

html_theme = "furo"
html_title = "m1_jax"
html_show_sourcelink = True
pygments_style = "default"
