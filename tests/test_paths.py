"""Paths, conversions, reverse steps and kernels, against diffusers, autograd, scipy and torch.distributions."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltlib import paths
from tiltlib.chance import Chance
from tiltlib.worlds.base import Diffusion

PATHS = sorted(paths.PATHS)
KINDS = ["ancestral", "ode", "sde_dpmsolver", "flow_grpo", "dance_grpo", "memoryless", "euler"]


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chance(seed=0):
    return Chance(torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- paths and grids


@pytest.mark.parametrize("name", PATHS)
def test_a_path_starts_at_the_data_and_time_inverts_its_noise(name):
    path, t = paths.PATHS[name], torch.linspace(0, 1, 41, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    assert alpha[0] == 1 and sigma[0] == 0
    np.testing.assert_allclose(path.time(sigma / alpha), t, atol=1e-9)
    if name.startswith("vp"):
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-14)


def test_paths_have_their_published_values():
    s = np.array([0.3, 0.85])
    t = torch.from_numpy(s)
    np.testing.assert_allclose(paths.vp_linear().alpha(t), np.exp(-0.25 * s**2 * 19.9 - 0.5 * s * 0.1), rtol=1e-14)
    cosine = np.cos((s + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    np.testing.assert_allclose(paths.vp_cosine().alpha(t), cosine, rtol=1e-13)
    np.testing.assert_allclose(paths.ve(0.01, 50).sigma(t), np.sqrt((0.01 * 5000**s) ** 2 - 0.01**2), rtol=1e-13)
    np.testing.assert_array_equal(paths.rectified().sigma(t), t)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_and_g_against_finite_differences(name):
    path, on, h = paths.PATHS[name], paths.grid(name, 10, start=0.95), 1e-6
    t = on.t[1:]
    for function, table in ((path.alpha, on.d_alpha), (path.sigma, on.d_sigma)):
        np.testing.assert_allclose(table[1:], (function(t + h) - function(t - h)) / (2 * h), rtol=1e-7, atol=1e-8)
    # g^2 = d sigma^2 / dt - 2 f sigma^2
    slope = (path.sigma(t + h) ** 2 - path.sigma(t - h) ** 2) / (2 * h)
    f = (torch.log(path.alpha(t + h)) - torch.log(path.alpha(t - h))) / (2 * h)
    np.testing.assert_allclose(on.diffusion_squared()[1:], slope - 2 * f * on.sigma[1:] ** 2, rtol=1e-6)


def test_grids():
    on = paths.grid("rectified", 4)
    np.testing.assert_array_equal(on.t, [0, 0.25, 0.5, 0.75, 1])
    assert on.steps == 4
    np.testing.assert_allclose(paths.grid("rectified", 4, start=0.8, end=0.2).t, [0.2, 0.35, 0.5, 0.65, 0.8])
    np.testing.assert_allclose(paths.grid("ve", 2, warp=paths.shift(3.0)).t, [0, 0.75, 1])
    np.testing.assert_allclose(paths.grid("vp_cosine", times=[0, 0.1, 0.7]).t, [0, 0.1, 0.7])
    assert paths.grid("vp_cosine", 3).alpha[-1] == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: paths.grid("vp", 10),
        lambda: paths.grid("rectified", 0),
        lambda: paths.grid("rectified", 2.0),
        lambda: paths.grid("rectified"),
        lambda: paths.grid("rectified", 2, times=[0, 0.5, 1]),
        lambda: paths.grid("rectified", True),
        lambda: paths.grid("rectified", 3, start=1.2),
        lambda: paths.grid("rectified", 3, start=0.2, end=0.3),
        lambda: paths.grid("rectified", times=[0, 0.5, 0.4]),
        lambda: paths.grid("rectified", times=[0, 0.5, math.nan]),
        lambda: paths.grid("rectified", 4, warp=lambda u: 1 - u),
        lambda: paths.tables([1.0, 0.5], [0.0]),
        lambda: paths.tables([1.0, 0.5, 0.6], [0.0, 0.5, 0.5]),
        lambda: paths.tables([1.0, -0.5], [0.0, 0.5]),
        lambda: paths.vp_linear(2.0, 1.0),
        lambda: paths.ve(0.0, 1.0),
        lambda: paths.vp_cosine(-0.1),
        lambda: paths.shift(0.0),
        lambda: paths.coefficients(paths.grid("rectified", 3), "heun"),
        lambda: paths.ddim(1.01),
        lambda: paths.ddim(-0.01),
        lambda: paths.ddim(math.nan),
        lambda: paths.flow_grpo(-1.0),
        lambda: paths.coefficients(paths.grid("rectified", 3), paths.flow_sde(-0.3)),
        lambda: paths.coefficients(paths.grid("rectified", 3), paths.flow_sde(lambda on: on.t[:2])),
        lambda: paths.coefficients(paths.tables([1.0, 0.5], [0.0, 0.5]), "flow_grpo"),
        lambda: paths.basis(paths.grid("rectified", 3), "noise"),
        lambda: paths.basis(paths.tables([1.0, 0.5], [0.0, 0.5]), "velocity"),
        lambda: paths.interpolant("vp_linear", paths.grid("rectified", 3)),
        lambda: Diffusion(paths.grid("rectified", 3), steps=3),
        lambda: Diffusion("rectified", steps=-3),
    ],
)
def test_bad_schedules_are_value_errors(call):
    with pytest.raises(ValueError):
        call()


def test_wrong_types_are_type_errors():
    with pytest.raises(TypeError):
        paths.grid(3, 10)
    with pytest.raises(TypeError):
        paths.coefficients(paths.grid("ve", 3), 0.5)
    x = normals(2, 3)
    for i in (1.0, True, torch.tensor([1.0, 2.0]), torch.ones(2, 2, dtype=torch.long)):
        with pytest.raises(TypeError):
            paths.at(torch.arange(4.0), i, x)


# ----------------------------------------------------------------------------------------------------- conversions


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(PATHS), st.sampled_from(paths.PREDICTIONS), st.sampled_from(paths.PREDICTIONS), st.integers(1, 9)
)
def test_conversions_agree_with_the_definitions(name, source, target, i):
    """From one x_0 and eps, every prediction of a known x_0 is its definition; kappa is the change of score."""
    on, x0, eps = paths.grid(name, 10), normals(4, 3), normals(4, 3, seed=1)
    alpha, sigma = on.alpha[i], on.sigma[i]
    x = alpha * x0 + sigma * eps
    defined = {
        "x0": x0,
        "epsilon": eps,
        "score": -eps / sigma,  # of the Gaussian p(x_t | x_0)
        "velocity": on.d_alpha[i] * x0 + on.d_sigma[i] * eps,
        "v_prediction": alpha * eps - sigma * x0,
    }
    scale = sum(v.abs().max() for v in defined.values())
    got = paths.convert(on, defined[source], x, i, source, target)
    gain = float(paths.conversion(on, source, target)[0][i])
    assert (got - defined[target]).abs().max() <= 1e-14 * (1 + abs(gain)) * (scale + x.abs().max() / sigma)
    kappa = paths.basis(on, source)[2][i]
    np.testing.assert_allclose(kappa, paths.conversion(on, source, "score")[0][i], rtol=1e-12)


def test_kappa_of_the_published_cases():
    on = paths.grid("rectified", 8)
    np.testing.assert_allclose(paths.basis(on, "velocity")[2][1:], -(1 - on.t[1:]) / on.t[1:], atol=1e-15)
    vp = paths.grid("vp_linear", 8)
    np.testing.assert_allclose(paths.basis(vp, "velocity")[2][1:], -2 / vp.diffusion_squared()[1:], rtol=1e-12)
    np.testing.assert_allclose(paths.basis(vp, "epsilon")[2][1:], -1 / vp.sigma[1:], rtol=1e-15)
    np.testing.assert_allclose(paths.basis(vp, "v_prediction")[2][1:], -vp.alpha[1:] / vp.sigma[1:], rtol=1e-14)
    # the two velocities are different objects
    assert not np.allclose(paths.basis(vp, "v_prediction")[2][1:], paths.basis(vp, "velocity")[2][1:], rtol=0.1)


def test_a_rectified_velocity_tells_x0_at_pure_noise_and_epsilon_does_not():
    on, x, v = paths.grid("rectified", 4), normals(5, 2), normals(5, 2, seed=1)
    np.testing.assert_allclose(paths.convert(on, v, x, 4, "velocity", "x0"), x - v, atol=1e-15)
    for source in ("epsilon", "score"):
        with pytest.raises(ValueError, match="does not determine"):
            paths.convert(on, v, x, 4, source, "x0")
        with pytest.raises(ValueError, match="does not determine"):
            paths.convert(on, v, x, torch.tensor([1, 2, 3, 4, 4]), source, "x0")
    with pytest.raises(ValueError, match="does not determine"):
        paths.convert(on, v, x, 0, "x0", "epsilon")
    with pytest.raises(ValueError, match="shape"):
        paths.convert(on, v[:, :1], x, 1, "velocity", "x0")


def test_steps_may_differ_by_particle_and_are_checked():
    on, x, v = paths.grid("vp_linear", 6), normals(3, 2, 4), normals(3, 2, 4, seed=1)
    steps = torch.tensor([1, 5, 2])
    together = paths.convert(on, v, x, steps, "epsilon", "x0")
    apart = [paths.convert(on, v[k : k + 1], x[k : k + 1], int(i), "epsilon", "x0") for k, i in enumerate(steps)]
    np.testing.assert_allclose(together, torch.cat(apart), rtol=1e-14)
    for same in (2, torch.tensor(2), torch.tensor(2).expand(3), torch.tensor([2, 2, 2])):
        assert paths.at(on.alpha, same, x) == float(on.alpha[2])
    with pytest.raises(ValueError, match="do not fit"):
        paths.at(on.alpha, torch.tensor([1, 2]), x)
    for outside in (-1, 7, torch.tensor([1, 2, 7]), torch.tensor([-1, 0, 1])):
        with pytest.raises(ValueError, match="outside the grid"):
            paths.at(on.alpha, outside, x)


def test_interpolant_is_the_published_change_of_velocity():
    """Ask a rectified model along VP: the x_0 route equals (c'/c) x + c t' u(x / c) for a velocity u that is known."""
    mean, spread = 1.3, 0.4  # the model: x_0 ~ N(mean, spread), whose velocity is known on any path

    def posterior_mean(x, alpha, sigma):
        return mean + alpha * spread / (alpha**2 * spread + sigma**2) * (x - alpha * mean)

    on = paths.grid("vp_linear", 7)
    t, scale = paths.interpolant("rectified", on)
    x = normals(1).expand(8) + 0.7
    clean = posterior_mean(scale * x, 1 - t, t)
    np.testing.assert_allclose(clean[1:], posterior_mean(x, on.alpha, on.sigma)[1:], rtol=1e-12)
    u = (scale * x - clean) / t  # rectified velocity at the model's own point and time
    c, rho = 1 / scale, on.sigma / on.alpha
    d_rho = (on.d_sigma - rho * on.d_alpha) / on.alpha
    d_t = d_rho / (1 + rho) ** 2  # t = rho / (1 + rho)
    d_c = on.d_alpha + on.d_sigma  # c = alpha + sigma on the way from x / c = (1 - t) x_0 + t eps
    got = d_c / c * x + c * d_t * u
    expected = (on.d_alpha - on.alpha * on.d_sigma / on.sigma) * clean + on.d_sigma / on.sigma * x
    np.testing.assert_allclose(got[1:], expected[1:], rtol=1e-9)
    same_t, same_scale = paths.interpolant("rectified", paths.grid("rectified", 5))
    np.testing.assert_allclose(same_t, paths.grid("rectified", 5).t, atol=1e-15)
    np.testing.assert_allclose(same_scale, 1, atol=1e-15)


# ------------------------------------------------------------------------------------------ samplers, by diffusers

CONFIG = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def exact_tables(scheduler):
    """Replace the scheduler's float32 tables by the same tables in float64; returns alpha_bar."""
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    assert (scheduler.betas.double() - betas).abs().max() < 1e-8
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler.alphas_cumprod


def step(on, sampler, out, x, z, i, prediction="epsilon"):
    """One step down with the noise z given, through the production kernel."""
    world = Diffusion(on, sampler, prediction=prediction)
    kernel = world.kernel(x, out, i)
    return kernel.mean + kernel.std * z


def test_ancestral_is_diffusers_ddpm():
    scheduler = DDPMScheduler(**CONFIG, clip_sample=False)
    alpha_bar = exact_tables(scheduler)
    scheduler.set_timesteps(20)
    used = scheduler.timesteps.flip(0)
    on = paths.tables([1, *alpha_bar[used].sqrt()], [0, *(1 - alpha_bar[used]).sqrt()])
    x, out = normals(3, 2, 4, 4), normals(3, 2, 4, 4, seed=1)
    for i in (20, 11, 2, 1):
        generator = torch.Generator().manual_seed(5)
        theirs = scheduler.step(out, int(used[i - 1]), x, generator=generator).prev_sample
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        np.testing.assert_allclose(step(on, "ancestral", out, x, z, i), theirs, atol=1e-12)
        assert (step(on, paths.ddim(0.9), out, x, z, i) - theirs).abs().max() > 1e-4 or i == 1


@pytest.mark.parametrize(
    "prediction, theirs", [("epsilon", "epsilon"), ("v_prediction", "v_prediction"), ("x0", "sample")]
)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_diffusers_ddim(eta, prediction, theirs):
    scheduler = DDIMScheduler(**CONFIG, clip_sample=False, prediction_type=theirs)
    alpha_bar = exact_tables(scheduler)
    scheduler.set_timesteps(25)
    used = scheduler.timesteps.flip(0)
    on = paths.tables([1, *alpha_bar[used].sqrt()], [0, *(1 - alpha_bar[used]).sqrt()])
    x, out, z = (normals(3, 2, 4, 4, seed=s) for s in range(3))
    for i in (25, 12, 2, 1):
        expected = scheduler.step(out, int(used[i - 1]), x, eta=eta, variance_noise=z).prev_sample
        np.testing.assert_allclose(step(on, paths.ddim(eta), out, x, z, i, prediction), expected, atol=1e-12)


def test_sde_dpmsolver_is_diffusers_and_is_ancestral():
    scheduler = DPMSolverMultistepScheduler(**CONFIG, algorithm_type="sde-dpmsolver++", solver_order=1)
    alpha_bar = exact_tables(scheduler)
    scheduler.set_timesteps(16)
    used = scheduler.timesteps.flip(0)
    scheduler.sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt()[scheduler.timesteps], torch.zeros(1).double()])
    on = paths.tables([1, *alpha_bar[used].sqrt()], [0, *(1 - alpha_bar[used]).sqrt()])
    x, out, z = (normals(3, 2, 4, 4, seed=s) for s in range(3))
    for i in (16, 9, 2, 1):
        scheduler._step_index = 16 - i
        clean = scheduler.convert_model_output(out, sample=x)
        expected = scheduler.dpm_solver_first_order_update(clean, sample=x, noise=z)  # `step` would round x to float32
        np.testing.assert_allclose(step(on, "sde_dpmsolver", out, x, z, i), expected, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_sde_dpmsolver_is_ancestral_on_every_path(name):
    on = paths.grid(name, 20)
    ours, ancestral = (paths.coefficients(on, s) for s in ("sde_dpmsolver", "ancestral"))
    for a, b in zip(ours[:3], ancestral[:3], strict=True):
        np.testing.assert_allclose(a[1:], b[1:], rtol=1e-12, atol=1e-15)


def test_euler_is_diffusers_flow_match_euler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    on = paths.grid("rectified", 12, warp=paths.shift(3.0))
    np.testing.assert_allclose(scheduler.sigmas.flip(0), on.t, atol=1e-7)  # theirs are float32
    scheduler.sigmas = on.t.flip(0)
    x = normals(3, 2, 4, 4).float()  # representable, so that the scheduler's cast to float32 rounds nothing
    out = normals(3, 2, 4, 4, seed=1)
    for i in (12, 7, 1):
        scheduler._step_index = 12 - i
        expected = scheduler.step(out, scheduler.timesteps[12 - i], x).prev_sample
        for sampler in ("euler", "ode"):  # on the rectified flow the two are one
            got = step(on, sampler, out, x.double(), 0.0, i, "velocity")
            np.testing.assert_allclose(got, expected, atol=1e-12)


# --------------------------------------------------------------------------------------- samplers, by their algebra


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sampler", KINDS)
def test_mean_by_score_is_mean_by_clean(name, sampler):
    on = paths.grid(name, 12, start=0.97)
    k = paths.coefficients(on, sampler)
    x, clean = 0.3, -1.1
    score = (on.alpha * clean - x) / on.sigma**2
    np.testing.assert_allclose((k.a * x + k.c * score)[1:], (k.x * x + k.x0 * clean)[1:], rtol=1e-9, atol=1e-10)
    assert torch.isnan(torch.stack(k)[:, 0]).all()


def test_published_coefficients():
    """The closed forms of DDPM, and of the Euler flow SDE on the rectified flow, in terms of the score."""
    vp = paths.grid("vp_linear", 15)
    k, ratio = paths.coefficients(vp, "ancestral"), (vp.alpha[1:] / vp.alpha[:-1]) ** 2
    np.testing.assert_allclose(k.a[1:], ratio**-0.5, rtol=1e-12)
    np.testing.assert_allclose(k.c[1:], (1 - ratio) / ratio.sqrt(), rtol=1e-9)
    np.testing.assert_allclose(k.std[1:] ** 2, (vp.sigma[:-1] / vp.sigma[1:]) ** 2 * (1 - ratio), rtol=1e-9, atol=1e-16)
    rf = paths.grid("rectified", 15, start=0.96)
    t, dt = rf.t[1:], rf.t.diff()
    for sampler, level in (
        ("flow_grpo", 0.7 * (t / (1 - t)).sqrt()),
        ("dance_grpo", torch.full_like(t, 0.3)),
        ("memoryless", (2 * t / (1 - t)).sqrt()),
        (paths.flow_sde(lambda on: 3 * on.t**2), 3 * t**2),
    ):
        k = paths.coefficients(rf, sampler)
        np.testing.assert_allclose(k.std[1:] ** 2, level**2 * dt, rtol=1e-12)
        np.testing.assert_allclose(k.a[1:], 1 + dt / (1 - t), rtol=1e-11)
        np.testing.assert_allclose(k.c[1:], dt * (t / (1 - t) + level**2 / 2), rtol=1e-11)
        # in network form: x (1 - level^2 dt / 2t) - v (1 + level^2 (1 - t) / 2t) dt
        world = Diffusion(rf, sampler, prediction="velocity")
        x, v = normals(1, 3), normals(1, 3, seed=1)
        for i in (1, 8, 15):
            s2, ti, di = level[i - 1] ** 2, t[i - 1], dt[i - 1]
            expected = x * (1 - s2 * di / (2 * ti)) - v * (1 + s2 * (1 - ti) / (2 * ti)) * di
            np.testing.assert_allclose(world.kernel(x, v, i).mean, expected, rtol=1e-10, atol=1e-12)
    k = paths.coefficients(rf, "flow_grpo")
    np.testing.assert_allclose((k.std**2 / k.c)[1:], 0.49 / (1 + 0.245), rtol=1e-10)


def test_flow_grpo_at_pure_noise_borrows_the_second_step():
    on = paths.grid("rectified", 10)
    k = paths.coefficients(on, "flow_grpo")
    assert k.std[10] == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1), rel=1e-12)
    assert k.std[9] == pytest.approx(0.7 * math.sqrt(0.9 / 0.1) * math.sqrt(0.1), rel=1e-12)
    assert torch.isinf(k.a[10])  # the score no longer tells the mean, the clean prediction does
    assert torch.isfinite(k.x[10] + k.x0[10])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(PATHS), st.floats(0, 1), st.integers(1, 10))
