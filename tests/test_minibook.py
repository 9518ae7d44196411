"""`make book` on a miniature book of two chapters: what is executed again, what a failure does, what stays clean.

The book has its own copy of tiltlib, so that a test may change a number in it. Each build renders: seconds.
"""

import hashlib
import os
import shutil
import subprocess

import nbformat
import pytest

from tests import stub
from tests.test_faults import alive, wait_for
from tiltlib import book, claims, runner

FIRST = "from tiltlib import middle\nprint('the number is', middle.doubled())"
MIDDLE = "from tiltlib import number\n\n\ndef doubled():\n    return 2 * number.VALUE\n"
SECOND = "print('the second chapter ran')"


def write(root, name, notebook):
    nbformat.write(notebook, root / "book" / "stub" / f"{name}.ipynb")


def listing(root):
    """Every file of the source tree with its hash."""
    files = (path for path in root.rglob("*") if path.is_file() and "_build" not in path.relative_to(root).parts)
    return {path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def build(root):
    """`make book`, with a check that it leaves the source tree as it was."""
    before = listing(root)
    done = stub.python(root, "tiltlib.book", "book", "--root", ".")
    assert listing(root) == before
    return done


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    chapters = {"first": stub.notebook("first", FIRST), "second": stub.notebook("second", SECOND)}
    root = stub.project(tmp_path_factory.mktemp("mini") / "p", library=True, **chapters)
    (root / "tiltlib" / "number.py").write_text("VALUE = 20.5\n")
    (root / "tiltlib" / "middle.py").write_text(MIDDLE)
    done = build(root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done.stdout


def page(root, name):
    return (root / "_build" / "html" / "book" / f"{name}.html").read_text()


def test_the_book_is_executed_and_rendered(project):
    root, said = project
    assert "executing 2 of 2 chapters" in said and "first executed" in said and "second executed" in said
    assert "the number is 41.0" in page(root, "stub/first") and "The chapter first" in page(root, "stub/first")
    assert "first: 1/1 claims hold, 1/1 controls rejected" in page(root, "stub/first")
    assert "the second chapter ran" in page(root, "stub/second")
    assert "tilt: ledger" not in page(root, "intro") and "stub/second.html" in page(root, "intro")
    assert "1 of 1 checked" in page(root, "intro")


def test_a_changed_number_runs_exactly_the_chapters_that_use_it(project):
    root, _ = project
    # nothing changed, or only words: nothing is executed
    with open(root / "tiltlib" / "number.py", "a") as file:
        file.write("# a comment\n")
    shutil.rmtree(root / "_build" / "html")
    (root / "_build" / "jupyter-book" / "_build" / "html" / "gone.html").write_text("a page that is no more")
    said = build(root).stdout
    assert "executing 0 of 2 chapters" in said and "executed" not in said
    assert "the number is 41.0" in page(root, "stub/first")
    assert not (root / "_build" / "html" / "gone.html").exists()

    (root / "tiltlib" / "number.py").write_text("VALUE = 20.75\n")
    said = build(root).stdout
    assert "executing 1 of 2 chapters" in said and "first executed" in said and "second" not in said
    assert "the number is 41.5" in page(root, "stub/first") and "41.0" not in page(root, "stub/first")


def test_a_failing_chapter_is_named_and_the_other_still_finishes(project):
    root, _ = project
    write(root, "second", stub.notebook("second", "print('about to fail')", "{}['a key']"))
    (root / "tiltlib" / "number.py").write_text("VALUE = 21.0\n")
    done = build(root)
    assert done.returncode == 1 and "second FAILED" in done.stdout and "first executed" in done.stdout
    assert "second: cell [3] raised KeyError: 'a key'" in done.stderr and "Traceback" not in done.stderr
    assert book.fresh(root / "_build" / "executed" / "book" / "stub" / "first.ipynb", root)
    assert not book.fresh(root / "_build" / "executed" / "book" / "stub" / "second.ipynb", root)


def test_an_id_that_no_source_lists_is_refused_by_name(project):
    root, _ = project
    notebook = nbformat.read(root / "_build" / "executed" / "book" / "stub" / "first.ipynb", 4)
    assert "| own:1 |" in book.Pages(root, {"first": notebook}).ledger()
    (ledger,) = runner.outputs(notebook, claims.MIME)
    ledger["claims"][0]["id"] = "own:2"
    with pytest.raises(runner.Refused, match=r"not listed in book/statements.yml: own:2"):
        book.Pages(root, {"first": notebook})


def test_a_warning_of_the_renderer_is_a_failure(tmp_path):
    root = stub.project(tmp_path / "p")
    (root / "book" / "intro.md").write_text("# A page\n\n[a link](nowhere.md)\n")
    with pytest.raises(runner.Refused, match=r"nowhere\.md"):
        book.html_only(root)  # also a second time: no build starts from what an earlier one left, see above
    assert not (root / "_build" / "html").exists()


def test_a_chapter_that_takes_too_long_is_stopped_with_its_kernel(tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    wait = f"import os, pathlib, time\npathlib.Path('{pid}').write_text(f'{{os.getpid()}}.')\ntime.sleep(600)"
    root = stub.project(tmp_path / "p", one=stub.notebook("one", wait))

    class Started(subprocess.Popen):
        """The limit counts from when the cell runs, however slow this machine is."""

        def communicate(self, *given, timeout=None):
            if timeout:
                wait_for(lambda: pid.exists() and pid.read_text().endswith("."), 60)
            return super().communicate(*given, timeout=timeout)

    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.setattr(book, "LIMIT", 0.25)
    assert book.execute(["one"], lambda name: tmp_path / "made.ipynb", root) == ["one: stopped after 0.25 s"]
    assert not (tmp_path / "made.ipynb").exists()
    wait_for(lambda: not alive(int(pid.read_text().rstrip("."))), 20)


def test_refresh_stores_outputs_in_the_source(tmp_path, monkeypatch, capsys):
    root = stub.project(tmp_path / "p", first=stub.notebook("first"), second=stub.notebook("second"))
    path = {name: root / "book" / "stub" / f"{name}.ipynb" for name in ("first", "second")}
    untouched = path["second"].read_bytes()
    assert book.main(["refresh", "first", "--root", str(root)]) == 0
    assert book.fresh(path["first"], root) and path["second"].read_bytes() == untouched
    assert sorted(os.listdir(root / "book" / "stub")) == ["first.ipynb", "second.ipynb"]
    monkeypatch.setattr(book, "execute", lambda names, *_: print("executes", names) or [])
    capsys.readouterr()
    assert book.main(["refresh", "--root", str(root)]) == 0 and "executes ['second']" in capsys.readouterr().out
    assert book.main(["refresh", "frist", "--root", str(root)]) == 1
    assert "did you mean first?" in capsys.readouterr().err
