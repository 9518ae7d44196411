"""law.py against textbook formulas in exact rationals, scipy, random search and finite differences."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from tiltlib import law

P = np.array([0.05, 0.2, 0.45, 0.3])
R = np.array([2.0, -1.0, 0.25, 0.75])
ZEROS = np.array([0.2, 0.0, 0.5, 0.3])


pytestmark = pytest.mark.usefixtures("strict")


@st.composite
def laws(draw, least=2, most=6, zeros=True):
    k = draw(st.integers(least, most))
    weights = draw(st.lists(st.integers(0 if zeros else 1, 1000), min_size=k, max_size=k).filter(sum))
    return np.array(weights) / sum(weights)


@st.composite
def problems(draw):
    p = draw(laws())
    r = draw(st.lists(st.floats(-1e4, 1e4), min_size=p.size, max_size=p.size))
    return p, np.array(r), 10 ** draw(st.floats(-6, 6))


# ------------------------------------------------------------------ tilts and powers


def test_tilt_against_exact_fractions():
    p = [Fraction(1, 20), Fraction(1, 5), Fraction(9, 20), Fraction(3, 10)]
    w = [Fraction(8), Fraction(1, 2), Fraction(4), Fraction(1)]  # exp(r / beta) with r = log w, beta = 1
    z = sum(a * b for a, b in zip(p, w, strict=True))
    expected = [float(a * b / z) for a, b in zip(p, w, strict=True)]
    r = np.log(np.array(w, dtype=float))
    assert np.abs(law.tilt([float(a) for a in p], r, 1) - expected).max() < 1e-15
    assert np.abs(law.tilt([float(a) for a in p], 7 * r, 7) - expected).max() < 1e-15
    assert abs(law.log_partition([float(a) for a in p], r, 1) - math.log(float(z))) < 1e-15
    assert np.abs(np.exp(law.log_ratio([float(a) for a in p], r, 1)) - [float(b / z) for b in w]).max() < 1e-14


@given(problems())
def test_tilt_is_a_law_at_every_temperature(problem):
    p, r, beta = problem
    q, log_u = law.tilt(p, r, beta), law.log_ratio(p, r, beta)
    assert np.isfinite(q).all() and (q >= 0).all() and abs(q.sum() - 1) < 1e-14
    assert (q[p == 0] == 0).all()
    # relative to the largest log-weight, whose rounding is shared by p exp(log u)
    assert np.abs(p[p > 0] * np.exp(log_u[p > 0]) - q[p > 0]).max() < 1e-12
    assert np.isfinite(law.log_partition(p, r, beta))
    assert law.regret(p, p, r, beta) >= -1e-12 and np.isfinite(law.regret(p, p, r, beta))


def test_tilt_limits():
    ties = np.array([1.0, 1.0, 0.0, 0.5])
    assert np.allclose(law.tilt(P, ties, 1e-6), [0.2, 0.8, 0, 0], atol=1e-15)  # the reference on the tied outcomes
    assert law.tv(law.tilt(P, R, 1e6), P) < 1e-6
    # to first order in 1/beta the tilt moves by p (r - E_p r) / beta
    assert np.abs((law.tilt(P, R, 1e6) - P) * 1e6 - P * (R - P @ R)).max() < 1e-5
    best_is_impossible = np.array([0.0, 100.0, 1.0, 0.0])
    assert np.allclose(law.tilt(ZEROS, best_is_impossible, 1e-3), [0, 0, 1, 0])
    assert np.allclose(law.tilt(P, 1e300 * R, 1e-5), [1, 0, 0, 0])  # r / beta itself would overflow


@given(problems(), st.floats(-1e3, 1e3))
def test_tilt_ignores_a_constant_and_composes(problem, shift):
    p, r, beta = problem
    beta = max(beta, 1.0)
    assert law.tv(law.tilt(p, r + shift, beta), law.tilt(p, r, beta)) < 1e-10
    half = law.tilt(p, r, 2 * beta)
    if (half[p > 0] > 0).all():  # an outcome lost to underflow cannot come back
        assert law.tv(law.tilt(half, r, 2 * beta), law.tilt(p, r, beta)) < 1e-10


def test_log_partition_at_large_beta_and_at_small():
    value = [beta * law.log_partition(P, R, beta) for beta in (1e6, 1e-6)]
    mean, variance = P @ R, P @ (R - P @ R) ** 2
    assert abs(value[0] - (mean + variance / 2e6)) < 1e-11  # beta log Z = E r + Var r / (2 beta) + ...
    assert abs(value[1] - (2.0 + 1e-6 * math.log(0.05))) < 1e-14  # max r + beta log p(argmax)
    # the best outcome is so rare that E exp((r - max r) / beta) is zero but for it
    assert abs(law.log_partition([1e-30, 1.0], [1.0, 0.0], 0.01) - (100 + math.log(1e-30))) < 1e-13
    with pytest.raises(OverflowError, match="float64"):
        law.log_partition(P, 1e300 * R, 1e-10)


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0, 2.5, 400.0])
def test_power(a):
    expected = np.where(ZEROS > 0, (ZEROS / 0.5) ** a, 0)  # scaled by the maximum, so nothing underflows
    assert np.abs(law.power(ZEROS, a) - expected / expected.sum()).max() < 1e-14


def test_power_negative_exponents_and_errors():
    assert np.allclose(law.power(P, -1.0), (1 / P) / (1 / P).sum(), atol=1e-15)
    with pytest.raises(ValueError, match="infinite mass"):
        law.power(ZEROS, -0.5)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            law.power(P, bad)
    with pytest.raises(TypeError, match="real number"):
        law.power(P, "2")


# ------------------------------------------------------------------ entropy and divergences


@given(laws())
def test_entropy_against_scipy(p):
    assert abs(law.entropy(p) - stats.entropy(p)) < 1e-13
    assert -1e-15 <= law.entropy(p) <= math.log(p.size) + 1e-14


def test_entropy_counts_nats_and_ignores_zeros():
    assert abs(law.entropy(np.full(7, 1 / 7)) - math.log(7)) < 1e-15
    assert abs(law.entropy([0.5, 0, 0.5]) - math.log(2)) < 1e-15
    assert law.entropy([0, 1, 0]) == 0


@given(laws(3, 3), laws(3, 3), st.floats(0.01, 100))
def test_kl_is_generalised(p, q, c):
    gap = law.kl(p, q)
    assert gap >= 0
    if np.isinf(gap):
        assert ((q == 0) & (p > 0)).any()
        return
    assert abs(gap - stats.entropy(p, q)) < 1e-12
    assert abs(law.kl(p, c * q) - (gap - math.log(c) - 1 + c)) < 1e-11 * (1 + c)
    assert abs(law.kl(c * p, c * q) - c * gap) < 1e-11 * (1 + c)


def test_kl_zeros_infinities_and_small_differences():
    assert law.kl([0.0, 1.0], [0.5, 1.0]) == 0.5  # 0 log 0 = 0, and the mass of q counts
    assert law.kl([0.5, 0.5], [0.0, 1.0]) == math.inf
    assert law.kl(P, P) == 0 and law.kl([0.0, 0.0], [0.0, 0.0]) == 0
    # known in closed form: KL((1+d)/2, (1-d)/2 || 1/2) = d^2/2 + d^4/12 + ...; a plain log-ratio has no digit left
    for d in (2.0**-20, 2.0**-30, 2.0**-40):
        exact = d**2 / 2 + d**4 / 12
        assert abs(law.kl([(1 + d) / 2, (1 - d) / 2], [0.5, 0.5]) / exact - 1) < 4e-16 / d
    assert law.kl([1e-320, 1.0], [1.0, 1e-320]) == pytest.approx(320 * math.log(10), rel=1e-3)


@given(laws(4, 4), laws(4, 4))
def test_tv_is_the_largest_gap_over_events(p, q):
    events = np.array(np.meshgrid(*[[0, 1]] * 4)).reshape(4, -1)
    assert abs(law.tv(p, q) - ((p - q) @ events).max()) < 1e-15
    assert law.tv(p, q) ** 2 <= law.kl(p, q) / 2 + 1e-15  # Pinsker


# ------------------------------------------------------------------ preferences


def test_bradley_terry():
    hp, pairs = law.bradley_terry(R), law.preference(R)
    assert abs(pairs[0, 1] - math.exp(2) / (math.exp(2) + math.exp(-1))) < 1e-15  # asymmetric: row beats column
    assert np.abs(pairs + pairs.T - 1).max() < 1e-15
    assert np.abs(hp[:, None] / (hp[:, None] + hp) - pairs).max() < 1e-15
    assert law.tv(law.bradley_terry(R + 1e3), hp) < 1e-12
    assert np.allclose(law.bradley_terry([1e4, -1e4]), [1, 0])
    # a choice among n items restricted to a pair is the pair's probability (Luce)
    assert law.tv(hp, law.tilt(np.full(4, 0.25), R, 1.0)) < 1e-15


# ------------------------------------------------------------------ RLHF


def test_rlhf_objective_by_hand():
    pi, ref, r = [0.25, 0.75], [0.5, 0.5], [1.0, 3.0]
    by_hand = 2.5 - 0.4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert abs(law.rlhf_objective(pi, ref, r, 0.4) - by_hand) < 1e-15
    assert law.rlhf_objective([0.5, 0.5], [1.0, 0.0], r, 0.4) == -math.inf


@given(problems(), laws(6, 6))
def test_no_law_beats_the_tilt(problem, other):
    p, r, beta = problem
    pi = other[: p.size] * (p > 0)
    if not pi.sum():
        return
    pi = pi / pi.sum()
    best = beta * law.log_partition(p, r, beta)
    scale = 1e-11 * (np.abs(r).max() + beta)
    assert law.rlhf_objective(pi, p, r, beta) <= best + scale
    assert abs(best - law.rlhf_objective(pi, p, r, beta) - law.regret(pi, p, r, beta)) <= scale


def test_tilt_is_what_a_numerical_optimiser_finds():
    def negative(logits):
        return -law.rlhf_objective(law.bradley_terry(logits), P, R, 0.7)

    found = optimize.minimize(negative, np.zeros(4), tol=1e-12)
    assert law.tv(law.bradley_terry(found.x), law.tilt(P, R, 0.7)) < 1e-5
    assert abs(-found.fun - 0.7 * law.log_partition(P, R, 0.7)) < 1e-10


def test_regret_is_exact_near_the_optimum_and_finite_far_from_it():
    best = law.tilt(P, R, 0.5)
    assert law.regret(best, P, R, 0.5) < 1e-16
    step = 1e-7 * np.array([1, -1, 1, -1]) * best.min()
    assert abs(law.regret(best + step, P, R, 0.5) / (0.5 * (step**2 / best).sum() / 2) - 1) < 1e-6
    # the tilt underflows to (1, 0); the regret of the other vertex is still r_0 - r_1 + beta log(p_0/p_1)
    assert law.regret([0, 1], [0.25, 0.75], [1e4, 0], 1e-3) == pytest.approx(1e4 - 1e-3 * math.log(3), rel=1e-15)
    assert law.regret([0.5, 0.5], [1, 0], [0, 1], 1) == math.inf


# ------------------------------------------------------------------ RLIF


def tree_law(rng, vocabulary, length):
    """Law of a sequence with its conditionals: a list of (V**i, V) arrays and the joint (V**length,)."""
    steps = [rng.dirichlet(np.ones(vocabulary), vocabulary**i) for i in range(length)]
    joint = np.ones(1)
    for step in steps:
        joint = (joint[:, None] * step).ravel()
    return steps, joint / joint.sum()


def test_rlif_objective_against_the_token_tree():
    rng = np.random.default_rng(3)
    (steps, pi), (_, ref) = tree_law(rng, 3, 3), tree_law(rng, 3, 3)
    uniform = np.full(3, 1 / 3)
    certainty = 0.0  # E_pi of the mean over tokens of KL(pi(. | prefix) || uniform), prefix by prefix
    prefix = np.ones(1)
    for step in steps:
        certainty += sum(w * law.kl(row, uniform) for w, row in zip(prefix, step, strict=True)) / 3
        prefix = (prefix[:, None] * step).ravel()
    assert abs(law.rlif_objective(pi, ref, 0.8, 3) - (certainty - 0.8 * law.kl(pi, ref))) < 1e-13
    assert law.rlif_objective([0.5, 0.5], [1.0, 0.0], 1.0, 1) == -math.inf


@given(laws(4, 4, zeros=False), laws(4, 4), st.floats(1.05, 50), st.integers(1, 9))
def test_rlif_optimum_beats_every_law(ref, pi, strength, length):
    best = law.rlif_optimum(ref, strength / length, length)
    assert law.tv(best, law.power(ref, strength / (strength - 1))) < 1e-9
    value = law.rlif_objective(best, ref, strength / length, length)
    assert law.rlif_objective(pi, ref, strength / length, length) <= value + 1e-10
    assert all(law.rlif_objective(v, ref, strength / length, length) <= value + 1e-10 for v in np.eye(4))


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.1])
def test_rlif_optimum_refuses_the_collapse(beta):
    with pytest.raises(ValueError, match=r"argmax of ref \(outcome 2\)"):
        law.rlif_optimum(P, beta, 2)
    vertex = np.eye(4)[2]  # what it would collapse to is indeed the best law
    for pi in (*np.eye(4), P, law.power(P, 3), law.power(P, -1)):
        assert law.rlif_objective(pi, P, beta, 2) <= law.rlif_objective(vertex, P, beta, 2) + 1e-14


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("p", "kind", "message"),
    [
        ([], ValueError, "K >= 1"),
        ([[0.5, 0.5]], ValueError, "shape"),
        (1.0, ValueError, "shape"),
        ([0.5, 0.6], ValueError, "sum to one"),
        ([1.5, -0.5], ValueError, "non-negative; entry 1"),
        ([0.5, math.nan], ValueError, "finite; entry 1"),
        ([math.inf, 0.0], ValueError, "finite"),
        (["a", "b"], TypeError, "real numbers"),
        ([0.5 + 0j, 0.5], TypeError, "complex"),
        (None, ValueError, "shape"),
    ],
)
def test_laws_are_checked(p, kind, message):
    calls = [
        lambda: law.check_law(p),
        lambda: law.entropy(p),
        lambda: law.power(p, 2.0),
        lambda: law.tilt(p, [1.0, 2.0], 1.0),
        lambda: law.log_partition(p, [1.0, 2.0], 1.0),
        lambda: law.log_ratio(p, [1.0, 2.0], 1.0),
        lambda: law.tv(p, [0.5, 0.5]),
        lambda: law.rlhf_objective(p, [0.5, 0.5], [1.0, 2.0], 1.0),
        lambda: law.regret(p, [0.5, 0.5], [1.0, 2.0], 1.0),
        lambda: law.rlif_objective([0.5, 0.5], p, 1.0, 1),
        lambda: law.rlif_optimum(p, 2.0, 1),
    ]
    for call in calls:
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize("r", [[1.0, math.nan], [1.0, math.inf], [1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]], []])
def test_rewards_are_checked(r):
    for call in (
        lambda: law.tilt([0.5, 0.5], r, 1.0),
        lambda: law.rlhf_objective([0.5, 0.5], [0.5, 0.5], r, 1.0),
        lambda: law.regret([0.5, 0.5], [0.5, 0.5], r, 1.0),
    ):
        with pytest.raises(ValueError, match="r "):
            call()


def test_a_reward_must_be_finite_even_where_p_is_zero():
    with pytest.raises(ValueError, match="entry 1"):
        law.tilt([1.0, 0.0], [0.0, math.nan], 1.0)


@pytest.mark.parametrize(
    ("beta", "kind"),
    [
        *((bad, ValueError) for bad in (0, -1.0, math.nan, math.inf)),
        *((bad, TypeError) for bad in ("1", None, True, np.ones(2), 1j)),
    ],
)
def test_beta_is_checked(beta, kind):
    half = [0.5, 0.5]
    for call in (
        lambda: law.tilt(half, [0.0, 1.0], beta),
        lambda: law.log_partition(half, [0.0, 1.0], beta),
        lambda: law.rlhf_objective(half, half, [0.0, 1.0], beta),
        lambda: law.rlif_objective(half, half, beta, 1),
        lambda: law.rlif_optimum(half, beta, 1),
    ):
        with pytest.raises(kind, match="beta must be"):
            call()
    assert law.check_beta(np.float32(0.5)) == 0.5 and law.check_beta(2) == 2.0


@pytest.mark.parametrize(
    ("n", "kind"),
    [(0, ValueError), (-3, ValueError), (1.0, TypeError), (2.5, TypeError), ("2", TypeError), (True, TypeError)],
)
def test_counts_are_checked(n, kind):
    for call in (
        lambda: law.check_count(n),
        lambda: law.rlif_optimum(P, 2.0, n),
        lambda: law.rlif_objective(P, P, 2.0, n),
    ):
        with pytest.raises(kind, match="must be"):
            call()
    assert law.check_count(np.int64(4)) == 4


def test_alphabets_must_agree():
    for call in (
        law.kl,
        law.tv,
        lambda p, q: law.rlhf_objective(p, q, q, 1.0),
        lambda p, q: law.rlif_objective(p, q, 1.0, 1),
    ):
        with pytest.raises(ValueError, match="different alphabets"):
            call([0.5, 0.5], [0.2, 0.3, 0.5])


def test_inputs_are_left_alone():
    p, r = P.copy(), R.copy()
    law.tilt(p, r, 0.1), law.kl(p, p), law.power(p, 2.0), law.regret(p, p, r, 1.0)
    assert (p == P).all() and (r == R).all()
    assert law.check_law(p) is not p
