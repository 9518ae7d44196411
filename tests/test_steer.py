"""The particle loop against exact answers: every row by enumeration of all its random outcomes, on a small chain."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tiltlib import bestofn, steer, values
from tiltlib import tensor_rewards as rewards
from tiltlib.chance import Chance
from tiltlib.enumeration import outcomes
from tiltlib.steer import rows
from tiltlib.worlds import Chain, Guided, Mixture, Sequence, digits


def chain(steps=2):
    """Two states, nothing symmetric."""
    kernels = [[[0.9, 0.1], [0.35, 0.65]], [[0.2, 0.8], [0.55, 0.45]]][:steps]
    return Chain([0.3, 0.7], kernels)


R, BETA = np.array([0.2, 1.1]), 0.6


def expectations(method, particles=2, world=None, f=(0.0, 1.0), **more):
    """Total probability, E[Z_hat], E[Z_hat f_hat], law of a draw by weight; by enumeration of the production loop."""
    world, f = world or chain(), torch.tensor(f, dtype=torch.float64)
    total, z, zf, drawn = 0.0, 0.0, 0.0, torch.zeros(2, dtype=torch.float64)
    more = {"value": values.posterior_mean(rewards.table(R))} | more
    for p, o in outcomes(
        lambda chance: steer.run(
            world, rewards.table(R), beta=BETA, method=method, generator=chance, particles=particles, **more
        )
    ):
        w = o.log_weights[0]
        total, z = total + p, z + p * w.exp().mean()
        zf = zf + p * (w.exp() * f[o.samples[0]]).mean()
        drawn = drawn.index_add(0, o.samples[0], p * w.softmax(0))
    return total, float(z), float(zf), drawn.numpy()


PROPER = {
    "importance": rows.importance(),
    "smc, always": rows.smc(1.0),
    "smc, sometimes": rows.smc(0.97),
    "fk max": rows.smc(1.0, potential="max"),
    "fk sum": rows.smc(0.9, potential="sum"),
    "nested": rows.nested_smc(2, ess=1.0),
    "children compete": replace(rows.smc(0.5), children=2),
    "das": rows.das(1.0),
    "das, linear": rows.das(0.95, tempering=rows.linear()),
    "das, exponential, own proposal": rows.das(1.0, tempering=rows.exponential(0.4), drift=False),
    "tds": rows.tds(1.0),
}


@pytest.mark.parametrize("name", PROPER)
def test_proper_rows_estimate_z_and_moments_without_bias(name):
    world, particles = chain(), 1 if PROPER[name].children > 1 else 2
    total, z, zf, _ = expectations(PROPER[name], particles)
    target = world.tilted_law(R, BETA)
    exact = math.exp(world.log_z(R, BETA))
    assert total == pytest.approx(1, abs=1e-12)
    assert z == pytest.approx(exact, abs=1e-12)
    assert zf == pytest.approx(exact * target[1], abs=1e-12)


@pytest.mark.parametrize("name", [name for name in steer.METHODS if not steer.METHODS[name].proper])
def test_rows_that_are_not_proper_are_biased_and_give_no_evidence(name):
    method = steer.METHODS[name]
    method = replace(method, children=2) if method.children > 1 else method
    _, z, _, _ = expectations(method, particles=1)
    assert abs(z - math.exp(chain().log_z(R, BETA))) > 0.05
    generator = torch.Generator().manual_seed(0)
    assert steer.run(chain(), R, beta=BETA, method=method, generator=generator).log_z is None


def test_a_value_that_is_wrong_costs_no_bias():
    wrong = values.posterior_mean(rewards.table(-3 * R))

    def value(world, x, prediction, i, condition, chance):
        return wrong(world, x, prediction, i, condition, chance) if i else torch.as_tensor(R)[x]

    _, z, zf, _ = expectations(rows.smc(1.0), value=value)
    exact = math.exp(chain().log_z(R, BETA))
    assert (z, zf) == pytest.approx((exact, exact * chain().tilted_law(R, BETA)[1]), abs=1e-12)


def test_another_proposal_is_corrected_by_its_weights():
    tuned = Chain([0.3, 0.7], [[[0.5, 0.5], [0.1, 0.9]], [[0.6, 0.4], [0.3, 0.7]]])
    _, z, zf, _ = expectations(rows.smc(1.0), proposal=tuned)
    exact = math.exp(chain().log_z(R, BETA))
    assert (z, zf) == pytest.approx((exact, exact * chain().tilted_law(R, BETA)[1]), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_draw_by_weight_from_importance_is_soft_best_of_n(n):
    *_, drawn = expectations("soft_best_of_n", particles=n)
    assert drawn == pytest.approx(bestofn.soft_law(chain().laws[0], R, BETA, n), abs=1e-12)
    if n == 2:  # particles that are resampled on the way have another law
        *_, drawn = expectations(rows.smc(1.0), particles=n)
        assert abs(drawn - bestofn.soft_law(chain().laws[0], R, BETA, n)).max() > 1e-4


@pytest.mark.parametrize("greedy", [False, True])
def test_svdd_is_a_product_of_laws_of_best_of_m(greedy):
    """Each step is best-of-M of the kernel's law, with the value as its reward."""
    value = values.exact(R, BETA)
    v = chain().soft_values(R, BETA)
    select = (lambda p, u: bestofn.hard_law(p, u, 2)) if greedy else (lambda p, u: bestofn.soft_law(p, u, BETA, 2))
    p = select(np.array([0.3, 0.7]), v[2])
    for i in (2, 1):
        kernel = np.array([select(row, v[i - 1]) for row in chain().kernels[i - 1]])
        p = p @ kernel
    *_, drawn = expectations(rows.svdd(2, greedy), particles=1, value=value)
    assert drawn == pytest.approx(p, abs=1e-12)
    assert abs(drawn - chain().tilted_law(R, BETA)).max() > 1e-3  # finite M is not exact, whatever the value


