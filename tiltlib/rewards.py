"""Rewards: what a sample is worth, in named units and a known range, with or without a gradient, calls counted."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class Reward:
    """A reward, called on n samples at once.

    name            as it is shown and as `named` takes it
    function        n samples (strings, or a tensor with n rows) -> n numbers (array, tensor or list)
    unit            of the numbers, e.g. "sentiment score"
    low, high       the range, which may be infinite; a value outside is an error
    differentiable  whether `gradient` works: then `function` maps a tensor to a tensor through torch
    calls           samples evaluated so far, and with a gradient: gradient_calls

    Calling it returns (n,) float64 numbers, or a tensor where the samples are one. Raises ValueError naming the
    offending sample when a value is not finite or out of range, and when there is not one number for each sample.
    """

    name: str
    function: Callable
    unit: str
    low: float = -math.inf
    high: float = math.inf
    differentiable: bool = False
    calls: int = field(default=0, init=False)
    gradient_calls: int = field(default=0, init=False)

    def __call__(self, samples):
        if isinstance(samples, str):
            raise TypeError(f"{self.name} takes n samples at once: wrap one text in a list")
        self.calls += len(samples)
        return self._checked(self.function(samples), samples)

    def gradient(self, samples):
        """Values (n,) and their gradients, shaped as the samples (n, ...), a floating-point tensor.

        Raises TypeError for a black box, which has none.
        """
        if not self.differentiable:
            raise TypeError(
                f"{self.name} is a black box: it has values but no gradient; use a method that asks for values only"
            )
        self.gradient_calls += len(samples)
        at = samples.detach().requires_grad_()
        with torch.enable_grad():
            values = self._checked(self.function(at), at)
            (slope,) = torch.autograd.grad(values.sum(), at)
        return values.detach(), slope

    def _checked(self, values, samples):
        if not isinstance(values, torch.Tensor):
            values = np.asarray(values, dtype=float)
        if tuple(values.shape) != (len(samples),):
            raise ValueError(f"{self.name}: {len(samples)} samples, but values of shape {tuple(values.shape)}")
        plain = values.detach().double().cpu().numpy() if isinstance(values, torch.Tensor) else values
        slack = 1e-6 * (1 + np.abs(plain))  # rounding in float32
        wrong = ~(np.isfinite(plain) & (plain >= self.low - slack) & (plain <= self.high + slack))
        if wrong.any():
            k = int(np.argmax(wrong))
            shown = f": {samples[k][:60]!r}" if isinstance(samples[k], str) else ""
            raise ValueError(f"{self.name} is {plain[k]} at sample {k}, outside [{self.low}, {self.high}]{shown}")
        return values


def sentiment() -> Reward:
    """VADER's compound score of a text, in [-1, 1]: a word list with rules (Hutto and Gilbert 2014); a black box.

    Texts without a listed word score exactly 0, so the law of this reward has an atom there.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def score(texts):
        return [analyzer.polarity_scores(text)["compound"] for text in texts]

    return Reward("sentiment", score, "sentiment score", -1.0, 1.0)


def closeness_to_length(words: int) -> Reward:
    """min(w, words) / max(w, words) for a text of w words: 1 at the wanted length, 0 for an empty text; a black box.

    Raises ValueError for words < 1.
    """
    if words < 1 or words != int(words):
        raise ValueError(f"words is an integer of at least 1, got {words}")

    def score(texts):
        counts = [len(text.split()) for text in texts]
        return [min(count, words) / max(count, words) for count in counts]

    return Reward(f"closeness_to_length({words})", score, "shorter over longer length", 0.0, 1.0)


def named(name: str) -> Reward:
    """A text reward by its name: "sentiment", or "closeness_to_length(12)". Raises ValueError for any other."""
    length = re.fullmatch(r"closeness_to_length\((\d+)\)", name)
    if name != "sentiment" and not length:
        raise ValueError(f"no reward {name!r}: 'sentiment', or 'closeness_to_length(12)' for a wish of 12 words")
    return closeness_to_length(int(length[1])) if length else sentiment()
