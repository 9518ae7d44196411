"""tune/training.py: the rows against enumeration and finite differences of exact objectives, the loop, checkpoints."""

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tiltlib import law
from tiltlib.chance import Chance
from tiltlib.tune import training

P = np.array([0.05, 0.2, 0.45, 0.3])
R = np.array([2.0, -1.0, 0.25, 0.75])
BETA = 0.7
THETA = torch.tensor([0.4, -0.3, 0.0, 0.9], dtype=torch.float64)
REWARD = torch.from_numpy(R)
pytestmark = pytest.mark.usefixtures("strict")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def policy_at(theta, features=None, runs=1):
    policy = training.LogLinear(P, features, runs)
    with torch.no_grad():
        policy.theta.copy_(theta.expand_as(policy.theta))
    return policy


def gradient(policy, parts):
    (g,) = torch.autograd.grad(
        sum(training.surrogate(c, policy.log_prob(batch)) for batch, c in parts), list(policy.parameters().values())
    )
    return g


def finite_difference(f, x, h=1e-6):
    out = np.zeros(len(x))
    for k in range(len(x)):
        up, down = x.clone(), x.clone()
        up[k] += h
        down[k] -= h
        out[k] = (f(up) - f(down)) / (2 * h)
    return out


def law_at(theta):
    return policy_at(theta).log_law().exp()[0].detach().numpy()


# ------------------------------------------------------------------ the rows


@pytest.mark.parametrize("n", [2, 3])
def test_reinforce_is_unbiased_by_enumeration(n):
    tuples = torch.tensor(list(itertools.product(range(4), repeat=n)))
    policy = policy_at(THETA)
    pi = law_at(THETA)
    mean = np.zeros(4)
    for outcomes in tuples:
        batch = outcomes[None]
        c = training.reinforce_coefficients(REWARD[batch], policy.log_ratio(batch).detach(), BETA)
        mean -= pi[outcomes].prod() * gradient(policy, [(batch, c)])[0].numpy()
    exact = finite_difference(lambda theta: law.rlhf_objective(law_at(theta), P, R, BETA) / BETA, THETA)
    assert np.abs(mean - exact).max() < 1e-8
    assert np.abs(exact).max() > 0.1


def test_reinforce_has_no_noise_at_the_tilted_law():
    policy = policy_at(torch.from_numpy(R / BETA))
    assert law.tv(law_at(torch.from_numpy(R / BETA)), law.tilt(P, R, BETA)) < 1e-15
    batch = torch.tensor([[0, 3, 3, 1, 2]])
    at_beta = training.reinforce_coefficients(REWARD[batch], policy.log_ratio(batch), BETA)
    wrong = training.reinforce_coefficients(REWARD[batch], policy.log_ratio(batch), 2 * BETA)
    assert at_beta.abs().max() < 1e-15 and wrong.abs().max() > 0.1


def test_dpo_against_autograd_of_its_loss():
    batch = torch.tensor([[0, 2, 2, 1, 3, 0]])
    policy = policy_at(THETA)
    r, n = REWARD[batch][0], batch.shape[1]
    log_ratio = policy.log_ratio(batch)[0]
    loss = 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                label = torch.sigmoid(r[i] - r[j])
                loss -= label * torch.nn.functional.logsigmoid(BETA * (log_ratio[i] - log_ratio[j])) / (n * (n - 1))
    (expected,) = torch.autograd.grad(loss, policy.theta)
    c = training.dpo_coefficients(REWARD[batch], policy.log_ratio(batch), BETA)
    assert (gradient(policy, [(batch, c)]) - expected).abs().max() < 1e-15
    assert expected.abs().max() > 1e-2


def test_weighted_gradient_against_finite_differences():
    batch, w = torch.tensor([[0, 2, 2, 1]]), torch.tensor([[0.5, 0.1, 0.15, 0.25]], dtype=torch.float64)
    policy = policy_at(THETA)
    got = gradient(policy, [(batch, w)])[0].numpy()
    expected = finite_difference(lambda theta: -(w[0].numpy() @ np.log(law_at(theta)[batch[0]])), THETA)
    assert np.abs(got - expected).max() < 1e-9


@pytest.mark.parametrize("row", [training.reinforce_coefficients, training.dpo_coefficients])
def test_rows_refuse(row):
    x = torch.zeros(1, 3)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta"):
            row(x, x, bad)
    with pytest.raises(ValueError, match="N >= 2"):
        row(x[:, :1], x[:, :1], 1.0)
    with pytest.raises(ValueError, match="N >= 2"):
        row(x, x[:, :2], 1.0)
    with pytest.raises(ValueError, match="finite"):
        row(x * math.nan, x, 1.0)
    with pytest.raises(ValueError, match="coefficients"):
        training.surrogate(x, x[0])
    with pytest.raises(ValueError, match="n >= 2"):
        training.on_policy(lambda batch: batch, 1.0, 1)


def test_log_linear_policy_refuses():
    with pytest.raises(ValueError, match="zero"):
        training.LogLinear([0.5, 0.5, 0.0])
    with pytest.raises(ValueError, match="features"):
        training.LogLinear(P, np.ones((3, 2)))
    with pytest.raises(ValueError, match="features"):
        training.LogLinear(P, np.full((4, 1), np.nan))
    with pytest.raises(ValueError, match="runs"):
        training.LogLinear(P, runs=0)


# ------------------------------------------------------------------ the loop


def train(policy, *, row=None, steps=400, rate=0.3, seed=0, **options):
    row = row or training.on_policy(lambda batch: REWARD[batch], BETA, 16)
    return training.train(policy, row, steps=steps, learning_rate=rate, generator=seeded(seed), **options)


