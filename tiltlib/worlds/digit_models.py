"""A trained world small enough for a laptop: scikit-learn's 8x8 digits, as a denoiser and as its rectified-flow twin.

The networks are diffusers' own UNet2DModel, kept in diffusers' pipeline format under book/models beside a record of
how they were trained (`tiltlib.worlds.train_digits`) and the hash of every weight file, which is checked on loading.
Images are (n, 1, 8, 8), from -1 (paper) to 1 (ink); a condition is a digit 0..9, one per particle, or None.
"""

import hashlib
import json
import warnings

import torch
from torch import nn

from tiltlib import paths
from tiltlib.files import ROOT
from tiltlib.worlds.base import Diffusion

MODELS = ROOT / "book" / "models"
RECORD = "training.json"
SHAPE = (1, 8, 8)
CLASSES = 10
NULL = CLASSES  # the label of "no condition"
CLASSIFIERS = ("classifier", "gold")
UNET = "unet/diffusion_pytorch_model.safetensors"
WEIGHTS = {"eps": UNET, "flow": UNET, "classifier": "model.safetensors", "gold": "model.safetensors"}


class Digits(Diffusion):
    """A World of 8x8 digits: a class-conditional network on the VP path (eps) or the rectified flow (velocity).

    network: called as UNet2DModel is. grid: a paths.Grid. times: (steps + 1,), the time the network is told at each
    step. prediction: what it predicts. sampler: as in `paths.SAMPLERS`. chunk: particles in one call of the network.
    Attributes: calls, the network evaluations so far, one per particle; shape, device, dtype.
    """

    def __init__(self, network, grid, times, *, prediction, sampler="ancestral", chunk=4096):
        if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
            raise ValueError(f"chunk must be an integer >= 1, not {chunk!r}")
        super().__init__(grid, sampler, prediction=prediction)
        self.network, self.times, self.chunk, self.calls, self.shape = network, times, chunk, 0, SHAPE
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def start(self, n, chance):
        """Standard normals (n, 1, 8, 8), as diffusers starts: the law at i = steps of the rectified flow.

        The VP path stops at alpha = 0.117, where the mean of x is alpha times that of the digits: standard normals
        are 0.19 nats from that law. An ideal reverse chain all but forgets it: its digits are off by 4e-4 nats.
        """
        return chance.normals((n, *SHAPE), dtype=self.dtype, device=self.device)

    def predict(self, x, i, condition=None):
        """The network at x (n, 1, 8, 8), steps i in 1..steps (int or (n,)), condition None, a digit, or digits (n,).

        ValueError: another shape, a step outside the grid, a condition that is not a digit. TypeError: another dtype.
        """
        if x.shape[1:] != SHAPE:
            raise ValueError(f"digits have shape (n, 1, 8, 8), not {tuple(x.shape)}")
        if x.dtype != self.dtype:
            raise TypeError(f"this world computes in {self.dtype}; the particles are {x.dtype}")
        n = len(x)
        t = torch.as_tensor(paths.at(self.times, i, x), dtype=x.dtype, device=x.device).reshape(-1).expand(n)
        if t.isnan().any():
            raise ValueError("nothing is left to predict at step 0: the network is asked at steps 1..steps")
        labels = read_labels(condition, n, x.device)
        self.calls += n
        parts = zip(*(part.split(self.chunk) for part in (x, t, labels)), strict=True)
        outputs = [self.network(x, t, class_labels=label).sample for x, t, label in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def digits(kind="eps", *, sampler="ancestral", steps=50, device="cpu", dtype=torch.float32, chunk=4096, folder=None):
    """The trained digits as a World. kind: "eps" (a DDPM, asked at evenly spaced ones of its 650 steps) or "flow".

    The chain is that of Ho, Jain and Abbeel (2020) cut after 650 of its 1000 steps: from noise to E[x_0 | x_i] an error
    grows by sigma / alpha, which is 157 at the end of the whole chain and 8 here.

    sampler: as in `paths.SAMPLERS`; "ode" or "euler" draws no noise. steps: 1..1000, "eps" 1..650. folder: other than
    book/models/digits-eps. ValueError: unknown kind, sampler or device, steps out of range, a file that was altered.
    FileNotFoundError: a model file is missing; the message has the command that makes it.
    """
    if kind not in ("eps", "flow"):
        raise ValueError(f"unknown kind {kind!r}; known: eps, flow")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= 1000:
        raise ValueError(f"steps must be an integer from 1 to 1000, not {steps!r}")
    device = existing(device)
    if kind == "flow":
        grid = paths.grid("rectified", steps)
        times = 1000 * grid.t
    folder = verified(kind, folder)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # a progress bar's wish for a widget, on every page
        from diffusers import DDIMScheduler, UNet2DModel  # seconds to import: only where a model is wanted

    if kind == "eps":
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.flip(0)
        alpha_bar = torch.cumprod(1 - scheduler.betas.double(), 0)[times]
        one = torch.ones(1, dtype=torch.float64)
        grid = paths.tables(torch.cat([one, alpha_bar.sqrt()]), torch.cat([0 * one, (1 - alpha_bar).sqrt()]))
        times = torch.cat([one, times])
    times[0] = torch.nan
    with torch.random.fork_rng(devices=[]):  # a network is made with random weights before its own are loaded
        network = UNet2DModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, use_safetensors=True)
    network = network.requires_grad_(False).eval().to(device)
    prediction = {"eps": "epsilon", "flow": "velocity"}[kind]
    return Digits(network, grid, times, prediction=prediction, sampler=sampler, chunk=chunk)


