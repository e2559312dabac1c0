"""The noise processes, and what a network predicts under them.

    x_t = alpha(t) x0 + sigma(t) eps          the process: one pair of numbers per time
    y   = p x0 + q eps                        the parametrization: what the network is trained to say

Nothing here knows a network. Coefficients are fp32, one per sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

CLEAN = -1.0  # the time after the last step of a variance-preserving process


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] (or a scalar) -> [B, 1, ...] that broadcasts against `like` [B, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to a GPU without waiting for what it is still busy with. It may be there already."""
    if device.type != "cuda" or tensor.device.type != "cpu":  # only what is in the machine's own memory can be pinned
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class NoiseProcess(ABC):
    """Maps a time to (alpha, sigma) and draws the times to train at."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), fp32, of the shape of `t`."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """What the network calls this time."""

    @abstractmethod
    def from_network_time(self, timestep: Tensor) -> Tensor:
        """The time that the network calls so: the inverse of `network_time`, fp32."""

    @abstractmethod
    def training_times(self, count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[count] times to train at; `low` and `high` bound them as shares of the noise axis (0 clean, 1 noise)."""

    @abstractmethod
    def fraction(self, t: Tensor) -> Tensor:
        """Where on the noise axis a time lies, in [0, 1]: what diagnostics are binned by."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps for x0, eps [B, ...] and t [B]."""
        alpha, sigma = self.coefficients(t)
        return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps


@dataclass(frozen=True, eq=False)
class VariancePreserving(NoiseProcess):
    """alpha^2 + sigma^2 = 1 on the integer times 0 .. T-1 (Ho et al. 2020); `CLEAN` is the end of sampling.

    `final` is alpha^2 at `CLEAN`: alphas_cumprod[0] for Stable Diffusion (set_alpha_to_one=False), else 1.
    """

    alphas_cumprod: Tensor  # [T], decreasing, fp32
    final: float
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)  # one copy per device, made once

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if t.device not in self._tables:
            self._tables[t.device] = self.alphas_cumprod.to(t.device)
        table = self._tables[t.device]
        index = t.round().long().clamp(min=0)
        squared = torch.where(t < 0, torch.full_like(table[index], self.final), table[index])
        return squared.sqrt(), (1 - squared).sqrt()

    def network_time(self, t: Tensor) -> Tensor:
        return t.round().long()

    def from_network_time(self, timestep: Tensor) -> Tensor:
        return timestep.float()

    def training_times(self, count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
        total = len(self.alphas_cumprod)
        first, last = round(low * (total - 1)), round(high * (total - 1))
        return torch.randint(first, last + 1, (count,), generator=generator).float()

    def fraction(self, t: Tensor) -> Tensor:
        return t.float().clamp(min=0) / (len(self.alphas_cumprod) - 1)


@dataclass(frozen=True)
class RectifiedFlow(NoiseProcess):
    """alpha = 1 - t, sigma = t on [0, 1] (Liu et al. 2023; Esser et al. 2024).

    `shift` moves times towards noise as the checkpoint's scheduler does: t <- s t / (1 + (s - 1) t).
    """

    shift: float = 1.0
    scale: float = 1000.0  # the network is told scale * t

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t.float(), t.float()

    def network_time(self, t: Tensor) -> Tensor:
        return t.float() * self.scale

    def from_network_time(self, timestep: Tensor) -> Tensor:
        return timestep.float() / self.scale

    def training_times(self, count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Logit-normal(0, 1), then shifted; `low` and `high` cut the result."""
        u = torch.sigmoid(torch.randn(count, generator=generator))
        t = self.shift * u / (1 + (self.shift - 1) * u)
        return low + (high - low) * t

    def fraction(self, t: Tensor) -> Tensor:
        return t.float()


@dataclass(frozen=True, eq=False)
class FewTimes(NoiseProcess):
    """Another process of which only some times are trained, all of them equally often.

    For networks that were distilled to a few steps and know no time between: SD-Turbo and SDXL-Turbo have 249, 499,
    749 and 999 of 1000 (Sauer et al. 2023, arXiv 2311.17042). Sampling is left as it is.
    """

    process: NoiseProcess
    times: Tensor  # [K], times of `process`

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.process.coefficients(t)

    def network_time(self, t: Tensor) -> Tensor:
        return self.process.network_time(t)

    def from_network_time(self, timestep: Tensor) -> Tensor:
        return self.process.from_network_time(timestep)

    def training_times(self, count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform over those of `times` that lie in the range.

        Raises:
            ValueError: none does.
        """
        fraction = self.process.fraction(self.times)
        inside = self.times[(fraction >= low) & (fraction <= high)]
        if not len(inside):
            shares = ", ".join(f"{share:.3f}" for share in fraction.tolist())
            raise ValueError(f"none of the train_timesteps lies in the trained part of the noise axis, {low} to "
                             f"{high}: expected one at least, and they lie at {shares}; change them or the method's "
                             f"time_low and time_high")  # fmt: skip
        return inside[torch.randint(len(inside), (count,), generator=generator)]

    def fraction(self, t: Tensor) -> Tensor:
        return self.process.fraction(t)


def at_timesteps(process: NoiseProcess, timesteps: Sequence[int]) -> FewTimes:
    """The process with training at these times alone, given as the network calls them.

    Raises:
        ValueError: one that the process does not have.
    """
    times = process.from_network_time(torch.tensor(list(timesteps)))
    for timestep, share in zip(timesteps, process.fraction(times).tolist(), strict=True):
        if timestep < 0 or share > 1:
            raise ValueError(f"train_timesteps: expected times of the model, from 0 to the end of its noise axis, "
                             f"got {timestep}, which lies at {share:.3f} of it")  # fmt: skip
    return FewTimes(process, times)


Row = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

PARAMETRIZATIONS: dict[str, Row] = {  # name -> (p, q) of y = p x0 + q eps; names are those of diffusers
    "epsilon": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "sample": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha)),
}


