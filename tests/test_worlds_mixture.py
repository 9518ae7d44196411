"""A Gaussian mixture's score, posterior, values and tilt against quadrature, finite differences, scipy and published
closed forms; its sampler against the law it should have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tiltlib import paths
from tiltlib.chance import Chance
from tiltlib.worlds import Mixture, Quadratic

PATHS = sorted(paths.PATHS)
WEIGHTS, MEANS, SPREADS = [0.2, 0.5, 0.3], [-2.0, 0.3, 2.5], [0.36, 0.81, 0.25]
MEANS2 = [[-1.0, 0.5], [1.2, -0.4], [0.3, 1.5]]
COVARIANCES2 = [[[0.5, 0.2], [0.2, 0.3]], [[0.4, -0.25], [-0.25, 0.6]], [[0.3, 0.0], [0.0, 0.2]]]


def chance(seed=0):
    return Chance(torch.Generator().manual_seed(seed))


def line(**options):
    return Mixture(WEIGHTS, MEANS, SPREADS, **options)


def plane(**options):
    return Mixture(WEIGHTS, MEANS2, COVARIANCES2, **options)


LINEAR, CURVED = Quadratic([0.8], 0.0, 0.3), Quadratic([0.4], -0.7, -0.2)
LINEAR2 = Quadratic([0.8, -0.5], 0.0, 0.3)
CURVED2 = Quadratic([0.4, 0.1], [[-0.5, 0.3], [0.3, 0.2]], -0.2)  # curved up in one direction
REWARDS = {1: (LINEAR, CURVED), 2: (LINEAR2, Quadratic.around([0.5, 0.2], 0.6), CURVED2)}


def lattice(world):
    """Points (m, d) and their p(x_0) times the cell, by scipy: a trapezoid rule that is exact to round-off."""
    axis = np.linspace(-9, 9, 601 if world.dim == 1 else 141)
    points = np.stack([g.ravel() for g in np.meshgrid(*[axis] * world.dim, indexing="ij")], 1)
    full = world.covariances[:, None, None] * torch.eye(world.dim) if world.isotropic else world.covariances
    p = sum(
        w * stats.multivariate_normal(m, c).pdf(points)
        for w, m, c in zip(world.weights.tolist(), world.means.numpy(), full.numpy(), strict=True)
    )
    return torch.from_numpy(points), torch.from_numpy(p * (axis[1] - axis[0]) ** world.dim)


def by_quadrature(world, x, i, f):
    """E[f(x_0) | x_i = x] for f (m, k) tabulated on the lattice, and p_i(x)."""
    points, p = lattice(world)
    alpha, sigma = world.grid.alpha[i], world.grid.sigma[i]
    square = (((x[:, None] - alpha * points) / sigma) ** 2).sum(2)
    weights = p * torch.exp(-square / 2) / (2 * math.pi * sigma**2) ** (world.dim / 2)
    return (weights @ f) / weights.sum(1, keepdim=True), weights.sum(1)


@pytest.mark.parametrize("i", [2, 5, 8])
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("make", [line, plane])
def test_everything_at_every_step_against_quadrature(make, name, i):
    # as wide as the lattice resolves: steps whose noise is neither far below its cell nor far above its range
    on = paths.grid("ve", times=paths.ve().time(torch.linspace(0, 4, 9).double())) if name == "ve" else name
    world = make(path=on, steps=None if name == "ve" else 8)
    points, d = lattice(world)[0], world.dim
    x = world.grid.alpha[i] * world.draw(5, chance()) + world.grid.sigma[i] * chance(1).normals((5, d)).double()
    outer = (points[:, :, None] * points[:, None]).flatten(1)
    expected, density = by_quadrature(world, x, i, torch.cat([points, outer], 1))
    np.testing.assert_allclose(world.log_prob(x, i), density.log(), atol=1e-11)
    mean = world.posterior_mean(x, i)
    np.testing.assert_allclose(mean, expected[:, :d], atol=1e-10)
    log_weights, means, covariances = world.posterior(x, i)
    full = covariances[:, None, None] * torch.eye(d) if world.isotropic else covariances
    w = log_weights.exp()
    np.testing.assert_allclose((w[..., None] * means).sum(0), mean, atol=1e-13)
    second = torch.einsum("cn,cnj,cnk->njk", w, means, means) + torch.einsum("cn,cjk->njk", w, full)
    np.testing.assert_allclose(second.flatten(1), expected[:, d:], atol=1e-9)
    for reward in REWARDS[d]:
        values = reward(points)
        beta = 0.7
        hard, _ = by_quadrature(world, x, i, values[:, None])
        soft, _ = by_quadrature(world, x, i, torch.exp(values / beta)[:, None])
        np.testing.assert_allclose(world.hard_value(x, i, reward), hard[:, 0], atol=1e-9)
        np.testing.assert_allclose(world.soft_value(x, i, reward, beta), beta * soft[:, 0].log(), atol=1e-9)
        assert (world.soft_value(x, i, reward, beta) - hard[:, 0]).min() > 1e-6  # Jensen; and hard is not soft


@pytest.mark.parametrize("make", [line, plane])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_tilted_law_against_quadrature(make, beta):
    world = make()
    points, p = lattice(world)
    for reward in REWARDS[world.dim]:
        weights = p * torch.exp(reward(points) / beta)
        assert world.log_z(reward, beta) == pytest.approx(float(weights.sum().log()), abs=1e-10)
        tilted = world.tilt(reward, beta)
        _, q = lattice(tilted)
        np.testing.assert_allclose(q, weights / weights.sum(), atol=1e-14)
        assert (q - weights.sum() * p).abs().sum() > 0.05
        assert (tilted.isotropic, tilted.steps) == (world.isotropic, world.steps)
        here = points[(p > 1e-8)][::50]
        growth = tilted.log_prob(here) - world.log_prob(here) + world.log_z(reward, beta)
        np.testing.assert_allclose(growth, reward(here) / beta, atol=1e-9)


def test_the_tilt_of_an_isotropic_mixture_may_turn_anisotropic():
    world = Mixture(WEIGHTS, MEANS2, SPREADS)
    points, p = lattice(world)
    weights = p * torch.exp(CURVED2(points) / 1.5)
    tilted = world.tilt(CURVED2, 1.5)
    assert not tilted.isotropic
    np.testing.assert_allclose(lattice(tilted)[1], weights / weights.sum(), atol=1e-14)
    x = world.start(4, chance())
    hard, _ = by_quadrature(world, x, 50, CURVED2(points)[:, None])
    np.testing.assert_allclose(world.hard_value(x, 50, CURVED2), hard[:, 0], atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(PATHS), st.integers(0, 6), st.booleans(), st.integers(0, 10**6))
def test_score_identities(name, i, flat, seed):
    """The score is the gradient of log p_i, by central differences and by autograd; Tweedie's formula."""
    world = Mixture(WEIGHTS, MEANS2, SPREADS if flat else COVARIANCES2, path=name, steps=6)
    alpha, sigma = world.grid.alpha[i], world.grid.sigma[i]
    x = alpha * world.draw(3, chance(seed)) + sigma * chance(seed + 1).normals((3, 2), dtype=torch.float64)
    score, h = world.score(x, i), 1e-5 * float(torch.sqrt(0.3 * alpha**2 + sigma**2))
    for k in range(2):
        e = h * torch.eye(2, dtype=torch.float64)[k]
        difference = (world.log_prob(x + e, i) - world.log_prob(x - e, i)) / (2 * h)
        np.testing.assert_allclose(score[:, k], difference, atol=1e-5 * 1e-5 / h + 1e-8)
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(world.log_prob(y, i).sum(), y)
    np.testing.assert_allclose(score, gradient, rtol=1e-9, atol=1e-10)
    clean = world.posterior_mean(x, i)
    np.testing.assert_allclose(alpha * clean, x + sigma**2 * score, rtol=1e-8, atol=1e-8)  # Tweedie
    if i == 0:
        np.testing.assert_allclose(clean, x, rtol=1e-14)


