"""Classifier-free guidance as a wrapper: whatever runs on a world then runs on its guided version."""

import math

import torch


class Guided:
    """A World whose prediction is without + scale * (with - without), with and without the condition.

    Ho and Salimans 2022, eq. (6), where w = scale - 1: scale 0 is unconditional, 1 conditional, above 1 guided. In
    between and beyond, these are not the scores of one noised law. It means the same for every prediction that is
    affine in the score (x0, epsilon, velocity, ...), and for log-probabilities of tokens, which are normalised later.
    Costs two calls of the network.

    world: predicts with a condition and without. negative: the condition that takes the place of none ("negative
    prompt"). Everything but `predict` and `cost` is the world's own. ValueError: a scale that is not a finite number.
    """

    def __init__(self, world, scale, negative=None):
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"the guidance scale must be a finite number, not {scale!r}")
        self.world, self.scale, self.negative = world, float(scale), negative

    @property
    def cost(self):
        """Network calls of one prediction."""
        return 2 * getattr(self.world, "cost", 1)

    def predict(self, x, i, condition=None):
        """The guided prediction. ValueError: no condition, or one that the world does not know."""
        if condition is None:
            raise ValueError("guidance needs a condition: without one there is nothing to guide to")
        plain = self.world.predict(x, i, self.negative)
        return torch.lerp(plain, self.world.predict(x, i, condition), self.scale)

    def __getattr__(self, name):
        if name == "world":  # not there yet: while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.world, name)
