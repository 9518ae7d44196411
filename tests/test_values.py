"""What x_t is worth: exact, posterior-mean, learned and look-ahead values, against enumeration and closed forms."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from tiltlib import law, rewards, tensor_rewards, values
from tiltlib.chance import Chance
from tiltlib.worlds.chain import Chain
from tiltlib.worlds.mixture import Mixture, Quadratic
from tiltlib.worlds.sequence import Sequence, rna

BETA = 0.5
REWARD = np.array([0.0, 1.4, -0.7, 0.3, 2.2, -1.0])
PLACES = np.array([[-1.5], [-0.4], [0.1], [0.9], [1.6], [2.5]])


def chance(seed=0):
    return Chance(torch.Generator().manual_seed(seed))


def chain(states=6, steps=5, seed=3):
    rng = np.random.default_rng(seed)
    return Chain(rng.dirichlet(np.ones(states)), rng.dirichlet(np.full(states, 0.5), (steps, states)))


def point_reward(x):
    """A bumpy, asymmetric reward of points (n, 1), or of the states 0 .. 5 that sit at PLACES."""
    x = x if x.is_floating_point() else torch.from_numpy(PLACES)[x]
    return torch.sin(2 * x[:, 0]) + 0.5 * x[:, 0]


def short_sequence():
    rows = [[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.25, 0.05, 0.7]]
    return Sequence([0.2, 0.5, 0.3], rows, 3, 3, "cosine", alphabet="ABC")


def mixture(steps=25):
    return Mixture([0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]], [0.2, 0.1], steps=steps)


def soft_bellman_gap(world, v, beta):
    """max |v_i - beta log E exp(v_{i-1} / beta)| over steps and states, from the world's own transition matrices."""
    gaps = []
    for i in range(1, world.steps + 1):
        rows = world.kernels[i - 1] if isinstance(world, Chain) else world.transition(i)
        below = np.nan_to_num(v[i - 1], nan=0.0)  # states with a mask, which i = 0 never has
        gaps.append(np.abs(v[i] - beta * logsumexp(below / beta, axis=1, b=rows)).max())
    return max(gaps)


# --------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("beta", [0.1, 0.5, 20.0])
def test_the_exact_soft_value_satisfies_the_soft_bellman_equation(beta):
    r = np.random.default_rng(0).normal(size=27)
    sequence = short_sequence()
    cases = [(chain(), REWARD), (sequence, lambda x: torch.from_numpy(r)[(x * torch.tensor([9, 3, 1])).sum(1)])]
    for world, reward in cases:
        v = values.table(world, values.exact(reward, beta))
        assert soft_bellman_gap(world, v, beta) < 2e-14 * max(1, beta)
        # controls: the hard value, and the right one at another temperature
        assert soft_bellman_gap(world, values.table(world, values.exact(reward, None)), beta) > 2e-3
        assert soft_bellman_gap(world, v, 1.2 * beta) > 2e-4
    at_start = values.exact(reward, beta)(sequence, sequence.start(1, chance()), None, 3)
    assert abs(at_start - beta * sequence.log_z(r, beta)) < 1e-13


def test_soft_minus_hard_is_half_a_variance_over_beta():
    """S3, through the values themselves: gap * beta -> Var(r | x_i) / 2, from above zero at every beta."""
    world = chain()
    hard = values.table(world, values.exact(REWARD, None))
    variance = (values.table(world, values.exact(REWARD**2, None)) - hard**2)[1:]
    gap = values.table(world, values.exact(REWARD, 1000.0))[1:] - hard[1:]
    np.testing.assert_allclose(1000 * gap, variance / 2, rtol=0, atol=2e-3)
    assert np.abs(1000 * gap - variance).max() > 0.1  # control: without the half
    for beta in (0.1, 1.0, 10.0):
        assert (values.table(world, values.exact(REWARD, beta)) - hard > -1e-13).all()


