"""The rows of the particle loop: what makes a method of steering, and nothing else.

    base               the model itself                      importance, soft_best_of_n   weights r / beta at the end
    best_of_n          the best of K                          svdd, svdd_greedy            one child of each parent
    smc (= fk)         twisted by the value, resampled        fk_max, fk_sum               its running max or sum
    nested             SVDD that keeps its weights            beam                         the K best of all children
    tds, das           SMC with a gradient drift              gradient_guidance            DPS: the drift, no weights
    classifier_guidance  DPS from a tilted start

Each function returns a `Method`; `METHODS` holds those that need no options.
"""

import math

import torch

from tiltlib import law, resampling
from tiltlib.steer.loop import Method

# ------------------------------------------------------------------------------------------------------------ select


def keep(log_w, chance):
    """Every particle keeps its one child and its weight."""
    return None, log_w[..., 0]


keep.one_child = True


def siblings(greedy):
    """One child of each parent, in proportion to its weight or the best; the weights are then forgotten (SVDD)."""

    def select(log_w, chance):
        child = _best(log_w) if greedy else chance.categoricals(log_w)
        return _flat(child, log_w), torch.zeros_like(log_w[..., 0])

    return select


def nested(ess=0.5, scheme="systematic"):
    """One child of each parent in proportion to its weight; the parent goes on with the mean weight, and competes."""
    compete = population(ess, scheme)

    def select(log_w, chance):
        child = _flat(chance.categoricals(log_w), log_w)
        means = log_w.logsumexp(-1) - math.log(log_w.shape[-1])
        index, means = compete(means.unsqueeze(-1), chance)
        return child if index is None else child.gather(1, index), means

    return select


def population(ess=0.5, scheme="systematic"):
    """All children of a run compete for its K places, where their effective sample size is below `ess` K M.

    ess: 0 never resamples, 1 always (also when all weights are equal). With several children they always compete,
    since only K can go on. scheme: one of `resampling.SCHEMES`. ValueError: ess outside [0, 1], unknown scheme.
    """
    resampling.check_scheme(scheme)
    if isinstance(ess, bool) or not isinstance(ess, (int, float)) or not 0 <= ess <= 1:
        raise ValueError(f"the ESS threshold must be a number in [0, 1], not {ess!r}")

    def select(log_w, chance):
        runs, k, m = log_w.shape
        flat = log_w.flatten(1)
        share = effective_size(flat) / (k * m)
        if share.isnan().any():
            raise ValueError("all weights of a run are zero (log-weights -inf): nothing can be chosen")
        need = (share <= ess) if ess == 1 else (share < ess)
        need = need | (m > 1) | torch.full_like(need, ess == 1)
        if not need.any():
            return None, log_w[..., 0]
        index = torch.arange(k, device=log_w.device).expand(runs, -1).clone()
        index[need] = resampling.ancestors(flat[need], k, chance, scheme)
        mean = (flat.logsumexp(1, keepdim=True) - math.log(k * m)).expand(-1, k)
        return index, torch.where(need[:, None], mean, flat[:, :k])

    select.ess = ess  # read by the searches: their conditional form has the same threshold
    return select


def effective_size(log_w):
    """(sum w)^2 / sum w^2 (B,) of log-weights (B, K): as `chance.effective_sample_size`, unchecked and so faster.

    NaN where all weights are zero.
    """
    w = (log_w - log_w.amax(1, keepdim=True)).exp_()
    return w.sum(1).square() / torch.linalg.vecdot(w, w)


