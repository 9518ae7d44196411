"""tune/lora.py on a tiny random Llama: the gradient by finite differences, the base left alone, what a fit moves."""

import numpy as np
import pytest
import torch

from tests.tiny_language import tiny_language
from tiltlib.chance import Chance
from tiltlib.rewards import Reward
from tiltlib.tune import lora, training, weighted

PROMPTS = ["a b c", "d e"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def world():
    return tiny_language()


@pytest.fixture
def pool(world):
    return world.sample(PROMPTS, 6, max_new_tokens=5, generator=seeded(1))


def count(texts):
    """How many a and b a text has."""
    return [sum(word in "ab" for word in text.split()) for text in texts]


letters = Reward("letters", count, "letters", 0, 5)


WEIGHTS = weighted.normalise(np.linspace(-1, 2, 12).reshape(2, 6), floor=0)
OPTIONS = {"rank": 2, "steps": 2, "learning_rate": 0.01, "queries": 2}


def adapter(world, **options):
    options = {"rank": 2, "queries": 2, "max_new_tokens": 5, "micro_batch": 16, "generator": seeded(2)} | options
    return lora.Adapter(world, PROMPTS, **options)


def test_the_policy_starts_at_the_reference_and_leaves_it_alone(world, pool):
    before = {name: value.clone() for name, value in world.network.state_dict().items()}
    scores = world.log_prob(PROMPTS, pool.tokens, pool.lengths)
    policy = adapter(world)
    assert torch.equal(policy.tuned.log_prob(PROMPTS, pool.tokens, pool.lengths), scores)
    tuned = lora.fit(world, PROMPTS, pool, WEIGHTS, generator=seeded(), **OPTIONS | {"steps": 5})
    after = world.network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(world.log_prob(PROMPTS, pool.tokens, pool.lengths), scores)
    assert (tuned.world.log_prob(PROMPTS, pool.tokens, pool.lengths) - scores).abs().max() > 1e-3
    # one copy of the frozen weights: the tuned network holds the very same memory
    shared = {value.data_ptr() for value in world.network.parameters()}
    frozen = [value for name, value in tuned.world.network.named_parameters() if "lora_" not in name]
    assert all(value.data_ptr() in shared for value in frozen)


def test_gradient_against_one_plain_pass_and_finite_differences(pool):
    world = tiny_language(dtype=torch.float64)
    policy = adapter(world)
    parameters = list(policy.parameters().values())
    for value in parameters:  # away from the start, where half of the gradient is zero
        value.data = value.data.double()  # peft keeps its matrices in float32
        value.data += 0.05 * torch.randn(value.shape, dtype=value.dtype, generator=seeded(3))
    c = torch.tensor(WEIGHTS.values) / 2

    def loss():
        return training.surrogate(c, policy.log_prob(lora.Batch(PROMPTS, pool.tokens, pool.lengths)))

    got = torch.autograd.grad(loss(), parameters)
    plain = 0.0  # each response by itself, no cache, no padding
    for i, ids in enumerate(world.encode(PROMPTS)):
        for j, length in enumerate(pool.lengths[i]):
            emitted = pool.tokens[i, j, :length]
            logits = policy.tuned.network(torch.cat([torch.tensor(ids), emitted])[None]).logits[0, len(ids) - 1 : -1]
            plain -= c[i, j] * logits.log_softmax(-1).gather(-1, emitted[:, None]).sum()
    expected = torch.autograd.grad(plain, parameters)
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(got, expected, strict=True))
    assert min(b.abs().max() for b in expected) > 1e-3
    # all parameters along one direction; Llama normalises in float32, so no step may be small
    h, ends = 3e-3, []
    for step in (h, -2 * h):
        for value, direction in zip(parameters, expected, strict=True):
            value.data += step * direction
        ends.append(loss().item())
    slope = sum((b * b).sum() for b in expected).item()
    assert abs((ends[0] - ends[1]) / (2 * h) / slope - 1) < 1e-2