def test_ddim_keeps_the_marginals_for_a_fixed_x0(name, eta, i):
    on = paths.grid(name, 10)
    k = paths.coefficients(on, paths.ddim(eta))
    assert k.x[i] * on.alpha[i] + k.x0[i] == pytest.approx(float(on.alpha[i - 1]), rel=1e-12)
    assert (k.x[i] * on.sigma[i]) ** 2 + k.std[i] ** 2 == pytest.approx(float(on.sigma[i - 1] ** 2), rel=1e-12)


def second_moment_error(sampler, steps, start=0.9):
    """Run x_0 ~ N(0, 1/4) down exactly (a linear recursion for the variance) and compare the variance at the end."""
    on, spread = paths.grid("rectified", steps, start=start, end=0.02), 0.25
    k = paths.coefficients(on, sampler)
    variance = on.alpha[-1] ** 2 * spread + on.sigma[-1] ** 2
    for i in range(steps, 0, -1):
        gain = on.alpha[i] * spread / (on.alpha[i] ** 2 * spread + on.sigma[i] ** 2)
        variance = (k.x[i] + k.x0[i] * gain) ** 2 * variance + k.std[i] ** 2
    return abs(float(variance - on.alpha[0] ** 2 * spread - on.sigma[0] ** 2))


@pytest.mark.parametrize("sampler", ["flow_grpo", "dance_grpo", "memoryless", "euler"])
def test_the_flow_sde_keeps_the_marginals_to_first_order(sampler):
    coarse, fine = second_moment_error(sampler, 400), second_moment_error(sampler, 800)
    assert fine < 2e-2 and coarse / fine == pytest.approx(2, abs=0.15)

    def half(on):  # the drift of one diffusion coefficient with the noise of another: not the flow's marginals
        x, x0, std = paths.SAMPLERS["dance_grpo"](on)
        return x, x0, 2 * std

    assert second_moment_error(half, 800) > 5 * second_moment_error("dance_grpo", 100)


