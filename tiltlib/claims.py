"""The ledger: each chapter's claims, each with a tolerance that has a reason and a negative control that must fail.

A chapter makes one `Ledger`, calls `check` once per statement, shows `table()` in its last cell but one and calls
`close()` in its last cell. `close` prints one line that is stable by construction, because the tolerance sits inside
the claim and not in the text; it raises if a claim fails or a control passes.
"""

import html
import math
import re

import numpy as np

MIME = "application/vnd.tilt.claims+json"
KINDS = ("equal", "at_most", "at_least", "monte_carlo")
ID = re.compile(r"[a-z_]+:[A-Za-z0-9.]+")
MAX_Z = 4.0  # a Monte Carlo tolerance of more standard errors than this proves nothing
MIN_DRAWS = 5  # independent runs behind a standard error
LISTED = 12  # arrays longer than this are shown by their worst entry


def deviation(kind: str, measured, expected) -> tuple[float, float, float]:
    """Largest violation, with the pair (measured, expected) where it occurs.

    `equal` and `monte_carlo`: max |measured - expected|; `at_most`: max(measured - expected); `at_least`: the reverse.
    Entries that are infinite and equal deviate by 0. Raises ValueError on NaN, an empty array or mismatched shapes.
    """
    measured, expected = np.asarray(measured, dtype=float), np.asarray(expected, dtype=float)
    try:
        measured, expected = np.broadcast_arrays(measured, expected)
    except ValueError:
        raise ValueError(f"measured {measured.shape} and expected {expected.shape} do not fit together") from None
    if measured.size == 0:
        raise ValueError("nothing was measured: the array is empty")
    if np.isnan(measured).any() or np.isnan(expected).any():
        raise ValueError("a claim or its control was measured as NaN")
    with np.errstate(invalid="ignore"):
        gap = np.where(measured == expected, 0.0, measured - expected).ravel()
    gap = {"at_most": gap, "at_least": -gap}.get(kind, np.abs(gap))
    worst = int(np.argmax(gap))
    return float(gap[worst]), float(measured.ravel()[worst]), float(expected.ravel()[worst])


class Ledger:
    """The claims of one chapter.

    chapter: the notebook's name without folder and ending, e.g. "best_of_n".
    """

    def __init__(self, chapter: str):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", chapter):
            raise ValueError(f"a chapter is named like best_of_n, got {chapter!r}")
        self.chapter, self.claims = chapter, []

    def check(
        self, id, statement, measured, expected, tolerance, reason, *, control, kind="equal", n=None, z=None
    ) -> None:
        """Record one claim and its negative control.

        id         "source:place", e.g. "anthology:15"; an id may carry several statements
        statement  what is claimed, in words
        measured   scalar or array, compared entry by entry with `expected` (they broadcast)
        tolerance  the largest deviation that still counts as holding, >= 0, with its `reason`
        control    (what was changed to something wrong, measured there) or (.., measured there, expected there): the
                   same measurement with one ingredient changed; it must deviate by more than the tolerance
        kind       equal | at_most | at_least | monte_carlo (equal within z standard errors; then `n` >= 5 independent
                   runs or draws and `z` <= 4 are stated, and the control must deviate by more than twice the tolerance)

        Raises ValueError for a malformed claim. A claim that fails is recorded; `close` raises.
        """
        if not ID.fullmatch(id):
            raise ValueError(f"an id looks like anthology:15 or beyond:B1, got {id!r}")
        if kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
        if not (tolerance >= 0 and math.isfinite(tolerance)):
            raise ValueError(f"{id}: the tolerance must be finite and not negative, got {tolerance}")
        if not str(reason).strip() or not str(statement).strip():
            raise ValueError(f"{id}: a claim needs a statement and a reason for its tolerance")
        if [n is None, z is None] != [kind != "monte_carlo"] * 2:
            raise ValueError(f"{id}: a Monte Carlo claim, and no other, states n and z")
        if kind == "monte_carlo" and not (n >= MIN_DRAWS and n == int(n) and 0 < z <= MAX_Z and tolerance > 0):
            raise ValueError(f"{id}: needs an integer n >= {MIN_DRAWS}, 0 < z <= {MAX_Z:g}, tolerance > 0; {n=}, {z=}")
        if len(control) not in (2, 3) or not str(control[0]).strip():
            raise ValueError(f"{id}: control is (what was changed, measured there[, expected there])")
        gap, shown, wanted = deviation(kind, measured, expected)
        bad_gap, bad_shown, _ = deviation(kind, control[1], control[2] if len(control) == 3 else expected)
        power = 2.0 if kind == "monte_carlo" else 1.0
        claim = {
            "id": id,
            "statement": str(statement),
            "kind": kind,
            "measured": _plain(measured, shown),
            "expected": _plain(expected, wanted),
            "tolerance": float(tolerance),
            "reason": str(reason),
            "deviation": _number(gap),
            "holds": bool(gap <= tolerance),
            "control": {
                "statement": str(control[0]),
                "measured": _plain(control[1], bad_shown),
                "deviation": _number(bad_gap),
                "rejected": bool(bad_gap > power * tolerance),
            },
        }
        if kind == "monte_carlo":
            claim |= {"n": int(n), "z": float(z)}
        self.claims.append(claim)

    def data(self) -> dict:
        """The JSON form of the ledger."""
        return {"chapter": self.chapter, "claims": self.claims}

    def table(self) -> None:
        """Display the ledger: a picture per row for the reader, the data beside it for the runner."""
        from IPython.display import display

        text = "\n".join(f"{c['id']}: {c['statement']}" for c in self.claims)
        display({"text/html": as_html(self.claims), "text/plain": text, MIME: self.data()}, raw=True)

    def close(self) -> None:
        """Print the closing line. Raises AssertionError if a claim fails, a control passes, or nothing was claimed."""
        broken = [f"{c['id']} fails: {c['statement']}" for c in self.claims if not c["holds"]]
        broken += [
            f"{c['id']}: its control passes: {c['control']['statement']}"
            for c in self.claims
            if not c["control"]["rejected"]
        ]
        if not self.claims:
            broken = ["nothing was claimed"]
        if broken:
            raise AssertionError("\n".join([f"{self.chapter}: the ledger does not close", *broken]))
        print(closing_line(self.chapter, len(self.claims)))


