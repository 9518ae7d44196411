"""Builds the book: executes chapters in a staging copy, writes the generated parts of pages, renders the HTML.

The source tree is never written to, except by `refresh`, which stores fresh outputs in the notebooks. Everything made
lies under _build: executed/ (kept while a chapter's stamp still fits), stage/ (what is rendered), html/ (the book).
"""

import argparse
import html
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import yaml

from tiltlib import claims, runner
from tiltlib.files import ROOT, write_atomically

KERNELS = 2  # chapters executed side by side
LIMIT = 600  # seconds for one chapter; a default run should take far less
MARK = re.compile(r"<!-- tilt: (\w+) -->")


# ---- chapters, executed or not ------------------------------------------------------------------------------------


def fresh(path: Path, root: Path) -> bool:
    """Whether an executed notebook's stamp fits the source of the chapter as it is now."""
    if not path.exists():
        return False
    source = runner.chapters(root)[path.stem]
    try:
        return runner.read(path).metadata.tilt.stamp == runner.stamp(source, runner.read(source), root)
    except (AttributeError, ValueError, nbformat.reader.NotJSONError):
        return False


def execute(names, target_of, root: Path = ROOT) -> list[str]:
    """Execute chapters side by side, each in a process of its own with a time limit; returns what went wrong.

    target_of: name -> where the executed notebook goes, written only when the chapter closed its ledger.
    """
    names, done = list(names), []
    cores = os.cpu_count() or 1
    environment = runner.kernel_environment(min(KERNELS, cores))

    def one(name):
        command = [sys.executable, "-m", "tiltlib.book", "worker", name, str(target_of(name)), "--root", str(root)]
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            said = process.communicate(timeout=LIMIT)[1].strip()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            said = f"{name}: stopped after {LIMIT} s"
        done.append(name)
        failed = process.returncode != 0
        took = "" if failed else f" in {runner.read(target_of(name)).metadata.tilt.executed.seconds:.0f} s"
        print(f"  [{len(done)}/{len(names)}] {name}{' FAILED' if failed else ' executed'}{took}", flush=True)
        last = said.splitlines()[-1] if said else "no message"
        return (last if last.startswith(f"{name}:") else f"{name}: {last}") if failed else None

    with ThreadPoolExecutor(min(KERNELS, cores)) as pool:
        return [problem for problem in pool.map(one, names) if problem]


def worker(name: str, target: Path, root: Path) -> None:
    """Execute one chapter in an empty folder, so that nothing lands in the book; runs in a process of its own."""
    source = runner.find(name, root)
    folder = root / "_build" / "kernels" / name
    folder.mkdir(parents=True, exist_ok=True)
    notebook = runner.execute(source, folder / "running.ipynb", {}, folder, "off", root)
    shutil.rmtree(folder)
    write_atomically(target, (nbformat.writes(notebook) + "\n").encode())


# ---- staging and rendering ----------------------------------------------------------------------------------------


def stage(root: Path, notebook_of) -> Path:
    """A copy of the book in _build/stage with the given notebooks and the generated parts of pages filled in."""
    at = root / "_build" / "stage"
    shutil.rmtree(at, ignore_errors=True)
    left_out = shutil.ignore_patterns("*.ipynb", "_static", "models", "results")
    shutil.copytree(root / "book", at / "book", ignore=left_out)
    if (root / "book" / "_static").exists():
        shutil.copytree(root / "book" / "_static", at / "_static")
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root / name, at / name)
    notebooks = {}
    for name, source in runner.chapters(root).items():
        notebooks[name] = runner.read(notebook_of(name))
        target = at / source.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebooks[name], target)
    pages = Pages(root, notebooks)
    for page in (at / "book").rglob("*.md"):
        text = page.read_text()
        filled = MARK.sub(lambda found: getattr(pages, found.group(1))(), text)
        if filled != text:
            page.write_text(filled)
    return at


