"""One sampling step as a Gaussian: the only place where a step towards (or away from) the picture is computed.

    x_s ~ N(mean, std^2)      s is the next time; std is one number per sample, 0 for a deterministic step

DDIM towards noise (s > t) is inversion; DDIM with eta = 0 on the coefficients of a rectified flow is the Euler step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.process import Endpoints, per_sample


@dataclass(frozen=True)
class Gaussian:
    """mean [B, ...] fp32 and std [B] fp32."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor | None) -> Tensor:
        """mean + std * noise; `noise` may be None when std is 0."""
        return self.mean if noise is None else self.mean + per_sample(self.std, self.mean) * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """[B]: log-density of x, the *mean* over its elements.

        The mean, not the sum, because every published clip range and beta assumes it (ddpo-pytorch and descendants).
        Not finite where std is 0: such a step has no density and must not be trained on.
        """
        std = per_sample(self.std, self.mean)
        density = -((x.detach().float() - self.mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        return density.flatten(1).mean(1)


Coefficients = tuple[Tensor, Tensor]


def ddim(ends: Endpoints, now: Coefficients, then: Coefficients, eta: float = 0.0) -> Gaussian:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12, for any (alpha, sigma); eta = 1 is the DDPM ancestral step.

    `now` and `then` are (alpha, sigma) [B] at t and s. std = eta * posterior std of the forward chain from s to t:
    std^2 = eta^2 (sigma_s / sigma_t)^2 (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = now, then
    variance = (sigma_s / sigma_t).square() * (sigma_t.square() - (alpha_t / alpha_s * sigma_s).square())
    # `eta and`: towards noise the expression is negative, and eta = 0 must not meet 0 * nan
    std = eta * variance.clamp(min=0).sqrt() if eta else torch.zeros_like(sigma_s)
    direction = (sigma_s.square() - std.square()).clamp(min=0).sqrt()
    x0, eps = ends
    return Gaussian(per_sample(alpha_s, x0) * x0 + per_sample(direction, eps) * eps, std)


def flow_sde(ends: Endpoints, x_t: Tensor, t: Tensor, s: Tensor, noise_level: float, t_max: float = 1.0) -> Gaussian:
    """Flow-GRPO's stochastic step on a rectified flow (arXiv 2505.05470, eq. 9), t > s in [0, 1], each [B].

    dt = s - t, v = eps - x0, g = noise_level * sqrt(t / (1 - t));
    mean = x (1 + g^2 dt / 2t) + v (1 + g^2 (1-t) / 2t) dt,  std = g sqrt(-dt).
    As released, 1 - t is taken at the second time of the grid when t = 1: pass it as `t_max`.
    """
    capped = torch.where(t >= 1, torch.full_like(t, t_max), t)
    g = noise_level * (t / (1 - capped)).sqrt()
    return _sde_step(ends, x_t, t, s, g)


def dance_sde(ends: Endpoints, x_t: Tensor, t: Tensor, s: Tensor, noise_level: float) -> Gaussian:
    """DanceGRPO's step (arXiv 2505.07818): the same equation with a constant g = noise_level."""
    return _sde_step(ends, x_t, t, s, torch.full_like(t, noise_level))


def cps(ends: Endpoints, t: Tensor, s: Tensor, noise_level: float) -> Gaussian:
    """Coefficients-preserving step on a rectified flow: std = s sin(noise_level pi / 2), mean completes sigma to s."""
    std = s * math.sin(noise_level * math.pi / 2)
    direction = (s.square() - std.square()).clamp(min=0).sqrt()
    return Gaussian(per_sample(1 - s, ends.x0) * ends.x0 + per_sample(direction, ends.eps) * ends.eps, std)


def _sde_step(ends: Endpoints, x_t: Tensor, t: Tensor, s: Tensor, g: Tensor) -> Gaussian:
    dt = s - t
    drift = g.square() / (2 * t)
    velocity = ends.eps - ends.x0
    mean = per_sample(1 + drift * dt, x_t) * x_t + per_sample((1 + drift * (1 - t)) * dt, x_t) * velocity
    return Gaussian(mean, g * (-dt).sqrt())
