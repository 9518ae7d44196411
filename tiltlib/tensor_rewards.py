"""Rewards of tensors: points and states, images, sequences of tokens. Rewards of texts are in `tiltlib.rewards`.

Two files, so that a change to the one does not make chapters stale that rest on the other.
"""

import math
import zlib

import numpy as np
import torch

from tiltlib import law
from tiltlib.rewards import Reward

# ------------------------------------------------------------------------------------------------- points and states


def linear(vector, constant=0.0) -> Reward:
    """<vector, x> + constant of points x (n, d); differentiable. Exact values and tilts exist on `Mixture`."""
    from tiltlib.worlds.mixture import Quadratic

    return Reward("linear", Quadratic(vector, constant=constant), "points", differentiable=True)


def quadratic(centre, strength) -> Reward:
    """-strength/2 |x - centre|^2 of points x (n, d), at most 0 for strength > 0; differentiable, exact on `Mixture`."""
    from tiltlib.worlds.mixture import Quadratic

    low, high = (-math.inf, 0.0) if strength >= 0 else (0.0, math.inf)
    return Reward("quadratic", Quadratic.around(centre, strength), "points", low, high, differentiable=True)


def table(r) -> Reward:
    """r[x] of states x (n,) of a finite world, r (K,); of probabilities x (n, K) the mean reward, differentiable.

    Raises ValueError for a table that is empty or not finite.
    """
    r = torch.from_numpy(law.check_reward(r))

    def look_up(x):
        return x @ r.to(x) if x.is_floating_point() else r.to(x.device)[x]

    return Reward("table", look_up, "points", float(r.min()), float(r.max()), differentiable=True)


# ------------------------------------------------------------------------------------------------------------- images
# Images are (n, channels, height, width), black -1 to white 1. A prediction E[x_0 | x_t] may leave that range.


def brightness() -> Reward:
    """Mean intensity of an image, black 0 to white 1; differentiable, linear."""
    return Reward("brightness", lambda x: (x.flatten(1).mean(1) + 1) / 2, "mean intensity", differentiable=True)


def symmetry() -> Reward:
    """Minus the mean squared difference of an image and its left-right mirror image, at most 0; differentiable."""
    return Reward(
        "symmetry", lambda x: -(x - x.flip(-1)).square().flatten(1).mean(1), "squared intensity", high=0.0,
        differentiable=True,
    )  # fmt: skip


def closeness(reference, mask=None) -> Reward:
    """-|mask (x - reference)|^2, at most 0; differentiable. With a mask of the known pixels: inpainting.

    Tilting by it at beta = 2 s^2 is conditioning on the reference seen through noise of standard deviation s.
    reference: one sample (*shape); mask: 0 or 1, broadcastable to it.
    """
    mask = torch.ones(()) if mask is None else mask

    def closeness(x):
        if x.shape[1:] != reference.shape:
            raise ValueError(f"samples {tuple(x.shape[1:])} do not fit the reference {tuple(reference.shape)}")
        return -(mask.to(x) * (x - reference.to(x))).square().flatten(1).sum(1)

    return Reward("closeness", closeness, "squared distance", high=0.0, differentiable=True)


def class_log_probability(classifier, label) -> Reward:
    """log p(label | x) in nats by any differentiable classifier: x (n, ...) -> logits (n, classes).

    Raises ValueError when called, for a label that the classifier does not know.
    """

    def score(x):
        logits = classifier(x)
        if not 0 <= label < logits.shape[-1]:
            raise ValueError(f"label {label} is not among the {logits.shape[-1]} classes 0 .. {logits.shape[-1] - 1}")
        return logits.log_softmax(-1)[:, label]

    return Reward(f"class_log_probability({label})", score, "nats", high=0.0, differentiable=True)


def compressibility(levels=256) -> Reward:
    """Minus the bytes of an image under zlib, after rounding to `levels` grey levels; below 0; a black box."""
    if not 2 <= levels <= 256:
        raise ValueError(f"levels must be between 2 and 256, not {levels}")

    def score(x):
        pixels = ((x.detach().double().clamp(-1, 1) + 1) / 2 * (levels - 1)).round().to(torch.uint8).cpu().numpy()
        return torch.tensor([-float(len(zlib.compress(image.tobytes(), 9))) for image in pixels], device=x.device)

    return Reward("compressibility", score, "bytes", high=0.0)