@pytest.mark.parametrize("micro_batch", [1, 4, 7])
def test_micro_batches_change_rounding_only(world, pool, micro_batch):
    def fit(**options):
        return lora.fit(world, PROMPTS, pool, WEIGHTS, generator=seeded(), **OPTIONS | {"steps": 3}, **options)

    whole, parts = fit(micro_batch=12), fit(micro_batch=micro_batch)
    assert np.allclose(whole.history["loss"], parts.history["loss"], rtol=1e-5)
    # Adam divides by the gradient's size, so entries of the size of the rounding may differ; the laws may not
    scores = [tuned.world.log_prob(PROMPTS, pool.tokens, pool.lengths) for tuned in (whole, parts)]
    assert (scores[0] - scores[1]).abs().max() < 1e-3


def test_a_fit_moves_probability_to_the_weight(world, pool):
    start = world.log_prob(PROMPTS, pool.tokens, pool.lengths)
    chosen = np.eye(6)[[2, 4]]  # all the weight on one response to each prompt
    options = OPTIONS | {"rank": 4, "steps": 60, "learning_rate": 0.03}
    tuned = lora.fit(world, PROMPTS, pool, chosen, generator=seeded(), **options)
    end = tuned.world.log_prob(PROMPTS, pool.tokens, pool.lengths)
    assert (end[0, 2] - start[0, 2]) > 2 and (end[1, 4] - start[1, 4]) > 2
    assert tuned.history["loss"][-1] < tuned.history["loss"][0] - 2


def test_no_weights_means_all_alike(world, pool):
    uniform = lora.fit(world, PROMPTS, pool, np.full((2, 6), 1 / 6), generator=seeded(), **OPTIONS)
    assert lora.fit(world, PROMPTS, pool, None, generator=seeded(), **OPTIONS).history == uniform.history
    weighed = lora.fit(world, PROMPTS, pool, WEIGHTS, generator=seeded(), **OPTIONS)
    assert weighed.history != uniform.history


def test_drawing_by_weight_is_unbiased(world, pool):
    # the draw's expected coefficients on the pool are the weights: count how often each response is drawn
    seen = []

    class Spy(lora.Adapter):
        def split(self, batch, coefficients):
            seen.append((batch, coefficients))
            return []

    original, lora.Adapter = lora.Adapter, Spy
    try:
        lora.fit(
            world, PROMPTS, pool, WEIGHTS, generator=seeded(), samples=2, **OPTIONS | {"steps": 2000, "queries": 1}
        )
    finally:
        lora.Adapter = original
    share = np.zeros((2, 6))
    for batch, c in seen:
        row = PROMPTS.index(batch.prompts[0])
        for tokens, weight in zip(batch.tokens[0], c[0], strict=True):
            share[row, [torch.equal(tokens, other) for other in pool.tokens[row]].index(True)] += weight / len(seen)
    expected = np.zeros((2, 6))  # a text drawn twice into the pool is counted where it stands first
    for row in range(2):
        for k in range(6):
            first = [torch.equal(pool.tokens[row, k], other) for other in pool.tokens[row]].index(True)
            expected[row, first] += WEIGHTS.values[row, k] / 2
    assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / 2000) / 2


def test_reinforce_raises_the_reward(world):
    options = {"rank": 4, "steps": 30, "learning_rate": 0.02, "max_new_tokens": 5, "queries": 2, "samples": 16}
    tuned = lora.reinforce(world, PROMPTS, letters, 0.5, generator=seeded(), **options)

    def mean_reward(world):
        return np.mean([count(row) for row in world.sample(PROMPTS, 400, max_new_tokens=5, generator=seeded(7)).texts])

    assert mean_reward(tuned.world) > mean_reward(world) + 0.2
    assert tuned.history.keys() == {"loss", "reward", "kl"} and letters.calls == 30 * 2 * 16


def test_reinforce_has_the_gradient_of_its_row(world):
    policy = adapter(world)
    batch = policy.sample(5, Chance(seeded(4)))
    assert batch.log_ratio.abs().max() < 1e-5  # before the first step it is the reference
    assert len(batch.texts) == 2 and len(batch.texts[0]) == 5


