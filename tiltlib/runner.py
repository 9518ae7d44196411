"""Runs chapters outside their kernel: parameters checked, freshness stamped, results written; the `tilt` command.

papermill executes; everything it would let pass is checked here first (an unknown name or a wrong type) or afterwards
(a run that ended without its closing line).
"""

import argparse
import ast
import contextlib
import datetime
import difflib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import nbformat
import yaml

from tiltlib import claims
from tiltlib.files import ROOT, write_atomically
from tiltlib.run import MIME

LIBRARIES = ("numpy", "scipy", "torch", "diffusers", "transformers", "peft")


class Refused(Exception):
    """A run that is not started, or whose outcome does not count; the message says why."""


# ---- chapters and their parameters ------------------------------------------------------------------------------


def chapters(root: Path = ROOT) -> dict[str, Path]:
    """Name -> notebook of every chapter, in the order of the table of contents."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    files = [entry["file"] for part in toc.get("parts", []) for entry in part["chapters"]]
    files += [entry["file"] for entry in toc.get("chapters", [])]
    paths = [root / f"{file}.ipynb" for file in files]
    return {path.stem: path for path in paths if path.exists()}


def find(name: str, root: Path = ROOT) -> Path:
    """The notebook of a chapter by its name. Raises Refused with the nearest names."""
    known = chapters(root)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or list(known)
        raise Refused(f"there is no chapter {name!r}; did you mean {', '.join(near)}?")
    return known[name]


def read(path: Path):
    return nbformat.read(path, as_version=4)


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: type = value  # help`."""

    name: str
    type: str
    value: object
    help: str


TYPES = {"int": int, "float": float, "bool": bool, "str": str}
TYPES |= {"list": list} | {f"list[{kind}]": list for kind in TYPES}


def parameters(notebook) -> list[Parameter]:
    """The typed parameters of a notebook. Raises Refused unless there is exactly one well-formed parameters cell."""
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise Refused(f"a chapter has one cell tagged parameters, this one has {len(cells)}")
    lines = cells[0].source.split("\n")
    try:
        nodes = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise Refused(f"the parameters cell is not Python: {error}") from None
    found = []
    for node in nodes:
        line = lines[node.lineno - 1]
        try:
            kind, value = ast.unparse(node.annotation), ast.literal_eval(node.value)
            help = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().split("#", 1)[1].strip()
        except (AttributeError, ValueError, IndexError):
            help = ""
        if not help:
            raise Refused(f"not of the form `name: type = literal  # help`: {line}")
        if kind not in TYPES or not _is(value, kind):
            raise Refused(f"the type is one of {', '.join(TYPES)} and fits the value: {line}")
        found.append(Parameter(node.target.id, kind, float(value) if kind == "float" else value, help))
    return found


def _is(value, kind: str) -> bool:
    if kind == "list":
        return type(value) is list and all(any(_is(item, each) for each in TYPES) for item in value)
    if kind.startswith("list["):
        return type(value) is list and all(_is(item, kind[5:-1]) for item in value)
    if kind == "float":
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # neither NaN nor infinite
    return type(value) is TYPES[kind]


def typed(known: list[Parameter], given: dict[str, str]) -> dict:
    """Texts from the command line as typed values. Raises Refused for an unknown name or a value of another type."""
    by_name = {p.name: p for p in known}
    values = {}
    for name, text in given.items():
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=3) or list(by_name)
            raise Refused(f"there is no parameter {name!r}; did you mean {', '.join(near)}?")
        kind, value = by_name[name].type, text
        if kind == "bool":
            value = {"true": True, "false": False}.get(text.lower())
        elif kind != "str":
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError):
                value = None
        if not _is(value, kind):
            raise Refused(f"{name} is of type {kind} (default {by_name[name].value!r}), got {text!r}")
        values[name] = float(value) if kind == "float" else value
    return values


# ---- freshness: what the outputs of a chapter depend on ------------------------------------------------------------