def strokes(threshold=0.0) -> Reward:
    """How many strokes a horizontal line crosses: runs of pixels above the threshold in a row, 0 to (width + 1)/2,
    averaged over the rows that have any; a black box. A bar scores 1, a ring nearly 2, an empty image 0.
    """

    def score(x):
        ink = x.detach().mean(1) > threshold
        runs = (ink & ~torch.nn.functional.pad(ink, (1, 0))[..., :-1]).sum(-1)
        return runs.sum(-1) / (runs > 0).sum(-1).clamp(min=1)

    return Reward("strokes", score, "strokes", low=0.0)


# ---------------------------------------------------------------------------------------------------------- sequences

RNA = "ACGU"
# Stacking energies in kcal/mol at 37 C of Xia et al. 1998: two neighbouring Watson-Crick pairs, named by the two
# letters of one strand, 5' to 3'; the other strand reads the reverse complement, which has the same energy.
STACKS = {
    "AA": -0.93, "AU": -1.10, "UA": -1.33, "CU": -2.08, "CA": -2.11, "GU": -2.24, "GA": -2.35, "CG": -2.36,
    "GG": -3.26, "GC": -3.42, "UU": -0.93, "AG": -2.08, "UG": -2.11, "AC": -2.24, "UC": -2.35, "CC": -3.26,
}  # fmt: skip
LOOP = 4.5  # kcal/mol for every loop, whatever its kind and size: a round number near that of small hairpins
HAIRPIN = 3  # fewest letters in a hairpin
FORBIDDEN = 10**6  # hundredths of kcal/mol: more than any structure can make up for


def motif(pattern, alphabet=RNA) -> Reward:
    """How often `pattern` occurs in sequences of tokens (n, length), overlaps counted.

    Of token probabilities (n, length, V): the mean count under independent tokens, differentiable.
    Raises ValueError for a pattern that is empty, longer than the sequences, or not in the alphabet, and for a mask.
    """
    if not pattern or set(pattern) - set(alphabet):
        raise ValueError(f"pattern must be letters of {alphabet!r}, not {pattern!r}")
    wanted = [alphabet.index(letter) for letter in pattern]

    def count(x):
        if not x.is_floating_point():
            x = torch.nn.functional.one_hot(_complete(x, alphabet), len(alphabet)).double()
        if x.shape[-1] != len(alphabet) or x.shape[1] < len(wanted):
            wish = f"(n, length >= {len(wanted)}, {len(alphabet)})"
            raise ValueError(f"probabilities {tuple(x.shape)} do not fit {pattern!r}: {wish}")
        last = x.shape[1] - len(wanted) + 1
        return torch.stack([x[:, k : k + last, token] for k, token in enumerate(wanted)]).prod(0).sum(1)

    return Reward(f"motif({pattern})", count, "occurrences", low=0.0, differentiable=True)


def folding(engine="stacking") -> Reward:
    """Minus the minimum free energy of RNA sequences, tokens (n, length) of "ACGU"; at least 0; a black box.

    engine: "stacking", the small model of `fold`; or "seqfold" or "vienna", if that package is installed
    (ImportError otherwise). In kcal/mol. Raises ValueError for an unknown engine.
    """
    if engine == "stacking":

        def energies(x):
            return _energies(x.cpu().numpy())[1][:, 0, x.shape[1]] / 100

    elif engine == "seqfold":
        dg = _imported("seqfold").dg

        def energies(x):
            return [min(dg(text, temp=37.0), 0.0) for text in _letters(x)]

    elif engine == "vienna":
        fold = _imported("RNA", "ViennaRNA").fold

        def energies(x):
            return [fold(text)[1] for text in _letters(x)]

    else:
        raise ValueError(f"unknown engine {engine!r}; known: stacking, seqfold, vienna")

    def score(x):
        values = -np.asarray(energies(_complete(x, RNA)), dtype=np.float64)
        return torch.from_numpy(values + 0.0).to(x.device)  # + 0: no minus zero

    return Reward(f"folding({engine})", score, "kcal/mol", low=0.0)


