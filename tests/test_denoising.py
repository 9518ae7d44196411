"""tune/denoising.py: the reciprocal tilt against its optimality and roots by hand, regressions against exact laws."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_training import P, R, seeded
from tiltlib import law, paths, tensor_rewards, worlds
from tiltlib.chance import Chance
from tiltlib.tune import denoising, weighted
from tiltlib.worlds.base import Diffusion

pytestmark = pytest.mark.usefixtures("strict")


# ------------------------------------------------------------------ the objective (34) and its optimum


def test_the_reciprocal_tilt_of_two_outcomes_by_hand():
    # p = (1/4, 3/4), r = (1, 0), beta = 1: with s = lambda - 1, 1/(4 s) + 3/(4 (1 + s)) = 1, that is 4 s^2 = 1
    q, multiplier = denoising.reciprocal([0.25, 0.75], [1.0, 0.0], 1.0)
    assert multiplier == pytest.approx(1.5, abs=1e-14)
    assert np.allclose(q, [0.5, 0.5], atol=1e-14)


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(-50, 50)), min_size=1, max_size=8),
    st.floats(-4, 4),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_the_reciprocal_tilt_is_optimal(outcomes, log_beta, seed):
    p, r = np.array(outcomes).T
    p, beta = p / p.sum(), np.exp(log_beta)
    q, multiplier = denoising.reciprocal(p, r, beta)
    assert abs(q.sum() - 1) < 1e-12 and multiplier > r.max()
    assert beta * p[r == r.max()].sum() <= (multiplier - r.max()) * (1 + 1e-9) + 1e-12
    assert multiplier - r.max() <= beta * (1 + 1e-9) + 1e-12
    assert np.ptp(r + beta * p / q) <= 1e-8 * (100 + beta)
    best = denoising.converted_objective(q, p, r, beta)
    other = np.random.default_rng(seed).dirichlet(np.ones(len(p)))
    other = other + 1e-9
    other = other / other.sum()
    gap = best - denoising.converted_objective(other, p, r, beta)
    u = other / q
    assert gap == pytest.approx(beta * p @ (u - 1 - np.log(u)), rel=1e-6, abs=1e-9 * (100 + beta))


def test_shift_scale_and_unseen_outcomes_change_nothing():
    q, multiplier = denoising.reciprocal(P, R, 0.3)
    shifted = denoising.reciprocal(P, R + 40, 0.3)
    assert np.allclose(shifted.law, q, atol=1e-12) and shifted.multiplier == pytest.approx(multiplier + 40, abs=1e-12)
    scaled = denoising.reciprocal(P, 10 * R, 3.0)
    assert np.allclose(scaled.law, q, atol=1e-13) and scaled.multiplier == pytest.approx(10 * multiplier, abs=1e-11)
    padded = denoising.reciprocal(np.append(P, 0.0), np.append(R, 1e6), 0.3)  # the best outcome is impossible
    assert np.allclose(padded.law, np.append(q, 0.0), atol=1e-13)


def test_both_tilts_agree_to_first_order_only():
    rho, hot = R - P @ R, 1e4
    exponential, reciprocal = law.tilt(P, R, hot), denoising.reciprocal(P, R, hot).law
    assert np.allclose(hot * (reciprocal / P - 1), rho, atol=1e-3)
    assert np.allclose(hot**2 * (reciprocal - exponential) / P, (rho**2 - P @ rho**2) / 2, atol=1e-3)


def test_the_converted_objective_turns_the_divergence_round():
    q = np.array([0.4, 0.1, 0.2, 0.3])
    by_hand = q @ R - 0.7 * sum(a * np.log(a / b) for a, b in zip(P, q, strict=True))
    assert denoising.converted_objective(q, P, R, 0.7) == pytest.approx(by_hand, abs=1e-14)
    assert denoising.converted_objective([1.0, 0, 0, 0], P, R, 0.7) == -np.inf
    assert denoising.converted_objective(P, P, R, 0.7) == pytest.approx(P @ R, abs=1e-14)


@pytest.mark.parametrize("beta", [0.0, -1.0, np.nan, np.inf])
def test_a_temperature_is_positive(beta):
    for what in (denoising.reciprocal, lambda p, r, b: denoising.converted_objective(p, p, r, b)):
        with pytest.raises(ValueError, match="beta"):
            what(P, R, beta)


# ------------------------------------------------------------------ noised samples and their targets


class Stub(Diffusion):
    """A world of points (n, 2) with a linear network of x and of the step."""

    def __init__(self, prediction, path="rectified", steps=6):
        super().__init__(path, "ancestral", steps, prediction)
        self.network = torch.nn.Linear(3, 2, dtype=torch.float64)
        with torch.no_grad():
            for k, weight in enumerate(self.network.parameters()):
                weight.copy_(torch.linspace(-0.3, 0.4 + k, weight.numel(), dtype=torch.float64).view_as(weight))
        self.network.requires_grad_(False)
        self.calls = 7

    def predict(self, x, i, condition=None):
        i = torch.as_tensor(i, dtype=x.dtype).reshape(-1, 1).expand(len(x), 1)
        self.calls += len(x)
        return self.network(torch.cat([x, i / self.steps], 1))


def batch_of(n, steps, seed=1):
    x0, noise = Chance(seeded(seed)).normals((2, n, 2), dtype=torch.float64)
    return denoising.Noised(x0, 1 + torch.arange(n) % steps, noise)


@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
@pytest.mark.parametrize("path", ["rectified", "vp_linear"])
def test_targets_are_what_the_conversions_say(prediction, path):
    world = Stub(prediction, paths.grid(path, 6, start=0.95), steps=None)
    batch = batch_of(12, 6)
    x, target = denoising.noised(world, batch)
    alpha, sigma = (table[batch.i][:, None] for table in (world.grid.alpha, world.grid.sigma))
    assert torch.allclose(x, alpha * batch.x0 + sigma * batch.noise, atol=1e-14)
    back = [paths.convert(world.grid, target, x, batch.i, prediction, what) for what in ("x0", "epsilon")]
    assert torch.allclose(back[0], batch.x0, atol=1e-10) and torch.allclose(back[1], batch.noise, atol=1e-10)


def test_the_loss_is_half_the_squared_error_and_has_its_gradient():
    world, batch = Stub("velocity"), batch_of(5, 6)
    policy = denoising.Denoiser(world)
    value = policy.log_prob(batch)
    x, target = denoising.noised(world, batch)
    error = world.predict(x, batch.i) - target
    assert torch.allclose(value, -(error**2).sum(1) / 2, atol=1e-14)
    (-value.mean()).backward()
    features = torch.cat([x, batch.i[:, None] / 6], 1)
    assert torch.allclose(policy.parameters()["weight"].grad, error.T @ features / 5, atol=1e-13)
    assert torch.allclose(policy.parameters()["bias"].grad, error.mean(0), atol=1e-13)


# ------------------------------------------------------------------ the fit


def line():
    """N(0, 1) on a short path, its exact tilt towards 2, a pool and weights."""
    world = worlds.Mixture([1.0], [0.0], 1.0, steps=5, prediction="epsilon")
    reward = tensor_rewards.quadratic([2.0], 1.0)
    pool = world.draw(3000, Chance(seeded(3)))
    return world, world.tilt(reward.function, 1.0), pool, weighted.normalise(reward(pool).numpy())


def distance(a, b):
    """Root mean squared difference of two predictions, over levels and where the tilted law lives."""
    x = torch.linspace(-1, 2, 13, dtype=torch.float64)[:, None]
    return float(torch.stack([(a.predict(x, i) - b.predict(x, i)).square().mean() for i in range(1, 6)]).mean().sqrt())


def test_it_learns_the_denoiser_of_the_tilted_law_and_without_weights_that_of_the_model():
    world, tilted, pool, weights = line()
    options = {"steps": 120, "batch": 200, "learning_rate": 0.02}
    start = denoising.Corrected(world, width=16, generator=seeded(4))
    assert distance(start, world) == 0
    fit = denoising.fit(start, pool, weights, generator=seeded(5), **options)
    plain = denoising.fit(start, pool, generator=seeded(5), **options)
    apart = distance(world, tilted)
    assert distance(fit.world, tilted) < 0.15 * apart < distance(plain.world, tilted)
    assert distance(plain.world, world) < 0.15 * apart
    assert distance(start, world) == 0  # the world that was given is as it was
    assert len(fit.history["loss"]) == 120 and fit.calls.model == fit.calls.gradient == 120 * 200
    assert not any(parameter.requires_grad for parameter in fit.world.network.parameters())


def test_only_samples_with_weight_are_looked_at():
    world = Stub("velocity")
    pool = torch.full((50, 2), 1e300, dtype=torch.float64)  # the square of any of these is infinite
    pool[[3, 20]] = torch.tensor([[0.5, -1.0], [2.0, 0.1]], dtype=torch.float64)
    weights = np.zeros(50)
    weights[[3, 20]] = 0.25, 0.75
    seen = []
    predict = Stub.predict

    class Watching(Stub):
        def predict(self, x, i, condition=None):
            seen.append(torch.as_tensor(i).bincount(minlength=7)[1:])
            return predict(self, x, i, condition)

    world = Watching("velocity")
    o = denoising.fit(world, pool, weights, steps=3, batch=12, learning_rate=1e-3, generator=seeded())
    assert np.isfinite(o.history["loss"]).all()
    assert all((counts == 2).all() for counts in seen)  # every level gets the same share of every batch
    assert world.calls == 7 and o.world.calls == 0  # the counters of the given world and of the tuned one


def test_conditions_go_with_their_samples():
    world = Stub("velocity")
    told = []

    class Conditioned(Stub):
        def predict(self, x, i, condition=None):
            told.append((x.clone(), condition))
            return super().predict(x, i)

    pool = torch.arange(10.0, dtype=torch.float64)[:, None].expand(-1, 2) * 1000
    world = Conditioned("x0")
    denoising.fit(
        world, pool, steps=2, batch=10, learning_rate=1e-4, generator=seeded(), condition=torch.arange(10) * 3
    )  # fmt: skip
    for x, condition in told:
        kept = world.grid.alpha[1:]
        ratio = x[:, 0] / (condition / 3 * 1000).clamp(min=1)
        known = condition > 0
        assert (ratio[known][:, None] - kept).abs().min(1).values.max() < 0.01


def test_the_learning_rate_falls_to_zero_and_a_killed_run_goes_on(tmp_path):
    world, _, pool, weights = line()
    start = denoising.Corrected(world, width=8, generator=seeded(4))
    options = {"steps": 8, "batch": 20, "learning_rate": 0.01, "every": 1}
    whole = denoising.fit(start, pool, weights, generator=seeded(5), **options)
    rates, file = [], tmp_path / "checkpoint.safetensors"
    step = torch.optim.Adam.step

    def interrupted(self, closure=None):
        rates.append(self.param_groups[0]["lr"])
        if len(rates) == 5:
            raise KeyboardInterrupt
        return step(self, closure)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.Adam, "step", interrupted)
        denoising.fit(start, pool, weights, generator=seeded(5), checkpoint=file, **options)
    assert np.allclose(rates, 0.01 * (1 - np.arange(5) / 8))
    again = denoising.fit(start, pool, weights, generator=seeded(99), checkpoint=file, **options)
    for a, b in zip(whole.world.network.parameters(), again.world.network.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="of is 8 there and 9 here"):
        denoising.fit(start, pool, weights, generator=seeded(5), checkpoint=file, **(options | {"steps": 9}))


def test_a_corrected_world_is_the_world_and_can_be_copied():
    world, *_ = line()
    corrected = denoising.Corrected(world, generator=seeded())
    assert corrected.steps == 5 and corrected.grid is world.grid
    twin = copy.deepcopy(corrected)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    steps = torch.tensor([1, 2, 3, 4, 5])
    assert torch.equal(twin.predict(x, steps), world.predict(x, steps))
    with torch.no_grad():
        corrected.network[-1].weight.fill_(0.1)
    each = torch.cat([corrected.predict(x[[k]], int(steps[k])) for k in range(5)])
    assert torch.allclose(corrected.predict(x, steps), each, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pool": torch.zeros(0, 2)}, ValueError, "pool"),
        ({"pool": torch.full((3, 2), torch.nan)}, ValueError, "finite"),
        ({"weights": np.array([0.5, 0.5])}, ValueError, "do not fit"),
        ({"weights": np.array([0.5, 0.5, 0.5])}, ValueError, "sum to one"),
        ({"condition": torch.zeros(2, dtype=torch.int64)}, ValueError, "conditions"),
        ({"batch": 0}, ValueError, "batch"),
        ({"steps": 0}, ValueError, "steps"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate"),
        ({"world": worlds.Mixture([1.0], [0.0], 1.0, steps=3)}, TypeError, "Corrected"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_work(change, error, message):
    options = {"world": Stub("x0"), "pool": torch.zeros(3, 2, dtype=torch.float64), "weights": None, "condition": None}
    options |= {"steps": 1, "batch": 2, "learning_rate": 1e-3, "generator": seeded()} | change
    with pytest.raises(error, match=message):
        denoising.fit(**options)
