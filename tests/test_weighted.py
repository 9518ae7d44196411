"""tune/weighted.py against enumeration of all pools, pools that hold the reference exactly, simulation and scipy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from tiltlib import bestofn, law
from tiltlib.tune import weighted

COUNTS = np.array([1, 4, 9, 6])  # a pool that holds the law COUNTS / 20 exactly: averages over it are exact integrals
P = COUNTS / 20
POOL = np.repeat(np.arange(4), COUNTS)
R = np.array([2.0, -1.0, 0.25, 0.75])
BETA = 0.7
FEATURES = np.array([[1.0, 0.0], [-0.5, 2.0], [0.3, -1.0], [0.0, 0.4]])
ONE = np.array([[1.0], [-0.5], [0.3], [2.0]])  # one parameter: the tilted law of R is outside this family


pytestmark = pytest.mark.usefixtures("strict")


# ------------------------------------------------------------------ weights


def test_weights_by_hand():
    w = weighted.normalise(np.log([[1.0, 2.0, 5.0], [4.0, 4.0, 0.5]]), floor=0)
    assert np.allclose(w.values, [[1 / 8, 2 / 8, 5 / 8], [4 / 8.5, 4 / 8.5, 0.5 / 8.5]], rtol=1e-14)
    assert np.allclose(w.ess, [64 / 30, 8.5**2 / 32.25], rtol=1e-14)
    assert (w.moved == 0).all()
    # the whole pool, each row counting 1/2: 1 / sum (W/2)^2
    assert np.isclose(w.total_ess, 1 / np.square(w.values / 2).sum(), rtol=1e-14)


def test_rows_are_weighed_each_by_itself():
    x = np.array([[0.0, 1.0, 3.0], [2.0, 0.5, -1.0]])
    together = weighted.normalise(x, clip=1.5, floor=0)
    alone = [weighted.normalise(row, clip=1.5, floor=0) for row in x]
    for field in range(3):
        assert np.allclose(together[field], [w[field] for w in alone], atol=1e-15)
    assert (together.moved > 0.01).all()


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30), st.floats(-1e300, 1e300))
def test_weights_survive_any_scale(x, shift):
    w = weighted.normalise(x, floor=0)
    assert abs(w.values.sum() - 1) < 1e-12 and 1 - 1e-9 <= w.ess <= len(x) + 1e-9
    assert np.isfinite(weighted.normalise(np.array(x) + shift, floor=0).values).all()
    assert np.allclose(w.values, weighted.normalise(np.array(x) + 1e4, floor=0).values, atol=1e-9)


def test_rlif_weights_reach_the_rlif_optimum():
    beta, length = 0.8, 3
    w = weighted.normalise(np.log(P[POOL]) / weighted.rlif_temperature(beta, length), floor=0)
    fitted = weighted.weighted_law(POOL, w, 4)
    assert np.abs(fitted - law.rlif_optimum(P, beta, length)).max() < 1e-15
    for bad in ((1 / 3, 3), (0.1, 3)):
        with pytest.raises(ValueError, match="no tilted optimum"):
            weighted.rlif_temperature(*bad)
    with pytest.raises(TypeError):
        weighted.rlif_temperature(0.8, 3.0)


@pytest.mark.parametrize("clip", [1.0, 1.3, 2.0, 50.0])
def test_clipping_and_the_law_it_targets(clip):
    # on a pool that holds P exactly the pool's mean weight is the population's, so the fit is the limit itself
    w = weighted.normalise(R[POOL] / BETA, clip=clip, floor=0)
    target = weighted.clipped(P, R, BETA, clip)
    assert np.abs(weighted.weighted_law(POOL, w, 4) - target).max() < 1e-15
    assert np.isclose(w.moved, law.tv(target, law.tilt(P, R, BETA)), atol=1e-15)
    u = law.tilt(P, R, BETA) / P
    expected = [p * min(x, clip) for p, x in zip(P, u, strict=True)]
    assert np.allclose(target, np.array(expected) / sum(expected), atol=1e-15)
    if clip >= u.max():
        assert w.moved < 1e-15


def test_no_clip_is_the_tilted_law():
    assert law.tv(weighted.clipped(P, R, BETA, None), law.tilt(P, R, BETA)) < 1e-15


def test_a_low_effective_sample_size_is_named():
    with pytest.warns(RuntimeWarning, match=r"effective sample size is 1 of 30 .* floor of 10"):
        weighted.normalise(np.arange(30.0) * 50)
    with pytest.warns(RuntimeWarning, match=r"is 20 of 20 .* floor of 21"):
        weighted.normalise(np.zeros(20), floor=21)
    weighted.normalise(np.zeros(10))
    weighted.normalise(np.arange(30.0) * 50, floor=0)


@pytest.mark.parametrize(
    ("x", "options", "match"),
    [
        ([], {}, "empty"),
        (np.zeros((3, 0)), {}, "empty"),
        (np.zeros((2, 2, 2)), {}, r"\(Q, N\)"),
        (1.0, {}, "shape"),
        ([0.0, np.nan], {}, "NaN"),
        ([0.0, np.inf], {}, "inf"),
        ([-np.inf, -np.inf], {}, "all weights are zero"),
        ([[0.0, 1.0], [-np.inf, -np.inf]], {}, "row 1"),
        ([0.0, 1.0], {"clip": 0.5}, "clip"),
        ([0.0, 1.0], {"clip": -1.0}, "clip"),
        ([0.0, 1.0], {"clip": np.nan}, "clip"),
        ([0.0, 1.0], {"clip": np.inf}, "clip"),
        ([0.0, 1.0], {"floor": -1.0}, "floor"),
        ([0.0, 1.0], {"floor": np.nan}, "floor"),
    ],
)
def test_weights_refuse(x, options, match):
    with pytest.raises(ValueError, match=match):
        weighted.normalise(x, **options)


def test_a_weight_of_zero_is_no_error():
    assert (weighted.normalise([-np.inf, 0.0], floor=0).values == [0, 1]).all()


# ------------------------------------------------------------------ the tabular maximiser


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_mean_fit_is_soft_best_of_n(n):
    pools = np.array(list(itertools.product(range(4), repeat=n)))
    w = weighted.normalise(R[pools] / BETA, floor=0)
    mean = P[pools].prod(1) @ weighted.weighted_law(pools, w, 4)
    assert np.abs(mean - bestofn.soft_law(P, R, BETA, n)).max() < 1e-13
    assert law.tv(mean, law.tilt(P, R, BETA)) > 0.02  # and not yet the tilted law


def test_no_law_beats_the_weighted_law():
    w = weighted.normalise(R[POOL] / BETA, floor=0)
    fitted = weighted.weighted_law(POOL, w, 4)
    best = w.values @ np.log(fitted[POOL])
    rng = np.random.default_rng(0)
    others = rng.dirichlet(2000 * fitted, size=2000)
    assert (np.log(others[:, POOL]) @ w.values < best).all()
    assert abs(best - weighted.objective(fitted, P, R / BETA)) < 1e-14


def test_objective_is_the_likelihood_of_the_tilted_law():
    pi = np.array([0.1, 0.3, 0.35, 0.25])
    assert abs(weighted.objective(pi, P, R / BETA) - law.tilt(P, R, BETA) @ np.log(pi)) < 1e-14
    assert weighted.objective([0, 0.5, 0.25, 0.25], P, R) == -np.inf
    assert np.isfinite(weighted.objective([0, 0.5, 0.25, 0.25], [0, 0.5, 0.5, 0], R))
    with pytest.raises(ValueError, match="shape"):
        weighted.objective([0.5, 0.5], P, R)


def test_weighted_law_refuses():
    w = np.full(3, 1 / 3)
    with pytest.raises(TypeError, match="integers"):
        weighted.weighted_law([0.0, 1.0, 1.0], w, 2)
    for outcomes, weights, size, match in [
        ([0, 1], w, 2, "shape"),
        ([0, 1, 2], w, 2, r"\[0, 2\)"),
        ([0, -1, 1], w, 2, r"\[0, 2\)"),
        ([0, 1, 1], w * 2, 2, "sum to one"),
        ([0, 1, 1], [np.nan, 0.5, 0.5], 2, "finite"),
        ([0, 1, 1], [-0.5, 0.5, 1.0], 2, "non-negative"),
        ([], [], 2, "empty"),
    ]:
        with pytest.raises(ValueError, match=match):
            weighted.weighted_law(np.array(outcomes, int), weights, size)


# ------------------------------------------------------------------ variances


def test_standard_error_on_an_exact_pool():
    f = np.array([0.3, -1.0, 2.0, 5.0])
    target, n = law.tilt(P, R, BETA), len(POOL)
    mean, error = weighted.estimate(f[POOL], weighted.normalise(R[POOL] / BETA, floor=0))
    assert abs(mean - target @ f) < 1e-14
    u = target / P
    assert abs(n * error**2 - P @ (u * (f - target @ f)) ** 2) < 1e-13


def test_standard_error_against_simulation():
    f, rng, n, seeds = np.array([0.3, -1.0, 2.0, 5.0]), np.random.default_rng(1), 1000, 2000
    pools = rng.choice(4, p=P, size=(seeds, n))
    values = weighted.normalise(R[pools] / BETA).values
    fits = [weighted.estimate(f[pool], row) for pool, row in zip(pools, values, strict=True)]
    z = np.array([(fit.mean - law.tilt(P, R, BETA) @ f) / fit.standard_error for fit in fits])
    # variance of z over seeds: one, with a standard error of sqrt(2 / seeds); the ESS rule would give another number
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / seeds)


def fit_and_sandwich(pool, values):
    theta = weighted.maximum_likelihood(weighted.weighted_law(pool, values, 4), ONE, P)
    pi = weighted.log_linear(theta, ONE, P)
    scores = ONE[pool] - pi @ ONE
    return theta[0], weighted.sandwich(scores, [[pi @ (ONE[:, 0] - pi @ ONE[:, 0]) ** 2]], values)[0, 0]


def test_sandwich_on_an_exact_pool():
    values = weighted.normalise(R[POOL] / BETA, floor=0).values
    theta, variance = fit_and_sandwich(POOL, values)
    target = law.tilt(P, R, BETA)
    pi = weighted.log_linear([theta], ONE, P)
    assert law.tv(pi, target) > 0.05  # misspecified
    score, u = ONE[:, 0] - pi @ ONE[:, 0], target / P
    information = pi @ score**2
    assert abs(len(POOL) * variance - P @ (u * score) ** 2 / information**2) < 1e-13
    assert abs(P @ (u * score) ** 2 - information) > 0.1  # so 1 / information would be wrong


def test_sandwich_against_simulation():
    rng, n, seeds = np.random.default_rng(2), 800, 600
    pools = rng.choice(4, p=P, size=(seeds, n))
    values = weighted.normalise(R[pools] / BETA).values
    fits = np.array([fit_and_sandwich(pool, row) for pool, row in zip(pools, values, strict=True)])
    assert abs(fits[:, 0].var(ddof=1) / fits[:, 1].mean() - 1) < 4 * np.sqrt(2 / seeds)


def test_sandwich_of_two_parameters_is_a_covariance():
    values = weighted.normalise(R[POOL] / BETA, floor=0).values
    theta = weighted.maximum_likelihood(weighted.weighted_law(POOL, values, 4), FEATURES, P)
    pi = weighted.log_linear(theta, FEATURES, P)
    centred = FEATURES - pi @ FEATURES
    information = centred.T @ (centred * pi[:, None])
    got = weighted.sandwich(centred[POOL], information, values)
    v = (centred[POOL] * values[:, None]).T @ (centred[POOL] * values[:, None])
    assert np.allclose(got, np.linalg.inv(information) @ v @ np.linalg.inv(information), rtol=1e-10)
    with pytest.raises(ValueError, match="singular"):
        weighted.sandwich(centred[POOL], np.ones((2, 2)), values)
    with pytest.raises(ValueError, match="shapes"):
        weighted.sandwich(centred[POOL], [[1.0]], values)
    with pytest.raises(ValueError, match="finite"):
        weighted.sandwich(centred[POOL] * np.nan, information, values)


def test_estimate_refuses():
    with pytest.raises(ValueError, match="entries"):
        weighted.estimate([1.0, 2.0], np.full(3, 1 / 3))
    with pytest.raises(ValueError, match="finite"):
        weighted.estimate([1.0, np.nan], np.full(2, 0.5))


# ------------------------------------------------------------------ the log-linear fit


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=2))
def test_maximum_likelihood_recovers_a_member(theta):
    got = weighted.maximum_likelihood(weighted.log_linear(theta, FEATURES, P), FEATURES, P)
    assert np.abs(got - theta).max() < 1e-9


def test_maximum_likelihood_of_shared_parameters_against_scipy():
    rng = np.random.default_rng(3)
    base, mass = rng.dirichlet(np.ones(4), 3), rng.dirichlet(np.ones(4), 3) * [[1.0], [5.0], [0.2]]
    features = rng.normal(size=(3, 4, 2))

    def loss(theta):
        return -(mass * np.log(weighted.log_linear(theta, features, base))).sum()

    independent = optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
    got = weighted.maximum_likelihood(mass, features, base)
    assert np.abs(got - independent.x).max() < 1e-5
    gradient = optimize.approx_fprime(got, loss, 1e-6)
    assert np.abs(gradient).max() < 1e-4


def test_maximum_likelihood_refuses():
    uniform = np.full(4, 0.25)
    with pytest.raises(ValueError, match="no single finite maximiser"):
        weighted.maximum_likelihood([0.0, 1.0, 0.0, 0.0], np.array([[0.0], [3.0], [1.0], [2.0]]), uniform)
    with pytest.raises(ValueError, match="no single finite maximiser"):
        weighted.maximum_likelihood(P, np.ones((4, 1)), uniform)
    for mass in ([0.0] * 4, [0.5, 0.6, -0.1, 0.0], [np.nan, 0.3, 0.3, 0.4]):
        with pytest.raises(ValueError, match="mass"):
            weighted.maximum_likelihood(mass, FEATURES, uniform)
    with pytest.raises(ValueError, match="shapes"):
        weighted.maximum_likelihood(P, FEATURES, np.full(3, 1 / 3))
