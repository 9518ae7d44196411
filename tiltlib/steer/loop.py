"""The particle loop: every inference-time method of the book is `steps` with another `Method`.

One step from i + 1 to i: tilt the kernel by the drift; sample children, with log p - log q; look at them (network,
value, gradient); twist, psi = lam value / beta (r / beta at i = 0); add log p - log q + psi_new - psi_old to the
log-weights; select; gather everything by the one index. The twist is the only potential, so weights telescope to
r / beta along each line of descent, whatever the value, the tempering and the drift; and selection keeps the mean
weight. Hence E[mean weight] = Z for every row that is `proper` (Del Moral 2004, proposition 7.4.1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tiltlib import law, tensor_rewards, values
from tiltlib.chance import Chance
from tiltlib.steer.look import Eyes, Look, finite
from tiltlib.worlds import Calls


class State(NamedTuple):
    """What `steps` yields: B runs of K particles at step i."""

    i: int
    x: torch.Tensor  # (B, K, *shape)
    look: Look  # at these particles, flat (B * K, ..)
    running: torch.Tensor | None  # (B, K): the max or the sum of the values so far
    psi: torch.Tensor  # (B, K): the twist, in nats
    log_w: torch.Tensor  # (B, K) float64
    ancestors: torch.Tensor | None  # (B, K): position of the parent among the K of the step before; None at the start
    lam: torch.Tensor  # (B,): tempering exponent of the twist
    calls: Calls  # so far, all runs together


@dataclass(frozen=True)
class Method:
    """A row of the loop. `rows` makes them; `dataclasses.replace` changes one.

    twist     what psi is made of before i = 0: "last" value, the running "max" or "sum" of the values, or None
    drift     (world, look, i, heat) -> the tilt g of the kernel that leaves step i, heat = lam / beta (B * K,); or None
    children  M, drawn from each particle; a run starts from K M candidates
    select    (log_w (B, K, M), chance) -> (positions (B, K) among K * M, or None for "as they are"; log_w (B, K))
    temper    (log_w, value / beta (B, K), lam (B,), i, steps) -> the next lam (B,), fixed before proposing; or None
    finish    what `Steered.draw` returns: a particle "by weight", or the "best"
    start     "own", or "tilted": from the world's exact tilted start (TypeError where it has none)
    weigh     whether particles carry weights; guidance alone has none
    order     (x (n, *shape)) -> (n,): candidates are lined up by it before they are selected (systematic resampling of
              neighbours); or None
    moves     how often each x_i, once selected, is drawn again from its parent, and accepted as Metropolis and Hastings
              do, which leaves its law given the parent, p(x_i | x_{i+1}) exp(psi), as it was
    waste_free  whether the states between the moves are particles too: `select` then repeats K / (moves + 1) survivors
    proper    whether the mean weight is an unbiased estimate of Z
    """

    select: Callable
    twist: str | None = None
    drift: Callable | None = None
    children: int = 1
    temper: Callable | None = None
    finish: str = "by weight"
    start: str = "own"
    weigh: bool = True
    order: Callable | None = None
    moves: int = 0
    waste_free: bool = False
    proper: bool = True


class Steered(NamedTuple):
    """What `run` returns: B runs of K weighted particles."""

    samples: torch.Tensor  # (B, K, *shape)
    log_weights: torch.Tensor  # (B, K) float64, not normalised
    log_z: torch.Tensor | None  # (B,): log of an unbiased estimate of E[exp(r / beta)]; None where it is not proper
    calls: Calls
    trace: list  # of States if asked for
    finish: str

    def draw(self, generator):
        """One sample of each run (B, *shape): by weight, or the best (a tie goes to the first)."""
        if self.finish == "best":
            chosen = self.log_weights.argmax(1)
        else:
            chosen = _chance(generator).categoricals(self.log_weights)
        return self.samples[torch.arange(len(chosen), device=chosen.device), chosen]

    def evidence(self):
        """log of the mean over runs of the estimates of Z, and its standard error (delta method; needs two runs)."""
        if self.log_z is None:
            raise ValueError("this method gives no unbiased estimate of Z")
        if len(self.log_z) < 2:
            raise ValueError("a standard error needs runs >= 2")
        top = self.log_z.max()
        z = (self.log_z - top).exp()
        error = z.std(correction=1) / math.sqrt(len(z)) / z.mean()
        return float(top + z.mean().log()), float(error)


def run(
    world, reward, *, beta, method, generator, value=None, particles=16, runs=1, children=None, condition=None,
    chunk=None, proposal=None, start=None, pinned=None, trace=False,
):  # fmt: skip
    """Steer `world` towards p(x) exp(reward(x) / beta) / Z with a row of `METHODS`.

    reward: a Reward, any callable from samples (n, *shape) to (n,), or on a `Chain` an array (K,). beta: temperature,
    in units of the reward. method: a name in `METHODS` or a Method. generator: a torch.Generator (or a Chance) on the
    world's device. value: one of `values`, by default the reward at E[x_0 | x_i]. particles K >= 1 in each of `runs`
    independent populations; children: M, by default the method's. chunk: at most so many particles in one network
    call, which bounds memory and changes results by rounding only (a value that draws random numbers draws them chunk
    by chunk). proposal: another world on the same steps to propose from, its weights p / q corrected (a fine-tuned
    model, say). start: (x (runs, particles, *shape), i), where the particles start instead of at noise; log_z is then
    that of the way down from there. pinned: a path x_0, .., x_i, each (runs, *shape), that particle 0 of each run is
    made to follow (conditional SMC; the row must select accordingly, as those of `refine` do). trace: keep every State.

    Before any work, raises ValueError for beta <= 0, counts < 1, an unknown method, a method that needs noise on a
    world without any, and TypeError for a drift through a black-box reward. While it runs, ValueError for a NaN or
    infinity from the model, reward or value, naming run, particle and step, and where all weights are zero.
    """
    kept = []
    state = None
    for state in steps(
        world, reward, beta=beta, method=method, generator=generator, value=value, particles=particles, runs=runs,
        children=children, condition=condition, chunk=chunk, proposal=proposal, start=start, pinned=pinned,
    ):  # fmt: skip
        if trace:
            kept.append(state)
    row = _method(method)
    log_z = state.log_w.logsumexp(1) - math.log(particles) if row.proper else None
    return Steered(state.x, state.log_w, log_z, state.calls, kept, row.finish)


def steps(
    world, reward, *, beta, method, generator, value=None, particles=16, runs=1, children=None, condition=None,
    chunk=None, proposal=None, start=None, pinned=None,
):  # fmt: skip
    """The loop itself, a generator of States from i = world.steps down to 0. Arguments and errors: as in `run`."""
    beta, row, chance = law.check_beta(beta), _method(method), _chance(generator)
    runs, particles = law.check_count(runs, "runs"), law.check_count(particles, "particles")
    m = law.check_count(row.children if children is None else children, "children")
    chunk = None if chunk is None else law.check_count(chunk, "chunk")
    reward = reward if callable(reward) else tensor_rewards.table(reward)
    asks = row.twist is not None or row.drift is not None
    _check(world, reward, row, value, m, proposal, chance)
    value = values.posterior_mean(reward) if value is None and asks else value
    see = Eyes(world, reward, value if asks else None, row.drift is not None, condition, chunk, proposal, runs)
    _check_start(world, row, start, pinned, runs, particles, proposal)
    return _loop(world, reward, beta, row, chance, see, runs, particles, m, start, pinned)


@torch.no_grad()  # as a decorator: a context manager in a generator would leak to whoever iterates
def _loop(world, reward, beta, row, chance, see, runs, particles, m, start, pinned):
    shape = (runs, particles, m)
    if start is None:
        first, wanted = world.steps, m  # the start has candidates too, and is selected like a step
        flat = _start(world, reward, beta, row, runs * particles * m, chance)
    else:
        first, wanted = start[1], 1
        flat = start[0].flatten(0, 1).clone()
    if pinned is not None:
        flat[:: particles * wanted] = pinned[first]
    new, calls = see.worth(flat, first, chance, Calls())
    lam = torch.full((runs,), 1.0 if row.temper is None else 0.0, dtype=torch.float64, device=flat.device)
    twist, wide = _twist(row, new, None, lam, beta, first, (runs, particles, wanted), flat)
    index, log_w = _select(row, twist, flat, chance, first)
    x, look, running, psi, _ = _gather(index, flat, new, wide, twist, wanted)
    look, calls = see.complete(look, x, first, calls)
    yield State(first, x.unflatten(0, (runs, particles)), look, running, psi, log_w, None, lam, calls)
    for i in range(first - 1, -1, -1):
        if row.temper is not None:
            worth = torch.zeros_like(log_w) if look.value is None else look.value.view(runs, particles) / beta
            lam = row.temper(log_w, worth, lam, i, first)
        children, log_ratio = _propose(world, row, look, see, x, i + 1, lam, beta, particles, m, chance)
        if pinned is not None:
            children[::particles, 0] = pinned[i]
        flat = children.flatten(0, 1)
        finite(flat, i, particles * m, "the model's step")
        new, calls = see.worth(flat, i, chance, calls)
        wide = None if running is None else running.unsqueeze(-1).expand(shape)
        twist, wide = _twist(row, new, wide, lam, beta, i, shape, flat)
        if row.weigh:
            log_w = (log_w - psi).unsqueeze(-1) + twist
            if log_ratio is not None:
                log_w += log_ratio.double().view(shape)
            finite(log_w.flatten(), i, particles * m, "the weight", below=True)
        else:
            log_w = log_w.unsqueeze(-1).expand(shape)
        index, log_w = _select(row, log_w, flat, chance, i)
        before = x, look
        x, look, running, psi, parents = _gather(index, flat, new, wide, twist, m)
        if row.moves:
            ratio = _of(index, log_ratio, psi)
            x, look, psi, calls = _move(
                world, row, see, before, parents, x, look, psi, ratio, i, lam, beta, chance, calls
            )
        look, calls = see.complete(look, x, i, calls)
        yield State(i, x.unflatten(0, (runs, particles)), look, running, psi, log_w, parents, lam, calls)


def _start(world, reward, beta, row, count, chance):
    if row.start == "own":
        return world.start(count, chance)
    if not hasattr(world, "tilted_start"):
        raise TypeError(f"{type(world).__name__} cannot draw its tilted start exactly; take a method that weighs it")
    finite = hasattr(world, "states") and not hasattr(world, "mask")
    known = reward(torch.arange(world.states)).numpy() if finite else getattr(reward, "function", reward)
    return world.tilted_start(count, chance, known, beta)


def _propose(world, row, look, see, x, i, lam, beta, particles, m, chance):
    """Children (n, m, *shape) of particles at step i, and log p - log q (n, m), or None where the two are the same."""
    kernel = world.kernel(x, look.prediction, i)
    proposal, other = kernel, None
    if see.proposal is not None and (not hasattr(kernel, "std") or bool(torch.as_tensor(kernel.std > 0).any())):
        proposal = other = see.proposal.kernel(x, look.proposed, i)
    if row.drift is not None:
        heat = (lam / beta).repeat_interleave(particles)
        proposal = proposal.tilt(row.drift(world, look, i, heat))
    children, log_ratio = proposal.sample(m, chance)
    if other is not None:
        log_ratio = log_ratio + kernel.log_prob(children) - other.log_prob(children)
    return children, None if proposal is kernel else log_ratio


def _twist(row, look, running, lam, beta, i, shape, x):
    """psi (B, K, M) in nats, and the running value of the method."""
    if (row.twist is None and i > 0) or not row.weigh:
        return torch.zeros(shape, dtype=torch.float64, device=x.device), running
    value = look.value.view(shape)
    if i == 0:  # whatever the potentials were, the last one is the reward
        return value / beta, running
    if row.twist in ("max", "sum"):
        join = torch.maximum if row.twist == "max" else torch.add
        running = value.clone() if running is None else join(running, value)
        value = running
    return (lam / beta).view(-1, 1, 1) * value, running


def _move(world, row, see, before, parents, x, look, psi, ratio, i, lam, beta, chance, calls):
    """x, look and psi after the moves of a Method; ratio (B, K) is log p - log q of x, parents whose child each is."""
    (runs, particles), blocks = psi.shape, row.moves + 1 if row.waste_free else 1
    everyone = torch.arange(runs * particles, device=x.device).view(runs, blocks, -1)
    up = (parents + torch.arange(runs, device=x.device)[:, None] * particles).flatten()
    psi, ratio = psi.flatten().clone(), ratio.flatten().clone()
    for k in range(row.moves):  # one after the other; waste-free: from block k to block k + 1
        here, there = (everyone[:, j].flatten() for j in ((k, k + 1) if row.waste_free else (0, 0)))
        start, seen = before[0].index_select(0, up[here]), before[1].take(up[here])
        drawn, new_ratio = _propose(world, row, seen, see, start, i + 1, lam, beta, len(here) // runs, 1, chance)
        drawn, new_ratio = drawn[:, 0], torch.zeros_like(psi[here]) if new_ratio is None else new_ratio[:, 0].double()
        finite(drawn, i, len(here) // runs, "the model's step")
        new, calls = see.worth(drawn, i, chance, calls)
        twist, _ = _twist(row, new, None, lam, beta, i, (runs, len(here) // runs, 1), drawn)
        chances = (twist.flatten() + new_ratio - psi[here] - ratio[here]).clamp(max=0).exp().nan_to_num(1.0)
        taken = chance.categoricals(torch.stack([chances, 1 - chances], -1).log()) == 0
        x, look = (
            _put(x, drawn, taken, here, there),
            Look(*(_put(old, one, taken, here, there) for old, one in zip(look, new, strict=True))),
        )
        psi, ratio = (_put(old, one, taken, here, there) for old, one in ((psi, twist.flatten()), (ratio, new_ratio)))
    return x, look, psi.view(runs, particles), calls


def _put(old, new, taken, here, there):
    """`old` with, at `there`, the entries of `new` that were taken and else those of `old` at `here`."""
    if old is None:
        return None
    taken = taken.view(-1, *[1] * (old.ndim - 1))
    return old.index_copy(0, there, torch.where(taken, new.to(old), old.index_select(0, here)))


def _of(index, log_ratio, psi):
    """log p - log q (B, K) of the children that were selected."""
    if log_ratio is None:
        return torch.zeros_like(psi)
    flat = log_ratio.double().view(len(psi), -1)
    return flat if index is None else flat.gather(1, index)


def _select(row, log_w, x, chance, i):
    try:
        if row.order is None:
            return row.select(log_w, chance)
        line = row.order(x).view(len(log_w), -1).argsort(1)
        index, new = row.select(log_w.flatten(1).gather(1, line).view_as(log_w), chance)
        return line if index is None else line.gather(1, index), new
    except ValueError as error:
        raise ValueError(f"step {i}: {error}") from error


def _gather(index, x, look, running, psi, m):
    """Everything of the chosen children, by the one index; and who their parents were."""
    runs, particles = psi.shape[:2]
    if index is None:
        parents = torch.arange(particles, device=x.device).expand(runs, -1)
        return x, look, None if running is None else running[..., 0], psi[..., 0], parents
    row = torch.arange(runs, device=x.device)[:, None] * (particles * m)
    flat = (index + row).flatten()

    def wide(tensor):
        return None if tensor is None else tensor.flatten(1).gather(1, index)

    return x.index_select(0, flat), look.take(flat), wide(running), wide(psi), index // m


def _check(world, reward, row, value, m, proposal, chance):
    here, there = getattr(getattr(chance, "generator", None), "device", None), getattr(world, "device", None)
    if here is not None and there is not None and here.type != torch.device(there).type:
        raise ValueError(f"the generator is on {here}, the world on {there}: make the generator there")
    if row.drift is not None and value is None and not getattr(reward, "differentiable", True):
        raise TypeError(
            f"{getattr(reward, 'name', 'the reward')} is a black box without a gradient: take a method without a "
            "drift, or give a learned value"
        )
    if m > 1 and getattr(row.select, "one_child", False):
        raise ValueError(f"this method selects nothing, so it has one child per particle, not {m}")
    if row.moves and (row.twist not in ("last", None) or not row.weigh):
        raise ValueError('moves are for rows with weights and the twist "last" or None')
    coefficients = getattr(world, "coef", None)
    noise_needed = row.twist is not None or row.drift is not None
    if noise_needed and coefficients is not None and not (torch.as_tensor(coefficients.std) > 0).any():
        raise ValueError(
            "every reverse step of this world is deterministic: copies of a particle would stay the same and drifts do "
            "nothing. Give it a sampler with noise (an SDE, or eta > 0), or take importance or best_of_n"
        )
    if proposal is not None and proposal.steps != world.steps:
        raise ValueError(f"the proposal has {proposal.steps} steps, the world {world.steps}")


def _check_start(world, row, start, pinned, runs, particles, proposal):
    first = world.steps
    if start is not None:
        x, first = start
        if not isinstance(first, int) or isinstance(first, bool) or not 1 <= first <= world.steps:
            raise ValueError(f"start is at a step from 1 to {world.steps}, not {first!r}")
        if x.shape[:2] != (runs, particles):
            raise ValueError(f"start has states (runs, particles, ..) = {(runs, particles)}, not {tuple(x.shape[:2])}")
    if pinned is not None and (row.drift is not None or proposal is not None):
        raise ValueError("a pinned path is weighed as the model's own steps: take a row without drift, no proposal")
    if pinned is not None and (row.moves or row.order is not None):
        raise ValueError("a pinned path stays where it is: take a row without moves and without order")
    if pinned is not None and (len(pinned) != first + 1 or any(len(x) != runs for x in pinned)):
        raise ValueError(f"a pinned path has {first + 1} states x_0, .., x_{first} for each of {runs} runs")


def _method(method):
    from tiltlib.steer.rows import METHODS

    if isinstance(method, Method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    return METHODS[method]


def _chance(generator):
    return generator if isinstance(generator, Chance) else Chance(generator)
