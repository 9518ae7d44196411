"""Trains the small models of the digits world: `python -m tiltlib.worlds.train_digits eps` (or flow, classifier, gold).

Everything is fixed by the seed on one machine with one thread; elsewhere the numbers differ in their last digits, so
a retraining is compared by its statistics. Each model goes to a folder of its own under book/models, beside a
training.json with the command, the seed, the log of the loss, the versions and the hash of each weight file.

"eps" is trained in two stages: with the plain loss on the DDPM chain of 1000 steps, then with more weight on the noise
on the 650 of them that the world keeps. `--resume FOLDER` takes the first stage from a folder and runs the second.
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
    verified,
)

STEPS = {"eps": 3200, "flow": 3200, "classifier": 1500, "gold": 1500}
CHAIN, KEPT = 1000, 650  # steps of the DDPM chain, and how many of them, from the clean end, the world keeps
FINISH = 500  # steps of the second stage of "eps", for 3200 of the first
BATCH, DROP = 256, 0.15  # DROP: how often the class is hidden, so that the model also learns the unconditional law


def train_generator(kind, steps, seed, report):
    """A UNet2DModel of the 1500 training images, as moving averages of the weights; report(step, loss) each 100 steps.

    kind: "eps" predicts the noise of the DDPM chain of 1000 steps (Ho, Jain and Abbeel 2020, eq. (14)), the first stage
    of two; "flow" the velocity eps - x_0 of the rectified flow, asked at 1000 t as diffusers does.
    """
    from diffusers import UNet2DModel

    torch.manual_seed(seed)  # the initial weights; all other draws come from the generator
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
    alpha, sigma = chain(CHAIN)

    def loss(network, x0, label, noise, t):
        if kind == "eps":
            k = (CHAIN * t).long()
            x, asked, target = alpha[k].view(-1, 1, 1, 1) * x0 + sigma[k].view(-1, 1, 1, 1) * noise, k, noise
        else:
            x, asked, target = torch.lerp(x0, noise, t.view(-1, 1, 1, 1)), 1000 * t, noise - x0
        # a quarter faster where the processor has bfloat16, and many times slower where it has not
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu.get_capabilities().get("avx512_bf16", False)):
            output = network(x, asked, class_labels=label).sample
        return functional.mse_loss(output.float(), target)

    return fit(network, loss, steps, seed, report, rate=2e-3, batch=BATCH, decay=0.998)


def finish_generator(network, steps, seed, report):
    """The second stage of "eps": the KEPT cleanest steps of the chain, squared errors times (1 + sigma / alpha)^2.

    That is the loss of the rectified flow at the same noise: its velocity errs by (1 + sigma / alpha) times as much as
    the noise does. The plain loss hardly sees errors in E[x_0 | x_k], which are sigma / alpha times those in the noise.
    """
    alpha, sigma = chain(KEPT)
    weight = (1 + sigma / alpha) ** 2
    weight, data = weight / weight.mean(), load_images("train")

    def loss(network, x0, label, noise, t):
        k = (KEPT * t).long()
        a, s = alpha[k].view(-1, 1, 1, 1), sigma[k].view(-1, 1, 1, 1)
        x = a * x0 + s * noise
        error = network(x, k, class_labels=label).sample - (x - a * posterior_mean(x, label, a, s, *data)) / s
        return (weight[k] * error.square().flatten(1).mean(1)).mean()

    return fit(network.train().requires_grad_(), loss, steps, seed + 100, report, rate=2e-3, batch=128, decay=0.99)


def posterior_mean(x, label, alpha, sigma, images, labels):
    """E[x_0 | x, label] (n, 1, 8, 8) when x_0 is one of the images, of the class that the label says if it says one.

    With it as the target the gradient has the same mean as with the noise that was drawn, and less of its variance
    (Xu, Tong and Jaakkola 2023). alpha, sigma: (n, 1, 1, 1).
    """
    rows, alpha, sigma = images.flatten(1), alpha.flatten(1), sigma.flatten(1)
    fit = (alpha * (x.flatten(1) @ rows.T) - alpha**2 * rows.square().sum(1) / 2) / sigma**2
    other = (label[:, None] != labels) & (label[:, None] != NULL)
    return (fit.masked_fill(other, -torch.inf).softmax(1) @ rows).view_as(x)


def chain(steps):
    """alpha and sigma (steps,) float32 of the first steps of the DDPM chain."""
    alpha_bar = torch.cumprod(1 - ddim(steps).betas.double(), 0)
    return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()


def ddim(steps):
    """diffusers' scheduler of the first `steps` of the CHAIN steps of Ho, Jain and Abbeel (2020)."""
    from diffusers import DDIMScheduler

    # by name: diffusers' pipelines take a value that was given by position for the default, and forget it
    return DDIMScheduler(
        num_train_timesteps=steps,
        beta_end=1e-4 + (0.02 - 1e-4) * (steps - 1) / (CHAIN - 1),
        clip_sample=False,
        timestep_spacing="trailing",
    )


