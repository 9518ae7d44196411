"""Classifier-free guidance as a wrapper: the formula in closed form, its two ends, and what it costs."""

import copy
import math

import pytest
import torch

from tiltlib import paths
from tiltlib.chance import Chance
from tiltlib.worlds.checks import check
from tiltlib.worlds.guided import Guided
from tiltlib.worlds.mixture import Mixture


def mixture(prediction="epsilon", steps=20):
    return Mixture([0.3, 0.7], [[-2.0, 1.0], [1.5, 0.0]], [0.2, 0.1], steps=steps, prediction=prediction)


def chance(seed=0):
    return Chance(torch.Generator().manual_seed(seed))


class Counted(Mixture):
    """Counts its predictions."""

    calls = 0

    def predict(self, x, i, condition=None):
        self.calls += 1
        return super().predict(x, i, condition)


X = torch.tensor([[-1.0, 0.5], [0.3, 0.2], [2.0, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, -1.0])
def test_the_score_is_the_geometric_mixture_of_the_two_laws(scale):
    # score = (1 - s) grad log p(x) + s grad log p(x | c), each by autograd of the closed-form density
    world = mixture("score")
    i = 7
    x = X.clone().requires_grad_()
    density = (1 - scale) * world.log_prob(x, i) + scale * world.log_prob(x, i, 1)
    (expected,) = torch.autograd.grad(density.sum(), x)
    assert torch.allclose(Guided(world, scale).predict(X, i, 1), expected, atol=1e-12, rtol=0)
    # control: the other common convention (scale 0 is conditional) is another number
    (other,) = torch.autograd.grad(((-scale) * world.log_prob(x, i) + (1 + scale) * world.log_prob(x, i, 1)).sum(), x)
    assert (other - expected).abs().max() > 1e-2


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "velocity", "v_prediction"])
def test_guidance_means_the_same_for_every_prediction(prediction):
    i = 7
    score = Guided(mixture("score"), 3.0)
    world = mixture(prediction)
    guided = Guided(world, 3.0).predict(X, i, 0)
    same = paths.convert(world.grid, score.predict(X, i, 0), X, i, "score", prediction)
    assert torch.allclose(guided, same, atol=1e-9, rtol=0)
    # and so does the step that is taken
    step = Guided(world, 3.0).kernel(X, guided, i).mean
    assert torch.allclose(step, score.kernel(X, score.predict(X, i, 0), i).mean, atol=1e-9, rtol=0)


def test_the_negative_condition_takes_the_place_of_none():
    world = mixture()
    guided = Guided(world, 2.0, negative=0).predict(X, 5, 1)
    expected = world.predict(X, 5, 0) + 2 * (world.predict(X, 5, 1) - world.predict(X, 5, 0))
    assert torch.allclose(guided, expected, atol=1e-12, rtol=0)
    assert not torch.allclose(guided, Guided(world, 2.0).predict(X, 5, 1), atol=1e-3)


def test_it_costs_two_calls_a_prediction():
    world = Counted([0.5, 0.5], [[-1.0], [1.0]], 0.2, steps=4)
    guided = Guided(world, 2.0)
    guided.predict(X[:, :1], 3, 1)
    assert world.calls == 2 == guided.cost
    world.cost = 3
    assert guided.cost == 6


def test_everything_else_is_the_world_s_own():
    world = mixture()
    guided = Guided(world, 2.0)
    assert guided.steps == 20 and guided.grid is world.grid and guided.coef is world.coef
    assert torch.equal(guided.start(3, chance()), world.start(3, chance()))
    with pytest.raises(AttributeError):
        _ = guided.nonsense
    assert torch.equal(copy.deepcopy(guided).predict(X, 5, 1), guided.predict(X, 5, 1))


def test_scale_one_is_the_conditional_world_and_scale_three_is_no_noised_law():
    check(Guided(mixture(), 1.0), condition=1)
    # what the guided chain arrives at, noised again, is not what its own clean image expects
    with pytest.raises(ValueError, match="posterior"):
        check(Guided(mixture(), 3.0), condition=1, tolerance=0.02, particles=2048)
    check(Guided(mixture(), 3.0), condition=1, tolerance=0.02, particles=2048, skip=("posterior", "forward"))


def test_bad_input_is_refused():
    for scale in (math.nan, math.inf, "2", None, True):
        with pytest.raises(ValueError, match="scale"):
            Guided(mixture(), scale)
    with pytest.raises(ValueError, match="needs a condition"):
        Guided(mixture(), 2.0).predict(X, 5)
    with pytest.raises(ValueError, match="unknown condition"):
        Guided(mixture(), 2.0).predict(X, 5, 2)
