"""Pictures or clips from prompts: the sampler core with guidance, one generator per picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.user_attention import for_nobody, with_user
from diffalign.sampling import Condition, as_stock, ddim_stepper, draw, guided, sample


@torch.no_grad()
def generate(
    pipe: LatentPipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 20,
    guidance_scale: float = 7.5,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    user: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Pixels [N, 3, H, W], of clips [N, F, 3, H, W], in [0, 1], fp32 on the CPU, for N prompts and as many seeds.

    A picture follows from its prompt and its seed alone, as from the stock pipeline with
    `generator=torch.Generator("cpu").manual_seed(seed)` and a DDIM scheduler; as there, a guidance of 1 or less is
    none. `progress` is told of finished pictures.

    Args:
        height, width, num_frames: of each picture or clip; the model's own where not given.
        user: tokens [N, D] of whom it draws for, or [pictures, N, D], by a user adapter (`load_user_adapter`). Guidance
            leads away from the empty prompt for nobody, so it strengthens both the prompt and the user.

    Raises:
        ValueError: no prompt, another number of seeds than prompts, or a size that the model cannot draw.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"expected at least one prompt and one seed per prompt, got {len(prompts)} and {len(seeds)}")
    shape, times = pipe.latent_shape(height, width, num_frames), pipe.times(steps)
    parts = []
    for start in range(0, len(prompts), batch_size):
        some, some_seeds = prompts[start : start + batch_size], seeds[start : start + batch_size]
        noise = draw(shape, [torch.Generator().manual_seed(seed) for seed in some_seeds])
        own = user if user is None or user.ndim == 2 else user[start : start + batch_size]
        condition = with_user(pipe.encode_prompts(some), own)
        negative = for_nobody(pipe.encode_prompts([""] * len(some)), own)
        latents = sample_latents(pipe, condition, negative, noise, times, guidance_scale)
        parts.append(pipe.decode(latents).clamp(0, 1).cpu())
        if progress:
            progress(len(some))
    return torch.cat(parts)


@torch.no_grad()
def sample_latents(
    pipe: LatentPipeline, condition: Condition, negative: Condition, noise: Tensor, times: Tensor, guidance_scale: float
) -> Tensor:
    """Latents [B, C, ...] from starting noise of the same shape, by guided DDIM along `times`."""
    device = next(pipe.network.parameters()).device
    here, away = ({name: value.to(device) for name, value in c.items()} for c in (condition, negative))
    policy = guided(pipe.predict, away, as_stock(guidance_scale))
    step = ddim_stepper(policy, pipe.process, pipe.parametrization, here)
    return sample(step, noise.to(device), times.to(device)).x
