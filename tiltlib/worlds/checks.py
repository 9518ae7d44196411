"""`check(world)`: does a world keep what the loops rely on? For users who bring their own model."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from tiltlib.chance import Chance

CHILDREN = 2048  # children of one particle, when a kernel is compared with its own samples
LIMIT = 5.0  # standard errors that a Monte Carlo mean may be off


class Finding(NamedTuple):
    """One row of `check`: the check's name, whether it passed, and in words what was found."""

    name: str
    passed: bool
    message: str


class Case(NamedTuple):
    """What every check gets: the world, a way to get fresh reproducible randomness, and one sampled path."""

    world: object
    condition: object
    chance: Callable  # chance(k): the k-th stream of random numbers, the same at each call
    n: int
    tolerance: float
    path: dict  # i -> (x, prediction) for i = steps, the middle and 1
    x0: torch.Tensor

    def predict(self, x, i):
        return self.world.predict(x, i, self.condition)


def check(world, *, condition=None, particles=256, tolerance=0.1, seed=0, skip=(), raises=True):
    """Every check of `CHECKS` on a world; returns a Finding for each. Costs about steps + 16 predictions a particle.

    condition: one that the world knows. particles: more find smaller mistakes (a model that is only approximately
    right must be off by `tolerance`, in relative terms, to fail). skip: names of checks that are not wanted, e.g.
    "posterior" for a guided world, whose clean image is no posterior mean. ValueError: one or more checks fail, unless
    raises=False; the message names all of them. Also for a world without the methods, unknown names in skip, or
    "rollout" in it, which all others need.
    """
    unknown = set(skip) - set(CHECKS)
    if unknown:
        raise ValueError(f"unknown checks {sorted(unknown)}; known: {', '.join(CHECKS)}")
    if "rollout" in skip:
        raise ValueError("every other check needs the rollout: it cannot be skipped")
    if not isinstance(particles, int) or isinstance(particles, bool) or particles < 2:
        raise ValueError(f"particles must be an integer >= 2, not {particles!r}")
    missing = [name for name in ("start", "predict", "kernel", "clean", "renoise") if not hasattr(world, name)]
    if missing:
        raise ValueError(f"a world needs the methods start, predict, kernel, clean, renoise; missing: {missing}")
    steps = getattr(world, "steps", None)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"world.steps must be an integer >= 1, not {steps!r}")

    def chance(stream):
        generator = torch.Generator(getattr(world, "device", "cpu"))
        return Chance(generator.manual_seed(1000 * seed + stream))

    def finding(name, function, *given):
        if name in skip:
            return Finding(name, True, "skipped")
        try:
            complaint = function(*given)
        except Exception as error:
            complaint = f"raised {type(error).__name__}: {error}"
        return Finding(name, complaint is None, complaint or "ok")

    path = {}
    findings = [finding("rollout", rollout, world, condition, chance(0), particles, path)]
    if findings[0].passed and path:
        case = Case(world, condition, chance, particles, tolerance, path, path.pop(0)[0])
        with torch.no_grad():
            findings += [finding(name, CHECKS[name], case) for name in list(CHECKS)[1:]]
    failed = [f"{name}: {message}" for name, passed, message in findings if not passed]
    if failed and raises:
        raise ValueError("this world fails\n  " + "\n  ".join(failed))
    return findings


