"""Masked diffusion of a chain: conditionals, steps, laws and values against brute-force enumeration of sequences."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tiltlib import law
from tiltlib.chance import Chance
from tiltlib.worlds.chain import Chain
from tiltlib.worlds.checks import check
from tiltlib.worlds.sequence import Sequence, rna

INITIAL, ROWS = np.array([0.2, 0.5, 0.3]), np.array([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.25, 0.05, 0.7]])


def chance(seed=0):
    return Chance(torch.Generator().manual_seed(seed))


def small(length=3, steps=3, schedule="cosine", rows=ROWS):
    return Sequence(INITIAL, rows, length, steps, schedule)


def brute_law(initial, rows, length):
    """{sequence: probability}, spelled out."""
    out = {}
    for s in itertools.product(range(len(initial)), repeat=length):
        out[s] = initial[s[0]] * np.prod([rows[a, b] for a, b in itertools.pairwise(s)])
    return out


def brute_predict(initial, rows, x):
    """p(x_0 token at l | unmasked tokens elsewhere), (length, V), by summing over all sequences."""
    mask, out = len(initial), np.zeros((len(x), len(initial)))
    for s, p in brute_law(initial, rows, len(x)).items():
        for l in range(len(x)):
            if all(x[k] in (mask, s[k]) for k in range(len(x)) if k != l):
                out[l, s[l]] += p
    return out / out.sum(1, keepdims=True)


def brute_step(world, initial, rows, x, i):
    """{next state: probability} of one reverse step, from the masking probabilities and brute_predict."""
    stay, said = float(world.masked[i - 1] / world.masked[i]), brute_predict(initial, rows, x)
    choices = [
        [(v, 1.0)]
        if v != world.mask
        else [(world.mask, stay)] + [(w, (1 - stay) * said[l, w]) for w in range(world.mask)]
        for l, v in enumerate(x)
    ]
    return {tuple(v for v, _ in row): np.prod([p for _, p in row]) for row in itertools.product(*choices)}


# ------------------------------------------------------------------------------------------------------- conditionals


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_forward_backward_is_the_enumerated_conditional(tokens, length, seed):
    rng = np.random.default_rng(seed)
    initial, rows = rng.dirichlet(np.ones(tokens)) + 1e-3, rng.dirichlet(np.full(tokens, 0.5), tokens) + 1e-3
    initial, rows = initial / initial.sum(), rows / rows.sum(1, keepdims=True)
    world = Sequence(initial, rows, length, 4)
    x = torch.from_numpy(rng.integers(0, tokens + 1, (4, length)))
    oracle = np.stack([brute_predict(initial, rows, row) for row in x.tolist()])
    np.testing.assert_allclose(world.predict(x).exp(), oracle, rtol=0, atol=1e-13)
    # clean: the same where masked, the token itself elsewhere
    masked = (x == tokens).numpy()
    clean = world.clean(x, world.predict(x), 2).numpy()
    np.testing.assert_allclose(clean[masked], oracle[masked], rtol=0, atol=1e-13)
    assert (clean[~masked] == np.eye(tokens)[x.numpy()[~masked]]).all()


def test_control_the_chain_read_backwards_has_other_conditionals():
    x = torch.tensor([[3, 0, 3, 1]])
    oracle = brute_predict(INITIAL, ROWS, x[0].tolist())
    backwards = ROWS.T / ROWS.T.sum(1, keepdims=True)
    assert np.abs(small(4).predict(x)[0].exp().numpy() - oracle).max() < 1e-14
    assert np.abs(small(4, rows=backwards).predict(x)[0].exp().numpy() - oracle).max() > 0.1


def test_predictions_stay_finite_and_normalised_at_length_150():
    world = rna(150, 5)
    x = world.renoise(world.draw(3, chance()), 0, 3, chance(1))
    said = world.predict(x)
    assert torch.isfinite(said).all()
    torch.testing.assert_close(said.exp().sum(-1), torch.ones(3, 150, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_relaxed_state_gives_the_same_and_is_differentiable():
    world = small(4)
    x = torch.tensor([[3, 0, 3, 3], [1, 3, 2, 3]])
    soft = world.one_hot(x).requires_grad_()
    torch.testing.assert_close(world.predict(soft), world.predict(x), rtol=0, atol=1e-14)

    def score(x):
        clean = world.clean(x, world.predict(x))
        return (clean[:, 0, 1] * clean[:, 2, 2] + clean[:, 3, 0]).sum()

    (slope,) = torch.autograd.grad(score(soft), soft)
    assert torch.isfinite(slope).all()
    for place in [(0, 0, 1), (0, 1, 2), (0, 3, 3), (1, 0, 0), (1, 3, 0)]:
        step = torch.zeros_like(soft)
        step[place] = 1e-6
        numeric = (score(soft.detach() + step) - score(soft.detach() - step)) / 2e-6
        assert abs(float(numeric - slope[place])) < 1e-8
    assert slope.abs().max() > 0.05


# --------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("schedule", ["linear", "cosine", [0, 0.05, 0.4, 1]])
@pytest.mark.parametrize("i", [1, 2, 3])
def test_a_step_is_the_enumerated_one(schedule, i):
    world = small(3, 3, schedule)
    x = world.all_states()
    kernel = world.kernel(x, world.predict(x), i)
    dense = kernel.log_prob(x.expand(len(x), -1, -1)).exp().numpy()
    np.testing.assert_allclose(dense, world.transition(i), rtol=0, atol=1e-14)
    np.testing.assert_allclose(dense.sum(1), 1, rtol=0, atol=1e-14)
    for row in ([3, 3, 3], [3, 0, 3], [3, 3, 1], [2, 3, 0], [1, 2, 0]):
        moves, oracle = brute_step(world, INITIAL, ROWS, row, i), np.zeros(world.states)
        oracle[world.index(torch.tensor(list(moves))).numpy()] = list(moves.values())
        np.testing.assert_allclose(dense[int(world.index(torch.tensor([row])))], oracle, rtol=0, atol=1e-14)


def test_steps_may_differ_between_particles():
    world, x = small(), torch.tensor([[3, 3, 1], [3, 0, 3], [3, 3, 3]])
    said, i = world.predict(x), torch.tensor([2, 1, 3])
    each = torch.cat([world.kernel(x[k : k + 1], said[k : k + 1], int(i[k])).log_q for k in range(3)])
    assert torch.equal(world.kernel(x, said, i).log_q, each)
    assert not torch.equal(world.kernel(x, said, i.flip(0)).log_q, each)


def test_one_token_steps_by_bayes_rule():
    """Length 1: the reverse step is p(x_s) q(x_t | x_s) / p(x_t) of the masking process, in closed form."""
    world = Sequence(INITIAL, ROWS, 1, 4, [0, 0.1, 0.35, 0.8, 1])
    for i in range(1, 5):
        m_s, m_t = world.masked[i - 1].item(), world.masked[i].item()
        p_s = np.append((1 - m_s) * INITIAL, m_s)
        forward = np.append(np.full(3, (m_t - m_s) / (1 - m_s)), 1.0)  # probability of being masked at t
        bayes = p_s * forward / (p_s * forward).sum()
        np.testing.assert_allclose(world.transition(i)[3], bayes, rtol=0, atol=1e-15)
        if i in (2, 3):  # control: unmasking with probability 1 - m_s, as if nothing were unmasked yet
            assert np.abs(world.transition(i)[3] - p_s).max() > 0.05


def test_samples_of_a_step_follow_its_law_and_tilts_are_accounted_for():
    world, x = small(), torch.tensor([[3, 1, 3]])
    kernel = world.kernel(x, world.predict(x), 2)
    moves = brute_step(world, INITIAL, ROWS, x[0].tolist(), 2)
    children, log_ratio = kernel.sample(20_000, chance())
    assert (children[0, :, 1] == 1).all() and not log_ratio.any()
    seen = np.array([(children[0] == torch.tensor(end)).all(1).sum().item() for end in moves])
    expected = 20_000 * np.array(list(moves.values()))
    assert stats.chisquare(seen, expected).pvalue > 1e-3
    wrong = 20_000 * np.array(list(brute_step(world, INITIAL, ROWS, x[0].tolist(), 3).values()))
    assert stats.chisquare(seen, wrong).pvalue < 1e-9  # control: the next step's law
    # under a tilted kernel, f weighted by p/q has the mean of the untilted one
    g = torch.linspace(-1.5, 1.0, 12, dtype=torch.float64).reshape(1, 3, 4)
    children, log_ratio = kernel.tilt(g).sample(40_000, chance(1))
    f = (children[0, :, 0] == 2).double() + 2.0 * (children[0, :, 2] == 3)
    exact = sum(p * ((end[0] == 2) + 2.0 * (end[2] == 3)) for end, p in moves.items())
    weighted = f * log_ratio[0].exp()
    z = (weighted.mean() - exact) / (weighted.std() / 200)
    assert abs(z) < 4
    assert abs(f.mean() - exact) / (f.std() / 200) > 8  # control: the weights left out


def test_renoise_masks_what_is_left_at_the_right_rate():
    world = Sequence(INITIAL, ROWS, 5, 4, [0, 0.1, 0.35, 0.8, 1])
    x = world.draw(20_000, chance())
    halfway = world.renoise(x, 0, 2, chance(1))
    twice = world.renoise(halfway, 2, 3, chance(2))
    for noised, m in ((halfway, 0.35), (twice, 0.8)):
        assert ((noised == x) | (noised == 3)).all()
        count = int((noised == 3).sum())
        assert stats.binomtest(count, x.numel(), m).pvalue > 1e-3
        assert stats.binomtest(count, x.numel(), m + 0.02).pvalue < 1e-9  # control
    assert ((twice == 3) | (halfway < 3)).all()  # what is masked stays masked
    assert (world.renoise(x, 0, 4, chance()) == 3).all() and torch.equal(world.renoise(twice, 3, 3, chance()), twice)
    assert (world.renoise(world.start(4, chance()), 4, 4, chance()) == 3).all()
    i_to = torch.tensor([0, 4] * 10_000)
    mixed = world.renoise(x, 0, i_to, chance(3))
    assert torch.equal(mixed[::2], x[::2]) and (mixed[1::2] == 3).all()


# ------------------------------------------------------------------------------------------------- laws and values


def test_laws_by_enumeration():
    world = small()
    oracle = brute_law(INITIAL, ROWS, 3)
    assert [tuple(s) for s in world.sequences().tolist()] == list(oracle)
    np.testing.assert_allclose(world.data_law(), list(oracle.values()), rtol=0, atol=1e-15)
    # the sampler's law, walked through step by step
    states = {(3, 3, 3): 1.0}
    for i in (3, 2, 1):
        then = {}
        for x, p in states.items():
            for y, q in brute_step(world, INITIAL, ROWS, x, i).items():
                then[y] = then.get(y, 0.0) + p * q
        states = then
        marginal = world.marginal(i - 1)
        np.testing.assert_allclose(marginal[world.index(torch.tensor(list(states)))], list(states.values()), atol=1e-15)
        np.testing.assert_allclose(marginal.sum(), 1, rtol=0, atol=1e-14)
    np.testing.assert_allclose(world.law(), [states[s] for s in oracle], rtol=0, atol=1e-15)


def test_the_sampler_tends_to_the_chain_as_one_over_steps():
    gap = [law.tv(w.law(), w.data_law()) for w in (small(3, steps) for steps in (8, 16, 32, 64))]
    ratios = np.divide(gap[:-1], gap[1:])
    assert gap[0] > 0.01 and np.all(np.abs(ratios - 2) < 0.2), (gap, ratios)
    # independent tokens lose nothing, at any number of steps; nor does a single token
    for world in (small(3, 2, rows=np.tile(INITIAL, (3, 1))), small(1, 2)):
        np.testing.assert_allclose(world.law(), world.data_law(), rtol=0, atol=1e-15)


def test_draws_follow_the_chain():
    world = small()
    seen = np.bincount(world.index(world.draw(20_000, chance())), minlength=64)[world.index(world.sequences())]
    assert stats.chisquare(seen, 20_000 * world.data_law()).pvalue > 1e-3
    assert stats.chisquare(seen, 20_000 * world.law()).pvalue < 1e-9  # control: the three-step sampler's law
    np.testing.assert_allclose(world.log_prob(world.sequences()).exp(), world.data_law())


@pytest.mark.parametrize("beta", [0.05, 0.7, 30.0])
def test_soft_values_obey_bellman_and_give_the_tilt(beta):
    world = small()
    r = np.random.default_rng(1).normal(size=27) + np.arange(27) / 20
    v = world.soft_values(r, beta)
    reachable = world.marginal(0) > 0
    np.testing.assert_allclose(v[0, reachable], r, rtol=0, atol=1e-14)
    assert np.isnan(v[0, ~reachable]).all()
    u = np.where(reachable, v[0], 0)
    for i in (1, 2, 3):
        top = np.max(u)
        u = top + beta * np.log(world.transition(i) @ np.exp((u - top) / beta))
        np.testing.assert_allclose(v[i], u, rtol=0, atol=1e-13)
    assert abs(v[3, -1] - beta * world.log_z(r, beta)) < 1e-13
    np.testing.assert_allclose(world.tilted_law(r, beta), law.tilt(world.law(), r, beta), rtol=0, atol=1e-16)
    # a chain over all states with the same kernels and Doob's transform ends in the tilted law
    everywhere = np.zeros(world.states)
    everywhere[reachable] = r
    chain = Chain(world.marginal(3), [world.transition(i) for i in (1, 2, 3)])
    np.testing.assert_allclose(chain.soft_values(everywhere, beta)[1:], v[1:], rtol=0, atol=1e-13)
    np.testing.assert_allclose(chain.hard_values(everywhere)[1:], world.hard_values(r)[1:], rtol=0, atol=1e-14)
    doob = chain.guide(chain.soft_values(everywhere, beta), beta).laws[0]
    np.testing.assert_allclose(doob[reachable], world.tilted_law(r, beta), rtol=0, atol=1e-14)
    if beta == 0.7:  # control: guided by the mean reward instead
        hard = chain.guide(chain.hard_values(everywhere), beta).laws[0]
        assert law.tv(hard[reachable], world.tilted_law(r, beta)) > 0.02


def test_values_tend_to_those_of_the_exact_posterior():
    r = np.random.default_rng(2).normal(size=27)
    x = small().all_states()
    gaps = []
    for steps in (32, 64, 128):
        world = small(3, steps, "linear")
        limit = 0.4 * torch.log(world.posterior(x) @ torch.from_numpy(np.exp(r / 0.4)))
        gaps.append(np.abs(world.soft_values(r, 0.4)[steps // 2] - limit.numpy()).max())
    assert gaps[-1] < 0.02 and np.all(np.abs(np.divide(gaps[:-1], gaps[1:]) - 2) < 0.2), gaps


def test_posterior_is_bayes_rule():
    world, x = small(), torch.tensor([[3, 0, 3], [3, 3, 3], [1, 2, 0]])
    oracle = brute_law(INITIAL, ROWS, 3)
    for row, p in zip(x.tolist(), world.posterior(x).numpy(), strict=True):
        joint = np.array([q * all(t in (3, s) for t, s in zip(row, seq, strict=True)) for seq, q in oracle.items()])
        np.testing.assert_allclose(p, joint / joint.sum(), rtol=0, atol=1e-15)


def test_it_keeps_what_the_loops_rely_on():
    findings = check(rna(8, 12), particles=128, raises=False)
    assert [f for f in findings if not f.passed] == []


def test_a_reward_may_be_a_callable():
    world = small()
    r = (world.sequences() == 1).sum(1).double()
    np.testing.assert_array_equal(world.tilted_law(lambda x: (x == 1).sum(1), 0.5), world.tilted_law(r.numpy(), 0.5))


def test_rna_letters():
    world = rna(6, 3)
    x = world.renoise(world.draw(5, chance()), 0, 2, chance())
    assert torch.equal(world.tokens(world.text(x)), x)
    assert world.text(torch.tensor([[0, 1, 2, 3, 4, 0]])) == ["ACGU_A"]
    np.testing.assert_allclose(world.transitions.sum(1), 1)
    assert world.initial[1:3].sum() > 0.5  # rich in G and C
    with pytest.raises(ValueError, match="6 letters"):
        world.tokens(["ACG"])
    with pytest.raises(ValueError, match="letters of 'ACGU'"):
        world.tokens(["ACGTAA"])


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial": [0.5, 0.6, 0.1]}, "sum to one"),
        ({"initial": [0.5, 0.5, 0.0]}, "> 0 everywhere"),
        ({"initial": [1.0], "transition": [[1.0]]}, "two tokens"),
        ({"transition": np.eye(3)}, "> 0 everywhere"),
        ({"transition": ROWS[:2]}, "shape"),
        ({"transition": ROWS * 1.1}, "row 0 of transition"),
        ({"length": 0}, "length"),
        ({"steps": 0}, "steps"),
        ({"schedule": "quadratic"}, "unknown schedule"),
        ({"schedule": [0, 0.5, 0.4, 1]}, "increase"),
        ({"schedule": [0, 0.5, 1]}, "4 numbers"),
        ({"schedule": [0, 0.5, 0.7, 0.9]}, "from 0 to 1"),
        ({"schedule": [0, np.nan, 0.7, 1]}, "finite"),
        ({"alphabet": "AB"}, "3 different letters"),
        ({"alphabet": "ABB"}, "3 different letters"),
    ],
)
def test_bad_worlds(change, message):
    good = {"initial": INITIAL, "transition": ROWS, "length": 3, "steps": 3}
    Sequence(**good)
    with pytest.raises(ValueError, match=message):
        Sequence(**(good | change))


def test_bad_calls():
    world, x = small(), torch.tensor([[3, 0, 3]])
    said = world.predict(x)
    with pytest.raises(ValueError, match="no condition"):
        world.predict(x, 2, condition=1)
    for bad in (torch.tensor([[4, 0, 1]]), torch.tensor([[-1, 0, 1]]), x[:, :2], x.int(), [[3, 0, 3]]):
        with pytest.raises(ValueError, match="token"):
            world.predict(bad)
    with pytest.raises(ValueError, match="relaxed"):
        world.predict(torch.zeros(1, 3, 3))
    for i in (0, 4, torch.tensor([0])):
        with pytest.raises(ValueError, match="outside the grid"):
            world.kernel(x, said, i)
    with pytest.raises(TypeError, match="step"):
        world.kernel(x, said, 1.5)
    with pytest.raises(ValueError, match="later or equal"):
        world.renoise(x, 2, 1, chance())
    with pytest.raises(ValueError, match="masked"):
        world.log_prob(x)
    with pytest.raises(ValueError, match="outside the grid"):
        world.marginal(4)
    with pytest.raises(ValueError, match="outside the grid"):
        world.transition(0)
    for r, message in ((np.zeros(26), "entries"), (np.full(27, np.nan), "finite")):
        with pytest.raises(ValueError, match=message):
            world.soft_values(r, 1.0)
    with pytest.raises(ValueError, match="beta"):
        world.soft_values(np.zeros(27), 0.0)
    with pytest.raises(ValueError, match="too many to enumerate"):
        rna(12, 4).law()
    with pytest.raises(ValueError, match="at least 1"):
        world.start(0, chance())
