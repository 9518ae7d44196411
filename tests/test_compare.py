"""tune/compare.py: estimates against enumeration and scipy, KL of a tuned tiny model against the sum over outcomes."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from tests.test_certainty import everything
from tests.tiny_language import tiny_language
from tiltlib import law
from tiltlib.tune import compare

PROMPTS = ["a b c", "d e"]
OPTIONS = {"rank": 2, "steps": 4, "learning_rate": 0.03, "queries": 2, "samples": 3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def letters(texts):
    return [sum(word in "ab" for word in text.split()) for text in texts]


def test_by_prompt_is_the_mean_and_its_error_over_draws():
    values = np.array([[1.0, 3.0, 5.0], [10.0, 10.0, 13.0]])
    got = compare.by_prompt(values)
    assert got.mean == pytest.approx(7.0)
    assert got.standard_error == pytest.approx(np.sqrt(4 / 3 + 3 / 3) / 2)
    for bad in ([1.0, 2.0], [[1.0], [2.0]], [[1.0, np.nan]], np.zeros((0, 3))):
        with pytest.raises(ValueError, match="n >= 2"):
            compare.by_prompt(bad)


def test_pool_weights_are_those_of_the_equations():
    r, log_p = np.array([[0.3, -1.0, 0.8]]), np.array([[-9.0, -4.0, -7.0]])
    rlhf = compare.pool_weights("rlhf", r, log_p, 0.5, 0.4, 10).values
    assert np.allclose(rlhf[0], law.tilt(np.full(3, 1 / 3), r[0], 0.5), atol=1e-14)
    rlif = compare.pool_weights("rlif", r, log_p, 0.5, 0.4, 10).values
    expected = np.exp(log_p[0]) ** (1 / (10 * 0.4 - 1))
    assert np.allclose(rlif[0], expected / expected.sum(), atol=1e-14)
    assert np.array_equal(compare.pool_weights("supervised", r, log_p, 0.5, 0.4, 10).values, np.full((1, 3), 1 / 3))
    with pytest.raises(ValueError, match="reinforce"):
        compare.pool_weights("reinforce", r, log_p, 0.5, 0.4, 10)
    with pytest.raises(ValueError, match="no tilted optimum"):
        compare.pool_weights("rlif", r, log_p, 0.5, 0.1, 10)


@pytest.mark.parametrize("beta", [None, 0.4])
def test_watched_against_all_subsets(beta):
    rewards, other = np.array([[0.1, 0.9, 0.4, -0.3, 0.7]]), np.array([[1.0, 5.0, 0.5, -2.0, 3.5]])
    exact = []
    for group in combinations(range(5), 2):
        r, f = rewards[0, list(group)], other[0, list(group)]
        w = (r == r.max()) if beta is None else np.exp(r / beta)
        exact.append((w * f).sum() / w.sum())
    got = compare.watched(rewards, other, beta, 2, np.random.default_rng(0), shuffles=4000)
    spread = np.std([np.mean(pair) for pair in combinations(exact, 2)])
    assert abs(got.mean - np.mean(exact)) < 4 * spread / np.sqrt(4000)
    assert abs(got.mean - other.mean()) > 0.2 and got.standard_error > 0


def test_watched_breaks_ties_at_random():
    rewards, other = np.zeros((1, 4)), np.array([[1.0, 2.0, 3.0, 10.0]])
    got = compare.watched(rewards, other, None, 2, np.random.default_rng(0), shuffles=4000)
    cuts = [(other[0, a] + other[0, b]) / 2 for a, _, b, _ in permutations(range(4))]
    assert abs(got.mean - 4.0) < 4 * np.std(cuts) / np.sqrt(4000)
    with pytest.raises(ValueError, match="m >= 2n"):
        compare.watched(rewards, other, None, 3, np.random.default_rng(0))


def test_distinct_counts_words():
    assert compare.distinct([["Good good day", ""], ["a b c d", "x x x x"]]).tolist() == [[2 / 3, 1.0], [1.0, 0.25]]


def test_weighted_by_prompt_at_equal_weights_is_the_mean():
    values = np.random.default_rng(1).normal(size=(3, 50))
    plain, got = compare.by_prompt(values), compare.weighted_by_prompt(values, np.zeros((3, 50)))
    assert got.mean == pytest.approx(plain.mean) and got.standard_error == pytest.approx(plain.standard_error, rel=0.02)


def test_auc_against_scipy_and_its_error_against_repetition():
    rng = np.random.default_rng(2)

    def sheet():
        correct = rng.random((40, 3)) < 0.4
        return np.round(rng.normal(size=(40, 1)) + rng.normal(size=(40, 3)) + correct, 1), correct  # ties, clusters

    scores, correct = sheet()
    u = mannwhitneyu(scores[correct], scores[~correct]).statistic / (correct.sum() * (~correct).sum())
    assert compare.auc(scores, correct).mean == pytest.approx(u)
    kept = rng.random((40, 3)) < 0.8
    u = mannwhitneyu(scores[correct & kept], scores[~correct & kept]).statistic
    u /= (correct & kept).sum() * (~correct & kept).sum()
    assert compare.auc(scores, correct, kept).mean == pytest.approx(u)
    many = [compare.auc(*sheet()) for _ in range(200)]
    assert np.mean([a.standard_error for a in many]) == pytest.approx(np.std([a.mean for a in many]), rel=0.2)
    with pytest.raises(ValueError, match="too few"):
        compare.auc(scores, np.zeros_like(correct))
    with pytest.raises(ValueError, match="Q >= 3"):
        compare.auc(scores[:2], correct[:2])


@pytest.mark.parametrize("name", compare.METHODS)
def test_kl_of_a_tuned_model_against_the_sum_over_all_outcomes(name):
    world = tiny_language()
    pool = world.sample(PROMPTS, 6, max_new_tokens=2, generator=seeded(1))
    options = {"beta": 0.5, "beta_if": 2.0, "seed": 3} | OPTIONS
    tuned = compare.tune(name, world, PROMPTS, pool, letters, **options).world
    tokens, lengths = (x.expand(2, *x.shape[1:]) for x in everything(world))
    new, old = (w.log_prob(PROMPTS, tokens, lengths).double().numpy() for w in (tuned, world))
    exact = (np.exp(new) * (new - old)).sum(1).mean()
    score = {"letters": lambda texts: np.array([letters(row) for row in texts])}
    found = compare.evaluate(tuned, world, PROMPTS, 400, score, max_new_tokens=2, seed=4)
    assert exact > 0.01
    mean, error = found["kl"]
    assert abs(mean - exact) < 4 * error and error < exact
    mean, error = found["inverse"]
    assert abs(mean - 1) < 4 * error
    mean, error = found["log_prob"]
    assert abs(mean - (np.exp(new) * old).sum(1).mean()) < 4 * error
    assert found["largest"] <= np.abs(new - old).max() + 1e-4 and 0 <= found["letters"][0] <= 2


def test_an_untuned_model_has_no_kl():
    world = tiny_language()
    found = compare.evaluate(world, world, PROMPTS, 20, {}, max_new_tokens=3, seed=4)
    assert found["largest"] < 1e-5 and abs(found["kl"][0]) < 1e-5 and found["log_prob"][0] < -1


def test_tuning_repeats_and_leaves_the_base_alone():
    world = tiny_language()
    pool = world.sample(PROMPTS, 6, max_new_tokens=3, generator=seeded(1))
    before = world.log_prob(PROMPTS, pool.tokens, pool.lengths)
    runs = [
        compare.tune("rlhf", world, PROMPTS, pool, letters, beta=0.5, beta_if=2.0, seed=3, **OPTIONS).history
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert torch.equal(before, world.log_prob(PROMPTS, pool.tokens, pool.lengths))
