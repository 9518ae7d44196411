"""Steering of sequences: Taylor drifts, proposals and their weights by enumeration; folding and its drawings."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from tiltlib import figures, steer, tensor_rewards, values
from tiltlib.rewards import Reward
from tiltlib.worlds import Sequence, rna

BETA = 0.6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def world(steps=2, tuned=False):
    if tuned:
        return Sequence([0.5, 0.2, 0.3], [[0.2, 0.5, 0.3], [0.4, 0.3, 0.3], [0.3, 0.3, 0.4]], 3, steps)
    return Sequence([0.2, 0.5, 0.3], [[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.25, 0.05, 0.7]], 3, steps)


def reward(bonus):
    """Scores of letters that differ by place, and a bonus where the first and the last letter are equal."""
    scores = torch.tensor([[0.0, 0.4, 1.0], [0.3, 0.0, 0.8], [0.9, 0.1, 0.0]], dtype=torch.float64)

    def score(x):
        p = x if x.is_floating_point() else torch.nn.functional.one_hot(x, 3).double()
        return (p * scores).sum((1, 2)) + bonus * (p[:, 0] * p[:, 2]).sum(-1)

    return Reward(f"test({bonus})", score, "points", differentiable=True)


def look(w, r, i):
    x = w.one_hot(w.all_states()).requires_grad_()
    prediction = w.predict(x, i)
    value = values.posterior_mean(r)(w, x, prediction, i)
    (g,) = torch.autograd.grad(value.sum(), x)
    return steer.Look(prediction.detach(), value.detach(), g)


@pytest.mark.parametrize("bonus", [0.0, 1.3])
def test_the_gradient_is_the_change_by_one_letter_times_its_probability(bonus):
    """Exact for a reward that is linear in probabilities; with a pair the rest is that pair's product of changes."""
    w, r = world(), reward(bonus)
    at, checked = look(w, r, 2), 0
    clean = w.clean(w.all_states(), at.prediction)
    for k, x in enumerate(w.all_states()):
        for l, a in itertools.product(range(3), range(3)):
            if x[l] != w.mask:
                continue
            then = x.clone()
            then[l] = a
            j = int(w.index(then[None]))
            told = (at.grad[k, l, a] - at.grad[k, l, w.mask]) / at.prediction[k, l, a].exp()
            moved = clean[j] - clean[k]
            curved = bonus * float((moved[0] * moved[2]).sum())
            assert abs(float(told) - (float(at.value[j] - at.value[k]) - curved)) < 1e-12
            checked += 1
    assert checked == 3 * 3 * 4**2  # a masked place, its letter, and whatever the two other places hold


def test_guided_and_weighted_steps_of_a_sequence_estimate_z_exactly():
    """Sum over all paths of q times its weight is Z: the gradient drift and another world as proposal, by matrices."""
    w, other, r = world(), world(tuned=True), reward(1.3)
    states, z = w.all_states(), np.exp(w.log_z(r, BETA))
    end = np.zeros(w.states)
    end[w.index(w.sequences()).numpy()] = np.exp(r(w.sequences()).numpy() / BETA)
    for name in ("gradient", "other"):
        mass, forgotten = np.eye(w.states)[-1], np.eye(w.states)[-1]
        for i in range(w.steps, 0, -1):
            at = look(w, r, i)
            kernel = w.kernel(states, at.prediction, i)
            if name == "gradient":
                q = kernel.tilt(at.grad / BETA)
            else:
                q = other.kernel(states, other.predict(states, i), i)
            every = states.expand(w.states, *states.shape)
            log_q, log_p = q.log_prob(every).numpy(), kernel.log_prob(every).numpy()
            with np.errstate(invalid="ignore"):
                ratio = np.exp(np.where(log_q > -np.inf, log_p - log_q, 0))
            mass, forgotten = mass @ (np.exp(log_q) * ratio), forgotten @ np.exp(log_q)
        assert abs(mass @ end / z - 1) < 1e-12
        assert abs(forgotten @ end / z - 1) > 0.05  # control: without p/q


@pytest.mark.parametrize("way", ["tds", "proposal"])
def test_the_loop_agrees_with_the_exact_second_moment(way):
    w, other, r = world(), world(tuned=True), reward(0.5)
    states, m = w.all_states(), np.eye(w.states)[-1]
    for i in range(w.steps, 0, -1):
        at = look(w, r, i)
        kernel, every = w.kernel(states, at.prediction, i), states.expand(w.states, *states.shape)
        q = kernel.tilt(at.grad / BETA) if way == "tds" else other.kernel(states, other.predict(states, i), i)
        log_q, log_p = q.log_prob(every).numpy(), kernel.log_prob(every).numpy()
        with np.errstate(invalid="ignore"):
            m = m @ np.exp(np.where(log_q > -np.inf, 2 * log_p - log_q, -np.inf))
    exact = m[w.index(w.sequences()).numpy()] @ np.exp(2 * r(w.sequences()).numpy() / BETA)
    o = steer.run(
        w, r, beta=BETA, method=steer.rows.tds(ess=0) if way == "tds" else "importance", generator=generator(3),
        particles=20000, proposal=other if way == "proposal" else None,
    )  # fmt: skip
    squares = (2 * o.log_weights[0]).exp().numpy()
    assert abs(squares.mean() - exact) < 4 * squares.std() / np.sqrt(len(squares))