def fit(network, loss, steps, seed, report, *, rate, batch, decay):
    """The network after `steps` of AdamW on loss(network, x0, label, noise, t in [0, 1)), its weights averaged."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_images("train")
    weights = list(network.parameters())  # this network has no buffers
    average = [weight.detach().clone() for weight in weights]
    optimiser = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: fraction(k, steps))
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        x0, label = images[chosen], labels[chosen]
        label = torch.where(torch.rand(batch, generator=generator) < DROP, NULL, label)
        noise = torch.randn(x0.shape, generator=generator)
        # one point in each of `batch` equal stretches of time: the same law, less noise in the loss
        t = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        value = loss(network, x0, label, noise, t)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - min(decay, (step + 1) / (step + 10)))
        losses.append(value.item())
        if (step + 1) % 100 == 0:
            report(step + 1, sum(losses[-100:]) / 100)
    with torch.no_grad():
        torch._foreach_copy_(weights, average)
    return network.eval()


def train_classifier(name, steps, seed, report):
    """The network of `CLASSIFIERS[name]` on its own half of the training images; the two share no image and no seed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = classifier_network(name)
    images, labels = load_images(name)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: fraction(k, steps))
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


def fraction(step, steps):
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


def write(name, seed, steps, folder, finish=FINISH, resume=None):
    """Train `name` and put its folder in place as a whole: a run that is stopped leaves the old one."""
    started, processor, log = time.perf_counter(), time.process_time(), []

    def report(step, loss):
        log.append(round(loss, 5))
        print(f"{name}: step {step}, loss {loss:.4f}, {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)

    first = None if resume is None else json.loads((verified(name, resume) / RECORD).read_text())
    if first is not None and "finish" in first:
        raise ValueError(f"the model in {resume} has had its second stage already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    more = {}
    try:
        if name in CLASSIFIERS:
            from safetensors.torch import save_file

            network = train_classifier(name, steps, seed, report)
            save_file(network.state_dict(), temporary / WEIGHTS[name])
        else:
            from diffusers import DDIMPipeline, DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel

            if first is None:
                network = train_generator(name, steps, seed, report)
            else:
                network = UNet2DModel.from_pretrained(resume, subfolder="unet", use_safetensors=True)
                network.register_to_config(_name_or_path="")  # not where it was read
                steps, log = first["steps"], first["loss_each_100_steps"]
                more["resumed"] = {key: first[key] for key in ("command", "core_minutes", "date", "versions", "sha256")}
            if name == "eps":
                first_log, log = log, []
                network = finish_generator(network, finish, seed, report)
                more["finish"] = {"steps": finish, "loss_each_100_steps": log}
                log = first_log
            # the plain loops, of which DDPMPipeline's takes any scheduler
            pipeline = DDIMPipeline(network, ddim(KEPT)) if name == "eps" else None
            pipeline = pipeline or DDPMPipeline(network, FlowMatchEulerDiscreteScheduler())
            pipeline.save_pretrained(temporary)
        asked = f"--steps {steps}" if resume is None else f"--resume {resume.name}"
        asked += f" --finish {finish}" if name == "eps" else ""
        record = {
            "command": f"python -m tiltlib.worlds.train_digits {name} --seed {seed} {asked}",
            "seed": seed,
            "steps": steps,
            "core_minutes": round((time.process_time() - processor) / 60, 1),
            "threads": torch.get_num_threads(),
            "date": datetime.now(UTC).date().isoformat(),
            "parameters": sum(p.numel() for p in network.parameters()),
            "versions": {package: version(package) for package in ("torch", "diffusers", "scikit-learn")},
            "sha256": {WEIGHTS[name]: file_hash(temporary / WEIGHTS[name])},
            "loss_each_100_steps": log,
            **more,
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
    parser.add_argument("--finish", type=int, default=None, help=f"steps of the second stage of eps ({FINISH})")
    parser.add_argument("--resume", type=Path, default=None, help="a folder with the first stage of eps")
    parser.add_argument("--out", type=Path, default=None, help="the folder; book/models/digits-MODEL by default")
    asked = parser.parse_args(arguments)
    seed = list(WEIGHTS).index(asked.model) if asked.seed is None else asked.seed
    steps = STEPS[asked.model] if asked.steps is None else asked.steps
    finish = FINISH if asked.finish is None else asked.finish
    if steps < 1 or finish < 1:
        parser.error("--steps and --finish must be at least 1")
    if asked.model != "eps" and not (asked.finish is None and asked.resume is None):
        parser.error("--finish and --resume are for eps, which is trained in two stages")
    if asked.steps is not None and asked.resume is not None:
        parser.error("--steps is what the folder of --resume says")
    torch.set_num_threads(1)
    record = write(asked.model, seed, steps, asked.out or MODELS / f"digits-{asked.model}", finish, asked.resume)
    print(json.dumps({key: value for key, value in record.items() if not key.startswith("loss")}, indent=1))


if __name__ == "__main__":
    main()
