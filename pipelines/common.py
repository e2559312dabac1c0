"""Steps that several families share: VAE moments, DDIM times, hashes. Functions, not a base class."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffalign.process import CLEAN, VariancePreserving


def vae_moments(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, log-variance) of the scaled latents: z = (code - shift) * scale."""
    x = pixels.to(vae.device, vae.dtype) * 2 - 1
    posterior = vae.encode(x).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    mean = (posterior.mean.float() - shift) * scale
    logvar = posterior.logvar.float() + 2 * torch.tensor(float(scale)).log().item()
    return mean, logvar


def vae_decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels around [0, 1], fp32, differentiable."""
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    code = latents.float() / scale + shift
    return vae.decode(code.to(vae.dtype)).sample.float() / 2 + 0.5


def variance_preserving(config: dict[str, Any]) -> tuple[VariancePreserving, DDIMScheduler]:
    """The process and the stock DDIM scheduler of a checkpoint, whatever scheduler its folder names (PNDM, Euler ...).

    set_alpha_to_one=False and steps_offset come from the folder; a folder without them gets diffusers' defaults.
    """
    scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    alphas = scheduler.alphas_cumprod.float()
    return VariancePreserving(alphas, float(scheduler.final_alpha_cumprod)), scheduler


def ddim_times(scheduler: DDIMScheduler, steps: int) -> Tensor:
    """[steps + 1]: the stock scheduler's own times, then `CLEAN`.

    Raises:
        ValueError: more steps than the model has training times, or fewer than one.
    """
    total = scheduler.config.num_train_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"expected 1 to {total} sampling steps, got {steps}")
    scheduler.set_timesteps(steps)
    return torch.cat([scheduler.timesteps.float(), torch.tensor([CLEAN])])


def fingerprint(module: torch.nn.Module, config: dict[str, Any]) -> str:
    """Hash of a module's weights and config; the same in fp16 and fp32 only if the weights are."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