def test_gradients_flow_through_the_prediction():
    """dE[x_0 | x] / dx is alpha / sigma^2 Cov(x_0 | x), by autograd through predict; likewise the value gradients."""
    for world in (line(steps=6), plane(steps=6)):
        x = world.draw(1, chance()).requires_grad_()
        jacobian = torch.autograd.functional.jacobian(lambda x, w=world: w.predict(x, 3)[0], x)[:, 0]
        log_weights, means, covariances = world.posterior(x.detach(), 3)
        w, full = log_weights.exp()[:, 0], covariances
        full = full[:, None, None] * torch.eye(world.dim) if world.isotropic else full
        centred = means[:, 0] - (w[:, None] * means[:, 0]).sum(0)
        covariance = torch.einsum("c,cj,ck->jk", w, centred, centred) + torch.einsum("c,cjk->jk", w, full)
        gain = world.grid.alpha[3] / world.grid.sigma[3] ** 2
        np.testing.assert_allclose(jacobian, gain * covariance, rtol=1e-9)
        # the gradient of the hard value of a linear reward, and of the soft one, exactly
        a = torch.tensor([0.8, -0.5][: world.dim], dtype=torch.float64)
        reward = Quadratic(a)
        (hard,) = torch.autograd.grad(world.hard_value(x, 3, reward).sum(), x)
        np.testing.assert_allclose(hard[0], gain * covariance @ a, rtol=1e-9)
        (soft,) = torch.autograd.grad(world.soft_value(x, 3, reward, 0.6).sum(), x)
        drift = world.tilt(reward, 0.6).score(x, 3) - world.score(x, 3)
        np.testing.assert_allclose(soft, 0.6 * drift.detach(), rtol=1e-8)
        assert (soft - hard).abs().max() > 1e-3


