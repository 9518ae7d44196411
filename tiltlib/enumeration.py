"""Every outcome of a random computation, with its probability: what replaces Monte Carlo on very small worlds.

A function that asks a `Chance` is played once for each branch of the tree of everything that it may draw. So an
expectation over the production loop, resampling included, is a finite sum.
"""

import torch

from tiltlib.chance import BELOW_ONE, Chance, inverse_cdf, normalised


class Script(Chance):
    """Plays one branch of the tree: `choices` fixes the first picks, the rest take the first option."""

    def __init__(self, choices=()):
        self.choices, self.options, self.probability = choices, [], 1.0

    def pick(self, probabilities):
        """The option of this branch among those that are possible; the branch's probability takes its share."""
        possible = [k for k, p in enumerate(probabilities) if p > 0]
        at = self.choices[len(self.options)] if len(self.options) < len(self.choices) else 0
        self.options.append(len(possible))
        self.probability *= probabilities[possible[at]]
        return possible[at]

    def categoricals(self, log_weights):
        weights = normalised(log_weights)
        picks = [self.pick(row) for row in weights.reshape(-1, weights.shape[-1]).tolist()]
        return torch.tensor(picks).view(weights.shape[:-1])

    def ancestors(self, log_weights, count=None, scheme="systematic"):
        """Systematic resampling depends on its one uniform through finitely many stretches of it."""
        if scheme != "systematic":
            raise ValueError(f"the branches of {scheme!r} resampling are not enumerated; only those of systematic")
        weights = normalised(log_weights)
        count = weights.shape[1] if count is None else count
        chosen = []
        for row in weights:
            cuts = (count * row.cumsum(0)) % 1
            edges = torch.cat([torch.zeros(1), cuts, torch.ones(1)]).double().sort().values
            k = self.pick(edges.diff().tolist())
            points = (torch.arange(count) + (edges[k] + edges[k + 1]) / 2) / count
            chosen.append(inverse_cdf(row, points.clamp(max=BELOW_ONE)))
        return torch.stack(chosen)

    def normals(self, *args, **kwargs):
        raise TypeError("a normal has no finite list of outcomes: enumeration is for finite worlds")

    uniforms = normals


def outcomes(function):
    """Yields (probability, function(chance)) of every branch."""
    choices = []
    while True:
        script = Script(choices)
        result = function(script)
        yield script.probability, result
        played = list(choices) + [0] * (len(script.options) - len(choices))
        while played and played[-1] + 1 == script.options[len(played) - 1]:
            played.pop()
        if not played:
            return
        played[-1] += 1
        choices = played


def expectation(function):
    """E[function(chance)], an array of any shape, over all outcomes."""
    return sum(probability * result for probability, result in outcomes(function))
