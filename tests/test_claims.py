"""The ledger: what it refuses, what it accepts, when it closes, and the form in which it leaves the notebook."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from tiltlib import claims

CLAIM = {"id", "statement", "kind", "measured", "expected", "tolerance", "reason", "deviation", "holds", "control"}
CONTROL = {"statement", "measured", "deviation", "rejected"}
GOOD = {
    "id": "anthology:15",
    "statement": "two is two",
    "measured": 2.0,
    "expected": 2.0,
    "tolerance": 1e-12,
    "reason": "round-off",
    "control": ("three instead", 3.0),
}
MONTE_CARLO = GOOD | {"kind": "monte_carlo", "n": 100, "z": 4, "tolerance": 0.1, "measured": 2.05}


def ledger_with(*changes):
    ledger = claims.Ledger("best_of_n")
    for change in changes:
        ledger.check(**GOOD | change)
    return ledger


def strict(text):
    """Parse JSON, refusing NaN and Infinity, which Python writes and JSON does not have."""

    def refuse(constant):
        raise AssertionError(f"not JSON: {constant}")

    return json.loads(text, parse_constant=refuse)


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"measured": math.nan},
        {"measured": [2.0, math.nan]},
        {"expected": math.nan},
        {"control": ("a NaN", math.nan)},
        {"control": ("a NaN on the other side", 3.0, math.nan)},
        {"measured": []},
        {"measured": np.ones(2), "expected": np.ones(3)},
        {"control": ("another shape", np.ones(2), np.ones(3))},
        {"id": "anthology"},
        {"id": "Anthology:15"},
        {"id": "anthology:15\n"},
        {"id": "anthology:"},
        {"id": "anthology:1 5"},
        {"kind": "about"},
        {"tolerance": -1e-12},
        {"tolerance": math.nan},
        {"tolerance": math.inf},
        {"reason": " "},
        {"statement": ""},
        {"control": ("only words",)},
        {"control": ("", 3.0)},
        {"control": ("too", 3.0, 2.0, 1.0)},
        {"n": 100},
        {"z": 4},
        {"n": 100, "z": 4},
    ],
    ids=str,
)
def test_a_malformed_claim_is_refused_and_not_recorded(change):
    ledger = claims.Ledger("best_of_n")
    with pytest.raises(ValueError):
        ledger.check(**GOOD | change)
    assert ledger.claims == []


@pytest.mark.parametrize(
    "change",
    [
        {"n": None},
        {"z": None},
        {"n": claims.MIN_DRAWS - 1},
        {"n": 7.5},
        {"n": math.nan},
        {"z": 4.01},
        {"z": 0},
        {"z": -1},
        {"z": math.nan},
        {"tolerance": 0.0},
    ],
    ids=str,
)
def test_a_monte_carlo_claim_without_its_evidence_is_refused(change):
    with pytest.raises(ValueError):
        claims.Ledger("best_of_n").check(**MONTE_CARLO | change)


@pytest.mark.parametrize("chapter", ["", "Best of N", "best-of-n", "book/best_of_n", "1st", "best_of_n\n"])
def test_a_chapter_has_a_plain_name(chapter):
    with pytest.raises(ValueError, match="named like"):
        claims.Ledger(chapter)


# ---- deviation and verdict -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "measured", "holds"),
    [
        ("equal", 2.125, True),  # exactly the tolerance, in binary
        ("equal", 2.126, False),
        ("equal", 1.875, True),
        ("equal", 1.874, False),
        ("at_most", -50.0, True),
        ("at_most", 2.125, True),
        ("at_most", 2.126, False),
        ("at_least", 50.0, True),
        ("at_least", 1.875, True),
        ("at_least", 1.874, False),
    ],
)
def test_a_claim_holds_up_to_its_tolerance_on_the_side_that_it_names(kind, measured, holds):
    ledger = claims.Ledger("best_of_n")
    ledger.check(**GOOD | {"kind": kind, "measured": measured, "tolerance": 0.125})
    assert ledger.claims[-1]["holds"] is holds
    assert ledger.claims[0]["holds"] is holds


@pytest.mark.parametrize(("kind", "wrong"), [("equal", 2.125), ("at_most", 0.0), ("at_least", 9.0), ("equal", 2.0)])
def test_a_control_within_the_tolerance_is_not_rejected(kind, wrong):
    ledger = ledger_with({"kind": kind, "tolerance": 0.125, "control": ("not wrong enough", wrong)})
    assert ledger.claims[0]["holds"] and not ledger.claims[0]["control"]["rejected"]


def test_the_worst_entry_decides_and_is_shown_of_a_long_array():
    measured = np.zeros(100)
    measured[[3, 40, 77]] = [1e-3, -7.0, 2.0]
    claim = ledger_with({"measured": measured, "expected": 0.0, "control": ("shifted", measured + 10)}).claims[0]
    assert claim["deviation"] == 7.0 and claim["measured"] == -7.0 and not claim["holds"]
    assert claim["control"]["deviation"] == 12.0
    up = ledger_with({"measured": measured, "expected": 0.0, "kind": "at_most"}).claims[0]
    assert up["deviation"] == 2.0 and up["measured"] == 2.0


def test_a_short_array_is_kept_whole():
    claim = ledger_with({"measured": [1.0, 2.0], "expected": [1.0, 2.5]}).claims[0]
    assert claim["measured"] == [1.0, 2.0] and claim["expected"] == [1.0, 2.5] and claim["deviation"] == 0.5


def test_a_control_may_bring_its_own_expected_value():
    claim = ledger_with({"control": ("another world", 5.0, 5.0)}).claims[0]
    assert claim["control"]["deviation"] == 0 and not claim["control"]["rejected"]
    assert ledger_with({"control": ("another world", 5.0, 2.0)}).claims[0]["control"]["rejected"]


def test_infinity_equals_itself_and_rejects_a_control():
    claim = ledger_with({"measured": [math.inf, 1.0], "expected": [math.inf, 1.0], "control": ("diverges", math.inf)})
    assert claim.claims[0]["deviation"] == 0 and claim.claims[0]["holds"]
    control = ledger_with({"control": ("diverges", math.inf)}).claims[0]["control"]
    assert control["rejected"] and control["measured"] is None and control["deviation"] is None
    assert not ledger_with({"measured": math.inf}).claims[0]["holds"]
    assert not ledger_with({"measured": -math.inf, "expected": math.inf}).claims[0]["holds"]


@pytest.mark.parametrize(("wrong", "rejected"), [(2.15, False), (2.1999, False), (2.2001, True)])
def test_a_monte_carlo_control_must_deviate_by_more_than_twice_the_tolerance(wrong, rejected):
    ledger = claims.Ledger("best_of_n")
    ledger.check(**MONTE_CARLO | {"control": ("biased", wrong)})
    assert ledger.claims[-1]["holds"]
    assert ledger.claims[0]["control"]["rejected"] is rejected


# ---- closing -------------------------------------------------------------------------------------------------------


def test_the_closing_line_does_not_depend_on_what_was_measured(capsys):
    for nudge in (0.0, 3e-13):
        ledger_with({}, {"measured": 2.0 + nudge}).close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second == "best_of_n: 2/2 claims hold, 2/2 controls rejected"
    assert first == claims.closing_line("best_of_n", 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"measured": 2.1}, "anthology:15 fails: two is two"),
        ({"control": ("not wrong", 2.0)}, "its control passes: not wrong"),
    ],
)
def test_one_failure_among_many_keeps_the_ledger_open(change, said, capsys):
    with pytest.raises(AssertionError, match=said):
        ledger_with({}, change, {}).close()
    assert capsys.readouterr().out == ""


def test_an_empty_ledger_does_not_close():
    with pytest.raises(AssertionError, match="nothing was claimed"):
        claims.Ledger("best_of_n").close()


def test_close_names_every_failure():
    with pytest.raises(AssertionError) as error:
        ledger_with({"measured": 2.1}, {"control": ("not wrong", 2.0), "id": "errata:E1"}).close()
    assert "anthology:15 fails" in str(error.value) and "errata:E1: its control passes" in str(error.value)


# ---- the form in which it leaves the notebook ----------------------------------------------------------------------


@pytest.fixture
def displayed(monkeypatch):
    """What a ledger's table() displays, by MIME type."""

    def display(ledger):
        shown = []
        monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data if raw else None))
        ledger.table()
        (data,) = shown
        return data

    return display


