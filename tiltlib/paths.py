"""Affine paths x_t = alpha_t x_0 + sigma_t eps, what a network may predict on them, and the steps that go back.

Time runs from t = 0 (data) to t = 1 (noise); a `Grid` holds the tables of one path at its steps i = 0 .. steps and
sampling counts i down. Every reverse kernel is Gaussian with a mean that is linear in x_t and E[x_0 | x_t], which
stays finite where alpha_t = 0 (the score then no longer determines x_0). A `Kernel` is one such step for n particles.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

# ---------------------------------------------------------------------------------------------------------- paths


class Path(NamedTuple):
    """x_t = alpha(t) x_0 + sigma(t) eps on t in [0, 1]; time(rho) inverts rho = sigma(t) / alpha(t).

    All map float64 tensors to float64 tensors and are differentiable by autograd.
    """

    name: str
    alpha: Callable
    sigma: Callable
    time: Callable


def vp_linear(beta_min=0.1, beta_max=20.0):
    """Variance preserving, alpha = exp(-B/2), B(t) the integral of a rate rising linearly from beta_min to beta_max.

    Song et al. 2021, eq. (33). ValueError: not 0 < beta_min <= beta_max.
    """
    if not 0 < beta_min <= beta_max < math.inf:
        raise ValueError(f"0 < beta_min <= beta_max is needed, not {beta_min!r} and {beta_max!r}")
    slope = beta_max - beta_min

    def integral(t):
        return beta_min * t + slope / 2 * t**2

    def time(rho):
        integral = torch.log1p(rho**2)
        return 2 * integral / (beta_min + torch.sqrt(beta_min**2 + 2 * slope * integral))

    return Path(
        "vp_linear", lambda t: torch.exp(-integral(t) / 2), lambda t: torch.sqrt(-torch.expm1(-integral(t))), time
    )


def vp_cosine(offset=0.008):
    """Variance preserving, alpha a cosine of time that is exactly zero at t = 1 (Nichol and Dhariwal 2021, eq. (17)).

    ValueError: offset not positive.
    """
    if not 0 < offset < math.inf:
        raise ValueError(f"offset must be positive, not {offset!r}")
    # with the angle counted from t = 1 the cosine becomes a sine: no cancellation, and an exact zero
    angle = math.pi / 2 / (1 + offset)
    top = math.sin(angle)
    return Path(
        "vp_cosine",
        lambda t: torch.sin(angle * (1 - t)) / top,
        lambda t: torch.sqrt(torch.sin(angle * t) * torch.sin(angle * (2 - t))) / top,
        lambda rho: 1 - torch.asin(top / torch.sqrt(1 + rho**2)) / angle,
    )


def ve(sigma_min=0.01, sigma_max=50.0):
    """Variance exploding: alpha = 1, sigma^2 = sigma_min^2 ((sigma_max / sigma_min)^(2t) - 1), zero at t = 0.

    The exact transition kernel of the VE SDE of Song et al. 2021, eq. (29). ValueError: not 0 < sigma_min < sigma_max.
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"0 < sigma_min < sigma_max is needed, not {sigma_min!r} and {sigma_max!r}")
    rate = 2 * math.log(sigma_max / sigma_min)
    return Path(
        "ve",
        lambda t: 1 + 0 * t,
        lambda t: sigma_min * torch.sqrt(torch.expm1(rate * t)),
        lambda rho: torch.log1p((rho / sigma_min) ** 2) / rate,
    )


def rectified():
    """Rectified flow, x_t = (1 - t) x_0 + t eps (Liu, Gong and Liu 2023)."""
    return Path("rectified", lambda t: 1 - t, lambda t: 1 * t, lambda rho: 1 / (1 + 1 / rho))


PATHS = {"vp_linear": vp_linear(), "vp_cosine": vp_cosine(), "ve": ve(), "rectified": rectified()}

# ---------------------------------------------------------------------------------------------------------- grids


