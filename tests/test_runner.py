"""The runner and the `tilt` command: what papermill would let pass, freshness stamps, results, memo.

The chapters here are stubs that import no torch; each kernel start costs about a second.
"""

import json
import os
import pickle
import re
from pathlib import Path

import nbformat
import pytest

from tests import stub
from tiltlib import files, run, runner

TYPED = """seed: int = 0  # random seed
lr: float = 0.1  # step size
flag: bool = False  # a switch
lrs: list[float] = [0.1]  # step sizes
model: str = "a # b"  # a folder or a name
"""
ECHO = """from tiltlib import run
run.publish("given", {"seed": seed, "types": [type(x).__name__ for x in (seed, lr, flag, lrs, model)],
                      "values": [lr, flag, lrs, model], "truth": bool(flag)})"""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.delenv("TILT_MEMO", raising=False)
    monkeypatch.delenv("TILT_CODE", raising=False)
    monkeypatch.delenv("TILT_RESULT_CODE", raising=False)


@pytest.fixture
def tilt(tmp_path, monkeypatch, capsys):
    """`tilt ...` in a project of one chapter: (exit code, stdout, stderr)."""
    root = stub.project(tmp_path / "project", echo=stub.notebook("echo", ECHO, parameters=TYPED))
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = runner.main([str(a) for a in arguments], root)
        return code, *capsys.readouterr()

    call.root = root
    return call


def replace_chapter(root, name, notebook):
    nbformat.write(notebook, root / "book" / "stub" / f"{name}.ipynb")


# ---- what is refused before any kernel starts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "ecko"], "no chapter 'ecko'; did you mean echo?"),
        (["run", "echo", "-p", "sed", "1"], "no parameter 'sed'; did you mean seed?"),
        (["run", "echo", "-p", "unlike", "1"], "did you mean seed, lr, flag, lrs, model?"),
        (["run", "echo", "-p", "seed", "1.0"], "seed is of type int (default 0), got '1.0'"),
        (["run", "echo", "-p", "seed", "one"], "seed is of type int"),
        (["run", "echo", "-p", "seed", "True"], "seed is of type int"),
        (["run", "echo", "-p", "seed", ""], "seed is of type int"),
        (["run", "echo", "-p", "seed", "{[]: 1}"], "seed is of type int"),
        (["run", "echo", "-p", "lr", "fast"], "lr is of type float"),
        (["run", "echo", "-p", "lr", "nan"], "lr is of type float"),
        (["run", "echo", "-p", "lr", "1e999"], "lr is of type float"),
        (["run", "echo", "-p", "lr", "True"], "lr is of type float"),
        (["run", "echo", "-p", "flag", "1"], "flag is of type bool"),
        (["run", "echo", "-p", "flag", "yes"], "flag is of type bool"),
        (["run", "echo", "-p", "lrs", "0.1"], "lrs is of type list"),
        (["run", "echo", "-p", "lrs", "(1, 2)"], "lrs is of type list"),
        (["run", "echo", "-p", "lrs", "['a']"], "lrs is of type list"),
        (["run", "echo", "-p", "seed", "1", "-p", "seed", "2"], "a parameter is given twice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_before_work_starts(tilt, monkeypatch, arguments, said):
    monkeypatch.setattr(runner, "execute", None)
    code, out, err = tilt(*arguments)
    assert code == 1 and said in err and out == ""
    assert err.startswith("tilt: ") and err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_work_starts(tilt, monkeypatch):
    monkeypatch.setattr(runner, "execute", None)
    Path("file").write_text("not a folder")
    code, _, err = tilt("run", "echo", "--out", "file/inside")
    assert code == 1 and "cannot write into file/inside" in err
    code, _, err = tilt("run", "echo", "--out", "file")
    assert code == 1 and "cannot write into file" in err
    assert Path("file").read_text() == "not a folder"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("seed = 0  # no type", "not of the form"),
        ("seed: int = 0", "not of the form"),
        ("seed: int = 0  #", "not of the form"),
        ('name: str = "a # b"', "not of the form"),
        ("seed: int = 2 ** 3  # not a literal", "not of the form"),
        ("seed: int  # no value", "not of the form"),
        ("import os  # a statement", "not of the form"),
        ("seed: int = 0.5  # another type", "the type is one of"),
        ("seed: int = True  # another type", "the type is one of"),
        ("seeds: list[int] = [1, 'a']  # another type", "the type is one of"),
        ("lr: float = 1e999  # not finite", "the type is one of"),
        ("seed: complex = 1j  # unknown type", "the type is one of"),
        ("seed: int = (0  # not Python", "not Python"),
    ],
)
def test_a_parameters_cell_has_typed_commented_literals(cell, said):
    with pytest.raises(runner.Refused, match=said):
        runner.parameters(stub.notebook("echo", parameters=cell))