def closing_line(chapter: str, claims: int) -> str:
    """The one line that a chapter ends with when everything holds."""
    return f"{chapter}: {claims}/{claims} claims hold, {claims}/{claims} controls rejected"


def as_html(claims) -> str:
    """A table of claims: statement, numbers, and where claim (dot) and control (cross) lie against the tolerance."""
    rows = [
        f"<tr><td class='tilt-id'>{html.escape(c['id'])}</td>"
        f"<td>{html.escape(c['statement'])}<div class='tilt-note'>control: {html.escape(c['control']['statement'])}"
        f" · tolerance: {html.escape(c['reason'])}</div></td>"
        f"<td class='tilt-number'>{_show(c['measured'])}<div class='tilt-note'>{_show(c['expected'])}</div></td>"
        f"<td>{_strip(c)}</td></tr>"
        for c in claims
    ]
    head = (
        "<tr><th>id</th><th>statement</th><th>measured<div class='tilt-note'>expected</div></th>"
        "<th>deviation / tolerance<div class='tilt-note'>● claim, × control</div></th></tr>"
    )
    return f"<div class='tilt-ledger'><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


def _strip(claim, width=150, height=22, low=-6.0, high=6.0) -> str:
    """A log scale from 1e-6 to 1e6 tolerances; the bar is the tolerance."""

    def place(gap):
        if gap is not None and gap <= 0:
            return 6.0  # no deviation at all, or on the right side of a bound
        power = high if gap is None else math.log10(max(gap, 1e-300) / max(claim["tolerance"], 1e-300))
        return 6 + (width - 12) * (min(max(power, low), high) - low) / (high - low)

    x, y, middle = place(claim["deviation"]), place(claim["control"]["deviation"]), height / 2
    verdict = "holds" if claim["holds"] else "FAILS"
    rejected = "rejected" if claim["control"]["rejected"] else "ACCEPTED"
    return (
        f"<svg class='tilt-strip' width='{width}' height='{height}' role='img' "
        f"aria-label='claim {verdict}, control {rejected}'>"
        f"<line x1='0' x2='{width}' y1='{middle}' y2='{middle}' class='tilt-axis'/>"
        f"<line x1='{width / 2}' x2='{width / 2}' y1='2' y2='{height - 2}' class='tilt-bar'/>"
        f"<circle cx='{x:.1f}' cy='{middle}' r='4' class='tilt-{verdict.lower()}'/>"
        f"<path d='M{y - 4:.1f} {middle - 4} l8 8 m0 -8 l-8 8' class='tilt-{rejected.lower()}'/></svg>"
    )


def _number(x) -> float | None:
    """A float, or None for infinity, which JSON does not have."""
    return float(x) if math.isfinite(x) else None


def _plain(values, worst):
    """A JSON-able form: a number, a short nested list, or the worst entry of a long array."""
    values = np.asarray(values, dtype=float)
    if values.ndim == 0 or values.size > LISTED:
        return _number(worst)
    return [_number(v) for v in values.ravel()]


def _show(values) -> str:
    if isinstance(values, list):
        return ", ".join(_show(v) for v in values[:3]) + (", …" if len(values) > 3 else "")
    return "∞" if values is None else f"{values:.4g}".replace("-", "−")
