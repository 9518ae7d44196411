"""Rollover budget forcing, against laws known in closed form, a recursion written apart from it, and its own ledger."""

import numpy as np
import pytest
import torch

from tiltlib import bestofn, steer, values
from tiltlib import tensor_rewards as rewards
from tiltlib.enumeration import outcomes
from tiltlib.worlds import Chain, Guided, Mixture, Sequence, digits

RECORDS = ("best_ever", "current")
R = np.array([0.2, 1.1])
KERNELS = np.array([
    [[0.9, 0.1], [0.35, 0.65]], [[0.2, 0.8], [0.55, 0.45]], [[0.7, 0.3], [0.4, 0.6]], [[0.5, 0.5], [0.15, 0.85]],
    [[0.25, 0.75], [0.6, 0.4]],
])  # fmt: skip


def chain(steps, certain=0):
    """Two states, nothing symmetric. certain: so many last steps stay where they are, which leaves fewer outcomes."""
    kernels = [*[np.eye(2)] * certain, *KERNELS[certain:]]
    return Chain([0.3, 0.7], kernels[:steps])


def given(v):
    """A value from a table (steps + 1, K); the reward at i = 0."""
    v = torch.as_tensor(v, dtype=torch.float64)

    def value(world, x, prediction, i, condition, chance):
        return v[i, x]

    return value


def law_of_x0(world, v, **options):
    """Of one run, by enumeration of the production code."""
    p = np.zeros(world.states)
    for weight, o in outcomes(
        lambda chance: steer.rollover_budget(world, rewards.table(R), generator=chance, value=given(v), **options)
    ):
        p[int(o.samples[0])] += weight
    return p


def expected_law(world, v, budget, pool, record):
    """The same by the words of the paper: one child after the other, as a recursion over what a run remembers."""
    share = (budget - pool) // world.steps

    def down(i, x, mark, quota, used, best, left):
        """Law of x_1 of a run at step i whose step has spent `used`."""
        if left == 0:
            return np.eye(world.states)[best]
        out = np.zeros(world.states)
        for y, p in enumerate(world.kernels[i - 1][x]):
            leader = y if best is None or v[i - 1][y] > v[i - 1][best] else best
            if i == 2:
                out += p * down(2, x, mark, quota, used + 1, leader, left - 1)
            elif v[i - 1][y] > mark:
                out += p * down(i - 1, y, v[i - 1][y], share + quota - used - 1, 0, None, left - 1)
            elif used + 1 == quota:
                new = mark if record == "best_ever" else v[i - 1][leader]
                out += p * down(i - 1, leader, new, share, 0, None, left - 1)
            else:
                out += p * down(i, x, mark, quota, used + 1, leader, left - 1)
        return out

    start = bestofn.hard_law(world.start_law, v[-1], pool)
    runs = [down(world.steps, x, v[-1][x], share, 0, None, budget - pool) for x in range(world.states)]
    last = np.array([bestofn.hard_law(row, R, share) for row in world.kernels[0]])
    return start @ np.array(runs) @ last


# rows: steps 0 .. 5. Records are broken, and missed and then broken or not, at every step where that can be
TABLES = {
    "mixed": [R, [0.9, 0.4], [0.7, 1.0], [0.6, 0.2], [0.5, 0.1], [0.3, 0.0]],
    "a spike": [R, [0.4, 0.6], [0.5, 0.7], [0.2, 0.6], [0.1, 2.0], [0.1, 0.3]],
}


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("name", TABLES)
def test_its_law_is_that_of_the_algorithm_in_words(name, record):
    world, v = chain(5, certain=2), np.array(TABLES[name])
    found = law_of_x0(world, v, budget=11, pool=1, record=record)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert found == pytest.approx(expected_law(world, v, 11, 1, record), abs=1e-12)


def test_the_two_records_give_two_laws():
    world, v = chain(5, certain=2), np.array(TABLES["a spike"])
    published, repaired = (expected_law(world, v, 11, 1, record) for record in RECORDS)
    assert abs(published - repaired).max() > 0.01


def best(world, v, i, n):
    """(K, K): the law of the best of n children at step i - 1."""
    return np.array([bestofn.hard_law(row, v[i - 1], n) for row in world.kernels[i - 1]])