def test_a_chapter_has_one_parameters_cell():
    notebook = stub.notebook("echo")
    assert [p.name for p in runner.parameters(notebook)] == ["seed", "n"]
    notebook.cells[2].metadata["tags"] = ["parameters"]
    with pytest.raises(runner.Refused, match="has 2"):
        runner.parameters(notebook)
    notebook.cells[1].metadata["tags"] = notebook.cells[2].metadata["tags"] = []
    with pytest.raises(runner.Refused, match="has 0"):
        runner.parameters(notebook)


def test_texts_become_typed_values():
    known = runner.parameters(stub.notebook("echo", parameters=TYPED))
    given = {"seed": "7", "lr": "1e-3", "flag": "false", "lrs": "[1,2]", "model": "true"}
    values = runner.typed(known, given)
    assert values == {"seed": 7, "lr": 0.001, "flag": False, "lrs": [1, 2], "model": "true"}
    assert [type(v) for v in values.values()] == [int, float, bool, list, str]
    assert runner.typed(known, {"flag": "True"})["flag"] is True
    assert type(runner.typed(known, {"lr": "3"})["lr"]) is float
    assert known[-1].value == "a # b" and known[-1].help == "a folder or a name"


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_gets_typed_values_and_leaves_a_result_with_its_provenance(tilt):
    given = ["-p", "flag", "true", "-p", "lrs", "[1,2]", "-p", "lr", "1e-3", "-p", "model", "it's"]
    code, out, err = tilt("run", "echo", *given, "-p", "seed", "3", "--out", "out")
    assert (code, err) == (0, "") and "finished" in out
    metrics = json.loads(Path("out/metrics.json").read_text())
    told = metrics["results"]["given"]["result"]
    assert told["types"] == ["int", "float", "bool", "list", "str"]
    assert told["values"] == [0.001, True, [1, 2], "it's"] and told["truth"] is True and told["seed"] == 3
    full = {"seed": 3, "lr": 0.001, "flag": True, "lrs": [1, 2], "model": "it's"}
    assert metrics["parameters"] == full and metrics["seed"] == 3 and metrics["chapter"] == "echo"
    source = tilt.root / "book" / "stub" / "echo.ipynb"
    assert metrics["code_hash"] == runner.code_hash(runner.read(source), tilt.root)
    assert {"python", "numpy", "torch"} <= set(metrics["versions"]) and metrics["wall_seconds"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", metrics["date"]) and "CPU" in metrics["device"]
    assert [(c["id"], c["holds"], c["control"]["rejected"]) for c in metrics["claims"]] == [("own:1", True, True)]
    # the executed notebook shows what it ran with, and names no folder of this machine
    executed = runner.read(Path("out/executed.ipynb"))
    assert any("lr = 0.001" in cell.source for cell in executed.cells)
    assert runner.ledger_of(executed, "echo")["claims"] == metrics["claims"]
    assert str(Path.cwd()) not in Path("out/executed.ipynb").read_text()
    assert sorted(p.name for p in Path("out").iterdir()) == ["executed.ipynb", "metrics.json"]
    assert sorted(p.name for p in source.parent.iterdir()) == ["echo.ipynb"]
    # the same again is kept; another code is not
    assert "already finished" in tilt("run", "echo", *given, "-p", "seed", "3", "--out", "out")[1]
    replace_chapter(tilt.root, "echo", stub.notebook("echo", "x = 1", ECHO, parameters=TYPED))
    assert "already" not in tilt("run", "echo", *given, "-p", "seed", "3", "--out", "out")[1]


def test_runs_lie_by_chapter_parameters_and_seed(tilt, monkeypatch):
    def fail(source, target, *_):
        Path(target).write_text("half")
        raise runner.Refused("stopped")

    monkeypatch.setattr(runner, "execute", fail)
    for arguments in ([], ["-p", "seed", "1"], ["-p", "lr", "1"], ["-p", "lr", "1.0"]):
        tilt("run", "echo", *arguments)
    folders = sorted(path.parent.relative_to("runs") for path in Path("runs").rglob("failed.ipynb"))
    assert len(folders) == 3 and {f.parts[0] for f in folders} == {"echo"}
    assert sorted(f.parts[2] for f in folders) == ["0", "0", "1"] and len({f.parts[1] for f in folders}) == 2


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("import sys\nsys.exit(0)", "did not finish|raised SystemExit"),
        ("1 / 0", r"cell \[2\] raised ZeroDivisionError: division by zero"),
        ("raise ValueError('first\\nsecond')", r"cell \[2\] raised ValueError: first; second"),
        ("import os\nos._exit(0)", r"kernel died in cell \[2\]"),
    ],
)
def test_a_run_that_does_not_reach_its_end_leaves_nothing_that_counts(tilt, cell, said):
    replace_chapter(tilt.root, "echo", stub.notebook("echo", cell))
    code, _, err = tilt("run", "echo", "--out", "out")
    assert code == 1 and re.search(said, err) and err.startswith("tilt: echo: ") and err.count("\n") == 1
    assert sorted(p.name for p in Path("out").iterdir()) == ["failed.ipynb"]


