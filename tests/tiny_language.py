"""A language model small enough for tests: random Llama, 16 words, made the same way in every process."""

import torch


def tiny_language(seed=0, dtype=torch.float32):
    """A `LanguageModel` world of a two-layer random Llama; needs no file and no network."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tiltlib.worlds.language_model import LanguageModel

    words = ["<end>", "<unk>", *"abcdefghijklmn"]
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=0, bos_token_id=None, pad_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LlamaForCausalLM(config)
    return LanguageModel(network.to(dtype), tokenizer)
