"""The documentation's site: `make docs` builds it and serves it, `make docs-check` only builds it."""

from __future__ import annotations

import tomllib
from pathlib import Path

_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"

project = "Millpond"
version = release = tomllib.loads(_PYPROJECT.read_text())["project"]["version"]

extensions = ["myst_parser"]
myst_heading_anchors = 3  # GitHub's anchors, so that a link works there and here
highlight_language = "text"  # of a block that names no language

html_theme = "furo"
html_title = f"Millpond {version}"
html_show_copyright = False
