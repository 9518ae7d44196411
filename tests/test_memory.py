"""Memory of the particle loop is bounded by its chunk: ten thousand digits, measured in a process of their own."""

import subprocess
import sys

import pytest

SCRIPT = """
import threading, time, torch
from tiltlib import steer, tensor_rewards, worlds

def used():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def watch():
    global peak
    while True:
        peak = max(peak, used())
        time.sleep(0.002)

def run(particles, chunk):
    return steer.run(world, tensor_rewards.brightness(), beta=0.05, method="smc", particles=particles,
                     chunk=chunk, generator=torch.Generator().manual_seed(0))

world = worlds.digits("flow", sampler="flow_grpo", steps=2, chunk=10_000)
run(250, 250)  # whatever is loaded once
peak = before = used()
threading.Thread(target=watch, daemon=True).start()
run({particles}, {chunk})
print(peak - before)
"""


def peak(particles, chunk):
    """Additional memory in MB at the peak, sampled every two milliseconds."""
    script = SCRIPT.format(particles=particles, chunk=chunk)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_ten_thousand_digits_need_memory_for_one_chunk_only():
    """Particles, noise, predictions are 2.5 MB each; a chunk's network states are all that is large: 20 MB in all."""
    assert peak(10_000, 250) < 60
    assert peak(2500, 2500) > 120  # a quarter of the particles, at once