def test_exact_values_on_a_mixture():
    world, reward = mixture(), tensor_rewards.quadratic([1.5, 1.0], 1.0)
    x = world.renoise(world.draw(64, chance()), 0, 10, chance(1))
    soft, hard = (values.exact(reward, beta)(world, x, None, 10) for beta in (BETA, None))
    # by quadrature free of our formulas: self-normalised draws of x_0 given x_i
    x0 = world.draw(400_000, chance(2))
    alpha, sigma = float(world.grid.alpha[10]), float(world.grid.sigma[10])
    r = reward(x0)
    for k in range(3):
        log_w = -(x[k] - alpha * x0).square().sum(1) / (2 * sigma**2)
        w = log_w.softmax(0)
        ess = 1 / w.square().sum()
        mean = (w * r).sum()
        error = ((w * (r - mean).square()).sum() / ess).sqrt()
        assert abs(hard[k] - mean) < 4 * error and error < 0.02
        g = ((r - r.max()) / BETA).exp()
        mean, spread = (w * g).sum(), ((w * (g - (w * g).sum()).square()).sum() / ess).sqrt()
        measured, error = BETA * mean.log() + r.max(), BETA * spread / mean
        assert abs(soft[k] - measured) < 4 * error and error < 0.02
        assert abs(hard[k] - measured) > 8 * error  # control: the hard value


def test_at_the_data_every_value_is_the_reward_and_steps_may_differ():
    world = chain()
    x = torch.arange(6)
    table = values.table(world, values.exact(REWARD, BETA))
    learned = values.monte_carlo(world, tensor_rewards.table(REWARD), chance=chance(), rollouts=50, beta=BETA)
    mean = values.posterior_mean(point_reward, positions=PLACES)
    for value, r in (
        (values.exact(REWARD, BETA), REWARD),
        (learned, REWARD),
        (values.look_ahead(learned, 2, beta=BETA), REWARD),
        (mean, point_reward(torch.from_numpy(PLACES)).numpy()),
    ):
        np.testing.assert_array_equal(value(world, x, None, 0, None, None), r)
    i = torch.tensor([5, 0, 3, 3, 1, 0])
    for value in (values.exact(REWARD, BETA), values.look_ahead(values.exact(REWARD, BETA), 2, beta=BETA)):
        measured = value(world, x, world.predict(x, i), i)
        np.testing.assert_allclose(measured, table[i, x], rtol=0, atol=1e-14)
        assert np.abs(value(world, x, world.predict(x, i), i.flip(0)).numpy() - table[i, x]).max() > 0.1


# ------------------------------------------------------------------------------------------------------ posterior mean


def test_posterior_mean_of_a_linear_reward_is_the_hard_value_and_of_a_quadratic_one_misses_the_variance():
    world = mixture()
    x = world.renoise(world.draw(32, chance()), 0, 12, chance(1))
    said = world.predict(x, 12)
    linear, bent = Quadratic([0.7, -1.2], constant=0.3), Quadratic([0.7, -1.2], -0.9)
    hard = values.exact(linear, None)(world, x, said, 12)
    torch.testing.assert_close(values.posterior_mean(linear)(world, x, said, 12), hard, rtol=0, atol=1e-12)
    posterior = world.posterior(x, 12)
    weight = posterior.log_weights.exp()
    centre = (weight[..., None] * posterior.means).sum(0)
    variance = (weight * (2 * posterior.covariances[:, None] + (posterior.means - centre).square().sum(-1))).sum(0)
    gap = values.exact(bent, None)(world, x, said, 12) - values.posterior_mean(bent)(world, x, said, 12)
    torch.testing.assert_close(gap, -0.45 * variance, rtol=0, atol=1e-12)
    assert gap.abs().min() > 0.05


def test_the_gap_of_the_posterior_mean_does_not_vanish_at_high_temperature():
    world = chain()
    mean = values.table(world, values.posterior_mean(point_reward, positions=PLACES))
    same = world.posterior_mean_values(lambda x: point_reward(torch.from_numpy(x)), PLACES)
    np.testing.assert_allclose(mean, same, rtol=0, atol=1e-14)
    r = point_reward(torch.arange(6)).numpy()
    gaps = {beta: values.table(world, values.exact(r, beta)) - mean for beta in (10.0, 1e4)}
    assert np.abs(gaps[1e4]).max() > 0.3
    hard = values.table(world, values.exact(r, None))
    assert np.abs(hard - values.table(world, values.exact(r, 1e4))).max() < 1e-3  # the hard value's gap does vanish


