"""Exact best-of-N against enumeration, binomial sums, high precision and limits; samplers against the exact laws."""

import itertools
import math
import tracemalloc
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad

from tiltlib import bestofn, law

P = np.array([0.45, 0.25, 0.2, 0.1])
R = np.array([0.3, 2.0, -0.7, 1.1])
BETA = 0.6


def enumerated(p, r, beta, n, rule=None):
    """Law of the selection by going through every multiset of n candidates, summed without rounding."""
    terms = [[] for _ in p]
    for draw in itertools.combinations_with_replacement(range(len(p)), n):
        counts = np.bincount(draw, minlength=len(p))
        ways = math.factorial(n) // math.prod(math.factorial(int(c)) for c in counts)
        probability = ways * math.prod(float(q) ** int(c) for q, c in zip(p, counts, strict=True))
        top = max(r[i] for i in draw)
        w = [math.exp((x - top) / beta) if rule is None else rule(x, top) for x in r]
        total = math.fsum(c * v for c, v in zip(counts, w, strict=True))
        for i in set(draw):
            terms[i].append(probability * counts[i] * w[i] / total)
    return np.array([math.fsum(t) for t in terms])


def two_point(p, log_odds, n):
    """Probability that soft best-of-n returns the outcome of mass p and weight exp(log_odds): a binomial sum."""
    k = np.arange(n + 1)
    share = k / (k + (n - k) * np.exp(-log_odds)) if log_odds >= 0 else k * np.exp(log_odds)
    if log_odds < 0:
        share = share / (share + (n - k))
    return float(stats.binom.pmf(k, n, p) @ share)


def instance(seed, outcomes):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(outcomes)), rng.normal(size=outcomes)


laws = st.integers(1, 4).flatmap(
    lambda k: st.tuples(
        st.lists(st.floats(0.01, 1), min_size=k, max_size=k).map(lambda x: np.array(x) / sum(x)),
        st.lists(st.floats(-5, 5), min_size=k, max_size=k).map(np.array),
    )
)


