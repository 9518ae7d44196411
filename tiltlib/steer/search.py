"""Searches beside the loop: `tree_search` looks ahead in a tree, `refine` goes back to noise and down again.

Both are made of the loop's parts: a world's kernel, its sample, `Eyes` and the choice among siblings; `refine` steers
every way down with the loop itself. What is exact here is `refine` with accept="exact" or "metropolis", where
`world.renoise` is the joint law of the model: the tilted law is then invariant, at any noise level and any number of
particles. Tree search has another law than the tilt, unless its tree is complete.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from tiltlib import law, tensor_rewards, values
from tiltlib.chance import effective_sample_size
from tiltlib.steer import loop
from tiltlib.steer.look import Eyes
from tiltlib.steer.rows import keep
from tiltlib.worlds import Calls

# ------------------------------------------------------------------------------------------------------------- refine

ACCEPT = ("exact", "metropolis", "always", "greedy")


class Refined(NamedTuple):
    """What `refine` returns: B independent runs of some rounds."""

    samples: torch.Tensor  # (B, *shape), after the last round
    rewards: torch.Tensor  # (rounds + 1, B) float64, before the first round and after each
    moved: torch.Tensor  # (rounds, B): whether the round put another sample in place of the current one
    calls: Calls  # all runs and rounds, the first sample included unless it was given
    trace: list  # of samples (B, *shape), rounds + 1 of them, if asked for


@torch.no_grad()
def refine(
    world, reward, *, beta, generator, rounds, noise=None, particles=8, method="importance", accept="exact", value=None,
    runs=1, start=None, children=None, condition=None, chunk=None, trace=False,
):  # fmt: skip
    """Improve samples in rounds: noise the current one up to a step, steer back down, and keep one of all.

    world, reward, beta, generator, value, children, condition, chunk: as in `steer.run`. rounds: >= 1. noise: the step
    1 .. world.steps to go back to; world.steps (the default) is from scratch, with a start of its own for each fresh
    sample. particles: N >= 2, the current sample among them, so a round costs N - 1 ways down. method: the row of the
    loop that steers them. start: the first samples (runs, *shape), by default the model's own. accept:

    exact       with "importance": the N compete by exp(r / beta), as siblings of one noised state (i-SIR: Andrieu, Lee
                and Vihola 2018; from scratch it is iterated best-of-N). With a row that resamples: conditional SMC, in
                which the current sample's own path takes part (Andrieu, Doucet and Holenstein 2010)
    metropolis  with "importance": one of the N - 1 fresh, accepted by a ratio of sums of weights (Liu, Liang and Wong
                2000); it leaves the current sample at least as often as i-SIR does
    always      a draw of the row's N - 1 particles, whatever the current sample was; not exact
    greedy      the best of all N; not exact, and it never goes down

    "exact" and "metropolis" leave the tilted law invariant if `world.renoise` is the model's joint law: on `Chain` it
    is; on a trained model it is nearly. Before any work, raises ValueError for counts, steps or rules out of range,
    for a row that no exact rule is known for, and for a partial noise on a world whose steps draw none.
    """
    beta, chance, row = law.check_beta(beta), loop._chance(generator), loop._method(method)
    rounds, runs = law.check_count(rounds, "rounds"), law.check_count(runs, "runs")
    noise = world.steps if noise is None else noise
    if not isinstance(noise, int) or isinstance(noise, bool) or not 1 <= noise <= world.steps:
        raise ValueError(f"noise is a step from 1 to {world.steps}, not {noise!r}")
    if law.check_count(particles, "particles") < 2:
        raise ValueError("particles >= 2: the current sample, and at least one fresh one")
    if accept not in ACCEPT:
        raise ValueError(f"unknown rule {accept!r}; known: {', '.join(ACCEPT)}")
    if start is not None and len(start) != runs:
        raise ValueError(f"start has {len(start)} samples for {runs} runs")
    plain = row.select is keep and row.drift is None and row.weigh and row.finish == "by weight"
    if accept == "metropolis" and not plain:
        raise ValueError('the rule "metropolis" is for the row "importance"; with others take "exact" or "greedy"')
    pinned = conditional(row) if accept == "exact" and not plain else None
    if noise < world.steps:
        _needs_noise(world)
    reward = reward if callable(reward) else tensor_rewards.table(reward)
    options = {"beta": beta, "generator": chance, "condition": condition, "chunk": chunk, "runs": runs}
    if start is None:
        first = _last(loop.steps(world, reward, method="base", particles=1, **options))
        x, r, calls = first.x[:, 0], first.look.value, first.calls
    else:
        x, calls = start, Calls(reward=runs)
        r = torch.as_tensor(reward(x), dtype=torch.float64, device=x.device)
    options |= {"value": value, "children": children}
    rewards, moved, kept = [r], [], [x]
    for _ in range(rounds):
        if pinned is not None:
            path = _path(world, x, noise, chance)
            where = None if noise == world.steps else (_copies(path[-1], particles), noise)
            more = {"method": pinned, "particles": particles, "start": where, "pinned": path}
        else:
            where = None
            if noise < world.steps:
                where = (_copies(world.renoise(x, 0, noise, chance), particles - 1), noise)
            more = {"method": row, "particles": particles - 1, "start": where}
        state = _last(loop.steps(world, reward, **options, **more))
        calls, fresh = _add(calls, state.calls), state.look.value.view(state.log_w.shape)
        pick = _accept("pinned" if pinned else accept, r, fresh, state.log_w, row, beta, chance)
        new = pick >= 0
        at = torch.arange(runs, device=x.device), pick.clamp(min=0)
        x = torch.where(new.view(-1, *[1] * (x.ndim - 1)), state.x[at], x)
        r = torch.where(new, fresh[at], r)
        rewards.append(r), moved.append(new), kept.append(x)
    return Refined(x, torch.stack(rewards), torch.stack(moved), calls, kept if trace else [])


def conditional(row):
    """The row with a choice that keeps particle 0 of each run in its place: conditional SMC.

    The other K - 1 places are drawn independently, by weight, from all K M candidates, the kept one among them; so
    whatever scheme the row has, this is multinomial. ValueError: a row that does not resample, has a drift, moves or
    an order, or draws the best.
    """
    ess = getattr(row.select, "ess", None)
    other = row.drift is not None or row.moves or row.order is not None or row.finish != "by weight" or not row.proper
    if other or (ess is None and row.select is not keep):
        raise ValueError(
            "no rule is known that keeps this row exact: take importance or a row that resamples all particles without "
            'a drift (smc), or accept="always" or "greedy"'
        )

    def select(log_w, chance):
        runs, k, m = log_w.shape
        flat = log_w.flatten(1)
        need = (effective_sample_size(flat) < ess * k * m) | (ess == 1) | (m > 1)
        if not need.any():
            return None, log_w[..., 0]
        index = torch.arange(k, device=log_w.device).expand(runs, -1).clone()
        index[need, 1:] = chance.categoricals(flat[need].unsqueeze(1).expand(-1, k - 1, -1))
        mean = (flat.logsumexp(1, keepdim=True) - math.log(k * m)).expand(-1, k)
        return index, torch.where(need[:, None], mean, flat[:, :k])

    return row if ess is None else replace(row, select=select)


def _accept(rule, r, fresh, log_w, row, beta, chance):
    """Which of the row's particles (B, K) becomes current, (B,); -1: none, the current one stays."""
    if rule == "pinned":  # particle 0 is the current one
        pick = chance.categoricals(log_w)
        return torch.where(pick > 0, pick, -1)
    if rule == "exact":
        return chance.categoricals(torch.cat([r[:, None], fresh], 1) / beta) - 1
    if rule == "greedy":
        best = fresh.max(1)
        return torch.where(best.values > r, best.indices, -1)
    pick = log_w.argmax(1) if row.finish == "best" else chance.categoricals(log_w)
    if rule == "always":
        return pick
    others = fresh.scatter(1, pick[:, None], r[:, None])  # the current one in place of the pick
    log_ratio = ((fresh / beta).logsumexp(1) - (others / beta).logsumexp(1)).clamp(max=0)
    yes = chance.categoricals(torch.stack([torch.log1p(-log_ratio.exp()), log_ratio], 1)) == 1
    return torch.where(yes, pick, -1)