@pytest.mark.parametrize("record", RECORDS)
def test_two_steps_are_best_of_n_three_times(record):
    world, v = chain(2), np.array([R, [0.9, 0.4], [0.1, 0.6]])
    p = bestofn.hard_law(world.start_law, v[2], 2) @ best(world, v, 2, 4) @ best(world, v, 1, 2)
    assert law_of_x0(world, v, budget=6, pool=2, record=record) == pytest.approx(p, abs=1e-12)


def test_a_record_that_nothing_beats_leaves_greedy_svdd():
    """With Q children at each step, and what the division left over at the last."""
    world, v = chain(3, certain=1), np.array([R, [0.9, 0.4], [0.1, 0.6], [7.0, 8.0]])
    p = world.start_law @ best(world, v, 3, 2) @ best(world, v, 2, 5)
    assert law_of_x0(world, v, budget=8, pool=1) == pytest.approx(p, abs=1e-12)


def test_a_record_that_everything_beats_saves_all_for_the_last_step():
    world, v = chain(3, certain=1), np.array([R, [0.9, 0.4], [0.1, 0.6], [-7.0, -8.0]])
    p = world.start_law @ world.kernels[2] @ best(world, v, 2, 5)  # one call at step 2, all others at step 1
    assert law_of_x0(world, v, budget=7, pool=1) == pytest.approx(p, abs=1e-12)


def test_it_is_no_tilt_and_says_so():
    world = chain(3, certain=1)
    v = world.soft_values(R, 0.6)
    p = law_of_x0(world, v, budget=8, pool=1)
    assert abs(p - world.tilted_law(R, 0.6)).max() > 0.1  # although the value is the exact one at this temperature
    assert not hasattr(steer.Rolled, "log_z")


# ------------------------------------------------------------------------------------------------ the ledger of calls


def mixture(sampler="ancestral", steps=6):
    means = [[-2.0, 0.0], [1.0, 1.0], [2.0, -2.0]]
    return Mixture([0.3, 0.5, 0.2], means, [0.3, 0.3, 0.3], sampler=sampler, steps=steps)


REWARD = rewards.quadratic([1.0, -1.0], 0.5)


class Counted(Mixture):
    asked = 0

    def predict(self, x, i, condition=None):
        self.asked += len(x)
        return super().predict(x, i, condition)


def rolled(world=None, seed=0, **more):
    options = {"budget": 53, "pool": 5, "runs": 40} | more
    generator = torch.Generator().manual_seed(seed)
    return steer.rollover_budget(world or mixture(), REWARD, generator=generator, **options)


@pytest.mark.parametrize("record", RECORDS)
def test_every_call_is_in_the_ledger_and_none_is_overrun(record):
    world = Counted([0.4, 0.6], [[-1.0, 0.0], [2.0, 1.0]], [0.3, 0.2], steps=6)
    o = rolled(world, record=record)
    assert world.asked == o.calls.model == 40 * 53
    assert (o.spent.sum(1) == 53).all() and (o.spent[:, 6] == 5).all() and (o.spent[:, 1:] >= 1).all()
    assert not o.spent[:, 0].any() and not o.early[:, [0, 1, 6]].any()
    assert o.early[:, 2:6].any() and not o.early[:, 2:6].all()


@pytest.mark.parametrize("record", RECORDS)
def test_the_ledger_can_be_audited(record):
    """Quotas, rollovers and records follow from it: no step overdraws, and none that was not early stops short."""
    mean = values.posterior_mean(REWARD)

    def wavy(world, x, prediction, i, condition, chance):
        """Too high at step 4, which few later children beat, but many do better than their parents."""
        return mean(world, x, prediction, i) + 1.0 * (torch.as_tensor(i) == 4)

    o = rolled(record=record, value=wavy)
    for b in range(40):
        share, quota, mark = 8, 8, float(o.values[b, 6])
        for i in range(5, 1, -1):
            spent, value, early = int(o.spent[b, i]), float(o.values[b, i]), bool(o.early[b, i])
            assert spent <= quota
            assert value > mark if early else (spent == quota and value <= mark)
            mark = value if early or record == "current" else mark
            quota = share + quota - spent if early else share


