"""A finite chain: K states, a handful of steps, and every value, tilt and guided law known exactly."""

from functools import reduce

import numpy as np
import torch
from scipy.special import logsumexp

from tiltlib import paths


class Chain:
    """x_steps ~ start, then p(x_{i-1} = y | x_i = x) = kernels[i - 1][x, y], down to x_0.

    start: (K,), kernels: (steps, K, K), probabilities summing to one. A reward r is (K,) or a callable on int64 states.
    ValueError: wrong shapes, negative or not finite entries, rows that do not sum to one.
    """

    def __init__(self, start, kernels):
        self.start_law, self.kernels = np.array(start, dtype=np.float64), np.array(kernels, dtype=np.float64)
        states = len(self.start_law) if self.start_law.ndim == 1 else 0
        if states == 0 or self.kernels.ndim != 3 or self.kernels.shape[1:] != (states, states) or not len(self.kernels):
            raise ValueError(f"start (K,) and kernels (steps, K, K) are needed: {np.shape(start)}, {np.shape(kernels)}")
        for name, rows in (("start", self.start_law), ("kernels", self.kernels)):
            if not (np.isfinite(rows).all() and (rows >= 0).all() and np.allclose(rows.sum(-1), 1, rtol=0, atol=1e-9)):
                raise ValueError(f"{name}: every row must be non-negative and sum to one")
        self.states, self.steps = states, len(self.kernels)
        # laws[i] is the law of x_i; clean_laws[i][x] is p(x_0 | x_i = x)
        self.laws, self.clean_laws = [self.start_law], [np.eye(states)]
        for kernel in self.kernels[::-1]:
            self.laws.insert(0, self.laws[0] @ kernel)
        for kernel in self.kernels:
            self.clean_laws.append(kernel @ self.clean_laws[-1])
        self.laws, self.clean_laws = np.array(self.laws), np.array(self.clean_laws)
        with np.errstate(divide="ignore"):
            self._log_start = torch.from_numpy(np.log(self.start_law))
            self._log_kernels = torch.from_numpy(np.log(self.kernels))
        self._clean = torch.from_numpy(self.clean_laws)

    # ------------------------------------------------------------------------------------------------ exact values

    def rewards(self, r):
        """(K,) float64 of a reward given as an array or a callable. ValueError: wrong shape, or not finite."""
        r = np.asarray(r(torch.arange(self.states)) if callable(r) else r, dtype=np.float64)
        if r.shape != (self.states,) or not np.isfinite(r).all():
            raise ValueError(f"a reward needs one finite number per state ({self.states},), not {r.shape}")
        return r

    def soft_values(self, r, beta):
        """v[i, x] = beta log E[exp(r(x_0) / beta) | x_i = x], (steps + 1, K), by the soft Bellman recursion.

        ValueError: beta not positive and finite.
        """
        values = [self.rewards(r)]
        for kernel in self.kernels:
            values.append(_beta(beta) * logsumexp(values[-1] / beta, axis=1, b=kernel))
        return np.array(values)

    def hard_values(self, r):
        """E[r(x_0) | x_i = x], (steps + 1, K)."""
        return self.clean_laws @ self.rewards(r)

    def posterior_mean_values(self, reward, positions):
        """reward(E[position of x_0 | x_i = x]), (steps + 1, K); positions (K, d), reward maps (n, d) to (n,), numpy."""
        positions = np.asarray(positions, dtype=np.float64)
        if positions.ndim != 2 or len(positions) != self.states:
            raise ValueError(f"positions must have shape (K, d) with K = {self.states}, not {positions.shape}")
        return np.array([reward(law @ positions) for law in self.clean_laws])

    def log_z(self, r, beta):
        """log E[exp(r(x_0) / beta)]."""
        return float(logsumexp(self.rewards(r) / _beta(beta), b=self.laws[0]))

    def tilted_law(self, r, beta):
        """The law p(x_0) exp(r(x_0) / beta) / Z, (K,)."""
        return self.laws[0] * np.exp(self.rewards(r) / _beta(beta) - self.log_z(r, beta))

    def guide(self, values, beta, start=True):
        """The Chain whose kernels are p(x' | x) exp(v[i - 1, x'] / beta), normalised, for any values (steps + 1, K).

        start: tilt the start by exp(v[steps] / beta) as well. With soft values and the start this is Doob's transform:
        its law of x_0 is the tilted law. ValueError: wrong shape, not finite, beta not positive.
        """
        values = np.asarray(values, dtype=np.float64) / _beta(beta)
        if values.shape != (self.steps + 1, self.states) or not np.isfinite(values).all():
            raise ValueError(f"values must be finite with shape {(self.steps + 1, self.states)}, not {values.shape}")
        values = values - values.max(1, keepdims=True)

        def tilt(law, v):
            weights = law * np.exp(v)
            return weights / weights.sum(-1, keepdims=True)

        kernels = [tilt(kernel, v) for kernel, v in zip(self.kernels, values[:-1], strict=True)]
        return Chain(tilt(self.start_law, values[-1]) if start else self.start_law, kernels)

    # -------------------------------------------------------------------------------------------- the world's side

    def start(self, n, chance):
        """x_steps, (n,) int64."""
        return chance.categoricals(self._log_start.expand(n, -1))

    def tilted_start(self, n, chance, r, beta):
        """x_steps from start(x) exp(v[steps, x] / beta) / Z, exactly."""
        return self.guide(self.soft_values(r, beta), beta).start(n, chance)

    def predict(self, x, i, condition=None):
        """p(x_0 | x_i), (n, K) float64. ValueError: a condition (there is none here)."""
        if condition is not None:
            raise ValueError(f"a chain knows no condition, not {condition!r}")
        return self._clean[self._step(i, 0), x]

    def kernel(self, x, prediction, i):
        """p(x_{i-1} | x_i) as a CategoricalKernel, i in 1..steps."""
        return paths.CategoricalKernel(self._log_kernels[self._step(i, 1) - 1, x])

    def clean(self, x, prediction, i):
        """p(x_0 | x_i), (n, K)."""
        return prediction

    def renoise(self, x, i_from, i_to, chance):
        """x_{i_to} given x_{i_from}, i_to >= i_from, under the chain's own joint law."""
        i_from, i_to = (torch.as_tensor(self._step(i, 0)).expand(len(x)) for i in (i_from, i_to))
        if (i_to < i_from).any():
            raise ValueError("noise is added going up: i_to is below i_from")
        rows = torch.empty(len(x), self.states, dtype=torch.float64)
        for low, high in torch.stack([i_from, i_to], 1).unique(dim=0).tolist():
            joint = reduce(np.matmul, self.kernels[low:high][::-1], np.diag(self.laws[high]))  # p(x_high, x_low)
            here = (i_from == low) & (i_to == high)
            rows[here] = torch.from_numpy(joint.T)[x[here]]
        return chance.categoricals(rows.log())

    def _step(self, i, lowest):
        """i, checked. ValueError: a step outside the grid."""
        step = torch.as_tensor(i)
        if step.is_floating_point() or ((step < lowest) | (step > self.steps)).any():
            raise ValueError(f"step outside the grid: {i} is not within {lowest}..{self.steps}")
        return i


def _beta(beta):
    if not 0 < beta < np.inf:
        raise ValueError(f"beta must be positive and finite, not {beta!r}")
    return beta