@dataclass(frozen=True, eq=False)
class Grid:
    """Tables (steps + 1,), float64, of a path at the steps i = 0 (cleanest) .. steps (noisiest).

    t, d_alpha and d_sigma are None for a grid from tables of a discrete schedule: it has no velocity and no flow SDE.
    ValueError: fewer than two entries, alpha or sigma negative or not finite, sigma / alpha or t not increasing.
    """

    alpha: torch.Tensor
    sigma: torch.Tensor
    t: torch.Tensor | None = None
    d_alpha: torch.Tensor | None = None
    d_sigma: torch.Tensor | None = None

    def __post_init__(self):
        alpha, sigma = self.alpha, self.sigma
        if alpha.ndim != 1 or alpha.shape != sigma.shape or len(alpha) < 2:
            raise ValueError(f"alpha and sigma need one shape (steps + 1,), not {alpha.shape} and {sigma.shape}")
        if not (torch.isfinite(alpha + sigma) & (alpha >= 0) & (sigma >= 0) & (alpha + sigma > 0)).all():
            raise ValueError("alpha and sigma must be finite, not negative, and not both zero")
        if not (alpha[:-1] * sigma[1:] > alpha[1:] * sigma[:-1]).all():
            raise ValueError("the noise sigma / alpha must increase with the step")
        if self.t is not None and not (self.t.diff() > 0).all():
            raise ValueError("the times must increase with the step")

    @property
    def steps(self):
        return len(self.alpha) - 1

    def diffusion_squared(self):
        """g^2 (steps + 1,) of the forward SDE dx = f x dt + g dw of this path; infinite where alpha = 0."""
        self.needs_time("the diffusion coefficient g")
        return 2 * self.sigma * (self.d_sigma - self.sigma * self.d_alpha / self.alpha)

    def needs_time(self, what):
        if self.t is None:
            raise ValueError(f"{what} needs a path with its time derivatives, not only tables of alpha and sigma")


def grid(path, steps=None, *, start=1.0, end=0.0, warp=None, times=None):
    """The Grid of a path (a name in `PATHS`, or a Path) at `steps` + 1 times from `end` to `start`, or at `times`.

    warp: maps evenly spaced u in [0, 1] (0 = data) to [0, 1], increasing, e.g. `shift(3.0)`.
    ValueError: unknown path, steps < 1 or not an integer, times outside 0 <= end < start <= 1 or not increasing.
    """
    path = named(path, PATHS, "path", Path)
    if (steps is None) == (times is None):
        raise ValueError("either steps or times are needed")
    if times is None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps must be an integer >= 1, not {steps!r}")
        if not 0 <= end < start <= 1:
            raise ValueError(f"0 <= end < start <= 1 is needed, not end={end!r}, start={start!r}")
        even = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        times = end + (start - end) * (even if warp is None else warp(even))
    t = torch.as_tensor(times, dtype=torch.float64)
    if t.ndim != 1 or not ((t >= 0) & (t <= 1)).all():
        raise ValueError("times must be one-dimensional and within [0, 1]")
    with torch.enable_grad():
        t = t.clone().requires_grad_()
        (d_alpha,), (d_sigma,) = (torch.autograd.grad(f(t).sum(), t) for f in (path.alpha, path.sigma))
    t = t.detach()
    return Grid(path.alpha(t), path.sigma(t), t, d_alpha, d_sigma)


def tables(alpha, sigma):
    """The Grid of a discrete schedule, cleanest first, e.g. alpha = [1, *sqrt(alpha_bar[timesteps])]."""
    return Grid(torch.as_tensor(alpha, dtype=torch.float64), torch.as_tensor(sigma, dtype=torch.float64))


def shift(factor):
    """The warp u -> factor u / (1 + (factor - 1) u) that spends more steps at the noisy end (Esser et al. 2024)."""
    if not 0 < factor < math.inf:
        raise ValueError(f"the shift must be positive, not {factor!r}")
    return lambda u: factor * u / (1 + (factor - 1) * u)


