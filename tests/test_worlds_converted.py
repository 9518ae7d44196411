"""The interpolant conversion: nothing changes but the name of a point, so a mixture keeps all that is exact."""

import copy
import pickle

import pytest
import torch

from tiltlib import paths, steer, values
from tiltlib import tensor_rewards as rewards
from tiltlib.chance import Chance
from tiltlib.worlds import Converted, Mixture, check, flow_digits, matching

ON = paths.grid("vp_linear", 12)
GIVEN = [0.3, 0.7], [[-2.0, 1.0], [1.5, 0.0]], [0.2, 0.1]


def converted(on=ON, sampler="ancestral", path="rectified", prediction="velocity"):
    return Converted(Mixture(*GIVEN, path=matching(path, on), prediction=prediction), on, sampler)


def native(on=ON, sampler="ancestral"):
    return Mixture(*GIVEN, path=on, sampler=sampler)


def chance(seed=0):
    return Chance(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("on", ["vp_linear", "vp_cosine", "ve"])
@pytest.mark.parametrize("path", ["rectified", "vp_cosine"])
def test_it_is_the_world_that_the_grid_would_have(on, path):
    """The same kernels, predictions and samples, step by step, as the mixture noised along the grid itself."""
    on = paths.grid(on, 12)
    ours, theirs = converted(on, path=path, prediction="x0"), native(on)
    x = y = None
    for i in range(12, 0, -1):
        x = theirs.start(50, chance()) if x is None else x
        y = ours.start(50, chance()) if y is None else y
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-9)
        p, q = theirs.predict(x, i), ours.predict(y, i)
        assert torch.allclose(p, q, atol=1e-9)
        x = theirs.kernel(x, p, i).sample(1, chance(i))[0][:, 0]
        y = ours.kernel(y, q, i).sample(1, chance(i))[0][:, 0]
    assert torch.allclose(x, y, atol=1e-9)


def test_particles_of_different_steps():
    world, i = converted(), torch.tensor([3, 12, 1, 3])
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each = torch.cat([world.predict(x[k : k + 1], int(i[k])) for k in range(4)])
    assert torch.allclose(world.predict(x, i), each, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ancestral", "ode", "memoryless"])
def test_the_check_accepts_it(sampler):
    check(converted(paths.grid("vp_linear", 50), sampler))


def test_exact_values_are_those_of_the_scaled_point():
    world, other, reward = converted(), native(), rewards.quadratic([1.0, -1.0], 0.5)
    x = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for beta in (0.5, None):
        value = values.exact(reward, beta)
        assert torch.allclose(value(world, x, None, 7), value(other, x, None, 7), atol=1e-9)


def test_steering_runs_on_it_and_says_the_same():
    reward, options = rewards.quadratic([1.0, -1.0], 0.5), {"beta": 0.5, "method": "smc", "particles": 32}
    ours, theirs = (steer.run(w, reward, generator=chance(), **options) for w in (converted(), native()))
    assert torch.allclose(ours.log_z, theirs.log_z, atol=1e-9)


def test_what_it_knows_and_does_not_know():
    world = converted()
    assert world.dim == 2 and world.draw(3, chance()).shape == (3, 2)
    for name in ("score", "tilted_start", "nothing"):  # of a point on another path, or of another law: not passed on
        with pytest.raises(AttributeError, match=name):
            getattr(world, name)
    again = pickle.loads(pickle.dumps(copy.deepcopy(world)))
    assert torch.equal(again.scale, world.scale)


def test_grids_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="see `matching`"):
        Converted(Mixture(*GIVEN, path="rectified", steps=12), ON)
    with pytest.raises(ValueError, match="13 steps, the grid 12"):
        Converted(Mixture(*GIVEN, path=matching("rectified", paths.grid("vp_linear", 13))), ON)
    with pytest.raises(ValueError, match="noisier"):
        matching("vp_linear", paths.grid("rectified", 5))


@pytest.mark.parametrize("on", [paths.grid("vp_linear", 20), paths.grid("rectified", 20, warp=paths.shift(2.0))])
def test_the_trained_flow_samples_digits_along_other_grids(on):
    """The check's tolerance is for a model that is right only roughly."""
    world = flow_digits(on)
    check(world, condition=3, particles=128, tolerance=0.15)
    assert float(world.start(400, chance()).std()) == pytest.approx(
        float(torch.hypot(on.alpha, on.sigma)[-1]), rel=0.02
    )


def test_a_grid_that_does_not_start_at_noise_is_refused():
    with pytest.raises(ValueError, match="more than noise"):
        flow_digits(paths.grid("rectified", 5, start=0.9))