def render(root: Path, at: Path) -> Path:
    """HTML of a staged book. Raises Refused on any warning: Jupyter Book alone exits 0 when a page failed before."""
    built = root / "_build" / "jupyter-book"
    shutil.rmtree(built, ignore_errors=True)  # cached doctrees hide warnings, and pages that are gone would stay
    command = [Path(sys.executable).parent / "jupyter-book", "build", at, "--path-output", built, "-W", "-n"]
    done = subprocess.run([*map(str, command), "--keep-going", "-q"], capture_output=True, text=True)
    log = done.stdout + done.stderr
    made = built / "_build" / "html"
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    files = [toc["root"]] + [c["file"] for part in toc.get("parts", [toc]) for c in part.get("chapters", [])]
    missing = [f for f in files if not (made / f"{f}.html").exists()]
    damaged = [f for f in files if f not in missing and 'class="problematic"' in (made / f"{f}.html").read_text()]
    if done.returncode or missing or damaged:
        log = re.sub(r"\x1b\[[0-9;]*m", "", log)
        lines = [line for line in log.splitlines() if "WARNING" in line or "ERROR" in line or "rror:" in line]
        told = "\n".join(lines or log.splitlines()[-20:])
        raise runner.Refused(f"rendering failed; pages missing: {missing}; damaged: {damaged}\n{told}")
    final = root / "_build" / "html"
    shutil.rmtree(final, ignore_errors=True)
    shutil.copytree(made, final)
    return final


def build(root: Path = ROOT) -> Path:
    """`make book`: execute what changed, then render those fresh outputs. Raises Refused, the other chapters done."""
    executed = root / "_build" / "executed"

    def target_of(name):
        return executed / runner.chapters(root)[name].relative_to(root)

    stale = [name for name in runner.chapters(root) if not fresh(target_of(name), root)]
    print(f"executing {len(stale)} of {len(runner.chapters(root))} chapters", flush=True)
    problems = execute(stale, target_of, root)
    if problems:
        raise runner.Refused("\n".join(["these chapters failed:", *problems]))
    print("rendering", flush=True)
    return render(root, stage(root, target_of))


def html_only(root: Path = ROOT) -> Path:
    """`make html`: render the outputs stored in the notebooks."""
    return render(root, stage(root, lambda name: runner.chapters(root)[name]))


def refresh(names=(), root: Path = ROOT) -> None:
    """`make refresh`: execute stale chapters (or the named ones) and store their outputs in the source notebooks."""
    known = runner.chapters(root)
    chosen = [runner.find(name, root).stem for name in names] or [n for n, p in known.items() if not fresh(p, root)]
    print(f"refreshing {', '.join(chosen) or 'nothing: all outputs are fresh'}", flush=True)
    problems = execute(chosen, lambda name: known[name], root)
    if problems:
        raise runner.Refused("\n".join(["these chapters failed:", *problems]))


# ---- generated parts of pages -------------------------------------------------------------------------------------