def _path(world, x, noise, chance):
    """x_0, x_1, .., x_noise given x_0 = x, each (B, *shape)."""
    path = [x]
    for i in range(noise):
        path.append(world.renoise(path[-1], i, i + 1, chance))
    return path


def _last(states):
    """The State at i = 0."""
    for last in states:  # noqa: B007
        pass
    return last


def _copies(x, k):
    """(B, *shape) -> (B, k, *shape)."""
    return x.unsqueeze(1).expand(-1, k, *x.shape[1:])


def _add(calls, more):
    return calls.plus(**more._asdict())


def _needs_noise(world):
    coefficients = getattr(world, "coef", None)
    if coefficients is not None and not (torch.as_tensor(coefficients.std) > 0).any():
        raise ValueError(
            "every reverse step of this world is deterministic: all ways down from a state are the same one. Give it a "
            "sampler with noise (an SDE, or eta > 0)"
        )


# -------------------------------------------------------------------------------------------------------- tree search

BACKUPS = ("max", "mean", "soft")


class Tree(NamedTuple):
    """The nodes of B search trees in the order they were made; node 0 stands before the start, and has no state."""

    x: torch.Tensor  # (B, n, *shape)
    step: torch.Tensor  # (B, n) int64: steps + 1 at node 0, 0 at the ends; -1 where a tree has no such node
    parent: torch.Tensor  # (B, n) int64; -1 at node 0
    log_p: torch.Tensor  # (B, n) float64: log of a node's share among its siblings, before any reward
    value: torch.Tensor  # (B, n) float64, backed up, in units of the reward
    visits: torch.Tensor  # (B, n) float64: evaluations at and below the node
    path: torch.Tensor  # (B, steps + 1) int64: the nodes that were gone through, from the start to the end


