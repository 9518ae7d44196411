"""The trained digits: same steps as diffusers' own schedulers and pipelines, good samples, clear errors."""

import functools
import json
import os
import shutil

import pytest
import torch

from tiltlib import paths
from tiltlib.chance import Chance
from tiltlib.worlds import digit_models
from tiltlib.worlds.checks import check
from tiltlib.worlds.digit_models import MODELS, RECORD, WEIGHTS, classifier, digits, load_images
from tiltlib.worlds.guided import Guided

KINDS = ("eps", "flow")


@functools.cache
def world(kind, sampler="ancestral", steps=50, dtype=torch.float32):
    return digits(kind, sampler=sampler, steps=steps, dtype=dtype)


def chance(seed=0):
    return Chance(torch.Generator().manual_seed(seed))


class Prepared(Chance):
    """Hands out normals that were drawn before, so that another sampler can use the same."""

    def __init__(self, normals):
        super().__init__(torch.Generator())
        self.given = iter(normals)

    def normals(self, shape, dtype=torch.float32, device=None):
        return next(self.given).reshape(shape).to(dtype, copy=True)  # the kernel works on it in place


@torch.no_grad()
def sample(world, x, chance, condition=None):
    for i in range(world.steps, 0, -1):
        x = world.kernel(x, world.predict(x, i, condition), i).sample(1, chance)[0][:, 0]
    return x


def normals(steps, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps + 1, n, 1, 8, 8, generator=generator)


@torch.no_grad()
def theirs(network, scheduler, noise, labels, **given):
    """diffusers' own loop, noise[0] at the start and noise[1..] wherever the scheduler draws."""
    x = noise[0]
    for k, t in enumerate(scheduler.timesteps):
        output = network(x, t, class_labels=labels).sample
        more = {"variance_noise": noise[k + 1]} if "eta" in given else {}
        x = scheduler.step(output, t, x, **given, **more).prev_sample
    return x


@pytest.mark.parametrize(("sampler", "eta"), [("ode", 0.0), ("ancestral", 1.0), (paths.ddim(0.5), 0.5)])
def test_same_samples_as_ddim(sampler, eta):
    from diffusers import DDIMScheduler

    ours = digits("eps", sampler=sampler, steps=10)
    scheduler = DDIMScheduler.from_pretrained(MODELS / "digits-eps", subfolder="scheduler")
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)  # in float32 theirs is off by up to 2e-4
    scheduler.set_timesteps(10)
    noise, labels = normals(10, 6), torch.arange(6)
    x = sample(ours, noise[0], Prepared(noise[1:]), labels)
    expected = theirs(ours.network, scheduler, noise, labels, eta=eta)
    assert (x - expected).abs().max() < 1e-5
    # control: another eta on the same noise is another sample
    assert (x - theirs(ours.network, scheduler, noise, labels, eta=abs(eta - 0.1))).abs().max() > 1e-3


def test_ancestral_steps_are_ddpm_steps():
    from diffusers import DDIMScheduler, DDPMScheduler

    ours = digits("eps", steps=10, dtype=torch.float64)
    saved = DDIMScheduler.from_pretrained(MODELS / "digits-eps", subfolder="scheduler")
    scheduler = DDPMScheduler.from_config(saved.config, variance_type="fixed_small")
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    scheduler.one = scheduler.one.double()
    scheduler.set_timesteps(10)
    x = normals(0, 4)[0].double()
    for i in range(10, 0, -1):
        t = scheduler.timesteps[10 - i]
        output = ours.predict(x, i, 3)
        step = scheduler.step(output, t, torch.zeros_like(x), generator=torch.Generator().manual_seed(0))
        kernel = ours.kernel(torch.zeros_like(x), output, i)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        # their standard deviation is clamped at 1e-10, and no noise is drawn at timestep 0
        assert (kernel.mean + kernel.std * noise - step.prev_sample).abs().max() < 1e-9
        x = ours.kernel(x, output, i).mean