def test_posterior_means_of_tokens():
    world = short_sequence()
    x = torch.tensor([[3, 1, 3], [3, 3, 3], [0, 1, 2], [0, 3, 1]])
    said = world.predict(x)
    clean = world.clean(x, said, 1)
    count, pair = tensor_rewards.motif("B", "ABC"), tensor_rewards.motif("AB", "ABC")
    # at the last step tokens are independent given x, so a reward of token probabilities is the hard value exactly
    for reward in (count, pair):
        hard = values.exact(reward, None)(world, x, said, 1)
        soft = values.posterior_mean(reward)(world, x, said, 1)
        torch.testing.assert_close(soft, hard, rtol=0, atol=1e-14)
    earlier = values.exact(pair, None)(world, x, said, 3)
    assert (earlier - values.posterior_mean(pair)(world, x, said, 3)).abs().max() > 0.01
    likeliest = values.posterior_mean(pair, "argmax")(world, x, said, 2)
    assert torch.equal(likeliest, pair(clean.argmax(-1))) and torch.equal(clean.argmax(-1)[2], x[2])
    drawn = [
        values.posterior_mean(pair, "sample", samples=20_000, beta=beta)(world, x, said, 1, None, chance(5))
        for beta in (None, BETA)
    ]
    # the count is 0 or 1 here (variance at most 1/4), and exact where nothing is masked
    error = 0.5 / 20_000**0.5 * torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert ((drawn[0] - hard).abs() <= 4 * error + 1e-12).all()
    assert (likeliest - hard).abs().max() > 0.1  # control: the likeliest tokens
    # beta log of a mean of exp(count / beta), 1 or e^2, whose standard error is at most (e^2 - 1) times that
    soft = values.exact(pair, BETA)(world, x, said, 1)
    assert ((drawn[1] - soft).abs() <= 4 * BETA * np.expm1(1 / BETA) * error + 1e-12).all()
    assert (soft - hard).abs().max() > 0.1  # control: the mean count


def test_a_value_is_differentiable_by_the_particle():
    world, reward = mixture(), tensor_rewards.quadratic([1.5, 1.0], 1.0)
    x = world.renoise(world.draw(8, chance()), 0, 12, chance(1))
    learned = values.monte_carlo(world, reward, chance=chance(), rollouts=200, beta=BETA, iterations=50)
    for value, tolerance in (
        (values.posterior_mean(reward), 1e-7),
        (values.exact(reward, BETA), 1e-7),
        (values.look_ahead(values.posterior_mean(reward), 2, beta=BETA, samples=3), 1e-7),
        (learned, 3e-2),  # a network in float32
    ):

        def worth(x, value=value):
            return value(world, x, world.predict(x, 12), 12, None, chance(4)).sum()

        (slope,) = torch.autograd.grad(worth(at := x.clone().requires_grad_()), at)
        step = torch.zeros_like(x)
        step[3, 1] = 1e-3 if value is learned else 1e-5
        numeric = (worth(x + step) - worth(x - step)) / (2 * step[3, 1])
        assert abs(slope[3, 1] - numeric) < tolerance * (1 + abs(numeric))
        assert slope[3].abs().max() > 1e-2
    # tokens are differentiated through their relaxation
    sequence, pair = short_sequence(), tensor_rewards.motif("AB", "ABC")
    soft = sequence.one_hot(torch.tensor([[3, 1, 3], [3, 3, 3]])).requires_grad_()
    value = values.posterior_mean(pair)(sequence, soft, sequence.predict(soft), 2)
    (slope,) = torch.autograd.grad(value.sum(), soft)
    assert slope.shape == (2, 3, 4) and slope.abs().max() > 0.1


# ------------------------------------------------------------------------------------------------------------- learned


def svdd_error(world, value, r, beta=BETA):
    """Total variation between the tilted law and the chain guided by a value at infinitely many children."""
    return law.tv(world.guide(values.table(world, value), beta).laws[0], world.tilted_law(r, beta))


def test_regressing_the_reward_is_biased_and_regressing_its_exponential_is_consistent():
    """S5: guided by E[r | x] the error stays; guided by beta log of a regression of exp(r/beta) it goes to zero."""
    world, reward = chain(), tensor_rewards.table(REWARD)
    bias = svdd_error(world, values.exact(REWARD, None), REWARD)
    assert svdd_error(world, values.exact(REWARD, BETA), REWARD) < 1e-14 and bias > 0.02
    errors = {}
    for beta in (None, BETA):
        for rollouts in (250, 4000):
            each = []
            for seed in range(8):
                value = values.monte_carlo(world, reward, chance=chance(seed), rollouts=rollouts, beta=beta)
                each.append(svdd_error(world, value, REWARD))
            errors[beta, rollouts] = np.mean(each)
    # 16 times the data: a quarter of the error (within a factor 1.6), or the bias of the hard value
    assert 4 / 1.6 < errors[BETA, 250] / errors[BETA, 4000] < 4 * 1.6, errors
    assert abs(errors[None, 4000] / bias - 1) < 0.15 and errors[None, 4000] > 4 * errors[BETA, 4000], errors