class Endpoints(NamedTuple):
    """The two ends that a prediction implies, each [B, ...]."""

    x0: Tensor
    eps: Tensor


def target(kind: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """y = p x0 + q eps: what a network of this parametrization should say at x_t. alpha, sigma: [B]."""
    p, q = (per_sample(c, x0) for c in PARAMETRIZATIONS[kind](alpha, sigma))
    return p * x0 + q * eps


def endpoints(kind: str, y: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Endpoints:
    """Solves y = p x0 + q eps and x_t = alpha x0 + sigma eps for (x0, eps); fp32, or fp64. alpha, sigma: [B].

    det = alpha q - sigma p;  x0 = (q x_t - sigma y) / det;  eps = (alpha y - p x_t) / det
    """
    y, x_t = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (y, x_t))
    p, q = (per_sample(c, x_t) for c in PARAMETRIZATIONS[kind](alpha, sigma))
    alpha, sigma = per_sample(alpha, x_t), per_sample(sigma, x_t)
    det = alpha * q - sigma * p
    return Endpoints((q * x_t - sigma * y) / det, (alpha * y - p * x_t) / det)


def time_weight(name: str, kind: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """[B] weight that turns the squared error of y into another one, or leans on part of the noise axis.

    native 1 | eps: error of eps | x0: error of x0 | sigmoid: sigmoid(-log SNR) (CaPO, arXiv 2502.02588) |
    snr_clip: min(SNR, 5) / SNR on the error of eps (arXiv 2303.09556)

    A change dx0 at fixed x_t means deps = -(alpha/sigma) dx0, so |dy|^2 = (det/alpha)^2 |deps|^2 with the det of
    `endpoints`. For a rectified flow "eps" is (1-t)^2 and "x0" is t^2.

    Raises:
        ValueError: unknown name.
    """
    p, q = PARAMETRIZATIONS[kind](alpha, sigma)
    det = alpha * q - sigma * p
    snr = (alpha / sigma).square()
    weights = {
        "native": lambda: torch.ones_like(alpha),
        "eps": lambda: (alpha / det).square(),
        "x0": lambda: (sigma / det).square(),
        "sigmoid": lambda: torch.sigmoid(-snr.log()),
        "snr_clip": lambda: (alpha / det).square() * snr.clamp(max=5.0) / snr,
    }
    if name not in weights:
        raise ValueError(f"expected a timestep weight of {', '.join(weights)}, got {name!r}")
    return weights[name]()
