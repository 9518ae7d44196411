"""The only source of randomness: normals, uniforms, categoricals, and the ancestors of a resampling step.

Whatever is random in tiltlib asks a `Chance`, which wraps an explicit torch.Generator; there is no global state, and a
test may put in its place a subclass that enumerates every outcome. Weights come as log-weights, batched in leading
dimensions, and are turned into cumulative probabilities in float64: an outcome of weight zero is never drawn.
"""

import torch

BELOW_ONE = 1 - 2.0**-53  # the largest float64 below one


class Chance:
    """Random draws from one explicit torch.Generator.

    generator: a torch.Generator on the device of everything that is drawn. TypeError: no generator.
    """

    def __init__(self, generator):
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"an explicit torch.Generator is needed, not {generator!r}")
        self.generator = generator

    def normals(self, shape, dtype=torch.float32, device=None):
        """Independent standard normals. device: the generator's (the default); ValueError for another."""
        return torch.randn(tuple(shape), dtype=dtype, device=self._device(device), generator=self.generator)

    def uniforms(self, shape, dtype=torch.float64, device=None):
        """Independent uniforms on [0, 1)."""
        return torch.rand(tuple(shape), dtype=dtype, device=self._device(device), generator=self.generator)

    def categoricals(self, log_weights):
        """One index (...) per row of unnormalised log-weights (..., K), which may be -inf but not all in a row.

        ValueError: a NaN or +inf among them, a row of zero weight, another device than the generator's.
        """
        weights = normalised(log_weights)
        points = self.uniforms((*weights.shape[:-1], 1), device=weights.device)
        return inverse_cdf(weights, points).squeeze(-1)

    def ancestors(self, log_weights, count=None, scheme="systematic"):
        """Indices (B, count) of the survivors among K particles of log-weights (B, K); count is K by default.

        Every scheme of `SCHEMES` is unbiased: particle k is chosen count * w_k times in expectation, w normalised.
        """
        weights = normalised(log_weights)
        if weights.ndim != 2:
            raise ValueError(f"log_weights must have shape (B, K), not {tuple(weights.shape)}")
        if scheme not in SCHEMES:
            raise ValueError(f"unknown resampling scheme {scheme!r}; known: {', '.join(SCHEMES)}")
        count = weights.shape[1] if count is None else count
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"count must be an integer >= 1, not {count!r}")
        return SCHEMES[scheme](weights, count, self)

    def _device(self, device):
        here = self.generator.device
        wanted = here if device is None else torch.device(device)
        if wanted.type != here.type or wanted.index not in (None, here.index):
            raise ValueError(f"the generator is on {here}, the draw is wanted on {wanted}: make the generator there")
        return here


def normalised(log_weights):
    """Weights of log-weights (..., K) as float64 that sum to one over K; ValueError where that makes no sense."""
    if not isinstance(log_weights, torch.Tensor) or not log_weights.is_floating_point():
        raise TypeError("log_weights must be a floating-point tensor")
    if log_weights.ndim == 0 or log_weights.shape[-1] == 0:
        raise ValueError(f"log_weights must have shape (..., K) with K >= 1, not {tuple(log_weights.shape)}")
    log_weights = log_weights.detach().double()
    if (log_weights.isnan() | log_weights.isposinf()).any():
        raise ValueError("log_weights must be finite or -inf; there is a NaN or +inf among them")
    if log_weights.isneginf().all(-1).any():
        raise ValueError("all weights of a row are zero (log_weights -inf): nothing can be drawn from it")
    return log_weights.softmax(-1)


def inverse_cdf(weights, points):
    """Index (..., m) of the outcome whose stretch of the cumulative weights (..., K) holds each point (..., m).

    Points are in [0, 1]. An outcome of weight zero has an empty stretch, also on a GPU, where the rounding of cumsum
    may go down.
    """
    cumulative = weights.cumsum(-1)
    cumulative = torch.where(weights > 0, cumulative, 0).cummax(-1).values
    cumulative = cumulative / cumulative[..., -1:]
    # the last entry is one exactly; a point that rounding carried to one belongs to the last positive weight
    return torch.searchsorted(cumulative, points.clamp(max=BELOW_ONE).contiguous(), right=True)


def systematic(weights, count, chance):
    """One uniform per row and a comb of `count` equally spaced teeth: counts are within one of count * weight."""
    offset = chance.uniforms((weights.shape[0], 1), device=weights.device)
    teeth = torch.arange(count, dtype=weights.dtype, device=weights.device)
    return inverse_cdf(weights, (teeth + offset) / count)


def effective_sample_size(log_weights):
    """(sum w)^2 / sum w^2 of log-weights (..., K): K when all are equal, one when a single particle is left."""
    return 1 / normalised(log_weights).square().sum(-1)


SCHEMES = {"systematic": systematic}  # name -> scheme(weights (B, K), count, chance) -> indices (B, count)
