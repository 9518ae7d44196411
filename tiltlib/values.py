"""What x_t is worth: estimates of the soft value v_i(x) = beta log E[exp(r(x_0) / beta) | x_i = x] at every step.

A value is a callable (world, x, prediction, i, condition, chance) -> (n,), in units of the reward, for particles
x (n, *shape), their prediction and their step i, an integer or (n,). At i = 0 every value is the reward. Functions
here make values; with beta=None they aim at the hard value E[r(x_0) | x_i], the limit beta -> infinity.

    exact           what the world knows               posterior_mean   the reward at E[x_0 | x_i]; no training
    monte_carlo     regression of r or exp(r/beta)     soft_bellman     the same, each step on the next one's value
    look_ahead      any value, k steps further on, and averaged back

A value with `needs_prediction = False` takes None for the prediction: steering then asks the network only at particles
that go on. A value is differentiable by x (through the prediction too, if that was computed from x) where its reward
is; learned ones always are, for a black-box reward as well. Uehara et al. 2025, sections 3 and 5.
"""

import math
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch

from tiltlib import law

TABLE = 5_000_000  # a learned value is a table where steps x states stays below this


def exact(reward, beta):
    """The exact soft value (beta=None: the hard one) on `Mixture`, `Chain` and short `Sequence`s.

    reward: on `Mixture` a linear or quadratic one, on `Sequence` any callable, on `Chain` also an array (K,).
    What it asks of the reward is not counted. TypeError where the world knows no exact values; ValueError with a
    condition, whose values would be others.
    """
    beta = _temperature(beta)
    known, bare = WeakKeyDictionary(), getattr(reward, "function", reward)

    @_by_step(reward, needs_prediction=False)
    def value(world, x, prediction, i, condition, chance):
        if condition is not None:
            raise ValueError("exact values are those of the world without a condition")
        if hasattr(world, "soft_values"):
            if world not in known:
                rows = world.hard_values(bare) if beta is None else world.soft_values(bare, beta)
                known[world] = torch.as_tensor(rows, device=x.device)
            return known[world][i, _index(world, x)]
        if hasattr(world, "soft_value"):
            return world.hard_value(x, i, bare) if beta is None else world.soft_value(x, i, bare, beta)
        raise TypeError(f"{type(world).__name__} knows no exact values; take posterior_mean or a learned value")

    return value


def posterior_mean(reward, tokens=None, *, samples=1, beta=None, positions=None):
    """r(E[x_0 | x_i]), which costs no further call of the network (DPS, SVDD-PM).

    On discrete worlds E[x_0 | x_i] is a table of token probabilities (n, .., V), and `tokens` says what becomes of it:
    None gives the reward the probabilities themselves (it must take them), "argmax" the likeliest tokens, "sample"
    `samples` independent draws whose rewards are averaged (with beta: beta log mean exp(r/beta)). positions (V, d):
    the reward is taken at the mean position (n, d) instead, for a `Chain` whose states are points.
    ValueError: unknown `tokens`, both `tokens` and positions. TypeError: tokens or positions on a continuous world.
    """
    if tokens not in (None, "argmax", "sample"):
        raise ValueError(f"tokens must be None, 'argmax' or 'sample', not {tokens!r}")
    if tokens is not None and positions is not None:
        raise ValueError("either tokens or positions, not both")
    samples, beta = law.check_count(samples, "samples"), _temperature(beta)
    places = None if positions is None else torch.as_tensor(positions, dtype=torch.float64)

    @_by_step(reward)
    def value(world, x, prediction, i, condition, chance):
        clean = world.clean(x, prediction, i)
        if (tokens or positions is not None) and x.is_floating_point() and clean.shape == x.shape:
            raise TypeError(f"E[x_0 | x_i] of {type(world).__name__} is a point, not a table of token probabilities")
        if positions is not None:
            return _worth(reward, clean @ places.to(clean))
        if tokens == "argmax":
            return _worth(reward, clean.argmax(-1))
        if tokens == "sample":
            drawn = chance.categoricals(clean.log().unsqueeze(1).expand(-1, samples, *clean.shape[1:]))
            return _average(_worth(reward, drawn.flatten(0, 1)).unflatten(0, (-1, samples)), beta)
        return _worth(reward, clean)

    return value