@pytest.mark.parametrize("last", ["sample", "clean"])
def test_a_run_keeps_what_belongs_together(last):
    """Values along the path are those of its particles, and the reward is that of the sample."""
    world, value = mixture(), values.posterior_mean(REWARD)
    o = rolled(world, trace=True, last=last)
    for i in range(6, 0, -1):
        x = o.path[:, i]
        assert torch.allclose(value(world, x, world.predict(x, i), i), o.values[:, i], atol=1e-12)
    assert torch.equal(o.path[:, 0], o.samples)
    assert torch.allclose(REWARD(o.samples), o.rewards) and torch.equal(o.rewards, o.values[:, 0])
    clean = world.clean(o.path[:, 1], world.predict(o.path[:, 1], 1), 1)
    assert torch.equal(o.samples, clean) or last == "sample"
    noisy = rolled(mixture("memoryless"), last=last)
    assert noisy.calls.reward == 40 * (8 if last == "sample" else 1)


def test_a_child_comes_from_its_parent():
    """With hardly any noise the path is that of the ODE; if a parent were mixed up it would jump."""
    from tiltlib import paths

    world = mixture(paths.ddim(1e-6))
    o = rolled(world, trace=True)
    for i in range(6, 0, -1):
        x = o.path[:, i]
        mean = world.kernel(x, world.predict(x, i), i).mean
        assert torch.allclose(o.path[:, i - 1], mean, atol=1e-4)


def test_runs_are_independent_of_how_many_there_are_and_of_the_chunk():
    assert torch.allclose(rolled(chunk=7).samples, rolled().samples, atol=1e-12)
    one, many = rolled(runs=1, seed=3), rolled(runs=400, seed=4)
    assert one.samples.shape == (1, 2)
    error = many.rewards.std() / 20
    again = rolled(runs=400, seed=5, chunk=64)
    assert abs(many.rewards.mean() - again.rewards.mean()) < 4 * 2**0.5 * error


def test_more_budget_finds_more_reward_than_the_model():
    plain = REWARD(mixture().draw(4000, steer.loop._chance(torch.Generator().manual_seed(1)))).mean()
    small, large = rolled(budget=11, runs=200).rewards, rolled(budget=101, runs=200).rewards
    assert plain + 0.5 < small.mean() < large.mean()


def test_a_guided_model_pays_twice():
    world = Guided(digits("flow", steps=3, sampler="flow_grpo"), 2.0)
    options = {"pool": 2, "runs": 3, "condition": torch.tensor([3, 1, 4]), "generator": torch.Generator()}
    o = steer.rollover_budget(world, rewards.brightness(), budget=17, **options)
    assert o.calls.model == 3 * 16 and (o.spent.sum(1) == 8).all()  # an odd call is left over
    assert o.samples.shape == (3, 1, 8, 8)


def test_it_runs_on_sequences():
    world = Sequence([0.6, 0.4], [[0.7, 0.3], [0.2, 0.8]], length=4, steps=4)
    reward = rewards.Reward("ones", lambda x: (x == 1).double().mean(-1), "share", 0, 1)
    value = values.posterior_mean(reward, tokens="argmax")
    o = steer.rollover_budget(world, reward, budget=20, pool=4, runs=9, value=value, generator=torch.Generator())
    assert o.samples.shape == (9, 4) and (o.samples < 2).all()


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 10}, "at least pool \\+ steps = 11 calls"),
        ({"budget": 0}, "budget"),
        ({"pool": 0}, "pool"),
        ({"runs": 0}, "runs"),
        ({"chunk": 0}, "chunk"),
        ({"record": "best"}, "record must be one of best_ever, current, not 'best'"),
        ({"last": "mean"}, "last must be one of sample, clean"),
        ({"world": mixture("ode")}, "deterministic"),
        ({"world": mixture(steps=1)}, "two steps"),
        ({"world": chain(3), "last": "clean"}, "table of probabilities"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_call(change, message):
    def predict(*args):
        raise AssertionError("the network was asked")

    world = change.pop("world", mixture())
    world.predict = predict
    with pytest.raises(ValueError, match=message):
        rolled(world, **change)


def test_what_is_not_finite_names_run_and_step():
    def broken(world, x, prediction, i, condition, chance):
        out = REWARD(x)
        return torch.where((torch.as_tensor(i) == 3) & (torch.arange(len(x)) == 2), torch.nan, out)

    with pytest.raises(ValueError, match="nan at step 3, run 2"):
        rolled(value=broken)

    def poor(world, x, prediction, i, condition, chance):
        return torch.where(torch.arange(len(x)) == 13, torch.inf, REWARD(x))

    with pytest.raises(ValueError, match="the value is inf at step 6, run 2, particle 3"):
        rolled(value=poor)
