"""steer/look.py: what is asked of the network and when, conditions of runs, particles at different steps."""

import math

import pytest
import torch

from tiltlib import steer, values
from tiltlib import tensor_rewards as rewards
from tiltlib.chance import Chance
from tiltlib.steer.look import Eyes
from tiltlib.worlds import Calls, Mixture

REWARD = rewards.quadratic([1.0, -0.5], 0.5)


class Counted(Mixture):
    """Counts the particles of all predictions, and keeps the conditions it was asked for."""

    def predict(self, x, i, condition=None):
        self.asked, self.conditions = getattr(self, "asked", 0) + len(x), condition
        return super().predict(x, i, condition)


def world(**more):
    return Counted([0.3, 0.7], [[-1.0, 0.0], [2.0, 1.0]], [0.3, 0.2], steps=6, **more)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(method, value, where=None, **more):
    options = {"beta": 0.5, "generator": generator(), "particles": 5, **more}
    return steer.run(where or world(), REWARD, method=method, value=value, **options)


@pytest.mark.parametrize(("method", "m"), [("svdd", 4), ("nested", 4), ("beam", 4), ("smc", 1), ("tds", 1)])
def test_a_value_that_reads_no_prediction_costs_none_on_dropped_children(method, m):
    w = world()
    o = run(method, values.exact(REWARD, 0.5), w)
    assert o.calls == Calls(model=5 * 6, gradient=0, value=5 * 6 * m, reward=5 * m)
    assert w.asked == o.calls.model
    o = run(method, values.posterior_mean(REWARD), w := world())
    assert o.calls.model == w.asked == 5 * 6 * m
    assert o.calls.gradient == (5 * 6 if method == "tds" else 0)


@pytest.mark.parametrize("method", ["svdd", "smc", "tds", "importance", "das"])
def test_when_the_network_is_asked_changes_nothing_else(method):
    early = values.exact(REWARD, 0.5)
    late = values.exact(REWARD, 0.5)
    early.needs_prediction = True
    one, two = run(method, early), run(method, late)
    assert torch.equal(one.samples, two.samples) and torch.equal(one.log_weights, two.log_weights)
    assert one.calls.model >= two.calls.model


def test_a_method_without_value_asks_once_for_each_step():
    o = run("importance", None, w := world(), chunk=2)
    assert o.calls == Calls(model=30, reward=5) and w.asked == 30


def test_each_run_may_have_its_own_condition():
    """Two components far apart: runs end where their condition says, whatever the chunk."""
    far = Counted([0.5, 0.5], [[-8.0, 0.0], [8.0, 0.0]], [0.1, 0.1], steps=6)
    for method, chunk in (("smc", None), ("svdd", 3)):
        o = run(method, None, far, runs=3, condition=torch.tensor([1, 0, 1]), chunk=chunk)
        assert o.samples[..., 0].sign()[:, 0].tolist() == [1, -1, 1]
        assert (o.samples[..., 0].sign() == o.samples[:, :1, 0].sign()).all()


@pytest.mark.parametrize("chunk", [None, 3])
def test_particles_of_different_steps_are_seen_as_those_of_one(chunk):
    w, eyes = world(), Eyes(world(), REWARD, values.posterior_mean(REWARD), chunk=chunk)
    x = torch.randn(8, 2, dtype=torch.float64, generator=generator())
    i = torch.tensor([0, 3, 3, 6, 1, 0, 2, 5])
    look, calls = eyes.scattered(x, i, None, Calls())
    assert calls == Calls(model=6, value=6, reward=2)
    for k in range(8):
        alone, _ = Eyes(w, REWARD, values.posterior_mean(REWARD)).worth(x[k : k + 1], int(i[k]), None, Calls())
        assert float(alone.value) == pytest.approx(float(look.value[k]), abs=1e-12)
        if i[k] > 0:
            assert torch.allclose(alone.prediction[0], look.prediction[k], atol=1e-12)


def test_a_value_that_is_not_finite_is_named():
    def value(world, x, prediction, i, condition, chance):
        return torch.where(torch.arange(len(x)) == 1, math.nan, 0.0).double()

    eyes = Eyes(world(), REWARD, value)
    with pytest.raises(ValueError, match="the value is nan at step 4, particle 2"):
        eyes.scattered(torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 2, 4]), None, Calls())


def test_a_generator_elsewhere_is_refused_before_any_work():
    class Elsewhere(Mixture):
        device = torch.device("meta")

        def start(self, n, chance):
            raise AssertionError("work has started")

    with pytest.raises(ValueError, match="generator is on cpu, the world on meta"):
        run("smc", None, Elsewhere([1.0], [[0.0, 0.0]], [1.0], steps=2))


def test_chance_of_a_test_passes_as_generator():
    o = steer.run(world(), REWARD, beta=0.5, method="smc", generator=Chance(generator()), particles=3)
    assert torch.equal(o.samples, run("smc", None, particles=3).samples)


@pytest.mark.parametrize("select", [steer.rows.population(0.5), steer.rows.population(1.0), steer.rows.nested()])
def test_a_run_without_any_weight_is_refused(select):
    log_w = torch.zeros(2, 3, 1, dtype=torch.float64)
    log_w[1] = -math.inf
    with pytest.raises(ValueError, match="zero"):
        select(log_w, Chance(generator()))