def interpolant(path, on):
    """Times and scales (steps + 1,) at which a model trained on `path` is asked while sampling along the Grid `on`.

    Step i stands for scale[i] * x at model time t[i], of the same noise-to-signal ratio, so E[x_0 | .] is the same.
    ValueError: the grid is noisier than the path ever gets; start it below t = 1.
    """
    path = named(path, PATHS, "path", Path)
    t = path.time(on.sigma / on.alpha)
    if not (t <= 1 + 1e-12).all():
        raise ValueError(f"the grid is noisier than path {path.name!r} at t = 1: start it at a smaller t")
    t = t.clamp(0, 1)
    return t, torch.sqrt((path.alpha(t) ** 2 + path.sigma(t) ** 2) / (on.alpha**2 + on.sigma**2))


def at(table, i, like):
    """table[i] ready to multiply `like` (n, *shape): a float when all particles are at one step, else (n, 1, ..).

    i: an int or an integer tensor () or (n,). ValueError: a step outside the grid. TypeError: not integers.
    """
    last = len(table) - 1
    if isinstance(i, torch.Tensor):
        if i.is_floating_point() or i.dtype == torch.bool or i.ndim > 1 or i.numel() == 0:
            raise TypeError(f"a step is an int or an integer tensor (n,), not {i.dtype} {tuple(i.shape)}")
        if i.ndim == 1 and len(i) not in (1, len(like)):
            raise ValueError(f"{len(i)} steps do not fit {len(like)} particles")
        if i.ndim == 1 and i.stride(0) and not bool((i == i[0]).all()):
            if i.min() < 0 or i.max() > last:
                raise ValueError(f"step outside the grid: {int(i.min())}..{int(i.max())} is not within 0..{last}")
            values = table.to(like.device)[i.to(like.device)].to(like.dtype)
            return values.reshape(-1, *[1] * (like.ndim - 1))
        i = int(i.reshape(-1)[0])
    if not isinstance(i, int) or isinstance(i, bool):
        raise TypeError(f"a step is an int or an integer tensor (n,), not {i!r}")
    if not 0 <= i <= last:
        raise ValueError(f"step outside the grid: {i} is not within 0..{last}")
    return float(table[i])


# -------------------------------------------------------------------------------------------- what a network predicts


def basis(on, prediction):
    """Tables (p, q, kappa): prediction = p x_t + q E[x_0 | x_t], and change of score = kappa * change of prediction.

    prediction: x0 | epsilon | score | velocity (of the flow, d x_t / dt) | v_prediction (diffusers': alpha eps - sigma
    x_0, another object). ValueError: unknown, or velocity on a grid without time derivatives.
    """
    alpha, sigma = on.alpha, on.sigma
    if prediction == "x0":
        return torch.zeros_like(alpha), torch.ones_like(alpha), alpha / sigma**2
    if prediction == "epsilon":
        return 1 / sigma, -alpha / sigma, -1 / sigma
    if prediction == "score":
        return -1 / sigma**2, alpha / sigma**2, torch.ones_like(alpha)
    if prediction == "v_prediction":
        both = alpha**2 + sigma**2
        return alpha / sigma, -both / sigma, -alpha / (sigma * both)
    if prediction == "velocity":
        on.needs_time("a flow velocity")
        q = on.d_alpha - alpha * on.d_sigma / sigma
        return on.d_sigma / sigma, q, alpha / (sigma**2 * q)
    raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")


PREDICTIONS = ("x0", "epsilon", "score", "velocity", "v_prediction")


def conversion(on, source, target):
    """Tables (gain, offset) with target = gain * source + offset * x_t; not finite where the source does not tell."""
    (p, q, _), (p_new, q_new, _) = basis(on, source), basis(on, target)
    if source == target:
        return torch.ones_like(p), torch.zeros_like(p)
    return q_new / q, p_new - p * q_new / q


def convert(on, value, x, i, source, target):
    """A prediction of kind `source` at x (n, *shape) and step i, as one of kind `target`; differentiable.

    ValueError: unknown kind, step outside the grid, or a step where the source does not determine the target (epsilon
    where alpha = 0, anything but x0 where sigma = 0).
    """
    gain, offset = conversion(on, source, target)
    return value if source == target else linear(value, x, gain, offset, i, f"{source} does not determine {target}")


