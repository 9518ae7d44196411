"""A finite chain against the sum over all its trajectories; soft Bellman, Doob, hard and soft values."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltlib import law
from tiltlib.chance import Chance
from tiltlib.worlds import Chain


def chain(states=4, steps=3, seed=0):
    rng = np.random.default_rng(seed)
    kernels = 0.6 * np.eye(states) + 0.4 * rng.dirichlet(np.full(states, 0.6), size=(steps, states))  # it remembers
    return Chain(rng.dirichlet(np.ones(states)), kernels), rng.normal(size=states) * 1.5


def trajectories(world):
    """Every (x_steps, .., x_0) with its probability, by plain multiplication."""
    for path in itertools.product(range(world.states), repeat=world.steps + 1):
        p = world.start_law[path[0]]
        for k in range(world.steps):
            p *= world.kernels[world.steps - 1 - k][path[k], path[k + 1]]
        yield path, p


def expectation(world, f, i):
    """E[f(x_0) | x_i = x] for every x, by enumeration."""
    above, mass = np.zeros(world.states), np.zeros(world.states)
    for path, p in trajectories(world):
        above[path[world.steps - i]] += p * f[path[-1]]
        mass[path[world.steps - i]] += p
    return above / mass


def tv(p, q):
    return 0.5 * np.abs(np.asarray(p) - np.asarray(q)).sum()


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_values_and_tilt_against_all_trajectories(beta):
    world, r = chain()
    soft, hard = world.soft_values(r, beta), world.hard_values(r)
    for i in range(world.steps + 1):
        np.testing.assert_allclose(soft[i], beta * np.log(expectation(world, np.exp(r / beta), i)), atol=1e-12)
        np.testing.assert_allclose(hard[i], expectation(world, r, i), atol=1e-13)
        for y in range(world.states):
            np.testing.assert_allclose(world.clean_laws[i][:, y], expectation(world, np.eye(4)[y], i), atol=1e-14)
    p = sum(p * np.eye(4)[path[-1]] for path, p in trajectories(world))
    np.testing.assert_allclose(world.laws[0], p, atol=1e-15)
    np.testing.assert_allclose(world.tilted_law(r, beta), law.tilt(p, r, beta), atol=1e-14)
    assert world.log_z(r, beta) == pytest.approx(math.log(p @ np.exp(r / beta)), abs=1e-13)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(1, 5), st.floats(0.1, 10), st.integers(0, 10**6))
def test_soft_bellman_holds_and_its_linear_form_does_not(states, steps, beta, seed):
    """S1: exp(v_i / beta) = E[exp(v_{i-1} / beta)]."""
    world, r = chain(states, steps, seed)
    soft = world.soft_values(r, beta)
    for i in range(1, steps + 1):
        np.testing.assert_allclose(
            np.exp(soft[i] / beta), world.kernels[i - 1] @ np.exp(soft[i - 1] / beta), rtol=1e-12
        )
    linear = max(np.abs(soft[i] - world.kernels[i - 1] @ soft[i - 1]).max() for i in range(1, steps + 1))
    assert linear > 1e-4 * np.ptp(r) ** 2 / beta or np.ptp(soft[:-1], axis=1).max() < 0.05


def test_doob_needs_the_tilted_start():
    """S2: the guided kernels reproduce the tilted law only from the tilted start."""
    world, r = chain(5, 4, 3)
    beta = 0.5
    soft, target = world.soft_values(r, beta), law.tilt(world.laws[0], r, beta)
    doob = world.guide(soft, beta)
    assert tv(doob.laws[0], target) < 1e-14
    assert tv(world.guide(soft, beta, start=False).laws[0], target) > 1e-3
    # the normaliser of a row is exp(v_i / beta): it depends on the state, so no single 1/Z does
    rows = (world.kernels[3] * np.exp(soft[3] / beta)).sum(1)
    np.testing.assert_allclose(rows, np.exp(soft[4] / beta), rtol=1e-12)
    assert np.ptp(soft[4]) > 0.01
    # every marginal, not only the last, is tilted by its own soft value
    for i in range(5):
        np.testing.assert_allclose(doob.laws[i], law.tilt(world.laws[i], soft[i], beta), atol=1e-14)


def test_guidance_by_a_hard_or_posterior_mean_value_is_biased():
    world, r = chain(5, 4, 3)
    target, positions = law.tilt(world.laws[0], r, 0.5), np.arange(5.0)[:, None]

    def reward(x):
        return np.interp(x[:, 0], np.arange(5), r)

    mean = world.posterior_mean_values(reward, positions)
    np.testing.assert_allclose(mean[0], r)
    np.testing.assert_allclose(mean[2], [reward(law[None] @ positions)[0] for law in world.clean_laws[2]])
    for values in (world.hard_values(r), mean):
        assert tv(world.guide(values, 0.5).laws[0], target) > 0.01


def test_the_hard_value_differs_from_the_soft_one_by_half_a_variance_over_beta():
    """S3: the gap is Var(r | x) / (2 beta) at large beta, is never negative, and does not vanish at small beta."""
    world, r = chain(6, 3, 1)
    hard = world.hard_values(r)
    variance = np.array([expectation(world, r**2, i) for i in range(4)]) - hard**2
    for beta, tolerance in ((100.0, 0.03), (1000.0, 0.003)):
        gap = world.soft_values(r, beta) - hard
        np.testing.assert_allclose(gap[1:] * 2 * beta, variance[1:], rtol=tolerance)
        assert np.abs(gap[1:] * beta - variance[1:]).max() > 0.3 * variance.max()  # without the two
    for beta in (0.05, 0.5, 5.0):
        assert (world.soft_values(r, beta) - hard >= -1e-12).all()
    assert (world.soft_values(r, 0.05) - hard).max() > 0.5
    # the posterior mean's gap has nothing to do with beta
    linear = world.posterior_mean_values(lambda x: 2 * x[:, 0] - 1, np.arange(6.0)[:, None])
    np.testing.assert_allclose(linear, world.hard_values(2 * np.arange(6.0) - 1), atol=1e-12)
    square = world.posterior_mean_values(lambda x: x[:, 0] ** 2, np.arange(6.0)[:, None])
    assert (world.hard_values(np.arange(6.0) ** 2) - square)[1:].min() > 0.05


def run(world, n, chance, guide=None):
    """Sample through the world's protocol, optionally tilting each kernel by values (steps + 1, K)."""
    x = world.start(n, chance)
    for i in range(world.steps, 0, -1):
        kernel = world.kernel(x, world.predict(x, i), i)
        if guide is not None:
            kernel = kernel.tilt(torch.from_numpy(guide[i - 1]).expand(n, -1))
        x = kernel.sample(1, chance)[0][:, 0]
    return x


