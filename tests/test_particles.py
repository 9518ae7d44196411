"""Our loop beside the library `particles` (Chopin), an independent implementation; skipped where it is missing."""

import math

import numpy as np
import pytest
import torch

from tests.peers import feynman_kac
from tiltlib import steer, values
from tiltlib import tensor_rewards as rewards
from tiltlib.steer import rows
from tiltlib.worlds import Mixture

particles = pytest.importorskip("particles", reason="optional: pip install particles numba")

BETA, RUNS, N = 0.5, 24, 300


def estimates(model_reward, lam):
    """log Z and the mean of x_0's first coordinate in RUNS runs of the library."""
    np.random.seed(3)  # noqa: NPY002
    model, found = feynman_kac(world(), model_reward, BETA, lam), []
    for _ in range(RUNS):
        smc = particles.SMC(model, N=N, resampling="systematic", ESSrmin=0.5)
        smc.run()
        found.append((smc.logLt, float(smc.W @ smc.X[:, 0])))
    return np.array(found).T


def world():
    return Mixture([0.3, 0.7], [[-1.5, 0.0], [2.0, 1.0]], [0.3, 0.2], steps=12)


def test_log_z_and_means_agree():
    reward = rewards.quadratic([-1.0, 0.5], 0.6)
    lam = [1.0] + [min((12 - i) / 12, 1.0) for i in range(1, 13)]
    o = steer.run(
        world(), reward, beta=BETA, method=rows.das(0.5, rows.linear(), drift=False), particles=N, runs=RUNS,
        value=values.posterior_mean(reward), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    ours = o.log_z.numpy(), (o.log_weights.softmax(1) * o.samples[..., 0]).sum(1).numpy()
    theirs = estimates(reward, lam)
    other = estimates(rewards.quadratic([0.5, 0.5], 0.6), lam)
    for a, b, wrong in zip(ours, theirs, other, strict=True):
        error = math.hypot(a.std(ddof=1), b.std(ddof=1)) / RUNS**0.5
        assert abs(a.mean() - b.mean()) < 4 * error
        assert abs(a.mean() - wrong.mean()) > 8 * error  # a reward around another point is told apart
