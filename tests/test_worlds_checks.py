"""`worlds.check`: right worlds pass, and for every check a world with one thing broken fails that check by name."""

import math

import numpy as np
import pytest
import torch

from tiltlib import paths
from tiltlib.worlds.chain import Chain
from tiltlib.worlds.checks import CHECKS, check
from tiltlib.worlds.mixture import Mixture
from tiltlib.worlds.sequence import Sequence


class Right(Mixture):
    """A two-dimensional mixture that is neither centred nor isotropic as a whole; conditions are its components."""

    def __init__(self, **kw):
        given = {"steps": 20, "prediction": "epsilon"} | kw
        super().__init__([0.3, 0.7], [[-2.0, 1.0], [1.5, 0.0]], [0.2, 0.1], **given)


@pytest.mark.parametrize("path", ["vp_linear", "ve", "rectified"])
@pytest.mark.parametrize("sampler", ["ancestral", "ode"])
def test_exact_mixtures_pass(path, sampler):
    world = Right(path=path, sampler=sampler, prediction="x0")
    findings = check(world)
    assert [f.name for f in findings] == list(CHECKS)
    assert all(f.passed for f in findings)


@pytest.mark.parametrize("sampler", ["flow_grpo", "dance_grpo", "memoryless", "euler"])
def test_flow_sdes_pass(sampler):
    check(Right(path="rectified", sampler=sampler, prediction="velocity", steps=50))


def test_a_conditional_law_passes_and_conditions_per_particle_too():
    check(Right(), condition=1)
    check(Right(), condition=torch.arange(256) % 2)


def test_float32_passes():
    check(Right(dtype=torch.float32))


def test_one_step_passes():
    check(Right(steps=1))


def test_discrete_worlds_pass():
    random = np.random.default_rng(0)
    check(Chain(random.dirichlet(np.ones(4)), [random.dirichlet(np.ones(4), 4) for _ in range(3)]))
    check(Sequence([0.2, 0.5, 0.3], [[0.2, 0.5, 0.3], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]], 5, 10))


# ---------------------------------------------------------------------------------------------- worlds that are broken


class TooMany(Right):
    def start(self, n, chance):
        return super().start(n + 1, chance)


class NotANumber(Right):
    def predict(self, x, i, condition=None):
        return super().predict(x, i, condition) * (math.nan if i == 7 else 1)


class GlobalNoise(Right):
    def start(self, n, chance):
        return torch.randn(n, 2, dtype=torch.float64)


class DropoutLeftOn(Right):
    def predict(self, x, i, condition=None):
        return torch.nn.functional.dropout(super().predict(x, i, condition), 0.01)


class InPlace(Right):
    def predict(self, x, i, condition=None):
        out = super().predict(x, i, condition)
        x.mul_(0.99)
        return out


class BatchNorm(Right):
    def predict(self, x, i, condition=None):
        out = super().predict(x, i, condition)
        return out - 0.05 * out.mean(0)


class FirstStepOnly(Right):
    def predict(self, x, i, condition=None):
        return super().predict(x, int(torch.as_tensor(i).reshape(-1)[0]), condition)


class Clamped(Right):
    def predict(self, x, i, condition=None):
        return super().predict(x, torch.as_tensor(i).clamp(max=self.steps), condition)


class IgnoresCondition(Right):
    def predict(self, x, i, condition=None):
        return super().predict(x, i)


class Altered:
    """A kernel with some of its methods replaced."""

    def __init__(self, kernel, **methods):
        self.kernel, self.methods = kernel, methods

    def __getattr__(self, name):
        return self.methods.get(name) or getattr(self.kernel, name)


def wide_samples(kernel):
    return Altered(kernel, sample=paths.GaussianKernel(kernel.mean, 1.1 * kernel.std).sample)


def moved_samples(kernel):
    return Altered(kernel, sample=paths.GaussianKernel(kernel.mean + 0.3 * kernel.std, kernel.std).sample)


def wide_density(kernel):
    return Altered(kernel, log_prob=paths.GaussianKernel(kernel.mean, 1.2 * kernel.std).log_prob)