def test_bootstrapping_shares_what_was_learned():
    """All walks meet in state 0 on their way: soft Bellman then gives every start the same value, pooled over all."""
    meet, spread = np.eye(20)[np.zeros(20, dtype=int)], np.full((20, 20), 0.05)
    world = Chain(np.full(20, 0.05), [spread, meet, spread])
    reward = tensor_rewards.table(np.linspace(-1, 1, 20) ** 3)
    tables = {}
    for learn in (values.monte_carlo, values.soft_bellman):
        tables[learn] = values.table(world, learn(world, reward, chance=chance(1), rollouts=200, beta=BETA))
    exact = values.table(world, values.exact(reward, BETA))
    assert np.ptp(exact[2]) < 1e-15 and np.ptp(tables[values.soft_bellman][2]) < 1e-14
    assert np.ptp(tables[values.monte_carlo][2]) > 0.2  # each start learned from its own ten walks alone
    error = {learn: np.abs(v[2] - exact[2]).mean() for learn, v in tables.items()}
    assert error[values.soft_bellman] < 0.5 * error[values.monte_carlo], error


@pytest.mark.parametrize("beta", [None, 0.02])
def test_a_table_holds_the_means_of_the_roll_outs(beta):
    """The same walks drawn again, grouped by state with plain loops; states never met get the mean over all."""
    world, n = chain(), 12
    learned = [
        values.table(world, learn(world, tensor_rewards.table(100 + REWARD), chance=chance(7), rollouts=n, beta=beta))
        for learn in (values.monte_carlo, values.soft_bellman)
    ]
    draw = chance(7)
    walk = [world.start(n, draw)]
    for i in range(world.steps, 0, -1):
        walk.append(world.kernel(walk[-1], world.predict(walk[-1], i), i).sample(1, draw)[0][:, 0])
    walk = torch.stack(walk[::-1]).numpy()

    def average(targets):
        if beta is None:
            return np.mean(targets)
        return beta * (logsumexp(np.array(targets) / beta) - np.log(len(targets)))

    below = 100 + REWARD
    missed = 0
    for i in range(1, world.steps + 1):
        ends, nexts, row = (100 + REWARD)[walk[0]], below[walk[i - 1]], np.empty(6)
        for state in range(6):
            here = walk[i] == state
            missed += not here.any()
            here = here if here.any() else np.ones(n, dtype=bool)
            assert abs(learned[0][i, state] - average(ends[here])) < 1e-10
            row[state] = average(nexts[here])
        np.testing.assert_allclose(learned[1][i], row, rtol=0, atol=1e-10)
        below = row
    assert missed > 0


def test_a_learned_value_on_a_continuous_world():
    world = mixture(steps=60)
    reward = rewards.Reward("step", lambda x: (x.detach()[:, 0] > 0.9).double(), "points", 0.0, 1.0)  # a black box
    state = torch.get_rng_state()
    soft, again, hard = (
        values.monte_carlo(world, reward, chance=chance(2), rollouts=2000, beta=beta, iterations=500)
        for beta in (0.25, 0.25, None)
    )
    assert torch.equal(state, torch.get_rng_state())  # no global randomness
    assert reward.calls == 6000
    x0 = world.draw(1000, chance(3))
    everything = world.draw(20_000, chance(5))
    for i in (10, 25):
        x = world.renoise(x0, 0, i, chance(4))
        assert torch.equal(soft(world, x, None, i), again(world, x, None, i))
        # p(x_0 beyond the step | x_i) by self-normalised draws of x_0
        alpha, sigma = float(world.grid.alpha[i]), float(world.grid.sigma[i])
        log_w = -torch.cdist(x, alpha * everything).square() / (2 * sigma**2)
        p = log_w.softmax(1)[:, everything[:, 0] > 0.9].sum(1)
        truth = {"soft": 0.25 * torch.log1p(p * np.expm1(4.0)), "hard": p}
        rms = {
            (name, aim): (value(world, x, None, i) - truth[aim]).square().mean().sqrt().item()
            for name, value in (("soft", soft), ("hard", hard))
            for aim in truth
        }
        assert rms["soft", "soft"] < 0.35 * truth["soft"].std(), rms
        assert rms["hard", "hard"] < 0.35 * truth["hard"].std(), rms
        # controls: each is far from what the other one learned
        assert rms["hard", "soft"] > 1.5 * rms["soft", "soft"] and rms["soft", "hard"] > 1.5 * rms["hard", "hard"], rms


