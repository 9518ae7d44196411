"""Weighted maximum likelihood: fit a model to the tilted law from samples of the reference, without RL.

Draw o_1 .. o_N from the reference, weigh them, and maximise sum_i W_i log pi(o_i), where the W are the weights divided
by their sum (self-normalised importance sampling). The weights are exp(r/beta) for RLHF and ref^(1/(L beta_if - 1))
for RLIF: Jiao, Chen and Li 2025, equations (19)-(22), whose equation numbers are used below. Weights come as
log-weights and stay there until they are normalised. This file is exact and small (numpy, float64); the loop that
fits a network is in `tiltlib.tune.training`.
"""

import warnings
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from tiltlib import law

ESS_FLOOR = 10.0  # below this many effective samples a warning names the number


class Weights(NamedTuple):
    """Self-normalised weights of a pool; what `normalise` returns."""

    values: np.ndarray  # (..., N), each row non-negative and summing to one
    ess: np.ndarray  # (...), effective sample size 1 / sum of squares of each row, between 1 and N
    moved: np.ndarray  # (...), total variation distance to the weights before clipping; zero without clipping

    @property
    def total_ess(self) -> float:
        """Effective size of the whole pool when every row counts alike: rows times the harmonic mean of `ess`."""
        return float(self.ess.size / np.mean(1 / self.ess))


def rlif_temperature(beta, length) -> float:
    """L beta_if - 1, the temperature at which RLIF is RLHF with the reward log ref(o): equations (11), (18) and (21).

    So RLIF weights are `normalise(log_prob / rlif_temperature(beta, length))`, log_prob of whole responses of `length`
    tokens under the reference. ValueError when length * beta <= 1: there is no tilted optimum then.
    """
    beta, length = law.check_beta(beta), law.check_count(length, "length")
    if length * beta <= 1:
        raise ValueError(f"length * beta = {length * beta:g} <= 1: the RLIF objective has no tilted optimum there")
    return length * beta - 1


def normalise(log_weights, *, clip=None, floor=ESS_FLOOR) -> Weights:
    """Self-normalised weights of a pool, with their effective sample size.

    log_weights: (N,) or (Q, N), one row per query, each normalised by itself; -inf is a weight of zero. For RLHF pass
    rewards / beta, for RLIF log_prob / rlif_temperature(beta, length).
    clip: None, or the largest multiple (>= 1) of a row's mean weight that a weight may have. Clipping trades variance
    for a bias that more samples do not remove: `moved` measures it on the pool, `clipped` gives the law it targets.
    floor: a RuntimeWarning names the total effective sample size when that is smaller; 0 for none.
    Raises ValueError: an empty pool, a NaN or +inf, a row whose weights are all zero, clip or floor out of range.
    """
    log_weights = np.array(log_weights, dtype=np.float64)
    if log_weights.ndim not in (1, 2) or log_weights.size == 0:
        raise ValueError(f"the pool is empty or not (N,) or (Q, N): log_weights have shape {log_weights.shape}")
    if np.isnan(log_weights).any() or np.isposinf(log_weights).any():
        raise ValueError("log_weights must be finite or -inf; there is a NaN or +inf among them")
    dead = np.isneginf(log_weights).all(-1)
    if dead.any():
        raise ValueError(f"all weights are zero (log-weights -inf) in row {int(np.argmax(dead))}")
    clip, floor = _check_clip(clip), _check_floor(floor)
    values = raw = softmax(log_weights, axis=-1)
    if clip is not None:
        values = np.minimum(raw, clip / raw.shape[-1])
        values = values / values.sum(-1, keepdims=True)
    moved = np.abs(values - raw).sum(-1) / 2
    weights = Weights(values, 1 / np.square(values).sum(-1), moved)
    if weights.total_ess < floor * (1 - 1e-9):  # not for the rounding of equal weights
        warnings.warn(
            f"the effective sample size is {weights.total_ess:.3g} of {raw.size} samples, below the floor of "
            f"{floor:g}: a few samples decide the fit; raise beta, draw more, or clip (biased)",
            RuntimeWarning,
            stacklevel=2,
        )
    return weights