def _dump(node) -> str:
    """A syntax tree as text: no positions, no docstrings, and the same on every Python from 3.11 on."""
    if isinstance(node, ast.AST):
        fields = dict(ast.iter_fields(node))
        body = fields.get("body")
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                fields["body"] = body[1:]
        inner = ",".join(f"{name}={_dump(value)}" for name, value in fields.items() if value not in (None, []))
        if isinstance(node, ast.Constant):
            inner = repr(node.value)
        return f"{type(node).__name__}({inner})"
    if isinstance(node, list):
        return "[" + ",".join(_dump(item) for item in node) + "]"
    return repr(node)


def _is_table(node) -> bool:
    """Whether a statement is the literal table HOMES = {name: module} of a package that imports lazily."""
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "HOMES"


def _homes(path: Path) -> dict[str, str]:
    """The table HOMES of a package that imports lazily; empty where there is none."""
    tables = [ast.literal_eval(node.value) for node in ast.parse(path.read_text()).body if _is_table(node)]
    return tables[0] if tables else {}


def _imports(code: str, package: str, root: Path) -> set[Path]:
    """The files of tiltlib that this code imports directly; `package` resolves relative imports."""
    files = set()

    def add(module: str, names=()):
        parts = module.split(".")
        if parts[0] != "tiltlib":
            return
        for k in range(1, len(parts)):
            files.add(root / Path(*parts[:k]) / "__init__.py")
        base = root / Path(*parts)
        if base.with_suffix(".py").exists():
            files.add(base.with_suffix(".py"))
        elif base.is_dir():
            files.add(base / "__init__.py")
            homes = _homes(base / "__init__.py")
            for name in homes if names in ((), ["*"]) else names:
                inner = f"{module}.{name}"
                is_module = (base / f"{name}.py").exists() or (base / name).is_dir()
                add(inner if is_module else homes.get(name, ""))

    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*above, module]).strip(".")
            add(module, [alias.name for alias in node.names])
    return {file for file in files if file.exists()}


def closure(code: str, root: Path = ROOT) -> list[Path]:
    """Every file of tiltlib that this code imports, directly or not, sorted."""
    done, todo = set(), _imports(code, "", root)
    while todo:
        file = todo.pop()
        done.add(file)
        parts = file.relative_to(root).with_suffix("").parts
        todo |= _imports(file.read_text(), ".".join(parts[:-1]), root) - done
    return sorted(done)


def _code_cells(notebook) -> list[str]:
    return [c.source.strip() for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def code_hash(notebook, root: Path = ROOT, until: str | None = None) -> str:
    """Hash of the code cells, of the syntax trees of the files they import, and of the lock.

    until: take only the cells up to the one that contains this text, and of the files leave out what only draws and
    judges: that is what a published result depends on.
    """
    cells, left_out = _code_cells(notebook), ()
    if until is not None:
        last = next((k for k, cell in enumerate(cells) if until in cell), len(cells) - 1)
        cells, left_out = cells[: last + 1], ("figures.py", "claims.py")
    parts = list(cells)
    for file in closure("\n".join(cells), root):
        if file.name in left_out:
            continue
        tree = ast.parse(file.read_text())
        # a new entry in a lazy table makes nothing stale: what it leads to is in the closure where it is used
        tree.body = [node for node in tree.body if not _is_table(node)]
        parts += [file.relative_to(root).as_posix(), _dump(tree)]
    parts.append((root / "requirements.txt").read_text())
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]


def stamp(path: Path, notebook, root: Path = ROOT) -> str:
    """Hash of all that the outputs depend on: the code, and the data files the chapter reads.

    Those are its results (book/results/<chapter>) and the globs in the notebook's metadata, `tilt: {reads: [...]}`.
    """
    parts = [code_hash(notebook, root)]
    reads = [f"book/results/{path.stem}/**/metrics.json", *notebook.metadata.get("tilt", {}).get("reads", [])]
    for pattern in reads:
        for file in sorted(root.glob(pattern)):
            parts += [file.relative_to(root).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()]
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]


# ---- execution ---------------------------------------------------------------------------------------------------