def test_reinforce_reaches_the_tilted_law():
    policy = training.LogLinear(P, runs=3)
    history = train(policy, steps=500, rate=2.0, optimizer=torch.optim.SGD)
    target = law.tilt(P, R, BETA)
    assert np.abs(policy.log_law().exp().detach().numpy() - target).max() < 1e-9  # no noise floor
    assert len(history["kl"]) == 500 and abs(history["kl"][-1] - law.kl(target, P)) < 0.1


def test_dpo_reaches_the_tilted_law():
    pool = torch.from_numpy(np.repeat(np.arange(4), [1, 4, 9, 6]))[None]  # holds P exactly
    policy = training.LogLinear(P)
    row = training.preferences(pool, lambda batch: REWARD[batch], BETA)
    train(policy, row=row, steps=3000, rate=20.0, optimizer=torch.optim.SGD)
    assert np.abs(policy.log_law().exp()[0].detach().numpy() - law.tilt(P, R, BETA)).max() < 1e-9


def test_runs_do_not_share_their_fate():
    together = training.LogLinear(P, runs=2)
    train(together, steps=5)
    assert (together.theta[0] - together.theta[1]).abs().max() > 1e-3


def test_steps_do_not_touch_global_randomness():
    before = torch.get_rng_state()
    train(training.LogLinear(P), steps=3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loss_that_is_not_finite_names_its_step():
    def row(policy, chance):
        batch = policy.sample(2, chance)
        return [(batch, torch.full(batch.shape, math.nan, dtype=torch.float64))], {}

    with pytest.raises(FloatingPointError, match="step 0"):
        train(training.LogLinear(P), row=row)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_comes_with_advice(error):
    def row(policy, chance):
        raise error

    with pytest.raises(MemoryError, match="micro_batch"):
        train(training.LogLinear(P), row=row)


def test_other_errors_pass_unchanged():
    def row(policy, chance):
        raise RuntimeError("a bug in the reward")

    with pytest.raises(RuntimeError, match="a bug in the reward"):
        train(training.LogLinear(P), row=row)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"rate": 0.0}, "learning_rate"),
        ({"rate": math.nan}, "learning_rate"),
        ({"every": 0}, "every"),
    ],
)
def test_train_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        train(training.LogLinear(P), **options)
    with pytest.raises(TypeError, match="Generator"):
        training.train(training.LogLinear(P), None, steps=1, learning_rate=1.0, generator=None)


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path, optimizer):
    whole, broken, resumed = (training.LogLinear(P, runs=2) for _ in range(3))
    options = {"rate": 0.1, "optimizer": optimizer, "every": 4}
    history = train(whole, steps=23, **options)
    train(broken, steps=11, checkpoint=tmp_path / "c.safetensors", **options)
    # another seed: what counts is the generator's state in the checkpoint
    continued = train(resumed, steps=23, checkpoint=tmp_path / "c.safetensors", seed=99, **options)
    assert torch.equal(whole.theta, resumed.theta) and history == continued
    again = training.LogLinear(P, runs=2)
    assert train(again, steps=23, checkpoint=tmp_path / "c.safetensors", **options) == history
    assert torch.equal(again.theta, whole.theta)
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    train(training.LogLinear(P), steps=4, checkpoint=path)
    with pytest.raises(ValueError, match=r"learning_rate is 0\.3 there and 0\.2 here"):
        train(training.LogLinear(P), steps=4, rate=0.2, checkpoint=path)
    with pytest.raises(ValueError, match="policy is"):
        train(training.LogLinear(P[::-1].copy()), steps=4, checkpoint=path)
    with pytest.raises(ValueError, match="runs is 1 there and 2 here"):
        train(training.LogLinear(P, runs=2), steps=4, checkpoint=path)
    with pytest.raises(ValueError, match="optimizer is 'Adam' there"):
        train(training.LogLinear(P), steps=4, optimizer=torch.optim.SGD, checkpoint=path)
    with pytest.raises(ValueError, match="beta"):
        train(training.LogLinear(P), steps=4, settings={"beta": 1.0}, checkpoint=path)
    with pytest.raises(ValueError, match="already has 4 steps"):
        train(training.LogLinear(P), steps=3, checkpoint=path)


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    train(training.LogLinear(P), steps=4, checkpoint=path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        train(training.LogLinear(P), steps=4, checkpoint=path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a checkpoint"):
        train(training.LogLinear(P), steps=4, checkpoint=path)


def test_a_checkpoint_is_written_every_few_steps_only(tmp_path):
    path, seen = tmp_path / "c.safetensors", []

    def row(policy, chance):
        seen.append(load_file(path)["history/loss"].numel() if path.exists() else 0)
        batch = policy.sample(4, chance)
        return [(batch, torch.full(batch.shape, 0.25, dtype=torch.float64))], {}

    train(training.LogLinear(P), row=row, steps=7, every=3, checkpoint=path)
    assert seen == [0, 0, 0, 3, 3, 3, 6] and load_file(path)["history/loss"].numel() == 7


def test_digest_tells_models_apart():
    a = torch.arange(10000.0)
    b = a.clone()
    b[4] += 1
    assert training.digest(a) == training.digest(a.clone()) != training.digest(b)
    assert training.digest(a) != training.digest(a.reshape(100, 100)) != training.digest(a.double())
    assert training.digest(a.bfloat16()) != training.digest(a)


def test_sampling_follows_the_law():
    policy = policy_at(THETA, runs=2)
    drawn = policy.sample(20000, Chance(seeded(5)))
    frequency = torch.stack([(drawn == k).double().mean(1) for k in range(4)], 1).numpy()
    pi = law_at(THETA)
    assert (np.abs(frequency - pi) < 4 * np.sqrt(pi * (1 - pi) / 20000)).all()
