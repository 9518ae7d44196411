"""Laws on a finite alphabet, exact: tilts, powers, divergences, and what RLHF and RLIF maximise.

A law is a float64 array of shape (K,): non-negative, summing to one. Logarithms are natural, so entropies and
divergences are in nats. A reward is a finite array of shape (K,); the temperature `beta` has the unit of the reward.
Everything is computed from log-weights: a reward of range 1e4 at beta = 1e-6 neither overflows nor turns into NaN.
The `check_*` functions reject bad input before any work starts; every function here calls them.
Equations are those of Jiao, Chen and Li 2025 unless another source is named.
"""

import math
import operator
from numbers import Real

import numpy as np
from scipy.special import entr, expit, logsumexp, softmax

SUM_TOLERANCE = 1e-9  # how far from one the sum of a law may be


def check_vector(x, name):
    """Return `x` as a float64 array of shape (K,), K >= 1, all entries finite; else ValueError or TypeError."""
    if np.iscomplexobj(x):
        raise TypeError(f"{name} must be real, not complex")
    try:
        x = np.array(x, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array of real numbers: {error}") from None
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} must have shape (K,) with K >= 1, not {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite; entry {int(np.flatnonzero(~np.isfinite(x))[0])} is not")
    return x


def check_law(p, name="p"):
    """Return `p` as a law, float64 (K,). ValueError: an empty alphabet, a negative entry, or a sum other than one."""
    p = _check_measure(p, name)
    if abs(p.sum() - 1) > SUM_TOLERANCE:
        raise ValueError(f"{name} must sum to one, not to {p.sum()!r}; divide by the sum in float64 first")
    return p


def check_reward(r, p=None, name="r"):
    """Return `r` as float64 (K,), finite everywhere (also where p is zero), with as many entries as the law `p`."""
    r = check_vector(r, name)
    if p is not None and r.shape != np.shape(p):
        raise ValueError(f"{name} has {r.size} entries, the law has shape {np.shape(p)}")
    return r


def check_beta(beta, name="beta"):
    """Return the temperature as a float: finite and > 0, in units of the reward. ValueError or TypeError otherwise."""
    return _check_real(beta, name, positive=True)


def check_count(n, name="n"):
    """Return a count as an int >= 1. TypeError for what is not an integer (1.0 and True too), ValueError below one."""
    if isinstance(n, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, not {n!r}")
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {n!r}") from None
    if n < 1:
        raise ValueError(f"{name} must be at least 1, not {n}")
    return n


def log_ratio(p, r, beta):
    """log u = r/beta - log Z, the log-density (K,) of the tilted law with respect to `p`; E_p exp(log u) = 1.

    Defined also where p is zero. An entry may be -inf only when the reward's range over beta leaves float64 (1e308).
    """
    p, r, beta = _check_tilt(p, r, beta)
    x = _centred(p, r, beta)
    return x - _log_mean_exp(p, x)


def log_partition(p, r, beta):
    """log Z = log E_p exp(r/beta), a float. beta log Z is the largest value of the RLHF objective (5).

    OverflowError where it leaves float64, which takes |r|/beta beyond 1e308.
    """
    p, r, beta = _check_tilt(p, r, beta)
    log_z = float(r[p > 0].max()) / beta + float(_log_mean_exp(p, _centred(p, r, beta)))
    if not math.isfinite(log_z):
        raise OverflowError(f"log Z leaves float64 at beta = {beta}")
    return log_z


def tilt(p, r, beta):
    """The tilted law p exp(r/beta) / Z, shape (K,): the maximiser of the RLHF objective (5), by equation (9).

    p: law (K,); r: reward (K,); beta: temperature > 0 in units of r. beta -> infinity gives p back; beta -> 0 gives
    p conditioned on the outcomes of highest reward in its support. Outcomes of zero probability stay at zero.
    """
    return _normalise(_log_tilt(*_check_tilt(p, r, beta)))


def power(p, a):
    """The law proportional to p**a, shape (K,): equations (10) and (17).

    a is any finite real number; a = 1 gives p, a = 0 the uniform law on the support of p. With a negative exponent a
    law that has zeros cannot be normalised: ValueError.
    """
    p, a = check_law(p), _check_real(a, "a")
    if a < 0 and not p.all():
        raise ValueError(f"p**({a}) has infinite mass: p has outcomes of probability zero")
    log_p = _log(p)
    return _normalise(np.multiply(a, log_p, out=log_p, where=p > 0))


def entropy(p):
    """Entropy in nats, equation (1), with 0 log 0 = 0; between 0 and log K."""
    return float(entr(check_law(p)).sum())


def kl(p, q):
    """Generalised Kullback-Leibler divergence sum p log(p/q) - p + q in nats, equation (2).

    p, q: non-negative vectors (K,), normalised or not; for two laws it is the usual KL(p || q). Never negative, zero
    only for p = q, and inf where q = 0 < p. Keeps its relative accuracy when p and q almost agree.
    """
    p, q = _check_pair(p, q, _check_measure)
    near = np.abs(p - q) < 0.5 * q
    with np.errstate(invalid="ignore"):  # -inf less -inf where both are zero
        log_p_over_q = _log(p) - _log(q)
    log_p_over_q[near] = np.log1p((p[near] - q[near]) / q[near])
    return _divergence(p, q, log_p_over_q)


def tv(p, q):
    """Total variation distance (1/2) sum |p - q| of two laws (K,): between 0 and 1."""
    p, q = _check_pair(p, q, check_law)
    return float(np.abs(p - q).sum() / 2)


def bradley_terry(r):
    """The human-preference law exp(r) / sum exp(r), equation (4), shape (K,); blind to a constant added to r."""
    return softmax(check_reward(r))


def preference(r):
    """Bradley-Terry probability that the row outcome is preferred to the column outcome, equation (3), (K, K)."""
    r = check_reward(r)
    return expit(r[:, None] - r[None, :])


def rlhf_objective(pi, ref, r, beta):
    """E_pi[r] - beta KL(pi || ref), equation (5), in units of the reward; -inf where ref = 0 < pi."""
    pi, ref = _check_pair(pi, ref, check_law)
    r, beta = check_reward(r, ref), check_beta(beta)
    return float(pi @ r - beta * kl(pi, ref))


def regret(pi, ref, r, beta):
    """How far `pi` is below the best value of (5): beta log Z - objective = beta KL(pi || tilt), in reward units."""
    pi, ref = _check_pair(pi, ref, check_law)
    r, beta = check_reward(r, ref), check_beta(beta)
    log_target = _log_tilt(ref, r, beta)
    with np.errstate(invalid="ignore"):  # the tilt itself may underflow to zero, its logarithm does not
        return beta * _divergence(pi, np.exp(log_target), _log(pi) - log_target)


def rlif_objective(pi, ref, beta, length):
    """E_pi[u_pi] - beta KL(pi || ref), equation (7): expected self-certainty less the price of leaving `ref`.

    pi, ref: laws over all K = |V|**length sequences of a fixed number `length` of tokens. Self-certainty is then
    log|V| - entropy(pi)/length = (log K - entropy(pi))/length nats per token. Sequences of varying length do not
    fit: the identity fails for them. -inf where ref = 0 < pi.
    """
    pi, ref = _check_pair(pi, ref, check_law)
    beta, length = check_beta(beta), check_count(length, "length")
    return float((math.log(pi.size) - entropy(pi)) / length - beta * kl(pi, ref))


def rlif_optimum(ref, beta, length):
    """The maximiser of (7): the law proportional to ref**(length beta / (length beta - 1)), equation (10).

    ref: law (K,) over sequences of `length` tokens; beta > 0. Needs length * beta > 1: at or below one the objective
    is convex (at one: linear) in pi, its maximum sits on argmax ref, and the formula would return the minimiser.
    """
    ref, beta, length = check_law(ref, "ref"), check_beta(beta), check_count(length, "length")
    strength = length * beta
    if strength <= 1:
        raise ValueError(
            f"length * beta = {strength:g} <= 1: rewarding certainty outweighs the divergence, the objective is no "
            f"longer concave and collapses onto the argmax of ref (outcome {int(ref.argmax())}); no tilted optimum"
        )
    return power(ref, strength / (strength - 1))


def _check_real(x, name, positive=False):
    """A finite real number as a float; numpy scalars pass, booleans and arrays do not."""
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, Real):
        raise TypeError(f"{name} must be a real number, not {x!r}")
    if not math.isfinite(x) or (positive and x <= 0):
        raise ValueError(f"{name} must be finite{' and > 0' if positive else ''}, not {x!r}")
    return float(x)


def _check_measure(p, name):
    p = check_vector(p, name)
    if (p < 0).any():
        raise ValueError(f"{name} must be non-negative; entry {int((p < 0).argmax())} is {p[(p < 0).argmax()]!r}")
    return p


def _check_pair(p, q, check):
    p, q = check(p, "the first law"), check(q, "the second law")
    if p.shape != q.shape:
        raise ValueError(f"the two laws live on different alphabets: {p.shape} and {q.shape}")
    return p, q


def _check_tilt(p, r, beta):
    p = check_law(p)
    return p, check_reward(r, p), check_beta(beta)


def _log(p):
    """log p with log 0 = -inf and no warning."""
    return np.log(p, out=np.full_like(p, -np.inf), where=p > 0)


def _centred(p, r, beta):
    """(r - its maximum on the support of p) / beta: r/beta itself may leave float64, this goes to -inf there."""
    with np.errstate(over="ignore"):
        return (r - r[p > 0].max()) / beta


def _log_mean_exp(p, x):
    """log E_p exp(x) for x <= 0 on the support of p; exact to first order also for tiny x (large beta)."""
    p, x = p[p > 0], x[p > 0]
    mean = p @ np.expm1(x)
    return np.log1p(mean) if mean > -0.5 else logsumexp(x, b=p)


def _log_tilt(p, r, beta):
    x = log_ratio(p, r, beta)
    return np.add(x, _log(p), where=p > 0, out=np.full_like(x, -np.inf))


def _normalise(log_weights):
    w = np.exp(log_weights - log_weights.max())
    return w / w.sum()


def _divergence(p, q, x):
    """sum p x - p + q for x = log(p/q); near x = 0 as p (x + expm1(-x)), which keeps its second-order accuracy."""
    terms, near, far = q.copy(), (p > 0) & (np.abs(x) < 0.5), (p > 0) & (np.abs(x) >= 0.5)
    terms[near] = p[near] * (x[near] + np.expm1(-x[near]))
    terms[far] = p[far] * x[far] - p[far] + q[far]
    return float(terms.sum())
