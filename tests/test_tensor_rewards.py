"""Rewards of tensors: gradients against finite differences, ranges, known values, folding against all structures."""

import sys
import zlib

import numpy as np
import pytest
import torch

from tiltlib import rewards, tensor_rewards

# ------------------------------------------------------------------------------------------- points, states and images


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=5, seed=0, channels=1):
    return torch.rand(n, channels, 8, 8, dtype=torch.float64, generator=generator(seed)) * 2 - 1


def classifier(x):
    weight = torch.linspace(-90, 90, 64 * 3, dtype=x.dtype).sin().reshape(64, 3)
    return (x.flatten(1) @ weight) ** 2 / 4


DIFFERENTIABLE = {
    "linear": (
        tensor_rewards.linear([0.5, -1.0, 2.0], 0.3),
        torch.randn(4, 3, dtype=torch.float64, generator=generator(1)),
    ),
    "quadratic": (
        tensor_rewards.quadratic([0.5, -1.0], 1.5),
        torch.randn(4, 2, dtype=torch.float64, generator=generator(2)),
    ),
    "table": (
        tensor_rewards.table([0.3, -1.0, 2.0]),
        torch.rand(4, 3, dtype=torch.float64, generator=generator(3)).softmax(1),
    ),
    "brightness": (tensor_rewards.brightness(), images()),
    "symmetry": (tensor_rewards.symmetry(), images()),
    "closeness": (tensor_rewards.closeness(images(1, 9)[0], (images(1, 8)[0] > 0).double()), images()),
    "class_log_probability": (tensor_rewards.class_log_probability(classifier, 1), images()),
    "motif": (
        tensor_rewards.motif("GAG"),
        torch.rand(4, 7, 4, dtype=torch.float64, generator=generator(4)).softmax(-1),
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_against_finite_differences(name):
    reward, x = DIFFERENTIABLE[name]
    # a difference may leave the range
    free = rewards.Reward(reward.name, reward.function, reward.unit, differentiable=True)
    before = reward.calls, reward.gradient_calls
    values, slope = reward.gradient(x)
    assert (reward.calls, reward.gradient_calls) == (before[0], before[1] + len(x))
    torch.testing.assert_close(values, reward(x))
    for row, where in ((0, 1), (3, 0), (2, -1)):
        place = (row, *((where if size > 1 else 0) for size in x.shape[1:]))
        step = torch.zeros_like(x)
        step[place] = 1e-5
        numeric = (free(x + step) - free(x - step))[place[0]] / 2e-5
        assert abs(numeric - slope[place]) < 1e-7
    assert slope.abs().max() > 1e-3 and reward.unit


def test_values_of_points_and_states():
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    np.testing.assert_allclose(tensor_rewards.linear([2.0, -1.0], 0.5)(x), [0.5, -2.0])
    np.testing.assert_allclose(tensor_rewards.quadratic([1.0, 0.0], 3.0)(x), [-6.0, -1.5 * 4.25])
    table = tensor_rewards.table([1.0, -2.0, 5.0])
    np.testing.assert_array_equal(table(torch.tensor([2, 0, 0])), [5, 1, 1])
    np.testing.assert_allclose(table(torch.tensor([[0.5, 0.5, 0.0]])), [-0.5])
    assert (table.low, table.high) == (-2, 5)


def test_values_of_images():
    x = images(3)
    np.testing.assert_allclose(tensor_rewards.brightness()(x), (x.mean((1, 2, 3)) + 1) / 2)
    np.testing.assert_allclose(
        tensor_rewards.brightness()(torch.stack([torch.ones(1, 8, 8), -torch.ones(1, 8, 8)])), [1, 0]
    )
    even = x + x.flip(-1)
    np.testing.assert_array_equal(tensor_rewards.symmetry()(even), np.zeros(3))
    np.testing.assert_allclose(tensor_rewards.symmetry()(x), -((x - x.flip(-1)) ** 2).mean((1, 2, 3)))
    assert (tensor_rewards.symmetry()(x + x.flip(-2)) < -0.1).all()  # top to bottom is another symmetry
    known = torch.zeros(1, 8, 8)
    known[:, :4] = 1
    closeness = tensor_rewards.closeness(x[0], known)
    mixed = torch.cat([x[0, :, :4], x[1, :, 4:]], 1)[None]
    assert closeness(mixed)[0] == 0 and tensor_rewards.closeness(x[0])(mixed)[0] < -1
    np.testing.assert_allclose(closeness(x[1:2]), -((x[0, :, :4] - x[1, :, :4]) ** 2).sum())
    logits = classifier(x)
    p = torch.exp(tensor_rewards.class_log_probability(classifier, 2)(x))
    np.testing.assert_allclose(p, logits.exp()[:, 2] / logits.exp().sum(1))


def test_closeness_is_a_gaussian_likelihood():
    """r / beta at beta = 2 s^2 is log N(reference; x, s^2) but for a constant."""
    x, reference, s = images(4), images(1, 7)[0], 0.3
    gap = tensor_rewards.closeness(reference)(x) / (2 * s**2) - torch.distributions.Normal(x, s).log_prob(
        reference
    ).sum((1, 2, 3))
    assert np.ptp(gap.numpy()) < 1e-12
    gap = tensor_rewards.closeness(reference)(x) / s**2 - torch.distributions.Normal(x, s).log_prob(reference).sum(
        (1, 2, 3)
    )
    assert np.ptp(gap.numpy()) > 1  # control: beta = s^2


def test_compressibility_counts_bytes():
    flat, noise = torch.full((1, 1, 8, 8), 0.2), images(1)
    values = tensor_rewards.compressibility()(torch.cat([flat, noise.float()]))
    assert values[1] <= -64 and values[0] > -20
    assert (
        tensor_rewards.compressibility(2)(noise)[0] > values[1] + 30
    )  # two grey levels hold an eighth of the information
    pixels = ((flat.double() + 1) / 2 * 255).round().to(torch.uint8).numpy()
    assert values[0] == -len(zlib.compress(pixels.tobytes(), 9))
    with pytest.raises(ValueError, match="levels"):
        tensor_rewards.compressibility(1)


def test_strokes_are_counted_along_rows():
    x = -torch.ones(5, 1, 8, 8)
    x[1, 0, 1:7, 2] = 1  # a bar
    x[2, 0, 1:7, 2] = x[2, 0, 1:7, 5] = 1  # two bars
    x[3, 0, 1:7, 2:6] = 1  # a ring, two rows thick at the top and one at the bottom
    x[3, 0, 3:6, 3:5] = -1
    x[4, 0, 4, ::2] = 1  # a dotted line
    np.testing.assert_allclose(tensor_rewards.strokes()(x), [0, 1, 2, (3 * 1 + 3 * 2) / 6, 4])
    np.testing.assert_array_equal(tensor_rewards.strokes(threshold=-2)(x), np.ones(5))
    assert tensor_rewards.strokes()(x.mT)[4] == 1  # control: along columns


def test_errors_of_image_rewards():
    with pytest.raises(ValueError, match="label 3 is not among the 3 classes"):
        tensor_rewards.class_log_probability(classifier, 3)(images())
    with pytest.raises(ValueError, match="do not fit the reference"):
        tensor_rewards.closeness(torch.zeros(1, 4, 4))(images())
    with pytest.raises(ValueError, match="finite"):
        tensor_rewards.table([0.0, float("nan")])
    with pytest.raises(ValueError, match="symmetry is nan at sample 1"):
        tensor_rewards.symmetry()(torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), float("nan"))]))


