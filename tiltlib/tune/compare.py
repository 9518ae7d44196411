"""Four ways to tune a language model on equal terms, and what a model has gained and paid, on prompts it may not know.

The prices are measured where they are paid: KL to the base on the tuned model's own samples.
"""

import numpy as np
import torch

from tiltlib import bestofn, law
from tiltlib.tune import lora, weighted
from tiltlib.tune.weighted import Estimate

METHODS = ("rlhf", "rlif", "supervised", "reinforce")


def by_prompt(values) -> Estimate:
    """Mean of (B, n) values, n >= 2 draws for each of B prompts, with its standard error for these prompts."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2 or not np.isfinite(values).all():
        raise ValueError(f"values are finite and (B, n) with n >= 2, got shape {values.shape}")
    variance = values.var(1, ddof=1) / values.shape[1]
    return Estimate(float(values.mean()), float(np.sqrt(variance.sum()) / len(values)))


def pool_weights(name, rewards, log_prob, beta, beta_if, length):
    """Weights (B, n) of a pool for a method on a fixed pool: Jiao, Chen and Li 2025, eqs. (19) and (21).

    "rlhf" weighs by exp(rewards / beta), "rlif" by exp(log_prob / (length beta_if - 1)); "supervised" weighs all alike.
    """
    if name not in METHODS[:3]:
        raise ValueError(f"weights are those of {', '.join(METHODS[:3])}, not of {name!r}")
    if name == "rlhf":
        logs = np.asarray(rewards, dtype=np.float64) / law.check_beta(beta)
    elif name == "rlif":
        logs = np.asarray(log_prob, dtype=np.float64) / weighted.rlif_temperature(beta_if, length)
    else:
        logs = np.zeros(np.shape(rewards))
    return weighted.normalise(logs, floor=0)  # the chapter prints the effective sample sizes


def tune(name, world, prompts, pool, score, *, beta, beta_if, seed, **options):
    """The base `world`, tuned on `prompts` by one of METHODS; returns `lora.Tuned`.

    pool: its `Samples` (B, n) for these prompts, which REINFORCE + KL does not use: it draws as many itself.
    score: n texts -> n numbers, such as a `Reward`. seed: of LoRA's start, the choice of prompts and all draws.
    options: rank, steps, learning_rate, queries, samples (of `lora.fit` and `lora.reinforce` alike).
    """
    generator = torch.Generator(world.device).manual_seed(seed)
    length = pool.tokens.shape[-1]
    if name == "reinforce":
        return lora.reinforce(world, prompts, score, beta, generator=generator, max_new_tokens=length, **options)
    rewards = np.array([score(texts) for texts in pool.texts])
    weights = pool_weights(name, rewards, pool.log_prob.cpu().numpy(), beta, beta_if, length)
    return lora.fit(world, prompts, pool, weights, generator=generator, **options)


def evaluate(tuned, base, prompts, n, scores, *, max_new_tokens, seed) -> dict:
    """What n fresh samples per prompt of the model `tuned` say, as JSON-able [mean, standard error] pairs.

    scores: {name: function of B lists of texts -> (B, n)}. Besides them: "kl", the Monte Carlo mean of
    log tuned - log base in nats per text; "inverse", the mean of base/tuned, which is one if all is well and the
    weights are not too heavy; "log_prob", of a text under the base; "per_token", the same divided by its length;
    "largest", the largest |log tuned - log base| of a sample, a number.
    """
    generator = torch.Generator(base.device).manual_seed(seed)
    drawn = tuned.sample(prompts, n, max_new_tokens=max_new_tokens, generator=generator)
    own = drawn.log_prob.double().cpu().numpy()
    under_base = base.log_prob(prompts, drawn.tokens, drawn.lengths).double().cpu().numpy()
    values = {
        "kl": own - under_base,
        "inverse": np.exp(under_base - own),
        "log_prob": under_base,
        "per_token": under_base / drawn.lengths.cpu().numpy(),
    } | {name: score(drawn.texts) for name, score in scores.items()}
    result = {name: list(by_prompt(value)) for name, value in values.items()}
    return result | {"largest": float(np.abs(values["kl"]).max())}


def watched(rewards, other, beta, n, generator, shuffles=200) -> Estimate:
    """Mean of another quantity when (soft) best-of-n selects by the reward: proxy pushed, this one watched.

    rewards, other: (B, m), m >= 2n samples for each prompt; beta: temperature, or None for hard best-of-n; generator:
    numpy.random.Generator. The samples are cut into groups of n, each of which returns one; the mean is unbiased, for
    fresh candidates, and averaged over shuffles. The standard error is that of one cut: an upper bound.
    """
    rewards, other, n = np.asarray(rewards, float), np.asarray(other, float), law.check_count(n)
    if rewards.ndim != 2 or rewards.shape != other.shape or rewards.shape[1] < 2 * n:
        raise ValueError(f"rewards and other are (B, m) with m >= 2n = {2 * n}: {rewards.shape}, {other.shape}")
    groups, cuts = rewards.shape[1] // n, []
    for _ in range(law.check_count(shuffles, "shuffles")):
        order = generator.permuted(np.tile(np.arange(rewards.shape[1]), (len(rewards), 1)), axis=1)[:, : groups * n]
        r, f = (np.take_along_axis(x, order, 1).reshape(-1, groups, n) for x in (rewards, other))
        if beta is None:  # ties fall at random: the shuffle has put them in order
            cuts.append(np.take_along_axis(f, r.argmax(-1)[..., None], -1)[..., 0])
        else:
            cuts.append(bestofn.self_normalised(r, f, beta))
    errors = [by_prompt(cut).standard_error ** 2 for cut in cuts]
    return Estimate(float(np.mean(cuts)), float(np.sqrt(np.mean(errors))))


def distinct(texts):
    """Share of distinct words in each of B lists of texts, (B, n): below one where words repeat; 1 for no words."""
    split = [[text.lower().split() for text in row] for row in texts]
    return np.array([[len(set(words)) / max(len(words), 1) if words else 1.0 for words in row] for row in split])


def weighted_by_prompt(values, log_weights) -> Estimate:
    """Self-normalised mean of (B, n) values with log-weights (B, n), each prompt by itself, and its standard error."""
    weights = weighted.normalise(log_weights, floor=0).values
    rows = [weighted.estimate(f, w) for f, w in zip(np.asarray(values, float), weights, strict=True)]
    means, errors = np.array(rows).T
    return Estimate(float(means.mean()), float(np.linalg.norm(errors) / len(rows)))


def auc(scores, correct, kept=True) -> Estimate:
    """Probability that a correct item scores above a wrong one (ties half), with its standard error.

    scores: (Q, n) finite, correct: (Q, n) bool; kept: the items that count, as bools. The error is a jackknife over
    the Q >= 3 questions, whose answers are not independent. Raises ValueError when leaving out one question leaves no
    correct or no wrong answer.
    """
    scores, correct = np.asarray(scores, dtype=np.float64), np.asarray(correct, dtype=bool)
    if scores.ndim != 2 or scores.shape != correct.shape or len(scores) < 3 or not np.isfinite(scores).all():
        raise ValueError(f"scores and correct are (Q, n), Q >= 3, finite: {scores.shape}, {correct.shape}")
    owner = np.broadcast_to(np.arange(len(scores))[:, None], scores.shape)
    good, bad = correct & kept, ~correct & kept
    gap = scores[good][:, None] - scores[bad]
    wins, mine, theirs = (gap > 0) + (gap == 0) / 2, owner[good], owner[bad]
    left = []
    for question in range(len(scores)):
        part = wins[np.ix_(mine != question, theirs != question)]
        if part.size == 0:
            raise ValueError("too few correct or wrong answers to compare them with an error")
        left.append(part.mean())
    error = np.sqrt((len(left) - 1) * np.var(left))
    return Estimate(float(wins.mean()), float(error))