def test_sampling_through_the_protocol():
    world, r = chain(5, 4, 3)
    n, soft = 100_000, world.soft_values(r, 0.5)
    plain = run(world, n, Chance(torch.Generator().manual_seed(0)))
    error = 4 * np.sqrt(world.laws[0] * (1 - world.laws[0]) / n)
    frequencies = np.bincount(plain, minlength=5) / n
    assert (np.abs(frequencies - world.laws[0]) < error).all()
    assert (np.abs(frequencies - world.laws[1]) > 2 * error).any()
    # a chain that starts from the tilted start and tilts its kernels by v / beta samples the tilted law
    doob = run(
        Chain(world.guide(soft, 0.5).start_law, world.kernels), n, Chance(torch.Generator().manual_seed(1)), soft / 0.5
    )
    target = law.tilt(world.laws[0], r, 0.5)
    error = 4 * np.sqrt(target * (1 - target) / n)
    assert (np.abs(np.bincount(doob, minlength=5) / n - target) < error).all()
    assert (np.abs(frequencies - target) > 2 * error).any()
    start = world.tilted_start(n, Chance(torch.Generator().manual_seed(2)), r, 0.5)
    expected = law.tilt(world.laws[4], soft[4], 0.5)
    assert (np.abs(np.bincount(start, minlength=5) / n - expected) < 4 * np.sqrt(expected * (1 - expected) / n)).all()


def test_steps_may_differ_by_particle():
    world, _ = chain(5, 4, 3)
    x, steps = torch.tensor([0, 3, 4]), torch.tensor([1, 4, 2])
    kernel = world.kernel(x, world.predict(x, steps), steps)
    for k, i in enumerate(steps.tolist()):
        np.testing.assert_allclose(kernel.log_q[k].exp(), world.kernels[i - 1][x[k]], atol=1e-15)
        np.testing.assert_allclose(world.clean(x, world.predict(x, steps), steps)[k], world.clean_laws[i][x[k]])


