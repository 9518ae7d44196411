"""Runs that are killed: nothing half done counts, the rerun redoes only what was unfinished and finds the same."""

import json
import os
import signal
import time

import pytest

from tests import stub

PIECES = """import os, pathlib, time
import numpy as np
from tiltlib import run
side = pathlib.Path("{side}")

def piece(k):
    with open(side / "log", "a") as log:
        log.write(f"{{k}} begun {{os.getpid()}}\\n")
    while k == 2 and not (side / "go").exists():
        time.sleep(0.05)
    with open(side / "log", "a") as log:
        log.write(f"{{k}} done\\n")
    return np.random.default_rng([seed, k]).normal(size=5)

total = sum(run.memo(["piece", seed, k], lambda: piece(k)) for k in range(4))
run.publish("total", {{"total": total.tolist()}})"""
RUN = ("tiltlib.runner", "run", "echo", "-p", "seed", "7", "--out")


def wait_for(happened, seconds=30):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A chapter of four pieces of work, the third of which waits for a file, and its uninterrupted result."""
    side = tmp_path_factory.mktemp("side")
    chapter = stub.notebook("echo", PIECES.format(side=side))
    root = stub.project(tmp_path_factory.mktemp("faults") / "p", library=True, echo=chapter)
    (side / "go").touch()
    done = stub.python(root, *RUN, "whole")
    assert done.returncode == 0, done.stderr
    return root, side, json.loads((root / "whole" / "metrics.json").read_text())


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("victim", ["runner", "kernel"])
def test_a_killed_run_resumes_with_its_unfinished_work_only(project, victim):
    root, side, whole = project
    out, log = root / victim, side / "log"
    log.unlink()
    (side / "go").unlink()
    process = stub.python(root, *RUN, victim, start=True)
    wait_for(lambda: log.exists() and "2 begun" in log.read_text())
    kernel = int(log.read_text().split()[-1])
    assert kernel != process.pid and alive(kernel)
    os.kill(process.pid if victim == "runner" else kernel, signal.SIGKILL)
    assert process.wait(30) == (-signal.SIGKILL if victim == "runner" else 1)
    wait_for(lambda: not alive(kernel))  # a kernel without its runner ends by itself
    assert {path.name for path in out.iterdir()} <= {"memo", "running.ipynb", "failed.ipynb"}
    assert len(list((out / "memo").glob("*.pickle"))) == 2

    (side / "go").touch()
    done = stub.python(root, *RUN, victim)
    assert done.returncode == 0, done.stderr
    times_begun = [log.read_text().count(f"{k} begun") for k in range(4)]
    times_done = [log.read_text().count(f"{k} done") for k in range(4)]
    assert times_begun == [1, 1, 2, 1] and times_done == [1, 1, 1, 1]
    again = json.loads((out / "metrics.json").read_text())
    for same in ("parameters", "claims", "results", "code_hash", "versions"):
        assert again[same] == whole[same]
    assert {path.name for path in out.iterdir()} == {"executed.ipynb", "metrics.json"}


def test_two_seeds_differ(project):
    root, _, whole = project
    other = stub.python(root, "tiltlib.runner", "run", "echo", "-p", "seed", "8", "--out", "other")
    assert other.returncode == 0, other.stderr
    assert json.loads((root / "other" / "metrics.json").read_text())["results"] != whole["results"]