def monte_carlo(world, reward, *, chance, rollouts=2000, beta=None, condition=None, **training):
    """A value learned by regression on `rollouts` of the world: of exp(r/beta), consistent, or with beta=None of r.

    Regression of r (SVDD-MC) learns E[r | x_i], which stays away from the soft value however many the roll-outs.
    Costs rollouts x steps network calls and `rollouts` reward calls; with those that `walk` made, no further network
    call. On finite worlds a table of means (a state never met gets the mean over all); else a small network of `width`
    (default 64) units, for images behind three convolutions of `filters` (32; 0 for none), trained by AdamW for
    `iterations` (1000) on batches of `batch` (512), at `rate` (3e-3) with weight decay `decay` (0.1); exp(r/beta) with
    the Poisson loss exp(f) - w f, whose optimum is exp f = E[w | x]. It overfits where roll-outs are few or beta small.
    The value fits particles of the same shape on a world of the same steps: ValueError elsewhere.
    """
    return _learn(world, reward, chance, rollouts, beta, condition, False, training)


def soft_bellman(world, reward, *, chance, rollouts=2000, beta=None, condition=None, **training):
    """As `monte_carlo`, but step i regresses on the value of step i - 1 where the roll-out went, not on its end.

    exp(v_i / beta) = E[exp(v_{i-1} / beta) | x_i]: roll-outs that meet share what they learn.
    """
    return _learn(world, reward, chance, rollouts, beta, condition, True, training)


def walk(world, n, chance, condition=None):
    """n roll-outs of the world: a list of x_0 .. x_steps, each (n, *shape). Costs n x steps network calls."""
    with torch.no_grad():
        path = [world.start(law.check_count(n, "n"), chance)]
        for i in range(world.steps, 0, -1):
            x = path[-1]
            path.append(world.kernel(x, world.predict(x, i, condition), i).sample(1, chance)[0][:, 0])
    return path[::-1]


def look_ahead(value, k, *, beta=None, samples=None):
    """v_i(x) = beta log E[exp(value_{i-k} / beta) | x_i = x]: `value`, k steps nearer to the data (beta=None: E value).

    samples: that many walks of k steps for each particle, k * samples network calls each; None: the expectation is
    exact, by enumeration through the kernels of a finite world (TypeError on others). At i < k the walk ends at i = 0.
    One step of it is the soft Bellman operator, of which the exact value is the fixed point.
    """
    k, beta = law.check_count(k, "k"), _temperature(beta)
    samples = None if samples is None else law.check_count(samples, "samples")

    @_by_step(None)
    def ahead(world, x, prediction, i, condition, chance):
        if i == 0:
            return value(world, x, prediction, 0, condition, chance)
        if samples is None:
            return _enumerate(world, x, prediction, i, max(i - k, 0), condition, chance)
        walkers = world.kernel(x, prediction, i).sample(samples, chance)[0].flatten(0, 1)
        if isinstance(condition, torch.Tensor) and condition.ndim:
            condition = condition.repeat_interleave(samples)
        for j in range(i - 1, max(i - k, 0), -1):
            walkers = world.kernel(walkers, world.predict(walkers, j, condition), j).sample(1, chance)[0][:, 0]
        ends = _at(world, value, walkers, max(i - k, 0), condition, chance)
        return _average(ends.unflatten(0, (-1, samples)), beta)

    def _enumerate(world, x, prediction, i, last, condition, chance):
        if isinstance(condition, torch.Tensor) and condition.ndim:
            raise ValueError("exact look-ahead takes one condition for all particles")
        everything, back = _everything(world), None
        for j in range(last, i):  # the value of step j, seen from step j + 1
            here = everything if j < i - 1 else x
            said = world.predict(everything, j + 1, condition) if j < i - 1 else prediction
            log_p = world.kernel(here, said, j + 1).log_prob(everything.expand(len(here), *everything.shape))
            seen = (log_p > -torch.inf).any(0)
            if back is None:
                back = torch.zeros(len(everything), dtype=log_p.dtype)
                back[seen] = _at(world, value, everything[seen], j, condition, chance).to(back)
            log_p, ends = log_p[:, seen], back[seen]
            back = log_p.exp() @ ends if beta is None else beta * (log_p + ends / beta).logsumexp(1)
        return back

    return ahead


def table(world, value, *, condition=None, chance=None):
    """A value at all states and steps of a finite world: numpy float64 (steps + 1, states), as `Chain.guide` takes.

    Row 0 is NaN at states of a `Sequence` with a mask.
    """
    everything = _everything(world)
    rows = torch.full((world.steps + 1, len(everything)), torch.nan, dtype=torch.float64)
    for i in range(world.steps + 1):
        here = torch.ones(len(everything), dtype=torch.bool)
        if i == 0 and hasattr(world, "mask"):
            here = (everything != world.mask).all(1)
        rows[i, here] = _at(world, value, everything[here], i, condition, chance).double()
    return rows.numpy()


