"""A Gaussian mixture: score, posterior, values and tilt are exact at every step of every affine path."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tiltlib import paths
from tiltlib.worlds.base import Diffusion


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The reward r(x) = x'Qx / 2 + vector.x + constant of x (n, d); callable, float64, differentiable.

    vector: (d,). curvature Q: a number q, meaning q I, or a symmetric (d, d); 0 makes the reward linear.
    ValueError: wrong shapes, not symmetric, not finite.
    """

    vector: torch.Tensor
    curvature: float | torch.Tensor = 0.0
    constant: float = 0.0

    def __post_init__(self):
        vector, curvature = _float64(self.vector), _float64(self.curvature)
        if vector.ndim != 1 or curvature.shape not in ((), (len(vector), len(vector))):
            raise ValueError(f"vector (d,) and curvature () or (d, d) are needed: {vector.shape}, {curvature.shape}")
        if curvature.ndim and not torch.allclose(curvature, curvature.T, rtol=1e-12, atol=0):
            raise ValueError("the curvature must be symmetric")
        if not math.isfinite(self.constant):
            raise ValueError(f"the constant must be finite, not {self.constant!r}")
        object.__setattr__(self, "vector", vector)
        object.__setattr__(self, "curvature", curvature)

    @classmethod
    def around(cls, centre, strength):
        """r(x) = -strength/2 |x - centre|^2."""
        centre = _float64(centre)
        return cls(strength * centre, -strength, -strength / 2 * float(centre @ centre))

    def __call__(self, x):
        if self.curvature.ndim:
            return (x * (self._bend(x) / 2 + self.vector.to(x))).sum(-1) + self.constant
        square = paths.square(x).mul_(float(self.curvature) / 2) if self.curvature else 0.0
        return x @ self.vector.to(x) + square + self.constant

    def gradient(self, x):
        """Qx + vector, of x (..., d)."""
        return self._bend(x) + self.vector.to(x)

    def _bend(self, x):
        return x @ self.curvature.to(x) if self.curvature.ndim else self.curvature.to(x) * x


class Posterior(NamedTuple):
    """The mixture p(x_0 | x_i): log-weights (C, n), means (C, n, d), covariances (C,) (isotropic) or (C, d, d)."""

    log_weights: torch.Tensor
    means: torch.Tensor
    covariances: torch.Tensor


class _Step(NamedTuple):
    """What does not depend on x at one step: the component of x_i is N(alpha m, V), V = alpha^2 S + sigma^2 I."""

    alpha: float
    sigma: float
    whiten: torch.Tensor  # V^-1/2: (C,) or lower-triangular (C, d, d)
    centre: torch.Tensor  # whiten alpha m, (C, d)
    log_scale: torch.Tensor  # log of weight times normaliser, (C,)
    clean: tuple  # (A, b) with E[x_0 | x_i, c] = A x + b
    score: tuple  # (A, b) with the score of component c