@pytest.mark.parametrize("step", [1, 20, 39])
def test_closed_forms_of_the_reward_score_matching_toy(step):
    """Linear and quadratic tilts of an equal-weight mixture with unit covariances, on the variance-preserving path."""
    r3 = math.sqrt(3)
    m = torch.tensor([[3, -r3], [-3, -r3], [0, 2 * r3]], dtype=torch.float64)
    world, beta = Mixture([1 / 3] * 3, m, 1.0, steps=40), 1.3
    a, b = torch.tensor([-0.5, 0.2], dtype=torch.float64), 3.0
    alpha, sigma = world.grid.alpha[step], world.grid.sigma[step]
    x = alpha * world.draw(6, chance()) + sigma * chance(1).normals((6, 2), dtype=torch.float64)
    pi = torch.softmax(-0.5 * ((x[:, None] - alpha * m) ** 2).sum(2), 1)
    mu = m + alpha * (x[:, None] - alpha * m)
    reward = Quadratic(a, 0.0, b)
    value = beta * torch.log((pi * torch.exp((mu @ a + b) / beta + sigma**2 * (a @ a) / (2 * beta**2))).sum(1))
    np.testing.assert_allclose(world.soft_value(x, step, reward, beta), value, atol=1e-11)
    tilted = world.tilt(reward, beta)
    np.testing.assert_allclose(tilted.means, m + a / beta, atol=1e-14)
    np.testing.assert_allclose(tilted.weights, torch.softmax(m @ a / beta, 0), atol=1e-14)
    assert world.log_z(reward, beta) == pytest.approx(
        float(torch.logsumexp((m @ a + b) / beta - math.log(3), 0) + a @ a / (2 * beta**2)), abs=1e-13
    )
    h, c = 0.5, torch.tensor([1.0, -0.4], dtype=torch.float64)
    tilted = world.tilt(Quadratic.around(c, h), beta)
    np.testing.assert_allclose(tilted.covariances, 1 / (1 + h / beta), rtol=1e-13)
    np.testing.assert_allclose(tilted.means, (m + h * c / beta) / (1 + h / beta), atol=1e-13)
    logits = -h * ((m - c) ** 2).sum(1) / (2 * (beta + h))
    np.testing.assert_allclose(tilted.weights, torch.softmax(logits, 0), atol=1e-13)


def test_the_hard_value_meets_the_soft_one_at_large_beta():
    """S3: the gap is Var(r | x) / (2 beta) there, and is not small at a small beta."""
    world = plane(steps=8)
    points, _ = lattice(world)
    x = world.draw(4, chance())
    moments, _ = by_quadrature(world, x, 5, torch.stack([LINEAR2(points), LINEAR2(points) ** 2], 1))
    variance = moments[:, 1] - moments[:, 0] ** 2
    gap = {beta: world.soft_value(x, 5, LINEAR2, beta) - world.hard_value(x, 5, LINEAR2) for beta in (0.1, 50.0, 500.0)}
    np.testing.assert_allclose(gap[500.0] * 1000, variance, rtol=0.01)
    np.testing.assert_allclose(gap[50.0] * 100, variance, rtol=0.1)
    assert (gap[0.1] > 0.3).all()


# ------------------------------------------------------------------------------------------------------------ draws