def kernel_environment(kernels: int, **more) -> dict:
    """The environment for one of `kernels` kernels side by side: the cores shared out, and `more` on top."""
    threads = str(max(1, (os.cpu_count() or 1) // kernels))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, threads), "TOKENIZERS_PARALLELISM": "false", **more}


@contextlib.contextmanager
def _environment(**values):
    """Environment variables for the kernels started inside; as they were afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def execute(source: Path, target: Path, values: dict, folder: Path, memo: str, root: Path = ROOT):
    """Execute a notebook in `folder`, writing `target`; returns the executed notebook, outputs and stamp in place.

    memo: the folder for `run.memo`, or "off". The cell that papermill adds for `values` is kept.
    Raises Refused, naming cell and error, when a cell raises, and when the closing line or the ledger is missing.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    notebook = read(source)
    results = {name: code_hash(notebook, root, f'publish("{name}"') for name in _published_names(notebook)}
    mark = stamp(source, notebook, root)  # before: what is edited during the run was not what ran
    told = {"TILT_CODE": code_hash(notebook, root), "TILT_RESULT_CODE": json.dumps(results), "TILT_MEMO": memo}
    began = time.time()
    try:
        with _environment(**told):
            papermill.execute_notebook(
                source,
                target,
                values,
                cwd=folder,
                kernel_name="python3",
                progress_bar=False,
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # not a word on its transport and end
            )
    except PapermillExecutionError as error:
        said = error.evalue or error.traceback.strip().split("\n")[-1]
        said = "; ".join(said.splitlines())
        raise Refused(f"{source.stem}: cell [{error.exec_count}] raised {error.ename}: {said}") from None
    except DeadKernelError:
        begun = [c for c in read(target).cells if c.cell_type == "code" and c.metadata.papermill.start_time]
        raise Refused(f"{source.stem}: the kernel died in cell [{len(begun)}]; out of memory?") from None
    sources = iter(notebook.cells)
    notebook.cells = []
    for new in read(target).cells:
        injected = "injected-parameters" in new.metadata.get("tags", [])
        cell = new if injected else next(sources)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = new.outputs, new.execution_count
        if injected:
            cell.metadata.pop("papermill", None)
        notebook.cells.append(cell)
    ledger_of(notebook, source.stem)
    notebook.metadata.pop("papermill", None)
    notebook.metadata["tilt"] = dict(notebook.metadata.get("tilt", {})) | {
        "stamp": mark,
        "executed": {
            "date": datetime.date.today().isoformat(),
            "seconds": round(time.time() - began, 1),
            "python": platform.python_version(),
            "device": device(values),
        },
    }
    return notebook


def device(values: dict) -> str:
    """The device in words."""
    name = values.get("device", "cpu")
    if str(name).startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(name)
    return f"{os.environ.get('OMP_NUM_THREADS', os.cpu_count())} CPU thread(s), {platform.machine()}"


def outputs(notebook, mime: str) -> list:
    """Everything that the cells displayed under a MIME type."""
    found = [o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    return [data[mime] for data in found if mime in data]


def ledger_of(notebook, chapter: str) -> dict:
    """The ledger's data in an executed notebook. Raises Refused unless it is there once and its last cell closed it."""
    ledgers = outputs(notebook, claims.MIME)
    if len(ledgers) != 1:
        raise Refused(f"{chapter}: the run left {len(ledgers)} ledgers instead of one, so it did not finish")
    last = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()][-1]
    text = "".join(o.get("text", "") for o in last.outputs)
    if text.strip() != claims.closing_line(chapter, len(ledgers[0]["claims"])):
        raise Refused(f"{chapter}: the closing line is missing, so the run did not finish")
    return ledgers[0]


def _published_names(notebook) -> list[str]:
    calls = [
        node
        for cell in _code_cells(notebook)
        for node in ast.walk(ast.parse(cell))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "publish"
    ]
    return [node.args[0].value for node in calls if node.args and isinstance(node.args[0], ast.Constant)]


def run(chapter: str, given: dict[str, str], out: Path | None, root: Path = ROOT) -> Path:
    """`tilt run`: one chapter with parameters; returns the folder with executed.ipynb and metrics.json.

    Finished results of the same code and parameters are kept; unfinished work is redone except what `run.memo` kept.
    """
    source = find(chapter, root)
    notebook = read(source)
    known = parameters(notebook)
    values = typed(known, given)
    full = {p.name: p.value for p in known} | values
    address = hashlib.sha256(json.dumps({k: v for k, v in full.items() if k != "seed"}).encode()).hexdigest()[:12]
    out = Path(out) if out else Path("runs") / chapter / address / str(full.get("seed", 0))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / ".writable", b"")
        (out / ".writable").unlink()
    except OSError as error:
        raise Refused(f"cannot write into {out}: {error.strerror or error}") from None
    code, metrics = code_hash(notebook, root), out / "metrics.json"
    if metrics.exists():
        old = json.loads(metrics.read_text())
        if old["parameters"] == full and old["code_hash"] == code:
            print(f"{chapter}: already finished in {out}")
            return out
        metrics.unlink()
    memo = os.environ.get("TILT_MEMO") or str((out / "memo").resolve())
    began, running = time.time(), out / "running.ipynb"
    try:
        executed = execute(source, running, values, source.parent, memo, root)
    except Refused:
        if running.exists():
            os.replace(running, out / "failed.ipynb")
        raise
    ledger = ledger_of(executed, chapter)
    results = {}
    for item in outputs(executed, MIME):
        until = code_hash(notebook, root, f'publish("{item["name"]}"')
        results[item["name"]] = {"name": item["name"], "result": item["result"], "code": until}
    record = {
        "chapter": chapter,
        "parameters": full,
        "seed": full.get("seed"),
        "code_hash": code,
        "date": datetime.date.today().isoformat(),
        "device": executed.metadata["tilt"]["executed"]["device"],
        "wall_seconds": round(time.time() - began, 1),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "claims": ledger["claims"],
        "results": results,
    }
    nbformat.write(executed, running)
    os.replace(running, out / "executed.ipynb")
    write_atomically(metrics, json.dumps(record, indent=1).encode())
    shutil.rmtree(out / "memo", ignore_errors=True)  # finished: nothing is left to resume, or to look into
    (out / "failed.ipynb").unlink(missing_ok=True)
    print(f"{chapter}: finished in {record['wall_seconds']:.0f} s, {out / 'metrics.json'}")
    return out


# ---- the command -------------------------------------------------------------------------------------------------


def show_list(root: Path = ROOT) -> None:
    for name, path in chapters(root).items():
        print(f"{name}  ({path.relative_to(root)})")
        for p in parameters(read(path)):
            print(f"    {p.name}: {p.type} = {p.value!r}  {p.help}")


def show_ledger(root: Path = ROOT) -> None:
    """Every chapter's closing line from its stored outputs. Raises Refused when one is missing or stale."""
    problems = []
    for name, path in chapters(root).items():
        notebook = read(path)
        try:
            count = len(ledger_of(notebook, name)["claims"])
            fresh = notebook.metadata.get("tilt", {}).get("stamp") == stamp(path, notebook, root)
            print(claims.closing_line(name, count) + ("" if fresh else "  (stale: the code has changed since)"))
            problems += [] if fresh else [f"{name} is stale"]
        except Refused as error:
            problems.append(str(error))
    if problems:
        raise Refused("; ".join(problems))


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """The `tilt` command. Returns the exit code: 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="tilt", description="Run the chapters of the book.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the chapters and their parameters")
    one = commands.add_parser("run", help="execute one chapter with parameters")
    one._negative_number_matcher = re.compile(r"-.*\d")  # argparse takes -1e-3 for an option otherwise
    one.add_argument("chapter")
    one.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    one.add_argument("--out", type=Path, help="folder for executed.ipynb and metrics.json")
    commands.add_parser("ledger", help="every chapter's closing line")
    given = parser.parse_args(arguments)
    try:
        with contextlib.suppress(BrokenPipeError):
            if given.command == "list":
                show_list(root)
            elif given.command == "ledger":
                show_ledger(root)
            else:
                names = [name for name, _ in given.p]
                if len(set(names)) < len(names):
                    raise Refused("a parameter is given twice")
                run(given.chapter, dict(given.p), given.out, root)
    except Refused as error:
        print(f"tilt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