def test_a_failed_claim_and_a_missing_end_are_no_success(tilt):
    replace_chapter(tilt.root, "echo", stub.notebook("echo", value="3"))
    code, _, err = tilt("run", "echo", "--out", "out")
    assert code == 1 and "the ledger does not close; own:1 fails: 1 + 1" in err
    assert not Path("out/metrics.json").exists()
    replace_chapter(tilt.root, "echo", stub.notebook("echo", close=False))
    code, _, err = tilt("run", "echo", "--out", "out")
    assert code == 1 and "closing line is missing" in err and not Path("out/metrics.json").exists()


def test_an_old_result_does_not_outlive_a_failed_rerun(tilt):
    assert tilt("run", "echo", "--out", "out")[0] == 0
    replace_chapter(tilt.root, "echo", stub.notebook("echo", "1 / 0"))
    assert tilt("run", "echo", "--out", "out")[0] == 1
    assert not Path("out/metrics.json").exists()


def test_the_environment_is_as_before_after_a_run(tilt):
    before = dict(os.environ)
    tilt("run", "echo", "--out", "out")
    assert dict(os.environ) == before


# ---- tilt list, tilt ledger ----------------------------------------------------------------------------------------


def test_tilt_list_names_chapters_and_parameters(tilt):
    code, out, err = tilt("list")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "echo  (book/stub/echo.ipynb)"
    assert "    lr: float = 0.1  step size" in out and "    model: str = 'a # b'  a folder or a name" in out


