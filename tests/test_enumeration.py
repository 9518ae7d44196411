"""The enumeration of outcomes, against counting by hand."""

import itertools

import numpy as np
import pytest
import torch

from tiltlib.enumeration import Script, expectation, outcomes

WEIGHTS = torch.tensor([[0.25, 0.75]]).log().double()


def test_two_coins():
    pairs = [p for p, _ in outcomes(lambda c: c.categoricals(torch.tensor([[0.2, 0.8]]).log().repeat(2, 1)))]
    assert sorted(pairs) == pytest.approx(sorted(a * b for a, b in itertools.product((0.2, 0.8), repeat=2)))


def test_systematic_resampling_is_unbiased():
    """Probabilities of all branches sum to one, counts are as they should be, and no count is off by one or more."""
    table = [(p, tuple(a[0].tolist())) for p, a in outcomes(lambda c: c.ancestors(WEIGHTS, 2))]
    assert sum(p for p, _ in table) == pytest.approx(1)
    assert sum(p * np.bincount(a, minlength=2) for p, a in table) == pytest.approx([0.5, 1.5])
    assert {a for _, a in table} == {(0, 1), (1, 1)}


def test_what_is_impossible_has_no_branch():
    table = list(outcomes(lambda c: int(c.categoricals(torch.tensor([[0.0, 1.0, 0.0]]).log())[0])))
    assert table == [(1.0, 1)]


def test_later_picks_may_depend_on_earlier_ones():
    def function(chance):
        first = chance.pick([0.5, 0.5])
        return first if first == 0 else 10 + chance.pick([0.1, 0.9])

    assert sorted(outcomes(function)) == [(0.05, 10), (0.45, 11), (0.5, 0)]
    assert expectation(function) == pytest.approx(0.5 + 4.95)


def test_what_has_no_finite_list_is_refused():
    with pytest.raises(TypeError, match="finite"):
        Script().normals((2,))
    with pytest.raises(ValueError, match="residual"):
        Script().ancestors(WEIGHTS, 2, "residual")