@settings(max_examples=60, deadline=None)
@given(laws, st.floats(0.05, 20), st.integers(1, 9))
def test_soft_law_is_the_enumerated_law(pr, beta, n):
    p, r = pr
    np.testing.assert_allclose(bestofn.soft_law(p, r, beta, n), enumerated(p, r, beta, n), rtol=0, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(laws, st.integers(1, 9))
def test_hard_law_is_the_enumerated_law(pr, n):
    p, r = pr[0], np.round(pr[1])  # rounded: ties
    expected = enumerated(p, r, 1.0, n, rule=lambda x, top: float(x == top))
    np.testing.assert_allclose(bestofn.hard_law(p, r, n), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [2, 17, 1000, 100_000])
@pytest.mark.parametrize("log_odds", [-30.0, -2.0, 0.0, 1.0, 6.0, 40.0])
@pytest.mark.parametrize("p", [0.5, 1e-3])
def test_soft_law_of_two_outcomes_is_a_binomial_sum(p, log_odds, n):
    got = bestofn.soft_law([p, 1 - p], [log_odds, 0.0], 1.0, n)[0]
    assert got == pytest.approx(two_point(p, log_odds, n), rel=2e-11, abs=1e-13)  # scipy's pmf: about 1e-11 relative


@pytest.mark.parametrize("n", [2, 1000, 10**6, 10**9])
@pytest.mark.parametrize("beta", [0.02, 1.0])
def test_soft_law_against_forty_digits(n, beta):
    p, r = np.array([0.1, 1e-7, 0.3, 0.6 - 1e-7]), np.array([0.0, 3.0, -1.5, 1.0])
    with mpmath.workdps(40):
        w = [mpmath.exp((mpmath.mpf(x) - 1) / beta) for x in r]
        mass = [mpmath.mpf(float(x)) for x in p]
        mass = [m / sum(mass) for m in mass]

        def share(i):  # another rule in another variable: trapezoid in log t; step 1/8 errs by e^-79
            total = mpmath.mpf(0)
            for j in range(-8 * 180, 8 * 20):
                t = mpmath.exp(mpmath.mpf(j) / 8)
                less = sum(m * mpmath.expm1(-t * v) for m, v in zip(mass, w, strict=True))
                power = mpmath.exp((n - 1) * mpmath.log1p(less)) if less > -1 else mpmath.mpf(0)
                total += t * mpmath.exp(-t * w[i]) * power / 8
            return float(n * mass[i] * w[i] * total)

        expected = [share(1), share(3)]
    np.testing.assert_allclose(bestofn.soft_law(p, r, beta, n)[[1, 3]], expected, rtol=2e-14)


def test_the_quadrature_rule_is_as_good_as_it_says():
    """sum dt exp(-t s) against 1/s in forty digits, over thirty e-folds of s below the largest total weight."""
    with mpmath.workdps(40):
        for below in (0, 0.1, 0.4, 1, 2.5, 10, 30):
            total = mpmath.mpf(0)
            for j in range(bestofn.FIRST, math.ceil((below + 5) / bestofn.STEP)):
                x = mpmath.mpf(j) * bestofn.STEP
                t = mpmath.exp(x - mpmath.exp(-x) - below)
                total += bestofn.STEP * (1 + mpmath.exp(-x)) * t * mpmath.exp(-t)
            assert abs(total - 1) < 2e-19  # e^-46 of it from what lies left of the first node


@pytest.mark.parametrize("n", [1, 2, 3, 50, 10**6, 10**9])
@pytest.mark.parametrize("outcomes", [1, 2, 30, 1000])
def test_total_mass(n, outcomes):
    p, r = instance(outcomes, outcomes)
    assert abs(bestofn.soft_law(p, r, 0.5, n).sum() - 1) < 1e-13
    assert abs(bestofn.hard_law(p, r, n).sum() - 1) < 1e-13


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("n", [2, 1000, 10**6])
def test_extreme_ranges_keep_the_answer(beta, n):
    """Rewards over 1e4, K = 1000: mass is kept, order is kept, and both limits are reached."""
    rng = np.random.default_rng(3)
    p, r = rng.dirichlet(np.ones(1000)), rng.permutation(np.linspace(0, 1e4, 1000))
    got = bestofn.soft_law(p, r, beta, n)
    assert np.isfinite(got).all() and (got >= 0).all() and abs(got.sum() - 1) < 1e-13
    if beta <= 1e-3:  # rewards 10 apart: e^-10000
        np.testing.assert_allclose(got, bestofn.hard_law(p, r, n), rtol=0, atol=1e-13)
    if beta == 1e6:
        first_order = p * (1 + (1 - 1 / n) * (r - p @ r) / beta)  # p_N for weights 1 + r/beta
        np.testing.assert_allclose(got, first_order, rtol=2 * (1e4 / beta) ** 2)
    below = bestofn.soft_law(p, r - 1e4, beta, n)
    np.testing.assert_allclose(got, below, rtol=0, atol=1e-13)  # blind to a constant


def test_overlapping_windows_are_merged():
    """A ladder of weights whose steps are just below, at, and above the gap where the grid starts afresh."""
    n = 8
    for step in (20.0, bestofn.GAP + math.log(n) - 1e-9, bestofn.GAP + math.log(n) + 1e-9, 200.0):
        r = -step * np.arange(4)
        np.testing.assert_allclose(bestofn.soft_law(P, r, 1.0, n), enumerated(P, r, 1.0, n), rtol=1e-13, atol=1e-15)


def test_the_gap_grows_with_the_number_of_candidates():
    """N light outcomes together weigh as much as one that is log N above each of them, so they meet further apart."""
    rare, gap, n = 1e-9, 46.5, 10**9
    k = np.arange(1, 60)
    never = math.exp(n * math.log1p(-rare))
    meets = stats.binom.pmf(k, n, rare) @ (n / (k * math.exp(gap)))  # 3e-12: the light ones win against k heavy ones
    got = bestofn.soft_law([rare, 1 - rare], [gap, 0.0], 1.0, n)[1]
    assert got - never == pytest.approx(meets, abs=2e-14)


def test_close_rewards_far_from_the_top_keep_their_difference():
    """Two outcomes a nat apart and 9e9 nats below the top: in float64, r - max r has lost the nat to six digits."""
    r, p, beta = np.array([1000.1, 1000.1 + 1e-6, 1e4]), np.array([0.3, 0.5, 0.2]), 1e-6
    below = enumerated(p[:2], r[:2], beta, 2)  # in the sets without the top outcome
    np.testing.assert_allclose(bestofn.soft_law(p, r, beta, 2), [*below, 1 - 0.8**2], rtol=1e-13)


def test_outcomes_of_zero_probability_do_not_matter():
    p, r = np.array([0.0, 0.3, 0.0, 0.7]), np.array([900.0, 1.0, -900.0, 0.2])
    for n in (1, 2, 100):
        got = bestofn.soft_law(p, r, 0.1, n)
        assert got[0] == got[2] == 0
        np.testing.assert_allclose(got[[1, 3]], bestofn.soft_law(p[[1, 3]], r[[1, 3]], 0.1, n), rtol=1e-14)
        assert bestofn.hard_law(p, r, n)[0] == 0
    assert bestofn.expansion(p, r, 0.1).c1[0] == 0


def test_one_candidate_is_the_reference():
    np.testing.assert_array_equal(bestofn.soft_law(P, R, BETA, 1), P / P.sum())
    np.testing.assert_allclose(bestofn.hard_law(P, R, 1), P, rtol=1e-14)
    np.testing.assert_array_equal(bestofn.iterated_kernel(P, R, BETA, 1), np.eye(4))


def test_a_large_alphabet_takes_bounded_memory():
    p, r = instance(0, 100_000)
    tracemalloc.start()
    got = bestofn.soft_law(p, r, 1.0, 10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abs(got.sum() - 1) < 1e-13
    assert peak < 40 * 8 * p.size  # a few dozen vectors; the nodes alone would be 70


def test_hard_law_breaks_ties_by_candidate_not_by_outcome():
    got = bestofn.hard_law([0.6, 0.1, 0.3], [1.0, 1.0, 0.0], 5)
    assert got[0] / got[1] == pytest.approx(6, rel=1e-13)
    np.testing.assert_allclose(got[2], 0.3**5, rtol=1e-12)


@given(laws, st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_soft_law_tends_to_the_hard_law(pr, n):
    p, r = pr[0], np.round(pr[1])
    np.testing.assert_allclose(bestofn.soft_law(p, r, 1e-3, n), bestofn.hard_law(p, r, n), rtol=0, atol=1e-13)


@given(laws, st.floats(0.3, 10), st.integers(1, 10**6))
@settings(max_examples=60, deadline=None)
def test_bounds_hold(pr, beta, n):
    p, r = pr
    r = r - r.min()
    target, got = law.tilt(p, r, beta), bestofn.soft_law(p, r, beta, n)
    assert law.tv(got, target) <= bestofn.tv_bound(p, r, beta, n) + 1e-13
    assert law.kl(target, got) <= bestofn.kl_bound(p, r, beta, n) + 1e-13
    assert law.kl(got, p) <= bestofn.reference_kl_bound(10.0, beta, n) + 1e-13
    assert law.kl(bestofn.hard_law(p, r, n), p) <= bestofn.hard_kl(n) + 1e-12


def test_bounds_by_hand():
    assert bestofn.hard_kl(1) == 0 and bestofn.hard_kl(4) == pytest.approx(math.log(4) - 0.75)
    assert bestofn.reference_kl_bound(0.0, 1.0, 9) == pytest.approx(0, abs=1e-15)
    assert bestofn.reference_kl_bound(2.0, 1.0, 10**9) == pytest.approx(2, abs=1e-8)
    assert bestofn.source_bound(2.0, 1.0, 100) == pytest.approx(math.exp(2) * math.sqrt(math.log(100) / 100))
    assert bestofn.selection_bound([0.0, 0.25, 1.0], 3) == pytest.approx([0, 1 - 0.75**3, 1])
    assert bestofn.kl_bound([0.5, 0.5], [math.log(3), 0.0], 1.0, 2) == pytest.approx(math.log(1 + 0.25 / 2))
    # weights 3 and 1: u = 1.5 or 0.5, so only the first outcome counts, with p* = 0.75
    assert bestofn.tv_bound([0.5, 0.5], [math.log(3), 0.0], 1.0, 2) == pytest.approx(0.75 * 0.5 / 2.5)
    assert bestofn.rejection_cost([0.5, 0.5], [math.log(3), 0.0], 1.0) == pytest.approx(1.5)


def test_hard_best_of_n_of_a_continuous_reward_reaches_hard_kl():
    fine = np.full(20_000, 1 / 20_000)
    got = law.kl(bestofn.hard_law(fine, np.arange(20_000.0), 16), fine)
    assert got < bestofn.hard_kl(16) and got == pytest.approx(bestofn.hard_kl(16), abs=2e-3)


def test_expansion_coefficients():
    """c1 and c2 against the exact law: what they leave over must fall as N^-3, and what c1 alone leaves as c2/N^2."""
    e = bestofn.expansion(P, R, BETA)
    u = e.tilted / P
    chi2 = P @ (u - 1) ** 2
    assert e.chi2 == pytest.approx(chi2, rel=1e-13)
    assert e.tilted @ e.c1 == pytest.approx(0, abs=1e-14) and e.tilted @ e.c2 == pytest.approx(0, abs=1e-13)
    ns = (1000, 4000)
    left = [bestofn.soft_law(P, R, BETA, n) / e.tilted - (1 + e.c1 / n + e.c2 / n**2) for n in ns]
    np.testing.assert_allclose(left[0] / left[1], 4**3, rtol=0.05)
    n = 10**6
    got = bestofn.soft_law(P, R, BETA, n)
    assert n * law.tv(got, e.tilted) == pytest.approx(e.tv, rel=1e-5)
    assert n**2 * law.kl(got, e.tilted) == pytest.approx(e.kl, rel=1e-5)
    assert n**2 * law.kl(e.tilted, got) == pytest.approx(e.kl, rel=1e-5)
    assert n * (got - e.tilted) @ R == pytest.approx(e.reward, rel=1e-5)
    assert e.reward < 0


def test_richardson_removes_the_first_order():
    e = bestofn.expansion(P, R, BETA)
    left = [(bestofn.richardson(P, R, BETA, n) / e.tilted - 1) * n**2 + e.c2 / 2 for n in (1000, 4000)]
    np.testing.assert_allclose(left[0] / left[1], 4, rtol=0.05)
    assert bestofn.richardson(P, R, BETA, 3).sum() == pytest.approx(1, abs=1e-14)


def kernel_by_enumeration(p, r, beta, n):
    w, out = np.exp((r - r.max()) / beta), np.zeros((len(p), len(p)))
    for x in range(len(p)):
        for fresh in itertools.product(range(len(p)), repeat=n - 1):
            candidates = [x, *fresh]
            probability = math.prod(p[i] for i in fresh)
            for o in candidates:
                out[x, o] += probability * w[o] / w[candidates].sum()
    return out


@settings(max_examples=40, deadline=None)
@given(laws, st.floats(0.2, 10), st.integers(2, 5))
def test_iterated_kernel_is_the_enumerated_one(pr, beta, n):
    p, r = pr
    np.testing.assert_allclose(
        bestofn.iterated_kernel(p, r, beta, n), kernel_by_enumeration(p, r, beta, n), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("n", [2, 30, 10**6])
@pytest.mark.parametrize("beta", [1e-6, 0.05, 1.0])
def test_iterated_kernel_is_a_reversible_stochastic_matrix(n, beta):
    p, r = instance(5, 60)
    p[7] = 0.0  # a state one may start from but never enters
    p /= p.sum()
    r *= 100
    kernel, target = bestofn.iterated_kernel(p, r, beta, n), law.tilt(p, r, beta)
    np.testing.assert_allclose(kernel.sum(1), 1, rtol=0, atol=1e-13)
    flow = target[:, None] * kernel
    np.testing.assert_allclose(flow, flow.T, rtol=0, atol=1e-15)
    assert (kernel[np.arange(60) != 7, 7] == 0).all()


def test_iterated_rate_is_the_limit_of_the_second_eigenvalue():
    p, r = instance(11, 6)
    n = 10**5
    second = np.sort(np.linalg.eigvals(bestofn.iterated_kernel(p, r, 1.0, n)).real)[-2]
    assert bestofn.iterated_rate(p, r, 1.0) == pytest.approx(n * second, rel=1e-3)
    r[np.argsort(r)[-2]] = r.max()
    second = np.sort(np.linalg.eigvals(bestofn.iterated_kernel(p, r, 1.0, n)).real)[-2]
    assert bestofn.iterated_rate(p, r, 1.0) == pytest.approx(n * second, rel=1e-3)
    with pytest.raises(ValueError, match="two outcomes"):
        bestofn.iterated_rate([1.0, 0.0], [0.0, 1.0], 1.0)


def test_iterated_rate_of_two_outcomes_by_hand():
    """p = 1/2 each, u = 1.5 and 0.5, p* = 3/4 and 1/4: 0.75/(1.5-x) + 0.25/(0.5-x) = 0 at x = 0.75."""
    assert bestofn.iterated_rate([0.5, 0.5], [math.log(3), 0.0], 1.0) == pytest.approx(0.75, rel=1e-13)


def test_soft_law_continuous_gaussian():
    """r ~ N(0, 1): p* = N(1/beta, 1), and the law at small N by a direct double integral (N = 2)."""
    beta = 1.5
    got = bestofn.soft_law_continuous(stats.norm(), beta, 2)
    assert got.tilted @ got.reward == pytest.approx(1 / beta, abs=1e-12)
    assert got.tilted @ got.reward**2 == pytest.approx(1 + 1 / beta**2, abs=1e-11)
    # N = 2: E over the difference d ~ N(0, 2) of the selected reward is E[d/2 tanh(d / (2 beta))]
    expected = quad(lambda d: d / 2 * math.tanh(d / (2 * beta)) * stats.norm(scale=2**0.5).pdf(d), -15, 15)[0]
    assert got.law @ got.reward == pytest.approx(expected, abs=1e-10)
    a, n = 1 / beta**2, 10**6
    far = bestofn.soft_law_continuous(stats.norm(), beta, n)
    assert n * (far.law - far.tilted) @ far.reward == pytest.approx(-math.exp(a) / beta, rel=1e-4)
    assert n**2 * law.kl(far.law, far.tilted) == pytest.approx((math.exp(3 * a) - math.exp(2 * a)) / 2, rel=1e-3)


def test_soft_law_continuous_heavy_tail():
    """r ~ Exp(1): weights of Pareto index beta, Z = beta/(beta-1); the error falls as N^-(beta-1) for beta < 2."""
    got = bestofn.soft_law_continuous(stats.expon(), 1.5, 1)
    assert got.reference @ np.exp(got.reward / 3) == pytest.approx(1.5, rel=1e-9)  # E exp(r/3) = 1/(1 - 1/3)
    assert got.tilted @ got.reward == pytest.approx(3, rel=1e-10)  # the tilted law is Exp(1 - 1/1.5)
    np.testing.assert_allclose(got.law, got.reference)
    tv = [law.tv(*bestofn.soft_law_continuous(stats.expon(), 1.5, n)[2:]) for n in (10**8, 10**9)]
    assert math.log10(tv[1] / tv[0]) == pytest.approx(-0.5, abs=0.005)
    with pytest.raises(ValueError, match="infinite or converges"):
        bestofn.soft_law_continuous(stats.expon(), 1.0, 10)
    with pytest.raises(ValueError, match="step"):
        bestofn.soft_law_continuous(stats.expon(), 2.0, 10, step=0.0)
    with pytest.raises(ValueError, match="infinite quantiles"):
        bestofn.soft_law_continuous(SimpleNamespace(isf=lambda q: np.full_like(q, np.inf), ppf=lambda q: q), 2.0, 10)


def test_self_normalised_mean_has_the_mean_of_soft_best_of_n():
    values = np.array([1.0, -2.0, 0.5, 4.0])
    draws = np.array(list(itertools.product(range(4), repeat=3)))
    mean = P[draws].prod(1) @ bestofn.self_normalised(R[draws], values[draws], BETA)
    assert mean == pytest.approx(bestofn.soft_law(P, R, BETA, 3) @ values, abs=1e-14)
    assert np.isfinite(bestofn.self_normalised(R[draws] * 1e6, values[draws], 1e-6)).all()


def test_antithetic_difference_by_enumeration():
    values = np.array([1.0, -2.0, 0.5, 4.0])
    draws = np.array(list(itertools.product(range(4), repeat=4)))
    mean = P[draws].prod(1) @ bestofn.antithetic(R[draws], values[draws], BETA)
    expected = (bestofn.soft_law(P, R, BETA, 4) - bestofn.soft_law(P, R, BETA, 2)) @ values
    assert mean == pytest.approx(expected, abs=1e-14)
    with pytest.raises(ValueError, match="even"):
        bestofn.antithetic(R[:3], values[:3], BETA)


def test_rhee_glynn_is_unbiased_for_the_truncation():
    rng = np.random.default_rng(0)
    values = np.array([1.0, -2.0, 0.5, 4.0])

    def draw(shape):
        o = rng.choice(4, size=shape, p=P)
        return R[o], values[o]

    estimate, used = bestofn.rhee_glynn(draw, BETA, runs=40_000, levels=3, generator=rng)
    error = estimate.std() / math.sqrt(estimate.size)
    expected = bestofn.soft_law(P, R, BETA, 8) @ values
    assert abs(estimate.mean() - expected) < 4 * error
    assert abs(bestofn.soft_law(P, R, BETA, 2) @ values - expected) > 8 * error  # the test has power
    assert set(used) == {2, 4, 8}


def test_select_follows_the_exact_law():
    rng = np.random.default_rng(1)
    draws = rng.choice(4, size=(60_000, 3), p=P)
    for picked, exact in (
        (bestofn.select(R[draws], BETA, rng), bestofn.soft_law(P, R, BETA, 3)),
        (bestofn.select_hard(np.round(R)[draws], rng), bestofn.hard_law(P, np.round(R), 3)),
    ):
        chosen = np.take_along_axis(draws, picked[:, None], 1)[:, 0]
        assert stats.chisquare(np.bincount(chosen, minlength=4), exact * chosen.size).pvalue > 1e-4
    assert (bestofn.select(np.array([[0.0, 1e8], [1e8, 0.0]]), 1e-8, rng) == [1, 0]).all()


def test_accept_samples_the_tilted_law():
    rng = np.random.default_rng(2)
    draws = rng.choice(4, size=60_000, p=P)
    kept = draws[bestofn.accept(R[draws], R.max(), BETA, rng)]
    assert stats.chisquare(np.bincount(kept, minlength=4), law.tilt(P, R, BETA) * kept.size).pvalue > 1e-4
    rate = 1 / bestofn.rejection_cost(P, R, BETA)
    assert kept.size / draws.size == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / draws.size))
    with pytest.raises(ValueError, match="at most r_max"):
        bestofn.accept(R, 1.0, BETA, rng)


@pytest.mark.parametrize("f", [bestofn.soft_law, bestofn.iterated_kernel, bestofn.richardson, bestofn.tv_bound])
def test_bad_laws_are_refused(f):
    for p, r, beta, n in [
        ([0.5, 0.6], [0, 1], 1.0, 2),
        ([1.5, -0.5], [0, 1], 1.0, 2),
        ([], [], 1.0, 2),
        ([0.5, 0.5], [0, np.inf], 1.0, 2),
        ([0.5, 0.5], [0, 1, 2], 1.0, 2),
        ([0.5, 0.5], [0, 1], 0.0, 2),
        ([0.5, 0.5], [0, 1], -1.0, 2),
        ([0.5, 0.5], [0, 1], math.nan, 2),
        ([0.5, 0.5], [0, 1], 1.0, 0),
    ]:
        with pytest.raises(ValueError, match=r"must|entries"):
            f(p, r, beta, n)
    for n in (2.0, "2", True):
        with pytest.raises(TypeError):
            f([0.5, 0.5], [0, 1], 1.0, n)


def test_bad_draws_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="shape"):
        bestofn.select(1.0, 1.0, rng)
    with pytest.raises(ValueError, match="shape"):
        bestofn.select_hard(np.zeros((3, 0)), rng)
    with pytest.raises(ValueError, match="finite"):
        bestofn.self_normalised([0.0, math.nan], [0.0, 1.0], 1.0)
    with pytest.raises(ValueError, match="beta"):
        bestofn.select([0.0, 1.0], 0.0, rng)
    for r_max in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="r_max"):
            bestofn.source_bound(r_max, 1.0, 2)
        with pytest.raises(ValueError, match="r_max"):
            bestofn.reference_kl_bound(r_max, 1.0, 2)
    with pytest.raises(ValueError, match="mass"):
        bestofn.selection_bound(1.5, 2)
    with pytest.raises(ValueError, match="n must"):
        bestofn.hard_law(P, R, 0)
    for levels in (0, -1):
        with pytest.raises(ValueError, match="levels"):
            bestofn.rhee_glynn(None, 1.0, runs=2, levels=levels, generator=rng)