def classifier(name="classifier", *, device="cpu", dtype=torch.float32, folder=None):
    """A network from images (n, 1, 8, 8) to logits (n, 10). Differentiable in the images; the weights are frozen.

    name: "classifier", to be used as a reward and to measure agreement, or "gold", of another architecture and trained
    on other images, to tell whether what the first one likes is good. Errors: as for `digits`.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"unknown classifier {name!r}; known: {', '.join(CLASSIFIERS)}")
    device = existing(device)
    folder = verified(name, folder)

    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]):
        network = classifier_network(name)
    network.load_state_dict(load_file(folder / WEIGHTS[name]))
    return network.requires_grad_(False).eval().to(device, dtype)


def classifier_network(name):
    """The untrained networks: "classifier" is convolutional, "gold" a residual network of another make."""
    if name == "classifier":
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * 16, CLASSES),
        )
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.LayerNorm(256),
        nn.GELU(),
        nn.Linear(256, 256),
        nn.LayerNorm(256),
        nn.GELU(),
        nn.Linear(256, CLASSES),
    )


def load_images(part="train"):
    """Images (n, 1, 8, 8) float32 from -1 to 1 and labels (n,) int64, of one part of scikit-learn's 1797 digits.

    part: "train" (1500, what the generators saw), "classifier" and "gold" (its two halves), "test" (297, seen by none).
    The parts are fixed by the hash of each image, so they depend on no random numbers. ValueError: unknown part.
    """
    from sklearn.datasets import load_digits

    parts = {
        "train": slice(0, 1500),
        "classifier": slice(0, 750),
        "gold": slice(750, 1500),
        "test": slice(1500, 1797),
    }
    if part not in parts:
        raise ValueError(f"unknown part {part!r}; known: {', '.join(parts)}")
    data = load_digits()
    pixels = data.images.astype("uint8")
    order = sorted(range(len(pixels)), key=lambda k: hashlib.sha256(pixels[k].tobytes()).digest())[parts[part]]
    images = torch.from_numpy(pixels[order]).float()[:, None] / 8 - 1
    return images, torch.from_numpy(data.target[order].astype("int64"))


def read_labels(condition, n, device):
    """Class labels (n,) int64 of a condition: None, a digit, or an integer tensor of digits () or (n,)."""
    if condition is None:
        return torch.full((n,), NULL, device=device)
    labels = torch.as_tensor(condition) if isinstance(condition, (int, list, tuple, torch.Tensor)) else None
    if labels is None or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"unknown condition {condition!r}: a condition is None, a digit 0..9, or integers ({n},)")
    if labels.shape not in ((), (n,)):
        raise ValueError(f"conditions of shape {tuple(labels.shape)} do not fit {n} particles")
    if labels.numel() and not (labels.min() >= 0 and labels.max() < CLASSES):
        raise ValueError(f"unknown condition: digits are 0..9, not {labels.tolist()}")
    return labels.to(device, torch.int64).expand(n)


def verified(name, folder=None):
    """The folder of a model, once every file in its record is there and has the hash that was recorded."""
    folder = MODELS / f"digits-{name}" if folder is None else folder
    remake = f"make it again with: python -m tiltlib.worlds.train_digits {name}"
    for needed in (RECORD, WEIGHTS[name]):
        if not (folder / needed).is_file():
            raise FileNotFoundError(f"the model file {folder / needed} is missing; {remake}")
    recorded = json.loads((folder / RECORD).read_text())["sha256"]
    if WEIGHTS[name] not in recorded:
        raise ValueError(f"{folder / RECORD} has no hash of {WEIGHTS[name]}; {remake}")
    for file, expected in recorded.items():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"the model file {folder / file} is missing; {remake}")
        found = file_hash(folder / file)
        if found != expected:
            raise ValueError(
                f"the model file {folder / file} was altered: its SHA-256 is {found[:12]}..., "
                f"the record says {expected[:12]}...; restore it, or {remake}"
            )
    return folder


def file_hash(path):
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def existing(device):
    """A torch.device that this machine has; ValueError for another."""
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no GPU on this machine")
    return device
