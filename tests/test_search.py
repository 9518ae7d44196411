"""steer/search.py against exact answers: refinement and tree search by enumeration of all their random outcomes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tiltlib import bestofn, steer, values
from tiltlib import tensor_rewards as rewards
from tiltlib.enumeration import outcomes
from tiltlib.steer import rows
from tiltlib.worlds import Chain, Mixture, Sequence, digits

KERNELS = [[[0.9, 0.1], [0.35, 0.65]], [[0.2, 0.8], [0.55, 0.45]], [[0.6, 0.4], [0.25, 0.75]]]
R, BETA = np.array([0.2, 1.1]), 0.6


def chain(steps=2):
    """Two states, nothing symmetric."""
    return Chain([0.3, 0.7], KERNELS[:steps])


def transition(world, **options):
    """(2, 2): from each current state, the law of the state after one round, by enumeration of the production code."""
    table = np.zeros((2, 2))
    for state in (0, 1):
        first = torch.tensor([state])
        for p, o in outcomes(
            lambda chance, first=first: steer.refine(
                world, R, beta=BETA, generator=chance, rounds=1, start=first, **options
            )
        ):
            table[state, o.samples[0]] += p
    assert table.sum(1) == pytest.approx([1, 1], abs=1e-12)
    return table


def among_siblings(world, noise, n):
    """The same for i-SIR among siblings, by matrices: noise up to each state z, then iterated best-of-n of p(x_0|z)."""
    joint = world.laws[noise][:, None] * world.clean_laws[noise]
    up = (joint / joint.sum(0)).T  # p(z | x_0)
    down = [bestofn.iterated_kernel(p, R, BETA, n) for p in world.clean_laws[noise]]
    return sum(up[:, [z]] * kernel for z, kernel in enumerate(down))


def leaves_invariant(table, world):
    """Whether the tilted law is invariant, and the transition reversible with respect to it."""
    target = world.tilted_law(R, BETA)
    flow = target[:, None] * table
    return abs(target @ table - target).max() < 1e-12 and abs(flow - flow.T).max() < 1e-12


# ------------------------------------------------------------------------------------------------------------- refine


@pytest.mark.parametrize("n", [2, 3])
def test_from_scratch_it_is_iterated_best_of_n(n):
    table = transition(chain(), particles=n)
    assert table == pytest.approx(bestofn.iterated_kernel(chain().laws[0], R, BETA, n), abs=1e-12)


@pytest.mark.parametrize(("steps", "noise", "n"), [(2, 1, 3), (3, 2, 2), (3, 1, 2)])
def test_from_part_of_the_noise_it_is_iterated_best_of_n_among_siblings(steps, noise, n):
    table = transition(chain(steps), particles=n, noise=noise)
    assert table == pytest.approx(among_siblings(chain(steps), noise, n), abs=1e-12)
    assert leaves_invariant(table, chain(steps))
    assert abs(table - bestofn.iterated_kernel(chain(steps).laws[0], R, BETA, n)).max() > 0.01


@pytest.mark.parametrize("noise", [1, 2])
def test_the_metropolis_rule_is_exact_and_moves_more_often(noise):
    table = transition(chain(), particles=3 if noise == 1 else 2, noise=noise, accept="metropolis")
    among = transition(chain(), particles=3 if noise == 1 else 2, noise=noise)
    assert leaves_invariant(table, chain())
    assert (np.diag(table) < np.diag(among) - 1e-3).all()


CONDITIONAL = {
    "always resampled": (2, {"particles": 2, "noise": 1, "method": rows.smc(1.0)}),
    "resampled at times": (2, {"particles": 2, "noise": 1, "method": rows.smc(0.97)}),
    "three particles": (2, {"particles": 3, "noise": 1, "method": rows.smc(0.97)}),
    "running maximum": (2, {"particles": 2, "noise": 1, "method": rows.smc(1.0, potential="max")}),
    "tempered": (2, {"particles": 2, "noise": 1, "method": rows.das(0.9, drift=False)}),
    "children compete": (2, {"particles": 2, "noise": 1, "method": replace(rows.smc(1.0), children=2)}),
    "two steps": (3, {"particles": 2, "noise": 2, "method": rows.smc(0.97)}),
    "from scratch": (1, {"particles": 2, "method": rows.smc(0.97)}),
}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_steering_back_with_the_current_path_among_the_particles_is_exact(name):
    steps, options = CONDITIONAL[name]
    assert leaves_invariant(transition(chain(steps), **options), chain(steps))


@pytest.mark.parametrize("accept", ["always", "greedy"])
@pytest.mark.parametrize("method", ["smc", "importance"])
def test_rules_that_forget_the_current_sample_or_take_the_best_are_biased(accept, method):
    """With smc every way back is steered well; taking its result whatever was there before is still not exact."""
    target = chain().tilted_law(R, BETA)
    table = transition(chain(), particles=3, noise=1, accept=accept, method=method)
    assert abs(target @ table - target).max() > 0.01


def test_it_is_exact_only_if_the_noise_is_that_of_the_model():
    class Other(Chain):
        def renoise(self, x, i_from, i_to, chance):
            return chance.categoricals(torch.tensor([0.5, 0.5]).log().expand(len(x), 2))

    world = Other([0.3, 0.7], KERNELS[:2])
    target = world.tilted_law(R, BETA)
    assert abs(target @ transition(world, particles=3, noise=1) - target).max() > 0.01


def test_a_value_changes_how_the_way_back_is_steered_and_not_what_is_invariant():
    tables = []
    for value in (values.exact(R, BETA), values.exact(R, 3 * BETA)):
        tables.append(transition(chain(), particles=2, noise=1, method=rows.smc(0.97), value=value))
        assert leaves_invariant(tables[-1], chain())
    assert leaves_invariant(transition(chain(), particles=2, noise=1), chain())


@pytest.mark.parametrize(
    ("options", "model", "reward"),
    [
        ({}, 5 * 6 + 3 * 5 * 3 * 6, 5 + 3 * 5 * 3),  # a first sample, then N - 1 fresh ones from scratch
        ({"noise": 2}, 5 * 6 + 3 * 5 * 3 * 2, 5 + 3 * 5 * 3),
        ({"noise": 2, "method": "smc"}, 5 * 6 + 3 * 5 * 4 * 2, 5 + 3 * 5 * 4),  # the current path is looked at too
        ({"noise": 2, "method": "svdd", "children": 2, "accept": "greedy"}, 30 + 45 * (1 + 2), 5 + 45 * 2),
    ],
)
def test_calls_are_counted(options, model, reward):
    class Counted(Mixture):
        asked = 0

        def predict(self, x, i, condition=None):
            self.asked += len(x)
            return super().predict(x, i, condition)

    world = Counted([0.3, 0.7], [[-1.0, 0.0], [2.0, 1.0]], [0.3, 0.2], steps=6)
    score, judged = rewards.quadratic([1.0, -0.5], 0.5), []

    def watched(x):
        judged.append(len(x))
        return score(x)

    value = values.exact(score, 0.5)
    value.needs_prediction = True
    o = steer.refine(
        world, watched, value=value, beta=0.5, generator=torch.Generator().manual_seed(0), rounds=3, particles=4,
        runs=5, trace=True, **options,
    )  # fmt: skip
    assert (o.calls.model, o.calls.reward) == (model, reward)
    assert world.asked == model and sum(judged) == reward  # and nothing is called that is not counted
    assert o.samples.shape == (5, 2) and o.rewards.shape == (4, 5) and o.moved.shape == (3, 5) and len(o.trace) == 4
    for x, r in zip(o.trace, o.rewards, strict=True):
        assert torch.allclose(score(x).double(), r)
    assert torch.equal(o.moved, torch.stack([(a != b).any(1) for a, b in zip(o.trace[1:], o.trace, strict=False)]))


def test_greedy_never_goes_down_and_iterating_approaches_the_tilt_of_a_mixture():
    world, score = Mixture([0.3, 0.7], [[-1.0], [2.0]], [0.3, 0.2], steps=40), rewards.quadratic([0.5], 0.5)
    options = {"beta": 0.5, "generator": torch.Generator().manual_seed(0), "rounds": 6, "runs": 800, "particles": 4}
    greedy = steer.refine(world, score, accept="greedy", noise=20, **options)
    assert (greedy.rewards.diff(dim=0) >= 0).all()
    reference = steer.run(
        world, score, beta=0.5, method="importance", generator=torch.Generator().manual_seed(1), particles=20000
    )
    wanted = float((reference.log_weights.softmax(1) * score(reference.samples[0]).double()).sum())
    mean = steer.refine(world, score, noise=25, **options).rewards[-1]
    assert abs(float(mean.mean()) - wanted) < 4 * float(mean.std()) / math.sqrt(800) + 0.01  # 0.01: noise of 40 steps
    assert float(greedy.rewards[-1].mean()) > wanted + 0.1


# -------------------------------------------------------------------------------------------------------- tree search


def searched(world, **options):
    """(2,) law of the sample of a tree search, by enumeration."""
    p_end = np.zeros(2)
    for p, o in outcomes(lambda chance: steer.tree_search(world, R, generator=chance, **options)):
        p_end[o.samples[0]] += p
        assert float(o.rewards[0]) == R[o.samples[0]]
    assert p_end.sum() == pytest.approx(1, abs=1e-12)
    return p_end


@pytest.mark.parametrize(("steps", "soft"), [(1, True), (2, False)])
def test_one_simulation_a_step_is_svdd(steps, soft):
    world = chain(steps)
    v = world.soft_values(R, BETA)
    select = (lambda p, u: bestofn.soft_law(p, u, BETA, 2)) if soft else (lambda p, u: bestofn.hard_law(p, u, 2))
    p = select(world.start_law, v[steps])
    for i in range(steps, 0, -1):
        p = p @ np.array([select(row, v[i - 1]) for row in world.kernels[i - 1]])
    how = {"backup": "soft", "beta": BETA} if soft else {"backup": "max"}
    options = {"simulations": 1, "children": 2, "value": values.exact(R, BETA), **how}
    assert searched(world, **options) == pytest.approx(p, abs=1e-12)


def test_a_complete_tree_with_the_soft_backup_is_exact_whatever_the_value():
    target, how = chain(3).tilted_law(R, BETA), {"children": None, "backup": "soft", "beta": BETA}
    wrong, right = values.exact(-R, BETA), values.exact(R, BETA)

    def value(world, x, prediction, i, condition, chance):
        return torch.where(i == 0, right(world, x, prediction, i), wrong(world, x, prediction, i))

    value.needs_prediction = False
    assert searched(chain(3), simulations=15, value=value, **how) == pytest.approx(target, abs=1e-12)
    assert abs(searched(chain(3), simulations=1, value=value, **how) - target).max() > 0.1
    assert abs(searched(chain(3), simulations=3, value=value, **how) - target).max() > 1e-3
    assert searched(chain(3), simulations=1, value=right, **how) == pytest.approx(target, abs=1e-12)


def test_sampled_children_are_biased_even_with_exact_values():
    options = {"children": 2, "backup": "soft", "beta": BETA, "value": values.exact(R, BETA)}
    for simulations in (1, 2):
        p = searched(chain(1), simulations=simulations, **options)
        assert abs(p - chain(1).tilted_law(R, BETA)).max() > 0.01


@pytest.mark.parametrize("backup", ["max", "mean"])
def test_hard_backups_go_to_the_best_of_a_complete_tree(backup):
    """The mean weighs by the model, so it goes where E[r] is highest at each step; the maximum to the best end."""
    world = Chain([0.5, 0.5], [[[0.9, 0.1], [0.4, 0.6]], [[0.05, 0.95], [0.5, 0.5]]])
    p = searched(world, simulations=15, children=None, backup=backup, value=values.exact(-R, BETA))
    assert p.tolist() == [0.0, 1.0]


def test_the_mean_backup_is_the_mean_over_all_evaluations_below():
    world, score = Mixture([1.0], [[0.0, 1.0]], [0.5], steps=5), rewards.linear([1.0, -1.0])
    tree = steer.tree_search(
        world, score, generator=torch.Generator().manual_seed(1), simulations=6, children=3, backup="mean", runs=2
    ).tree
    for b in range(2):
        n = tree.step.shape[1]
        kids = [[k for k in range(n) if tree.parent[b, k] == node] for node in range(n)]
        for node in reversed(range(n)):
            if not kids[node]:
                continue
            value, visits = tree.value[b, kids[node]], tree.visits[b, kids[node]]
            assert float(tree.visits[b, node]) == float(visits.sum())
            assert float(tree.value[b, node]) == pytest.approx(float((value * visits).sum() / visits.sum()))
            assert (tree.step[b, kids[node]] == tree.step[b, node] - 1).all()


def test_a_path_goes_from_the_start_to_the_end_by_the_best_child():
    world, score = Mixture([1.0], [[0.0, 1.0]], [0.5], steps=5), rewards.linear([1.0, -1.0])
    o = steer.tree_search(
        world, score, generator=torch.Generator().manual_seed(1), simulations=4, children=3, runs=3
    )  # fmt: skip
    for b in range(3):
        before = 0
        for k, node in enumerate(o.tree.path[b].tolist()):
            assert o.tree.step[b, node] == 5 - k and o.tree.parent[b, node] == before
            siblings = (o.tree.parent[b] == before) & (o.tree.step[b] >= 0)
            assert o.tree.value[b, node] == o.tree.value[b, siblings].max()
            before = node
        assert torch.equal(o.samples[b], o.tree.x[b, before])
    assert torch.allclose(o.rewards, score(o.samples).double())


def test_exploration_spreads_the_simulations():
    world, score = Mixture([1.0], [[0.0, 1.0]], [0.5], steps=6), rewards.linear([1.0, -1.0])
    widths = {}
    for c in (0.0, 30.0):
        options = {"generator": torch.Generator().manual_seed(1), "simulations": 8, "children": 3, "exploration": c}
        tree = steer.tree_search(world, score, runs=8, **options).tree
        widths[c] = (tree.step == 5).sum(1)  # below all three starts, or below few
    assert (widths[30.0] == 9).all() and widths[0.0].double().mean() < 6


def test_what_is_known_is_not_searched_again():
    """Two states and two steps: 1 + 2 + 4 nodes can be expanded, however many simulations are allowed."""
    o = steer.tree_search(chain(), R, generator=torch.Generator().manual_seed(0), simulations=50, children=None)
    assert (o.tree.step >= 0).sum() == 1 + 2 + 4 + 8
    assert o.calls.model == 2 + 4 and o.calls.reward == 8


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_calls_of_a_search_are_counted(depth):
    class Counted(Mixture):
        asked = 0

        def predict(self, x, i, condition=None):
            self.asked += len(x)
            return super().predict(x, i, condition)

    world, score = Counted([0.3, 0.7], [[-1.0, 0.0], [2.0, 1.0]], [0.3, 0.2], steps=6), rewards.linear([1.0, -0.5])
    options = {"simulations": 1, "children": 4, "runs": 5, "depth": depth}
    o = steer.tree_search(world, score, generator=torch.Generator().manual_seed(0), **options)
    wanted = sum(min(depth, i) for i in range(1, 7)) * 4 * 5  # from a child at step i no more than i steps are left
    assert o.calls.model == world.asked == wanted
    assert o.calls.reward == 4 * 5 * min(depth, 7)
    exact = values.exact(rewards.linear([1.0, -0.5]), 0.5)  # reads no prediction: only what is expanded or walked
    world.asked = 0
    o = steer.tree_search(world, score, generator=torch.Generator().manual_seed(0), value=exact, **options)
    walked = sum(min(depth - 1, i) for i in range(1, 7)) * 4 * 5
    assert o.calls.model == world.asked == (walked if depth > 1 else 6 * 5)


def test_a_whole_roll_out_asks_for_no_value():
    def never(*args):
        raise AssertionError("asked for a value")

    o = steer.tree_search(chain(3), R, generator=torch.Generator().manual_seed(0), depth=4, value=never, runs=3)
    assert o.calls.value == 0 and o.samples.shape == (3,)


def test_searches_do_not_depend_on_the_chunk():
    world, score = Mixture([0.3, 0.7], [[-1.0, 0.0], [2.0, 1.0]], [0.3, 0.2], steps=6), rewards.linear([1.0, -0.5])
    found = [
        steer.tree_search(
            world, score, generator=torch.Generator().manual_seed(3), depth=2, simulations=3, runs=4, chunk=chunk
        )
        for chunk in (None, 5)
    ]
    assert torch.allclose(found[0].samples, found[1].samples, atol=1e-12) and found[0].calls == found[1].calls
    back = [
        steer.refine(
            world, score, beta=0.5, generator=torch.Generator().manual_seed(3), rounds=2, noise=3, method="smc", runs=4,
            chunk=chunk,
        )
        for chunk in (None, 5)
    ]  # fmt: skip
    assert torch.allclose(back[0].samples, back[1].samples, atol=1e-12) and back[0].calls == back[1].calls


def test_searches_run_on_sequences_and_on_images_with_a_condition_for_each_run():
    generator = torch.Generator().manual_seed(0)
    world = Sequence([0.6, 0.4], [[0.7, 0.3], [0.2, 0.8]], length=4, steps=4)
    ones = rewards.Reward("ones", lambda x: (x == 1).double().mean(-1), "share", 0, 1)
    options = {"generator": generator, "value": values.exact(ones, 0.5), "runs": 3}
    assert (steer.tree_search(world, ones, **options).samples < 2).all()
    o = steer.refine(world, ones, beta=0.5, rounds=2, noise=2, method="smc", **options)
    assert o.samples.shape == (3, 4) and (o.samples < 2).all()
    images, condition = digits("flow", steps=4, sampler="flow_grpo"), torch.tensor([3, 7])
    asked = []
    predict = images.predict
    images.predict = lambda x, i, c=None: asked.append((len(x), c)) or predict(x, i, c)
    options = {"generator": generator, "runs": 2, "condition": condition}
    o = steer.tree_search(images, rewards.brightness(), children=2, simulations=2, depth=2, **options)
    assert o.samples.shape == (2, 1, 8, 8)
    o = steer.refine(images, rewards.brightness(), beta=0.05, rounds=1, noise=2, particles=3, **options)
    assert o.samples.shape == (2, 1, 8, 8)
    assert all(len(c) == n and (c.diff() >= 0).all() and set(c.tolist()) <= {3, 7} for n, c in asked)


# ------------------------------------------------------------------------------------------------------------- errors


class Silent(Chain):
    def start(self, n, chance):
        raise AssertionError("work has started")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"beta": 0.0}, ValueError, "beta"),
        ({"rounds": 0}, ValueError, "rounds"),
        ({"noise": 0}, ValueError, "a step from 1 to 2"),
        ({"noise": 3}, ValueError, "a step from 1 to 2"),
        ({"noise": 1.0}, ValueError, "a step from 1 to 2"),
        ({"particles": 1}, ValueError, "particles >= 2"),
        ({"accept": "often"}, ValueError, "unknown rule"),
        ({"method": "smcc"}, ValueError, "unknown method"),
        ({"method": "svdd"}, ValueError, "no rule is known"),
        ({"method": "das"}, ValueError, "no rule is known"),
        ({"method": "best_of_n"}, ValueError, "no rule is known"),
        ({"method": "nested"}, ValueError, "no rule is known"),
        ({"method": rows.waste_free(drift=False)}, ValueError, "no rule is known"),
        ({"method": "smc", "accept": "metropolis"}, ValueError, "metropolis"),
        ({"runs": 0}, ValueError, "runs"),
        ({"start": torch.tensor([0, 1])}, ValueError, "2 samples for 1 runs"),
        ({"generator": 7}, TypeError, "Generator"),
    ],
)
def test_refine_refuses_bad_input_before_any_work(change, kind, message):
    options = {"beta": 1.0, "generator": torch.Generator(), "rounds": 1, **change}
    with pytest.raises(kind, match=message):
        steer.refine(Silent([0.3, 0.7], KERNELS[:2]), R, **options)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"simulations": 0}, ValueError, "simulations"),
        ({"children": 0}, ValueError, "children"),
        ({"depth": 0}, ValueError, "depth"),
        ({"runs": 0}, ValueError, "runs"),
        ({"backup": "median"}, ValueError, "unknown backup 'median'"),
        ({"backup": "soft"}, ValueError, "beta is needed"),
        ({"beta": 1.0}, ValueError, "beta is needed"),
        ({"backup": "soft", "beta": -1.0}, ValueError, "beta"),
        ({"exploration": -1.0}, ValueError, "exploration"),
        ({"exploration": math.nan}, ValueError, "exploration"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"generator": 7}, TypeError, "Generator"),
    ],
)
def test_tree_search_refuses_bad_input_before_any_work(change, kind, message):
    with pytest.raises(kind, match=message):
        steer.tree_search(Silent([0.3, 0.7], KERNELS[:2]), R, **{"generator": torch.Generator(), **change})


def test_a_world_without_noise_or_without_a_list_of_states_is_refused():
    world, score = Mixture([1.0], [[0.0, 1.0]], [0.5], steps=5, sampler="ode"), rewards.linear([1.0, -1.0])
    with pytest.raises(ValueError, match="deterministic"):
        steer.tree_search(world, score, generator=torch.Generator())
    with pytest.raises(ValueError, match="deterministic"):
        steer.refine(world, score, beta=1.0, generator=torch.Generator(), rounds=1, noise=2)
    steer.refine(
        world, score, beta=1.0, generator=torch.Generator(), rounds=1
    )  # from scratch there is noise: the start
    with pytest.raises(TypeError, match="enumerated"):
        steer.tree_search(Mixture([1.0], [[0.0]], [0.5]), score, generator=torch.Generator(), children=None)


def test_what_is_not_finite_is_named():
    def broken(world, x, prediction, i, condition, chance):
        return torch.full((len(x),), torch.nan)

    with pytest.raises(ValueError, match="the value is nan at step 2"):
        steer.tree_search(chain(), R, generator=torch.Generator(), value=broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": (torch.zeros(1, 4, dtype=torch.int64), 0)}, "a step from 1 to 2"),
        ({"start": (torch.zeros(1, 3, dtype=torch.int64), 1)}, r"\(1, 4\)"),
        ({"pinned": [torch.zeros(1, dtype=torch.int64)]}, "3 states"),
        ({"pinned": [torch.zeros(1, dtype=torch.int64)] * 3, "method": "das"}, "without drift"),
    ],
)
def test_the_loop_refuses_a_start_or_a_path_that_does_not_fit(change, message):
    options = {"beta": 1.0, "method": "smc", "generator": torch.Generator(), "particles": 4, **change}
    with pytest.raises(ValueError, match=message):
        steer.run(Silent([0.3, 0.7], KERNELS[:2]), R, **options)


def test_the_loop_started_on_the_way_estimates_what_is_left():
    """E[Z_hat] from step 1, state x, is E[exp(r / beta) | x_1 = x]."""
    for state in (0, 1):
        start = torch.full((1, 2), state), 1
        z = sum(
            p * float(o.log_z.exp())
            for p, o in outcomes(
                lambda chance, start=start: steer.run(
                    chain(), R, beta=BETA, method=rows.smc(1.0), generator=chance, particles=2, start=start
                )
            )
        )
        assert z == pytest.approx(math.exp(chain().soft_values(R, BETA)[1, state] / BETA), abs=1e-12)