# ------------------------------------------------------------------------------------------------------------ learning


def _learn(world, reward, chance, rollouts, beta, condition, bootstrap, training):
    beta, known = _temperature(beta), ("iterations", "batch", "width", "rate", "decay", "filters")
    if set(training) - set(known):
        raise TypeError(f"unknown training options {sorted(set(training) - set(known))}; known: {', '.join(known)}")
    made = isinstance(rollouts, list)
    if made and len(rollouts) != world.steps + 1:
        raise ValueError(f"roll-outs of {len(rollouts) - 1} steps do not fit a world of {world.steps}")
    if not made:
        rollouts = walk(world, law.check_count(rollouts, "rollouts"), chance, condition)
    with torch.no_grad():
        ends = _worth(reward, rollouts[0]).double()
    if not torch.isfinite(ends).all():
        raise ValueError("the reward of a roll-out is not finite")
    finite = getattr(world, "states", TABLE) * (world.steps + 1) < TABLE
    fitted = (_tabulate if finite else _regress)(world, rollouts, ends, beta, bootstrap, chance, **training)
    steps, shape, tokens = world.steps, rollouts[0].shape[1:], not rollouts[0].is_floating_point()

    @_by_step(reward, needs_prediction=False)
    def value(world, x, prediction, i, condition, chance):
        relaxed = x.is_floating_point() and tokens
        if world.steps != steps or (x.shape[1:-1] if relaxed else x.shape[1:]) != shape:
            raise ValueError(
                f"the value was learned on {steps} steps and particles {tuple(shape)}; it does not fit "
                f"{world.steps} steps and particles {tuple(x.shape[1:])}"
            )
        return fitted(world, x, i)

    return value


def _tabulate(world, walk, ends, beta, bootstrap, chance):
    states, target = [_index(world, x) for x in walk], ends
    rows = torch.zeros(world.steps + 1, world.states, dtype=torch.float64, device=ends.device)
    for i in range(1, world.steps + 1):
        if bootstrap and i > 1:
            target = rows[i - 1, states[i - 1]]
        here, none = states[i], torch.zeros_like(rows[i])
        count = none.index_add(0, here, torch.ones_like(ends))
        if beta is None:
            met = none.index_add(0, here, target) / count
        else:  # relative to the best target of each state, so that states far below the best one do not underflow
            top = (none - torch.inf).scatter_reduce(0, here, target, "amax")
            met = top + beta * (none.index_add(0, here, ((target - top[here]) / beta).exp()) / count).log()
        rows[i] = torch.where(count > 0, met, _average(target, beta))
    return lambda world, x, i: rows.to(x.device)[i, _index(world, x)]