def test_a_particle_s_gradient_does_not_depend_on_how_many_there_are():
    w, r = world(), reward(1.3)
    grads = []
    for k in (1, 7, 64):
        walk = steer.steps(w, r, beta=BETA, method="gradient_guidance", generator=generator(), particles=k)
        grads.append(next(iter(walk)).look.grad[0])
    for g in grads[1:]:
        torch.testing.assert_close(g, grads[0], rtol=0, atol=1e-14)
    assert grads[0].abs().max() > 0.05


# ------------------------------------------------------------------------------------------------------------- folding


def slow_energy(text):
    """The same model, cell by cell in plain Python."""
    n, stacks = len(text), tensor_rewards.STACKS
    fits = {"AU", "UA", "CG", "GC"}
    best = {(i, j): 0.0 for i in range(n + 1) for j in range(n + 1)}
    paired = {key: np.inf for key in best}
    for size in range(5, n + 1):
        for i in range(n - size + 1):
            j = i + size
            if text[i] + text[j - 1] in fits:
                inner = paired[i + 1, j - 1] + stacks[text[i] + text[i + 1]]
                paired[i, j] = min(inner, tensor_rewards.LOOP + best[i + 1, j - 1])
            best[i, j] = min([best[i + 1, j]] + [paired[i, k] + best[k, j] for k in range(i + 5, j + 1)])
    return best[0, n]


def test_folding_of_designs_is_the_recursion_cell_by_cell():
    for length in (1, 4, 5, 37, 60):
        w = rna(length, 2)
        x = w.draw(4, steer.loop._chance(generator(length)))
        expected = [-slow_energy(text) for text in w.text(x)]
        np.testing.assert_allclose(tensor_rewards.folding()(x), expected, atol=1e-10)
    assert max(expected) > 5


@pytest.mark.parametrize(
    "structure",
    [
        "....",
        "((((...))))",
        "..((..((...))..))..",
        "((...))...((....))",
        ".((.((...)).((...)).))",
        "(((((...)))..(....))).",
    ],
)
def test_drawn_letters_and_pairs_are_at_distance_one(structure):
    places, opened = figures.layout(structure), []
    assert places.shape == (len(structure), 2)
    np.testing.assert_allclose(np.linalg.norm(np.diff(places, axis=0), axis=1), 1)
    for k, mark in enumerate(structure):
        if mark == "(":
            opened.append(k)
        elif mark == ")":
            assert abs(np.linalg.norm(places[opened.pop()] - places[k]) - 1) < 1e-9
    apart = np.linalg.norm(places[:, None] - places, axis=-1)[~np.eye(len(structure), dtype=bool)]
    assert apart.min() > 0.5  # nothing of these small ones lies on top of another


def test_the_outside_of_a_drawing_is_a_straight_line():
    places = figures.layout("..((...)).((....)).")
    outside = places[[0, 1, 2, 8, 9, 10, 17, 18]]
    np.testing.assert_allclose(np.diff(outside, axis=0), np.diff(outside, axis=0)[:1].repeat(7, 0), atol=1e-9)


def test_errors_of_drawings():
    fig, ax = figures.axes()
    for wrong in ("(()", "())", "(x)"):
        with pytest.raises(ValueError, match=r"not match|not closed"):
            figures.layout(wrong)
    with pytest.raises(ValueError, match="do not fit"):
        figures.molecule(ax, "GGG", "....")
    figures.molecule(ax, "GGGAAACCC", "(((...)))")
    assert len(ax.collections) == 1 and len(ax.collections[0].get_offsets()) == 9
    assert len(ax.lines) == 1 + 3  # the strand, and three pairs
    figures.plt.close(fig)


def test_pngs_have_a_palette_and_keep_the_colours_of_methods(tmp_path):
    fig, panels = figures.axes(columns=2)
    for k, name in enumerate(figures.METHODS):
        figures.line(panels[k % 2], [0, 1], [k, k], name)
    fig.savefig(tmp_path / "a.png")
    figures.plt.close(fig)
    image = Image.open(tmp_path / "a.png")
    assert image.mode == "P" and image.size[0] == round(figures.WIDTH * 130)
    drawn = {colour for _, colour in image.convert("RGB").getcolors(1 << 16)}
    for name in figures.METHODS:
        wanted = [int(figures.colour(name)[k : k + 2], 16) for k in (1, 3, 5)]
        assert min(max(abs(a - b) for a, b in zip(wanted, one, strict=True)) for one in drawn) <= 2, name
