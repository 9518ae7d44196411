"""The stored notebooks: executed in order, tidy, described, fresh; and no file that names a folder of some machine."""

import ast
import base64
import re
import struct
import subprocess
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise

import nbformat
import pytest
import yaml

from tiltlib import claims, figures, runner
from tiltlib.files import ROOT

TAGS = {
    "parameters",
    "hide-input",
    "hide-output",
    "remove-cell",
    "remove-input",
    "nbval-check-output",
    "nbval-ignore-output",
    "nbval-skip",
    "raises-exception",
}
LINES = 25  # a code cell; what is longer belongs in tiltlib
BYTES = 1_000_000  # a notebook
PIXELS = round(1.01 * figures.WIDTH * 160)  # a wider picture is scaled down, and its text with it
# An absolute path of a machine: not part of a longer path or address, not this pattern itself.
MACHINE = re.compile(r"(?<![\w.~})/-])/(work|root|home|tmp|Users)(/|\b(?=[\"'`\s)]))")

chapter = pytest.mark.parametrize("name", runner.chapters())


@cache
def notebook(name):
    return runner.read(runner.chapters()[name])


def code_cells(name):
    return [cell for cell in notebook(name).cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def outputs(name):
    """(cell, output) of every code cell."""
    return [(cell, output) for cell in code_cells(name) for output in cell.outputs]


def short(cell):
    return cell.source.splitlines()[0][:60]


@cache
def tracked():
    """The text files that git has or would take; all files where there is no git."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.splitlines()
    paths = [ROOT / n for n in names] if done.returncode == 0 and names else [*ROOT.glob("*"), *ROOT.glob("[bt]*/**/*")]
    texts = {}
    for path in paths:
        try:
            texts[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # not text, a folder, or deleted a moment ago
            continue
    return texts


def test_every_page_of_the_table_of_contents_exists():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]] + [toc["root"]]
    missing = [file for file in files if not any((ROOT / f"{file}.{end}").exists() for end in ("md", "ipynb"))]
    assert not missing
    assert len({file.split("/")[-1] for file in files}) == len(files), "chapters are called by their last name"
    known = {f"{file}.ipynb" for file in files}
    stray = [path for path in tracked() if path.endswith(".ipynb") and path.startswith("book/") and path not in known]
    assert not [path for path in stray if not path.startswith("book/results/")], "notebooks that no page shows"


@chapter
def test_it_is_executed_in_order_and_without_errors(name):
    nbformat.validate(notebook(name))
    cells = [cell for cell in code_cells(name) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    failed = [short(c) for c, o in outputs(name) if o.output_type == "error" and "raises-exception" not in tags(c)]
    assert not failed
    assert not [short(c) for c, o in outputs(name) if o.get("name") == "stderr"], "a cell wrote to stderr"


@chapter
def test_its_outputs_are_fresh(name):
    told = notebook(name).metadata.get("tilt", {})
    assert told.get("stamp") == runner.stamp(runner.chapters()[name], notebook(name)), "stale: run `make refresh`"
    ran = told["executed"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", ran["date"]) and re.fullmatch(r"3\.\d+\.\d+\S*", ran["python"])
    assert 0 < ran["seconds"] < 600 and ran["device"]


@chapter
def test_its_cells_are_tidy(name):
    cells = code_cells(name)
    assert {tag for cell in notebook(name).cells for tag in tags(cell)} <= TAGS
    assert not [short(cell) for cell in cells if len(cell.source.splitlines()) > LINES]
    assert not [k for k, cell in enumerate(cells) if not cell.source.strip()], "empty code cells"
    for cell in cells:
        ast.parse(cell.source)  # plain Python, no magics: the stamp reads it
    assert "seed" in [parameter.name for parameter in runner.parameters(notebook(name))]
    assert notebook(name).cells[0].source.startswith("# ")
    assert runner.chapters()[name].stat().st_size < BYTES
    ids = [cell["id"] for cell in notebook(name).cells]
    assert len(set(ids)) == len(ids)


class Images(HTMLParser):
    """The alt texts of the images in a piece of HTML, None where there is none."""

    def __init__(self, text):
        super().__init__()
        self.alts = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.alts += [dict(attributes).get("alt")] if tag == "img" else []


def trivial(alt) -> bool:
    """Whether an alternative text says nothing: missing, a word or two, a file name."""
    return not isinstance(alt, str) or len(alt.split()) < 5 or bool(re.search(r"\.(png|svg|jpe?g)\b", alt))


@chapter
def test_every_picture_is_described_and_of_the_book_s_width(name):
    described = []
    for cell, output in outputs(name):
        data = output.get("data", {})
        if any(kind.startswith("image/") for kind in data):
            shown = [o.output_type for o in cell.outputs if o.output_type != "stream"]
            assert len(shown) == 1, f"{short(cell)}: a picture and more; end the last line with a semicolon"
            described.append((short(cell), cell.metadata.get("mystnb", {}).get("image", {}).get("alt")))
        described += [(short(cell), alt) for alt in Images(data.get("text/html", "")).alts]
        if "image/png" in data:
            (width,) = struct.unpack(">I", base64.b64decode(data["image/png"])[16:20])
            assert width <= PIXELS, f"{short(cell)}: {width} pixels; something sticks out of the axes"
    assert not [source for source, alt in described if trivial(alt)]
    stated = [alt for _, alt in described]
    assert len(set(stated)) == len(stated), "two pictures have the same description"
    assert stated, "a chapter without a picture"


@chapter
def test_its_html_asks_for_nothing_from_another_host(name):
    pages = [(short(c), "".join(o.get("data", {}).get("text/html", ""))) for c, o in outputs(name)]
    assert not [source for source, text in pages if re.search(r"https?:|[\"'(]//\w", text)]
    assert not [short(c) for c, o in outputs(name) if "application/javascript" in o.get("data", {})]


@chapter
def test_it_closes_its_ledger(name):
    last = notebook(name).cells[-1]
    assert last.cell_type == "code" and tags(last) == {"nbval-check-output"}
    ledger = runner.ledger_of(notebook(name), name)
    assert "".join(o.text for o in last.outputs) == claims.closing_line(name, len(ledger["claims"])) + "\n"
    shown = [cell for cell, output in outputs(name) if claims.MIME in output.get("data", {})]
    assert shown == [code_cells(name)[-2]] and not tags(shown[0]), "the table is the untagged cell before the last"
    assert all(claim["holds"] and claim["control"]["rejected"] for claim in ledger["claims"])


@chapter
def test_it_claims_only_what_is_listed(name):
    sources = yaml.safe_load((ROOT / "book" / "statements.yml").read_text())
    listed = {f"{key}:{id}" for key, source in sources.items() for id in source["ids"]}
    made = {claim["id"] for claim in runner.ledger_of(notebook(name), name)["claims"]}
    assert not made - listed


def test_every_statement_has_a_place_and_every_erratum_both_sides():
    sources = yaml.safe_load((ROOT / "book" / "statements.yml").read_text())
    assert [str(k) for k in range(1, 40)] == [id for id in sources["anthology"]["ids"] if id.isdigit()]
    assert {f"B{k}" for k in range(1, 19)} <= set(sources["beyond"]["ids"])
    for key, source in sources.items():
        assert source["title"] and source["cite"]
        for id, entry in source["ids"].items():
            assert claims.ID.fullmatch(f"{key}:{id}") and entry["place"].strip()
            assert ("printed" in entry) == ("should" in entry)


def test_no_file_names_a_folder_of_some_machine():
    found = {
        f"{path}: {text[max(0, hit.start() - 20) : hit.end() + 20]!r}"
        for path, text in tracked().items()
        for hit in MACHINE.finditer(text)
    }
    assert not found


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ('open("/{}/main/x")'.format("work"), True),
        ("at /{}/.cache".format("root"), True),
        ("cd /{}\n".format("tmp"), True),
        ("~/home/x", False),
        ("a/home/b", False),
        ("https://host.org/home/", False),
        ("and/or", False),
        ("/workers", False),
    ],
)
def test_the_pattern_for_machine_paths(text, caught):
    assert bool(MACHINE.search(text)) == caught


def test_headings_do_not_skip_a_level():
    for path, text in tracked().items():
        if path.startswith("book/") and path.endswith(".md"):
            levels = [len(hashes) for hashes in re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.S), re.M)]
            assert levels and levels[0] == 1, path
            assert all(below - above <= 1 for above, below in pairwise(levels)), path
