"""A pool of scored samples as a finite alphabet: what best-of-N gains in reward and costs in KL, with standard errors.

Best-of-N changes the reference by a factor that depends on an outcome through its reward alone (Jiao, Chen and Li 2025,
eq. (26)). So the rewards of m samples are enough to estimate both E_N r and KL(p_N || p), although p is a law over far
more texts than could ever be listed: the alphabet is the pool's distinct rewards, its law p their frequencies.
Taking a pool for the law has a bias of order N/m, because N draws from a pool collide. The delete-one jackknife
measures this bias and removes its leading term, and gives the standard error over pools (Efron 1982).
"""

from typing import NamedTuple

import numpy as np

from tiltlib import bestofn, law


class Point(NamedTuple):
    """A place on the reward-KL plane, averaged over prompts, with standard errors over the samples."""

    reward: float
    reward_error: float
    kl: float  # nats
    kl_error: float


def selected(rewards, beta, n):
    """Reward levels (K,), their law in the pool and after (soft) best-of-n: all exact for the pool as it is.

    rewards (m,): of a pool; beta: temperature, or None for hard best-of-n, which takes the highest reward.
    """
    levels, counts = np.unique(np.asarray(rewards, dtype=np.float64), return_counts=True)
    p = counts / counts.sum()
    return levels, p, _law(p, levels, beta, n)


def gain(rewards, beta, n):
    """E_n r and KL(p_n || p) in nats, (2,), when n candidates are drawn from the pool (m,) with replacement."""
    levels, p, after = selected(rewards, beta, n)
    return _gain(p, levels, after)


def frontier(rewards, beta, n) -> Point:
    """What (soft) best-of-n would gain on fresh samples, estimated from pools.

    rewards (B, m): m >= 3 independent samples for each of B prompts; beta: temperature, or None for hard best-of-n;
    n: number of candidates, well below m (an estimate from fewer than about 4n samples is mostly correction). The
    standard errors are of the mean over these B prompts, over other pools. Raises ValueError for fewer than 3 samples.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 3 or rewards.shape[0] < 1:
        raise ValueError(f"rewards have shape (B, m) with m >= 3, got {rewards.shape}")
    value, variance = zip(*(_jackknife(row, beta, n) for row in rewards), strict=True)
    (reward, kl), (reward_error, kl_error) = np.mean(value, 0), np.sqrt(np.sum(variance, 0)) / len(rewards)
    return Point(float(reward), float(reward_error), float(kl), float(kl_error))


def replicates(rewards, beta, n) -> tuple[float, float]:
    """Mean reward of soft best-of-n on samples (B, m) cut into groups of n, and its standard error.

    Each group gives its self-normalised mean, which is what soft best-of-n returns from it on average. The groups of a
    prompt are independent, so the error is theirs; what is left over when n does not divide m is not used. Raises
    ValueError when there are fewer than two groups.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    n = law.check_count(n)
    groups = rewards.shape[-1] // n
    if rewards.ndim != 2 or groups < 2:
        raise ValueError(f"rewards have shape (B, m) with m >= 2 n = {2 * n}, got {rewards.shape}")
    rewards = rewards[:, : groups * n].reshape(len(rewards), groups, n)
    means = bestofn.self_normalised(rewards, rewards, beta)
    variance = means.var(-1, ddof=1) / groups
    return float(means.mean()), float(np.sqrt(variance.sum()) / len(rewards))


def _law(p, levels, beta, n):
    return bestofn.hard_law(p, levels, n) if beta is None else bestofn.soft_law(p, levels, beta, n)


def _gain(p, levels, after):
    return np.array([after @ levels, law.kl(after, p)])


def _jackknife(row, beta, n):
    """Bias-corrected gain (2,) and its variance (2,) over pools."""
    levels, counts = np.unique(row, return_counts=True)
    m = counts.sum()
    whole = _gain(counts / m, levels, _law(counts / m, levels, beta, n))
    without = []  # samples of equal reward are interchangeable: leave out one of each level
    for k in range(levels.size):
        left = counts - (np.arange(levels.size) == k)
        p, seen = left[left > 0] / (m - 1), levels[left > 0]
        without.append(_gain(p, seen, _law(p, seen, beta, n)))
    share = counts[:, None] / m
    mean = (share * without).sum(0)
    return m * whole - (m - 1) * mean, (m - 1) * (share * (without - mean) ** 2).sum(0)
