"""The variance of SMC's estimate of Z against enumeration of the production loop, and its limit against itself."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tiltlib import enumeration, steer
from tiltlib.steer import genealogy, moments, rows
from tiltlib.worlds import Chain, Mixture

R, BETA = np.array([0.2, 1.1]), 0.6
RNG = np.random.default_rng(0)
WRONG = RNG.normal(size=(3, 2))
LAM = [1.0, 0.7, 0.2]
TUNED = [[[0.5, 0.5], [0.1, 0.9]], [[0.6, 0.4], [0.3, 0.7]]]


def chain(kernels=(((0.9, 0.1), (0.35, 0.65)), ((0.2, 0.8), (0.55, 0.45)))):
    return Chain([0.3, 0.7], kernels)


def told(table):
    """A value that reads a table (steps + 1, K)."""
    rows = torch.as_tensor(table)
    return lambda world, x, prediction, i, condition, chance: rows[i, x]


def multinomial(steps):
    """Resampling by independent draws before every step, in a form that can be enumerated."""
    left = iter(range(steps, -1, -1))

    def select(log_w, chance):
        flat = log_w.flatten(1)
        if next(left) == 0:  # after the last step it could not change the mean weight
            return None, flat
        index = chance.categoricals(flat.unsqueeze(1).expand(-1, flat.shape[1], -1))
        return index, flat.logsumexp(1, keepdim=True).expand_as(flat) - math.log(flat.shape[1])

    return select


def enumerated(particles, table, lam=None, proposal=None, world=None):
    """Var(Z_hat) / Z^2 of the production loop."""
    world = world or chain()
    temper = None if lam is None else lambda log_w, worth, at, i, steps: torch.full_like(at, lam[i])

    def one(chance):
        method = replace(rows.smc(1.0), select=multinomial(world.steps), temper=temper)
        o = steer.run(world, R, beta=BETA, method=method, generator=chance, particles=particles, value=told(table),
                      proposal=proposal)  # fmt: skip
        return np.exp(float(o.log_z[0])) ** np.arange(1, 3)

    first, second = enumeration.expectation(one)
    assert first == pytest.approx(math.exp(world.log_z(R, BETA)), abs=1e-12)
    return second / first**2 - 1


@pytest.mark.parametrize("proposal", [None, Chain([0.3, 0.7], TUNED)])
@pytest.mark.parametrize("lam", [None, [1.0, 0.7, 0.0]])  # before the first step a run has lam = 0
def test_the_variance_of_one_particle_is_that_of_the_loop(lam, proposal):
    exact = moments.relative_variance(chain(), R, BETA, 1, WRONG, lam, proposal)
    assert enumerated(1, WRONG, lam, proposal) == pytest.approx(exact, rel=1e-10)


def test_the_variance_of_two_particles_is_that_of_the_loop():
    world, proposal, wrong = Chain([0.3, 0.7], [[[0.9, 0.1], [0.35, 0.65]]]), Chain([0.3, 0.7], TUNED[:1]), WRONG[:2]
    exact = moments.relative_variance(world, R, BETA, 2, wrong, proposal=proposal)
    assert enumerated(2, wrong, proposal=proposal, world=world) == pytest.approx(exact, rel=1e-10)
    for change in ({"proposal": None}, {"values": None}):
        options = {"values": wrong, "proposal": proposal} | change
        assert abs(moments.relative_variance(world, R, BETA, 2, **options) / exact - 1) > 1e-3


@pytest.mark.parametrize("proposal", [None, Chain([0.3, 0.7], TUNED)])
def test_the_limit_is_that_of_many_particles(proposal):
    steps = moments.asymptotic_variance(chain(), R, BETA, WRONG, LAM, proposal)
    many = moments.relative_variance(chain(), R, BETA, 10**6, WRONG, LAM, proposal)
    assert many * 10**6 == pytest.approx(steps.sum(), rel=1e-4)
    assert steps.shape == (3,) and (steps >= 0).all()


def test_without_a_twist_and_one_particle_it_is_the_chi_squared_of_importance_weights():
    p, target = chain().laws[0], chain().tilted_law(R, BETA)
    assert moments.relative_variance(chain(), R, BETA, 1) == pytest.approx((target**2 / p).sum() - 1, rel=1e-12)


def test_doob_s_proposal_with_exact_values_leaves_the_variance_of_the_start():
    v = chain().soft_values(R, BETA)
    guided = Chain([0.3, 0.7], chain().guide(v, BETA).kernels)
    steps = moments.asymptotic_variance(chain(), R, BETA, v, proposal=guided)
    assert steps[:-1] == pytest.approx(0, abs=1e-12) and steps[-1] > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": WRONG[:2]}, "finite"),
        ({"lam": [1.0]}, "finite"),
        ({"values": WRONG * np.nan}, "finite"),
        ({"proposal": Chain([0.5, 0.5], TUNED)}, "start"),
        ({"proposal": Chain([0.3, 0.7], [np.eye(2), np.eye(2)])}, "reach"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        moments.asymptotic_variance(chain(), R, BETA, **change)


# ------------------------------------------------------------------------------------------------------- genealogies


def test_lines_of_descent_by_hand():
    def state(parents, x):
        log_w = torch.zeros(1, 3)
        parents = None if parents is None else torch.tensor([parents])
        return steer.State(0, torch.tensor([x]), None, None, log_w, log_w, parents, None, None)

    trace = [state(None, [10, 11, 12]), state([0, 2, 2], [20, 21, 22]), state([1, 1, 2], [30, 31, 32])]
    assert genealogy.lines(trace)[:, 0].tolist() == [[2, 2, 2], [1, 1, 2], [0, 1, 2]]
    assert genealogy.survivors(trace)[:, 0].tolist() == [1, 2, 3]
    assert genealogy.along(trace)[:, 0].tolist() == [[12, 12, 12], [21, 21, 22], [30, 31, 32]]
    with pytest.raises(ValueError, match="trace=True"):
        genealogy.lines([])


def test_without_resampling_every_particle_is_its_own_line():
    world = Mixture([0.3, 0.7], [-1.0, 2.0], 0.3, steps=6)
    options = {"beta": 0.1, "particles": 5, "runs": 3, "trace": True}
    reward = lambda x: -((x[:, 0] - 1) ** 2)  # noqa: E731

    def survive(method, seed=0):
        o = steer.run(world, reward, method=method, generator=torch.Generator().manual_seed(seed), **options)
        return genealogy.survivors(o.trace), genealogy.along(o.trace), o

    kept, walked, o = survive(rows.smc(0.0))
    assert (kept == 5).all() and torch.equal(walked, torch.stack([state.x for state in o.trace]))
    died, walked, o = survive(rows.smc(1.0))
    assert (died.diff(dim=0) >= 0).all() and (died[0] < 5).any()
    assert torch.equal(walked[-1], o.samples)


def test_watching_changes_nothing_and_sees_the_weights_before_selection():
    world = Mixture([0.3, 0.7], [-1.0, 2.0], 0.3, steps=6)
    reward = lambda x: -((x[:, 0] - 1) ** 2)  # noqa: E731
    options = {"beta": 0.1, "particles": 8, "runs": 2}
    method, seen = genealogy.watched(rows.smc(1.0))
    a = steer.run(world, reward, method=method, generator=torch.Generator().manual_seed(1), **options)
    b = steer.run(world, reward, method=rows.smc(1.0), generator=torch.Generator().manual_seed(1), **options)
    assert torch.equal(a.samples, b.samples) and len(seen) == 7 and seen[0].shape == (2,)
    assert all((1 <= s).all() and (s <= 8 + 1e-9).all() for s in seen) and min(s.min() for s in seen) < 8