def test_tilt_ledger_says_which_chapters_closed_and_which_are_stale(tilt):
    code, out, err = tilt("ledger")
    assert code == 1 and "echo: the run left 0 ledgers" in err and out == ""
    source = tilt.root / "book" / "stub" / "echo.ipynb"
    executed = runner.execute(source, tilt.root / "made.ipynb", {}, tilt.root, "off", tilt.root)
    nbformat.write(executed, source)
    assert tilt("ledger") == (0, "echo: 1/1 claims hold, 1/1 controls rejected\n", "")
    executed.cells[2].source += "\nx = 1"
    nbformat.write(executed, source)
    code, out, err = tilt("ledger")
    assert code == 1 and "stale" in out and err == "tilt: echo is stale\n"


def test_chapters_come_in_the_order_of_the_table_of_contents(tmp_path):
    root = stub.project(tmp_path / "p", zebra=stub.notebook("zebra"), ant=stub.notebook("ant"))
    assert list(runner.chapters(root)) == ["zebra", "ant"]
    (root / "book" / "stub" / "zebra.ipynb").unlink()
    assert list(runner.chapters(root)) == ["ant"]


# ---- freshness -------------------------------------------------------------------------------------------------------

LIBRARY = {
    "tiltlib/__init__.py": '"""The library."""\n',
    "tiltlib/direct.py": '"""Direct."""\nfrom tiltlib import indirect\n\n\ndef f():\n    """Doc."""\n'
    "    return indirect.g(1)\n",
    "tiltlib/indirect.py": "from .deeper import leaf\n\n\ndef g(x):\n    # a comment\n    return x + leaf.CONSTANT\n",
    "tiltlib/deeper/__init__.py": "",
    "tiltlib/deeper/leaf.py": "CONSTANT = 3.5\n",
    "tiltlib/lazy/__init__.py": "HOMES = {'Thing': 'tiltlib.lazy.thing', 'Other': 'tiltlib.lazy.other'}\n",
    "tiltlib/lazy/thing.py": "class Thing:\n    size = 1\n",
    "tiltlib/lazy/other.py": "class Other:\n    size = 1\n",
    "tiltlib/unrelated.py": "x = 1\n",
}


@pytest.fixture
def library(tmp_path):
    """A project with a library of its own; returns what stamps a chapter of given code."""
    root = stub.project(tmp_path / "p")
    for name, text in LIBRARY.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    def stamp(code="from tiltlib import direct", reads=()):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        notebook.metadata["tilt"] = {"reads": list(reads)}
        return runner.stamp(root / "book" / "stub" / "one.ipynb", notebook, root)

    stamp.root = root
    return stamp


def edit(root, name, old, new):
    text = (root / name).read_text()
    assert text.count(old) == 1
    (root / name).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("tiltlib/direct.py", '"""Doc."""', '"""Another text, 7."""'),
        ("tiltlib/direct.py", '"""Direct."""\n', ""),
        ("tiltlib/direct.py", "indirect.g(1)", "indirect.g(\n        1,  # one\n    )"),
        ("tiltlib/indirect.py", "# a comment", "# another comment, 7"),
        ("tiltlib/unrelated.py", "x = 1", "x = 2"),
        ("tiltlib/lazy/thing.py", "size = 1", "size = 2"),
        ("book/intro.md", "miniature", "tiny"),
    ],
)
def test_what_cannot_change_an_output_keeps_the_stamp(library, name, old, new):
    before = library()
    edit(library.root, name, old, new)
    assert library() == before


def test_a_new_entry_in_a_lazy_table_keeps_the_stamp(library):
    code = "from tiltlib.lazy import Thing"
    before = library(code)
    edit(library.root, "tiltlib/lazy/__init__.py", "'Other'", "'New': 'tiltlib.unrelated', 'Other'")
    assert library(code) == before
    edit(library.root, "tiltlib/lazy/__init__.py", "'tiltlib.lazy.thing'", "'tiltlib.lazy.other'")
    assert library(code) != before  # the name now leads elsewhere


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("tiltlib/direct.py", "g(1)", "g(2)"),
        ("tiltlib/indirect.py", "x + leaf", "x - leaf"),
        ("tiltlib/deeper/leaf.py", "3.5", "3.25"),
        ("tiltlib/deeper/__init__.py", "", "x = 1\n"),
        ("requirements.txt", "2.4.0", "2.4.1"),
    ],
)
def test_a_changed_number_in_anything_imported_changes_the_stamp(library, name, old, new):
    before = library()
    if old:
        edit(library.root, name, old, new)
    else:
        (library.root / name).write_text(new)
    assert library() != before