def clipped(p, r, beta, clip):
    """The law (K,) that weights clipped at `clip` times their mean converge to: p min(u, clip), normalised.

    u is the density of the tilted law with respect to p; clip >= 1 and clip >= max u gives the tilted law. The bias of
    clipping is the distance between the two, for any number of samples.
    """
    p, clip = law.check_law(p), _check_clip(clip)
    cut = p * np.exp(np.minimum(law.log_ratio(p, r, beta), np.log(np.inf if clip is None else clip)))
    return cut / cut.sum()


def weighted_law(outcomes, weights, size):
    """The law (size,) that maximises sum_i W_i log pi(o_i) over all laws: each outcome gets its draws' weight.

    outcomes: (..., N) integers in [0, size); weights: `Weights` or an array (..., N) with rows summing to one. Its mean
    over pools of N draws is the law of soft best-of-N, exactly. Raises ValueError or TypeError for what does not fit.
    """
    outcomes, values, size = np.asarray(outcomes), check_weights(weights), law.check_count(size, "size")
    if not np.issubdtype(outcomes.dtype, np.integer):
        raise TypeError(f"outcomes must be integers, not {outcomes.dtype}")
    if outcomes.shape != values.shape:
        raise ValueError(f"outcomes have shape {outcomes.shape}, weights {values.shape}")
    if outcomes.min() < 0 or outcomes.max() >= size:
        raise ValueError(f"outcomes must lie in [0, {size}), they reach from {outcomes.min()} to {outcomes.max()}")
    rows = values.reshape(-1, values.shape[-1])
    fitted = np.zeros((len(rows), size))
    np.add.at(fitted, (np.arange(len(rows))[:, None], outcomes.reshape(rows.shape)), rows)
    return fitted.reshape(*values.shape[:-1], size)


def objective(pi, ref, log_weights) -> float:
    """E_ref[w log pi] / Z in nats, Z = E_ref w: the RL-free objective (19), and (21) with its own weights.

    pi, ref: laws (K,); log_weights: (K,), r/beta or log ref / (L beta_if - 1). By (20) it is E_target[log pi], so it is
    largest, minus the target's entropy, at the target. -inf where pi gives zero to what the target does not.
    """
    pi, ref = law.check_law(pi, "pi"), law.check_law(ref, "ref")
    log_weights = law.check_reward(log_weights, ref, "log_weights")
    if pi.shape != ref.shape:
        raise ValueError(f"pi has shape {pi.shape}, ref {ref.shape}")
    alive = ref > 0
    target = ref[alive] * np.exp(log_weights[alive] - logsumexp(log_weights[alive], b=ref[alive]))
    with np.errstate(divide="ignore"):
        return float(target[target > 0] @ np.log(pi[alive][target > 0]))


class Estimate(NamedTuple):
    mean: float
    standard_error: float


def estimate(f, weights) -> Estimate:
    """Self-normalised estimate of E_{p*} f from one pool, with its sandwich standard error.

    f: (N,) finite; weights: `Weights` or (N,). The mean is sum W f, its variance sum W^2 (f - mean)^2, so N times the
    variance tends to E_ref[u^2 (f - E* f)^2]. The rule Var*(f) / ESS is something else: it is right only where f and
    the weights are unrelated.
    """
    values = check_weights(weights)
    f = law.check_reward(f, values, "f")
    mean = values @ f
    return Estimate(float(mean), float(np.sqrt(np.square(values) @ np.square(f - mean))))


def sandwich(scores, information, weights):
    """Covariance (d, d) of a weighted maximum-likelihood fit of d parameters: I^-1 (sum W^2 s s^T) I^-1.

    scores: (N, d), gradient of log pi(o_i) at the fit; information: (d, d), minus the weighted mean of its Hessian;
    weights: `Weights` or (N,). Right also when the model class does not contain the target. In the limit of N samples
    it is I^-1 E_ref[u^2 s s^T] I^-1 / N. Raises ValueError for mismatched shapes or a singular information matrix.
    """
    values, scores, information = check_weights(weights), np.asarray(scores, float), np.asarray(information, float)
    if scores.ndim != 2 or values.shape != scores.shape[:1] or information.shape != (scores.shape[1],) * 2:
        raise ValueError(f"shapes do not fit: {values.shape} weights, {scores.shape} scores, {information.shape}")
    if not (np.isfinite(scores).all() and np.isfinite(information).all()):
        raise ValueError("scores and information must be finite")
    try:
        left = np.linalg.solve(information, (scores * values[:, None]).T)
    except np.linalg.LinAlgError:
        raise ValueError("the information matrix is singular: the parameters are not identified") from None
    return left @ left.T


