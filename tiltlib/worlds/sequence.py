"""Masked diffusion of a Markov chain over a small alphabet: a discrete world whose conditionals are exact.

A sequence is `length` tokens 0 .. V-1; a noised one has some of them replaced by the mask, token V. Time runs down from
i = steps (all masked) to i = 0 (none). The network of a trained model is replaced by forward-backward, which gives
p(x_0 token | unmasked tokens) exactly at any length; at short lengths everything else is exact too, by enumeration.

A step unmasks several tokens independently of each other, so with few steps the world samples another law than the
chain: `law()` is the law of this sampler (what steering tilts), `data_law()` that of the chain (its limit in steps).
Masking and its reverse step: Sahoo et al. 2024 (MDLM), eqs. (6) and (7), with the mask probability m = 1 - alpha.
"""

import string

import numpy as np
import torch

from tiltlib import law, paths

MAX_MOVES = 10_000_000  # enumeration: (2 V + 1)^length moves of one step are held in memory
RNA = "ACGU"


class Sequence:
    """Masked diffusion of the Markov chain (initial, transition) on sequences of `length` tokens.

    initial: law (V,) of the first token, V >= 2; transition: (V, V), each row the law of the next token. Both must be
    > 0 everywhere: a step unmasks tokens independently, and must never make a sequence that the chain cannot.
    steps >= 1; schedule: "linear" (m_i = i/steps), "cosine" (m_i = sin(pi i / 2 steps)), or the mask probabilities
    (steps + 1,) themselves, increasing from 0 to 1. alphabet: V letters, for `text` and `tokens`.

    Shapes: x (n, length), integer tokens 0 .. V; or, to differentiate by x, the relaxed `one_hot(x)`, float64
    (n, length, V + 1), which `predict` and `clean` take as well. Predictions (n, length, V), float64.
    """

    def __init__(self, initial, transition, length, steps, schedule="linear", alphabet=None):
        initial = law.check_law(initial, "initial")
        rows = np.asarray(transition, dtype=np.float64)
        if rows.shape != (initial.size, initial.size):
            raise ValueError(f"transition must have shape {(initial.size,) * 2} as initial has, not {rows.shape}")
        rows = np.stack([law.check_law(row, f"row {k} of transition") for k, row in enumerate(rows)])
        if initial.size < 2:
            raise ValueError("a chain needs at least two tokens")
        if not (initial.all() and rows.all()):
            raise ValueError("initial and transition must be > 0 everywhere: tokens are unmasked independently")
        self.length, self.steps = law.check_count(length, "length"), law.check_count(steps, "steps")
        self.vocabulary = self.mask = initial.size
        self.shape = (self.length,)
        self.alphabet = (string.digits + string.ascii_letters)[: self.mask] if alphabet is None else alphabet
        if len(set(self.alphabet)) != self.vocabulary or len(self.alphabet) != self.vocabulary:
            raise ValueError(f"alphabet must hold {self.vocabulary} different letters, not {self.alphabet!r}")
        self.initial, self.transitions = torch.from_numpy(initial), torch.from_numpy(rows)
        self.masked = _schedule(schedule, self.steps)  # (steps + 1,) probability that a token is masked at step i
        # what a token says about the clean one: a letter fixes it, the mask allows all; (V + 1, V)
        self._evidence = torch.cat([torch.eye(self.mask), torch.ones(1, self.mask)]).double()
        self._enumerated = None

    # --- the World protocol

    def start(self, n, chance):
        """n particles at i = steps: every token masked, (n, length)."""
        return torch.full((law.check_count(n), self.length), self.mask, device=chance.generator.device)

    def tilted_start(self, n, chance, r=None, beta=None):
        """x at i = steps under any tilt: there is only one such state, so `start` is tilted already."""
        return self.start(n, chance)

    def predict(self, x, i=None, condition=None):
        """log p(x_0 token at l | unmasked tokens elsewhere), (n, length, V): finite everywhere, exact, at every i.

        At a masked position this is the law of its clean token. At an unmasked one it is what the others say about
        it, which no step uses but which keeps guidance (differences of predictions) free of infinities.
        """
        if condition is not None:
            raise ValueError(f"Sequence knows no condition, not {condition!r}: it has one chain, without classes")
        evidence = self._read(x)
        forward, backward = [self.initial.to(evidence.device).expand(evidence.shape[0], -1)], [None] * self.length
        rows = self.transitions.to(evidence.device)
        for l in range(self.length - 1):
            forward.append(_normalise(forward[-1] * evidence[:, l]) @ rows)
        backward[-1] = torch.ones_like(forward[0])
        for l in range(self.length - 1, 0, -1):
            backward[l - 1] = _normalise(backward[l] * evidence[:, l]) @ rows.T
        joint = torch.stack(forward, 1) * torch.stack(backward, 1)
        return _normalise(joint).log()

    def kernel(self, x, prediction, i):
        """One reverse step i -> i - 1, (n, length, V + 1) logits: an unmasked token is kept; a masked one stays masked
        with probability m_{i-1}/m_i, and else becomes token v with the predicted probability. i: an integer or (n,).
        """
        masked = x == self.mask
        stay = self._at(x, i - 1) / self._at(x, i)
        moves = torch.log_softmax(prediction.double(), -1) + torch.log1p(-stay)[..., None]
        moves = torch.cat([moves, stay.log().expand(masked.shape)[..., None]], -1)
        kept = torch.where(self.one_hot(x) > 0, 0.0, -torch.inf)
        return paths.CategoricalKernel(torch.where(masked[..., None], moves, kept))

    def clean(self, x, prediction, i=None):
        """Probabilities (n, length, V) of the clean tokens, the discrete E[x_0 | x_i]: predicted where x is masked, the
        token itself elsewhere. Differentiable by the prediction, and by x where that is one_hot(x).
        """
        return _normalise(torch.softmax(prediction.double(), -1) * self._read(x))

    def renoise(self, x, i_from, i_to, chance):
        """Masks each unmasked token with probability (m_to - m_from) / (1 - m_from); i_from <= i_to, integers or (n,).

        From clean sequences (i_from = 0) that is the forward process.
        """
        before, after = self._at(x, i_from), self._at(x, i_to)
        if (after < before).any():
            raise ValueError(f"noise is added from i_from to a later or equal i_to, not from {i_from} to {i_to}")
        hide = (after - before) / (1 - before).clamp(min=torch.finfo(before.dtype).tiny)
        return torch.where(chance.uniforms(x.shape, device=x.device) < hide, self.mask, x)

    # --- sequences

    def one_hot(self, x):
        """float64 (n, length, V + 1) of tokens (n, length); the relaxation by which values are differentiated."""
        return torch.nn.functional.one_hot(x, self.mask + 1).double()

    def draw(self, n, chance):
        """n independent sequences of the chain itself, (n, length)."""
        initial, rows = (p.log().to(chance.generator.device) for p in (self.initial, self.transitions))
        tokens = [chance.categoricals(initial.expand(law.check_count(n), -1))]
        for _ in range(self.length - 1):
            tokens.append(chance.categoricals(rows[tokens[-1]]))
        return torch.stack(tokens, 1)

    def log_prob(self, x):
        """Log-probability (n,) of complete sequences under the chain."""
        if (self._check(x) == self.mask).any():
            raise ValueError("log_prob needs complete sequences; a token is masked")
        return self.initial.log()[x[:, 0]] + self.transitions.log()[x[:, :-1], x[:, 1:]].sum(1)

    def text(self, x):
        """A list of n strings in the alphabet, "_" for the mask."""
        letters = np.array([*self.alphabet, "_"])
        return ["".join(row) for row in letters[self._check(x).cpu().numpy()]]

    def tokens(self, strings):
        """The tokens (n, length) of a list of n strings; the inverse of `text`. ValueError: length or letter."""
        index = {letter: k for k, letter in enumerate([*self.alphabet, "_"])}
        if any(len(s) != self.length or set(s) - set(index) for s in strings):
            raise ValueError(f"strings must have {self.length} letters of {self.alphabet!r} or '_'")
        return torch.tensor([[index[letter] for letter in s] for s in strings]).reshape(len(strings), self.length)

    # --- everything, by enumeration: states are numbered in base V + 1, sequences in base V, first token first

    @property
    def states(self):
        """Number of noised states, (V + 1)^length."""
        return (self.mask + 1) ** self.length

    def all_states(self):
        """All noised states (states, length), in the order of `index`."""
        return self._moves()["states"]

    def sequences(self):
        """All complete sequences (V^length, length): the alphabet of `law`, `data_law` and of reward tables."""
        return self.all_states()[self._complete()]

    def index(self, x):
        """Number (n,) of each state of x (n, length)."""
        return self._check(x) @ self._powers(x.device)

    def data_law(self):
        """Law of the chain on `sequences()`, numpy float64 (V^length,)."""
        return self.log_prob(self.sequences()).exp().numpy()

    def law(self):
        """Law of x_0 under this sampler on `sequences()`, numpy float64 (V^length,): the reference of its tilts."""
        return self.marginal(0)[self._complete().numpy()]

    def marginal(self, i):
        """Law of x_i under this sampler on `all_states()`, numpy float64 (states,)."""
        moves, p = self._moves(), torch.zeros(self.states, dtype=torch.float64)
        p[-1] = 1.0  # all masked is the last state
        for j in range(self.steps, self._check_step(i), -1):
            p = torch.zeros_like(p).index_add_(0, moves["to"], p[moves["from"]] * self._log_moves(j).exp())
        return p.numpy()

    def transition(self, i):
        """Matrix p(x_{i-1} = column | x_i = row) on `all_states()`, numpy float64 (states, states)."""
        moves, dense = self._moves(), torch.zeros(self.states, self.states, dtype=torch.float64)
        return dense.index_put_((moves["from"], moves["to"]), self._log_moves(self._check_step(i, 1)).exp()).numpy()

    def posterior(self, x):
        """p(x_0 | unmasked tokens of x) under the chain, over `sequences()`: torch float64 (n, V^length)."""
        allowed = ((x[:, None] == self.sequences()) | (x[:, None] == self.mask)).all(-1)
        return _normalise(allowed * torch.from_numpy(self.data_law()))

    # Rewards r below are tables (V^length,) over `sequences()`, or callables on sequences (n, length).

    def tilted_law(self, r, beta):
        """The target of steering: `law()` times exp(r / beta) / Z, numpy float64 (V^length,)."""
        return law.tilt(self.law(), self._table(r), beta)

    def log_z(self, r, beta):
        """log E[exp(r(x_0) / beta)] under this sampler."""
        return law.log_partition(self.law(), self._table(r), beta)

    def soft_values(self, r, beta):
        """beta log E[exp(r(x_0)/beta) | x_i] under this sampler: numpy float64 (steps + 1, states), by soft Bellman.

        Row 0 is the reward, NaN for states with a mask, which i = 0 has none of.
        """
        beta = law.check_beta(beta)
        moves, rows = self._moves(), [self._last(r) / beta]
        for i in range(1, self.steps + 1):
            log_p = self._log_moves(i)
            terms = torch.where(log_p > -torch.inf, log_p + rows[-1][moves["to"]], -torch.inf)
            top = torch.full_like(rows[-1], -torch.inf).scatter_reduce_(0, moves["from"], terms, "amax")
            sums = torch.zeros_like(top).index_add_(0, moves["from"], (terms - top[moves["from"]]).exp())
            rows.append(top + sums.log())
        return beta * torch.stack(rows).numpy()

    def hard_values(self, r):
        """E[r(x_0) | x_i] under this sampler: numpy float64 (steps + 1, states); row 0 as in `soft_values`."""
        moves, rows = self._moves(), [self._last(r)]
        for i in range(1, self.steps + 1):
            log_p = self._log_moves(i)
            terms = torch.where(log_p > -torch.inf, log_p.exp() * rows[-1][moves["to"]], 0.0)
            rows.append(torch.zeros_like(rows[-1]).index_add_(0, moves["from"], terms))
        return torch.stack(rows).numpy()

    # --- inside

    def _check(self, x):
        if not isinstance(x, torch.Tensor) or x.dtype != torch.int64 or x.ndim != 2 or x.shape[1] != self.length:
            what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"x must hold integer tokens (int64) of shape (n, {self.length}), not {what}")
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= self.mask:
            raise ValueError(f"tokens run from 0 to {self.mask} (the mask)")
        return x

    def _read(self, x):
        """Evidence (n, length, V) about the clean tokens, from tokens or from their relaxation."""
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            if x.ndim != 3 or x.shape[1:] != (self.length, self.mask + 1):
                raise ValueError(f"a relaxed x has shape (n, {self.length}, {self.mask + 1}), not {tuple(x.shape)}")
            return x.double() @ self._evidence.to(x.device)
        return self._evidence.to(self._check(x).device)[x]

    def _check_step(self, i, lowest=0):
        if not lowest <= i <= self.steps:
            raise ValueError(f"step {i} is outside the grid {lowest} .. {self.steps}")
        return i

    def _at(self, x, i):
        """Mask probability at step i, a tensor () or (n, 1). ValueError: a step outside the grid."""
        like = torch.empty_like(x, dtype=torch.float64)
        return torch.as_tensor(paths.at(self.masked, i, like), dtype=torch.float64, device=x.device)

    def _powers(self, device=None):
        return (self.mask + 1) ** torch.arange(self.length - 1, -1, -1, device=device)

    def _complete(self):
        return (self.all_states() < self.mask).all(1)

    def _moves(self):
        """Every possible move of one reverse step: from, to (state numbers), its predicted log-probability, and how
        many tokens it unmasks and leaves masked. A position keeps a token (V ways), unmasks one (V), or stays masked.
        """
        if self._enumerated is None:
            if (2 * self.mask + 1) ** self.length > MAX_MOVES:
                raise ValueError(
                    f"{self.mask} tokens at length {self.length} have {(2 * self.mask + 1) ** self.length:.1e} moves, "
                    f"too many to enumerate (limit {MAX_MOVES:.0e}): shorten the sequences"
                )
            tokens, mask = torch.arange(self.mask), torch.tensor([self.mask])
            states = torch.cartesian_prod(*[torch.arange(self.mask + 1)] * self.length).reshape(-1, self.length)
            before = torch.cat([tokens, mask.expand(self.mask), mask])
            after = torch.cat([tokens, tokens, mask])
            said = torch.cat([self.predict(part) for part in states.split(65536)])
            said = torch.nn.functional.pad(said, (0, 1))  # staying masked: nothing predicted
            start = end = torch.zeros(1, dtype=torch.int64)
            for power in self._powers():
                start = (start[:, None] + before * power).reshape(-1)
                end = (end[:, None] + after * power).reshape(-1)
            log_p, freed = torch.zeros(len(start), dtype=torch.float64), torch.zeros_like(start)
            for l in range(self.length):
                freed_here = (states[start, l] == self.mask) & (states[end, l] < self.mask)
                log_p += torch.where(freed_here, said[start, l, states[end, l]], 0.0)
                freed += freed_here
            stays = (states == self.mask).sum(1)[end]
            moves = {"from": start, "to": end, "log_p": log_p, "freed": freed, "stays": stays.double()}
            self._enumerated = {"states": states, **moves}
        return self._enumerated

    def _log_moves(self, i):
        """Log-probability of every move at the step i -> i - 1."""
        moves, stay = self._moves(), self.masked[i - 1] / self.masked[i]
        # 0 log 0 = 0: at the last step no token stays masked, and a move that leaves none masked costs nothing
        return moves["log_p"] + moves["freed"] * torch.log1p(-stay) + torch.special.xlogy(moves["stays"], stay)

    def _table(self, r):
        r = np.asarray(r(self.sequences()) if callable(r) else r)
        return law.check_reward(r, np.empty(self.vocabulary**self.length))

    def _last(self, r):
        """The reward on all states, NaN where a token is masked."""
        row = torch.full((self.states,), torch.nan, dtype=torch.float64)
        row[self._complete()] = torch.from_numpy(self._table(r))
        return row