IMPORTS = {
    "from tiltlib import lazy\nlazy.Thing": {"thing", "other"},
    "import tiltlib.lazy as lazy": {"thing", "other"},
    "from tiltlib.lazy import *": {"thing", "other"},
    "from tiltlib.lazy import Thing": {"thing"},
    "from tiltlib.lazy import Other as Thing": {"other"},
    "from tiltlib.lazy import thing": {"thing"},
    "from tiltlib.lazy.thing import Thing": {"thing"},
    "import tiltlib.lazy.other": {"other"},
    "def f():\n    from tiltlib.lazy import Thing": {"thing"},
    "import numpy, os.path\nfrom tiltlib import direct": set(),
}


@pytest.mark.parametrize("code", IMPORTS)
def test_a_package_that_imports_lazily_is_followed_to_the_homes_of_its_names(library, code):
    found = {path.stem for path in runner.closure(code, library.root)}
    assert found & {"thing", "other"} == IMPORTS[code]
    before = library(code)
    edit(library.root, "tiltlib/lazy/thing.py", "size = 1", "size = 2")
    assert (library(code) != before) == ("thing" in IMPORTS[code])


def test_the_closure_holds_each_file_once_also_in_a_circle(library):
    (library.root / "tiltlib/deeper/leaf.py").write_text("CONSTANT = 3.5\nfrom tiltlib import direct\n")
    found = [
        path.relative_to(library.root / "tiltlib").as_posix()
        for path in runner.closure("import tiltlib.direct", library.root)
    ]
    assert found == ["__init__.py", "deeper/__init__.py", "deeper/leaf.py", "direct.py", "indirect.py"]


def test_cells_count_and_prose_does_not(library):
    assert library("x = 1") != library("x = 2")
    assert library("x = 1") == library("x = 1\n\n")
    one, two = (nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]) for text in "ab")
    path = library.root / "book" / "stub" / "one.ipynb"
    assert runner.stamp(path, one, library.root) == runner.stamp(path, two, library.root)


def test_result_files_and_declared_data_count(library):
    before = library()
    result = library.root / "book" / "results" / "one" / "seed1" / "metrics.json"
    files.write_atomically(result, b'{"value": 1}')
    assert library() != before
    with_result = library()
    result.write_text('{"value": 2}')
    assert library() != with_result
    files.write_atomically(library.root / "book" / "results" / "another" / "metrics.json", b"{}")
    result.write_text('{"value": 1}')
    assert library() == with_result
    data = library.root / "book" / "data" / "table.csv"
    files.write_atomically(data, b"1")
    reads = ["book/data/*.csv"]
    read = library(reads=reads)
    data.write_text("2")
    assert library(reads=reads) != read and library() == with_result


def test_a_change_during_the_run_leaves_the_outputs_stale(tmp_path):
    change = "import pathlib\npathlib.Path('../../requirements.txt').write_text('numpy==0\\n')"
    root = stub.project(tmp_path / "p", one=stub.notebook("one", change))
    source = root / "book" / "stub" / "one.ipynb"
    executed = runner.execute(source, tmp_path / "made.ipynb", {}, source.parent, "off", root)
    assert (root / "requirements.txt").read_text() == "numpy==0\n"
    assert executed.metadata.tilt.stamp != runner.stamp(source, runner.read(source), root)