def test_std_squared_over_c_tends_to_one_only_for_the_ancestral_sde():
    def worst(sampler, steps):
        k = paths.coefficients(paths.grid("rectified", steps, start=0.9, end=0.3), sampler)
        return float((k.std**2 / k.c - 1)[1:].abs().max())

    assert worst("ancestral", 400) < 0.02 and worst("ancestral", 20) > 10 * worst("ancestral", 400)
    assert worst("memoryless", 20) < 1e-12  # c is g^2 times the step by construction
    for sampler in ("flow_grpo", "dance_grpo", paths.ddim(0.5)):
        assert worst(sampler, 400) > 0.3


# --------------------------------------------------------------------------------------------------------- kernels


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.floats(0.01, 3), st.integers(0, 10**6))
def test_a_gaussian_tilt_is_exact(n, m, std, seed):
    """log p - log q of the children equals the two log-densities of torch.distributions, and the tilt is e^<g, x'>."""
    mean, g = normals(n, 2, 3, seed=seed), normals(n, 2, 3, seed=seed + 1)
    kernel = paths.GaussianKernel(mean, std)
    tilted = kernel.tilt(0.4 * g).tilt(0.6 * g)
    x, log_ratio = tilted.sample(m, chance(seed))
    assert x.shape == (n, m, 2, 3)
    p = torch.distributions.Normal(mean[:, None], std)
    q = torch.distributions.Normal((mean + std**2 * g)[:, None], std)
    expected = (p.log_prob(x) - q.log_prob(x)).sum((2, 3))
    np.testing.assert_allclose(log_ratio, expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(kernel.log_prob(x) - tilted.log_prob(x), expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(kernel.log_prob(x[:, 0]), p.log_prob(x).sum((2, 3))[:, 0], rtol=1e-10)
    # q / p is exp <g, x'> over its mean exp(<g, mean> + std^2 |g|^2 / 2)
    growth = (g[:, None] * x).sum((2, 3)) - ((g * mean).sum((1, 2)) + std**2 * (g**2).sum((1, 2)) / 2)[:, None]
    np.testing.assert_allclose(-log_ratio, growth, rtol=1e-8, atol=1e-9)


def test_a_gaussian_kernel_has_its_moments():
    n = 200_000
    mean, g, std = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), torch.tensor([[2.0, 0.0, -3.0]]).double(), 0.7
    x, log_ratio = paths.GaussianKernel(mean, std).tilt(g).sample(n, chance(3))
    se = std / math.sqrt(n)
    assert ((x[0].mean(0) - (mean[0] + 0.49 * g[0])).abs() < 4 * se).all()
    assert (x[0].mean(0) - mean[0]).abs().max() > 100 * se  # the untilted mean is rejected
    assert ((x[0].var(0) - 0.49).abs() < 4 * 0.49 * math.sqrt(2 / n)).all()
    weighted = (log_ratio[0].exp()[:, None] * x[0]).mean(0)  # importance weights undo the tilt
    spread = (log_ratio[0].exp()[:, None] * x[0]).std(0) / math.sqrt(n)
    assert ((weighted - mean[0]).abs() < 4 * spread).all()


def test_untilted_and_deterministic_kernels():
    mean, g = normals(3, 2), normals(3, 2, seed=1)
    x, log_ratio = paths.GaussianKernel(mean, 0.5).sample(4, chance())
    assert (log_ratio == 0).all() and log_ratio.shape == (3, 4)
    still = paths.GaussianKernel(mean, 0.0).tilt(g)
    x, log_ratio = still.sample(4, chance())
    assert (x == mean[:, None]).all() and (log_ratio == 0).all()
    with pytest.raises(ValueError, match="no density"):
        still.log_prob(mean)


def test_std_may_differ_by_particle():
    mean, g, std = normals(3, 2, 2), normals(3, 2, 2, seed=1), torch.tensor([0.0, 0.4, 1.5]).double()[:, None, None]
    x, log_ratio = paths.GaussianKernel(mean, std).tilt(g).sample(5, chance())
    assert (x[0] == mean[0]).all() and (log_ratio[0] == 0).all()
    p, q = (torch.distributions.Normal(mu[1:, None], std[1:, None]) for mu in (mean, mean + std**2 * g))
    np.testing.assert_allclose(log_ratio[1:], (p.log_prob(x[1:]) - q.log_prob(x[1:])).sum((2, 3)), atol=1e-12)
    kernel = paths.GaussianKernel(mean[1:], std[1:])
    np.testing.assert_allclose(kernel.log_prob(x[1:]), p.log_prob(x[1:]).sum((2, 3)), atol=1e-12)
    flat = paths.GaussianKernel(mean[1:, 0, 0], std[1:, 0, 0])  # particles that are single numbers
    np.testing.assert_allclose(flat.log_prob(x[1:, 0, 0, 0]), flat.log_prob(x[1:, :, 0, 0])[:, 0], atol=1e-14)
    assert flat.tilt(g[1:, 0, 0]).sample(3, chance())[1].shape == (2, 3)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_a_categorical_tilt_is_exact(n, m, seed):
    logits, g = normals(n, 2, 5, seed=seed), 2 * normals(n, 2, 5, seed=seed + 1)
    logits[:, :, 3] = -math.inf
    kernel = paths.CategoricalKernel(logits)
    tilted = kernel.tilt(0.4 * g).tilt(0.6 * g)
    x, log_ratio = tilted.sample(m, chance(seed))
    assert x.shape == (n, m, 2) and (x != 3).all()
    p = torch.distributions.Categorical(logits=logits[:, None])
    q = torch.distributions.Categorical(logits=(logits + g)[:, None])
    expected = (p.log_prob(x) - q.log_prob(x)).sum(2)
    np.testing.assert_allclose(log_ratio, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(tilted.log_prob(x), q.log_prob(x).sum(2), rtol=1e-10)
    np.testing.assert_allclose(kernel.log_prob(x[:, 0]), p.log_prob(x).sum(2)[:, 0], rtol=1e-10)


def test_a_categorical_kernel_has_its_frequencies():
    n, logits, g = 100_000, torch.tensor([[0.1, -1.0, 0.7]]).double(), torch.tensor([[0.0, 2.0, -1.0]]).double()
    x, _ = paths.CategoricalKernel(logits).tilt(g).sample(n, chance(1))
    expected, wrong = (logits + g).softmax(-1)[0], logits.softmax(-1)[0]
    counts, tolerance = torch.bincount(x[0], minlength=3) / n, 4 * (expected * (1 - expected) / n).sqrt()
    assert ((counts - expected).abs() < tolerance).all()
    assert ((counts - wrong).abs() > 2 * tolerance).any()
    certain = paths.CategoricalKernel(torch.tensor([[-math.inf, 0.0, -math.inf]])).tilt(
        torch.tensor([[9.0, -9.0, 1.0]])
    )
    x, log_ratio = certain.sample(6, chance())
    assert (x == 1).all() and (log_ratio == 0).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: paths.GaussianKernel(normals(2, 3), -0.1),
        lambda: paths.GaussianKernel(normals(2, 3), math.nan),
        lambda: paths.GaussianKernel(normals(2, 3), torch.tensor([[0.1], [-0.1]])),
        lambda: paths.GaussianKernel(normals(2, 3), torch.ones(2)),
        lambda: paths.GaussianKernel(normals(2, 3), 0.1).tilt(normals(2, 1)),
        lambda: paths.GaussianKernel(normals(2, 3), 0.1).log_prob(normals(3)),
        lambda: paths.CategoricalKernel(torch.full((2, 3), -math.inf)),
        lambda: paths.CategoricalKernel(torch.tensor([[0.0, math.nan]])),
        lambda: paths.CategoricalKernel(normals(2, 3)).tilt(normals(2, 1)),
        lambda: paths.CategoricalKernel(normals(2, 3)).log_prob(torch.zeros(3, dtype=torch.long)),
    ],
)
def test_bad_kernels_are_value_errors(call):
    with pytest.raises(ValueError):
        call()