@torch.no_grad()
def rollout(world, condition, chance, n, path):
    """Samples the world once, with shapes and finiteness checked at every step; fills `path` for the other checks."""
    x = world.start(n, chance)
    if not isinstance(x, torch.Tensor) or x.ndim < 1 or x.shape[0] != n:
        return f"start({n}, chance) must return a tensor with {n} particles first, not {_shape(x)}"
    shape, kind = x.shape, x.dtype
    for i in range(world.steps, 0, -1):
        prediction = world.predict(x, i, condition)
        if not isinstance(prediction, torch.Tensor) or prediction.shape[:1] != (n,):
            return f"predict at step {i} must return a tensor with {n} particles first, not {_shape(prediction)}"
        if prediction.isnan().any():
            return f"predict at step {i} has a NaN"
        if i in (world.steps, (world.steps + 1) // 2, 1):
            path[i] = x, prediction
        drawn = world.kernel(x, prediction, i).sample(1, chance)
        if not isinstance(drawn, tuple) or len(drawn) != 2:
            return f"kernel(...).sample(m, chance) at step {i} must return the children and log p - log q"
        children, ratio = drawn
        if children.shape != (n, 1, *shape[1:]) or children.dtype != kind:
            return (
                f"kernel(...).sample(1, chance) at step {i} must return children {(n, 1, *shape[1:])} of {kind}, "
                f"not {_shape(children)} of {children.dtype}"
            )
        if ratio.shape != (n, 1) or ratio.any():
            return f"without a tilt, log p - log q at step {i} must be zeros {(n, 1)}, not {_shape(ratio)} or not zero"
        x = children[:, 0]
        if x.is_floating_point() and not x.isfinite().all():
            return f"a particle is not finite after the step from {i}"
    path[0] = x, None
    return None


def reproducible(case):
    """The same generator gives the same particles: no randomness but `chance`."""
    world = case.world
    i = (world.steps + 1) // 2
    x, prediction = case.path[i]
    calls = {
        "start": lambda: world.start(case.n, case.chance(1)),
        "predict": lambda: case.predict(x, i),
        "kernel(...).sample": lambda: world.kernel(x, prediction, i).sample(2, case.chance(1))[0],
        "renoise": lambda: world.renoise(case.x0, 0, i, case.chance(1)),
    }
    before = x.clone()
    for name, call in calls.items():
        first = call()
        if not torch.equal(x, before):
            return f"{name} changes the particles that it is given"
        if not torch.equal(call(), first):
            return f"{name} differs between two calls with the same generator; draw from `chance` and nothing else"
    return None


def batching(case):
    """A particle's prediction depends neither on its neighbours nor on how the step is written."""
    for i, (x, prediction) in case.path.items():
        many = torch.full((case.n,), i, device=x.device)
        if _distance(case.predict(x, many), prediction) > _round_off(prediction):
            return f"predict at step {i} differs when the step comes as a tensor (n,)"
        half = case.n // 2
        condition = case.condition
        condition = condition[:half] if isinstance(condition, torch.Tensor) and condition.ndim else condition
        part = case.world.predict(x[:half], i, condition)
        if _distance(part, prediction[:half]) > _round_off(prediction):
            return f"predict at step {i} changes with the other particles in the batch (batch norm? training mode?)"
        single = _draw(case.world.kernel(x, prediction, i), case)
        if _distance(_draw(case.world.kernel(x, prediction, many), case), single) > _round_off(prediction):
            return f"kernel at step {i} differs when the step comes as a tensor (n,)"
    if len(case.path) < 2:
        return None
    # particles at different steps in one batch, as tree search and rollover budgets have them
    high, low = max(case.path), min(case.path)
    (x, at_high), (y, at_low) = case.path[high], case.path[low]
    mixed = torch.where(torch.arange(case.n, device=x.device) % 2 == 0, high, low)
    even = (mixed == high).reshape(-1, *[1] * (x.ndim - 1))
    expected = torch.where(_widen(even, at_high), at_high, at_low)
    if _distance(case.predict(torch.where(even, x, y), mixed), expected) > _round_off(expected):
        return f"predict is wrong when particles of steps {high} and {low} come together"
    return None


def grid(case):
    """Steps outside the grid and unknown conditions are refused, not answered."""
    world = case.world
    x, prediction = case.path[world.steps]
    refused = {
        f"kernel at step {world.steps + 1}": lambda: world.kernel(x, prediction, world.steps + 1),
        "kernel at step 0": lambda: world.kernel(x, prediction, 0),
        "predict with a condition that cannot exist": lambda: world.predict(x, world.steps, object()),
    }
    for name, call in refused.items():
        try:
            call()
        except Exception:  # whichever way it refuses
            continue
        return f"{name} gives an answer; it must raise"
    try:
        beyond = case.predict(x, world.steps + 1)
    except Exception:
        return None
    if _distance(case.predict(x, 1), beyond) > 0:  # a network that does not look at the step need not check it
        return f"predict at step {world.steps + 1} gives an answer; it must raise"
    return None


def kernel(case):
    """The kernel's log_prob, its tilt and its moments against its own samples."""
    for i, (x, prediction) in case.path.items():
        one = case.world.kernel(x[:1], prediction[:1], i)
        children, _ = one.sample(_children(x), case.chance(2))
        values = children.double() if children.is_floating_point() else _one_hot(children, _tokens(children, one))
        spread = values.std(1, keepdim=True)
        if children.is_floating_point() and spread.max() < 1e-12 * (1 + values.abs().max()):
            continue  # a deterministic step: no density
        complaint = _moments(one, children, values) or _tilt(one, children, values, spread, case)
        if complaint:
            return f"at step {i}: {complaint}"
    return None


def _moments(one, children, values):
    """Means and variances of the samples against what the kernel says of itself, or against its own log_prob."""
    count = children.shape[1]
    if hasattr(one, "mean") and hasattr(one, "std"):
        white = (values - one.mean.double().unsqueeze(1)) / torch.as_tensor(one.std).double()
        mean = white.mean(1).abs().max() * count**0.5
        variance = (white.square().mean() - 1).abs() * (white.numel() / 2) ** 0.5
        # the largest of many coordinates lies further out than one alone
        limit = LIMIT + torch.log(torch.tensor(float(white[:, 0].numel()))).sqrt()
        if mean > limit:
            return f"the mean of the kernel is {float(mean):.0f} standard errors off the mean of its samples"
        if variance > LIMIT:
            return f"the variance of its samples is {float(white.square().mean()):.3g} times std^2"
    if children.is_floating_point():
        # E[grad log p] = 0 and E[<x - E x, grad log p>] = -d hold for every density (Stein)
        with torch.enable_grad():
            points = children.clone().requires_grad_()
            (score,) = torch.autograd.grad(one.log_prob(points).sum(), points)
        score = score.double()
        centred = values - values.mean(1, keepdim=True)
        stein = (centred * score).flatten(2).sum(-1)
        size = values[0, 0].numel()
        error = stein.std() / count**0.5 + 2 * size / count
        if (stein.mean() + size).abs() > LIMIT * error:
            return f"log_prob does not fit the samples: E<x, grad log p> is {float(stein.mean()):.3g}, not {-size}"
        push = score.mean(1).abs() / (score.std(1) / count**0.5)
        if push.max() > LIMIT + size**0.25:
            return "log_prob does not fit the samples: its gradient does not average to zero"
    else:
        pattern, counts = children[0].unique(dim=0, return_counts=True)
        expected = one.log_prob(pattern[None]).double().exp()[0]
        error = torch.sqrt(expected * (1 - expected).clamp(min=0) / count) + 1 / count
        if ((counts / count - expected).abs() > LIMIT * error).any():
            return "log_prob does not fit how often the samples occur"
    return None


def _tilt(one, children, values, spread, case):
    """The tilted kernel: its ratio is the one of the densities, averages to one, and weighs children by exp <g, x>."""
    direction = case.chance(3).normals(values[:, 0].shape, dtype=torch.float64, device=values.device)
    along = (values * direction.unsqueeze(1)).flatten(2).sum(-1)
    if along.std() < 1e-9:
        return None  # one outcome is certain
    g = 0.5 / along.std() * direction  # half a standard deviation
    tilted = one.tilt(g.to(children) if children.is_floating_point() else g)
    moved, ratio = tilted.sample(_children(children[:, 0]), case.chance(4))
    densities = one.log_prob(moved) - tilted.log_prob(moved)
    if (densities - ratio).abs().max() > 1e-2 + 1e-3 * densities.abs().max():
        return "after a tilt, log p - log q of the samples is not log_prob - tilted.log_prob"
    weights = ratio.double().exp()
    error = weights.std() / weights.numel() ** 0.5
    if (weights.mean() - 1).abs() > LIMIT * error + 1e-3:
        return f"after a tilt, p / q averages to {float(weights.mean()):.3f} under q, not to one"
    moved = moved.double() if moved.is_floating_point() else _one_hot(moved, values.shape[-1])
    after = (moved * direction.unsqueeze(1)).flatten(2).sum(-1)
    weights = (along * 0.5 / along.std()).softmax(1)
    expected = (weights * along).sum()
    error = along.std() * (2 / along.numel() ** 0.5)
    if (after.mean() - expected).abs() > LIMIT * error:
        return (
            f"tilt(g) does not sample p(x) exp<g, x>: along g the mean is {float(after.mean()):.3g}, "
            f"not {float(expected):.3g}"
        )
    return None


def last_step(case):
    """At i = 1 the kernel arrives at data: its mean is E[x_0 | x_1], which is what `clean` says."""
    x, prediction = case.path[1]
    clean = case.world.clean(x, prediction, 1)
    children, _ = case.world.kernel(x, prediction, 1).sample(64, case.chance(5))
    if children.is_floating_point():
        if clean.shape != x.shape:
            return f"clean must have the shape of the particles, {tuple(x.shape)}, not {tuple(clean.shape)}"
        spread, jump = children.std(1).square().mean().sqrt(), (x - clean).square().mean().sqrt()
        gap = (children.mean(1) - clean).square().mean().sqrt()
        # samplers that add noise in the last step may be off by a part of it
        if gap > 0.5 * spread + case.tolerance * jump + _round_off(clean):
            return f"clean and the mean of the last step are {float(gap):.3g} apart; it moves by {float(jump):.3g}"
        return None
    if clean.shape[: x.ndim] != x.shape or clean.ndim != x.ndim + 1:
        return f"clean must hold token probabilities {tuple(x.shape)} + (tokens,), not {tuple(clean.shape)}"
    if (clean < 0).any() or (clean.sum(-1) - 1).abs().max() > 1e-4:
        return "clean must hold probabilities that sum to one over the tokens"
    gap = _one_hot(children, clean.shape[-1]).mean(1) - clean
    variance = (clean * (1 - clean)).clamp(min=0) / 64
    alone, together = gap.abs() - 8 / 64, gap.mean(0).abs()  # a rare token comes a few times too often by chance
    if (alone > LIMIT * variance.sqrt()).any() or (together > LIMIT * (variance.mean(0) / case.n).sqrt() + 1e-6).any():
        return "the tokens of the last step do not occur as often as clean says"
    return None


def posterior(case):
    """`clean` is the posterior mean of x_0 under `renoise`: what it leaves over is orthogonal to it and to x_i."""
    for i in case.path:
        x = case.world.renoise(case.x0, 0, i, case.chance(6))
        if x.shape != case.x0.shape or x.dtype != case.x0.dtype:
            return f"renoise must keep shape and dtype; at step {i} it gives {tuple(x.shape)} of {x.dtype}"
        clean = case.world.clean(x, case.predict(x, i), i).double()
        # a token counts as its one-hot vector, of which clean is the mean
        x0, x = (v.double() if v.is_floating_point() else _one_hot(v, clean.shape[-1] + 1) for v in (case.x0, x))
        x0, x = x0[..., : clean.shape[-1]], x[..., : clean.shape[-1]]
        x0, x, clean = (v.reshape(case.n, -1) for v in (x0, x, clean))
        left, scale = (x0 - clean).mean(0).norm(), x0.norm() / case.n**0.5
        error = (x0 - clean).var(0).sum().sqrt() / case.n**0.5  # the norm that the mean has by chance
        limit = case.tolerance + 3 * error / scale
        if left / scale > limit:
            return (
                f"at step {i} the samples, renoised, are not what clean expects: E[x_0 - clean] is "
                f"{float(left / scale):.2f} of the scale of x_0, not 0 (limit {float(limit):.2f})"
            )
        against = {"clean": clean, "x_i": x}
        for name, other in against.items():
            product = (x0 - clean) * other
            size = (x0.square().sum(1).mean() * other.square().sum(1).mean()).sqrt()
            defect, error = product.sum(1).mean().abs() / size, product.sum(1).std() / case.n**0.5 / size
            limit = case.tolerance + LIMIT * error
            if defect > limit:
                return (
                    f"at step {i} the samples, renoised, are not what clean expects: E<x_0 - clean, {name}> is "
                    f"{float(defect):.2f} of its scale, not 0 (limit {float(limit):.2f})"
                )
    return None


def forward(case):
    """`renoise`: nothing to itself, refuses to go down, two stretches make one, and its law is that of sampling."""
    world, x0 = case.world, case.x0
    middle = (world.steps + 1) // 2
    once = world.renoise(x0, 0, middle, case.chance(7))
    if _distance(world.renoise(once, middle, middle, case.chance(8)), once) > _round_off(once):
        return "renoise from a step to itself must change nothing"
    try:
        world.renoise(once, middle, 0, case.chance(8))
        return "renoise gives an answer for i_to < i_from; it must raise"
    except Exception:  # whichever way it refuses
        pass
    twice = world.renoise(world.renoise(x0, 0, middle // 2, case.chance(9)), middle // 2, middle, case.chance(10))
    complaint = _same_law(once, twice, case, f"at step {middle}, renoise at once and in two stretches", partner=x0)
    for i, (x, _) in case.path.items():
        name = "start and samples renoised" if i == world.steps else "particles on their way down and samples renoised"
        up = world.renoise(x0, 0, i, case.chance(11))
        complaint = complaint or _same_law(x, up, case, f"at step {i}, {name}")
    return complaint


def gradients(case):
    """The derivative of `clean` with respect to the prediction, and through the network, against differences."""
    world = case.world
    for i, (x, prediction) in case.path.items():
        x, prediction = x[:8], prediction[:8]
        condition = case.condition
        condition = condition[:8] if isinstance(condition, torch.Tensor) and condition.ndim else condition
        routes = {"prediction": (prediction, lambda p, x=x, i=i: world.clean(x, p, i))}
        if x.is_floating_point():
            routes["particles"] = x, lambda y, i=i, c=condition: world.clean(y, world.predict(y, i, c), i)
        for name, (point, function) in routes.items():
            complaint = _derivative(point, function, case)
            if complaint:
                return f"at step {i}, clean by the {name}: {complaint}"
    return None


def _derivative(point, function, case):
    weight = case.chance(12).normals(function(point).shape, dtype=torch.float64, device=point.device)
    direction = case.chance(13).normals(point.shape, dtype=point.dtype, device=point.device)

    def value(y):
        return (function(y).double() * weight).flatten(1).sum(1)

    with torch.enable_grad():
        variable = point.clone().requires_grad_()
        total = value(variable).sum()
        if not total.requires_grad:
            return "no gradient reaches it (torch.no_grad or detach?)"
        (gradient,) = torch.autograd.grad(total, variable, allow_unused=True)
    if gradient is None:
        return "no gradient reaches it (torch.no_grad or detach?)"
    if not gradient.isfinite().all():
        return "the gradient is not finite"
    slope = (gradient.double() * direction.double()).flatten(1).sum(1)
    fine = point.dtype == torch.float64
    step = 1e-5 if fine else 1e-2
    measured, wide = ((value(point + h * direction) - value(point - h * direction)) / (2 * h) for h in (step, 2 * step))
    scale = measured.abs().mean() + slope.abs().mean()
    error = (measured - wide).abs().mean()  # of the differences: curvature and round-off
    round_off = torch.finfo(point.dtype).eps * value(point).abs().mean() / step
    if (slope - measured).abs().mean() > (1e-4 if fine else 5e-2) * scale + 3 * error + 10 * round_off:
        return f"the gradient along a direction is {slope[0]:.4g}, differences give {measured[0]:.4g}"
    return None


CHECKS = {
    "rollout": rollout,
    "reproducible": reproducible,
    "batching": batching,
    "grid": grid,
    "kernel": kernel,
    "last_step": last_step,
    "posterior": posterior,
    "forward": forward,
    "gradients": gradients,
}


def _same_law(a, b, case, name, partner=None):
    """First and second moments of two sets of particles, or shares of the tokens; `partner`: what both came from."""
    if a.is_floating_point():
        a, b = a.double().flatten(1), b.double().flatten(1)
        first, second = (a.mean(1), b.mean(1)), (a.square().mean(1), b.square().mean(1))
        level = (second[0].mean() + second[1].mean()) / 2
        pairs = {"mean": (*first, level.sqrt()), "mean square": (*second, level)}
        if partner is not None:
            partner = partner.double().flatten(1)
            both = (level * partner.square().mean()).sqrt()
            pairs["product with x_0"] = (a * partner).mean(1), (b * partner).mean(1), both
    else:
        tokens = int(torch.maximum(a.max(), b.max())) + 1
        a, b = (_one_hot(x.reshape(case.n, -1), tokens) for x in (a, b))
        pairs = {f"share of token {k}": (a[..., k].mean(1), b[..., k].mean(1), 1.0) for k in range(tokens)}
        if partner is not None:
            partner = _one_hot(partner.reshape(case.n, -1), tokens)
            pairs["share of x_0 that is left"] = (a * partner).sum(2).mean(1), (b * partner).sum(2).mean(1), 1.0
    for what, (left, right, scale) in pairs.items():
        gap = (left.mean() - right.mean()).abs()
        error = ((left.var() + right.var()) / case.n).sqrt()
        if gap > case.tolerance * scale + LIMIT * error:
            return f"{name} differ: the {what} is {float(left.mean()):.3g} and {float(right.mean()):.3g}"
    return None


def _draw(kernel, case):
    return kernel.sample(1, case.chance(14))[0]


def _children(x):
    """Enough children for a sharp comparison, but no more than memory allows for large particles."""
    return max(64, min(CHILDREN, 2**23 // max(1, x[0].numel())))


def _tokens(children, kernel):
    """How many outcomes a token has."""
    return kernel.log_q.shape[-1] if hasattr(kernel, "log_q") else int(children.max()) + 1


def _one_hot(x, tokens):
    return torch.nn.functional.one_hot(x, tokens).double()


def _widen(mask, like):
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def _distance(a, b):
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max())


def _round_off(x):
    """What differences in the order of summation may amount to."""
    if not x.is_floating_point():
        return 0.0
    return (1e-9 if x.dtype == torch.float64 else 2e-4) * (1 + float(x.abs().max()))


def _shape(x):
    return tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