def uniforms(world, x, i):
    """The distribution function of p_i at x (n, 1), by scipy: uniform if x is drawn from p_i."""
    alpha, sigma = float(world.grid.alpha[i]), float(world.grid.sigma[i])
    return sum(
        float(w) * stats.norm(alpha * float(m), math.sqrt(alpha**2 * float(s) + sigma**2)).cdf(x[:, 0])
        for w, m, s in zip(world.weights, world.means, world.covariances, strict=True)
    )


def fits(world, x, i=0):
    return stats.kstest(uniforms(world, x, i), "uniform").pvalue


def test_draws_and_starts_have_their_laws():
    n = 20_000
    world = line(path=paths.grid("rectified", 5, start=0.6))
    assert fits(world, world.draw(n, chance())) > 1e-3
    assert fits(world, world.start(n, chance()), 5) > 1e-3
    assert fits(world, world.start(n, chance()), 4) < 1e-9
    start, tilted = world.tilted_start(n, chance(1), CURVED, 0.7), world.tilt(CURVED, 0.7)
    assert fits(tilted, start, 5) > 1e-3
    assert fits(world, start, 5) < 1e-9
    assert fits(tilted, world.start(n, chance(1)), 5) < 1e-9
    flat = plane()
    x = flat.draw(n, chance(2))
    mean = (flat.weights[:, None] * flat.means).sum(0)
    covariance = torch.einsum("c,cij->ij", flat.weights, flat.covariances)
    covariance += torch.einsum("c,ci,cj->ij", flat.weights, flat.means - mean, flat.means - mean)
    assert ((x.mean(0) - mean).abs() < 4 * (torch.diagonal(covariance) / n).sqrt()).all()
    assert (torch.cov(x.T) - covariance).abs().max() < 4 * covariance.max() * math.sqrt(2.5 / n)
    assert (covariance - torch.diag(torch.diagonal(covariance))).abs().max() > 0.1  # a diagonal one would not pass


def sample(world, n, chance, tilted=None, start=None):
    """The world's protocol; with `tilted`, each step is tilted by the gradient of the soft value over beta."""
    x = world.start(n, chance) if start is None else start
    for i in range(world.steps, 0, -1):
        kernel = world.kernel(x, world.predict(x, i), i)
        if tilted is not None:
            kernel = kernel.tilt(tilted.score(x, i) - world.score(x, i))
        x = kernel.sample(1, chance)[0][:, 0]
    return x


@pytest.mark.parametrize(
    "path, sampler, prediction",
    [
        ("vp_linear", "ancestral", "epsilon"),
        ("vp_cosine", "ode", "v_prediction"),
        ("ve", "sde_dpmsolver", "score"),
        ("rectified", "ode", "velocity"),
        ("rectified", "dance_grpo", "x0"),
        ("rectified", "ancestral", "velocity"),
    ],
)
def test_the_sampler_reaches_the_data(path, sampler, prediction):
    world, n = line(path=path, sampler=sampler, steps=120, prediction=prediction), 2000
    if path == "vp_cosine":
        world = line(path=paths.grid(path, 120, start=0.999), sampler=sampler, prediction=prediction)
    x = sample(world, n, chance(4))
    assert fits(world, x) > 1e-3
    assert fits(world.tilt(LINEAR, 2.0), x) < 1e-9


def mean_after(world, reward, beta, tilted_start):
    """The mean of x_0 under the guided chain of a single Gaussian, whose every step is linear: no sampling needed."""
    tilted = world.tilt(reward, beta)
    start = tilted if tilted_start else world
    x = world.grid.alpha[-1] * start.means  # (1, 1): the mean moves as the particle at it does
    for i in range(world.steps, 0, -1):
        x = world.kernel(x, world.predict(x, i), i).tilt(tilted.score(x, i) - world.score(x, i)).mean
    return float(x)


def test_doob_guidance_needs_the_tilted_start():
    """S2 on a Gaussian: the mean is spread * a / beta from the tilted start, and falls short of it without."""
    reward, beta, spread = Quadratic([1.2]), 1.0, 1.7
    error = {}
    for steps in (200, 400):
        on = paths.grid("rectified", steps, start=0.5)  # half of the signal is left at the start
        world = Mixture([1.0], [[0.0]], spread, path=on, sampler="ancestral")
        error[steps] = abs(mean_after(world, reward, beta, True) - 1.2 * spread)
        assert abs(mean_after(world, reward, beta, False) - 1.2 * spread) > 0.3
    assert error[400] < 0.02 and error[200] / error[400] == pytest.approx(2, abs=0.2)


