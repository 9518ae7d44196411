"""What the two loops ask of a world, and what all worlds with Gaussian reverse steps share."""

from typing import Protocol

import torch

from tiltlib import paths


class World(Protocol):
    """A generative model that is sampled step by step, from i = steps (noise) down to i = 0 (data)."""

    steps: int

    def start(self, n, chance): ...  # x at i = steps, (n, *shape)

    def predict(self, x, i, condition): ...  # the network: the only call that is counted and chunked; i int or (n,)

    def kernel(self, x, prediction, i): ...  # p(x_{i-1} | x_i), a paths.Kernel

    def clean(self, x, prediction, i): ...  # E[x_0 | x_i], or token probabilities; differentiable

    def renoise(self, x, i_from, i_to, chance): ...  # forward from i_from to i_to >= i_from


class Diffusion:
    """What every world with an affine path and Gaussian reverse steps shares; a world adds `start` and `predict`.

    path: a name in `PATHS`, a Path, or a Grid (then `steps` is not given). sampler: a name in `SAMPLERS` or a sampler.
    prediction: what `predict` returns, one of `PREDICTIONS`. Attributes: grid, steps, coef (Coefficients), kappa.
    """

    def __init__(self, path="vp_linear", sampler="ancestral", steps=None, prediction="x0"):
        if isinstance(path, paths.Grid) and steps is not None:
            raise ValueError("a Grid has its own steps")
        self.grid = path if isinstance(path, paths.Grid) else paths.grid(path, 50 if steps is None else steps)
        self.steps, self.prediction, self.sampler = self.grid.steps, prediction, sampler
        self.coef = paths.coefficients(self.grid, sampler)
        self.kappa = paths.basis(self.grid, prediction)[2]
        self._clean = gain, offset = paths.conversion(self.grid, prediction, "x0")
        self._mean = self.coef.x0 * gain, self.coef.x + self.coef.x0 * offset

    def kernel(self, x, prediction, i):
        """p(x_{i-1} | x_i) as a GaussianKernel, i in 1..steps. ValueError: a step outside that range."""
        mean = paths.linear(prediction, x, *self._mean, i, f"no step down from {self.prediction}")
        return paths.GaussianKernel(mean, paths.at(self.coef.std, i, x))

    def clean(self, x, prediction, i):
        """E[x_0 | x_i] (n, *shape), differentiable in the prediction and x."""
        if self.prediction == "x0":
            return prediction
        return paths.linear(prediction, x, *self._clean, i, f"{self.prediction} does not determine x0")

    def renoise(self, x, i_from, i_to, chance):
        """x (n, *shape) at step i_from, noised forward to i_to >= i_from. ValueError: i_to < i_from, off the grid."""
        if torch.as_tensor(i_to < i_from).any():
            raise ValueError(f"noise is added going up: i_to = {i_to} is below i_from = {i_from}")
        wide = x.double()
        alpha, sigma, alpha_to, sigma_to = (
            torch.as_tensor(paths.at(table, i, wide), dtype=torch.float64, device=x.device)
            for i in (i_from, i_to)
            for table in (self.grid.alpha, self.grid.sigma)
        )
        keep = torch.where(alpha > 0, alpha_to / alpha, 1.0)  # alpha = 0: the last step, which stays where it is
        fresh = torch.sqrt((sigma_to**2 - (keep * sigma) ** 2).clamp(min=0))
        return keep.to(x) * x + fresh.to(x) * chance.normals(x.shape, dtype=x.dtype, device=x.device)