def test_doob_is_exact_only_with_the_tilted_start():
    value = values.exact(R, BETA)
    target = chain().tilted_law(R, BETA)
    *_, tilted = expectations("classifier_guidance", particles=1, value=value)
    *_, own = expectations("gradient_guidance", particles=1, value=value)
    assert tilted == pytest.approx(target, abs=1e-12)
    forgotten = chain().guide(chain().soft_values(R, BETA), BETA, start=False).laws[0]
    assert own == pytest.approx(forgotten, abs=1e-12)
    assert abs(own - target).max() > 5e-3


def test_exact_values_leave_no_variance_but_that_of_the_start():
    """With Doob's drift and exact values all weights of a run are those of its start."""
    row = replace(steer.METHODS["tds"], select=rows.keep)
    generator = torch.Generator().manual_seed(3)
    exact = values.exact(R, BETA)
    o = steer.run(chain(), R, beta=BETA, method=row, generator=generator, value=exact, particles=50, trace=True)
    assert torch.allclose(o.trace[0].psi, o.log_weights, atol=1e-12)


# ------------------------------------------------------------------------------------------------ Gaussian and others


def mixture(sampler="ancestral", dimension=2):
    means = np.zeros((3, dimension))
    means[:, 0], means[1, 1], means[2, 1] = [-2, 1, 2], 1, -2
    return Mixture([0.3, 0.5, 0.2], means, np.stack([0.3 * np.eye(dimension)] * 3), sampler=sampler, steps=30)


def mean_reward(o, reward):
    w = o.log_weights.softmax(1)
    each = (w * reward(o.samples.flatten(0, 1)).view(w.shape)).sum(1)
    return each.mean().item(), (each.std() / len(each) ** 0.5).item()


