"""A value that knows how uncertain x_0 is: x_0 given x_i taken as Gaussian, its variance learned once for each step.

The reward at E[x_0 | x_i] forgets that x_0 is spread about its mean. Here x_0 given x_i is N(E[x_0 | x_i], c_i I), with
one number c_i for each step, the mean posterior variance (Bao et al. 2022, Analytic-DPM, use the same number for the
reverse steps). Its soft value is in closed form for quadratic rewards; so is its gradient, which needs no backward pass
through the network: the derivative of E[x_0 | x_i] by x_i is alpha / sigma^2 times the posterior covariance (Tweedie).
"""

import torch

from tiltlib import law
from tiltlib.worlds.mixture import Quadratic


def posterior_variance(world, *, chance, rollouts=64, condition=None):
    """E|x_0 - E[x_0 | x_i]|^2 / D at each step i, float64 (steps + 1,), along roll-outs of a world with an affine path.

    D is the number of entries of a sample. Costs rollouts x steps network calls, once for all rewards and budgets.
    """
    rollouts = law.check_count(rollouts, "rollouts")
    x, means = world.start(rollouts, chance), []
    with torch.no_grad():
        for i in range(world.steps, 0, -1):
            prediction = world.predict(x, i, condition)
            means.append(world.clean(x, prediction, i))
            x = world.kernel(x, prediction, i).sample(1, chance)[0][:, 0]
    square = [(x - mean).double().square().mean().item() for mean in means[::-1]]
    return torch.tensor([0.0, *square], dtype=torch.float64)


def value(reward, beta, variance):
    """The soft value of a Quadratic reward under N(E[x_0 | x_i], variance[i] I), with a gradient of its own; a Value.

    variance: (steps + 1,), not negative, as `posterior_variance` returns it. Zeros make it the posterior-mean value.
    `with_gradient` returns the gradient by x_i too, at no further call of the network: alpha / sigma^2 variance[i]
    times the gradient by E[x_0 | x_i]. It is exact where x_0 given x_i is Gaussian of that variance.
    TypeError: another reward. ValueError: negative variances, a table that does not fit the world's steps, or a reward
    so convex that the expectation is infinite.
    """
    beta, bare = law.check_beta(beta), getattr(reward, "function", reward)
    if not isinstance(bare, Quadratic):
        raise TypeError("the Gaussian value is in closed form for quadratic rewards only")
    table = torch.as_tensor(variance, dtype=torch.float64)
    if table.ndim != 1 or not (torch.isfinite(table) & (table >= 0)).all():
        raise ValueError("variance must be a table (steps + 1,) of finite numbers that are not negative")
    dim = len(bare.vector)
    bends, turn = (bare.curvature.expand(dim), None) if bare.curvature.ndim == 0 else torch.linalg.eigh(bare.curvature)
    if not (1 - table.max() * bends.max() / beta > 0):
        raise ValueError("beta is too small for this convex reward: exp(r / beta) has no finite mean")

    def both(world, x, prediction, i, condition=None, chance=None):
        i = _step(world, i)
        if i == 0:
            return bare(x), bare.gradient(x)
        mean, c = world.clean(x, prediction, i), float(table[i])
        gain = 1 / (1 - c * bends / beta).to(mean)
        slope = bare.gradient(mean)
        slope = slope if turn is None else slope @ turn.to(mean)
        said = bare(mean) + (c / (2 * beta) * slope.square() * gain).sum(1) + beta / 2 * gain.log().sum()
        pull = gain * slope if turn is None else (gain * slope) @ turn.to(mean).T
        return said, pull * (c * float(world.grid.alpha[i]) / float(world.grid.sigma[i]) ** 2)

    def gaussian(world, x, prediction, i, condition=None, chance=None):
        return both(world, x, prediction, i)[0]

    def _step(world, i):
        if len(table) != world.steps + 1:
            raise ValueError(f"a table of {len(table)} variances does not fit {world.steps} steps")
        steps = torch.as_tensor(i).unique()
        if len(steps) != 1 or not 0 <= int(steps) <= world.steps:
            raise ValueError("a Gaussian value is of particles at one step of the grid")
        return int(steps)

    gaussian.with_gradient = both
    return gaussian