# ---- memo ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def count(tmp_path, monkeypatch):
    """A function that says how often it ran."""
    monkeypatch.setenv("TILT_MEMO", str(tmp_path / "memo"))
    monkeypatch.setenv("TILT_CODE", "code 1")
    calls = []

    def work():
        calls.append(1)
        return {"value": len(calls)}

    work.folder = tmp_path / "memo"
    return work


def test_finished_work_is_done_once(count):
    assert [run.memo(["a", 1], count) for _ in range(3)] == [{"value": 1}] * 3
    assert len(list(count.folder.iterdir())) == 1


def test_another_key_another_code_another_function_compute_again(count, monkeypatch):
    assert run.memo(["a", 1], count)["value"] == 1
    assert run.memo(["a", 2], count)["value"] == 2
    assert run.memo({"n": 1, "m": 2}, count)["value"] == 3
    assert run.memo({"m": 2, "n": 1}, count)["value"] == 3
    monkeypatch.setenv("TILT_CODE", "code 2")
    assert run.memo(["a", 1], count)["value"] == 4
    assert run.memo(["a", 1], lambda: "another source") == "another source"
    monkeypatch.setenv("TILT_CODE", "code 1")
    assert run.memo(["a", 1], count)["value"] == 1


def test_outside_the_runner_any_change_of_the_library_computes_again(count, monkeypatch, tmp_path):
    monkeypatch.delenv("TILT_CODE")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    files.write_atomically(tmp_path / "tiltlib" / "law.py", b"x = 1")
    assert run.memo("a", count)["value"] == run.memo("a", count)["value"] == 1
    (tmp_path / "tiltlib" / "law.py").write_text("x = 2")
    assert run.memo("a", count)["value"] == 2


@pytest.mark.parametrize(
    "damage", [b"", b"damaged", b"\x80\x05X\xff\xff\xff\xff", b"cnowhere\nnothing\n.", b"(lp0\n", None]
)
def test_a_damaged_file_is_computed_again(count, damage):
    run.memo("a", count)
    (path,) = count.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-4] if damage is None else damage)
    assert run.memo("a", count) == {"value": 2}
    assert run.memo("a", count) == {"value": 2} and pickle.loads(path.read_bytes()) == {"value": 2}


def test_off_always_computes_and_keeps_nothing(count, monkeypatch):
    monkeypatch.setenv("TILT_MEMO", "off")
    assert [run.memo("a", count)["value"] for _ in range(3)] == [1, 2, 3]
    assert not count.folder.exists() and not Path("off").exists()


@pytest.mark.parametrize("place", ["folder", "off"])
def test_a_key_that_json_cannot_hold_is_refused_before_work(count, monkeypatch, place):
    if place == "off":
        monkeypatch.setenv("TILT_MEMO", "off")
    with pytest.raises(TypeError):
        run.memo(["a", object()], count)
    assert run.memo("a", count)["value"] == 1  # nothing was called before


def test_without_a_folder_named_memo_lies_in_the_cache(count, monkeypatch, tmp_path):
    monkeypatch.delenv("TILT_MEMO")
    monkeypatch.setenv("TILT_CACHE", str(tmp_path / "cache"))
    run.memo("a", count)
    assert len(list((tmp_path / "cache" / "memo").glob("*.pickle"))) == 1


def test_a_failing_function_leaves_nothing(count):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        run.memo("a", fail)
    assert not count.folder.exists()


def test_a_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    files.write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        files.write_atomically(path, b"two")
    assert path.read_bytes() == b"one" and [p.name for p in path.parent.iterdir()] == ["file"]


# ---- results ---------------------------------------------------------------------------------------------------------


def result_of(tilt, *arguments):
    """Run the chapter into book/results, as the longer runs do."""
    for k, seed in enumerate(arguments):
        code, _, err = tilt("run", "echo", "-p", "seed", seed, "--out", tilt.root / f"book/results/echo/seed{k}")
        assert (code, err) == (0, "")