def log_linear(theta, features, base):
    """The law (..., K) proportional to base * exp(features @ theta).

    theta: (d,); features: (..., K, d); base: (..., K), each row a law. Rows are queries that share theta.
    """
    tilted = np.asarray(features, float) @ np.asarray(theta, float)
    with np.errstate(divide="ignore"):
        return softmax(tilted + np.log(np.asarray(base, float)), axis=-1)


def maximum_likelihood(mass, features, base):
    """theta (d,) that maximises sum mass * log pi_theta over the log-linear family: the weighted MLE, by Newton.

    mass: (..., K) non-negative: weighted counts, or a target law for the fit to a whole population. Rows are queries
    that share theta; a row counts as much as its mass, so a normaliser dropped per query moves the answer (E23).
    features, base as in `log_linear`. Raises ValueError for bad shapes or masses, or when no finite maximiser exists.
    """
    mass, features, base = (np.asarray(x, dtype=float) for x in (mass, features, base))
    if features.ndim < 2 or mass.shape != features.shape[:-1] or base.shape != mass.shape:
        raise ValueError(f"shapes do not fit: mass {mass.shape}, features {features.shape}, base {base.shape}")
    if not (np.isfinite(mass).all() and (mass >= 0).all() and mass.sum() > 0):
        raise ValueError("mass must be finite, non-negative and not all zero")
    mass, base = (x.reshape(-1, x.shape[-1]) for x in (mass, base))
    features = features.reshape(*mass.shape, -1)
    share = mass.sum(-1) / mass.sum()  # what each query counts for
    moments = np.einsum("qk,qkd->d", mass, features) / mass.sum()
    with np.errstate(divide="ignore"):
        log_base = np.log(base)

    def centre(theta):
        pi = log_linear(theta, features, base)
        means = np.einsum("qk,qkd->qd", pi, features)
        return pi, means, features - means[:, None, :]

    def loss(theta):  # convex, with its gradient
        log_z = logsumexp(features @ theta + log_base, axis=-1)
        return share @ log_z - theta @ moments, share @ centre(theta)[1] - moments

    def hessian(theta):
        pi, _, centred = centre(theta)
        return np.einsum("q,qk,qki,qkj->ij", share, pi, centred, centred)

    start = np.zeros(features.shape[-1])
    theta = minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-8}).x
    scale = np.abs(features).max()
    if np.linalg.eigvalsh(hessian(theta))[0] < 1e-9 * scale**2:  # the maximum lies at infinity, or on a ridge
        raise ValueError("no single finite maximiser: outcomes without mass, or features that repeat each other")
    for _ in range(3):  # a line search cannot see the last digits, Newton's step can
        theta = theta - np.linalg.solve(hessian(theta), loss(theta)[1])
    if not np.abs(loss(theta)[1]).max() < 1e-11 * scale:
        raise ValueError("the fit did not converge: features or weights of very unequal size?")
    return theta


def check_weights(weights):
    """`Weights`, or an array (..., N) with rows summing to one, as a float64 array; ValueError for anything else."""
    values = np.asarray(weights.values if isinstance(weights, Weights) else weights, dtype=np.float64)
    if values.ndim == 0 or values.size == 0:
        raise ValueError("the pool is empty")
    if not np.isfinite(values).all() or (values < 0).any() or (np.abs(values.sum(-1) - 1) > law.SUM_TOLERANCE).any():
        raise ValueError("weights must be finite, non-negative and sum to one in each row; see normalise")
    return values


def _check_clip(clip):
    if clip is None:
        return None
    clip = law.check_beta(clip, "clip")
    if clip < 1:
        raise ValueError(f"clip is a multiple of the mean weight and at least 1, not {clip:g}")
    return clip


def _check_floor(floor):
    if isinstance(floor, bool) or not np.isfinite(floor) or floor < 0:
        raise ValueError(f"floor must be finite and >= 0, not {floor!r}")
    return float(floor)