class Mixture(Diffusion):
    """p(x_0) = sum_c weights[c] N(means[c], covariances[c]), noised along a path: a World, with everything exact.

    weights: (C,), summing to one. means: (C, d), or (C,) for d = 1. covariances: a number or (C,) variances
    (isotropic, much faster), or (C, d, d), any positive definite. path, sampler, steps, prediction: as in `Diffusion`.
    A condition is a component: an int or an integer tensor (n,). Particles are (n, d) of `dtype`.
    ValueError: wrong shapes, weights that are negative or do not sum to one, a covariance not positive definite.
    """

    def __init__(
        self, weights, means, covariances, *, path="vp_linear", sampler="ancestral", steps=None, prediction="x0",
        dtype=torch.float64,
    ):  # fmt: skip
        super().__init__(path, sampler, steps, prediction)
        self.weights, self.means, self.covariances = _float64(weights), _float64(means), _float64(covariances)
        self.means = self.means[:, None] if self.means.ndim == 1 else self.means
        if self.means.ndim != 2 or self.weights.shape != self.means.shape[:1] or self.means.numel() == 0:
            raise ValueError(f"weights (C,) and means (C, d) are needed: {self.weights.shape}, {self.means.shape}")
        if not ((self.weights >= 0).all() and abs(float(self.weights.sum()) - 1) < 1e-9):
            raise ValueError("weights must be non-negative and sum to one")
        count, self.dim = self.means.shape
        if self.covariances.ndim == 0:
            self.covariances = self.covariances.repeat(count)
        if self.covariances.shape not in ((count,), (count, self.dim, self.dim)):
            raise ValueError(f"covariances must have shape (C,) or (C, d, d), not {tuple(self.covariances.shape)}")
        self.isotropic, self.dtype = self.covariances.ndim == 1, dtype
        self._root = _cholesky(self.covariances)
        self._steps, self._tilts = {}, {}

    # ---------------------------------------------------------------------------------------------- exact at step i

    def log_prob(self, x, i=0, condition=None):
        """log p_i(x), (n,), of x (n, d)."""
        return self._by_step(lambda x, i, c: self._log_joint(x, i, c).logsumexp(0), x, i, condition)

    def score(self, x, i, condition=None):
        """The gradient of log p_i at x, (n, d)."""
        return self._by_step(lambda x, i, c: self._average(x, i, c, "score"), x, i, condition)

    def posterior_mean(self, x, i, condition=None):
        """E[x_0 | x_i = x], (n, d)."""
        return self._by_step(lambda x, i, c: self._average(x, i, c, "clean"), x, i, condition)

    def posterior(self, x, i, condition=None):
        """p(x_0 | x_i = x) as a Posterior; one step for all particles."""
        i = paths.at(torch.arange(self.steps + 1), i, x)
        if not isinstance(i, float):
            raise ValueError("a posterior is for particles at one step")
        return self._posterior(x, self._at(int(i), x), condition)

    # ------------------------------------------------------------------------------------- rewards, values and tilts

    def tilt(self, reward, beta):
        """The Mixture p(x_0) exp(r(x_0) / beta) / Z of a Quadratic reward, on the same path.

        ValueError: beta not positive, or a reward so convex that Z is infinite.
        """
        return self._tilt(reward, beta)[0]

    def log_z(self, reward, beta):
        """log E[exp(r(x_0) / beta)]."""
        return self._tilt(reward, beta)[1]

    def soft_value(self, x, i, reward, beta):
        """beta log E[exp(r(x_0) / beta) | x_i = x], (n,)."""
        tilted, log_z = self._tilt(reward, beta)
        return beta * (log_z + tilted.log_prob(x, i) - self.log_prob(x, i))

    def hard_value(self, x, i, reward):
        """E[r(x_0) | x_i = x], (n,)."""

        def value(x, step, condition):
            log_weights, means, covariances = self._posterior(x, step, condition)
            spread = (_full(reward.curvature, self.dim).to(x) * _full(covariances, self.dim)).sum((1, 2))
            return (log_weights.exp() * (reward(means) + spread[:, None] / 2)).sum(0)

        self._check(reward)
        return self._by_step(value, x, i, None)

    def _check(self, reward):
        if not isinstance(reward, Quadratic) or len(reward.vector) != self.dim:
            raise TypeError(f"exact values and tilts need a Quadratic in dimension {self.dim}, not {reward!r}")

    def _tilt(self, reward, beta):
        """(tilted Mixture, log Z), remembered per reward and beta."""
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be positive and finite, not {beta!r}")
        self._check(reward)
        if (reward, beta) not in self._tilts:
            # around its mean, component c gains exp(r(m)/beta + u.y + y'Qy / (2 beta)), u = (Qm + vector) / beta
            push = reward.gradient(self.means) / beta
            bend = reward.curvature / beta
            if self.isotropic and bend.ndim == 0:
                precision = 1 / self.covariances - bend
                new = 1 / precision
                shift, log_det = new[:, None] * push, self.dim * torch.log(new / self.covariances)
            else:
                full = _full(self.covariances, self.dim)
                precision = torch.linalg.inv(full) - _full(bend, self.dim)
                new = torch.linalg.inv(precision)
                new = (new + new.mT) / 2
                shift, log_det = (new @ push[..., None])[..., 0], torch.logdet(new) - torch.logdet(full)
            _cholesky(precision, "beta is too small for this convex reward: exp(r / beta) has no finite mean")
            gain = torch.log(self.weights) + reward(self.means) / beta + ((shift * push).sum(1) + log_det) / 2
            tilted = Mixture(
                gain.softmax(0), self.means + shift, new,
                path=self.grid, sampler=self.sampler, prediction=self.prediction, dtype=self.dtype,
            )  # fmt: skip
            self._tilts[reward, beta] = tilted, float(gain.logsumexp(0))
        return self._tilts[reward, beta]

    # ---------------------------------------------------------------------------------------------- the world's side

    def draw(self, n, chance):
        """Independent draws of x_0, (n, d)."""
        labels = chance.categoricals(torch.log(self.weights).expand(n, -1))
        z = chance.normals((n, self.dim), dtype=self.dtype)
        root, means = self._root.to(z), self.means.to(z)
        if self.isotropic:
            return means[labels] + root[labels, None] * z
        x = means[labels]
        for c in range(len(means)):
            x[labels == c] += z[labels == c] @ root[c].T
        return x

    def start(self, n, chance):
        """x at i = steps from its exact law, (n, d)."""
        return self.renoise(self.draw(n, chance), 0, self.steps, chance)

    def tilted_start(self, n, chance, reward, beta):
        """x at i = steps from the exact law p_steps(x) exp(soft value / beta) / Z, (n, d)."""
        return self.tilt(reward, beta).start(n, chance)

    def predict(self, x, i, condition=None):
        """The exact prediction of the kind that was asked for, (n, d). ValueError: unknown component, or step."""
        source = "score" if self.prediction in ("score", "epsilon") else "x0"
        exact = (self.score if source == "score" else self.posterior_mean)(x, i, condition)
        return exact if source == self.prediction else paths.convert(self.grid, exact, x, i, source, self.prediction)

    # ------------------------------------------------------------------------------------------------------ the work

    def _by_step(self, function, x, i, condition):
        """function(x, _Step, condition), once for each of the steps among the particles."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"particles must have shape (n, {self.dim}), not {tuple(x.shape)}")
        i = paths.at(torch.arange(self.steps + 1), i, x)
        if isinstance(i, float):
            return function(x, self._at(int(i), x), condition)
        i = i.flatten()
        parts, order = [], []
        for step in i.unique().tolist():
            here = (i == step).nonzero()[:, 0]
            only = condition[here] if isinstance(condition, torch.Tensor) and condition.ndim else condition
            parts.append(function(x[here], self._at(int(step), x), only))
            order.append(here)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _at(self, i, like):
        """The constants of step i, computed once in float64 for each dtype and device."""
        key = i, like.dtype, like.device
        if key not in self._steps:
            alpha, sigma, m, s = float(self.grid.alpha[i]), float(self.grid.sigma[i]), self.means, self.covariances
            if self.isotropic:
                v = alpha**2 * s + sigma**2
                whiten, log_det = v.rsqrt(), self.dim * torch.log(v)
                centre = whiten[:, None] * alpha * m
                clean = alpha * s / v, (sigma**2 / v)[:, None] * m
                score = -1 / v, (alpha / v)[:, None] * m
            else:
                v = alpha**2 * s + sigma**2 * torch.eye(self.dim, dtype=torch.float64)
                root = _cholesky(v)
                whiten = torch.linalg.inv(root)
                inverse, log_det = whiten.mT @ whiten, 2 * torch.log(torch.diagonal(root, dim1=1, dim2=2)).sum(1)
                centre = alpha * (whiten @ m[..., None])[..., 0]
                clean = alpha * s @ inverse, sigma**2 * (inverse @ m[..., None])[..., 0]
                score = -inverse, alpha * (inverse @ m[..., None])[..., 0]
            log_scale = torch.log(self.weights) - 0.5 * (log_det + self.dim * math.log(2 * math.pi))
            parts = [whiten, centre, log_scale, clean, score]
            parts = [tuple(q.to(like) for q in p) if isinstance(p, tuple) else p.to(like) for p in parts]
            self._steps[key] = _Step(alpha, sigma, *parts)
        return self._steps[key]

    def _log_joint(self, x, step, condition):
        """log(weight density) of every component, laid out (C, n): a softmax over the first axis is far faster."""
        if self.isotropic:
            square = torch.square(step.centre).sum(1) / 2
            log_joint = torch.addmm((step.log_scale - square)[:, None], step.whiten[:, None] * step.centre, x.T)
            log_joint = torch.addr(log_joint, step.whiten.square() / 2, paths.square(x), alpha=-1)
        else:
            white = (step.whiten.flatten(0, 1) @ x.T).unflatten(0, (-1, self.dim)) - step.centre[..., None]
            log_joint = step.log_scale[:, None] - white.square().sum(1) / 2
        return log_joint if condition is None else self._only(log_joint, condition)

    def _posterior(self, x, step, condition):
        gain, offset = step.clean
        if self.isotropic:
            means = gain[:, None, None] * x + offset[:, None]
            covariances = step.sigma**2 * step.whiten**2 * self.covariances.to(x)
        else:
            means = x @ gain.mT + offset[:, None]
            covariances = step.sigma**2 * (step.whiten.mT @ step.whiten @ self.covariances.to(x))
        return Posterior(self._log_joint(x, step, condition).log_softmax(0), means, covariances)

    def _only(self, log_joint, condition):
        """The joint with everything but one component per particle struck out; its weight is dropped as well."""
        condition = torch.as_tensor(condition, device=log_joint.device)
        count, n = log_joint.shape
        if condition.is_floating_point() or condition.dtype == torch.bool or condition.shape not in ((), (n,)):
            raise ValueError(f"a condition is a component, an int or an integer tensor ({n},), not {condition!r}")
        if condition.min() < 0 or condition.max() >= count or (self.weights[condition.cpu()] == 0).any():
            raise ValueError(f"unknown condition: components are 0..{count - 1}, not {condition.tolist()}")
        here = torch.arange(count, device=log_joint.device)[:, None] == condition
        return torch.where(here, log_joint - torch.log(self.weights).to(log_joint)[:, None], -math.inf)

    def _average(self, x, step, condition, what):
        """sum_c p(c | x) (A_c x + b_c)."""
        gain, offset = getattr(step, what)
        p = self._log_joint(x, step, condition).softmax(0)
        if self.isotropic:
            mean = p.T @ offset if self.dim > 8 else (offset.T @ p).T  # the second is faster for short rows
            return mean.addcmul_((gain @ p)[:, None], x)
        each = (gain.flatten(0, 1) @ x.T).unflatten(0, (-1, self.dim)) + offset[..., None]
        return (p[:, None] * each).sum(0).T


def _float64(value):
    value = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    if not torch.isfinite(value).all():
        raise ValueError("all numbers must be finite")
    return value


def _full(scale, dim):
    """Numbers () or (C,) as multiples of the identity, (.., d, d); matrices as they are."""
    return scale if scale.ndim > 1 else scale[..., None, None] * torch.eye(dim, dtype=scale.dtype, device=scale.device)


def _cholesky(covariances, message="covariances must be symmetric and positive definite"):
    """Square roots (C,) or lower-triangular (C, d, d); ValueError where there are none."""
    if covariances.ndim == 1:
        if not (covariances > 0).all():
            raise ValueError(message)
        return covariances.sqrt()
    root, failed = torch.linalg.cholesky_ex(covariances)
    if failed.any() or not torch.allclose(covariances, covariances.mT, rtol=1e-9, atol=1e-12):
        raise ValueError(message)
    return root