def test_the_table_carries_exactly_the_json_form(displayed):
    ledger = ledger_with({}, {"measured": [1.0] * 3, "expected": 1.0}, {"control": ("diverges", math.inf)})
    ledger.check(**MONTE_CARLO)
    ledger.check(**GOOD | {"kind": "at_most", "measured": np.float32(1), "tolerance": np.float64(0)})
    data = displayed(ledger)[claims.MIME]
    assert strict(json.dumps(data)) == data
    assert set(data) == {"chapter", "claims"} and data["chapter"] == "best_of_n"
    for claim in data["claims"]:
        assert set(claim) - ({"n", "z"} if claim["kind"] == "monte_carlo" else set()) == CLAIM
        assert set(claim["control"]) == CONTROL
        assert type(claim["holds"]) is bool and type(claim["control"]["rejected"]) is bool
    assert data["claims"][3]["n"] == 100 and data["claims"][3]["z"] == 4.0
    assert strict(json.dumps(data, allow_nan=False)) == data


def test_the_table_shows_every_statement_and_escapes_it(displayed):
    ledger = ledger_with({"statement": "a < b & c"}, {"control": ("<script>", 3.0)}, {"reason": "x > y"})
    page = displayed(ledger)["text/html"]
    assert page.count("<tr>") == 4 and page.count("<svg") == 3
    assert "a &lt; b &amp; c" in page and "&lt;script&gt;" in page and "x &gt; y" in page and "<script" not in page
    assert displayed(ledger)["text/plain"].count("\n") == 2


def mark(text, shape):
    """Where the picture of a claim has its dot or its cross."""
    start = {"dot": "<circle cx='", "cross": "<path d='M"}[shape]
    return float(text.split(start)[1].split("'")[0].split(" ")[0]) + (4 if shape == "cross" else 0)


def test_the_picture_puts_dot_and_cross_on_their_side_of_the_bar():
    middle = 75
    places = [2.0, 2.0 + 1e-14, 2.0 + 1e-12, 2.0 + 1e-9, 3.0, math.inf]
    dots = [mark(claims._strip(ledger_with({"measured": m}).claims[0]), "dot") for m in places]
    assert all(a <= b for a, b in pairwise(dots)) and dots[0] < dots[1] < middle < dots[3]
    assert dots[2] == pytest.approx(middle, abs=0.1) and 0 <= dots[0] and dots[-1] <= 150
    claim = ledger_with({}).claims[0]
    assert mark(claims._strip(claim), "dot") < middle < mark(claims._strip(claim), "cross")
    assert "claim holds, control rejected" in claims._strip(claim)
    bad = ledger_with({"measured": 9.0, "control": ("not wrong", 2.0)}).claims[0]
    assert "claim FAILS, control ACCEPTED" in claims._strip(bad)
    assert mark(claims._strip(bad), "cross") < middle < mark(claims._strip(bad), "dot")
