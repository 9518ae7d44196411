"""Benchmarks as ratios to a plain computation of the same size: `python -m tests.bench [name ...]`.

Absolute times say more about the machine than about the code, so each entry times a subject and its rivals in turns, in
one process, and prints the subject's best time and the ratio to each rival. To add an entry, decorate a function that
returns `(subject, {rival: callable})`; work that is not to be timed belongs in its body.
"""

import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: a ratio of two thread pools means nothing

import numpy as np

from tiltlib import bestofn

ENTRIES = {}


def entry(rounds=15):
    """Register a benchmark under the function's name; its first docstring line is printed."""

    def register(function):
        ENTRIES[function.__name__] = function, rounds
        return function

    return register


def best(calls, rounds=15, seconds=0.02):
    """Best seconds per call of each callable; they take turns, so that a busy machine slows all of them."""
    repeats = []
    for call in calls:
        start = time.perf_counter()
        call()  # also warms caches
        repeats.append(max(1, int(seconds / max(time.perf_counter() - start, 1e-9))))
    times = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, (call, repeat) in enumerate(zip(calls, repeats, strict=True)):
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            times[i] = min(times[i], (time.perf_counter() - start) / repeat)
    return times


def main(names):
    for name in names or ENTRIES:
        if name not in ENTRIES:
            raise SystemExit(f"no benchmark {name!r}; known: {', '.join(ENTRIES)}")
        function, rounds = ENTRIES[name]
        subject, rivals = function()
        first, *others = best([subject, *rivals.values()], rounds)
        print(f"{name}: {function.__doc__.splitlines()[0]}  [{first * 1e3:.3g} ms]")
        for rival, seconds in zip(rivals, others, strict=True):
            print(f"    {first / seconds:8.3g} x {rival}")


def _law(outcomes):
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(outcomes)), rng.normal(size=outcomes)


def _wide_grid(p, r, n):
    """The same integral the plain way: one grid of step 0.05 over every window, exp for phi and again for the rest."""
    w = np.exp(r - r.max())
    u = w / (p @ w)
    y = -40 - np.log(n) + 0.05 * np.arange(int((40 + 2 * np.log(n) + np.log(760 / u.min())) / 0.05))
    t = np.exp(y)[:, None]
    less = np.expm1(-t * u) @ p
    with np.errstate(divide="ignore"):
        power = np.exp((n - 1) * np.log1p(np.maximum(less, -1)))
    return n * p * u * (0.05 * t[:, 0] * power @ np.exp(-t * u))


@entry()
def soft_law():
    """exact law of soft best-of-N, K = 1000, N = 1e6"""
    p, r = _law(1000)
    n = 10**6
    assert np.abs(_wide_grid(p, r, n) - bestofn.soft_law(p, r, 1.0, n)).max() < 1e-13
    left, nodes = np.random.default_rng(1).random((72, 1000)), np.random.default_rng(2).random(72)
    return lambda: bestofn.soft_law(p, r, 1.0, n), {
        "its matrix products alone, (72, 1000) @ (1000,) and (72,) @ (72, 1000)": lambda: (left @ p, nodes @ left),
        "one expm1 for each of 72 nodes and 1000 outcomes": lambda: np.expm1(-left),
        "quadrature on a wide fine grid": lambda: _wide_grid(p, r, n),
    }


@entry()
def soft_law_large():
    """exact law of soft best-of-N, K = 1e5, N = 1e6"""
    p, r = _law(100_000)
    values = np.random.default_rng(1).random((72, 100_000))
    return lambda: bestofn.soft_law(p, r, 1.0, 10**6), {
        "one expm1 for each of 72 nodes and 1e5 outcomes": lambda: np.expm1(-values)
    }


@entry()
def soft_law_extreme():
    """exact law of soft best-of-N, K = 1000, N = 1000, rewards over 1e4 at beta = 1e-3"""
    p, r = _law(1000)
    r = np.random.default_rng(1).uniform(0, 1e4, 1000)
    return lambda: bestofn.soft_law(p, r, 1e-3, 1000), {
        "the same law at beta = 1e3 (one window)": lambda: bestofn.soft_law(p, r, 1e3, 1000)
    }


@entry()
def iterated_kernel():
    """kernel of iterated best-of-N, K = 300, N = 1000"""
    p, r = _law(300)
    left, right = np.random.default_rng(1).random((300, 72)), np.random.default_rng(2).random((72, 300))
    return lambda: bestofn.iterated_kernel(p, r, 1.0, 1000), {
        "one matrix product of the same size, (300, 72) @ (72, 300)": lambda: left @ right
    }


@entry(rounds=2)
def language_sampling():
    """64 samples of 32 tokens from the shipped language model, log-probabilities included"""
    import torch

    from tiltlib.worlds import language

    world = language()
    world.ends = ()  # no text ends early, so that both sides do the same number of steps
    prompt, samples, steps = "Write one sentence about rainy days, please!", 64, 32
    ids = torch.tensor(world.encode([prompt]))
    tokens = torch.randint(5, 40000, (samples, steps), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def bare():
        cache = world.network(input_ids=ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(samples)
        for step in range(steps - 1):
            world.network(input_ids=tokens[:, step : step + 1], past_key_values=cache, use_cache=True)

    def sample():
        world.sample([prompt], samples, max_new_tokens=steps, generator=torch.Generator().manual_seed(0))

    return sample, {"bare forwards with a cache, prefix computed once": bare}


if __name__ == "__main__":
    main(sys.argv[1:])