# ---------------------------------------------------------------------------------------------------- the shared world


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(PATHS), st.sampled_from(KINDS), st.sampled_from(paths.PREDICTIONS), st.integers(1, 8))
def test_the_kernel_does_not_depend_on_what_is_predicted(name, sampler, prediction, i):
    on, x, clean = paths.grid(name, 8, start=0.9), normals(4, 3), normals(4, 3, seed=1)
    ours, other = Diffusion(on, sampler), Diffusion(on, sampler, prediction=prediction)
    out = paths.convert(on, clean, x, i, "x0", prediction)
    one, two = ours.kernel(x, clean, i), other.kernel(x, out, i)
    np.testing.assert_allclose(one.mean, two.mean, rtol=1e-7, atol=1e-8)
    assert one.std == two.std
    np.testing.assert_allclose(other.clean(x, out, i), clean, rtol=1e-7, atol=1e-8)


def test_a_kernel_with_a_step_per_particle():
    world, x, clean = Diffusion("vp_linear", "ancestral", 9), normals(3, 2), normals(3, 2, seed=1)
    steps = torch.tensor([9, 4, 1])
    kernel = world.kernel(x, clean, steps)
    for k, i in enumerate(steps.tolist()):
        alone = world.kernel(x[k : k + 1], clean[k : k + 1], i)
        np.testing.assert_allclose(kernel.mean[k : k + 1], alone.mean, rtol=1e-13)
        assert kernel.std[k].item() == pytest.approx(alone.std, rel=1e-14)
    for bad in (0, 10, torch.tensor([1, 2, 0])):
        with pytest.raises(ValueError):
            world.kernel(x, clean, bad)