def test_training_leaves_the_global_generator_alone(world, pool):
    before = torch.get_rng_state()
    first = lora.fit(world, PROMPTS, pool, WEIGHTS, generator=seeded(), **OPTIONS)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert lora.fit(world, PROMPTS, pool, WEIGHTS, generator=seeded(), **OPTIONS).history == first.history


def test_bfloat16(pool):
    world = tiny_language(dtype=torch.bfloat16)
    tuned = lora.fit(world, PROMPTS, pool, WEIGHTS, generator=seeded(), **OPTIONS)
    assert np.isfinite(tuned.history["loss"]).all()
    matrices = [value for name, value in tuned.world.network.named_parameters() if "lora_" in name]
    assert {value.dtype for value in matrices} == {torch.float32}


def test_a_resumed_fit_ends_where_an_unbroken_one_does(world, pool, tmp_path):
    def fit(steps, path, seed=0):
        options = OPTIONS | {"steps": steps, "queries": 1, "samples": 2, "every": 3}
        return lora.fit(world, PROMPTS, pool, WEIGHTS, generator=seeded(seed), checkpoint=tmp_path / path, **options)

    fit(5, "broken")
    resumed, whole = fit(9, "broken", seed=8), fit(9, "whole")
    assert resumed.history == whole.history and (tmp_path / "broken").read_bytes() == (tmp_path / "whole").read_bytes()
    scores = [tuned.world.log_prob(PROMPTS, pool.tokens, pool.lengths) for tuned in (resumed, whole)]
    assert torch.equal(*scores)


def test_a_checkpoint_of_another_model_is_refused(world, pool, tmp_path):
    path = tmp_path / "c.safetensors"
    lora.fit(world, PROMPTS, pool, WEIGHTS, generator=seeded(), checkpoint=path, **OPTIONS)
    other = tiny_language(seed=1)
    with pytest.raises(ValueError, match="belongs to another run: base is"):
        lora.fit(other, PROMPTS, pool, WEIGHTS, generator=seeded(), checkpoint=path, **OPTIONS)
    with pytest.raises(ValueError, match="rank is 2 there and 3 here"):
        lora.fit(world, PROMPTS, pool, WEIGHTS, generator=seeded(), checkpoint=path, **OPTIONS | {"rank": 3})
    with pytest.raises(ValueError, match="pool is"):
        lora.fit(world, PROMPTS, pool, None, generator=seeded(), checkpoint=path, **OPTIONS)


def test_refuses(world, pool):
    def fit(prompts=PROMPTS, pool=pool, weights=WEIGHTS, **options):
        return lora.fit(world, prompts, pool, weights, generator=seeded(), **OPTIONS | options)

    empty = pool._replace(tokens=pool.tokens[:, :0], lengths=pool.lengths[:, :0])
    for options, match in [
        ({"pool": None}, "empty"),
        ({"pool": empty}, "empty"),
        ({"weights": np.ones((2, 6))}, "sum to one"),
        ({"weights": np.full((2, 6), np.nan)}, "finite"),
        ({"weights": np.full((2, 5), 0.2)}, "do not fit"),
        ({"prompts": ["a"]}, "do not fit"),
        ({"rank": 0}, "rank"),
        ({"queries": 3}, "queries = 3"),
        ({"queries": 0}, "queries"),
        ({"samples": 0}, "samples"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"steps": 0}, "steps"),
    ]:
        with pytest.raises(ValueError, match=match):
            fit(**options)
    tuned = fit()
    with pytest.raises(ValueError, match="LoRA matrices already"):
        lora.fit(tuned.world, PROMPTS, pool, WEIGHTS, generator=seeded(), **OPTIONS)
    with pytest.raises(ValueError, match="n >= 2"):
        lora.reinforce(world, PROMPTS, letters, 1.0, generator=seeded(), max_new_tokens=5, samples=1, **OPTIONS)