# ---------------------------------------------------------------------------------------------------------- sequences

ACGU = "ACGU"


def tokens(*texts):
    return torch.tensor([[ACGU.index(letter) for letter in text] for text in texts])


def all_structures(i, j):
    """Every set of pairs without crossings on letters i .. j - 1 whose hairpins hold three letters or more."""
    if j - i < 5:
        yield ()
        return
    yield from all_structures(i + 1, j)
    for k in range(i + 4, j):
        for inner in all_structures(i + 1, k):
            for rest in all_structures(k + 1, j):
                yield ((i, k), *inner, *rest)


def energy(text, pairs):
    """Energy of one structure, None if a pair is not Watson and Crick's."""
    if any(text[i] + text[j] not in ("AU", "UA", "CG", "GC") for i, j in pairs):
        return None
    stacked = [text[i] + text[i + 1] if (i + 1, j - 1) in pairs else None for i, j in pairs]
    return sum(tensor_rewards.LOOP if stack is None else tensor_rewards.STACKS[stack] for stack in stacked)


def test_motifs_are_counted_with_overlaps():
    texts = ["GAGAGAG", "GGGGAGG", "CCCCCCC", "GAGCGAG"]
    np.testing.assert_array_equal(tensor_rewards.motif("GAG")(tokens(*texts)), [3, 1, 0, 2])
    np.testing.assert_array_equal(tensor_rewards.motif("G")(tokens(*texts)), [t.count("G") for t in texts])
    # of probabilities: the mean over all sequences of independent tokens
    p = torch.rand(1, 4, 4, dtype=torch.float64, generator=generator(5)).softmax(-1)
    every = torch.cartesian_prod(*[torch.arange(4)] * 4)
    weight = torch.stack([p[0, l, every[:, l]] for l in range(4)]).prod(0)
    mean = (weight * tensor_rewards.motif("GC")(every)).sum()
    assert abs(tensor_rewards.motif("GC")(p)[0] - mean) < 1e-14
    assert abs(tensor_rewards.motif("CG")(p)[0] - mean) > 1e-3  # control: read backwards