def survivors(copies, scheme="systematic"):
    """K / copies of all children go on, `copies` times each, one block after the other: for waste-free moves.

    ValueError: K is no multiple of `copies`, unknown scheme.
    """
    resampling.check_scheme(scheme)

    def select(log_w, chance):
        k, flat = log_w.shape[1], log_w.flatten(1)
        if k % copies:
            raise ValueError(f"{k} particles cannot be {copies} copies of as many survivors")
        index = resampling.ancestors(flat, k // copies, chance, scheme).repeat(1, copies)
        return index, (flat.logsumexp(1, keepdim=True) - math.log(flat.shape[1])).expand(-1, k)

    return select


def top(log_w, chance):
    """The K best of all K M children of a run, with their weights: a beam."""
    flat = log_w.flatten(1)
    index = flat.topk(log_w.shape[1]).indices.sort(1).values
    return index, flat.gather(1, index)


def _flat(child, log_w):
    """Positions among K * M of one child (B, K) of each parent."""
    return torch.arange(log_w.shape[1], device=log_w.device) * log_w.shape[2] + child


def _best(log_w):
    return log_w.argmax(-1)


# ------------------------------------------------------------------------------------------------------------ temper


def exponential(rate=0.05):
    """lam = min((1 + rate)^j - 1, 1) after j steps (Kim, Kim and Park 2025, DAS). ValueError: rate not positive."""
    _positive(rate, "rate")

    def temper(log_w, worth, lam, i, steps):
        return torch.full_like(lam, min((1 + rate) ** (steps - i) - 1, 1.0))

    return temper


def linear(share=1.0):
    """lam grows in equal parts to one at `share` of the steps. ValueError: share outside (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], not {share!r}")

    def temper(log_w, worth, lam, i, steps):
        return torch.full_like(lam, min((steps - i) / (share * steps), 1.0))

    return temper


def adaptive(ess=0.5):
    """The largest lam <= 1 that keeps the effective sample size of the present particles at `ess` K, by bisection.

    Where the weights are below that already, lam stays. It never goes down. ValueError: ess outside (0, 1).
    """
    if not 0 < ess < 1:
        raise ValueError(f"ess must be in (0, 1), not {ess!r}")

    def temper(log_w, worth, lam, i, steps):
        goal = ess * log_w.shape[1]

        def enough(to):
            return effective_size(log_w + (to - lam)[:, None] * worth) >= goal

        low, high = lam.clone(), torch.ones_like(lam)
        reached = enough(high)
        for _ in range(40):  # the interval is below 1e-12 then
            middle = (low + high) / 2
            fine = enough(middle)
            low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
        return torch.where(reached, torch.ones_like(lam), low)

    return temper


def _positive(x, name):
    if not 0 < x < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {x!r}")


# ------------------------------------------------------------------------------------------------------------- drift


def gradient(world, look, i, heat):
    """g = lam / beta times the gradient of the value: to first order the best proposal for small steps."""
    return look.grad * heat.view(-1, *[1] * (look.grad.ndim - 1)).to(look.grad)


def posterior(world, look, i, heat):
    """TDS: E[x_0 | x_i] moves by sigma^2 / alpha times the gradient, and the kernel's mean with it (Wu et al. 2023).

    On worlds without an affine path it is `gradient`.
    """
    g = gradient(world, look, i, heat)
    if not hasattr(world, "coef"):
        return g
    std, alpha, sigma = float(world.coef.std[i]), float(world.grid.alpha[i]), float(world.grid.sigma[i])
    if std == 0 or alpha == 0:  # nothing is drawn; or x_0 is unknown, and the shift would have no bound
        return g * 0
    return g * (float(world.coef.x0[i]) * sigma**2 / alpha / std**2)


# -------------------------------------------------------------------------------------------------------------- rows


def base():
    """The model itself: K samples of equal weight."""
    return Method(keep, weigh=False, proper=False)


def importance():
    """Samples of the model weighed by exp(r / beta). A draw by weight is soft best-of-K (Verdun et al. 2025)."""
    return Method(keep)


def best_of_n():
    """K samples of the model; `draw` returns the one of the highest reward, which is not a draw from the tilt."""
    return Method(keep, finish="best")


def svdd(children=4, greedy=False):
    """Soft value-based decoding (Li et al. 2024): M children, one chosen in proportion to exp(v / beta), or the best.

    Chains do not compete, so nothing corrects what finite M leaves out: it is not exact at any beta.
    """
    return Method(siblings(greedy), "last", children=law.check_count(children, "children"), proper=False)


def smc(ess=0.5, scheme="systematic", potential="last"):
    """Sequential Monte Carlo twisted by values; with `potential` "max" or "sum" Feynman-Kac steering's other two.

    (Singhal et al. 2025.) Their "difference" potential is "last". ValueError: unknown potential, ess outside [0, 1].
    """
    if potential not in ("last", "max", "sum"):
        raise ValueError(f"unknown potential {potential!r}; known: last (difference), max, sum")
    return Method(population(ess, scheme), potential)


def nested_smc(children=4, ess=0.5):
    """Nested SMC: SVDD's choice among siblings, with weights kept and parents that compete."""
    return Method(nested(ess), "last", children=law.check_count(children, "children"))


def beam(children=4):
    """Beam search: the K children of the highest value go on, whoever their parents are; `draw` returns the best.

    Its law is another than the tilt, at any K and M: it tends to the maximum of the value among what is proposed.
    """
    return Method(top, "last", children=law.check_count(children, "children"), finish="best", proper=False)


def tds(ess=0.5):
    """Twisted diffusion sampler (Wu et al. 2023): SMC whose proposal moves E[x_0 | x_i] along the gradient."""
    return Method(population(ess), "last", posterior)


def guided(ess=0.5, order=None, moves=0):
    """SMC whose proposal follows the value's own gradient: with `gaussian_values.value` no backward pass is needed.

    With a value that has none, it is `tds`. order, moves: as in `Method`.
    """
    moves = law.check_count(moves, "moves") if moves else 0
    return Method(population(ess), "last", posterior, order=order, moves=moves)


def waste_free(moves=3, drift=True):
    """Waste-free SMC (Dau and Chopin 2022): 1 / (moves + 1) of the particles survive a step; each, and the states of
    its `moves` moves, are the particles of the next. drift: as in `guided`, or the model's own steps."""
    moves = law.check_count(moves, "moves")
    return Method(survivors(moves + 1), "last", posterior if drift else None, moves=moves, waste_free=True)


def das(ess=0.5, tempering=None, drift=True):
    """DAS (Kim, Kim and Park 2025): tempered SMC. tempering: `adaptive()` (the default), `exponential`, `linear`.

    drift: with the gradient proposal, tempered by the next lam; without, proposals are the model's own.
    """
    return Method(population(ess), "last", gradient if drift else None, temper=tempering or adaptive())


def gradient_guidance(start="own"):
    """DPS: the drift alone, and no weights. With exact soft values, start="tilted" and small steps it is Doob's
    transform; from the model's own start, and at finite steps, the law is another (Chung et al. 2023)."""
    if start not in ("own", "tilted"):
        raise ValueError(f'start must be "own" or "tilted", not {start!r}')
    return Method(keep, "last", gradient, start=start, weigh=False, proper=False)


METHODS = {
    "base": base(),
    "importance": importance(),
    "soft_best_of_n": importance(),
    "best_of_n": best_of_n(),
    "svdd": svdd(),
    "svdd_greedy": svdd(greedy=True),
    "smc": smc(),
    "fk": smc(),
    "fk_max": smc(potential="max"),
    "fk_sum": smc(potential="sum"),
    "nested": nested_smc(),
    "beam": beam(),
    "tds": tds(),
    "das": das(),
    "gradient_guidance": gradient_guidance(),
    "classifier_guidance": gradient_guidance("tilted"),
}
