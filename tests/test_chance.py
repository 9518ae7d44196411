"""chance.py: exact draws on a grid of uniforms, unbiased offspring by integrating over the uniform, edge cases."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tiltlib.chance import BELOW_ONE, SCHEMES, Chance, effective_sample_size, inverse_cdf, normalised


def chance(seed=0):
    return Chance(torch.Generator().manual_seed(seed))


class Scripted(Chance):
    """A Chance whose uniforms are given: what draws depend on, laid open."""

    def __init__(self, u):
        super().__init__(torch.Generator())
        self.u = u

    def uniforms(self, shape, dtype=torch.float64, device=None):
        return torch.as_tensor(self.u, dtype=dtype).expand(shape).clone()


log_weight_rows = st.lists(
    st.lists(st.one_of(st.just(-np.inf), st.floats(-60, 60)), min_size=4, max_size=4).filter(
        lambda row: max(row) > -np.inf
    ),
    min_size=1,
    max_size=3,
)


def expected_offspring(weights, count):
    """E counts over the offset u of the systematic comb: constant between the kinks of u, so a midpoint each.

    The comb (k + u)/count passes the cumulative weight c_j where u = count c_j mod 1.
    """
    kinks = torch.cat([torch.tensor([0.0, 1.0]).double(), (count * weights.cumsum(0)) % 1]).sort().values
    total = torch.zeros_like(weights)
    for low, high in itertools.pairwise(kinks.tolist()):
        if high > low:
            drawn = SCHEMES["systematic"](weights[None], count, Scripted((low + high) / 2))[0]
            total += (high - low) * torch.bincount(drawn, minlength=weights.numel()).double()
    return total


@given(log_weight_rows, st.integers(1, 7))
def test_systematic_is_unbiased_exactly(rows, count):
    for weights in normalised(torch.tensor(rows, dtype=torch.float64)):
        assert (expected_offspring(weights, count) - count * weights).abs().max() < 1e-12


@given(log_weight_rows, st.integers(1, 7), st.floats(0, BELOW_ONE))
def test_systematic_counts_are_within_one_and_zero_weight_dies(rows, count, u):
    log_w = torch.tensor(rows, dtype=torch.float64)
    drawn, weights = Scripted(u).ancestors(log_w, count), normalised(log_w)
    assert drawn.shape == (len(rows), count) and (drawn.diff(dim=1) >= 0).all()
    for row, w in zip(drawn, weights, strict=True):
        counts = torch.bincount(row, minlength=4)
        assert ((counts - count * w).abs() < 1 + 1e-9).all()
        assert (counts[w == 0] == 0).all()


def test_a_biased_comb_would_be_seen():
    weights = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    centred = torch.bincount(inverse_cdf(weights, (torch.arange(3) + 0.5).double() / 3), minlength=3)  # no uniform
    assert (centred - 3 * weights).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_categorical_takes_each_stretch_of_the_cumulative_weights(dtype):
    log_w = torch.tensor([[0.2, 0.0, 0.5, 0.3]], dtype=dtype).log()
    for u, index in [(0.0, 0), (0.19, 0), (0.21, 2), (0.69, 2), (0.71, 3), (BELOW_ONE, 3)]:
        assert Scripted(u).categoricals(log_w).tolist() == [index]


@pytest.mark.parametrize("u", [0.0, 0.5, BELOW_ONE, 1.0])
@pytest.mark.parametrize("row", [[0, 1, 0], [0, 0, 1], [1, 0, 0], [1e-30, 1, 0], [0, 1, 1e-30], [0, 1e-12, 0]])
def test_zero_weight_is_never_drawn(row, u):
    log_w = torch.tensor([row], dtype=torch.float32).log()
    for index in (Scripted(u).categoricals(log_w), *Scripted(u).ancestors(log_w, 5)):
        assert torch.tensor(row)[index].min() > 0


def test_zero_weight_survives_no_rounding_of_a_float32_comb():
    # (count - 1 + u) / count rounds to one; the cumulative sum of 1/3 in float32 misses one: both ends must hold
    weights = torch.tensor([0.0] + [1 / 3] * 3 + [0.0], dtype=torch.float64)
    drawn = SCHEMES["systematic"](weights[None], 1_000_003, Scripted(BELOW_ONE))
    assert drawn.min() == 1 and drawn.max() == 3
    log_w = torch.cat([torch.full((1,), -torch.inf), torch.randn(10_000), torch.full((1,), -torch.inf)])[None]
    for u in (0.0, 0.5, BELOW_ONE):
        drawn = Scripted(u).ancestors(log_w.float())
        assert drawn.min() >= 1 and drawn.max() <= 10_000


def test_zero_weight_survives_no_cumulative_sum_that_rounds_up_and_down(monkeypatch):
    # as a parallel sum on a GPU does: the entry of zero weight is a rounding error above its neighbour
    plain = torch.Tensor.cumsum
    noise = torch.tensor([0.0, 2.0**-52, 0.0], dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: plain(self, dim) + noise)
    point = torch.tensor([0.5 + 2.0**-53], dtype=torch.float64)
    assert inverse_cdf(torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64), point).item() == 2


def test_log_weights_far_apart_and_far_from_zero():
    log_w = torch.tensor([[1e4, 1e4 - 1.0, -1e30, -torch.inf], [-1e4, -2e4, -1e4 + 2.0, -3e4]])
    weights = normalised(log_w)
    assert weights.dtype == torch.float64 and torch.allclose(weights.sum(-1), torch.ones(2).double(), atol=1e-15)
    assert torch.allclose(weights[0, :2], torch.tensor([1.0, np.exp(-1)]).double() / (1 + np.exp(-1)), atol=1e-15)
    assert torch.equal(chance(3).ancestors(log_w), chance(3).ancestors(log_w + 100))


def test_categoricals_frequencies_and_batch_shapes():
    p = np.array([0.1, 0.0, 0.6, 0.3])
    log_w = torch.tensor(p).log().expand(100, 400, 4)
    drawn = chance(1).categoricals(log_w)
    assert drawn.shape == (100, 400) and drawn.dtype == torch.int64
    counts = np.bincount(drawn.ravel().numpy(), minlength=4)
    assert counts[1] == 0 and stats.chisquare(counts[p > 0], 40_000 * p[p > 0]).pvalue > 1e-3
    assert chance().categoricals(torch.zeros(7)).shape == ()
    # rows are independent: neighbouring indices carry no information about each other
    table = np.histogram2d(drawn[:, 0::2].ravel(), drawn[:, 1::2].ravel(), bins=[[0, 1, 2.5, 4]] * 2)[0]
    table = table[np.ix_(table.sum(1) > 0, table.sum(0) > 0)]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_rows_of_ancestors_use_their_own_uniform():
    log_w = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))[:1].expand(500, 4)
    assert len({tuple(row) for row in chance(5).ancestors(log_w).tolist()}) > 1


def test_the_generator_is_the_only_state():
    torch.manual_seed(1)
    first = (
        chance(7).normals((3, 2)),
        chance(7).categoricals(torch.zeros(50, 3)),
        chance(7).ancestors(torch.randn(4, 9)),
    )
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = (
        chance(7).normals((3, 2)),
        chance(7).categoricals(torch.zeros(50, 3)),
        chance(7).ancestors(torch.randn(4, 9)),
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.set_rng_state(state)
    assert not torch.equal(first[0], chance(8).normals((3, 2)))
    before = torch.get_rng_state()
    chance(7).normals((3,)), chance(7).uniforms((3,)), chance(7).categoricals(torch.zeros(5, 2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_and_uniforms(dtype):
    z, u = chance(2).normals((4000, 5), dtype), chance(3).uniforms((4000, 5), dtype)
    assert z.shape == u.shape == (4000, 5) and z.dtype == u.dtype == dtype
    assert stats.kstest(z.ravel().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(u.ravel().numpy(), "uniform").pvalue > 1e-3
    assert u.min() >= 0 and u.max() < 1


def test_effective_sample_size():
    assert effective_sample_size(torch.zeros(3, 8)).tolist() == pytest.approx([8, 8, 8])
    one = torch.tensor([-torch.inf, 4e3, -torch.inf])
    assert effective_sample_size(one).item() == pytest.approx(1)
    assert effective_sample_size(torch.tensor([1.0, 2.0, 5.0]).log()).item() == pytest.approx(64 / 30)


class Enumerated(Chance):
    """Replays one branch of a tree of categorical choices and carries its probability: how a test enumerates."""

    def __init__(self, script):
        super().__init__(torch.Generator())
        self.script, self.position, self.probability, self.arity = script, 0, 1.0, []

    def categoricals(self, log_weights):
        weights, chosen = normalised(log_weights), []
        for row in weights.reshape(-1, weights.shape[-1]):
            pick = self.script[self.position] if self.position < len(self.script) else 0
            self.arity.append(row.numel())
            self.probability *= row[pick].item()
            self.position += 1
            chosen.append(pick)
        return torch.tensor(chosen).reshape(weights.shape[:-1])


def test_an_enumerating_chance_can_take_its_place():
    """Two rows, then a choice that depends on them: the expectation over all branches is exact."""
    first = torch.tensor([[0.2, 0.8], [0.5, 0.5]], dtype=torch.float64).log()

    def two_steps(chance):
        x = chance.categoricals(first)
        second = torch.tensor([0.1, 0.9] if x.sum() == 2 else [0.6, 0.4], dtype=torch.float64).log()
        return chance.categoricals(second[None]).item()

    total = mean = 0.0
    for script in itertools.product([0, 1], repeat=3):
        branch = Enumerated(script)
        value = two_steps(branch)
        total, mean = total + branch.probability, mean + branch.probability * value
    assert total == pytest.approx(1, abs=1e-14)
    assert mean == pytest.approx(0.4 * 0.9 + 0.6 * 0.4, abs=1e-14)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("generator", [None, 0, np.random.default_rng(0), torch])
def test_a_generator_is_needed(generator):
    with pytest.raises(TypeError, match=r"explicit torch\.Generator"):
        Chance(generator)


def test_another_device_is_refused():
    for call in (lambda: chance().normals((2,), device="meta"), lambda: chance().uniforms((2,), device="cuda")):
        with pytest.raises(ValueError, match="generator is on cpu"):
            call()
    with pytest.raises(ValueError, match="generator is on cpu"):
        Chance(torch.Generator()).normals((2,), device=torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("log_weights", "kind", "message"),
    [
        (torch.tensor([[0.0, torch.nan]]), ValueError, "NaN"),
        (torch.tensor([[0.0, torch.inf]]), ValueError, r"\+inf"),
        (torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]]), ValueError, "all weights of a row are zero"),
        (torch.zeros(2, 0), ValueError, "K >= 1"),
        (torch.tensor(1.0), ValueError, "K >= 1"),
        (torch.tensor([[1, 2]]), TypeError, "floating-point"),
        ([[0.0, 1.0]], TypeError, "tensor"),
    ],
)
def test_log_weights_are_checked(log_weights, kind, message):
    for call in (chance().categoricals, chance().ancestors, effective_sample_size):
        with pytest.raises(kind, match=message):
            call(log_weights)


def test_ancestors_arguments_are_checked():
    with pytest.raises(ValueError, match=r"shape \(B, K\)"):
        chance().ancestors(torch.zeros(3))
    with pytest.raises(ValueError, match="known: systematic"):
        chance().ancestors(torch.zeros(1, 3), scheme="nearest")
    for count in (0, -1, 1.5, True, "3"):
        with pytest.raises(ValueError, match="count"):
            chance().ancestors(torch.zeros(1, 3), count)
