"""Trains the small models of the digits world: `python -m tiltlib.worlds.train_digits eps` (or flow, classifier, gold).

Everything is fixed by the seed on one machine with one thread; elsewhere the numbers differ in their last digits, so
a retraining is compared by its statistics. Each model goes to a folder of its own under book/models, beside a
training.json with the command, the seed, the log of the loss, the versions and the hash of each weight file.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from tiltlib.worlds.digit_models import (
    CLASSIFIERS,
    MODELS,
    NULL,
    RECORD,
    WEIGHTS,
    classifier_network,
    file_hash,
    load_images,
)

STEPS = {"eps": 3200, "flow": 3200, "classifier": 1500, "gold": 1500}
BATCH, DROP = 256, 0.15  # DROP: how often the class is hidden, so that the model also learns the unconditional law


def train_generator(kind, steps, seed, report):
    """A UNet2DModel of the 1500 training images, as moving averages of the weights; report(step, loss) each 100 steps.

    kind: "eps" predicts the noise of the DDPM chain of 1000 steps (Ho, Jain and Abbeel 2020, eq. (14)); "flow" the
    velocity eps - x_0 of the rectified flow, asked at 1000 t as diffusers does. Returns (network, scheduler).
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

    torch.manual_seed(seed)  # the initial weights; all other draws come from the generator
    generator = torch.Generator().manual_seed(seed)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(24, 48),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=NULL + 1,
    )
    if kind == "eps":
        scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        alpha_bar = torch.cumprod(1 - scheduler.betas.double(), 0)
        alpha, sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    else:
        scheduler = FlowMatchEulerDiscreteScheduler()
    images, labels = load_images("train")
    weights = list(network.parameters())  # this network has no buffers
    average = [weight.detach().clone() for weight in weights]
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: rate(k, steps))
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        x0, label = images[chosen], labels[chosen]
        label = torch.where(torch.rand(BATCH, generator=generator) < DROP, NULL, label)
        noise = torch.randn(x0.shape, generator=generator)
        # one point in each of BATCH equal stretches of time: the same law, less noise in the loss
        t = (torch.randperm(BATCH, generator=generator) + torch.rand(BATCH, generator=generator)) / BATCH
        if kind == "eps":
            t = (1000 * t).long()
            x = alpha[t].view(-1, 1, 1, 1) * x0 + sigma[t].view(-1, 1, 1, 1) * noise
            target = noise
        else:
            x = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
            target, t = noise - x0, 1000 * t
        with torch.autocast("cpu", torch.bfloat16):  # a quarter faster where the processor has bfloat16
            output = network(x, t, class_labels=label).sample
        loss = functional.mse_loss(output.float(), target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            report(step + 1, sum(losses[-100:]) / 100)
    with torch.no_grad():
        torch._foreach_copy_(weights, average)
    return network.eval(), scheduler


def train_classifier(name, steps, seed, report):
    """The network of `CLASSIFIERS[name]` on its own half of the training images; the two share no image and no seed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = classifier_network(name)
    images, labels = load_images(name)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: rate(k, steps))
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(images), (128,), generator=generator)
        x = warp(images[chosen], generator)
        loss = functional.cross_entropy(network(x), labels[chosen], label_smoothing=0.02)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            report(step + 1, sum(losses[-100:]) / 100)
    return network.eval()


def rate(step, steps):
    """The learning rate as a fraction of its peak: up over 100 steps, then down along a cosine."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / steps))


def warp(images, generator):
    """Each image (n, 1, 8, 8) turned, stretched, shifted and made noisy a little, so that a classifier generalises."""
    n = len(images)
    angle, stretch, shear = (0.2 * torch.randn(n, generator=generator) * scale for scale in (0.7, 0.4, 0.4))
    shift = 0.1 * torch.randn(n, 2, generator=generator)
    size = torch.exp(stretch)
    rows = torch.stack(
        [
            torch.stack([angle.cos() * size, shear - angle.sin() * size, shift[:, 0]], 1),
            torch.stack([angle.sin() / size, angle.cos() / size, shift[:, 1]], 1),
        ],
        1,
    )
    where = functional.affine_grid(rows, images.shape, align_corners=False)
    # grid_sample fills the outside with zeros, so black must be zero meanwhile
    moved = functional.grid_sample(images + 1, where, align_corners=False) - 1
    level = 0.15 * torch.rand(n, 1, 1, 1, generator=generator)
    return moved + level * torch.randn(images.shape, generator=generator)


def write(name, seed, steps, folder):
    """Train `name` and put its folder in place as a whole: a run that is stopped leaves the old one."""
    started, processor, log = time.perf_counter(), time.process_time(), []

    def report(step, loss):
        log.append(round(loss, 5))
        print(f"{name}: step {step}, loss {loss:.4f}, {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        if name in CLASSIFIERS:
            from safetensors.torch import save_file

            network = train_classifier(name, steps, seed, report)
            save_file(network.state_dict(), temporary / WEIGHTS[name])
        else:
            from diffusers import DDIMPipeline, DDPMPipeline

            network, scheduler = train_generator(name, steps, seed, report)
            pipeline = DDIMPipeline if name == "eps" else DDPMPipeline  # the plain loop, which takes any scheduler
            pipeline(network, scheduler).save_pretrained(temporary)
        record = {
            "command": f"python -m tiltlib.worlds.train_digits {name} --seed {seed} --steps {steps}",
            "seed": seed,
            "steps": steps,
            "core_minutes": round((time.process_time() - processor) / 60, 1),
            "threads": torch.get_num_threads(),
            "date": datetime.now(UTC).date().isoformat(),
            "parameters": sum(p.numel() for p in network.parameters()),
            "versions": {package: version(package) for package in ("torch", "diffusers", "scikit-learn")},
            "sha256": {WEIGHTS[name]: file_hash(temporary / WEIGHTS[name])},
            "loss_each_100_steps": log,
        }
        if name in CLASSIFIERS:
            images, labels = load_images("test")
            with torch.no_grad():
                record["test_accuracy"] = (network(images).argmax(1) == labels).double().mean().item()
        (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        for path in (temporary, *temporary.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tiltlib.worlds.train_digits", description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=list(WEIGHTS))
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="the folder; book/models/digits-MODEL by default")
    asked = parser.parse_args(arguments)
    seed = list(WEIGHTS).index(asked.model) if asked.seed is None else asked.seed
    steps = STEPS[asked.model] if asked.steps is None else asked.steps
    if steps < 1:
        parser.error("--steps must be at least 1")
    torch.set_num_threads(1)
    record = write(asked.model, seed, steps, asked.out or MODELS / f"digits-{asked.model}")
    print(json.dumps({key: value for key, value in record.items() if not key.startswith("loss")}, indent=1))


if __name__ == "__main__":
    main()
