"""The shape of the package: a file imports only from floors below it (or from its own folder), and ruff is content."""

import subprocess
import sys

import pytest

from tiltlib import runner
from tiltlib.files import ROOT

FLOORS = [
    {"files", "law", "chance", "paths"},
    {"bestofn", "enumeration", "quasi", "resampling", "worlds"},
    {"rewards"},
    {"gaussian_values", "tensor_rewards", "values", "pool"},
    {"steer"},
    {"tune"},
    {"claims", "figures", "run"},
    {"runner"},
    {"book"},
]
FILES = sorted((ROOT / "tiltlib").rglob("*.py"))


def unit(path) -> str:
    """A file's module, or the folder of the package that it lies in."""
    return path.relative_to(ROOT / "tiltlib").parts[0].removesuffix(".py")


def floor(name: str) -> int:
    found = [k for k, names in enumerate(FLOORS) if name in names]
    assert found, f"tiltlib/{name} has no floor: give it one in FLOORS and in the page on the design"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_from_lower_floors(path):
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    imported = {unit(file) for file in runner._imports(path.read_text(), package, ROOT)} - {"__init__", unit(path)}
    if unit(path) == "__init__":
        assert not imported
    for name in imported:
        assert floor(name) < floor(unit(path)), f"{path.name} imports {name}"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_content(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "tiltlib", "tests"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
