"""Tilting a denoiser without RL: regression of the noise on samples of the model, drawn in proportion to their weights.

A squared error is smallest at a conditional mean. With weights exp(r/beta) it is the conditional mean under the tilted
law, so the fitted network denoises the tilted law: Jiao, Chen and Li 2025, equations (38) and (39), minimised. The loop
is that of `tiltlib.tune.training`: minus half a squared error takes the place of a log-probability. `reciprocal` is
the law that the same paper's objective (34) has as its optimum instead.
"""

import copy
import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq

from tiltlib import law, paths
from tiltlib.tune import training
from tiltlib.tune.weighted import check_weights
from tiltlib.worlds import Calls

# ---- the objective (34) on a finite alphabet ----------------------------------------------------------------------


class Reciprocal(NamedTuple):
    law: np.ndarray  # (K,)
    multiplier: float  # lambda, above the largest reward


def converted_objective(q, p, r, beta) -> float:
    """E_q[r] - beta KL(p || q): objective (34), its loss weighted to be a divergence, without the irreducible part.

    q, p: laws (K,); r: (K,); beta > 0, in units of the reward. -inf where q misses what p has. Compare
    `law.rlhf_objective`, which is (32): there the divergence is KL(q || p).
    """
    q, p = law.check_law(q, "q"), law.check_law(p)
    r, beta = law.check_reward(r, p), law.check_beta(beta)
    return float(q @ r - beta * law.kl(p, q))


def reciprocal(p, r, beta) -> Reciprocal:
    """The law p beta / (lambda - r) that maximises `converted_objective`, with the lambda that makes it sum to one.

    p: law (K,); r: (K,), its values outside the support of p do not count; beta > 0. On a finite alphabet it always
    exists: lambda - max r lies between beta p(where r is largest) and beta. On a continuum it may need an atom there.
    """
    p = law.check_law(p)
    r, beta = law.check_reward(r, p), law.check_beta(beta)
    alive = p > 0
    gap = r[alive].max() - r[alive]
    low, high = beta * p[alive][gap == 0].sum(), beta

    def excess(log_s):
        return float(np.log(p[alive] @ (beta / (math.exp(log_s) + gap))))

    bracket = math.log(low) - 1e-9, math.log(high) + 1e-9
    s = math.exp(brentq(excess, *bracket, xtol=1e-15, rtol=8.9e-16, maxiter=200))
    q = np.zeros_like(p)
    q[alive] = p[alive] * beta / (s + gap)
    return Reciprocal(q / q.sum(), float(r[alive].max() + s))


# ---- the regression (38) ------------------------------------------------------------------------------------------


class Tuned(NamedTuple):
    """What `fit` returns."""

    world: object  # a copy of the world, its network tuned and frozen
    history: dict  # "loss": list of `steps` floats, mean squared error per sample, summed over its entries, halved
    calls: Calls  # of the network, forward and backward, one per sample of each batch


class Noised(NamedTuple):
    """n clean samples with their steps and noise."""

    x0: torch.Tensor  # (n, *shape)
    i: torch.Tensor  # (n,) int64 in 1..steps
    noise: torch.Tensor  # (n, *shape)
    condition: torch.Tensor | None = None  # (n,)


class Corrected:
    """A World whose prediction is `world`'s plus a small network of x and the step, zero until it is trained.

    world: particles (n, d), e.g. a `Mixture`; everything but `predict` is its own. width: hidden units, two layers.
    generator: torch.Generator of the first weights. Attribute: network, frozen (`fit` trains a copy).
    """

    def __init__(self, world, *, width=64, generator):
        width = law.check_count(width, "width")
        self.world = world
        layers, sizes = [], [world.dim + 5, width, width, world.dim]
        for k, (a, b) in enumerate(pairwise(sizes)):
            layer = torch.nn.utils.skip_init(torch.nn.Linear, a, b, dtype=world.dtype)
            with torch.no_grad():
                layer.bias.zero_()
                layer.weight.normal_(0, 0.0 if k == 2 else a**-0.5, generator=generator)
            layers += [layer, torch.nn.SiLU()]
        self.network = torch.nn.Sequential(*layers[:-1]).requires_grad_(False)

    def predict(self, x, i, condition=None):
        """The world's prediction and the correction, (n, d); i an int or (n,)."""
        s = torch.as_tensor(i, dtype=x.dtype, device=x.device).reshape(-1).expand(len(x)) / self.world.steps
        waves = [s, *(f(torch.pi * k * s) for f in (torch.sin, torch.cos) for k in (1, 2))]
        return self.world.predict(x, i, condition) + self.network(torch.cat([x, torch.stack(waves, -1)], -1))

    def __getattr__(self, name):
        if name == "world":  # not there yet: while it is being copied
            raise AttributeError(name)
        return getattr(self.world, name)


