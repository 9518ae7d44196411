"""Best-of-N, exact at every N: its laws, their expansion in 1/N, bounds, what removes the bias, and the samplers.

Soft best-of-N draws N candidates from the reference p and returns one of them with probability proportional to
w = exp(r/beta) (Jiao, Chen and Li 2025, eq. (13)). Everything exact here rests on one identity,
    p_N(o) = N p(o) w(o) E[1 / (w(o) + S)] = N p(o) w(o) int_0^inf exp(-t w(o)) phi(t)^(N-1) dt,
where S is the total weight of the other N - 1 candidates and phi(t) = E_p exp(-t w). Laws are float64 (K,), logarithms
natural, beta in units of r.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from tiltlib import law

# The quadrature. With t = exp(x - exp(-x)) / (N w_max) and nodes x = STEP * j, the sum of dt exp(-t s) misses 1/s by
# less than 2e-21 / s for every s <= N w_max, hence for every total weight that N candidates can have: a relative error
# that survives the expectation. The step is a dyadic number, so the nodes are exact; a rounded step costs 6e-14.
STEP = 3 / 16
FIRST = -20  # at the first node t s is e^-46 or less
DEAD = 4.5  # an outcome with t w > e^4.5 = 90 no longer contributes
GAP = 46.0  # weights that are e^-(GAP + log N) apart never meet in one integrand
LOG_TINY = -745.0  # exp of less is zero
BLOCK = 24_000  # entries of a block, nodes times outcomes: bounds the memory; larger temporaries would be slower


class Expansion(NamedTuple):
    """p_N = tilted (1 + c1/N + c2/N^2 + O(N^-3)), and the limits of N TV, N^2 KL and N (E_N r - E* r)."""

    tilted: np.ndarray
    c1: np.ndarray
    c2: np.ndarray
    chi2: float
    tv: float
    kl: float
    reward: float


class Continuous(NamedTuple):
    """Laws of a continuous reward as masses at quadrature nodes; `reward` holds the nodes, in decreasing order."""

    reward: np.ndarray
    reference: np.ndarray
    tilted: np.ndarray
    law: np.ndarray


class _Block(NamedTuple):
    """Some nodes t of the integral, for the outcomes lo, lo + 1, ... in order of decreasing weight."""

    lo: int
    weight: np.ndarray  # t w at the block's first node, (k,)
    decay: np.ndarray  # exp(-t w), (nodes, k)
    dt: np.ndarray  # quadrature weights in units of the first node's t, (nodes,)
    log_phi: np.ndarray  # (nodes,)


def soft_law(p, r, beta, n):
    """Law (K,) of soft best-of-N: the exact value of eq. (26) of Jiao, Chen and Li 2025 at any N.

    p: law (K,); r: reward (K,); beta: temperature > 0 in units of r; n: number of candidates >= 1. The absolute error
    is below 1e-13 of mass (relative: about 1e-14 wherever the result is above 1e-290), for n up to 1e9, K up to 1e5
    and rewards of any range. n = 1 gives p back. Raises ValueError or TypeError as the checks of `law` do.
    """
    p, r, beta, n = _check(p, r, beta, n)
    if n == 1:
        return p
    support = np.flatnonzero(p)
    order = support[np.argsort(-r[support], kind="stable")]
    out, share = np.zeros_like(p), np.zeros(order.size)
    for block in _blocks(p[order], r[order], beta, n, n - 1):
        integrand = block.dt * _power(block.log_phi, n - 1)
        share[block.lo :] += block.weight * (integrand @ block.decay)
    out[order] = n * p[order] * share
    return out


def hard_law(p, r, n):
    """Law (K,) of best-of-N: the candidate of highest reward, a tie broken uniformly over the tied candidates.

    This is the limit beta -> 0 of `soft_law`. Within a tie the law is p conditioned on the tied outcomes, because a
    tied outcome of larger probability brings more candidates. Raises ValueError or TypeError as the checks of `law` do.
    """
    p = law.check_law(p)
    r, n = law.check_reward(r, p), law.check_count(n)
    p = p / p.sum()
    support = np.flatnonzero(p)
    _, group = np.unique(-r[support], return_inverse=True)  # groups of equal reward, best first
    mass = np.bincount(group, p[support])
    above = np.concatenate(([0.0], np.cumsum(mass)[:-1]))
    upto = np.cumsum(mass[::-1])[::-1]  # a reward as good as this group's or worse
    with np.errstate(divide="ignore"):
        log_upto = np.where(above < 0.5, np.log1p(-above), np.log(upto))
        log_share = np.log1p(-np.minimum(mass / upto, 1.0))
    wins = np.exp(n * log_upto) * -np.expm1(n * log_share)  # upto^n - below^n without cancellation
    out = np.zeros_like(p)
    out[support] = wins[group] * p[support] / mass[group]
    return out


def iterated_kernel(p, r, beta, n):
    """Transition matrix (K, K), from row to column, of one round of iterated soft best-of-N.

    A round keeps the current outcome, draws n - 1 fresh candidates from p, and selects softly among the n (iterated
    sampling importance resampling: Andrieu, Lee and Vihola 2018). The tilted law is invariant, and the kernel
    reversible with respect to it. n = 1 gives the identity. Raises ValueError or TypeError as the checks of `law` do.
    """
    p, r, beta, n = _check(p, r, beta, n)
    if n == 1:
        return np.eye(p.size)
    order = np.argsort(-r, kind="stable")
    stay, fresh = np.zeros(p.size), np.zeros((p.size, p.size))
    for block in _blocks(p[order], r[order], beta, n, n - 2):
        keeps = block.dt * _power(block.log_phi, n - 1)
        leaves = block.dt * _power(block.log_phi, n - 2)
        stay[block.lo :] += block.weight * (keeps @ block.decay)
        fresh[block.lo :, block.lo :] += ((block.decay.T * leaves) @ block.decay) * block.weight
    out = np.empty_like(fresh)
    out[np.ix_(order, order)] = (n - 1) * fresh * p[order] + np.diag(stay)
    return out


def iterated_rate(p, r, beta):
    """The limit of n times the second eigenvalue of `iterated_kernel`: a round shrinks the error by about rate / n.

    It is the largest root of sum p*/(u - x) = 0 between the two largest values of u = dp*/dp (the largest value itself,
    when two outcomes share it). Needs two outcomes of positive probability, else ValueError.
    """
    p, u = _ratio(p, r, beta)
    tilted, u = (p * u)[p > 0], u[p > 0]
    if u.size < 2:
        raise ValueError("the rate needs at least two outcomes of positive probability")
    second, first = np.sort(u)[-2:]
    if first == second:
        return float(first)

    # multiplied by (first - x)(x - second), which has no poles and changes sign between the two
    def poles_removed(x):
        top, next_ = u == first, u == second
        rest = ~(top | next_)
        gaps = (first - x) * (x - second)
        return (
            (x - second) * tilted[top].sum()
            - (first - x) * tilted[next_].sum()
            + gaps * (tilted[rest] / (u[rest] - x)).sum()
        )

    return float(brentq(poles_removed, second, first, xtol=1e-14 * first, rtol=1e-14))


def expansion(p, r, beta):
    """The expansion of `soft_law` in 1/N, as an `Expansion`.

    With u = dp*/dp, chi2 = Var_p(u) and m3 = E_p (u - 1)^3: c1 = 1 + chi2 - u and
    c2 = (u-1)^2 - chi2 - 3 (u-1) chi2 - m3 + 3 chi2^2; both have mean zero under the tilted law. tv = E*|c1| / 2,
    kl = E* c1^2 / 2 (for either direction of the divergence) and reward = E* c1 r, which is never positive.
    c1 and c2 are 0 where p is. Raises ValueError or TypeError as the checks of `law` do.
    """
    r = law.check_reward(r, p)
    p, u = _ratio(p, r, beta)
    tilted, excess = p * u, u - 1
    chi2, m3 = p @ excess**2, p @ excess**3
    c1 = np.where(p > 0, chi2 - excess, 0.0)
    c2 = np.where(p > 0, excess**2 - chi2 - 3 * excess * chi2 - m3 + 3 * chi2**2, 0.0)
    tv, kl, reward = tilted @ abs(c1) / 2, tilted @ c1**2 / 2, (tilted * c1) @ (r - tilted @ r)
    return Expansion(tilted, c1, c2, float(chi2), float(tv), float(kl), float(reward))


def soft_law_continuous(reward, beta, n, step=1 / 16):
    """Soft best-of-N for a continuous reward, as `Continuous`: masses of p, p* and p_N at nodes of the reward.

    reward: the law of r under the reference, with `ppf` and `isf` as a frozen `scipy.stats` distribution has them. The
    nodes are equally spaced (`step`) in the logit of the rank, down to tail probabilities of 1e-300, so that weights
    with heavy tails are resolved: an exponential reward of mean m gives weights of Pareto index beta / m.
    ValueError: E exp(r/beta) is infinite or too slowly converging, a node is not finite, step not in (0, 1/2].
    """
    beta, n = law.check_beta(beta), law.check_count(n)
    if not 0 < step <= 0.5:
        raise ValueError(f"step must lie in (0, 1/2], not {step!r}")
    logit = step * np.arange(math.ceil(-690 / step), math.floor(40 / step) + 1)  # of the tail probability
    tail = 1 / (1 + np.exp(-logit))
    rank = 1 / (1 + np.exp(logit))
    nodes = np.where(tail < 0.5, reward.isf(np.minimum(tail, 0.5)), reward.ppf(np.minimum(rank, 0.5)))
    if not np.isfinite(nodes).all():
        raise ValueError("the reward has infinite quantiles at tail probabilities between 1e-300 and 1 - 1e-17")
    mass = tail * rank / (tail @ rank)
    tilted = law.tilt(mass, nodes, beta)
    if tilted[0] > 1e-6 * step:
        raise ValueError("E exp(r/beta) is infinite or converges too slowly: the tilted law does not exist")
    return Continuous(nodes, mass, tilted, soft_law(mass, nodes, beta, n))


def richardson(p, r, beta, n):
    """2 p_2n - p_n: a signed measure (K,) of total mass one whose distance to the tilted law is O(n^-2)."""
    return 2 * soft_law(p, r, beta, 2 * law.check_count(n)) - soft_law(p, r, beta, n)


def self_normalised(r, values, beta):
    """sum_i w_i values_i / sum_i w_i over the last axis, w = exp(r/beta); its mean is E f under `soft_law`.

    r, values: rewards and values of the candidates, (..., N), any batch in front; returns (...,).
    """
    r, beta = _check_draws(r), law.check_beta(beta)
    w = np.exp((r - r.max(-1, keepdims=True)) / beta)
    return (w * values).sum(-1) / w.sum(-1)


def rhee_glynn(draw, beta, *, runs, levels, generator):
    """Estimates whose mean is E f under `soft_law` at N = 2^levels, though most runs draw only a few candidates.

    draw(shape) -> (rewards, values) of independent reference draws; beta: temperature; levels: where the telescoping
    sum is truncated; generator: numpy.random.Generator, for the levels. A run draws a level l with probability
    proportional to 2^(-3l/2), then 2^(l+1) candidates. It returns their mean value, plus the difference between the
    self-normalised mean of all and the average of those of the two halves, divided by the level's probability
    (Rhee and Glynn 2015; antithetic halves: Giles and Szpruch 2014).
    Returns the estimates (runs,) and the numbers of candidates (runs,).
    """
    beta, runs, levels = law.check_beta(beta), law.check_count(runs, "runs"), law.check_count(levels, "levels")
    chance = 2.0 ** (-1.5 * np.arange(levels))
    chance /= chance.sum()
    level = generator.choice(levels, size=runs, p=chance)
    estimate = np.empty(runs)
    for l in np.unique(level):
        here = np.flatnonzero(level == l)
        r, values = draw((here.size, 2 ** (l + 1)))
        estimate[here] = values.mean(-1) + antithetic(r, values, beta) / chance[l]
    return estimate, 2 ** (level + 1)


def antithetic(r, values, beta):
    """Self-normalised mean of 2m candidates (..., 2m) less the average of those of its two halves; returns (...,)."""
    r, values = _check_draws(r), np.asarray(values)
    if r.shape[-1] % 2:
        raise ValueError(f"an even number of candidates is needed to halve them, not {r.shape[-1]}")
    m = r.shape[-1] // 2
    halves = self_normalised(r[..., :m], values[..., :m], beta) + self_normalised(r[..., m:], values[..., m:], beta)
    return self_normalised(r, values, beta) - halves / 2


def select(r, beta, generator):
    """Soft best-of-N among given draws: indices (...,) into the last axis of the rewards r (..., N).

    Candidate i is chosen with probability proportional to exp(r_i/beta), by the Gumbel trick, so no weight overflows.
    generator: numpy.random.Generator. Jiao, Chen and Li 2025, eq. (13).
    """
    r, beta = _check_draws(r), law.check_beta(beta)
    return np.argmax((r - r.max(-1, keepdims=True)) / beta + generator.gumbel(size=r.shape), axis=-1)


def select_hard(r, generator):
    """Best-of-N among given draws (..., N): the index of the highest reward, uniform over the tied candidates."""
    r = _check_draws(r)
    return np.argmax(np.where(r == r.max(-1, keepdims=True), generator.random(r.shape), -1.0), axis=-1)


def accept(r, r_max, beta, generator):
    """Rejection sampling: for each reference draw of reward r (...,), whether it is kept as a draw of the tilted law.

    Kept with probability exp((r - r_max)/beta), r_max an upper bound of the reward; ValueError if a reward exceeds it.
    """
    r, beta = np.asarray(r, dtype=np.float64), law.check_beta(beta)
    if not (np.isfinite(r).all() and np.isfinite(r_max) and (r <= r_max).all()):
        raise ValueError("rewards must be finite and at most r_max")
    return np.log1p(-generator.random(r.shape)) < (r - r_max) / beta


def rejection_cost(p, r, beta):
    """Reference draws that rejection sampling needs per exact draw of the tilted law: max w / Z = max dp*/dp >= 1."""
    p, u = _ratio(p, r, beta)
    return float(u.max())


def tv_bound(p, r, beta, n):
    """E*[(u - 1)_+ / (N - 1 + u)]: bounds TV(p_N, p*) at every N, without a bound on the reward (Jensen)."""
    n = law.check_count(n)
    p, u = _ratio(p, r, beta)
    return float((p * u) @ (np.maximum(u - 1, 0) / (n - 1 + u)))


def kl_bound(p, r, beta, n):
    """log(1 + chi2/N) nats: bounds KL(p* || p_N) at every N."""
    return math.log1p(expansion(p, r, beta).chi2 / law.check_count(n))


def reference_kl_bound(r_max, beta, n):
    """log(N / (1 + (N-1) exp(-r_max/beta))) nats: bounds KL(p_N || p) for rewards in [0, r_max].

    The form of Aminian and others (2025); r_max/beta from it at N -> infinity.
    """
    beta, n = law.check_beta(beta), law.check_count(n)
    return math.log(n) - math.log1p((n - 1) * math.exp(-_check_range(r_max) / beta))


def source_bound(r_max, beta, n):
    """exp(r_max/beta) sqrt(log N / N): the relative error proved above (29) by Jiao, Chen and Li 2025, constant one."""
    beta, n = law.check_beta(beta), law.check_count(n)
    return float(np.exp(_check_range(r_max) / beta) * math.sqrt(math.log(n) / n))


def hard_kl(n):
    """log N - (N-1)/N nats: KL(best-of-N || reference) for a reward without ties, the largest of any selection rule."""
    n = law.check_count(n)
    return math.log(n) - (n - 1) / n


def selection_bound(mass, n):
    """1 - (1 - mass)^N: the largest probability with which a rule that picks one of N draws hits a set of `mass`."""
    mass = np.asarray(mass, dtype=np.float64)
    if not ((mass >= 0) & (mass <= 1)).all():
        raise ValueError("mass must lie in [0, 1]")
    with np.errstate(divide="ignore"):
        return -np.expm1(law.check_count(n) * np.log1p(-mass))


def _blocks(p, r, beta, n, power):
    """Nodes of int_0^inf ... phi(t)^power dt over the outcomes p, r, sorted by decreasing reward, block by block.

    Where two neighbouring weights are so far apart that no node feels both, the grid starts afresh: below the gap, with
    the heavier outcomes gone (exp(-t w) = 0) and weights taken relative to the first lighter one, so that a range of
    rewards that no single grid could span, or float64 hold, is served exactly.
    """
    heavier = np.concatenate(([0.0], np.cumsum(p)))  # probability of the outcomes before each
    with np.errstate(over="ignore"):  # -inf: a gap that leaves float64
        starts = np.flatnonzero((r[:-1] - r[1:]) / beta > GAP + math.log(n)) + 1
    for start, stop in zip((0, *starts), (*starts, r.size), strict=True):
        with np.errstate(over="ignore"):
            log_w = (r - r[start]) / beta
        last = math.ceil((DEAD + math.log(n) - log_w[stop - 1]) / STEP) + 1
        size = min(max(BLOCK // (r.size - start), 4), 64)
        for j in range(FIRST, last, size):
            x = STEP * np.arange(j, min(j + size, last))
            log_t = x - np.exp(-x) - math.log(n)
            lo = start + int(np.searchsorted(-log_w[start:stop], log_t[0] - DEAD))
            weight = np.exp(log_w[lo:] + log_t[0])
            t = np.exp(log_t - log_t[0])
            decay = np.multiply.outer(-t, weight)
            np.expm1(decay, out=decay)  # in place: large temporaries cost more than the arithmetic
            less = decay @ p[lo:] - heavier[lo]  # phi - 1
            decay += 1
            with np.errstate(divide="ignore"):
                log_phi = np.where(less > -0.5, np.log1p(np.maximum(less, -0.5)), np.log(decay @ p[lo:]))
            yield _Block(lo, weight, decay, STEP * (1 + np.exp(-x)) * t, log_phi)
            if power and power * log_phi[-1] < LOG_TINY:
                return


def _power(log_phi, m):
    """phi^m, with 0^0 = 1."""
    return np.exp(m * log_phi) if m else np.ones_like(log_phi)


def _ratio(p, r, beta):
    """The law p and u = dp*/dp, 0 where p is."""
    log_u = law.log_ratio(p, r, beta)
    p = law.check_law(p)
    return p, np.exp(np.where(p > 0, log_u, -np.inf))


def _check(p, r, beta, n):
    """Validated arguments; p is divided by its sum, since N = 1e9 would notice the tolerance of `check_law`."""
    p = law.check_law(p)
    return p / p.sum(), law.check_reward(r, p), law.check_beta(beta), law.check_count(n)


def _check_draws(r):
    r = np.asarray(r, dtype=np.float64)
    if r.ndim == 0 or r.shape[-1] == 0:
        raise ValueError(f"rewards must have shape (..., N) with N >= 1, not {r.shape}")
    if not np.isfinite(r).all():
        raise ValueError("rewards must be finite")
    return r


def _check_range(r_max):
    if not (np.isfinite(r_max) and r_max >= 0):
        raise ValueError(f"r_max must be finite and not negative, not {r_max!r}")
    return float(r_max)