@pytest.mark.parametrize(
    ("learn", "iterations", "share"), [(values.monte_carlo, 500, 0.6), (values.soft_bellman, 1200, 0.8)]
)
def test_a_learned_value_on_long_sequences(learn, iterations, share):
    """Independent tokens and a count as reward: v = count so far + sum over masks of beta log E exp(1{G} / beta)."""
    p, beta = np.array([0.2, 0.2, 0.3, 0.3]), 1.0
    world, reward = Sequence(p, np.tile(p, (4, 1)), 10, 10), tensor_rewards.motif("G")  # 5^10 states: no table
    value = learn(world, reward, chance=chance(1), rollouts=8000, beta=beta, iterations=iterations, decay=1.0)
    each = beta * np.log1p(0.3 * np.expm1(1 / beta))
    for i in (6, 10):
        x = world.renoise(world.draw(500, chance(2)), 0, i, chance(3))
        so_far, masks = (x == 2).sum(1), (x == 4).sum(1)
        rms, hard = (
            (v - so_far - each * masks).square().mean().sqrt() for v in (value(world, x, None, i), so_far + 0.3 * masks)
        )
        assert rms < share * hard, (i, rms, hard)  # nearer to the soft value than the exact hard value is


# ---------------------------------------------------------------------------------------------------------- look-ahead


def test_look_ahead_errs_less_the_further_it_looks():
    world = chain()
    r = point_reward(torch.arange(6)).numpy()
    mean, soft = values.posterior_mean(point_reward, positions=PLACES), world.soft_values(r, BETA)
    tables = [values.table(world, mean)] + [
        values.table(world, values.look_ahead(mean, k, beta=BETA)) for k in range(1, world.steps + 1)
    ]
    errors = [np.abs(table - soft).mean() for table in tables]
    assert np.all(np.diff(errors) < 0) and errors[0] > 0.1 and errors[-1] < 1e-14, errors
    # averaged as a mean instead, it ends in the hard value: the error stays
    hard = [values.table(world, values.look_ahead(mean, k)) for k in range(1, world.steps + 1)]
    np.testing.assert_allclose(hard[-1], world.hard_values(r), rtol=0, atol=1e-14)
    assert np.abs(hard[-1] - soft).mean() > 0.5 * errors[0]


def test_the_exact_value_is_the_fixed_point_of_look_ahead():
    sequence = short_sequence()
    pair = tensor_rewards.motif("AB", "ABC")
    for world, reward in ((chain(), REWARD), (sequence, pair)):
        v = values.exact(reward, BETA)
        table = values.table(world, v)
        for k in (1, 2, 9):
            ahead = values.table(world, values.look_ahead(v, k, beta=BETA))
            np.testing.assert_allclose(ahead, table, rtol=0, atol=1e-13)
        wrong = values.table(world, values.look_ahead(v, 1, beta=2 * BETA))
        assert np.nanmax(np.abs(wrong - table)) > 0.02
    # the fixed point is reached from any value after as many steps as there are
    start = values.posterior_mean(pair, "argmax")
    reached = values.table(sequence, values.look_ahead(start, 3, beta=BETA))
    np.testing.assert_allclose(reached, values.table(sequence, values.exact(pair, BETA)), rtol=0, atol=1e-13)