@pytest.mark.parametrize("name", ["importance", "smc", "nested", "tds", "das", "children compete"])
def test_consistent_rows_approach_the_tilt_of_a_mixture(name):
    """Measured against weighted samples of the same sampler: a reference without resampling, value or drift."""
    world, reward = mixture(), rewards.quadratic([1.0, -1.0], 0.5)
    method = PROPER.get(name, steer.METHODS.get(name))
    options = {"beta": 0.5, "particles": 256, "runs": 12}
    o = steer.run(world, reward, method=method, generator=torch.Generator().manual_seed(1), **options)
    plain = {"method": "importance", "generator": torch.Generator().manual_seed(2), **options, "particles": 4096}
    reference = steer.run(world, reward, **plain)
    (mean, error), (wanted, small) = mean_reward(o, reward), mean_reward(reference, reward)
    assert abs(mean - wanted) < 4 * math.hypot(error, small)
    (z, dz), (exact, de) = o.evidence(), reference.evidence()
    assert abs(z - exact) < 4 * math.hypot(dz, de)


@pytest.mark.parametrize("name", ["svdd_greedy", "base", "gradient_guidance"])
def test_inconsistent_rows_stay_away_from_it(name):
    world, reward = mixture(), rewards.quadratic([1.0, -1.0], 0.5)
    o = steer.run(
        world, reward, beta=0.5, method=name, generator=torch.Generator().manual_seed(1), particles=256, runs=12
    )
    plain = steer.run(
        world, reward, beta=0.5, method="importance", generator=torch.Generator().manual_seed(2), particles=4096, runs=8
    )
    (mean, error), (wanted, small) = mean_reward(o, reward), mean_reward(plain, reward)
    assert abs(mean - wanted) > 8 * math.hypot(error, small)


@pytest.mark.parametrize("name", list(steer.METHODS))
def test_results_do_not_depend_on_the_chunk(name):
    world, reward = mixture(), rewards.quadratic([1.0, -1.0], 0.5)
    runs = [
        steer.run(
            world, reward, beta=0.5, method=name, generator=torch.Generator().manual_seed(5), particles=9, runs=2,
            chunk=chunk,
        )
        for chunk in (None, 5)
    ]  # fmt: skip
    tolerance = 1e-12 if runs[0].samples.dtype == torch.float64 else 1e-4
    assert torch.allclose(runs[0].samples, runs[1].samples, atol=tolerance)
    assert runs[0].calls == runs[1].calls


def test_a_particle_takes_everything_along_when_it_is_resampled():
    """After each selection, value, gradient and prediction are those of the particle (DAS as published lost two)."""
    world, reward = mixture(), rewards.quadratic([1.0, -1.0], 0.5)
    value = values.posterior_mean(reward)
    moved = 0
    for state in steer.steps(
        world, reward, beta=0.2, method=rows.das(1.0), generator=torch.Generator().manual_seed(0), particles=32
    ):
        if state.i == 0:
            break
        x = state.x.flatten(0, 1).requires_grad_()
        prediction = world.predict(x, state.i, None)
        said = value(world, x, prediction, state.i, None, None)
        (grad,) = torch.autograd.grad(said.sum(), x)
        assert torch.allclose(state.look.prediction, prediction.detach(), atol=1e-5)
        assert torch.allclose(state.look.value.float(), said.detach().float(), atol=1e-4)
        assert torch.allclose(state.look.grad, grad, atol=1e-4)
        if state.ancestors is not None:
            moved += int((state.ancestors != torch.arange(32)).sum())
    assert moved > 100


def test_weights_that_are_not_resampled_are_kept():
    """FK steering as published drops them: then the log-weights would not sum to r / beta."""
    world, reward = mixture(), rewards.quadratic([1.0, -1.0], 0.5)
    generator = torch.Generator().manual_seed(0)
    o = steer.run(world, reward, beta=0.5, method=rows.smc(0.0), generator=generator, particles=64)
    assert torch.allclose(o.log_weights[0], reward(o.samples[0]).double() / 0.5, atol=1e-6)