class Pages:
    """What a page's marker `<!-- tilt: NAME -->` is replaced by: the method NAME. Reads only executed notebooks."""

    def __init__(self, root: Path, notebooks: dict):
        self.root, self.notebooks = root, notebooks
        self.sources = yaml.safe_load((root / "book" / "statements.yml").read_text())
        self.paths = runner.chapters(root)
        self.made: dict[str, list] = {}  # id -> [(chapter, claim)]
        for name, notebook in notebooks.items():
            for claim in runner.ledger_of(notebook, name)["claims"]:
                self.made.setdefault(claim["id"], []).append((name, claim))
        unknown = set(self.made) - {f"{key}:{id}" for key, source in self.sources.items() for id in source["ids"]}
        if unknown:
            raise runner.Refused(f"claimed, but not listed in book/statements.yml: {', '.join(sorted(unknown))}")

    def link(self, name: str) -> str:
        return f"[{name}](/{self.paths[name].relative_to(self.root).with_suffix('').as_posix()})"

    def executed(self, name: str) -> dict:
        """When, where and how long a chapter was executed, by the runner's stamp; empty before the first time."""
        return self.notebooks[name].metadata.get("tilt", {}).get("executed", {})

    def ledger(self) -> str:
        """Every statement of every source: where it is checked, how, and how far off."""
        parts = []
        for key, source in self.sources.items():
            ids = {id: f"{key}:{id}" for id in source["ids"]}
            shown = sum(full in self.made for full in ids.values())
            parts.append(f"## {source['title']}\n\n{source['cite']} {shown} of {len(ids)} checked.\n")
            rows = ["| id | statement | where | how | deviation / tolerance | control |", "|---|---|---|---|---|---|"]
            for id, full in ids.items():
                place = _cell(source["ids"][id]["place"])
                if full not in self.made:
                    rows.append(f"| {full} | {place} | {_cell(source['ids'][id].get('reason', 'not yet'))} | | | |")
                for name, claim in self.made.get(full, []):
                    control = f"{'rejected' if claim['control']['rejected'] else 'ACCEPTED'}: {_cell(_control(claim))}"
                    how = f"{claim['kind'].replace('_', ' ')}, {_cell(claim['reason'])}"
                    said = f"*{place}*: {_cell(claim['statement'])}"
                    where = f"{self.link(name)}, {_cell(self.executed(name).get('device', 'not executed'))}"
                    rows.append(f"| {full} | {said} | {where} | {how} | {_ratio(claim)} | {control} |")
            parts.append(":::{div} tilt-wide\n" + "\n".join(rows) + "\n:::\n")
        return "\n".join(parts)

    def ledger_count(self) -> str:
        """One sentence: how many statements are checked."""
        listed = sum(len(source["ids"]) for source in self.sources.values())
        total = sum(len(made) for made in self.made.values())
        return f"{len(self.made)} of {listed} listed statements are checked, by {total} claims, each with its control."

    def errata(self) -> str:
        """What is wrong as printed, what it should be, and the number that shows it."""
        parts = []
        for key, source in self.sources.items():
            wrong_ones = {id: entry for id, entry in source["ids"].items() if "printed" in entry}
            parts += [f"## {source['title']}\n"] if wrong_ones else []
            for id, entry in wrong_ones.items():
                parts.append(f"### {id}: {entry['place']}\n\n**Printed.** {entry['printed']}\n")
                parts.append(f"**Should be.** {entry['should']}\n")
                for name, claim in self.made.get(f"{key}:{id}", []):
                    numbers = f"measured {claims._show(claim['measured'])}, expected {claims._show(claim['expected'])}"
                    wrong = f"{_control(claim)}: {claims._show(claim['control']['measured'])}"
                    shown = f"{claim['statement']} ({numbers}; control, {wrong})"
                    parts.append(f"**Shown in {self.link(name)}.** {shown}.\n")
                if f"{key}:{id}" not in self.made:
                    parts.append("*Not yet shown by a chapter.*\n")
        return "\n".join(parts)

    def status(self) -> str:
        """What was executed when, on what, for how long, and the longer runs."""
        rows = ["| chapter | claims | executed | seconds | device | Python |", "|---|---|---|---|---|---|"]
        for name, notebook in self.notebooks.items():
            ran = self.executed(name)
            count = len(runner.ledger_of(notebook, name)["claims"])
            row = [self.link(name), count, *(ran.get(k, "?") for k in ("date", "seconds", "device", "python"))]
            rows.append("| " + " | ".join(map(str, row)) + " |")
        return "\n".join(rows)

    def results(self) -> str:
        """The longer runs whose tables the chapters draw."""
        import json

        rows = ["| chapter | parameters | device | minutes | date |", "|---|---|---|---|---|"]
        for path in sorted((self.root / "book" / "results").glob("**/metrics.json")):
            run = json.loads(path.read_text())
            sizes = ", ".join(f"{k} = {v}" for k, v in run["parameters"].items())
            row = [run["chapter"], _cell(sizes), run["device"], f"{run['wall_seconds'] / 60:.1f}", run["date"]]
            rows.append("| " + " | ".join(row) + " |")
        return ":::{div} tilt-wide\n" + "\n".join(rows) + "\n:::" if len(rows) > 2 else "None yet."

    def runtimes(self) -> str:
        """One line per chapter: link, title's promise, seconds."""
        rows = ["| chapter | what it shows | default run |", "|---|---|---|"]
        for name, notebook in self.notebooks.items():
            title = notebook.cells[0].source.split("\n")[0].lstrip("# ")
            rows.append(f"| {self.link(name)} | {_cell(title)} | {self.executed(name).get('seconds', '?')} s |")
        return "\n".join(rows)


def _cell(text) -> str:
    """Text inside a cell of a Markdown table, with characters that HTML or the table would swallow escaped."""
    return html.escape(str(text), quote=False).replace("|", "\\|").replace("*", "\\*").replace("\n", " ")


def _control(claim) -> str:
    return claim["control"]["statement"]


def _ratio(claim) -> str:
    deviation, tolerance = claim["deviation"], claim["tolerance"]
    return f"{deviation:.1e} / {tolerance:.1e}" if deviation is not None else f"∞ / {tolerance:.1e}"


def main(arguments: list[str] | None = None) -> int:
    """`python -m tiltlib.book book|html|refresh`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tiltlib.book", description="Build the book.")
    parser.add_argument("what", choices=("book", "html", "refresh", "worker"))
    parser.add_argument("names", nargs="*", help="chapters to refresh")
    parser.add_argument("--root", type=Path, default=ROOT)
    given = parser.parse_args(arguments)
    try:
        if given.what == "worker":
            worker(given.names[0], Path(given.names[1]), given.root)
        elif given.what == "refresh":
            refresh(given.names, given.root)
        else:
            made = build(given.root) if given.what == "book" else html_only(given.root)
            print(f"done: {made / 'index.html'}")
    except runner.Refused as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
