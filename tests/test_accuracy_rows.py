"""Moves, waste-free particles and ordered resampling: exact on the small chain by enumeration of every outcome."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tiltlib import gaussian_values, steer, values
from tiltlib import tensor_rewards as rewards
from tiltlib.chance import Chance
from tiltlib.quasi import Quasi
from tiltlib.steer import rows
from tiltlib.worlds import Mixture, Product, Quadratic

from .test_steer import BETA, R, chain, expectations, mixture

PROPER = {  # Method, particles, steps: trees of at most a few hundred outcomes
    "one move": (replace(rows.smc(1.0), moves=1), 1, 2),
    "moves and children": (replace(rows.smc(1.0), moves=1, children=2), 1, 1),
    "two moves, drift": (rows.guided(1.0, moves=2), 1, 1),
    "waste-free": (rows.waste_free(1, drift=False), 2, 1),
    "waste-free, drift": (rows.waste_free(1), 2, 1),
    "ordered": (rows.guided(1.0, order=lambda x: -x.double()), 2, 1),
    "moves without a twist": (replace(rows.importance(), moves=1), 1, 2),
}


@pytest.mark.parametrize("name", PROPER)
def test_moves_waste_free_and_order_keep_z_and_moments(name):
    method, particles, steps = PROPER[name]
    world = chain(steps)
    total, z, zf, _ = expectations(method, particles, world)
    exact = math.exp(world.log_z(R, BETA))
    assert total == pytest.approx(1, abs=1e-12)
    assert z == pytest.approx(exact, abs=1e-12)
    assert zf == pytest.approx(exact * world.tilted_law(R, BETA)[1], abs=1e-12)


def test_a_move_that_forgets_the_proposal_is_found_out(monkeypatch):
    """Accepting as if the first child had come from the model loses the law of x_i given its parent."""
    from tiltlib.steer import loop

    monkeypatch.setattr(loop, "_of", lambda index, log_ratio, psi: torch.zeros_like(psi))
    _, z, zf, _ = expectations(rows.guided(1.0, moves=1), 1, chain(1))
    assert abs(z - math.exp(chain(1).log_z(R, BETA))) < 1e-12  # z is fixed before the move; moments are not
    assert abs(zf - math.exp(chain(1).log_z(R, BETA)) * chain(1).tilted_law(R, BETA)[1]) > 1e-3


def test_waste_free_needs_a_multiple_of_its_copies_and_moves_need_weights():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="5 particles"):
        steer.run(chain(), R, beta=BETA, method=rows.waste_free(1), generator=generator, particles=5)
    for wrong in (replace(rows.smc(potential="max"), moves=1), replace(rows.base(), moves=1)):
        with pytest.raises(ValueError, match="moves"):
            steer.run(chain(), R, beta=BETA, method=wrong, generator=generator)


def test_calls_of_moves():
    world, reward = mixture(), rewards.quadratic([1.0, -1.0], 0.5)
    table = gaussian_values.posterior_variance(world, chance=Chance(torch.Generator().manual_seed(1)), rollouts=8)
    value = gaussian_values.value(reward, 0.5, table)
    cost = {}
    for name, method in {"plain": rows.guided(), "moves": rows.guided(moves=2), "waste": rows.waste_free(3)}.items():
        generator = torch.Generator().manual_seed(0)
        o = steer.run(world, reward, beta=0.5, method=method, generator=generator, particles=8, value=value)
        cost[name] = o.calls
        assert o.calls.gradient == 0 and torch.isfinite(o.log_weights).all()
    assert cost["plain"].model == 8 * 30
    assert cost["moves"].model == 8 * 30 + 2 * 8 * 29  # no network at i = 0
    assert cost["waste"].model == 8 * 30 + 3 * 2 * 29


# ---------------------------------------------------------------------------------------------------- Gaussian values


@pytest.mark.parametrize("curvature", [-0.7, np.array([[-0.8, 0.3], [0.3, 0.2]])])
def test_the_gaussian_value_is_exact_on_a_gaussian(curvature):
    """Value and gradient against the closed form of a world whose x_0 given x_i is Gaussian."""
    s2 = 0.4
    world = Mixture([1.0], [[0.7, -0.4]], s2, steps=20)
    reward = Quadratic([0.9, 0.3], torch.as_tensor(curvature), 0.2)
    alpha, sigma = world.grid.alpha, world.grid.sigma
    table = s2 * sigma**2 / (alpha**2 * s2 + sigma**2)
    value, exact = gaussian_values.value(reward, 0.6, table), values.exact(reward, 0.6)
    for i in (0, 3, 12, 20):
        x = torch.randn(6, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64).requires_grad_()
        wanted = exact(world, x, None, i)
        (slope,) = torch.autograd.grad(wanted.sum(), x)
        x = x.detach()
        prediction = world.predict(x, i) if i else None
        said, pull = value.with_gradient(world, x, prediction, i)
        assert torch.allclose(said, wanted.detach(), atol=1e-12) and torch.allclose(pull, slope, atol=1e-10)
        assert torch.equal(value(world, x, prediction, i), said)


def test_posterior_variance_of_a_gaussian():
    s2 = 0.4
    world = Mixture([1.0], [[0.7, -0.4]], s2, steps=400)
    table = gaussian_values.posterior_variance(world, chance=Chance(torch.Generator().manual_seed(0)), rollouts=2000)
    alpha, sigma = world.grid.alpha, world.grid.sigma
    wanted = s2 * sigma**2 / (alpha**2 * s2 + sigma**2)
    assert table[0] == 0 and torch.allclose(table[60:], wanted[60:], rtol=0.12)


def test_with_no_variance_it_is_the_posterior_mean():
    world, reward = mixture(), rewards.quadratic([1.0, -1.0], 0.5)
    x = world.start(5, Chance(torch.Generator().manual_seed(0)))
    prediction = world.predict(x, 30)
    flat = gaussian_values.value(reward, 0.5, np.zeros(31))
    plain = values.posterior_mean(reward)
    assert torch.allclose(flat(world, x, prediction, 30), plain(world, x, prediction, 30), atol=1e-12)


def test_gaussian_values_refuse_what_they_cannot_do():
    reward = Quadratic([1.0], -1.0)
    with pytest.raises(TypeError, match="quadratic"):
        gaussian_values.value(lambda x: x.sum(1), 1.0, [0.0, 1.0])
    for table in ([0.0, -1.0], [[0.0]], [0.0, math.nan]):
        with pytest.raises(ValueError, match="variance"):
            gaussian_values.value(reward, 1.0, table)
    with pytest.raises(ValueError, match="too small"):
        gaussian_values.value(Quadratic([1.0], 2.0), 1.0, [0.0, 0.6])
    world = Mixture([1.0], [0.0], 1.0, steps=5)
    with pytest.raises(ValueError, match="5 steps"):
        gaussian_values.value(reward, 1.0, [0.0, 1.0])(world, torch.zeros(2, 1).double(), torch.zeros(2, 1).double(), 1)


# ------------------------------------------------------------------------------------------------- product and points


def test_a_product_is_the_mixture_of_all_pairs():
    """d = 2: nine components, written out."""
    w, m = torch.tensor([[0.5, 0.3, 0.2], [-2.0, 0.5, 3.0]], dtype=torch.float64)
    one = Mixture(w, m, [0.3, 0.5, 0.2], steps=12)
    product = Product(one, 2)
    pairs = [(a, b) for a in range(3) for b in range(3)]
    s = one.covariances
    full = Mixture(
        [w[a] * w[b] for a, b in pairs], [[m[a], m[b]] for a, b in pairs],
        np.array([np.diag([s[a], s[b]]) for a, b in pairs]), steps=12,
    )  # fmt: skip
    reward = Quadratic([0.4, -0.3], -0.5, 0.7)
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in (1, 6, 12):
        assert torch.allclose(product.predict(x, i), full.predict(x, i), atol=1e-10)
        assert torch.allclose(product.soft_value(x, i, reward, 0.8), full.soft_value(x, i, reward, 0.8), atol=1e-10)
    at = torch.tensor([1, 6, 12, 6, 1, 2, 3])
    assert torch.allclose(product.predict(x, at), full.predict(x, at), atol=1e-10)
    tilts, log_z = product.tilts(reward, 0.8)
    assert log_z == pytest.approx(full.log_z(reward, 0.8), abs=1e-12)
    whole = full.tilt(reward, 0.8)
    assert torch.allclose(sum(t.log_prob(x[:, k, None]) for k, t in enumerate(tilts)), whole.log_prob(x), atol=1e-10)
    drawn = product.draw(40000, Chance(torch.Generator().manual_seed(3)))
    wanted = float(w @ m)
    assert drawn.mean(0).tolist() == pytest.approx([wanted] * 2, abs=0.05)
    assert np.corrcoef(drawn.T)[0, 1] == pytest.approx(0, abs=0.02)
    with pytest.raises(ValueError, match="one-dimensional"):
        Product(full, 2)
    with pytest.raises(TypeError):
        product.soft_value(x, 1, Quadratic([1.0, 0.0], [[0.1, 0.0], [0.0, 0.1]]), 1.0)


def test_quasi_normals_have_the_right_law_and_fill_space():
    chance = Quasi(torch.Generator().manual_seed(0))
    z = chance.normals((256, 1, 3), dtype=torch.float64)
    assert z.shape == (256, 1, 3)
    cells = (torch.special.ndtr(z[:, 0]) * 256).long().sort(0).values
    assert torch.equal(cells, torch.arange(256)[:, None].expand(-1, 3))  # one point in each stripe
    first = torch.stack(
        [Quasi(torch.Generator().manual_seed(s)).normals((4, 2), dtype=torch.float64)[1] for s in range(400)]
    )
    assert abs(float(first.mean())) < 4 / 800**0.5 and float(first.std()) == pytest.approx(1, abs=0.1)