def linear(value, x, gain, offset, i, otherwise):
    """gain[i] * value + offset[i] * x; ValueError, opening with `otherwise`, where the tables are not finite."""
    if value.shape != x.shape:
        raise ValueError(f"a prediction of shape {tuple(value.shape)} does not fit particles {tuple(x.shape)}")
    gain, offset = at(gain, i, x), at(offset, i, x)
    plain = isinstance(gain, float)
    if not (math.isfinite(gain + offset) if plain else bool(torch.isfinite(gain + offset).all())):
        raise ValueError(f"{otherwise} at step {i.tolist() if isinstance(i, torch.Tensor) else i}")
    # added in place: a large tensor costs more to allocate than to fill
    return (value * gain).add_(x, alpha=offset) if plain else (value * gain).add_(x * offset)


def square(x):
    """|x|^2 over the last axis: for long rows without a temporary, for short ones by a product, both to save time."""
    return torch.linalg.vector_norm(x, dim=-1) ** 2 if x.shape[-1] > 8 else x**2 @ x.new_ones(x.shape[-1])


# ------------------------------------------------------------------------------------------------- reverse samplers


class Coefficients(NamedTuple):
    """The step i -> i-1 is N(x * x_t + x0 * E[x_0 | x_t], std^2) = N(a * x_t + c * score, std^2).

    Tables (steps + 1,), float64, entry 0 NaN. a and c are infinite where alpha = 0. std^2 / c is what separates the
    current-state from the look-ahead guidance; it tends to one as the steps shrink only for the ancestral SDE.
    """

    x: torch.Tensor
    x0: torch.Tensor
    std: torch.Tensor
    a: torch.Tensor
    c: torch.Tensor


def coefficients(on, sampler):
    """Coefficients of a sampler (a name in `SAMPLERS`, or what `ddim`, `flow_sde`, ... return) on a Grid."""
    sampler = named(sampler, SAMPLERS, "sampler", Callable)
    x, x0, std = (torch.cat([torch.full((1,), math.nan, dtype=torch.float64), table]) for table in sampler(on))
    if not torch.isfinite(x + x0 + std)[1:].all() or (std[1:] < 0).any():
        raise ValueError("the sampler gives a mean or std that is not finite, or a std that is negative, on this grid")
    return Coefficients(x, x0, std, x + x0 / on.alpha, x0 * on.sigma**2 / on.alpha)