def shown(monkeypatch, function, *arguments):
    said = []
    monkeypatch.setattr("IPython.display.display", lambda it, **_: said.append(it))
    function(*arguments)
    (one,) = said
    return one


def test_published_tables_are_read_back_in_order_with_their_provenance(tilt, monkeypatch):
    result_of(tilt, 5, 4)
    monkeypatch.setattr(run, "ROOT", tilt.root)
    runs = run.load_results("echo", "given")
    assert [r["seed"] for r in runs] == [5, 4] == [r["result"]["seed"] for r in runs]
    wanted = {"result", "parameters", "seed", "device", "date", "wall_seconds", "versions", "code"}
    assert all(wanted <= set(r) for r in runs)
    with pytest.raises(FileNotFoundError, match="tilt run echo"):
        run.load_results("echo", "nothing")
    with pytest.raises(FileNotFoundError, match="tilt run other"):
        run.load_results("other", "given")
    # inside the runner the page knows whether the code is still the same; elsewhere it does not say
    same = json.dumps({"given": runs[0]["code"]})
    for told, said in [(same, True), (json.dumps({"given": "x"}), False), ("", None)]:
        monkeypatch.setenv("TILT_RESULT_CODE", told)
        text = shown(monkeypatch, run.provenance, runs).data
        assert "2 longer runs" in text and "seed 5, 4" in text and "lr = 0.1" in text and runs[0]["date"] in text
        assert ("Made by the code on this page" in text) == (said is True)
        assert ("code has changed" in text) == (said is False)
    one = [runs[0] | {"parameters": {"seed": 1, "model": "<b>"}, "device": "a GPU"}, runs[1]]
    text = shown(monkeypatch, run.provenance, one).data
    assert "&lt;b&gt;" in text and "<b>" not in text and "a GPU; " in text


def test_what_a_result_depends_on_ends_with_the_cell_that_publishes_it(tilt, monkeypatch):
    notebook = runner.read(tilt.root / "book" / "stub" / "echo.ipynb")

    def code():
        return runner.code_hash(notebook, tilt.root, 'publish("given"'), runner.code_hash(notebook, tilt.root)

    before = code()
    notebook.cells[3].source += "\nlater = 1"
    assert code()[0] == before[0] and code()[1] != before[1]
    notebook.cells[2].source += "\nearlier = 1"
    assert code()[0] != before[0]


def test_a_run_stores_the_hash_that_the_page_will_compare(tilt):
    result_of(tilt, 1)
    metrics = json.loads((tilt.root / "book/results/echo/seed0/metrics.json").read_text())
    seen = 'import os, json\nassert json.loads(os.environ["TILT_RESULT_CODE"])["given"] == "{}"'
    notebook = runner.read(tilt.root / "book" / "stub" / "echo.ipynb")
    notebook.cells.insert(3, nbformat.v4.new_code_cell(seen.format(metrics["results"]["given"]["code"])))
    replace_chapter(tilt.root, "echo", notebook)
    assert tilt("run", "echo", "--out", "again")[0] == 0


def test_publishing_refuses_what_json_cannot_hold(monkeypatch):
    data = shown(monkeypatch, run.publish, "table", {"x": [1, 2]})
    assert data[run.MIME] == {"name": "table", "result": {"x": [1, 2]}}
    with pytest.raises(TypeError):
        run.publish("table", {"x": {1, 2}})
    with pytest.raises(ValueError):
        run.publish("table", {"x": float("nan")})


def test_a_value_may_start_with_a_minus(monkeypatch):
    seen = {}
    monkeypatch.setattr(runner, "run", lambda chapter, given, *_: seen.update(given))
    assert runner.main(["run", "x", "-p", "lr", "-1e-3", "-p", "n", "-2", "-p", "lrs", "-.5"]) == 0
    assert seen == {"lr": "-1e-3", "n": "-2", "lrs": "-.5"}