def moved_density(kernel):
    return Altered(kernel, log_prob=paths.GaussianKernel(kernel.mean + 0.3 * kernel.std, kernel.std).log_prob)


def tilts_back(kernel):
    return Altered(kernel, tilt=lambda g: kernel.tilt(-g))


def does_not_tilt(kernel):
    return Altered(kernel, tilt=lambda g: kernel)


def tilts_by_std(kernel):  # std instead of std^2
    return Altered(kernel, tilt=lambda g: kernel.tilt(g / kernel.std))


def forgets_the_ratio(kernel):
    def tilt(g):
        tilted = kernel.tilt(g)
        return Altered(tilted, sample=lambda m, chance: (tilted.sample(m, chance)[0], torch.zeros(1, m)))

    return Altered(kernel, tilt=tilt)


def ratio_upside_down(kernel):
    def tilt(g):
        tilted = kernel.tilt(g)

        def sample(m, chance):
            x, ratio = tilted.sample(m, chance)
            return x, -ratio

        return Altered(tilted, sample=sample)

    return Altered(kernel, tilt=tilt)


class BadKernel(Right):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def kernel(self, x, prediction, i):
        kernel = super().kernel(x, prediction, i)
        return self.change(kernel) if kernel.std > 0 else kernel


class Short(Right):  # arrives at step 1 instead of at data
    def kernel(self, x, prediction, i):
        kernel = super().kernel(x, prediction, i)
        return paths.GaussianKernel(x, kernel.std) if int(torch.as_tensor(i).reshape(-1)[0]) == 1 else kernel


class CleanIsScaled(Right):  # alpha is forgotten: right at the clean end, wrong at the noisy one
    def clean(self, x, prediction, i):
        return super().clean(x, prediction, i) * paths.at(self.grid.alpha, i, x)


class WrongTime(Right):  # the network is told the wrong noise level
    def predict(self, x, i, condition=None):
        return super().predict(x, (torch.as_tensor(i) + 1) // 2, condition)


class WrongSign(Right):
    def predict(self, x, i, condition=None):
        return -super().predict(x, i, condition)


class TooMuchNoise(Right):
    def renoise(self, x, i_from, i_to, chance):
        return x + 2 * (super().renoise(x, i_from, i_to, chance) - x)


class GoesDown(Right):
    def renoise(self, x, i_from, i_to, chance):
        return super().renoise(x, min(i_from, i_to), i_to, chance)


class SameSchedule(Right):  # as if every stretch began at data: noise is added twice
    def renoise(self, x, i_from, i_to, chance):
        if i_to < i_from:
            raise ValueError
        return x if i_to == i_from else super().renoise(x, 0, i_to - i_from, chance)


class UnitStart(Right):
    def start(self, n, chance):
        return chance.normals((n, 2), dtype=torch.float64)


class Detached(Right):
    def clean(self, x, prediction, i):
        return super().clean(x, prediction, i).detach()


class NoGrad(Right):
    def predict(self, x, i, condition=None):
        with torch.no_grad():
            return super().predict(x, i, condition)


class StraightThrough(Right):  # the gradient of the network is cut, that of the rest is not
    def predict(self, x, i, condition=None):
        return super().predict(x, i, condition).detach() + 0 * x


SEQUENCE = ([0.2, 0.5, 0.3], [[0.2, 0.5, 0.3], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]], 5, 10)


class KeepsMasks(Sequence):  # the mask is treated as one more letter, in the last step too
    def kernel(self, x, prediction, i):
        logits = super().kernel(x, prediction, i).log_q
        return paths.CategoricalKernel((logits.exp() + 1e-1).log())


class UniformClean(Sequence):
    def clean(self, x, prediction, i=None):
        return torch.full_like(prediction, 1 / 3)


class MasksTooMuch(Sequence):
    def renoise(self, x, i_from, i_to, chance):
        return super().renoise(super().renoise(x, i_from, i_to, chance), i_from, i_to, chance)