def test_sampled_look_ahead_is_the_enumerated_one_in_the_mean_of_its_exponential():
    world, n = chain(), 30_000
    mean = values.posterior_mean(point_reward, positions=PLACES)
    x = torch.full((n,), 2)
    for k in (1, 3, 7):
        exact = values.look_ahead(mean, k, beta=BETA)(world, x[:1], world.predict(x[:1], 4), 4)
        sampled = values.look_ahead(mean, k, beta=BETA, samples=2)(world, x, world.predict(x, 4), 4, None, chance(k))
        estimate = (sampled / BETA).exp()
        z = (estimate.mean() - (exact / BETA).exp()) / (estimate.std() / n**0.5)
        assert abs(z) < 4, (k, z)
        if k < 7:  # control: two steps more, or two less
            other = values.look_ahead(mean, {1: 3, 3: 1}[k], beta=BETA)(world, x[:1], world.predict(x[:1], 4), 4)
            assert abs((estimate.mean() - (other / BETA).exp()) / (estimate.std() / n**0.5)) > 8
        else:  # control: the mean of the value itself, which Jensen puts below
            assert (sampled.mean() - exact) / (sampled.std() / n**0.5) < -8


def test_look_ahead_on_a_continuous_world_nears_the_exact_value():
    """At small steps the sampler's kernels are those of the exact reverse process: its look-ahead nears the value."""
    world, reward = mixture(steps=100), tensor_rewards.quadratic([1.5, 1.0], 1.0)
    x = world.renoise(world.draw(300, chance()), 0, 20, chance(1))
    said, exact = world.predict(x, 20), values.exact(reward, BETA)(world, x, None, 20)
    mean = values.posterior_mean(reward)
    errors = [(mean(world, x, said, 20) - exact).abs().mean().item()]
    for k in (5, 10, 15):
        ahead = values.look_ahead(mean, k, beta=BETA, samples=64)
        errors.append((ahead(world, x, said, 20, None, chance(2)) - exact).abs().mean().item())
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 0.5 * errors[0], errors


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_value_that_does_not_fit_the_world():
    world, sequence, points = chain(), short_sequence(), mixture()
    x, z = torch.arange(6), points.start(3, chance())
    said = points.predict(z, 5)

    class Bare:
        steps = 5

    with pytest.raises(TypeError, match="no exact values"):
        values.exact(REWARD, BETA)(Bare(), x, None, 2)
    with pytest.raises(TypeError, match="Quadratic"):
        values.exact(point_reward, BETA)(points, z, said, 5)
    with pytest.raises(ValueError, match="without a condition"):
        values.exact(tensor_rewards.quadratic([0.0, 0.0], 1.0), BETA)(points, z, said, 5, 1)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        values.exact(REWARD[:4], BETA)(world, x, None, 2)
    with pytest.raises(TypeError, match="not a table of token probabilities"):
        values.posterior_mean(point_reward, "argmax")(points, z, said, 5)
    with pytest.raises(TypeError, match="cannot be enumerated"):
        values.look_ahead(values.posterior_mean(point_reward), 1)(points, z, said, 5)
    with pytest.raises(TypeError, match="cannot be enumerated"):
        values.table(points, values.posterior_mean(point_reward))
    learned = values.monte_carlo(world, tensor_rewards.table(REWARD), chance=chance(), rollouts=5)
    for other, at in ((chain(steps=4), x), (sequence, sequence.start(2, chance()))):
        with pytest.raises(ValueError, match="does not fit"):
            learned(other, at, None, 2)
    other = Mixture([1.0], [[0.0, 0.0, 0.0]], 1.0, steps=25)
    learned = values.monte_carlo(points, tensor_rewards.brightness(), chance=chance(), rollouts=5, iterations=1)
    with pytest.raises(ValueError, match="does not fit"):
        learned(other, other.start(2, chance()), None, 2)


def test_several_values_are_learned_from_one_walk():
    world, calls = chain(), []
    path = values.walk(world, 300, chance(4))
    assert [x.shape for x in path] == [(300,)] * (world.steps + 1)
    world.predict = lambda *a: calls.append(a)  # nothing is asked of the network again
    hard, soft = (
        values.table(world, values.monte_carlo(world, REWARD, chance=chance(), rollouts=path, beta=beta))
        for beta in (None, BETA)
    )
    assert len(calls) == 2 * (world.steps)  # by `table`, and by nobody else
    ends = REWARD[path[0]]
    for state in path[2].unique():
        met = ends[path[2] == state]
        np.testing.assert_allclose(hard[2, state], met.mean(), rtol=1e-12)
        np.testing.assert_allclose(soft[2, state], BETA * np.log(np.exp(met / BETA).mean()), rtol=1e-12)
    with pytest.raises(ValueError, match="5 steps do not fit a world of 4"):
        values.monte_carlo(chain(steps=4), REWARD, chance=chance(), rollouts=path)


