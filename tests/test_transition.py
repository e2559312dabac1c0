"""Transitions against stock schedulers, torch's Normal, and the released stochastic steps' formulas."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from toy import PROCESSES, exact_gaussian, variance_preserving

from diffalign.process import CLEAN, endpoints
from diffalign.sampling import ddim_stepper, draw, sample
from diffalign.transition import Gaussian, cps, dance_sde, ddim, flow_sde


def stock(kind: str, **options: object) -> DDIMScheduler:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              prediction_type=kind, steps_offset=1, set_alpha_to_one=False, **options)  # fmt: skip
    scheduler.set_timesteps(20)
    return scheduler


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim_step_is_stock(kind: str, eta: float) -> None:
    scheduler, process = stock(kind), PROCESSES["vp"]
    times = torch.cat([scheduler.timesteps.float(), torch.tensor([CLEAN])])
    x, y, noise = normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1), normal(2, 4, 8, 8, seed=2)
    for t, s in itertools.pairwise(times):
        now, then = (process.coefficients(v.expand(2)) for v in (t, s))
        law = ddim(endpoints(kind, y, x, *now), now, then, eta)
        expected = scheduler.step(y, int(t), x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(law.sample(noise), expected, rtol=2e-5, atol=2e-5)


def test_ddim_on_sigmas_is_the_stock_euler_step() -> None:
    """DDIM(0) is Euler of the variance-exploding form: same picture up to the factor sqrt(1 + sigma^2)."""
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       timestep_spacing="leading", steps_offset=1)  # fmt: skip
    scheduler.set_timesteps(20)
    process = variance_preserving(final=1.0)
    times = torch.cat([scheduler.timesteps.float(), torch.tensor([CLEAN])])
    x = normal(2, 4, 8, 8)
    stretched = x * (1 + scheduler.sigmas[0] ** 2).sqrt()
    for index, (t, s) in enumerate(itertools.pairwise(times)):
        y = normal(2, 4, 8, 8, seed=10 + index)
        now, then = (process.coefficients(v.expand(2)) for v in (t, s))
        x = ddim(endpoints("epsilon", y, x, *now), now, then).mean
        stretched = scheduler.step(y, scheduler.timesteps[index], stretched).prev_sample
        factor = (1 + scheduler.sigmas[index + 1] ** 2).sqrt()
        torch.testing.assert_close(x, stretched / factor, rtol=1e-4, atol=1e-4)


def test_ddim_on_a_flow_is_the_stock_flow_euler_step() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    process = PROCESSES["flow"]
    x = expected = normal(2, 4, 8, 8)
    for index in range(10):
        y = normal(2, 4, 8, 8, seed=10 + index)
        t, s = (scheduler.sigmas[i].expand(2) for i in (index, index + 1))
        now, then = process.coefficients(t), process.coefficients(s)
        x = ddim(endpoints("flow", y, x, *now), now, then).mean
        expected = scheduler.step(y, scheduler.timesteps[index], expected).prev_sample
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_eta_one_is_the_ancestral_posterior() -> None:
    """Ho et al. 2020, eq. 7: mean and variance of q(x_s | x_t, x0)."""
    process = PROCESSES["vp"]
    t, s = torch.tensor([500.0]), torch.tensor([450.0])
    (a_t, s_t), (a_s, s_s) = process.coefficients(t), process.coefficients(s)
    x, x0 = normal(1, 6), normal(1, 6, seed=1)
    law = ddim(endpoints("sample", x0, x, a_t, s_t), (a_t, s_t), (a_s, s_s), eta=1.0)
    ratio = (a_t / a_s) ** 2
    mean = a_s * (1 - ratio) / s_t**2 * x0 + ratio.sqrt() * s_s**2 / s_t**2 * x
    torch.testing.assert_close(law.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(law.std**2, s_s**2 / s_t**2 * (1 - ratio), rtol=1e-4, atol=1e-6)


def test_log_prob_is_the_mean_of_torchs_normal() -> None:
    law = Gaussian(normal(3, 4, 5), torch.tensor([0.1, 1.0, 3.0]))
    x = normal(3, 4, 5, seed=1)
    expected = torch.distributions.Normal(law.mean, law.std.view(3, 1, 1)).log_prob(x).mean((1, 2))
    torch.testing.assert_close(law.log_prob(x), expected)


def test_log_prob_gradient_reaches_the_mean_and_not_the_sample() -> None:
    mean, x = normal(2, 4).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    Gaussian(mean, torch.ones(2)).log_prob(x).sum().backward()
    assert mean.grad is not None and mean.grad.abs().sum() > 0
    assert x.grad is None


def test_flow_sde_is_the_released_formula() -> None:
    """Flow-GRPO: mu = x (1 + s^2 dt / 2t) + v (1 + s^2 (1 - t) / 2t) dt, std = s sqrt(-dt), s = a sqrt(t / (1 - t))."""
    t, s, level = 0.7, 0.6, 0.7
    x, v = normal(1, 6), normal(1, 6, seed=1)
    ends = endpoints("flow", v, x, torch.tensor([1 - t]), torch.tensor([t]))
    law = flow_sde(ends, x, torch.tensor([t]), torch.tensor([s]), level)
    g2, dt = level**2 * t / (1 - t), s - t
    torch.testing.assert_close(law.mean, x * (1 + g2 / (2 * t) * dt) + v * (1 + g2 * (1 - t) / (2 * t)) * dt)
    assert law.std.item() == pytest.approx(math.sqrt(g2 * -dt), rel=1e-5)


def test_flow_sde_is_finite_at_pure_noise() -> None:
    x = normal(1, 6)
    ends = endpoints("flow", normal(1, 6, seed=1), x, torch.zeros(1), torch.ones(1))
    law = flow_sde(ends, x, torch.ones(1), torch.tensor([0.95]), 0.7, t_max=0.95)
    assert law.mean.isfinite().all() and law.std.item() == pytest.approx(0.7 * math.sqrt(20 * 0.05), rel=1e-4)


def test_dance_sde_is_euler_minus_half_the_score() -> None:
    t, s, eta = torch.tensor([0.5]), torch.tensor([0.4]), 0.3
    x, v = normal(1, 6), normal(1, 6, seed=1)
    ends = endpoints("flow", v, x, 1 - t, t)
    score = -(x - (1 - t) * ends.x0) / t**2
    law = dance_sde(ends, x, t, s, eta)
    torch.testing.assert_close(law.mean, x + v * (s - t) - 0.5 * eta**2 * score * (s - t))


def test_cps_ends_without_noise() -> None:
    x = normal(1, 6)
    ends = endpoints("flow", normal(1, 6, seed=1), x, torch.tensor([0.9]), torch.tensor([0.1]))
    law = cps(ends, torch.tensor([0.1]), torch.zeros(1), 0.7)
    assert law.std.item() == 0
    torch.testing.assert_close(law.mean, ends.x0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_the_exact_law_gives_the_data(eta: float) -> None:
    """With the optimal predictor of N(2, 0.5^2), 200 steps from the law of x_T land on that of the data."""
    process = variance_preserving(final=1.0)
    policy = exact_gaussian(process, "epsilon", mean=2.0, std=0.5)
    times = torch.cat([torch.linspace(999, 0, 201).round(), torch.tensor([CLEAN])])
    generators = [torch.Generator().manual_seed(7)]
    alpha, sigma = process.coefficients(times[:1])
    x = alpha * 2.0 + (alpha**2 * 0.5**2 + sigma**2).sqrt() * draw((20_000,), [torch.Generator().manual_seed(1)])
    step = ddim_stepper(policy, process, "epsilon", {}, eta)
    x = sample(step, x, times, generators=generators).x
    assert x.mean().item() == pytest.approx(2.0, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)