def ddim(eta):
    """DDIM with noise eta in [0, 1]: 0 the probability-flow ODE, 1 ancestral (Song, Meng and Ermon 2021, eq. (12)).

    On every path, the marginals are kept for a fixed x_0. ValueError: eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be within [0, 1], not {eta!r}")

    def sampler(on):
        alpha, sigma, alpha_next, sigma_next = on.alpha[1:], on.sigma[1:], on.alpha[:-1], on.sigma[:-1]
        kept = alpha * sigma_next / (alpha_next * sigma)  # 1 - kept^2 of the variance is noise added since x_{i-1}
        std = eta * sigma_next * torch.sqrt((1 - kept) * (1 + kept))
        x = sigma_next / sigma * torch.sqrt((1 - eta) * (1 + eta) + (eta * kept) ** 2)
        return x, alpha_next - alpha * x, std

    return sampler


def sde_dpmsolver():
    """First-order SDE-DPM-Solver++ (Lu et al. 2022): the reverse SDE with E[x_0 | x_t] held fixed; equals ddim(1)."""

    def sampler(on):
        alpha, sigma, alpha_next, sigma_next = on.alpha[1:], on.sigma[1:], on.alpha[:-1], on.sigma[:-1]
        h = torch.log(alpha_next / sigma_next) - torch.log(alpha / sigma)  # step in half the log signal-to-noise ratio
        fresh = -torch.expm1(-2 * h)
        return sigma_next / sigma * torch.exp(-h), alpha_next * fresh, sigma_next * torch.sqrt(fresh)

    return sampler


def flow_sde(diffusion):
    """Euler-Maruyama steps of dx = (v - diffusion^2 / 2 score) dt + diffusion dw, which has the marginals of the flow.

    diffusion: a number, or a callable from a Grid to its table (steps + 1,), e.g. `flow_grpo(0.7)` or
    `lambda on: 3 * on.t**2`. Zero is the Euler method of the flow ODE. ValueError: negative, or no time derivatives.
    """

    def sampler(on):
        on.needs_time("a flow SDE")
        level = diffusion(on) if callable(diffusion) else torch.full_like(on.alpha, diffusion)
        if level.shape != on.alpha.shape or not (level[1:] >= 0).all():
            raise ValueError("the diffusion coefficient must be a table (steps + 1,) without negative entries or NaN")
        step, level, sigma = on.t.diff(), level[1:], on.sigma[1:]
        pull = on.d_sigma[1:] / sigma + (level / sigma) ** 2 / 2
        return 1 - step * pull, step * (on.alpha[1:] * pull - on.d_alpha[1:]), level * torch.sqrt(step)

    return sampler


def flow_grpo(a=0.7):
    """The diffusion coefficient a g / sqrt(2): a sqrt(t / (1 - t)) on the rectified flow (Liu et al. 2025, Flow-GRPO).

    Where alpha = 0 the alpha in its denominator is that of the second noisiest step. Dance-GRPO's coefficient is a
    constant: pass the number itself. ValueError: a negative or not finite.
    """
    if not 0 <= a < math.inf:
        raise ValueError(f"a must be finite and not negative, not {a!r}")

    def level(on):
        on.needs_time("this diffusion coefficient")
        below = torch.where(on.alpha > 0, on.alpha, on.alpha.roll(1))
        return a * torch.sqrt(on.sigma * (on.d_sigma * on.alpha - on.sigma * on.d_alpha) / below)

    return level


def memoryless():
    """The diffusion coefficient g, under which x_0 and x_1 are independent (Domingo-Enrich et al. 2025)."""
    return flow_grpo(math.sqrt(2))


SAMPLERS = {
    "ancestral": ddim(1.0),
    "ode": ddim(0.0),
    "sde_dpmsolver": sde_dpmsolver(),
    "flow_grpo": flow_sde(flow_grpo()),
    "dance_grpo": flow_sde(0.3),
    "memoryless": flow_sde(memoryless()),
    "euler": flow_sde(0.0),
}


def named(choice, known, what, kind):
    """`choice` itself, or what it names in `known`; ValueError for an unknown name, TypeError for anything else."""
    if isinstance(choice, str):
        if choice not in known:
            raise ValueError(f"unknown {what} {choice!r}; known: {', '.join(known)}")
        return known[choice]
    if not isinstance(choice, kind):
        raise TypeError(f"a {what} is a name ({', '.join(known)}) or a {kind.__name__}, not {choice!r}")
    return choice


# ---------------------------------------------------------------------------------------------------------- kernels


class Kernel(Protocol):
    """p(x_{i-1} | x_i) for n particles of shape (n, *shape)."""

    def tilt(self, g): ...  # the kernel q(x') ~ p(x') exp <g, x'>, which remembers p

    def sample(self, m, chance): ...  # children (n, m, *shape) from q, and log p - log q (n, m)

    def log_prob(self, x): ...  # log q of x (n, *shape) -> (n,), or of children (n, m, *shape) -> (n, m)


class GaussianKernel:
    """N(mean, std^2 I), mean (n, *shape), std a number >= 0 or a tensor (n, 1, ..). ValueError: std negative or NaN."""

    def __init__(self, mean, std, g=None):
        negative = not bool((std >= 0).all()) if isinstance(std, torch.Tensor) else not std >= 0
        if negative:
            raise ValueError("std must be a number >= 0")
        if isinstance(std, torch.Tensor) and std.shape != (mean.shape[0], *[1] * (mean.ndim - 1)):
            raise ValueError(f"std must be a number or have shape (n, 1, ..), not {tuple(std.shape)}")
        self.mean, self.std, self.g = mean, std if isinstance(std, torch.Tensor) else float(std), g

    def tilt(self, g):
        """The mean moves by std^2 g (n, *shape): nothing where std is 0. Tilts add up. ValueError: another shape."""
        if g.shape != self.mean.shape:
            raise ValueError(f"a tilt of shape {tuple(g.shape)} does not fit particles {tuple(self.mean.shape)}")
        if not isinstance(self.std, torch.Tensor) and self.std == 0:
            return self
        mean = (
            self.mean + self.std**2 * g if isinstance(self.std, torch.Tensor) else self.mean.add(g, alpha=self.std**2)
        )
        return GaussianKernel(mean, self.std, g if self.g is None else self.g + g)

    def sample(self, m, chance):
        """m children each (n, m, *shape), and log p - log q (n, m) from the noise itself, not from two densities."""
        mean, (n, *shape) = self.mean.unsqueeze(1), self.mean.shape
        std = self.std.unsqueeze(1) if isinstance(self.std, torch.Tensor) else self.std
        if isinstance(std, float) and std == 0:
            return mean.repeat(1, m, *[1] * len(shape)), mean.new_zeros(n, m)
        z, log_ratio = chance.normals((n, m, *shape), dtype=mean.dtype, device=mean.device), mean.new_zeros(n, m)
        if self.g is not None:
            g, scale = self.g.reshape(n, -1, 1), std.reshape(n, 1) if isinstance(std, torch.Tensor) else std
            log_ratio = -scale * torch.bmm(z.reshape(n, m, -1), g)[..., 0] - scale**2 / 2 * square(g[..., 0])[:, None]
            z = z.clone() if g.requires_grad else z
        return z.mul_(std).add_(mean), log_ratio  # in the memory of the noise

    def log_prob(self, x):
        """ValueError: std is 0, where there is no density."""
        std = torch.as_tensor(self.std, dtype=self.mean.dtype, device=self.mean.device)
        if (std == 0).any():
            raise ValueError("a deterministic step (std = 0) has no density")
        mean, lead = _match(self.mean, x, 0)
        std = std.reshape(-1, *[1] * (mean.ndim - 1)) if std.ndim else std
        log_density = -0.5 * ((x - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return log_density.flatten(lead).sum(-1) if x.ndim > lead else log_density


class CategoricalKernel:
    """Independent categoricals with logits (n, *shape, K) for tokens (n, *shape); -inf is an outcome of no probability.

    ValueError: a NaN, or a row without any outcome.
    """

    def __init__(self, logits, reference=None):
        self.log_q = logits.log_softmax(-1)
        if self.log_q.isnan().any():
            raise ValueError("logits must not be NaN or +inf, and no row may be all -inf")
        self.log_p = self.log_q if reference is None else reference

    def tilt(self, g):
        """The logits move by g (n, *shape, K): nothing where one outcome is certain. ValueError: another shape."""
        if g.shape != self.log_q.shape:
            raise ValueError(f"a tilt of shape {tuple(g.shape)} does not fit logits {tuple(self.log_q.shape)}")
        return CategoricalKernel(self.log_q + g, self.log_p)

    def sample(self, m, chance):
        """m children each (n, m, *shape), int64, and log p - log q (n, m)."""
        n, *shape = self.log_q.shape
        x = chance.categoricals(self.log_q.unsqueeze(1).expand(n, m, *shape))
        if self.log_p is self.log_q:
            return x, self.log_q.new_zeros(n, m)
        return x, _tokens(self.log_p, x) - _tokens(self.log_q, x)

    def log_prob(self, x):
        return _tokens(self.log_q, x)


def _match(ours, x, extra):
    """`ours` (n, *shape, and `extra` axes more) made to broadcast against x, and how many leading axes x has."""
    shape = ours.shape[1 : ours.ndim - extra]
    if x.shape == (ours.shape[0], *shape):
        return ours, 1
    if x.ndim == len(shape) + 2 and x.shape[0] == ours.shape[0] and x.shape[2:] == shape:
        return ours.unsqueeze(1), 2
    raise ValueError(f"points of shape {tuple(x.shape)} do not fit particles {(ours.shape[0], *shape)}")


def _tokens(log_probs, x):
    """Sum over *shape of the log-probability of tokens x (n, *shape) or (n, m, *shape)."""
    log_probs, lead = _match(log_probs, x, 1)
    each = log_probs.expand(*x.shape, -1).gather(-1, x.unsqueeze(-1)).squeeze(-1)
    return each.flatten(lead).sum(-1) if x.ndim > lead else each