def test_same_samples_as_flow_match_euler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    ours = digits("flow", sampler="euler", steps=10)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(MODELS / "digits-flow", subfolder="scheduler")
    scheduler.set_timesteps(sigmas=[k / 10 for k in range(10, 0, -1)])
    noise, labels = normals(10, 6), torch.arange(6)
    x = sample(ours, noise[0], Prepared(noise[1:]), labels)
    assert (x - theirs(ours.network, scheduler, noise, labels)).abs().max() < 1e-5
    scheduler.set_timesteps(10)  # control: their own choice of times is another grid, whose last step is tiny
    assert (x - theirs(ours.network, scheduler, noise, labels)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_diffusers_pipeline_loads_the_folder_and_samples_the_same(kind):
    from diffusers import DDIMPipeline, DDPMPipeline

    pipeline = (DDIMPipeline if kind == "eps" else DDPMPipeline).from_pretrained(MODELS / f"digits-{kind}")
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.tensor([3, 8])
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda x, t: forward(x, t, class_labels=labels)  # their call knows no classes
    if kind == "flow":  # their call knows no times either
        times = pipeline.scheduler.set_timesteps
        pipeline.scheduler.set_timesteps = lambda n: times(sigmas=[k / n for k in range(n, 0, -1)])

    def gap(steps):
        generator = torch.Generator().manual_seed(5)
        images = pipeline(2, generator=generator, num_inference_steps=steps, output_type="np").images
        ours = world(kind, "ode" if kind == "eps" else "euler", steps)
        x = sample(ours, ours.start(2, chance(5)), chance(), labels)
        return (torch.as_tensor(images) - (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)).abs().max()

    assert gap(10) < 1e-5
    if kind == "eps":
        # 12 does not divide 650: diffusers then takes steps of 54 between timesteps that are 54 or 55 apart
        assert gap(12) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("condition", [None, 7])
def test_it_passes_worlds_check(kind, condition):
    # a trained model meets the posterior identities only so far as it has learnt them
    check(world(kind), condition=condition, tolerance=0.15, particles=64)


@pytest.mark.parametrize("told", [False, True])
@torch.no_grad()
def test_the_epsilon_twin_knows_the_mean_of_noisy_images(told):
    """E[x_0 | x_i] at the noisy end, held out: no worse than the mean image, nor than the flow at the same noise."""
    images, labels = (part.repeat(2, *[1] * (part.ndim - 1)) for part in load_images("test"))
    train, classes = load_images("train")
    means = torch.stack([train[classes == digit].mean(0) if told else train.mean(0) for digit in range(10)])
    ours, flow = world("eps"), world("flow")
    condition = labels if told else None

    def error(clean):
        return (clean - images).square().mean()

    for i in (50, 48, 45, 40, 35, 30):
        x = ours.renoise(images, 0, i, chance(i))
        alpha, sigma = float(ours.grid.alpha[i]), float(ours.grid.sigma[i])
        noise = ours.predict(x, i, condition)
        found = error(ours.clean(x, noise, i))
        assert found < 1.05 * error(means[labels])
        t = sigma / (alpha + sigma)  # where the flow has the same noise to signal, for x / (alpha + sigma)
        asked = torch.full((len(x),), 1000 * t), labels if told else torch.full_like(labels, digit_models.NULL)
        y = x / (alpha + sigma)
        assert found < 1.05 * error(y - t * flow.network(y, asked[0], class_labels=asked[1]).sample)
        if i == 50:  # control: a noise that is 3 % off is hardly a loss of its own, and is rejected here
            wrong = noise + 0.03 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
            assert error(ours.clean(x, wrong, i)) > 1.1 * error(means[labels])


def test_the_start_of_the_epsilon_twin_is_forgotten():
    """Standard normals are not the law at the last step; an ideal reverse chain hardly notices.

    Ideal: of the 1500 training images, each drawn as often as its posterior probability, averaged over the start.
    """
    images = load_images("train")[0].flatten(1).double()
    mean, covariance = images.mean(0), torch.cov(images.T, correction=0)
    alpha_bar = digits("eps", steps=50).grid.alpha ** 2

    def gaps(i):
        """Nats from the Gaussian of the law at step i to standard normals, and half a chi-square at i = 0."""
        kept, rest = float(alpha_bar[i]), 1 - float(alpha_bar[i])
        law = rest * torch.eye(64, dtype=torch.float64) + kept * covariance
        start = 0.5 * (law.trace() + kept * mean @ mean - 64 - torch.logdet(law))
        generator = torch.Generator().manual_seed(i)
        drawn = []
        for _ in range(4):
            x = torch.randn(1000, 64, generator=generator, dtype=torch.float64)
            likelihood = (kept**0.5 * x @ images.T - kept * images.square().sum(1) / 2) / rest
            drawn.append(len(images) * likelihood.softmax(1).mean(0) - 1)
        drawn = torch.stack(drawn)  # products of different draws only: without the bias of a square
        return start, (drawn.sum(0).square() - drawn.square().sum(0)).mean() / (4 * 3) / 2

    start, end = gaps(50)
    assert 0.1 < start < 0.3
    assert end < 1e-3
    assert gaps(35)[1] > 1e-2  # control: a chain that stops earlier remembers


@pytest.mark.parametrize("kind", KINDS)
def test_clean_predicts_held_out_digits(kind):
    """E[x_0 | x_i] on images that no model saw: better than any multiple of x_i, and better when told the class."""
    images, labels = load_images("test")
    ours = world(kind)
    for i in (10, 25, 40):
        x = ours.renoise(images, 0, i, chance(i))

        def error(condition, x=x, i=i):
            with torch.no_grad():
                return (ours.clean(x, ours.predict(x, i, condition), i) - images).square().mean()

        linear = (x * images).mean() / x.square().mean() * x
        assert error(labels) < error(None) < 0.8 * (linear - images).square().mean()
        assert error((labels + 1) % 10) > error(None)


@functools.cache
def samples(kind, sampler):
    labels = torch.arange(10).repeat(20)
    ours = world(kind, sampler)
    return sample(ours, ours.start(200, chance(1)), chance(2), labels), labels


@pytest.mark.parametrize(("kind", "sampler"), [("eps", "ode"), ("eps", "ancestral"), ("flow", "euler")])
def test_samples_are_the_digits_that_were_asked_for(kind, sampler):
    x, labels = samples(kind, sampler)
    for name in digit_models.CLASSIFIERS:
        assert (classifier(name)(x).argmax(1) == labels).double().mean() >= 0.97
    judge = classifier()
    # controls: pure noise, and the same samples under the wrong labels
    assert (judge(normals(0, 200)[0]).argmax(1) == labels).double().mean() < 0.3
    assert (judge(x).argmax(1) == labels.roll(1)).double().mean() < 0.1


@pytest.mark.parametrize(("kind", "sampler"), [("eps", "ancestral"), ("flow", "euler")])
def test_samples_vary_as_the_digits_do(kind, sampler):
    """Within each class: the mean image and the total variance of the samples are those of the data."""
    x, labels = samples(kind, sampler)
    images, truth = load_images("train")
    gap, ratio = [], []
    for digit in range(10):
        ours, data = x[labels == digit].flatten(1), images[truth == digit].flatten(1)
        gap.append((ours.mean(0) - data.mean(0)).square().sum() / data.var(0).sum())
        ratio.append(ours.var(0).sum() / data.var(0).sum())
    # 20 samples: the mean is off by 1/20 of the variance by chance alone
    assert torch.stack(gap).mean() < 0.15
    assert 0.75 < torch.stack(ratio).mean() < 1.25
    # control: copies of each class's mean image satisfy any classifier and have no variance at all
    collapsed = torch.stack([images[truth == digit].mean(0) for digit in range(10)])
    assert (classifier()(collapsed).argmax(1) == torch.arange(10)).all()


def test_the_classifiers_know_held_out_digits_and_were_trained_on_different_ones():
    images, labels = load_images("test")
    for name in digit_models.CLASSIFIERS:
        assert (classifier(name)(images).argmax(1) == labels).double().mean() > 0.97
    first, second = (load_images(name)[0].flatten(1) for name in digit_models.CLASSIFIERS)
    assert torch.cdist(first, second).min() > 0 and len(first) == len(second) == 750
    assert torch.cdist(load_images("train")[0].flatten(1), images.flatten(1)).min() > 0
    x = images[:4].clone().requires_grad_()
    classifier()(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_images_are_between_minus_one_and_one():
    for part, n in {"train": 1500, "test": 297}.items():
        images, labels = load_images(part)
        assert images.shape == (n, 1, 8, 8) and labels.shape == (n,)
        assert images.min() == -1 and images.max() == 1
        assert set(labels.tolist()) == set(range(10))
    with pytest.raises(ValueError, match="unknown part"):
        load_images("validation")


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_steps_of_their_own_change_nothing(kind):
    ours, small = world(kind, dtype=torch.float64), digits(kind, dtype=torch.float64, chunk=3)
    x = ours.start(7, chance())
    i = torch.tensor([50, 1, 25, 25, 7, 50, 1])
    labels = torch.arange(7)
    together = small.predict(x, i, labels)
    assert torch.allclose(together, ours.predict(x, i, labels), atol=1e-12, rtol=0)
    alone = torch.cat([ours.predict(x[k : k + 1], int(i[k]), k) for k in range(7)])
    assert torch.allclose(together, alone, atol=1e-12, rtol=0)


def test_calls_are_counted_one_a_particle_and_two_when_guided():
    ours = digits("flow", steps=4, chunk=2)
    x = ours.start(5, chance())
    ours.predict(x, 4, 1)
    assert ours.calls == 5
    Guided(ours, 2.0).predict(x, 4, 1)
    assert ours.calls == 15 and Guided(ours, 2.0).cost == 2


def test_guidance_makes_the_classifier_surer():
    labels = torch.arange(10).repeat(6)
    judge = classifier("gold")
    ours = digits("eps", steps=20)
    sure = {}
    for scale in (0.0, 0.5, 1.0):  # beyond one it is as sure as can be
        x = sample(Guided(ours, scale), ours.start(60, chance(3)), chance(4), labels)
        sure[scale] = judge(x).log_softmax(1)[torch.arange(60), labels].mean()
    assert sure[0.0] < -1 and sure[0.0] + 1 < sure[0.5] < sure[1.0] and -0.5 < sure[1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_reward_reaches_the_particles(kind):
    ours = world(kind, dtype=torch.float64)
    judge = classifier(dtype=torch.float64)
    x = ours.renoise(load_images("test")[0][:3].double(), 0, 25, chance())

    def reward(x):
        return judge(ours.clean(x, ours.predict(x, 25), 25)).log_softmax(1)[:, 3]

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(leaf).sum(), leaf)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    measured = (reward(x + 1e-6 * direction) - reward(x - 1e-6 * direction)) / 2e-6
    assert torch.allclose((gradient * direction).flatten(1).sum(1), measured, rtol=1e-5, atol=1e-7)


def test_loading_draws_no_global_random_numbers():
    before = torch.get_rng_state()
    digits("eps")
    classifier()
    assert torch.equal(before, torch.get_rng_state())


# -------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", WEIGHTS)
def test_files_are_small_and_have_their_record(name):
    folder = MODELS / f"digits-{name}"
    record = json.loads((folder / RECORD).read_text())
    assert (folder / WEIGHTS[name]).stat().st_size < 3_000_000
    assert record["command"].startswith(f"python -m tiltlib.worlds.train_digits {name} --seed {record['seed']}")
    losses = record["loss_each_100_steps"]
    assert len(losses) == record["steps"] // 100 and losses[-1] < losses[0]
    assert record["sha256"][WEIGHTS[name]] == digit_models.file_hash(folder / WEIGHTS[name])


def load(name, folder):
    return classifier(name, folder=folder) if name in digit_models.CLASSIFIERS else digits(name, folder=folder)


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_and_altered_files_are_refused(name, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODELS / f"digits-{name}", folder)
    load(name, folder)  # the copy itself is fine
    weights = folder / WEIGHTS[name]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="altered"):
        load(name, folder)
    os.remove(weights)
    with pytest.raises(FileNotFoundError, match=f"train_digits {name}"):
        load(name, folder)
    os.remove(folder / RECORD)
    with pytest.raises(FileNotFoundError, match=r"training\.json"):
        load(name, folder)


def test_bad_input_is_refused():
    for given, words in [
        ({"kind": "vp"}, "unknown kind"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"steps": 651}, "larger than .* 650"),
        ({"steps": 2.0}, "steps"),
        ({"sampler": "nonsense"}, "unknown sampler"),
        ({"sampler": "flow_grpo"}, "time derivatives"),  # a flow SDE on the tables of a DDPM
        ({"chunk": 0}, "chunk"),
        ({"device": "nonsense"}, "unknown device"),
    ]:
        with pytest.raises(ValueError, match=words):
            digits(**given)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            digits(device="cuda")
    with pytest.raises(ValueError, match="unknown classifier"):
        classifier("nonsense")


