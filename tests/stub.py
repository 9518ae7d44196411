"""A miniature project for the tests of the runner and the book: a table of contents and chapters of a few cells.

Its chapters import only what needs no torch, so a kernel starts in a second.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tiltlib.files import ROOT

PARAMETERS = "seed: int = 0  # random seed\nn: int = 2  # candidates\n"
CHECK = """from tiltlib import claims
ledger = claims.Ledger("{name}")
ledger.check("own:1", "{body}", {body}, {value}, 1e-12, "round-off", control=("one more", {value} + 1))
ledger.table()
"""


def notebook(name: str, *cells: str, parameters=PARAMETERS, body="1 + 1", value="2", close=True):
    """A chapter: title, parameters, further cells, a ledger with the claim that `body` is `value`, the closing cell."""
    check = CHECK.format(name=name, body=body, value=value)
    made = [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    made += [new_code_cell(cell) for cell in (*cells, check)]
    if close:
        made.append(new_code_cell("ledger.close()", metadata={"tags": ["nbval-check-output"]}))
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return new_notebook(cells=[new_markdown_cell(f"# The chapter {name}"), *made], metadata=metadata)


def project(root: Path, *, library=False, **chapters) -> Path:
    """A project at `root` with chapters name -> notebook; `library`: with a copy of tiltlib that a test may change."""
    folder = root / "book" / "stub"
    folder.mkdir(parents=True)
    for name, made in chapters.items():
        nbformat.write(made, folder / f"{name}.ipynb")
    listed = [{"file": f"book/stub/{name}"} for name in chapters]
    toc = {"format": "jb-book", "root": "book/intro"}
    toc |= {"parts": [{"caption": "All", "chapters": listed}]} if listed else {}
    (root / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
    (root / "requirements.txt").write_text("numpy==2.4.0\n")
    (root / "book" / "intro.md").write_text("# A miniature book\n\nThe ledger:\n\n<!-- tilt: ledger -->\n")
    (root / "book" / "references.bib").write_text("@book{nobody, title={Nothing}, author={Nobody, N.}, year={2025}}\n")
    own = {"title": "Own statements", "cite": "None.", "ids": {"1": {"place": "the only one"}}}
    (root / "book" / "statements.yml").write_text(yaml.safe_dump({"own": own}))
    shutil.copy(ROOT / "_config.yml", root)
    shutil.copytree(ROOT / "book" / "_static", root / "book" / "_static")
    if library:
        shutil.copytree(ROOT / "tiltlib", root / "tiltlib", ignore=shutil.ignore_patterns("__pycache__"))
    return root


def python(root: Path, *arguments: str, start=False, **environment):
    """`python -m ...` in the project, its own tiltlib first; finished (with stdout and stderr), or just started."""
    names = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    names.pop("TILT_MEMO", None)
    command = [sys.executable, "-m", *arguments]
    if start:
        return subprocess.Popen(command, cwd=root, env=names, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.run(command, cwd=root, env=names, capture_output=True, text=True)