def test_a_value_of_images_sees_what_stands_anywhere():
    """Is a bar horizontal? Convolutions learn it from examples elsewhere in the image, a plain network less well."""
    pick = torch.Generator().manual_seed(0)

    def bars(n):
        flat, x = torch.rand(n, generator=pick) < 0.4, torch.full((n, 1, 7, 9), -1.0)
        for k in range(n):
            row, column = (int(torch.randint(1, size - 1, (), generator=pick)) for size in (7, 9))
            x[(k, 0, row, slice(column - 1, column + 2)) if flat[k] else (k, 0, slice(row - 1, row + 2), column)] = 1.0
        return [x, x + 0.3 * torch.randn(x.shape, generator=pick)], flat.double()

    class One:
        steps = 1

    (path, r), (fresh, truth) = bars(500), bars(500)
    lookup = rewards.Reward("flat", lambda x: r, "share", 0.0, 1.0)
    unexplained = {}
    for filters in (16, 0):
        options = {"iterations": 250, "batch": 128, "filters": filters}
        value = values.monte_carlo(One(), lookup, chance=chance(1), rollouts=path, **options)
        said = value(One(), fresh[1], None, 1).double()
        unexplained[filters] = 1 - float(torch.corrcoef(torch.stack([said, truth]))[0, 1]) ** 2
    assert unexplained[16] < 0.1 and unexplained[16] < unexplained[0] / 2, unexplained


def test_the_gradient_of_a_black_box_is_refused():
    world = mixture()
    x = world.start(3, chance()).requires_grad_()
    box = rewards.Reward("box", lambda x: x.detach()[:, 0], "points")
    value = values.posterior_mean(box)
    with pytest.raises(TypeError, match="box is a black box"):
        value(world, x, world.predict(x, 5), 5)
    assert value(world, x.detach(), world.predict(x.detach(), 5), 5).shape == (3,)
    assert box.calls == 3  # the refused call is not counted


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: values.exact(REWARD, 0.0), ValueError, "beta"),
        (lambda: values.exact(REWARD, float("nan")), ValueError, "beta"),
        (lambda: values.posterior_mean(point_reward, "mode"), ValueError, "argmax"),
        (lambda: values.posterior_mean(point_reward, "argmax", positions=PLACES), ValueError, "not both"),
        (lambda: values.posterior_mean(point_reward, samples=0), ValueError, "samples"),
        (lambda: values.look_ahead(values.exact(REWARD, 1.0), 0), ValueError, "k must"),
        (lambda: values.look_ahead(values.exact(REWARD, 1.0), 1.5), TypeError, "k must"),
        (lambda: values.look_ahead(values.exact(REWARD, 1.0), 1, samples=0), ValueError, "samples"),
        (lambda: values.look_ahead(values.exact(REWARD, 1.0), 1, beta=-1.0), ValueError, "beta"),
        (lambda: values.monte_carlo(chain(), REWARD, chance=chance(), rollouts=0), ValueError, "rollouts"),
        (lambda: values.monte_carlo(chain(), REWARD, chance=chance(), beta=0), ValueError, "beta"),
        (lambda: values.monte_carlo(chain(), REWARD, chance=chance(), epochs=3), TypeError, "epochs"),
        (lambda: values.monte_carlo(chain(), lambda x: x / 0, chance=chance()), ValueError, "not finite"),
        (lambda: values.exact(REWARD, 1.0)(chain(), torch.arange(2), None, 6), ValueError, "outside the grid"),
        (lambda: values.exact(REWARD, 1.0)(chain(), torch.arange(2), None, -1), ValueError, "outside the grid"),
        (lambda: values.exact(REWARD, 1.0)(chain(), torch.arange(2), None, 1.0), ValueError, "integer"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_rna_values_run_at_realistic_length():
    world, reward = rna(30, 10), tensor_rewards.folding()
    x = world.renoise(world.draw(20, chance()), 0, 5, chance(1))
    said = world.predict(x)
    for tokens in ("argmax", "sample"):
        value = values.posterior_mean(reward, tokens, samples=2, beta=1.0)(world, x, said, 5, None, chance())
        assert value.shape == (20,) and torch.isfinite(value).all()
    with pytest.raises(TypeError, match="tokens"):
        values.posterior_mean(reward)(world, x, said, 5)
