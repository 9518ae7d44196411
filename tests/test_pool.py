"""Pools of scored samples: estimates with the jackknife against a law that is known, and fresh replicates."""

import itertools

import numpy as np
import pytest

from tiltlib import bestofn, law, pool

LEVELS = np.array([-0.6, -0.2, 0.0, 0.1, 0.3, 0.45, 0.7, 0.9])
P = np.array([0.1, 0.1, 0.35, 0.1, 0.15, 0.1, 0.07, 0.03])


def truth(beta, n):
    after = bestofn.hard_law(P, LEVELS, n) if beta is None else bestofn.soft_law(P, LEVELS, beta, n)
    return np.array([after @ LEVELS, law.kl(after, P)])


@pytest.mark.parametrize("beta", [0.3, None])
def test_gain_of_a_pool_by_enumeration(beta):
    rewards, n = [0.2, -0.5, 0.2, 0.9], 3
    chosen = np.zeros(4)
    for draws in itertools.product(range(4), repeat=n):
        r = np.array(rewards)[list(draws)]
        weight = (r == r.max()).astype(float) if beta is None else np.exp(r / beta)
        np.add.at(chosen, list(draws), weight / weight.sum() / 4**n)
    # over the four samples, not over the three rewards: the KL is the same, as the factor depends on the reward only
    expected = chosen @ rewards, law.kl(chosen, np.full(4, 0.25))
    np.testing.assert_allclose(pool.gain(rewards, beta, n), expected, atol=1e-13)


@pytest.mark.parametrize(("beta", "n"), [(0.2, 4), (None, 4)])
def test_jackknife_removes_the_bias_and_knows_its_error(beta, n):
    rng, m, runs = np.random.default_rng(3), 16, 1000
    plain, corrected, error = np.empty((runs, 2)), np.empty((runs, 2)), np.empty((runs, 2))
    for k in range(runs):
        row = rng.choice(LEVELS, size=m, p=P)
        point = pool.frontier(row[None], beta, n)
        plain[k], corrected[k] = pool.gain(row, beta, n), (point.reward, point.kl)
        error[k] = point.reward_error, point.kl_error
    noise = corrected.std(0) / runs**0.5
    bias, plain_bias = corrected.mean(0) - truth(beta, n), plain.mean(0) - truth(beta, n)
    assert (abs(plain_bias) > 4 * noise).all()  # what the correction is for
    assert (abs(bias) < abs(plain_bias) / 2 + 3 * noise).all()
    ratio = np.sqrt((error**2).mean(0)) / corrected.std(0)
    assert (ratio > 0.85).all() and (ratio < 1.35).all()  # for a maximum it is known to be too large, never too small


def test_errors_shrink_with_prompts():
    row = np.random.default_rng(0).choice(LEVELS, size=20, p=P)
    one, four = pool.frontier(row[None], 0.2, 3), pool.frontier(np.tile(row, (4, 1)), 0.2, 3)
    assert four.reward == pytest.approx(one.reward) and four.kl == pytest.approx(one.kl)
    assert four.reward_error == pytest.approx(one.reward_error / 2)
    assert four.kl_error == pytest.approx(one.kl_error / 2)


def test_replicates_estimate_soft_best_of_n():
    rng, n, beta = np.random.default_rng(5), 4, 0.15
    mean, error = pool.replicates(rng.choice(LEVELS, size=(10, 4001), p=P), beta, n)
    assert abs(mean - truth(beta, n)[0]) < 4 * error < 0.02
    assert abs(mean - truth(beta, 2)[0]) > 8 * error
    runs = np.array([pool.replicates(rng.choice(LEVELS, size=(3, 16), p=P), beta, n) for _ in range(600)])
    assert np.sqrt((runs[:, 1] ** 2).mean()) == pytest.approx(runs[:, 0].std(), rel=0.1)


def test_a_pool_of_equal_rewards_gains_nothing():
    assert pool.frontier(np.full((2, 5), 0.3), 0.1, 2) == pytest.approx((0.3, 0, 0, 0), abs=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(B, m\)"):
        pool.frontier(np.zeros(5), 0.1, 2)
    with pytest.raises(ValueError, match="m >= 3"):
        pool.frontier(np.zeros((2, 2)), 0.1, 2)
    with pytest.raises(ValueError, match="m >= 2 n"):
        pool.replicates(np.zeros((2, 7)), 0.1, 4)
    with pytest.raises(ValueError, match="beta"):
        pool.frontier(np.zeros((2, 5)), 0.0, 2)
    with pytest.raises(ValueError, match="finite"):
        pool.frontier(np.array([[0.0, np.nan, 1.0]]), 0.1, 2)
    with pytest.raises(ValueError, match="n must be"):
        pool.replicates(np.zeros((2, 8)), 0.1, 0)