def _regress(
    world, walk, ends, beta, bootstrap, chance, iterations=1000, batch=512, width=64, rate=3e-3, decay=0.1, filters=32
):  # fmt: skip
    steps, n, shape = world.steps, len(ends), walk[0].shape[1:]
    points = torch.stack([_features(world, x) for x in walk])
    image = walk[0].is_floating_point() and len(shape) == 3 and filters > 0  # (channels, height, width)
    over = (1, 2) if image else 1  # one scale for all pixels: an edge that never varies must not be magnified
    centre, scale = points.mean(over, keepdim=True), points.std(over, keepdim=True).clamp(min=1e-3)
    # v = shift + unit f: f is of order one, and exp f has mean one where exp(r/beta) is regressed
    shift = _average(ends, beta)
    unit = torch.as_tensor(beta if beta is not None else ends.std().clamp(min=1e-12))
    target, shift, unit = ((ends - shift) / unit).float(), shift.float(), unit.float()

    def layer(inputs, outputs, *kernel):
        draw = chance.normals((inputs, outputs) if not kernel else (outputs, inputs, *kernel), device=points.device)
        return draw / (inputs * math.prod(kernel)) ** 0.5, torch.zeros(outputs, device=points.device)

    channels = [shape[0] + 5, filters, filters, filters] if image else []
    seen = filters * -(-shape[1] // 4) * -(-shape[2] // 4) if image else points.shape[-1]
    stem = [layer(a, b, 3, 3) for a, b in pairwise(channels)]
    weights = [layer(a, b) for a, b in pairwise([seen + 5, width, width, 1])]
    parameters = [p.requires_grad_() for pair in stem + weights for p in pair]

    def network(features, i):
        s = i.to(features) / steps
        waves = torch.stack([s, *(f(torch.pi * k * s) for f in (torch.sin, torch.cos) for k in (1, 2))], -1)
        h = (features - centre[i, 0]) / scale[i, 0]
        if image:
            h = torch.cat([h.unflatten(1, shape), waves[:, :, None, None].expand(-1, -1, *shape[1:])], 1)
            for stride, (a, b) in zip((1, 2, 2), stem, strict=True):
                h = torch.nn.functional.silu(torch.nn.functional.conv2d(h, a, b, stride, 1))
        h = torch.cat([h.flatten(1), waves], -1)
        for k, (a, b) in enumerate(weights):
            h = h @ a + b
            h = torch.nn.functional.silu(h) if k < len(weights) - 1 else h
        return h[:, 0]

    optimiser = torch.optim.AdamW(parameters, rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    with torch.enable_grad():
        for step in range(iterations):
            # bootstrapping learns from the data upwards: the first steps first, all of them in the last third
            reach = min(steps, 1 + 3 * step * steps // (2 * iterations)) if bootstrap else steps
            draw = chance.uniforms((2, batch), device=points.device)
            who, i = (draw[0] * n).long(), 1 + (draw[1] * reach).long()
            wanted = target[who]
            if bootstrap:
                with torch.no_grad():
                    wanted = torch.where(i > 1, network(points[i - 1, who], i - 1), wanted)
            said = network(points[i, who], i)
            loss = (said - wanted).square() if beta is None else said.exp() - wanted.exp() * said
            optimiser.zero_grad()
            loss.mean().backward()
            optimiser.step()
            schedule.step()
    for p in parameters:
        p.requires_grad_(False)

    def fitted(world, x, i):
        value = shift + unit * network(_features(world, x), torch.full((len(x),), i, device=x.device))
        return value.to(x.dtype) if x.is_floating_point() else value

    return fitted


def _features(world, x):
    """Particles as float32 rows (n, D); tokens as one-hot, which is also how they are differentiated."""
    return (x if x.is_floating_point() else world.one_hot(x)).flatten(1).float()


# -------------------------------------------------------------------------------------------------------------- shared


def _by_step(reward, needs_prediction=True):
    """Makes a Value of a function for one integer step i: particles at other steps are treated apart; at 0 it is r."""

    def decorate(function):
        def one(world, x, prediction, i, condition, chance):
            if not 0 <= i <= world.steps:
                raise ValueError(f"step {i} is outside the grid 0 .. {world.steps}")
            if i == 0 and reward is not None:
                return _worth(reward, x)
            return function(world, x, prediction, i, condition, chance)

        def value(world, x, prediction, i, condition=None, chance=None):
            i = torch.as_tensor(i)
            if i.is_floating_point() or i.ndim > 1:
                raise ValueError(f"i must be an integer or integers (n,), not {i.dtype} {tuple(i.shape)}")
            if i.ndim == 0 or len(i.unique()) == 1:
                return one(world, x, prediction, int(i.reshape(-1)[0]), condition, chance)
            parts, order = [], []
            for step in i.unique().tolist():
                here = torch.nonzero(i == step)[:, 0].to(x.device)
                only = condition[here] if isinstance(condition, torch.Tensor) and condition.ndim else condition
                said = None if prediction is None else prediction[here]
                parts.append(one(world, x[here], said, step, only, chance))
                order.append(here)
            return torch.cat(parts)[torch.cat(order).argsort()]

        value.__name__, value.__doc__ = function.__name__, function.__doc__
        value.needs_prediction = needs_prediction
        return value

    return decorate


def _worth(reward, x):
    """Rewards (n,) as a tensor, of a callable or of a table over the states of a `Chain`."""
    if x.requires_grad and not getattr(reward, "differentiable", True):
        reward.gradient(x)  # raises: the gradient of a black box would silently be lost
    return torch.as_tensor(reward(x) if callable(reward) else torch.as_tensor(reward)[x.cpu()], device=x.device)


def _at(world, value, x, i, condition, chance):
    """A value at x, with the prediction that it needs."""
    return value(world, x, world.predict(x, i, condition) if i else None, i, condition, chance)


def _average(values, beta):
    """Mean over the last axis, or beta log mean exp(values / beta)."""
    if beta is None:
        return values.mean(-1)
    return beta * ((values / beta).logsumexp(-1) - math.log(values.shape[-1]))


def _temperature(beta):
    return None if beta is None else law.check_beta(beta)


def _index(world, x):
    return world.index(x) if hasattr(world, "index") else x


def _everything(world):
    """All states of a finite world (states, *shape)."""
    if hasattr(world, "all_states"):
        return world.all_states()
    if hasattr(world, "states"):
        return torch.arange(world.states)
    raise TypeError(f"{type(world).__name__} cannot be enumerated; give the number of samples")
