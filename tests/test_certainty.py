"""worlds/certainty.py on a tiny random Llama: against plain passes, and the power of the law by enumeration."""

import math

import pytest
import torch

from tests.tiny_language import tiny_language
from tiltlib.worlds.certainty import certainty

PROMPTS = ["a b c", "d"]


@pytest.fixture(scope="module")
def world():
    return tiny_language(dtype=torch.float64)


@pytest.fixture(scope="module")
def outcomes(world):
    return world.sample(PROMPTS, 5, max_new_tokens=4, generator=torch.Generator().manual_seed(1))


def everything(world):
    """All outcomes of one prompt cut at two tokens: the end, and every other word with what follows."""
    words = range(world.network.config.vocab_size)
    pairs = [(0, -1)] + [(a, b) for a in words if a for b in words]
    tokens = torch.tensor(pairs)[None]
    return tokens, (tokens >= 0).sum(-1)


@pytest.mark.parametrize("chunk", [None, 3])
def test_each_outcome_against_one_plain_pass(world, outcomes, chunk):
    found = certainty(world, PROMPTS, outcomes.tokens, outcomes.lengths, exponent=1.7, chunk=chunk)
    for i, ids in enumerate(world.encode(PROMPTS)):
        for j, length in enumerate(outcomes.lengths[i].tolist()):
            emitted = outcomes.tokens[i, j, :length]
            with torch.no_grad():
                logits = world.network(torch.cat([torch.tensor(ids), emitted])[None]).logits[0, len(ids) - 1 : -1]
            p = logits.softmax(-1)
            uniform = torch.full_like(p, 1 / p.shape[-1])
            expected = (
                p.gather(-1, emitted[:, None]).log().sum(),
                (p * (p / uniform).log()).sum(-1).mean(),
                (uniform * (uniform / p).log()).sum(-1).mean(),
                (p**1.7).sum(-1).log().sum(),
            )
            for name, got, wanted in zip(found._fields, found, expected, strict=True):
                assert abs(got[i, j] - wanted) < 1e-6, name  # Llama normalises in float32


def test_the_two_directions_differ_and_lie_in_their_ranges(world, outcomes):
    found = certainty(world, PROMPTS, outcomes.tokens, outcomes.lengths)
    assert (found.to_uniform >= 0).all() and (found.to_uniform <= math.log(16)).all()
    assert (found.to_uniform - found.from_uniform).abs().max() > 1e-3
    assert found.log_normaliser.abs().max() < 1e-9  # at exponent one every token law sums to one


@pytest.mark.parametrize("exponent", [0.6, 1.5, 3.0])
def test_the_normalisers_turn_the_temperature_into_the_power(world, exponent):
    tokens, lengths = everything(world)
    found = certainty(world, PROMPTS[:1], tokens, lengths, exponent=exponent)
    log_p, log_z = found.log_prob[0], found.log_normaliser[0]
    assert abs(log_p.exp().sum() - 1) < 1e-6
    cold = (exponent * log_p - log_z).exp()  # the law at token temperature 1/exponent
    assert abs(cold.sum() - 1) < 1e-6
    power = (exponent * log_p).exp()
    assert abs((cold * log_z.exp()).sum() - power.sum()) < 1e-6
    assert (cold - power / power.sum()).abs().sum() > 1e-3  # a temperature is not a power


def test_bad_input(world, outcomes):
    with pytest.raises(ValueError, match="exponent"):
        certainty(world, PROMPTS, outcomes.tokens, outcomes.lengths, exponent=0)
    with pytest.raises(ValueError, match="chunk"):
        certainty(world, PROMPTS, outcomes.tokens, outcomes.lengths, chunk=0)
    with pytest.raises(ValueError, match="lengths"):
        certainty(world, PROMPTS, outcomes.tokens, outcomes.lengths * 0)