# ---------------------------------------------------------------------------------------- conditions, steps, layout


def test_a_condition_is_a_component():
    world = plane(steps=8)
    x = world.draw(6, chance())
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    for c in range(3):
        alone = Mixture([1.0], [MEANS2[c]], [COVARIANCES2[c]], steps=8)
        np.testing.assert_allclose(world.score(x, 5, c), alone.score(x, 5), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(world.log_prob(x, 5, c), alone.log_prob(x, 5), atol=1e-12)
        here = labels == c
        np.testing.assert_allclose(world.predict(x, 5, labels)[here], alone.predict(x[here], 5), rtol=1e-10)
    # Bayes: the score is the average of the conditional ones
    posterior = world.posterior(x, 5).log_weights.exp()
    average = sum(posterior[c][:, None] * world.score(x, 5, c) for c in range(3))
    np.testing.assert_allclose(world.score(x, 5), average, rtol=1e-10, atol=1e-12)
    for wrong in (3, -1, 0.5, labels[:2], labels + 1, True):
        with pytest.raises(ValueError, match="condition"):
            world.predict(x, 5, wrong)
    with pytest.raises(ValueError, match="condition"):
        Mixture([1.0, 0.0], [0.0, 1.0], 1.0).predict(x[:, :1], 5, 1)


def test_steps_and_conditions_may_differ_by_particle():
    for world in (Mixture(WEIGHTS, MEANS2, SPREADS, steps=8), plane(steps=8)):
        x, steps, labels = world.draw(5, chance()), torch.tensor([8, 1, 3, 1, 8]), torch.tensor([0, 2, 1, 1, 0])
        for k in range(5):
            one, i = x[k : k + 1], int(steps[k])
            np.testing.assert_allclose(world.predict(x, steps)[k], world.predict(one, i)[0], rtol=1e-12)
            np.testing.assert_allclose(
                world.predict(x, steps, labels)[k], world.predict(one, i, int(labels[k]))[0], rtol=1e-12
            )
            value = world.soft_value(x, steps, LINEAR2, 0.7)[k]
            assert float(value) == pytest.approx(float(world.soft_value(one, i, LINEAR2, 0.7)), abs=1e-12)


@pytest.mark.parametrize("dim", [1, 3, 20])
def test_the_isotropic_layout_is_the_general_one(dim):
    rng = np.random.default_rng(dim)
    means, spreads = rng.normal(size=(4, dim)), rng.uniform(0.3, 2, 4)
    fast = Mixture([0.1, 0.2, 0.3, 0.4], means, spreads, steps=5)
    slow = Mixture([0.1, 0.2, 0.3, 0.4], means, spreads[:, None, None] * np.eye(dim), steps=5)
    x = fast.draw(7, chance())
    for i in range(6):
        np.testing.assert_allclose(fast.log_prob(x, i), slow.log_prob(x, i), atol=1e-11)
        np.testing.assert_allclose(fast.score(x, i), slow.score(x, i), atol=1e-11)
        np.testing.assert_allclose(fast.posterior_mean(x, i), slow.posterior_mean(x, i), atol=1e-11)
    reward = Quadratic(rng.normal(size=dim), -0.3, 0.1)
    np.testing.assert_allclose(fast.soft_value(x, 3, reward, 0.8), slow.soft_value(x, 3, reward, 0.8), atol=1e-10)
    np.testing.assert_allclose(fast.hard_value(x, 3, reward), slow.hard_value(x, 3, reward), atol=1e-11)


def test_float32_particles_stay_float32_and_close():
    world = Mixture(WEIGHTS, MEANS2, SPREADS, dtype=torch.float32, sampler="ancestral", prediction="epsilon", steps=20)
    x = world.start(5, chance())
    out = world.predict(x, 12)
    kernel = world.kernel(x, out, 12).tilt(world.score(x, 12))
    child, log_ratio = kernel.sample(2, chance())
    assert {t.dtype for t in (x, out, child, log_ratio, world.clean(x, out, 12))} == {torch.float32}
    np.testing.assert_allclose(out, world.predict(x.double(), 12), atol=1e-5)


def test_the_prediction_asked_for_is_the_one_given():
    for kind in paths.PREDICTIONS:
        world = plane(path=paths.grid("vp_linear", 6), prediction=kind)
        x = world.start(4, chance())
        expected = paths.convert(world.grid, world.posterior_mean(x, 2), x, 2, "x0", kind)
        np.testing.assert_allclose(world.predict(x, 2), expected, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(world.clean(x, world.predict(x, 2), 2), world.posterior_mean(x, 2), rtol=1e-9)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "call",
    [
        lambda: Mixture([0.5, 0.6], [0.0, 1.0], 1.0),
        lambda: Mixture([1.5, -0.5], [0.0, 1.0], 1.0),
        lambda: Mixture([0.5, math.nan], [0.0, 1.0], 1.0),
        lambda: Mixture([1.0], [0.0, 1.0], 1.0),
        lambda: Mixture([], np.zeros((0, 2)), 1.0),
        lambda: Mixture([0.5, 0.5], [0.0, math.inf], 1.0),
        lambda: Mixture([0.5, 0.5], [0.0, 1.0], [1.0, 1.0, 1.0]),
        lambda: Mixture([0.5, 0.5], [0.0, 1.0], 1.0, path="straight"),
        lambda: Mixture([0.5, 0.5], [0.0, 1.0], 1.0, sampler="heun"),
        lambda: Mixture([0.5, 0.5], [0.0, 1.0], 1.0, prediction="noise"),
        lambda: Mixture([0.5, 0.5], [0.0, 1.0], 1.0, steps=0),
        lambda: line().tilt(LINEAR, 0.0),
        lambda: line().log_z(LINEAR, math.nan),
        lambda: line().score(torch.zeros(3, 2).double(), 5),
        lambda: line().score(torch.zeros(3).double(), 5),
        lambda: line().score(torch.zeros(3, 1).double(), 51),
        lambda: line().score(torch.zeros(3, 1).double(), -1),
        lambda: line().posterior(torch.zeros(2, 1).double(), torch.tensor([1, 2])),
        lambda: line(prediction="epsilon").predict(torch.zeros(3, 1).double(), 0),
        lambda: line().kernel(torch.zeros(3, 1).double(), torch.zeros(3, 1).double(), 0),
        lambda: Quadratic(1.0),
        lambda: Quadratic([1.0, 2.0], [[1.0]]),
        lambda: Quadratic([1.0, 2.0], [[1.0, 0.2], [0.1, 1.0]]),
        lambda: Quadratic([math.nan]),
        lambda: Quadratic([1.0], 0.0, math.inf),
    ],
)
def test_bad_input_is_a_value_error(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize(
    "covariances",
    [0.0, [1.0, -0.2, 1.0], [[[1.0, 2.0], [2.0, 1.0]]] * 3, [[[1.0, 0.5], [0.1, 1.0]]] * 3, np.zeros((3, 2, 2))],
)
def test_a_covariance_that_is_not_positive_definite_is_an_error(covariances):
    with pytest.raises(ValueError, match="positive definite"):
        Mixture(WEIGHTS, MEANS2, covariances)


def test_a_tilt_without_a_normaliser_is_an_error():
    convex = Quadratic([0.0], 1.0)  # exp(x^2 / 2 beta) against a largest variance of .81
    assert math.isfinite(line().log_z(convex, 0.82))
    for world, reward, beta in ((line(), convex, 0.8), (plane(), CURVED2, 0.05)):
        with pytest.raises(ValueError, match="too small"):
            world.tilt(reward, beta)


def test_rewards_that_are_not_quadratic_have_no_exact_tilt():
    for reward in (lambda x: x.sum(1), LINEAR2):
        with pytest.raises(TypeError):
            line().tilt(reward, 1.0)
        with pytest.raises(TypeError):
            line().hard_value(torch.zeros(2, 1).double(), 3, reward)


def test_a_quadratic_reward_and_its_gradient():
    x = torch.tensor([[0.3, -1.2], [2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    a, q = np.array([0.4, 0.1]), np.array([[-0.5, 0.3], [0.3, 0.2]])
    points = x.detach().numpy()
    np.testing.assert_allclose(CURVED2(x).detach(), [0.5 * p @ q @ p + a @ p - 0.2 for p in points], rtol=1e-14)
    (gradient,) = torch.autograd.grad(CURVED2(x).sum(), x)
    np.testing.assert_allclose(CURVED2.gradient(x).detach(), gradient, rtol=1e-14)
    near = Quadratic.around([0.5, 0.2], 0.6)
    np.testing.assert_allclose(near(x).detach(), -0.3 * ((points - [0.5, 0.2]) ** 2).sum(1), atol=1e-14)