@pytest.mark.parametrize("name", PATHS)
def test_renoising_leads_from_one_marginal_to_the_other(name):
    """x_2 = alpha x_0 + sigma z of known variance, renoised to 6: the variance is that of step 6, not any other."""
    world, n = Diffusion(name, steps=8), 200_000
    on, x0 = world.grid, 1.7
    low = on.alpha[1] * x0 + on.sigma[1] * normals(n, 1)
    high = world.renoise(low, 1, 3, chance(1))
    assert abs(float(high.mean() - on.alpha[3] * x0)) < 4 * float(on.sigma[3]) / math.sqrt(n)
    assert abs(float(high.var() / on.sigma[3] ** 2 - 1)) < 4 * math.sqrt(2 / n)
    assert abs(float(high.var() / on.sigma[2] ** 2 - 1)) > 8 * math.sqrt(2 / n)
    # it is x_1 that is noised, not x_0 afresh
    correlation = float(on.alpha[3] / on.alpha[1] * on.sigma[1] / on.sigma[3])
    assert (
        abs(float(torch.corrcoef(torch.cat([low, high], 1).T)[0, 1]) - correlation) < 4 / math.sqrt(n) < correlation / 2
    )
    mixed = world.renoise(low[:3], torch.tensor([1, 1, 8]), torch.tensor([1, 3, 8]), chance(1))
    assert mixed[0] == low[0] and mixed[2] == low[2] and mixed[1] != low[1]
    for i_from, i_to in ((3, 2), (2, 9), (-1, 2)):
        with pytest.raises(ValueError):
            world.renoise(low, i_from, i_to, chance())