def fold(text):
    """(energy, structure) of one RNA string: its minimum free energy in kcal/mol, and dots and brackets.

    A model of Watson-Crick pairs without crossings: neighbouring pairs (i, j), (i+1, j-1) earn their stacking energy
    (Xia et al. 1998), any other pair closes a loop and costs `LOOP`. No wobble pairs, no loop sizes: enough to make
    stems of G and C worth having. Raises ValueError for letters other than ACGU.
    """
    if not text or set(text) - set(RNA):
        raise ValueError(f"an RNA string has letters {RNA}, not {text!r}")
    codes = np.array([[RNA.index(letter) for letter in text]])
    paired, best = (table[0] for table in _energies(codes))
    structure, todo = ["."] * len(text), [(0, len(text), False)]
    while todo:  # an interval i .. j - 1, and whether its ends are known to pair
        i, j, closed = todo.pop()
        if closed:
            structure[i], structure[j - 1] = "(", ")"
            todo.append((i + 1, j - 1, paired[i, j] < round(100 * LOOP) + best[i + 1, j - 1]))
        elif j > i and best[i, j] == best[i + 1, j]:
            todo.append((i + 1, j, False))
        elif j > i:
            k = next(k for k in range(i + 1, j + 1) if best[i, j] == paired[i, k] + best[k, j])
            todo += [(i, k, True), (k, j, False)]
    return float(best[0, len(text)]) / 100, "".join(structure)


def _energies(codes):
    """Tables (n, length + 1, length + 1) of the least energy on letters i .. j - 1: with i and j - 1 paired, and any.

    In hundredths of kcal/mol, so exact. Nussinov's recursion (Nussinov and Jacobson 1980) with stacking; codes
    (n, length) are numbers in "ACGU". Sequences are the last axis while it runs, which is ten times as fast.
    """
    letters = codes.T
    length, n = letters.shape
    stacks = np.array([[round(100 * STACKS[a + b]) for b in RNA] for a in RNA], dtype=np.int32)
    loop = np.int32(round(100 * LOOP))
    paired = np.full((length + 1, length + 1, n), FORBIDDEN, dtype=np.int32)
    best = np.zeros_like(paired)
    for i in range(length - 1, -1, -1):
        row, first = best[i], i + HAIRPIN + 2
        row[i + 1 :] = best[i + 1, i + 1 :]  # the first letter is free ..
        inside = slice(first - 1, length)
        stacked = stacks[letters[i], letters[min(i + 1, length - 1)]] + paired[i + 1, inside]
        closed = np.minimum(stacked, loop + best[i + 1, inside])
        allowed = letters[i] + letters[inside] == 3  # A + U and C + G, in the order ACGU
        paired[i, first:] = np.where(allowed, closed, FORBIDDEN)
        for k in range(first, length + 1):  # .. or pairs with letter k - 1
            np.minimum(row[k:], paired[i, k] + best[k, k:], out=row[k:])
    return paired.transpose(2, 0, 1), best.transpose(2, 0, 1)


def _complete(x, alphabet):
    """Tokens x (n, length), checked: integers of the alphabet, none of them a mask."""
    if not isinstance(x, torch.Tensor) or x.is_floating_point() or x.ndim != 2:
        raise TypeError(f"tokens (n, length) are needed, not {getattr(x, 'dtype', type(x).__name__)}")
    if x.numel() and not (0 <= x.min() and x.max() < len(alphabet)):
        raise ValueError(f"tokens must be 0 .. {len(alphabet) - 1}, letters of {alphabet!r}; a mask has no reward")
    return x


def _letters(x):
    return ["".join(RNA[token] for token in row) for row in x.tolist()]


def _imported(module, package=None):
    try:
        return __import__(module)
    except ImportError:
        package = package or module
        raise ImportError(f"this reward needs {package}, which is optional: pip install {package}") from None