class Searched(NamedTuple):
    """What `tree_search` returns."""

    samples: torch.Tensor  # (B, *shape)
    rewards: torch.Tensor  # (B,) float64
    calls: Calls  # all runs together
    tree: Tree


@torch.no_grad()
def tree_search(
    world, reward, *, generator, simulations=8, children=4, depth=1, exploration=1.0, backup="max", beta=None,
    value=None, runs=1, condition=None, chunk=None,
):  # fmt: skip
    """Monte Carlo tree search down the steps of a world; all runs are searched at once, one network call for all.

    A node is a state at some step, its children are draws of the model's own step. A simulation goes down from where
    the search stands, at each node to the child of the largest value + exploration sqrt(log visits / visits of the
    child) (UCT: Kocsis and Szepesvari 2006), past what is fully known; it expands the node where it ends by `children`
    children, values each, and backs the values up. After `simulations` of them the search goes to one child, keeps its
    subtree, and goes on until i = 0. (The tutorial of Uehara et al. 2025, section 6.2.)

    children: M >= 1; None: all states of a `Chain`, each with its probability. depth: k >= 1; a child is worth `value`
    where the model has taken it k - 1 steps further (1: at the child itself; world.steps: the reward of a whole
    roll-out). exploration: >= 0, in units of the reward. backup: what a node is worth given its children: the "max",
    the "mean" over all evaluations below, or "soft", beta log sum p exp(value / beta). The first two go to the best
    child, "soft" to one in proportion to p exp(value / beta). beta: for "soft" only. value: by default the reward at
    E[x_0 | x_i].

    With one simulation a step and depth 1 "soft" is SVDD and "max" its greedy form. "soft" is exact where the tree is
    complete (children=None, enough simulations) or its values are exact; else the law of its samples is unknown. Before
    any work, raises ValueError for counts < 1, an unknown backup, a beta that is missing or not read, a deterministic
    world, and TypeError for children=None on a world that is no chain; ValueError for a value that is not finite.
    """
    chance, beta = loop._chance(generator), None if beta is None else law.check_beta(beta)
    for name, count in {"simulations": simulations, "depth": depth, "runs": runs}.items():
        law.check_count(count, name)
    if backup not in BACKUPS:
        raise ValueError(f"unknown backup {backup!r}; known: {', '.join(BACKUPS)}")
    if (beta is None) == (backup == "soft"):
        raise ValueError('beta is needed with backup="soft", and read by no other')
    if isinstance(exploration, bool) or not 0 <= exploration < math.inf:
        raise ValueError(f"exploration must be finite and not negative, not {exploration!r}")
    if children is None and not hasattr(world, "start_law"):
        raise TypeError(f"the states of {type(world).__name__} cannot be enumerated: give the number of children")
    m = world.states if children is None else law.check_count(children, "children")
    chunk = None if chunk is None else law.check_count(chunk, "chunk")
    _needs_noise(world)
    reward = reward if callable(reward) else tensor_rewards.table(reward)
    value = values.posterior_mean(reward) if value is None else value
    eyes = {"condition": condition, "chunk": chunk}
    capacity = 1 + (world.steps + 1) * simulations * m
    search = _Search(world, reward, value, m, children is None, depth, backup, beta, runs, capacity, eyes, chance)
    here = torch.zeros(runs, dtype=torch.int64, device=search.device)
    path = []
    for _ in range(world.steps + 1):
        for _ in range(simulations):
            search.simulate(here, float(exploration))
        here = search.go(here)
        path.append(here)
    return search.result(torch.stack(path, 1))


