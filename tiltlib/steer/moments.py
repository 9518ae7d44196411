"""The variance of SMC's estimate of Z on a `Chain`, without sampling: exactly at any N, and its limit step by step.

Both are for a population that is resampled multinomially at every step.
"""

import numpy as np

from tiltlib import law


def relative_variance(chain, r, beta, particles, values=None, lam=None, proposal=None):
    """Var(Z_hat) / Z^2 at `particles` N, exactly.

    values: the twist, (steps + 1, K) in units of the reward, its row 0 replaced by r; None is no twist before i = 0.
    lam: tempering exponents (steps + 1,), lam[0] replaced by one; None is ones. proposal: a Chain of the same start
    to propose from, weights corrected. Second moments close because two of N particles have the same parent with
    probability 1/N or are independent (Cerou, Del Moral and Guyader 2011). ValueError: wrong shapes, beta <= 0.
    """
    n = law.check_count(particles, "particles")
    psi, kernels, log_z = _twist(chain, r, beta, values, lam), _kernels(chain, proposal), chain.log_z(r, beta)
    first = chain.start_law * np.exp(psi[-1] - log_z)
    second = (1 - 1 / n) * np.outer(first, first) + np.diag(chain.start_law * np.exp(2 * (psi[-1] - log_z))) / n
    for i in range(chain.steps, 0, -1):
        q, ratio = kernels[i - 1]
        weight = ratio * np.exp(psi[i - 1][None, :] - psi[i][:, None])
        move, both = q * weight, q * weight**2
        second = (1 - 1 / n) * move.T @ second @ move + np.diag(both.T @ second.sum(1)) / n
    return float(second.sum() - 1)


def asymptotic_variance(chain, r, beta, values=None, lam=None, proposal=None):
    """Contribution of each step to lim N Var(Z_hat) / Z^2: (steps + 1,), entry i of the draw of x_i.

    It is the chi-squared divergence of the tilted law of (x_{i+1}, x_i) from the law that particles are proposed from
    (Chopin 2004). Arguments as in `relative_variance`.
    """
    psi, kernels = _twist(chain, r, beta, values, lam), _kernels(chain, proposal)
    exact = chain.guide(chain.soft_values(r, beta), beta)
    out = np.empty(chain.steps + 1)
    out[-1] = _chi2(exact.start_law, chain.start_law)
    for i in range(chain.steps, 0, -1):
        here = chain.laws[i] * np.exp(psi[i] - psi[i].max())
        pair = exact.laws[i][:, None] * exact.kernels[i - 1]
        out[i - 1] = _chi2(pair, (here / here.sum())[:, None] * kernels[i - 1][0])
    return out


def _chi2(p, q):
    held = p > 0
    return float((p[held] ** 2 / q[held]).sum() - 1)


def _twist(chain, r, beta, values, lam):
    """psi (steps + 1, K) in nats."""
    shape = chain.steps + 1, chain.states
    beta = law.check_beta(beta)
    values = np.zeros(shape) if values is None else np.array(values, dtype=np.float64)
    lam = np.ones(shape[0]) if lam is None else np.array(lam, dtype=np.float64)
    if values.shape != shape or lam.shape != shape[:1] or not (np.isfinite(values).all() and np.isfinite(lam).all()):
        raise ValueError(f"values {values.shape} and lam {lam.shape} must be finite, {shape} and {shape[:1]}")
    psi = lam[:, None] * values / beta
    psi[0] = chain.rewards(r) / beta
    return psi


def _kernels(chain, proposal):
    """(q, p / q) of every step."""
    if proposal is None:
        return [(p, np.ones_like(p)) for p in chain.kernels]
    if proposal.kernels.shape != chain.kernels.shape or not np.array_equal(proposal.start_law, chain.start_law):
        raise ValueError("the proposal must have the chain's shape and start")
    with np.errstate(divide="ignore", invalid="ignore"):
        pairs = [(q, np.where(p > 0, p / q, 0.0)) for p, q in zip(chain.kernels, proposal.kernels, strict=True)]
    if not all(np.isfinite(ratio).all() for _, ratio in pairs):
        raise ValueError("the proposal must reach every state that the chain reaches")
    return pairs
