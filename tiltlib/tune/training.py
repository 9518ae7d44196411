"""One loop for every policy that is tuned on its own log-probabilities, and the rows that differ only in two things.

Each step draws a batch and gives each of its N samples a coefficient c; the loss is -sum c log pi(o), the coefficients
held fixed. A row is who draws and what c is:

    row                  drawn from     c                                                         after training
    weighted likelihood  a fixed pool   1/N, drawn in proportion to the weights W                 the tilted law
    supervised           a fixed pool   1/N, every sample alike                                   the reference
    REINFORCE + KL       the policy     (R - mean of the other R) / N, R = r/beta - log pi/ref    the tilted law
    DPO                  a fixed pool   pairwise, see `dpo_coefficients`                          the tilted law

The first two are Jiao, Chen and Li 2025, equations (19)-(22) and their untilted control. A checkpoint holds parameters,
optimiser, generator and history, so a run that was killed ends as if it had not been.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from tiltlib import law
from tiltlib.chance import Chance
from tiltlib.files import write_atomically

# ---- coefficients -------------------------------------------------------------------------------------------------


def reinforce_coefficients(reward, log_ratio, beta):
    """c (..., N) for samples of the policy itself: an unbiased gradient of E[r]/beta - KL(pi || ref), equation (5).

    reward, log_ratio: (..., N), N >= 2; log_ratio is log pi(o) - log ref(o). Each return r/beta - log_ratio has the
    mean of the others subtracted (Kool, van Hoof and Welling 2019). At the tilted law all returns are equal, so
    there the gradient has no noise at all. Raises ValueError for N < 2, mismatched shapes or what is not finite.
    """
    beta = law.check_beta(beta)
    returns = _paired(reward, log_ratio, "reward", "log_ratio") / beta - log_ratio.detach()
    return (returns - returns.mean(-1, keepdim=True)) / (returns.shape[-1] - 1)


def dpo_coefficients(reward, log_ratio, beta):
    """c (..., N) whose loss has the gradient of DPO over all pairs of a row (Rafailov et al. 2023, equation (7)).

    reward, log_ratio: (..., N), N >= 2. A pair's label is the Bradley-Terry probability sigmoid(r_i - r_j), not a coin
    toss; pairs count alike. c_i = beta / (N (N - 1)) sum_j [sigmoid(r_i - r_j) - sigmoid(beta (l_i - l_j))].
    """
    beta = law.check_beta(beta)
    reward = _paired(reward, log_ratio, "reward", "log_ratio")
    preferred = torch.sigmoid(reward.unsqueeze(-1) - reward.unsqueeze(-2))
    believed = torch.sigmoid(beta * (log_ratio.unsqueeze(-1) - log_ratio.unsqueeze(-2)).detach())
    n = reward.shape[-1]
    return beta * (preferred - believed).sum(-1) / (n * (n - 1))


def surrogate(coefficients, log_prob):
    """-sum c log pi(o), the one loss; coefficients (..., N) are held fixed, log_prob (..., N) carries the gradient."""
    if coefficients.shape != log_prob.shape:
        raise ValueError(f"{tuple(coefficients.shape)} coefficients for {tuple(log_prob.shape)} samples")
    return -(coefficients.detach() * log_prob).sum()


def _paired(x, y, x_name, y_name):
    if x.shape != y.shape or x.ndim == 0 or x.shape[-1] < 2:
        raise ValueError(f"{x_name} {tuple(x.shape)} and {y_name} {tuple(y.shape)} must be (..., N) with N >= 2")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError(f"{x_name} and {y_name} must be finite")
    return x.detach()


# ---- the smallest policy ------------------------------------------------------------------------------------------


class LogLinear:
    """pi proportional to ref * exp(features @ theta) on K outcomes: `runs` independent copies, starting at ref.

    ref: law (K,) without zeros; features: (K, d), by default the identity, which makes every law reachable (tabular).
    Its batches are outcomes (runs, n), integers.
    """

    def __init__(self, ref, features=None, runs=1):
        ref = law.check_law(ref, "ref")
        if not ref.all():
            raise ValueError("ref has an outcome of probability zero, which no parameter can change: leave it out")
        self.log_ref = torch.from_numpy(ref).log()
        self.features = torch.eye(len(ref), dtype=torch.float64) if features is None else _features(features, ref)
        self.theta = torch.zeros(law.check_count(runs, "runs"), self.features.shape[1], dtype=torch.float64)
        self.theta.requires_grad_()

    def parameters(self):
        return {"theta": self.theta}

    def identity(self):
        return {"policy": digest(self.log_ref, self.features), "runs": len(self.theta)}

    def log_law(self):
        """log pi, (runs, K)."""
        return torch.log_softmax(self.log_ref + self.theta @ self.features.T, -1)

    def sample(self, n, chance):
        with torch.no_grad():
            log_law = self.log_law()
            return chance.categoricals(log_law[:, None, :].expand(-1, n, -1))

    def log_prob(self, outcomes):
        return self.log_law().gather(-1, outcomes)

    def log_ratio(self, outcomes):
        return self.log_prob(outcomes) - self.log_ref[outcomes]

    def split(self, outcomes, coefficients):
        return [(outcomes, coefficients)]


def _features(features, ref):
    features = torch.as_tensor(features, dtype=torch.float64)
    if features.ndim != 2 or len(features) != len(ref) or features.shape[1] == 0 or not features.isfinite().all():
        raise ValueError(f"features must be finite and (K, d) with K = {len(ref)}, not {tuple(features.shape)}")
    return features


# ---- who draws ----------------------------------------------------------------------------------------------------
# draw(policy, chance) -> (parts, notes): parts are (batch, coefficients) pairs whose losses add up, notes go to history


def on_policy(reward, beta, n):
    """The REINFORCE + KL row: n samples a step (per run or prompt) from the policy; reward maps a batch to (..., n)."""
    beta, n = law.check_beta(beta), law.check_count(n)
    if n < 2:
        raise ValueError("the leave-one-out baseline needs n >= 2 samples")

    def draw(policy, chance):
        with torch.no_grad():
            batch = policy.sample(n, chance)
            r, log_ratio = reward(batch), policy.log_ratio(batch)
            notes = {"reward": r.mean(), "kl": log_ratio.mean()}
            return policy.split(batch, reinforce_coefficients(r, log_ratio, beta)), notes

    return draw


def preferences(pool, reward, beta):
    """The DPO row on all pairs of a fixed pool (..., N) of outcomes; reward maps it to (..., N)."""
    beta = law.check_beta(beta)

    def draw(policy, chance):
        with torch.no_grad():
            r, log_ratio = reward(pool), policy.log_ratio(pool)
            return policy.split(pool, dpo_coefficients(r, log_ratio, beta)), {"reward": r.mean()}

    return draw


# ---- the loop -----------------------------------------------------------------------------------------------------


def train(policy, draw, *, steps, learning_rate, generator, optimizer=None, checkpoint=None, every=10, settings=None):
    """Take `steps` steps on the policy's parameters, in place; returns the history, a dict of lists of `steps` floats.

    policy: `parameters() -> {name: tensor}`, `identity() -> dict` that JSON can hold, `log_prob(batch)` with gradient.
    draw: as made by `on_policy` and its kin. optimizer: a torch optimiser class, Adam by default. learning_rate: > 0.
    generator: torch.Generator, the only randomness. checkpoint: a file, written atomically every `every` steps and at
    the end; if it is there the run goes on from it, on the same machine to the same result bit for bit. settings:
    whatever else the result depends on (JSON-able). A checkpoint of another model or of other settings is refused
    with a ValueError that names the difference; more steps than it has are allowed. A progress bar is drawn on stderr
    in a terminal only. FloatingPointError: loss not finite, names the step. MemoryError: out of memory, with advice.
    """
    steps, every = law.check_count(steps, "steps"), law.check_count(every, "every")
    learning_rate = law.check_beta(learning_rate, "learning_rate")
    chance, parameters = Chance(generator), policy.parameters()
    optimizer = (optimizer or torch.optim.Adam)(parameters.values(), lr=learning_rate)
    rule = type(optimizer).__name__
    about = {"optimizer": rule, "learning_rate": learning_rate} | (settings or {}) | policy.identity()
    about = json.loads(json.dumps(about))
    done, history = 0, {}
    if checkpoint is not None and Path(checkpoint).exists():
        done, history = _load(Path(checkpoint), about, steps, parameters, optimizer, generator)
    bar = tqdm(range(done, steps), initial=done, total=steps, unit="step", disable=None, file=sys.stderr)
    for step in bar:
        optimizer.zero_grad(set_to_none=True)
        loss, notes = _gradient(policy, draw, chance)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}: lower the learning rate, look at the rewards")
        optimizer.step()
        for name, value in {"loss": loss, **notes}.items():
            history.setdefault(name, []).append(float(value))
        if not bar.disable:
            bar.set_postfix({name: f"{values[-1]:.3g}" for name, values in history.items()}, refresh=False)
        if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == steps):
            _save(Path(checkpoint), about, step + 1, history, parameters, optimizer, generator)
    return history


def _gradient(policy, draw, chance):
    try:
        parts, notes = draw(policy, chance)
        total = 0.0
        for batch, coefficients in parts:
            loss = surrogate(coefficients, policy.log_prob(batch))
            loss.backward()
            total += loss.item()
        return total, notes
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            if "allocate memory" not in str(error):  # how torch says it on a CPU
                raise
        raise MemoryError(
            "out of memory in a training step. In this order: a smaller micro_batch (same result, slower), fewer "
            "max_new_tokens, dtype bfloat16, a smaller batch or rank (another result). What torch said: "
            + str(error).split("\n")[0]
        ) from error


# ---- checkpoints --------------------------------------------------------------------------------------------------


def digest(*tensors) -> str:
    """A fingerprint of tensors: shapes, types and up to 4096 evenly spread entries of each."""
    total = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 4096)].cpu().contiguous()
        total.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        total.update(some.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def _save(path, about, step, history, parameters, optimizer, generator):
    tensors = {f"parameter/{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        for key, state in optimizer.state.get(value, {}).items():
            if state is not None:  # SGD without momentum keeps a None
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(state)
    tensors |= {f"history/{name}": torch.tensor(values, dtype=torch.float64) for name, values in history.items()}
    tensors["generator"] = generator.get_state()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    # one entry: safetensors writes several in an order that changes from process to process
    write_atomically(path, save(tensors, metadata={"run": json.dumps({"about": about, "step": step})}))


def _load(path, about, steps, parameters, optimizer, generator):
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        run = json.loads(metadata["run"])
        there, step = run["about"], run["step"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of this loop, or it is damaged; remove it ({error})") from None
    for name in {**there, **about}:
        if there.get(name) != about.get(name):
            raise ValueError(
                f"{path} belongs to another run: {name} is {there.get(name)!r} there and {about.get(name)!r} here; "
                "give another file, or remove it"
            )
    if step > steps:
        raise ValueError(f"{path} already has {step} steps, more than the {steps} asked for; give another file")
    for name, value in parameters.items():
        with torch.no_grad():
            value.copy_(tensors[f"parameter/{name}"])
        state = {}
        for key in (name_.split("/", 2) for name_ in tensors if name_.startswith("optimizer/")):
            if key[2] == name:
                kept = tensors["/".join(key)]
                state[key[1]] = kept if kept.ndim == 0 else kept.to(value.device)
        if state:
            optimizer.state[value] = state
    generator.set_state(tensors["generator"])
    history = {name.split("/", 1)[1]: values.tolist() for name, values in tensors.items() if name.startswith("history")}
    return step, history
