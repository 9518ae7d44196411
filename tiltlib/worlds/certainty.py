"""How sure a language model is of its own texts, and what separates a power of its law from a token temperature."""

import math
from typing import NamedTuple

import torch

from tiltlib.law import check_beta, check_count
from tiltlib.worlds.language_model import SCORED


class Certainty(NamedTuple):
    """Of n outcomes for each of B prompts, under the law at temperature one; all (B, n)."""

    log_prob: torch.Tensor  # nats, of the whole outcome
    to_uniform: torch.Tensor  # mean over tokens of KL(p || uniform) = log|V| - entropy, in nats
    from_uniform: torch.Tensor  # mean over tokens of KL(uniform || p), in nats: unbounded
    log_normaliser: torch.Tensor  # sum over tokens of log sum_v p(v)^exponent


@torch.no_grad()
def certainty(world, prompts, tokens, lengths, *, exponent: float = 1.0, chunk: int | None = None) -> Certainty:
    """Self-certainty of outcomes in both directions, and the weights that turn a token temperature into a power.

    world: a `LanguageModel`; tokens (B, n, T), lengths (B, n): as its `sample` returns them.
    `to_uniform` is the variation (7) and `from_uniform` the original metric (6) of Jiao, Chen and Li 2025, along the
    tokens of one outcome: averaged over an outcome of the law, not over all continuations.
    exponent: a > 0. Sampling each token at temperature 1/a draws an outcome with probability
    p(o)^a / exp(log_normaliser(o)), so exp(log_normaliser) is the importance weight towards the power p(o)^a / Z of
    the law of outcomes; its mean over such samples is Z.
    chunk: sequences scored side by side (16). Raises ValueError for a bad exponent and what is no outcome.
    """
    exponent, chunk = check_beta(exponent, "exponent"), SCORED if chunk is None else check_count(chunk, "chunk")
    ids = world.encode(prompts)
    tokens, lengths = world._check_outcomes(tokens, lengths, len(ids))
    n, steps = tokens.shape[1:]
    tokens, lengths = tokens.reshape(-1, steps), lengths.reshape(-1)
    parts = []
    for rows in torch.arange(len(lengths), device=world.device).split(chunk):
        emitted = tokens[rows, : int(lengths[rows].max())]
        log_p = world._score(ids, rows // n, emitted).log_softmax(-1)
        log_v = math.log(log_p.shape[-1])
        each = (
            log_p.gather(-1, emitted.clamp(min=0)[..., None])[..., 0],
            log_v + (log_p.exp() * log_p).sum(-1),
            -log_v - log_p.mean(-1),
            (exponent * log_p).logsumexp(-1),
        )
        parts.append(torch.stack([torch.where(emitted >= 0, value, 0).sum(-1) for value in each]))
    log_prob, to_uniform, from_uniform, log_normaliser = torch.cat(parts, -1)
    result = (log_prob, to_uniform / lengths, from_uniform / lengths, log_normaliser)
    return Certainty(*(value.view(-1, n) for value in result))
