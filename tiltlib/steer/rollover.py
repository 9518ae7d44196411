"""Rollover budget forcing (Kim, Yoon, Hwang and Sung 2025): a greedy search whose steps share one budget of calls.

Every run holds one particle and draws its children one by one. A child that breaks the record is accepted at once, and
what its step has not spent rolls over to the next one; a step that has spent its quota moves to its best child. The
last step gets all that is left. So every run spends exactly its budget, runs are at different steps at the same
time, and one network call serves all of them.
"""

from typing import NamedTuple

import torch

from tiltlib import law, tensor_rewards, values
from tiltlib.chance import Chance
from tiltlib.steer import loop, rows
from tiltlib.steer.look import Eyes
from tiltlib.worlds import Calls

RECORDS = ("best_ever", "current")
LASTS = ("sample", "clean")


class Rolled(NamedTuple):
    """What `rollover_budget` returns: one sample of each of B runs, and where its calls went."""

    samples: torch.Tensor  # (B, *shape)
    rewards: torch.Tensor  # (B,) float64, of these samples
    calls: Calls  # all runs together
    spent: torch.Tensor  # (B, steps + 1) int64: predictions at particles of step i, the pool in the last entry
    early: torch.Tensor  # (B, steps + 1) bool: whether the particle of step i broke the record, and calls rolled over
    values: torch.Tensor  # (B, steps + 1) float64: value of the particle kept at step i; at 0 the reward
    path: torch.Tensor | None  # (B, steps + 1, *shape): these particles, if asked for


@torch.no_grad()
def rollover_budget(
    world, reward, *, budget, generator, value=None, pool=8, runs=1, condition=None, chunk=None, record="best_ever",
    last="sample", trace=False,
):  # fmt: skip
    """Search for a sample of high reward with `budget` network calls in each of `runs` independent runs.

    The best of `pool` starts begins. A step's quota is Q = floor((budget - pool) / steps), as published, plus what
    rolled over; a prediction that costs several network calls counts as so many. The law of what is returned is no
    tilt of the model: nothing is drawn by weight, there is no temperature and no estimate of Z.

    value: one of `values`, by default the reward at E[x_0 | x_i]. record: what a child must beat. "best_ever", as
    published, is the highest value among the best start and all children accepted early; a child that a spent quota
    forces leaves it as it is, so one lucky value can block all rollover for good. "current" is the value of the
    particle that the child comes from. last: "clean", as published, returns E[x_0 | x_1] of the best child, which is
    no sample of the model; "sample" takes the last step too, with Q children, of which the one of the highest reward
    returns (one child where that step draws no noise): it costs no network call. condition, chunk: as in `run`.
    trace: keep the path of particles.

    Kim, Yoon, Hwang and Sung 2025, algorithm 1. Before any network call, ValueError: budget below pool + steps,
    counts < 1, fewer than two steps, unknown record or last, a sampler that draws no noise, "clean" where E[x_0 | x_1]
    is not a point. While it runs, ValueError for a NaN or infinity, naming run and step.
    """
    chance = generator if isinstance(generator, Chance) else Chance(generator)
    pool, runs = law.check_count(pool, "pool"), law.check_count(runs, "runs")
    chunk = None if chunk is None else law.check_count(chunk, "chunk")
    cost = getattr(world, "cost", 1)
    ticks = law.check_count(budget, "budget") // cost - pool
    for name, choice, known in (("record", record, RECORDS), ("last", last, LASTS)):
        if choice not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {choice!r}")
    if world.steps < 2 or ticks < world.steps:
        raise ValueError(
            f"two steps and a budget of at least pool + steps = {(pool + world.steps) * cost} calls are needed, "
            f"not {world.steps} and {budget}"
        )
    reward = reward if callable(reward) else tensor_rewards.table(reward)
    loop._check(world, reward, rows.svdd(2), value, 2, None, chance)
    see = Eyes(world, reward, value or values.posterior_mean(reward), False, condition, chunk, None, runs)
    x = world.start(runs * pool, chance)
    if last == "clean" and not x.is_floating_point():
        raise ValueError(f"E[x_0 | x_1] of {type(world).__name__} is a table of probabilities: take last='sample'")
    return _search(world, see, x, ticks, runs, pool, record, last, trace, chance)


class _Best(NamedTuple):
    """One particle of each run."""

    x: torch.Tensor
    prediction: torch.Tensor
    value: torch.Tensor

    def where(self, chosen, other):
        """This one in the runs that are chosen (B,), else the other."""
        pairs = zip(self, other, strict=True)
        return _Best(*(torch.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))


def _search(world, see, x, ticks, runs, pool, record, last, trace, chance):
    top, share, every = world.steps, ticks // world.steps, torch.arange(runs, device=x.device)
    look, calls = see.worth(x, top, chance, Calls())
    look, calls = see.complete(look, x, top, calls)
    first = look.value.view(runs, pool).argmax(1) + pool * every
    now = _Best(x[first], look.prediction[first], look.value[first])
    spent = torch.zeros(runs, top + 1, dtype=torch.int64, device=x.device)
    early, worth = spent.bool(), spent.double()
    path = now.x.new_zeros(runs, top + 1, *x.shape[1:]) if trace else None

    def keep(which, particle, step):
        worth[which, step] = particle.value[which]
        if trace:
            path[which, step] = particle.x[which]

    spent[:, top] = pool
    keep(every, now, top)
    i, used, quota, mark = torch.full_like(every, top), 0 * every, share + 0 * every, now.value
    none = torch.full_like(mark, -torch.inf)
    best = now._replace(value=none)  # child of this step
    for _ in range(ticks):
        x = world.kernel(now.x, now.prediction, i).sample(1, chance)[0][:, 0]
        look, calls = see.scattered(x, i - 1, chance, calls, "run")
        child = _Best(x, look.prediction, look.value)
        used = used + 1
        spent[every, i - 1] += 1
        best = child.where(child.value > best.value, best)
        goes_on = i > 2  # nothing is accepted at step 1 before all calls are spent
        ahead = goes_on & (child.value > mark)  # such a child is the best of its step
        move = ahead | (goes_on & (used >= quota))
        mark = torch.where(ahead if record == "best_ever" else move, best.value, mark)
        quota = torch.where(move, share + ahead * (quota - used), quota)
        now, i, used = best.where(move, now), i - move.long(), torch.where(move, 0, used)
        early[every, i] |= ahead
        keep(every[move], best, i[move])
        best = best._replace(value=torch.where(move, none, best.value))
    keep(every, best, 1)
    if last == "clean":
        x = world.clean(best.x, best.prediction, 1).unsqueeze(1)
    else:
        kernel = world.kernel(best.x, best.prediction, 1)
        noisy = not hasattr(kernel, "std") or bool(torch.as_tensor(kernel.std > 0).any())
        x = kernel.sample(share if noisy else 1, chance)[0]
    look, calls = see.worth(x.flatten(0, 1), 0, chance, calls)
    scores = look.value.view(x.shape[:2])
    chosen = scores.argmax(1)
    out = now._replace(x=x[every, chosen], value=scores[every, chosen])
    keep(every, out, 0)
    return Rolled(out.x, out.value, calls, spent, early, worth, path)
