"""Each mutant is caught by the one test that is named for it, and that test passes without the mutant."""

import json
import subprocess
import sys

import pytest

from tests import mutants
from tiltlib.files import ROOT

PASSED, FAILED = 0, 1  # pytest's exit codes; every other one is a fault of the harness


@pytest.fixture(scope="module")
def run():
    """(file, old, new, test) -> (exit code, what was said), by a server that forks for each run."""
    command = [sys.executable, "-m", "tests.mutants"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def ask(file, old, new, test):
            server.stdin.write(json.dumps({"file": file, "old": old, "new": new, "test": test}) + "\n")
            server.stdin.flush()
            answer = json.loads(server.stdout.readline())
            return answer["code"], answer["said"]

        yield ask
        server.stdin.close()


@pytest.mark.parametrize("test", sorted({mutant.test for mutant in mutants.MUTANTS}))
def test_it_passes_without_a_mutant(run, test):
    code, said = run(None, "", "", test)
    assert code == PASSED, said
    assert " passed" in said and "skipped" not in said


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_it_is_caught(run, mutant):
    code, said = run(mutant.file, mutant.old, mutant.new, mutant.test)
    assert code == FAILED, f"exit code {code}: {said}"
    assert "1 failed" in said


def test_the_harness_sees_what_is_wrong_with_a_mutant(run):
    test = "test_law.py::test_entropy_counts_nats_and_ignores_zeros"
    assert run("law.py", "no such text", "", test) == (98, "the text occurs 0 times in law.py, not once: no such text")
    assert run("law.py", "return", "", test)[0] == 98  # more than once
    assert run("law.py", "def entropy(p):", "def entropy(p, q=None):", test)[0] == PASSED  # survives
    assert run("law.py", "def entropy(p):", "def entropy(p:", test)[0] not in (PASSED, FAILED)  # not Python
    assert run("law.py", "def entropy(p):", "def entropy(p, q=0):", "test_law.py::test_nowhere")[0] not in (
        PASSED,
        FAILED,
    )
    assert run("book.py", "KERNELS = 2", "KERNELS = 3", test)[0] == 99  # a file that the test never loads


def test_names_and_tests_are_as_promised():
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS)
    assert {mutant.file for mutant in mutants.MUTANTS} >= {
        "law.py",
        "chance.py",
        "bestofn.py",
        "claims.py",
        "runner.py",
    }
