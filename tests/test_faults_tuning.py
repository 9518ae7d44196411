"""A LoRA run that is killed with SIGKILL and started again ends bit for bit where an unbroken one does."""

import os
import signal
import subprocess
import sys
import time

# the reward sleeps a little, so that the kill falls inside a step and not always between two
SCRIPT = """
import hashlib, sys, time, torch
from tests.tiny_language import tiny_language
from tiltlib.tune import lora
checkpoint, pause = sys.argv[1], float(sys.argv[2])
torch.manual_seed(int(time.time()))  # nothing may depend on the global generator
world, prompts, g = tiny_language(), ["a b c", "d e", "f"], torch.Generator().manual_seed(5)
def reward(texts):
    time.sleep(pause)
    return [len(text) for text in texts]
tuned = lora.reinforce(
    world, prompts, reward, 2.0, max_new_tokens=5, samples=3, rank=2, steps=12, learning_rate=0.02, generator=g,
    queries=2, checkpoint=checkpoint, every=3,
)
named = {n: p for n, p in tuned.world.network.named_parameters() if "lora_" in n}
total = hashlib.sha256()
for name in sorted(named):
    total.update(named[name].detach().numpy().tobytes())
print(total.hexdigest(), repr(tuned.history["loss"][-1]), len(tuned.history["loss"]), float(g.get_state().sum()))
"""


def start(checkpoint, pause):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""  # no progress bar where there is no terminal
    return out


def test_killed_and_resumed(tmp_path):
    whole, path = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    unbroken = start(whole, 0)
    victim = start(path, 0.3)
    for _ in range(1200):
        if path.exists() or victim.poll() is not None:
            break
        time.sleep(0.05)
    time.sleep(0.5)  # past the checkpoint, inside a later step
    assert victim.poll() is None, "it ended before it could be killed"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    resumed = finish(start(path, 0))
    assert resumed == finish(unbroken)
    assert whole.read_bytes() == path.read_bytes()