@pytest.mark.parametrize("length", [4, 9, 13, 18])
def test_folding_is_the_best_of_all_structures(length):
    rng = np.random.default_rng(length)
    texts = ["".join(rng.choice(list("ACGGCU"), length)) for _ in range(12)]
    # one hairpin, a bulge, an inner loop, two hairpins side by side
    made = ["GGCAAAGCC", "GGGCAAAGCACCA", "GGACAAAAGACCA", "GGCAAAGCCGGCAAAGCC", "GGGAGCAAAAGCACCCAA"]
    texts += [text for text in made if len(text) == length]
    structures = list(all_structures(0, length))
    values = tensor_rewards.folding()(tokens(*texts))
    for text, value in zip(texts, values.tolist(), strict=True):
        energies = [e for e in (energy(text, pairs) for pairs in structures) if e is not None]
        assert abs(-value - min(energies)) < 1e-12
        best, drawn = tensor_rewards.fold(text)
        assert abs(best + value) < 1e-12
        # the structure that is drawn has that energy
        stack, pairs = [], []
        for k, mark in enumerate(drawn):
            if mark == "(":
                stack.append(k)
            elif mark == ")":
                pairs.append((stack.pop(), k))
        assert not stack and abs(energy(text, pairs) - best) < 1e-12
    assert length < 9 or values.max() > 0


def test_folding_by_hand():
    # four pairs G-C: three stacks GG of 3.26 kcal/mol and one loop
    assert tensor_rewards.fold("GGGGAAAACCCC") == (pytest.approx(-3 * 3.26 + 4.5), "((((....))))")
    assert tensor_rewards.fold("AAAAAAAA") == (0, "........")
    assert tensor_rewards.fold("GGGGACCCC")[1].count("(") == 3  # a hairpin holds three letters at least
    # the reading of a stack does not depend on the strand
    swap = str.maketrans(ACGU, "UGCA")
    assert all(
        tensor_rewards.STACKS[s] == tensor_rewards.STACKS[s.translate(swap)[::-1]] for s in tensor_rewards.STACKS
    )
    assert len(tensor_rewards.STACKS) == 16 and str(tensor_rewards.folding()(tokens("AAAAAAAA"))[0].item()) == "0.0"


def test_folding_against_seqfold():
    """An independent model with all its tables: the energies differ, but agree on what folds well."""
    pytest.importorskip("seqfold")
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(0, 4, (60, 30)))
    ours, theirs = tensor_rewards.folding()(x), tensor_rewards.folding("seqfold")(x)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.5
    assert abs(np.corrcoef(ours, theirs.flip(0))[0, 1]) < 0.35  # control: other sequences


def test_errors_of_sequence_rewards(monkeypatch):
    for pattern in ("", "GAT"):
        with pytest.raises(ValueError, match="letters of 'ACGU'"):
            tensor_rewards.motif(pattern)
    with pytest.raises(ValueError, match="do not fit"):
        tensor_rewards.motif("GAGAG")(tokens("GAG"))
    with pytest.raises(ValueError, match="do not fit"):
        tensor_rewards.motif("GA")(torch.rand(2, 5, 3, generator=generator()))
    for reward in (tensor_rewards.motif("GA"), tensor_rewards.folding()):
        with pytest.raises(ValueError, match="a mask has no reward"):
            reward(torch.tensor([[0, 1, 4, 2, 2]]))
    with pytest.raises(TypeError, match="tokens"):
        tensor_rewards.folding()(torch.rand(2, 5, 4, generator=generator()))
    with pytest.raises(TypeError, match="black box"):
        tensor_rewards.folding().gradient(torch.rand(2, 5, 4, generator=generator()))
    with pytest.raises(ValueError, match="unknown engine"):
        tensor_rewards.folding("mfold")
    with pytest.raises(ValueError, match="letters ACGU"):
        tensor_rewards.fold("ACGT")
    for engine, module, package in (("vienna", "RNA", "ViennaRNA"), ("seqfold", "seqfold", "seqfold")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=f"pip install {package}"):
            tensor_rewards.folding(engine)
