"""A model of one path, sampled along another: the interpolant conversion of flow models (Kim et al. 2025)."""

import math

import torch

from tiltlib import paths
from tiltlib.worlds.base import Diffusion

OWN = ("draw", "dim", "shape", "device", "dtype", "network")  # what a converted model still knows of itself


class Converted(Diffusion):
    """Samples along the Grid `on` with `model`, a World trained on another path. Predictions are E[x_0 | x_i].

    model: its step i must have the noise-to-signal ratio of step i of `on`, as on the Grid `matching(path, on)`. Then
    x_i along `on` stands for scale[i] x_i on the model's path, and E[x_0 | .] is the same, exactly. sampler: of the
    steps along `on`, as in `paths.SAMPLERS`. The start is the model's. Exact values of the model, where it has some,
    are those here. ValueError: other noise-to-signal ratios, another number of steps.
    """

    def __init__(self, model, on, sampler="ancestral"):
        super().__init__(on, sampler, prediction="x0")
        theirs = model.grid
        if theirs.steps != on.steps:
            raise ValueError(f"the model has {theirs.steps} steps, the grid {on.steps}")
        size, own = torch.hypot(theirs.alpha, theirs.sigma), torch.hypot(on.alpha, on.sigma)
        if not ((theirs.sigma * on.alpha - theirs.alpha * on.sigma).abs() <= 1e-9 * size * own).all():
            raise ValueError("the model's steps have other noise-to-signal ratios than the grid: see `matching`")
        self.model, self.scale, self.cost = model, size / own, getattr(model, "cost", 1)

    def start(self, n, chance):
        """x at i = steps, (n, *shape)."""
        return self.model.start(n, chance) / float(self.scale[-1])

    def predict(self, x, i, condition=None):
        """E[x_0 | x_i], (n, *shape), by one call of the model. Errors: the model's."""
        scaled = self._scaled(x, i)
        return self.model.clean(scaled, self.model.predict(scaled, i, condition), i)

    def _scaled(self, x, i):
        return x * paths.at(self.scale, i, x)

    def __getattr__(self, name):
        if name in ("soft_value", "hard_value"):
            known = getattr(self.model, name)
            return lambda x, i, *more: known(self._scaled(x, i), i, *more)
        if name in OWN:
            return getattr(self.model, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def matching(path, on):
    """The Grid of `path` (a name in `PATHS`, or a Path) whose steps have the noise-to-signal ratios of the Grid `on`.

    ValueError: `on` is noisier than the path ever gets.
    """
    return paths.grid(path, times=paths.interpolant(path, on)[0])


def flow_digits(on, sampler="ancestral", **options):
    """The rectified digits, sampled along any Grid `on`; options: device, dtype, chunk, folder, as in `digits`.

    They start at standard normals of the size of x there, as if alpha were zero. ValueError: `on` starts where alpha
    is above 2 % of sigma, which is not noise.
    """
    from tiltlib.worlds.digit_models import Digits, digits

    class FlowDigits(Converted):
        def start(self, n, chance):
            return super().start(n, chance) * float(self.scale[-1] * torch.hypot(on.alpha[-1], on.sigma[-1]))

    if on.alpha[-1] > 0.02 * on.sigma[-1]:
        raise ValueError(f"the grid starts at alpha = {float(on.alpha[-1]):.3g}, where there is more than noise")
    trained = digits("flow", **options)
    theirs = matching("rectified", on)
    times = torch.cat([torch.full((1,), math.nan, dtype=torch.float64), 1000 * theirs.t[1:]])
    model = Digits(trained.network, theirs, times, prediction="velocity", sampler="ode", chunk=trained.chunk)
    return FlowDigits(model, on, sampler)
