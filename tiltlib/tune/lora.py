"""LoRA tuning of a causal language model by the rows of `tiltlib.tune.training`: a small trainable matrix beside each
large frozen one (Hu et al. 2022), through peft.

The tuned model shares the frozen weights with the world it came from, which stays the reference: no second copy, and
KL to the reference can be measured at any time.
"""

import copy
import hashlib
import json
import warnings
from typing import NamedTuple

import numpy as np
import torch

from tiltlib import law
from tiltlib.tune import training
from tiltlib.tune.weighted import check_weights
from tiltlib.worlds.language_model import LanguageModel, Samples


class Tuned(NamedTuple):
    """What `fit` and `reinforce` return."""

    world: LanguageModel  # the tuned model; `world.network.save_pretrained(folder)` writes the adapter as peft does
    history: dict  # of lists of `steps` floats: loss, and for REINFORCE + KL mean reward and KL to the reference


class Batch(NamedTuple):
    """n outcomes for each of b prompts, with their log-probabilities under the sampler and under the reference."""

    prompts: list  # b strings
    tokens: torch.Tensor  # (b, n, T)
    lengths: torch.Tensor  # (b, n)
    texts: list | None = None  # b lists of n strings
    log_ratio: torch.Tensor | None = None  # (b, n)


class Adapter:
    """The policy of `training.train`: a world with LoRA matrices of rank `rank` beside all its linear layers.

    world: the reference, left as it is (its weights are shared and frozen). queries: prompts in a step.
    micro_batch: sequences in one backward pass; less needs less memory and changes results by rounding only.
    """

    def __init__(self, world, prompts, *, rank, queries, max_new_tokens, micro_batch, generator):
        from peft import LoraConfig, get_peft_model

        self.world, self.prompts, self.rank = world, list(prompts), law.check_count(rank, "rank")
        self.queries = law.check_count(queries, "queries")
        self.max_new_tokens = law.check_count(max_new_tokens, "max_new_tokens")
        self.micro_batch = law.check_count(micro_batch, "micro_batch")
        if not self.prompts:
            raise ValueError("prompts is empty")
        if self.queries > len(self.prompts):
            raise ValueError(f"queries = {self.queries} in a step, but there are {len(self.prompts)} prompts")
        base = world.network
        if any("lora_" in name for name, _ in base.named_parameters()):
            raise ValueError("the world's network has LoRA matrices already: merge or unload them first")
        self._identity = {"base": training.digest(*base.state_dict().values()), "rank": self.rank}
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
        devices = [world.device] if world.device.type == "cuda" else []
        # peft draws from the global generator (its draws are replaced below) and asks for a property that is to go
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            self.tuned = LanguageModel(get_peft_model(copy.deepcopy(base, shared), config), world.tokenizer)
        named = self.tuned.network.named_parameters()
        self._parameters = {name: value for name, value in named if value.requires_grad}
        for name, value in self._parameters.items():
            if "lora_A" in name:  # uniform as peft has it; lora_B starts at zero, so the policy starts at the reference
                torch.nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)

    def parameters(self):
        return self._parameters

    def identity(self):
        return self._identity

    def choose(self, chance):
        """Positions of this step's prompts: `queries` of them, none twice, all alike."""
        return chance.uniforms((len(self.prompts),)).argsort()[: self.queries].tolist()

    def sample(self, n, chance):
        prompts = [self.prompts[k] for k in self.choose(chance)]
        drawn = self.tuned.sample(prompts, n, max_new_tokens=self.max_new_tokens, generator=chance.generator)
        log_ratio = drawn.log_prob - self.world.log_prob(prompts, drawn.tokens, drawn.lengths)
        return Batch(prompts, drawn.tokens, drawn.lengths, drawn.texts, log_ratio)

    def log_ratio(self, batch):
        return batch.log_ratio

    def log_prob(self, batch):
        return self.tuned.log_prob(batch.prompts, batch.tokens, batch.lengths, gradient=True)

    def split(self, batch, coefficients):
        """Parts of at most `micro_batch` sequences, prompts kept together where they fit."""
        n = coefficients.shape[1]
        across, along = max(1, self.micro_batch // n), min(n, self.micro_batch)
        parts = []
        for k in range(0, len(batch.prompts), across):
            for j in range(0, n, along):
                rows, here = slice(k, k + across), (slice(k, k + across), slice(j, j + along))
                part = Batch(batch.prompts[rows], batch.tokens[here], batch.lengths[here])
                parts.append((part, coefficients[here]))
        return parts


def fit(
    world, prompts, pool, weights, *, rank, steps, learning_rate, generator, queries=4, samples=None, micro_batch=16,
    checkpoint=None, every=10,
):  # fmt: skip
    """Weighted maximum likelihood of a pool by LoRA: equations (19) and (21) of Jiao, Chen and Li 2025.

    world: a `LanguageModel`, the reference; prompts: B strings; pool: its `Samples` (B, n), drawn from the world.
    weights: `Weights` or (B, n), each row summing to one; None weighs all alike, which is supervised fine-tuning.
    rank, steps, learning_rate: of LoRA (alpha is 2 rank) and Adam. generator: a torch.Generator on the world's device.
    queries: prompts in a step; samples: outcomes drawn for each in proportion to its weights (systematically, so no
    gradient is spent on weights near zero), or None for all n with their weights. checkpoint, every, errors: as in
    `training.train`. Raises ValueError before any work for an empty pool or what does not fit together.
    """
    if not isinstance(pool, Samples) or pool.tokens.numel() == 0:
        raise ValueError("the pool is empty, or not Samples as world.sample returns them")
    shape = tuple(pool.lengths.shape)
    values = check_weights(np.full(shape, 1 / shape[1]) if weights is None else weights)
    if values.shape != shape or len(prompts) != shape[0]:
        raise ValueError(f"{len(prompts)} prompts, a pool of {shape} outcomes and weights {values.shape} do not fit")
    values = torch.tensor(values, device=world.device)
    samples = None if samples is None else law.check_count(samples, "samples")
    policy = Adapter(
        world, prompts, rank=rank, queries=queries, max_new_tokens=pool.tokens.shape[-1], micro_batch=micro_batch,
        generator=generator,
    )  # fmt: skip

    def draw(policy, chance):
        rows = policy.choose(chance)
        tokens, lengths, share = pool.tokens[rows], pool.lengths[rows], values[rows]
        if samples is not None:
            kept = chance.ancestors(share.log(), samples)
            tokens, lengths = (
                tokens[torch.arange(len(rows), device=kept.device)[:, None], kept],
                lengths.gather(-1, kept),
            )
            share = torch.full(kept.shape, 1 / samples, dtype=share.dtype, device=share.device)
        batch = Batch([policy.prompts[k] for k in rows], tokens, lengths)
        return policy.split(batch, share / len(rows)), {}

    settings = {"row": "likelihood", "samples": samples, "pool": training.digest(pool.tokens, pool.lengths, values)}
    return _train(policy, draw, settings, steps, learning_rate, generator, checkpoint, every)


def reinforce(
    world, prompts, reward, beta, *, rank, steps, learning_rate, generator, max_new_tokens, queries=4, samples=4,
    micro_batch=16, checkpoint=None, every=10,
):  # fmt: skip
    """REINFORCE + KL by LoRA, on outcomes of the model as it is at each step: maximises (5) of Jiao, Chen and Li 2025.

    reward: a `Reward`, or any function from a list of texts to as many numbers. beta: temperature, in units of the
    reward. samples: outcomes per prompt and step, at least 2 (leave-one-out baseline). The rest as in `fit`; the
    history holds mean reward and a Monte Carlo estimate of KL(pi || ref) in nats per response.
    """
    policy = Adapter(
        world, prompts, rank=rank, queries=queries, max_new_tokens=max_new_tokens, micro_batch=micro_batch,
        generator=generator,
    )  # fmt: skip

    def of_batch(batch):
        values = reward([text for row in batch.texts for text in row])
        like = batch.log_ratio
        return torch.as_tensor(np.asarray(values, dtype=float), dtype=like.dtype, device=like.device).view(like.shape)

    row = training.on_policy(of_batch, beta, samples)

    def draw(policy, chance):
        parts, notes = row(policy, chance)
        return [(batch, coefficients / queries) for batch, coefficients in parts], notes

    settings = {
        "row": "reinforce", "beta": float(beta), "samples": samples, "max_new_tokens": max_new_tokens,
        "reward": getattr(reward, "name", None) or getattr(reward, "__name__", "reward"),
    }  # fmt: skip
    return _train(policy, draw, settings, steps, learning_rate, generator, checkpoint, every)


def _train(policy, draw, settings, steps, learning_rate, generator, checkpoint, every):
    """What every row ends in; a checkpoint fits the same settings, prompts and queries only."""
    prompts = hashlib.sha256(json.dumps(policy.prompts).encode()).hexdigest()[:16]
    history = training.train(
        policy, draw, steps=steps, learning_rate=learning_rate, generator=generator, checkpoint=checkpoint,
        every=every, settings=settings | {"queries": policy.queries, "prompts": prompts},
    )  # fmt: skip
    return Tuned(policy.tuned, history)
