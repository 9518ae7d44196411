"""What a chapter calls while it runs: finished work kept (`memo`), results handed out and read back.

The other side, outside the kernel, is `tiltlib.runner`: it executes chapters and writes result files.
"""

import hashlib
import html
import inspect
import json
import os
import pickle
from pathlib import Path

from tiltlib.files import ROOT, cache_folder, write_atomically

MIME = "application/vnd.tilt.result+json"


def memo(key, function):
    """`function()`, computed once for this key and this code, and read back ever after.

    key: anything JSON can hold (name every parameter that the result depends on). The address is the hash of the key,
    of the code (the runner passes the chapter's; elsewhere all of tiltlib) and of the function's own source. A killed
    notebook so redoes only unfinished work. $TILT_MEMO names the folder; "off" always computes, as `make book` and the
    tests do. Raises TypeError for a key that JSON cannot hold.
    """
    place = os.environ.get("TILT_MEMO", "")
    address = _address(key, function)
    if place == "off":
        return function()
    path = Path(place or cache_folder() / "memo") / f"{address}.pickle"
    if path.exists():
        try:
            return pickle.loads(path.read_bytes())
        except Exception:  # damaged, or written by other library versions: a pickle then raises anything
            path.unlink()
    value = function()
    write_atomically(path, pickle.dumps(value))
    return value


def _address(key, function) -> str:
    code = os.environ.get("TILT_CODE")
    if code is None:
        files = sorted((ROOT / "tiltlib").rglob("*.py"))
        code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = getattr(function, "__qualname__", "")
    return hashlib.sha256(json.dumps([key, code, source], sort_keys=True).encode()).hexdigest()[:32]


def publish(name: str, result: dict) -> None:
    """Hand a table of this run to the runner, which writes it beside its provenance as book/results does.

    name: what the table is, e.g. "reward_kl"; result: JSON-able (lists, not arrays). Shows nothing to the reader.
    """
    from IPython.display import display

    data = json.loads(json.dumps(result, allow_nan=False))  # raises here, in the cell, for what JSON cannot hold
    display({MIME: {"name": name, "result": data}, "text/plain": f"published: {name}"}, raw=True)


def load_results(chapter: str, name: str) -> list[dict]:
    """The longer runs of a chapter that published a table `name`, in order of their folder.

    Each is a dict: "result", "parameters", "seed", "device", "date", "wall_seconds", "versions", "code".
    Raises FileNotFoundError, with the command that makes one, when there is none.
    """
    runs = []
    for path in sorted((ROOT / "book" / "results" / chapter).glob("**/metrics.json")):
        metrics = json.loads(path.read_text())
        if name in metrics["results"]:
            runs.append(metrics | metrics["results"][name])
    if not runs:
        raise FileNotFoundError(
            f"no longer run of {chapter} published {name!r}; make one: "
            f"tilt run {chapter} -p seed 1 --out book/results/{chapter}/seed1"
        )
    return runs


def provenance(runs: list[dict]) -> None:
    """Show under a drawing what it was drawn from: sizes, device, date, and whether the code has moved on since."""
    from IPython.display import HTML, display

    current = json.loads(os.environ.get("TILT_RESULT_CODE") or "{}")  # told by the runner, unknown elsewhere

    def distinct(describe):
        return html.escape("; ".join(dict.fromkeys(describe(run) for run in runs)))

    sizes = distinct(lambda run: ", ".join(f"{k} = {v}" for k, v in run["parameters"].items() if k != "seed"))
    seeds = ", ".join(str(run["seed"]) for run in runs)
    minutes = sum(run["wall_seconds"] for run in runs) / 60
    text = (
        f"From {len(runs)} longer run{'s' * (len(runs) > 1)} (seed {seeds}; {sizes}), {minutes:.0f} minutes in all on "
        f"{distinct(lambda run: run['device'])}, {max(run['date'] for run in runs)}."
    )
    if any(run["code"] != current.get(run["name"], run["code"]) for run in runs):
        text += " <strong>The code has changed since.</strong>"
    elif all(run["name"] in current for run in runs):
        text += " Made by the code on this page."
    display(HTML(f"<p class='tilt-provenance'>{text}</p>"))