def test_bad_particles_steps_and_conditions_are_refused():
    ours = world("eps")
    x = ours.start(4, chance())
    for condition in (10, -1, torch.tensor([0, 1, 2, 10]), [1, 2], torch.zeros(4), "seven", 1.5, True):
        with pytest.raises(ValueError, match="condition"):
            ours.predict(x, 3, condition)
    for i in (0, 51, -1):
        with pytest.raises(ValueError, match="step"):
            ours.predict(x, i)
    with pytest.raises(ValueError, match=r"\(n, 1, 8, 8\)"):
        ours.predict(x[:, 0], 3)
    with pytest.raises(TypeError, match="float32"):
        ours.predict(x.double(), 3)


# ------------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("name", WEIGHTS)
def test_training_makes_a_folder_that_loads(name, tmp_path, capsys):
    from tiltlib.worlds import train_digits

    short = ["--steps", "2", *(["--finish", "1"] if name == "eps" else [])]
    train_digits.main([name, *short, "--seed", "5", "--out", str(tmp_path / "model")])
    assert "sha256" in capsys.readouterr().out
    load(name, tmp_path / "model")
    record = json.loads((tmp_path / "model" / RECORD).read_text())
    assert record["seed"] == 5 and record["steps"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_second_stage_starts_from_a_first_and_from_nothing_else(tmp_path, capsys):
    from tiltlib.worlds import train_digits

    with pytest.raises(ValueError, match="second stage already"):
        train_digits.main(
            ["eps", "--finish", "1", "--resume", str(MODELS / "digits-eps"), "--out", str(tmp_path / "a")]
        )
    for wrong in (["flow", "--finish", "1"], ["eps", "--finish", "0"], ["eps", "--steps", "2", "--resume", "here"]):
        with pytest.raises(SystemExit):
            train_digits.main([*wrong, "--out", str(tmp_path / "a")])
    assert not (tmp_path / "a").exists()
    first = tmp_path / "first"
    shutil.copytree(MODELS / "digits-eps", first)
    record = json.loads((first / RECORD).read_text())
    (first / RECORD).write_text(json.dumps({key: value for key, value in record.items() if key != "finish"}))
    train_digits.main(["eps", "--finish", "1", "--resume", str(first), "--out", str(tmp_path / "a")])
    made = json.loads((tmp_path / "a" / RECORD).read_text())
    assert made["resumed"]["sha256"] == record["sha256"] != made["sha256"]
    assert made["steps"] == record["steps"] and made["finish"]["steps"] == 1
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "a").rglob("*.json"))
    # regression: the pipeline once forgot the length of the chain when it was saved
    assert digits("eps", folder=tmp_path / "a").grid.alpha[-1] > 0.117


def test_the_kept_chain_is_the_beginning_of_the_whole_one():
    from diffusers import DDPMScheduler

    from tiltlib.worlds import train_digits

    kept, whole = train_digits.ddim(train_digits.KEPT).betas, DDPMScheduler().betas
    assert len(kept) == 650 and (kept - whole[:650]).abs().max() < 1e-8
    alpha, sigma = train_digits.chain(650)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(650)) and 0.117 < alpha[-1] < 0.118
