"""Rewards: values, ranges, gradients, counted calls, and errors that name the sample."""

import numpy as np
import pytest
import torch

from tiltlib import rewards
from tiltlib.rewards import Reward


def test_sentiment_orders_texts_and_has_an_atom_at_zero():
    reward = rewards.sentiment()
    values = reward(["What a wonderful, happy day!", "The table has four legs.", "I hate this awful, sad place."])
    assert values[0] > 0.5 and values[1] == 0 and values[2] < -0.5
    assert values.dtype == np.float64 and reward.calls == 3
    assert (reward.low, reward.high, reward.differentiable) == (-1, 1, False)


@pytest.mark.parametrize(("text", "value"), [("", 0), ("one two", 2 / 4), ("a b c d", 1), ("a b c d e f g h", 4 / 8)])
def test_closeness_to_length(text, value):
    assert rewards.closeness_to_length(4)([text])[0] == value


def test_named():
    assert rewards.named("sentiment").name == "sentiment"
    assert rewards.named("closeness_to_length(7)")(["a b c d e f g"]) == [1]
    assert rewards.named(rewards.closeness_to_length(7).name).name == "closeness_to_length(7)"
    for name in ("kindness", "closeness_to_length", "closeness_to_length(-1)"):
        with pytest.raises(ValueError, match="no reward"):
            rewards.named(name)
    for words in (0, 2.5):
        with pytest.raises(ValueError, match="at least 1"):
            rewards.closeness_to_length(words)


def test_a_black_box_has_no_gradient():
    with pytest.raises(TypeError, match="sentiment is a black box"):
        rewards.sentiment().gradient(["good"])


def test_gradient_against_finite_differences():
    reward = Reward("quartic", lambda x: (x**4).sum((-1, -2)) - x[:, 0, 1], "points", differentiable=True)
    x = torch.randn(3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, slope = reward.gradient(x)
    step = torch.zeros_like(x)
    step[:, 0, 1] = 1e-6
    torch.testing.assert_close(slope[:, 0, 1], (reward(x + step) - reward(x - step)) / 2e-6, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(values, reward(x))
    assert isinstance(values, torch.Tensor) and not values.requires_grad and not x.requires_grad
    assert (reward.calls, reward.gradient_calls) == (9, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.5, -2.0])
def test_a_bad_value_names_its_sample(bad):
    reward = Reward("broken", lambda texts: [0.0, 0.0, bad, 0.0][: len(texts)], "points", -1.0, 1.0)
    assert list(reward(["a", "b"])) == [0, 0]
    with pytest.raises(ValueError, match=r"broken is .* at sample 2.*'third'"):
        reward(["a", "b", "third", "d"])
    with pytest.raises(ValueError, match="at sample 2"):
        Reward("broken", lambda x: torch.tensor([0, 0, bad]), "points", -1.0, 1.0)(torch.zeros(3, 2))


def test_one_number_for_each_sample():
    with pytest.raises(ValueError, match=r"2 samples, but values of shape \(2, 1\)"):
        Reward("wide", lambda texts: np.zeros((2, 1)), "points")(["a", "b"])
    with pytest.raises(ValueError, match="3 samples"):
        Reward("short", lambda texts: [0.0], "points")(["a", "b", "c"])
    with pytest.raises(TypeError, match="wrap one text"):
        rewards.sentiment()("good")