class _Search:
    """The trees of B runs, in arrays (B, nodes). The M children of a node lie side by side, at the same place for all
    runs; a run that had nothing left to expand has no nodes there."""

    def __init__(self, world, reward, value, m, everything, depth, backup, beta, runs, capacity, eyes, chance):
        self.world, self.reward, self.judge, self.m, self.everything = world, reward, value, m, everything
        self.depth, self.backup, self.beta, self.runs, self.chance = depth, backup, beta, runs, chance
        self.condition, self.chunk = eyes["condition"], eyes["chunk"]
        self.calls, self.used, self.x, self.said = Calls(), 1, None, None
        self.device = getattr(getattr(chance, "generator", None), "device", torch.device("cpu"))
        shape, whole = (runs, capacity), {"dtype": torch.int64, "device": self.device}
        self.step, self.parent, self.first = (torch.full(shape, -1, **whole) for _ in range(3))
        self.log_p, self.value, self.visits = torch.zeros(3, *shape, dtype=torch.float64, device=self.device)
        self.known = torch.zeros(shape, dtype=torch.bool, device=self.device)  # whether all below is expanded
        self.step[:, 0] = world.steps + 1
        self.rows, self.places = torch.arange(runs, device=self.device), torch.arange(m, device=self.device)

    def simulate(self, here, exploration):
        """One simulation in every run whose tree below node `here` (B,) is not complete."""
        rows = (~self.known[self.rows, here]).nonzero()[:, 0]
        if not len(rows):
            return
        node = here[rows]
        while True:
            first = self.first[rows, node]
            inside = first >= 0
            if not inside.any():
                break
            kids = first.clamp(min=0)[:, None] + self.places
            at = rows[:, None], kids
            bonus = (self.visits[rows, node].clamp(min=1).log()[:, None] / self.visits[at].clamp(min=1)).sqrt()
            score = (self.value[at] + exploration * bonus).masked_fill(self.known[at], -math.inf)
            node = torch.where(inside, kids.gather(1, score.argmax(1, keepdim=True))[:, 0], node)
        self._expand(rows, node)
        self._back_up(rows, node)

    def go(self, here):
        """The child (B,) of nodes `here` that the search goes to."""
        kids = self.first[self.rows, here][:, None] + self.places
        log_p, value = self.log_p[self.rows[:, None], kids], self.value[self.rows[:, None], kids]
        if self.backup == "soft":
            pick = self.chance.categoricals(log_p + value / self.beta)
        else:
            pick = value.masked_fill(log_p.isneginf(), -math.inf).argmax(1)
        return kids.gather(1, pick[:, None])[:, 0]

    def result(self, path):
        last, n = path[:, -1], self.used
        arrays = (a[:, :n] for a in (self.x, self.step, self.parent, self.log_p, self.value, self.visits))
        return Searched(self.x[self.rows, last], self.value[self.rows, last], self.calls, Tree(*arrays, path))

    def _expand(self, rows, node):
        """M children of node (n,) in runs `rows` (n,), and what they are worth."""
        x, log_p = self._children(rows, node)
        n, m = log_p.shape
        kids = self.used + self.places.expand(n, m)
        at, step = (rows[:, None], kids), (self.step[rows, node] - 1)[:, None].expand(n, m)
        if self.x is None:
            self.x = x.new_zeros(*self.step.shape, *x.shape[2:])
        self.first[rows, node], self.used = self.used, self.used + m
        self.x[at], self.step[at], self.parent[at], self.log_p[at] = x, step, node[:, None].expand(n, m), log_p
        possible = ~log_p.isneginf()
        self.visits[at], self.known[at] = possible.double(), (step == 0) | ~possible
        here = possible.nonzero(as_tuple=True)
        worth, said = self._worth(x[here], step[here], rows[here[0]])
        self.value[at[0].expand(n, m)[here], kids[here]] = worth
        if said is not None:
            if self.said is None:
                self.said = said.new_zeros(*self.step.shape, *said.shape[1:])
            self.said[at[0].expand(n, m)[here], kids[here]] = said

    def _children(self, rows, node):
        """States (n, M, *shape) of the children, and the log of each one's share (n, M)."""
        world, m = self.world, self.m
        even = torch.full((len(rows), m), -math.log(m), dtype=torch.float64, device=self.device)
        if self.used == 1:  # node 0: its children are starts
            if self.everything:
                return self.places.expand(len(rows), m), torch.as_tensor(world.start_law).log().expand(len(rows), m)
            return world.start(len(rows) * m, self.chance).unflatten(0, (len(rows), m)), even
        x, i = self.x[rows, node], self.step[rows, node]
        if self.said is None:
            look, self.calls = self._eyes(None, rows).scattered(x, i, self.chance, self.calls)
            kernel = world.kernel(x, look.prediction, i)
        else:
            kernel = world.kernel(x, self.said[rows, node], i)
        if self.everything:
            everything = self.places.expand(len(rows), m)
            return everything, kernel.log_prob(everything).double()
        return kernel.sample(m, self.chance)[0], even

    def _worth(self, x, i, rows):
        """Values (n,) of states x (n, *shape) of steps i (n,) in runs `rows` (n,), and their predictions, if asked."""
        kept = None
        for _ in range(self.depth - 1):
            going = (i > 0).nonzero()[:, 0]
            if not len(going):
                break
            at, said = i[going], None
            look, self.calls = self._eyes(None, rows[going]).scattered(x[going], at, self.chance, self.calls)
            said = look.prediction
            if kept is None:
                kept = said.new_zeros(len(x), *said.shape[1:])
                kept[going] = said
            ahead = self.world.kernel(x[going], said, at).sample(1, self.chance)[0][:, 0]
            x, i = x.index_copy(0, going, ahead), i.index_copy(0, going, at - 1)
        look, self.calls = self._eyes(self.judge, rows).scattered(x, i, self.chance, self.calls, "child", predict=False)
        return look.value, look.prediction if self.depth == 1 else kept

    def _back_up(self, rows, node):
        """New values and counts from node (n,) up to node 0."""
        while len(rows):
            at = rows[:, None], self.first[rows, node][:, None] + self.places
            log_p, value, visits = self.log_p[at], self.value[at], self.visits[at]
            if self.backup == "soft":
                worth = self.beta * (log_p + value / self.beta).logsumexp(1)
            elif self.backup == "max":
                worth = value.masked_fill(log_p.isneginf(), -math.inf).amax(1)
            else:
                share = log_p.exp() * visits
                worth = (share * value).sum(1) / share.sum(1)
            self.value[rows, node], self.visits[rows, node] = worth, visits.sum(1)
            self.known[rows, node] = self.known[at].all(1)
            node = self.parent[rows, node]
            rows, node = rows[node >= 0], node[node >= 0]

    def _eyes(self, value, rows):
        each = isinstance(self.condition, torch.Tensor) and self.condition.ndim
        return Eyes(
            self.world, self.reward, value, condition=self.condition[rows] if each else self.condition, chunk=self.chunk
        )