class Denoiser:
    """The policy of `training.train`: the network of a world, and minus half its squared error on noised samples.

    world: `predict` runs through `network`, on an affine path (`grid`), and predicts "epsilon", "x0", "velocity",
    "v_prediction" or "score". It is copied; the reference stays as it is. TypeError: no network, or another prediction.
    """

    def __init__(self, world):
        if not isinstance(getattr(world, "network", None), torch.nn.Module):
            raise TypeError(f"{type(world).__name__} has no network to tune; wrap it in Corrected")
        if world.prediction not in paths.PREDICTIONS:
            raise TypeError(f"a denoiser predicts one of {', '.join(paths.PREDICTIONS)}, not {world.prediction!r}")
        self.world = copy.copy(world)
        self.world.network = copy.deepcopy(world.network).requires_grad_(True)
        self._identity = {"base": training.digest(*world.network.state_dict().values())}

    def parameters(self):
        return dict(self.world.network.named_parameters())

    def identity(self):
        return self._identity

    def log_prob(self, batch):
        """(n,) of a `Noised` batch, with gradient: -1/2 |target - prediction|^2, summed over the entries of a sample.

        Up to a constant the Gaussian log-likelihood of the target; over many steps a bound on that of x0 (30).
        """
        x, target = noised(self.world, batch)
        return -(target - self.world.predict(x, batch.i, batch.condition)).square().flatten(1).sum(1) / 2


def noised(world, batch):
    """x_i = alpha_i x0 + sigma_i noise of a `Noised` batch, and what the world's network should say there."""
    grid, x0, noise, i = world.grid, batch.x0, batch.noise, batch.i
    alpha, sigma = (paths.at(table, i, x0) for table in (grid.alpha, grid.sigma))
    x = alpha * x0 + sigma * noise
    if world.prediction == "epsilon":
        return x, noise
    if world.prediction == "x0":
        return x, x0
    if world.prediction == "velocity":
        return x, paths.at(grid.d_alpha, i, x0) * x0 + paths.at(grid.d_sigma, i, x0) * noise
    if world.prediction == "v_prediction":
        return x, alpha * noise - sigma * x0
    return x, -noise / sigma


def _falling(steps):
    """Adam whose learning rate falls evenly to zero over `steps` steps; the count is Adam's own, so it can go on."""

    class FallingAdam(torch.optim.Adam):
        def step(self, closure=None):
            for group in self.param_groups:
                peak = group.setdefault("peak", group["lr"])
                done = self.state.get(group["params"][0], {}).get("step", 0)
                group["lr"] = peak * (1 - float(done) / steps)
            return super().step(closure)

    return FallingAdam


def fit(
    world, pool, weights=None, *, steps, batch, learning_rate, generator, condition=None, checkpoint=None, every=10,
):  # fmt: skip
    """Weighted denoising regression, (38): the network of `world` learns the law that the weighted pool stands for.

    world: with a `network`, e.g. `Digits` or `Corrected`; it is tuned for the steps of its own grid. pool: samples
    (N, *shape), such as the world itself draws. weights: `Weights` or (N,), summing to one; None weighs all alike, the
    untilted control. condition: (N,) of the pool, or None. steps: of Adam, whose rate falls evenly from
    `learning_rate` to zero, so that the last steps average out the noise. batch: samples in a step, drawn in
    proportion to their weights (systematically: no gradient is spent on weights near zero), the noise levels 1..steps
    in turn, so that all get the same share. generator, checkpoint, every and errors: as in `training.train`. Raises
    ValueError before any work for pools, weights and conditions that do not fit, TypeError as `Denoiser` does.
    """
    if not isinstance(pool, torch.Tensor) or pool.ndim < 2 or len(pool) == 0 or not pool.isfinite().all():
        raise ValueError("the pool must be a finite tensor (N, *shape) with N >= 1")
    values = check_weights(np.full(len(pool), 1 / len(pool)) if weights is None else weights)
    if values.shape != (len(pool),):
        raise ValueError(f"{len(pool)} samples and weights {values.shape} do not fit")
    if condition is not None and condition.shape != (len(pool),):
        raise ValueError(f"{len(pool)} samples and conditions {tuple(condition.shape)} do not fit")
    batch, steps = law.check_count(batch, "batch"), law.check_count(steps, "steps")
    log_values = torch.tensor(values, device=pool.device).log()[None]
    policy = Denoiser(world)

    def draw(policy, chance):
        chosen = chance.ancestors(log_values, batch)[0]
        offset = (chance.uniforms((1,), device=pool.device) * world.steps).long()
        i = 1 + (torch.arange(batch, device=pool.device) + offset) % world.steps
        noise = chance.normals(pool[chosen].shape, dtype=pool.dtype, device=pool.device)
        part = Noised(pool[chosen], i, noise, None if condition is None else condition[chosen])
        return [(part, torch.full((batch,), 1 / batch, dtype=pool.dtype, device=pool.device))], {}

    settings = {
        "row": "denoising", "batch": batch, "of": steps, "grid": training.digest(world.grid.alpha, world.grid.sigma),
        "pool": training.digest(pool, log_values, *([] if condition is None else [condition])),
    }  # fmt: skip
    history = training.train(
        policy, draw, steps=steps, learning_rate=learning_rate, generator=generator,
        optimizer=_falling(steps), checkpoint=checkpoint, every=every, settings=settings,
    )  # fmt: skip
    policy.world.network.requires_grad_(False)
    if hasattr(policy.world, "calls"):
        policy.world.calls = 0
    return Tuned(policy.world, history, Calls(model=steps * batch, gradient=steps * batch))
