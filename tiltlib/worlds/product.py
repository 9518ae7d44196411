"""Independent coordinates, each a one-dimensional `Mixture`: the tilt is exact in any dimension."""

import torch

from tiltlib.worlds.base import Diffusion
from tiltlib.worlds.mixture import Quadratic


class Product(Diffusion):
    """`copies` independent copies of a one-dimensional Mixture: a World whose particles are (n, copies).

    A `Mixture` of the same law would have C^copies components. Rewards with exact tilts are sums over coordinates: a
    Quadratic with a number as curvature. ValueError: the mixture has another dimension. TypeError: not a Mixture.
    """

    def __init__(self, one, copies):
        if getattr(one, "dim", None) is None:
            raise TypeError(f"a product is made of a Mixture, not of {type(one).__name__}")
        if one.dim != 1 or one.prediction != "x0" or copies < 1:
            raise ValueError("a product is of at least one copy of a one-dimensional mixture that predicts x0")
        super().__init__(one.grid, one.sampler)
        self.one, self.dim = one, copies

    def draw(self, n, chance):
        """Independent draws of x_0, (n, copies)."""
        labels = chance.categoricals(torch.log(self.one.weights).expand(n * self.dim, -1)).view(n, self.dim)
        z = chance.normals((n, self.dim), dtype=self.one.dtype)
        return self.one.means.to(z)[labels, 0] + self.one.covariances.sqrt().to(z)[labels] * z

    def start(self, n, chance):
        """x at i = steps from its exact law, (n, copies)."""
        return self.renoise(self.draw(n, chance), 0, self.steps, chance)

    def predict(self, x, i, condition=None):
        """E[x_0 | x_i = x], exact, (n, copies). ValueError: a condition, another shape."""
        if condition is not None or x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"particles must have shape (n, {self.dim}) and no condition, not {tuple(x.shape)}")
        if isinstance(i, torch.Tensor) and i.ndim:
            i = i.repeat_interleave(self.dim)
        return self.one.predict(x.reshape(-1, 1), i).view(x.shape)

    def tilts(self, reward, beta):
        """The tilted laws of the coordinates: a list of `copies` one-dimensional Mixtures, and log Z of the product."""
        parts = self._parts(reward)
        return [self.one.tilt(part, beta) for part in parts], sum(self.one.log_z(p, beta) for p in parts) + (
            reward.constant / beta
        )

    def soft_value(self, x, i, reward, beta):
        """beta log E[exp(r(x_0) / beta) | x_i = x], (n,)."""
        each = [self.one.soft_value(x[:, k, None], i, part, beta) for k, part in enumerate(self._parts(reward))]
        return sum(each) + reward.constant

    def _parts(self, reward):
        """A reward of one coordinate for each of them; the constant is left out."""
        if not isinstance(reward, Quadratic) or reward.curvature.ndim or len(reward.vector) != self.dim:
            raise TypeError(f"exact values need a Quadratic in dimension {self.dim} whose curvature is a number")
        known = {v: Quadratic([v], reward.curvature) for v in reward.vector.tolist()}
        return [known[v] for v in reward.vector.tolist()]
