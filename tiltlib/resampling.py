"""Which particles survive: the resampling schemes of sequential Monte Carlo.

Each takes weights (B, K) that sum to one and a count, and returns indices (B, count), unbiased: particle k is chosen
count * w_k times in expectation, and never where its weight is zero. They differ in how much the counts vary (Douc,
Cappe and Moulines 2005). Systematic resampling lives with the other draws in `chance`; the rest is here, apart, so
that a new scheme makes no chapter stale that only draws.
"""

import torch

from tiltlib.chance import SCHEMES as DRAWN
from tiltlib.chance import inverse_cdf, normalised


def multinomial(weights, count, chance):
    """`count` independent draws: the most variance of all."""
    return inverse_cdf(weights, chance.uniforms((weights.shape[0], count), device=weights.device)).sort(1).values


def stratified(weights, count, chance):
    """One uniform in each of `count` equal stretches: counts are within two of count * weight."""
    teeth = torch.arange(count, dtype=weights.dtype, device=weights.device)
    return inverse_cdf(weights, (teeth + chance.uniforms((weights.shape[0], count), device=weights.device)) / count)


def residual(weights, count, chance):
    """floor(count * weight) copies of each, and independent draws for the places that are left (Liu and Chen 1998)."""
    # a product that rounding left just below an integer is that integer: else a sure copy would be left to chance
    copies = torch.floor(count * weights * (1 + 1e-12))
    rest = (count * weights - copies).clamp(min=0)
    total = rest.sum(1, keepdim=True)
    rest = torch.where(total > 0, rest, weights)  # nothing is left to draw: any law will do
    ends = copies.cumsum(1)
    place = torch.arange(count, dtype=weights.dtype, device=weights.device).expand(len(weights), -1).contiguous()
    sure = torch.searchsorted(ends, place, right=True)
    drawn = inverse_cdf(rest, chance.uniforms(place.shape, device=weights.device))
    return torch.where(place < ends[:, -1:], sure, drawn).sort(1).values


SCHEMES = {**DRAWN, "multinomial": multinomial, "stratified": stratified, "residual": residual}


def check_scheme(scheme):
    """The scheme itself; ValueError for an unknown name."""
    if scheme not in SCHEMES:
        raise ValueError(f"unknown resampling scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    return scheme


def ancestors(log_weights, count, chance, scheme="systematic"):
    """Indices (B, count) of the survivors of log-weights (B, K). ValueError: as `Chance.ancestors`."""
    if check_scheme(scheme) in DRAWN:
        return chance.ancestors(log_weights, count, scheme)
    return SCHEMES[scheme](normalised(log_weights), count, chance)
