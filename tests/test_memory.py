"""Memory of the particle loop is bounded by its chunk: ten thousand digits, measured in a process of their own."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from tiltlib import steer, tensor_rewards, worlds

def run(particles, chunk):
    return steer.run(world, tensor_rewards.brightness(), beta=0.05, method="smc", particles=particles,
                     chunk=chunk, generator=torch.Generator().manual_seed(0))

world = worlds.digits("flow", sampler="flow_grpo", steps=2, chunk=10_000)
run(250, 250)  # whatever is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(10_000, {chunk})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak(chunk):
    """Additional memory in MB at the peak."""
    script = SCRIPT.format(chunk=chunk)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has another unit elsewhere")
def test_ten_thousand_digits_need_memory_for_one_chunk_only():
    """Particles, noise, predictions are 2.5 MB each; a chunk's network states are all that is large: 20 MB in all."""
    assert peak(250) < 60
    assert peak(2500) > 120  # ten times the chunk