@pytest.mark.parametrize("potential", ["max", "sum"])
def test_the_last_potential_is_always_the_reward(potential):
    """FK's max and sum as published end in exp(max r) and exp(sum r)."""
    world, reward = mixture(), rewards.quadratic([1.0, -1.0], 0.5)
    method = rows.smc(0.0, potential=potential)
    o = steer.run(world, reward, beta=0.5, method=method, generator=torch.Generator().manual_seed(0), particles=64)
    assert torch.allclose(o.log_weights[0], reward(o.samples[0]).double() / 0.5, atol=1e-6)


def test_the_drift_of_tds_moves_the_posterior_mean():
    """The tilted kernel has the mean of the kernel whose E[x_0 | x_i] was moved by sigma^2 / alpha heat grad."""
    world, i = mixture(), 9
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 5, 2, generator=generator, dtype=torch.float64)
    heat = torch.arange(1.0, 6.0, dtype=torch.float64)
    look = steer.Look(world.predict(x, i), None, grad)
    shift = world.grid.sigma[i] ** 2 / world.grid.alpha[i] * heat[:, None] * grad
    moved = world.kernel(x, look.prediction, i).tilt(rows.posterior(world, look, i, heat))
    wanted = world.kernel(x, world.clean(x, look.prediction, i) + shift, i)  # its predictions are of x_0
    assert world.prediction == "x0" and torch.allclose(moved.mean, wanted.mean, atol=1e-12)
    plain = world.kernel(x, look.prediction, i).tilt(rows.gradient(world, look, i, heat))
    assert not torch.allclose(plain.mean, wanted.mean, atol=1e-2)


def test_adaptive_tempering_moves_as_far_as_the_effective_sample_size_allows():
    from tiltlib.chance import effective_sample_size

    generator = torch.Generator().manual_seed(0)
    worth = 5 * torch.randn(3, 40, dtype=torch.float64, generator=generator)
    worth[2] *= 1e-3  # so light that it may go to one at once
    log_w, start = torch.zeros(3, 40, dtype=torch.float64), torch.tensor([0.0, 0.01, 0.2], dtype=torch.float64)
    lam = rows.adaptive(0.5)(log_w, worth, start, 3, 10)
    reached = effective_sample_size(log_w + (lam - start)[:, None] * worth)
    assert reached[:2].tolist() == pytest.approx([20, 20], rel=1e-6)
    assert lam[2] == 1 and (lam >= start).all()


@pytest.mark.parametrize("name", list(steer.METHODS))
def test_every_row_runs_on_sequences(name):
    world = Sequence([0.6, 0.4], [[0.7, 0.3], [0.2, 0.8]], length=4, steps=4)
    reward = rewards.Reward("ones", lambda x: (x == 1).double().mean(-1), "share", 0, 1)
    value = values.monte_carlo(world, reward, chance=Chance(torch.Generator().manual_seed(0)), rollouts=200, beta=0.5)
    if steer.METHODS[name].drift is not None:

        def share(x):
            return (x[..., 1] if x.is_floating_point() else (x == 1).double()).mean(-1)

        value = values.posterior_mean(rewards.Reward("ones", share, "share", differentiable=True))
    o = steer.run(
        world, reward, beta=0.5, method=name, generator=torch.Generator().manual_seed(0), value=value, particles=8
    )
    assert o.samples.shape == (1, 8, 4) and (o.samples < 2).all()


@pytest.mark.parametrize("name", list(steer.METHODS))
def test_every_row_runs_on_a_guided_image_model(name):
    if name == "classifier_guidance":
        pytest.skip("a trained model has no tilted start")
    world = Guided(digits("flow", steps=4, sampler="flow_grpo"), 2.0)
    o = steer.run(
        world, rewards.brightness(), beta=0.05, method=name, generator=torch.Generator().manual_seed(0), particles=2,
        condition=3, children=None,
    )  # fmt: skip
    drift = steer.METHODS[name].drift is not None
    m = steer.METHODS[name].children
    assert o.samples.shape == (1, 2, 1, 8, 8)
    assert o.calls.model == 2 * 2 * 4 * m  # two networks, two particles; nothing is asked twice
    assert o.calls.gradient == (o.calls.model if drift else 0)