def rna(length, steps, schedule="linear"):
    """A `Sequence` over A, C, G, U: a chain rich in G and C whose neighbours are not independent."""
    after = {"A": [28, 22, 30, 20], "C": [24, 26, 28, 22], "G": [26, 34, 22, 18], "U": [18, 30, 30, 22]}  # per cent
    rows = np.array([after[letter] for letter in RNA]) / 100
    return Sequence(np.array([22, 26, 34, 18]) / 100, rows, length, steps, schedule, alphabet=RNA)


def _normalise(weights):
    return weights / weights.sum(-1, keepdim=True)


def _schedule(schedule, steps):
    grid = torch.arange(steps + 1, dtype=torch.float64) / steps
    if isinstance(schedule, str):
        if schedule not in ("linear", "cosine"):
            raise ValueError(f"unknown schedule {schedule!r}; known: linear, cosine, or the mask probabilities")
        masked = grid if schedule == "linear" else torch.sin(torch.pi / 2 * grid)
    else:
        masked = torch.from_numpy(law.check_vector(schedule, "schedule"))
    if masked.shape != grid.shape or masked[0] != 0 or masked[-1] != 1 or not (masked.diff() > 0).all():
        raise ValueError(f"mask probabilities must be {steps + 1} numbers that increase from 0 to 1")
    return masked
