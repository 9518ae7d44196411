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
    """Best CPU seconds per call of each callable; they take turns, so that a busy machine slows all of them."""
    repeats = []
    for call in calls:
        start = time.process_time()
        call()  # also warms caches
        repeats.append(max(1, int(seconds / max(time.process_time() - start, 1e-9))))
    times = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, (call, repeat) in enumerate(zip(calls, repeats, strict=True)):
            start = time.process_time()
            for _ in range(repeat):
                call()
            times[i] = min(times[i], (time.process_time() - start) / repeat)
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


def _mixture(dim, steps=100):
    import torch

    from tiltlib.worlds import Mixture

    means = np.random.default_rng(0).normal(size=(3, dim)) * 2
    return Mixture([0.3, 0.45, 0.25], means, [0.3, 0.5, 0.4], steps=steps, dtype=torch.float32)


def _particle_loop(n, dim):
    """Tempered SMC with the posterior-mean value on a mixture, systematic resampling below half; and its rivals.

    The rivals do the same arithmetic on the same world: its exact scores alone, the scores and the noise, and the loop
    as one would write it by hand for this one method, without checks, batches of runs or counts.
    """
    import torch

    from tiltlib import steer, values
    from tiltlib import tensor_rewards as rewards
    from tiltlib.chance import systematic
    from tiltlib.steer import rows

    torch.set_num_threads(1)
    world, generator, beta = _mixture(dim), torch.Generator().manual_seed(0), 0.5
    reward = rewards.quadratic(np.ones(dim), 0.1)
    row = rows.das(tempering=rows.exponential(0.05), drift=False)

    @torch.no_grad()
    def ours():
        options = {"value": values.posterior_mean(reward), "particles": n, "generator": generator}
        steer.run(world, reward, beta=beta, method=row, **options)

    @torch.no_grad()
    def bare(noise=False):
        x = torch.randn(n, dim, generator=generator)
        for i in range(world.steps, 0, -1):
            world.predict(x, i)
            if noise:
                torch.randn(n, dim, generator=generator)

    class Draw:
        def uniforms(self, shape, device=None):
            return torch.rand(shape, dtype=torch.float64, generator=generator)

    @torch.no_grad()
    def by_hand():
        x = torch.randn(n, dim, generator=generator)
        clean = world.predict(x, world.steps)
        psi, log_w = torch.zeros(n), torch.zeros(n)
        for i in range(world.steps, 0, -1):
            mean = float(world.coef.x[i]) * x + float(world.coef.x0[i]) * clean
            x = mean + float(world.coef.std[i]) * torch.randn(n, dim, generator=generator)
            clean = world.predict(x, i - 1) if i > 1 else x
            lam = min(1.05 ** (world.steps - i + 1) - 1, 1.0) if i > 1 else 1.0
            new = lam * -0.05 * (clean - 1).square().sum(1) / beta
            log_w, psi = log_w + new - psi, new
            w = log_w.double().softmax(0)
            if 1 / w.square().sum() < n / 2:
                kept = systematic(w[None], n, Draw())[0]
                x, clean, psi, log_w = x[kept], clean[kept], psi[kept], torch.zeros(n)

    rivals = {
        "its exact scores alone": bare,
        "scores and noise": lambda: bare(noise=True),
        "the same method written by hand": by_hand,
    }
    return ours, rivals | _particles(n, world, reward, beta)


def _particles(n, world, reward, beta):
    """The same model and method in the library `particles`, where it is installed."""
    try:
        import particles
    except ImportError:
        return {}
    from tests.peers import feynman_kac

    lam = [1.0] + [min(1.05**j - 1, 1.0) for j in range(world.steps - 1, -1, -1)]
    model = feynman_kac(world, reward, beta, lam)
    return {"particles.SMC": lambda: particles.SMC(model, N=n, resampling="systematic", ESSrmin=0.5).run()}


@entry(rounds=3)
def particle_loop():
    """10 000 particles in dimension 2, 100 steps of tempered SMC with the posterior-mean value"""
    return _particle_loop(10_000, 2)


@entry(rounds=3)
def particle_loop_many():
    """100 000 particles in dimension 2"""
    return _particle_loop(100_000, 2)


@entry(rounds=3)
def particle_loop_wide():
    """10 000 particles in dimension 64"""
    return _particle_loop(10_000, 64)


@entry(rounds=3)
def digits_steering():
    """64 particles of digits, 20 steps of SMC with the posterior-mean value; every row costs nearly the same"""
    import torch

    from tiltlib import steer, worlds
    from tiltlib import tensor_rewards as rewards

    torch.set_num_threads(1)
    world, reward = worlds.digits("flow", sampler="flow_grpo", steps=20), rewards.brightness()
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def bare():
        x = torch.randn(64, 1, 8, 8, generator=generator)
        for i in range(20, 0, -1):
            world.predict(x, i)

    def run(method):
        steer.run(world, reward, beta=0.05, method=method, particles=64, generator=generator)

    others = {f"the row {name}": (lambda name=name: run(name)) for name in ("base", "importance")}
    return lambda: run("smc"), {"its network calls alone": bare} | others


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