def test_the_best_is_the_best_and_draws_are_of_each_run():
    world, reward = mixture(), rewards.quadratic([1.0, -1.0], 0.5)
    generator = torch.Generator().manual_seed(0)
    o = steer.run(world, reward, beta=0.5, method="best_of_n", generator=generator, particles=8, runs=5)
    best = o.draw(generator)
    assert torch.allclose(reward(best), reward(o.samples.flatten(0, 1)).view(5, 8).max(1).values)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"beta": 0.0}, ValueError, "beta"),
        ({"beta": math.nan}, ValueError, "beta"),
        ({"particles": 0}, ValueError, "particles"),
        ({"runs": 1.5}, (TypeError, ValueError), "runs"),
        ({"method": "svdd", "children": 0}, ValueError, "children"),
        ({"method": "smcc"}, ValueError, "unknown method 'smcc'"),
        ({"method": "importance", "children": 2}, ValueError, "one child"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"generator": 7}, TypeError, "Generator"),
    ],
)
def test_bad_input_is_refused_before_any_work(change, kind, message):
    class Silent:
        steps = 3

        def start(self, n, chance):
            raise AssertionError("work has started")

    options = {"beta": 1.0, "method": "smc", "generator": torch.Generator(), **change}
    with pytest.raises(kind, match=message):
        steer.steps(Silent(), lambda x: x, **options)


def test_a_drift_through_a_black_box_is_refused():
    black = rewards.Reward("size", lambda x: x.flatten(1).sum(1), "bytes")
    with pytest.raises(TypeError, match="black box"):
        steer.run(mixture(), black, beta=1.0, method="das", generator=torch.Generator())


@pytest.mark.parametrize("name", ["smc", "svdd", "das", "gradient_guidance"])
def test_a_world_without_noise_is_refused(name):
    with pytest.raises(ValueError, match="deterministic"):
        steer.run(
            mixture("ode"), rewards.quadratic([1.0, -1.0], 0.5), beta=1.0, method=name, generator=torch.Generator()
        )


@pytest.mark.parametrize("ess", [-0.1, 1.5, math.nan, True, "half"])
def test_a_threshold_outside_zero_to_one_is_refused(ess):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        rows.smc(ess)


def test_a_reward_that_is_not_finite_names_particle_and_step():
    world = mixture()

    def broken(x):
        r = x.sum(1)
        return torch.where(torch.arange(len(r)) == 5, torch.nan, r)

    with pytest.raises(ValueError, match="the value is nan at step 30, run 1, particle 1"):
        steer.run(world, broken, beta=1.0, method="smc", generator=torch.Generator(), particles=4, runs=2)
    with pytest.raises(ValueError, match="the reward is nan at step 0, run 1, particle 1"):
        steer.run(world, broken, beta=1.0, method="importance", generator=torch.Generator(), particles=4, runs=2)


def test_a_model_that_is_not_finite_names_particle_and_step():
    class Broken(Mixture):
        def predict(self, x, i, condition=None):
            out = super().predict(x, i, condition).clone()
            if i == 7:
                out[3] = torch.inf
            return out

    world = Broken([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]], steps=10)
    with pytest.raises(ValueError, match="at step 6, run 0, particle 3"):
        steer.run(world, lambda x: x.sum(1), beta=1.0, method="base", generator=torch.Generator(), particles=8)


def test_evidence_needs_a_proper_row_and_two_runs():
    generator = torch.Generator().manual_seed(0)
    one = steer.run(chain(), R, beta=BETA, method="smc", generator=generator)
    with pytest.raises(ValueError, match="runs >= 2"):
        one.evidence()
    with pytest.raises(ValueError, match="unbiased"):
        steer.run(chain(), R, beta=BETA, method="svdd", generator=generator).evidence()
