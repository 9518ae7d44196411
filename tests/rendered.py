"""The rendered book that the tests of pages and browser look at: $TILT_HTML if it is named, else built from ROOT."""

import os
from pathlib import Path

import nbformat
import yaml

from tiltlib.files import ROOT

GIVEN = os.environ.get("TILT_HTML")
HTML = Path(GIVEN) if GIVEN else ROOT / "_build" / "html"
HOME = HTML.parent.parent  # the project that the book was built from


def pages() -> list[str]:
    """Every page of the table of contents, e.g. book/intro."""
    toc = yaml.safe_load((HOME / "_toc.yml").read_text())
    return [toc["root"]] + [entry["file"] for part in toc["parts"] for entry in part["chapters"]]


def cells(page: str) -> list[tuple[str, str]]:
    """The source of a page: (kind of cell, text)."""
    path = HOME / f"{page}.ipynb"
    if path.exists():
        return [(cell.cell_type, cell.source) for cell in nbformat.read(path, 4).cells]
    return [("markdown", (HOME / f"{page}.md").read_text())]