class ShiftedTokens(Sequence):
    def kernel(self, x, prediction, i):
        kernel = super().kernel(x, prediction, i)
        return Altered(kernel, log_prob=lambda x: kernel.log_prob((x + 1) % 4))


BROKEN = [
    ("rollout", TooMany, (), "start"),
    ("rollout", NotANumber, (), "NaN"),
    ("reproducible", GlobalNoise, (), "start"),
    ("reproducible", DropoutLeftOn, (), "predict"),
    ("reproducible", InPlace, (), "changes the particles"),
    ("batching", BatchNorm, (), "other particles"),
    ("batching", FirstStepOnly, (), "come together"),
    ("grid", Clamped, (), "step 21"),
    ("grid", IgnoresCondition, (), "condition"),
    ("kernel", BadKernel, (wide_samples,), "variance"),
    ("kernel", BadKernel, (moved_samples,), "mean"),
    ("kernel", BadKernel, (wide_density,), "log_prob"),
    ("kernel", BadKernel, (moved_density,), "log_prob"),
    ("kernel", BadKernel, (tilts_back,), "tilt"),
    ("kernel", BadKernel, (does_not_tilt,), "tilt"),
    ("kernel", BadKernel, (tilts_by_std,), "tilt"),
    ("kernel", BadKernel, (forgets_the_ratio,), "log p - log q"),
    ("kernel", BadKernel, (ratio_upside_down,), "log p - log q"),
    ("kernel", ShiftedTokens, SEQUENCE, "log_prob"),
    ("last_step", Short, (), "last step"),
    ("last_step", UniformClean, SEQUENCE, "last step"),
    ("last_step", KeepsMasks, SEQUENCE, ""),
    ("posterior", CleanIsScaled, (), "not what clean expects"),
    ("posterior", WrongTime, (), "not what clean expects"),
    ("posterior", WrongSign, (), ""),
    ("posterior", UniformClean, SEQUENCE, "not what clean expects"),
    ("forward", TooMuchNoise, (), "renoise"),
    ("forward", GoesDown, (), "i_to < i_from"),
    ("forward", SameSchedule, (), "two stretches"),
    ("forward", MasksTooMuch, SEQUENCE, "on their way down"),
    ("gradients", Detached, (), "no gradient"),
    ("gradients", NoGrad, (), "particles"),
    ("gradients", StraightThrough, (), "differences give"),
]


@pytest.mark.parametrize(("name", "world", "given", "words"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_one_thing_broken_fails_its_check(name, world, given, words):
    findings = {f.name: f for f in check(world(*given), raises=False)}
    assert not findings[name].passed
    assert words in findings[name].message
    with pytest.raises(ValueError, match=name):
        check(world(*given))


def test_a_start_of_the_wrong_scale_fails():
    with pytest.raises(ValueError, match=r"forward: .*start"):
        check(UnitStart(path="ve"))


def test_every_check_has_a_broken_world():
    assert {row[0] for row in BROKEN} == set(CHECKS)


def test_the_message_names_all_failures_and_skipping_leaves_them_out():
    with pytest.raises(ValueError, match=r"(?s)posterior.*gradients"):
        check(type("Both", (CleanIsScaled, Detached), {})())
    findings = check(Detached(), skip=("gradients",))
    assert findings[-1].message == "skipped"


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="missing"):
        check(object())
    with pytest.raises(ValueError, match="unknown checks"):
        check(Right(), skip=("nonsense",))
    with pytest.raises(ValueError, match="particles"):
        check(Right(), particles=1)
    world = Right()
    world.steps = 0
    with pytest.raises(ValueError, match="steps"):
        check(world)


def test_no_global_randomness_is_used():
    before = torch.get_rng_state()
    check(Right())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seed", range(8))
def test_right_worlds_pass_for_other_seeds(seed):
    check(Right(), seed=seed)
    check(Sequence(*SEQUENCE), seed=seed)


def test_the_rollout_cannot_be_skipped():
    with pytest.raises(ValueError, match="needs the rollout"):
        check(Right(), skip=("rollout",))
