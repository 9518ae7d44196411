"""resampling.py: every scheme unbiased exactly, with the variance of counts that theory gives, and its edge cases."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_chance import Scripted, chance, log_weight_rows
from tiltlib.chance import BELOW_ONE, normalised
from tiltlib.resampling import SCHEMES, ancestors

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
WEIGHTS = torch.tensor([0.05, 0.37, 0.0, 0.08, 0.5], dtype=torch.float64)  # nothing symmetric, one of them dead
COUNT = 7


def expected_offspring(scheme, weights, count):
    """E counts, by integrating over one uniform that all places share: expectations add whatever the joint law is.

    Counts are constant between the points where a place changes its particle, so a midpoint each is exact.
    """
    rest = (count * weights - torch.floor(count * weights * (1 + 1e-12))).clamp(min=0)
    kinks = [torch.tensor([0.0, 1.0]).double(), (count * weights.cumsum(0)) % 1, weights.cumsum(0).clamp(max=1)]
    kinks += [(rest.cumsum(0) / rest.sum()).clamp(max=1)] if rest.sum() > 0 else []
    total = torch.zeros_like(weights)
    for low, high in itertools.pairwise(torch.cat(kinks).clamp(0, 1).sort().values.tolist()):
        if high - low > 1e-14:
            drawn = SCHEMES[scheme](weights[None], count, Scripted((low + high) / 2))[0]
            total += (high - low) * torch.bincount(drawn, minlength=len(weights)).double()
    return total


@every_scheme
@given(log_weight_rows, st.integers(1, 7))
def test_it_is_unbiased_exactly(scheme, rows, count):
    for weights in normalised(torch.tensor(rows, dtype=torch.float64)):
        assert (expected_offspring(scheme, weights, count) - count * weights).abs().max() < 1e-9


@every_scheme
@given(log_weight_rows, st.integers(1, 7), st.floats(0, BELOW_ONE))
def test_the_dead_stay_dead_and_places_are_ordered(scheme, rows, count, u):
    log_w = torch.tensor(rows, dtype=torch.float64)
    drawn, weights = ancestors(log_w, count, Scripted(u), scheme), normalised(log_w)
    assert drawn.shape == (len(rows), count) and (drawn.diff(dim=1) >= 0).all()
    assert all((w[row] > 0).all() for row, w in zip(drawn, weights, strict=True))


def variances(scheme):
    """Exact variance of each count, from the law of each independent draw."""
    if scheme == "multinomial":
        return COUNT * WEIGHTS * (1 - WEIGHTS)
    if scheme == "residual":
        rest = COUNT * WEIGHTS - torch.floor(COUNT * WEIGHTS)
        return rest.sum() * (rest / rest.sum()) * (1 - rest / rest.sum())
    edges = torch.cat([torch.zeros(1).double(), WEIGHTS.cumsum(0)]) * COUNT
    place = torch.arange(COUNT).double()[:, None]
    share = (edges[1:].minimum(place + 1) - edges[:-1].maximum(place)).clamp(min=0)  # of each stretch, by particle
    if scheme == "stratified":
        return (share * (1 - share)).sum(0)
    fraction = (COUNT * WEIGHTS) % 1  # systematic: the count is one of two neighbours
    return fraction * (1 - fraction)


@every_scheme
def test_counts_vary_as_much_as_theory_says(scheme):
    n = 40_000
    drawn = ancestors(WEIGHTS.log().expand(n, -1), COUNT, chance(3), scheme)
    counts = torch.nn.functional.one_hot(drawn, len(WEIGHTS)).sum(1).double()
    exact, mean = variances(scheme), COUNT * WEIGHTS
    squares = (counts - mean).square()
    error = squares.std(0) / math.sqrt(n)
    assert ((squares.mean(0) - exact).abs() <= 4 * error + 1e-12).all()
    assert ((counts.mean(0) - mean).abs() <= 4 * (exact / n).sqrt() + 1e-12).all()


def test_schemes_are_told_apart_by_their_variance():
    multinomial, residual, stratified, systematic = (
        variances(name).sum() for name in ("multinomial", "residual", "stratified", "systematic")
    )
    assert systematic < stratified < multinomial and residual < multinomial


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_and_a_sure_survivor(scheme, dtype):
    equal = torch.zeros(3, 8, dtype=dtype)
    if scheme != "multinomial":  # all others keep each once
        assert (ancestors(equal, 8, chance(), scheme) == torch.arange(8)).all()
    one = torch.full((2, 1000), -math.inf, dtype=dtype)
    one[0, 0], one[1, -1] = 3e4, -3e4  # far outside what exp can hold
    drawn = ancestors(one, 1000, chance(), scheme)
    assert (drawn[0] == 0).all() and (drawn[1] == 999).all()


@every_scheme
def test_float32_weights_of_many_particles(scheme):
    """The cumulative sum of 1e5 float32 weights is off by far more than one of them; the last positive one is found."""
    log_w = torch.zeros(1, 100_000)
    log_w[0, -3:] = -math.inf
    counts = np.bincount(ancestors(log_w, 100_000, chance(), scheme)[0].numpy(), minlength=100_000)
    assert counts[-3:].sum() == 0 and counts.sum() == 100_000
    assert scheme == "multinomial" or counts.max() <= 3


@every_scheme
def test_rows_are_drawn_apart(scheme):
    drawn = ancestors(
        torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).expand(5, -1), 30, chance(), scheme
    )
    assert len(drawn.unique(dim=0)) == 5


def test_errors():
    with pytest.raises(ValueError, match="unknown resampling scheme 'bootstrap'"):
        ancestors(torch.zeros(1, 2), 2, chance(), "bootstrap")
    with pytest.raises(ValueError, match="all weights of a row are zero"):
        ancestors(torch.full((1, 2), -math.inf), 2, chance(), "residual")
    with pytest.raises(ValueError, match="NaN"):
        ancestors(torch.tensor([[0.0, math.nan]]), 2, chance(), "stratified")