def test_renoising_is_the_reversal_of_the_chain():
    world, _ = chain(4, 4, 7)
    n, chance = 100_000, Chance(torch.Generator().manual_seed(0))
    joint = np.zeros((4, 4))  # p(x_1, x_3)
    for path, p in trajectories(world):
        joint[path[3], path[1]] += p
    x3 = world.renoise(torch.full((n,), 2), 1, 3, chance)
    expected, wrong = joint[2] / joint[2].sum(), world.laws[3]
    frequencies, error = np.bincount(x3, minlength=4) / n, 4 * np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(frequencies - expected) < error).all()
    assert (np.abs(frequencies - wrong) > 2 * error).any()
    x = torch.tensor([0, 1, 2, 3])
    assert (world.renoise(x, 2, 2, chance) == x).all()
    mixed = world.renoise(
        x.repeat(n // 4), torch.tensor([0, 0, 1, 4]).repeat(n // 4), torch.tensor([0, 1, 3, 4]).repeat(n // 4), chance
    )
    assert (mixed[0::4] == 0).all() and (mixed[3::4] == 3).all()
    assert np.abs(np.bincount(mixed[2::4], minlength=4) / (n // 4) - expected).max() < 2 * error.max()


@pytest.mark.parametrize(
    "call",
    [
        lambda: Chain([], np.zeros((1, 0, 0))),
        lambda: Chain([0.5, 0.6], np.full((1, 2, 2), 0.5)),
        lambda: Chain([1.5, -0.5], np.full((1, 2, 2), 0.5)),
        lambda: Chain([0.5, 0.5], [[[0.5, 0.5], [0.5, 0.4]]]),
        lambda: Chain([0.5, 0.5], np.full((1, 2, 3), 1 / 3)),
        lambda: Chain([0.5, 0.5], np.zeros((0, 2, 2))),
        lambda: Chain([0.5, 0.5], [[[0.5, 0.5], [math.nan, 1.0]]]),
        lambda: chain()[0].soft_values([1.0, 2.0], 1.0),
        lambda: chain()[0].soft_values([1.0, 2.0, 3.0, math.inf], 1.0),
        lambda: chain()[0].soft_values(np.zeros(4), 0.0),
        lambda: chain()[0].soft_values(np.zeros(4), math.nan),
        lambda: chain()[0].tilted_law(np.zeros(4), -1.0),
        lambda: chain()[0].posterior_mean_values(lambda x: x, np.zeros((3, 1))),
        lambda: chain()[0].predict(torch.tensor([0]), 1, condition=2),
        lambda: chain()[0].predict(torch.tensor([0]), 4),
        lambda: chain()[0].kernel(torch.tensor([0]), None, 0),
        lambda: chain()[0].kernel(torch.tensor([0, 1]), None, torch.tensor([1, 4])),
        lambda: chain()[0].kernel(torch.tensor([0]), None, torch.tensor([1.0])),
        lambda: chain()[0].renoise(torch.tensor([0]), 2, 1, Chance(torch.Generator())),
    ],
)
def test_bad_input_is_a_value_error(call):
    with pytest.raises(ValueError):
        call()


def test_values_that_do_not_fit_are_named():
    for values in (np.zeros((3, 4)), np.full((4, 4), math.nan), np.full((4, 4), math.inf)):
        with pytest.raises(ValueError, match="values must be finite with shape"):
            chain()[0].guide(values, 1.0)


def test_a_reward_may_be_a_callable_and_zero_probabilities_are_allowed():
    world = Chain([1.0, 0.0], [[[0.0, 1.0], [0.3, 0.7]]])
    assert world.soft_values(lambda x: 2.0 * x, 0.5)[1, 0] == pytest.approx(2.0, abs=1e-15)
    assert world.log_z(lambda x: 2.0 * x, 0.5) == pytest.approx(4.0, abs=1e-14)
    x = run(world, 50, Chance(torch.Generator().manual_seed(0)))
    assert (x == 1).all()
