"""Exact-law miniatures: networks and pipelines small enough to run thousands of steps on a laptop.

`LinearNetwork` says y = W x + b(t, prompt); `ExactGaussian` knows the true law of Gaussian data, so that what a sampler
must produce can be written down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.process import (
    CLEAN,
    PARAMETRIZATIONS,
    NoiseProcess,
    RectifiedFlow,
    VariancePreserving,
    per_sample,
    target,
)
from diffalign.sampling import Condition, Policy

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
ALPHAS = torch.cumprod(1 - BETAS, 0).float()


def variance_preserving(final: float | None = None) -> VariancePreserving:
    """Stable Diffusion's schedule."""
    return VariancePreserving(ALPHAS, float(ALPHAS[0]) if final is None else final)


PROCESSES: dict[str, NoiseProcess] = {"vp": variance_preserving(), "flow": RectifiedFlow(shift=3.0)}
KINDS = {"vp": ("epsilon", "v_prediction", "sample"), "flow": ("flow",)}
ROWS = [(process, kind) for process, kinds in KINDS.items() for kind in kinds]


def exact_gaussian(process: NoiseProcess, kind: str, mean: float, std: float) -> Policy:
    """The optimal predictor for data N(mean, std^2), elementwise: E[x0 | x_t] is linear in x_t."""

    def policy(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = process.coefficients(t)
        a, s = per_sample(alpha, x_t), per_sample(sigma, x_t)
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x_t - a * mean)
        eps = torch.where(s > 0, (x_t - a * x0) / s.clamp(min=1e-8), torch.zeros_like(x_t))
        return target(kind, x0, eps, alpha, sigma)

    return policy


class Denoiser(torch.nn.Module):
    """A network with an exact law behind it: it believes that the data are N(mean[prompt], 1), and learns the mean.

    At theta = 0 it is the optimal predictor of standard normal data, whatever the parametrization, so a method's
    effect is one number: where `mean` went. Prompts are integer ids in condition["prompt"].
    """

    def __init__(self, process: NoiseProcess, kind: str, prompts: int = 2, width: int = 3) -> None:
        super().__init__()
        self.process, self.kind = process, kind
        self.mean = torch.nn.Parameter(torch.zeros(prompts, width))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = self.process.coefficients(t)
        a, s = per_sample(alpha, x_t), per_sample(sigma, x_t)
        mean = self.mean[condition["prompt"]].view(len(x_t), -1, *[1] * (x_t.ndim - 2))
        x0 = mean + a / (a**2 + s**2) * (x_t - a * mean)
        p, q = (per_sample(c, x_t) for c in PARAMETRIZATIONS[self.kind](alpha, sigma))
        return p * x0 + q * (x_t - a * x0) / s


def sampling_times(process: NoiseProcess, steps: int) -> Tensor:
    """[steps + 1] times from noise to picture, as the stock samplers have them: leading, or of a shifted flow."""
    if isinstance(process, RectifiedFlow):
        u = torch.linspace(1, 0, steps + 1)
        return process.shift * u / (1 + (process.shift - 1) * u)
    return torch.cat([torch.arange(steps).flip(0) * (1000 // steps) + 1.0, torch.tensor([CLEAN])])
