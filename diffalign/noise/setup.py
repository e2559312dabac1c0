"""From what a user gives to an `Objective`: checked, loaded, encoded once."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.noise.objective import MEMORY, Counted, Objective
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.common import vae_decode
from diffalign.rewards import load_rewards
from diffalign.rewards.base import Reward, Weighted
from diffalign.sampling import as_stock
from diffalign.table import unknown

Rewards = Mapping[str, Any] | Sequence[Reward] | Reward
MOST_SEED = 2**63 - 1


def objective_of(
    pipe: LatentPipeline,
    prompts: Sequence[str],
    rewards: Weighted,
    seeds: Sequence[int],
    sampling_steps: int,
    guidance_scale: float,
    shape: tuple[int, ...],
    memory: str,
    batch_size: int | None,
    vae: Any,
    timesteps: Sequence[int] | None = None,
) -> Objective:
    """
    Args:
        timesteps: of the walk, in place of `sampling_steps`.

    Raises:
        ValueError: a value outside its range, a reward that compares pictures, or weights of the model that are not
            finite.
    """
    if memory not in MEMORY:
        raise unknown("memory", memory, MEMORY)
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale: expected a number of at least 0, got {guidance_scale}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    refuse_comparisons(rewards)
    refuse_broken(pipe)
    device = next(pipe.network.parameters()).device
    with torch.no_grad():
        condition = {name: value.to(device) for name, value in pipe.encode_prompts(prompts).items()}
        empty = condition if guidance_scale <= 1 else pipe.encode_prompts([""] * len(prompts))
    return Objective(
        tuple(prompts), rewards, Counted(pipe.predict), pipe.process, pipe.parametrization, condition,
        {name: value.to(device) for name, value in empty.items()}, as_stock(guidance_scale),
        walk_times(pipe, sampling_steps, timesteps).to(device), shape,
        pipe.decoder() if vae is None else small_decoder(vae, shape),
        tuple(torch.Generator().manual_seed(seed) for seed in seeds), MEMORY[memory],
        batch_size or MEMORY[memory].at_once,
    )  # fmt: skip


def walk_times(pipe: LatentPipeline, sampling_steps: int, timesteps: Sequence[int] | None) -> Tensor:
    """[N + 1] from noise to picture: the model's own, or those that are given and the end.

    Raises:
        ValueError: times that do not fall, that the model does not have, or are not as many as the steps.
    """
    if timesteps is None:
        return pipe.times(sampling_steps)
    given = list(timesteps)
    if not given or any(later >= earlier for earlier, later in itertools.pairwise(given)):
        raise ValueError(f"timesteps: expected times of the network that fall, such as [800], got {given}")
    if sampling_steps not in (1, len(given)):
        raise ValueError(f"sampling_steps: expected {len(given)}, as there are timesteps, or none, got "
                         f"{sampling_steps}")  # fmt: skip
    times = pipe.process.from_network_time(torch.tensor(given))
    if given[-1] <= 0 or pipe.process.fraction(times).max() > 1:
        raise ValueError(f"timesteps: expected times of the network above 0 and on its noise axis, got {given}")
    return torch.cat([times, pipe.times(1)[-1:]])


def checked_prompts(prompts: str | Sequence[str]) -> tuple[str, ...]:
    """
    Raises:
        ValueError: none, or one that is blank or no text.
    """
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    bad = [text for text in texts if not isinstance(text, str) or not text.strip()]
    if not texts or bad:
        raise ValueError(f"prompts: expected a prompt or a list of them, got {repr(bad[0]) if bad else 'none'}")
    return texts


def checked_seeds(seed: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Counted up from one, or as they are.

    Raises:
        ValueError: another number of them than prompts, or one that is no seed.
    """
    seeds = tuple(range(seed, seed + count)) if isinstance(seed, int) else tuple(seed)
    if len(seeds) != count or not all(isinstance(one, int) and 0 <= one <= MOST_SEED for one in seeds):
        raise ValueError(f"seed: expected a number of at least 0, or one for each of {count} prompts, got {seed!r}")
    return seeds


def weighted(rewards: Rewards, pipe: LatentPipeline) -> Weighted:
    """The sum that is to be large; rewards that are named are loaded where the network is.

    Raises:
        ValueError: neither a mapping of names nor rewards.
    """
    if isinstance(rewards, Weighted):
        return rewards
    if isinstance(rewards, Mapping):
        return load_rewards(rewards, device=next(pipe.network.parameters()).device)
    several: Sequence[Any] = rewards if isinstance(rewards, Sequence) else [rewards]
    if not several or not all(hasattr(reward, "card") for reward in several):
        raise ValueError(f"rewards: expected a mapping of name -> weight, such as {{'hpsv2.1': 5.0}}, or rewards of "
                         f"load_reward, got {rewards!r}")  # fmt: skip
    names = [reward.name for reward in several]
    return Weighted({f"{name}-{place}" if names.count(name) > 1 else name: (reward, 1.0)
                     for place, (name, reward) in enumerate(zip(names, several, strict=True))})  # fmt: skip


def small_decoder(vae: Any, shape: tuple[int, ...]) -> Any:
    """`vae` as a decoder of the model's latents.

    Raises:
        ValueError: not a VAE of diffusers, or one with another number of channels.
    """
    if not hasattr(vae, "decode") or not hasattr(vae, "config"):
        raise ValueError(f"vae: expected a VAE of diffusers, such as AutoencoderTiny, got {type(vae).__name__}")
    if (channels := vae.config.get("latent_channels")) != shape[0]:
        raise ValueError(f"vae: expected one of {shape[0]} channels, as the model's latents have, got {channels}")
    vae.requires_grad_(False).eval()
    return functools.partial(vae_decode, vae)


def refuse_comparisons(rewards: Weighted) -> None:
    """Raises ValueError for a reward whose score is of a group of pictures: here each is scored for itself."""
    groups = [name for name, reward in rewards.rewards.items() if reward.card.compares]
    if groups:
        raise ValueError(f"{', '.join(groups)} compares the pictures of a prompt with each other, and here each is "
                         f"scored for itself: take a reward with scores of its own")  # fmt: skip


@torch.no_grad()
def refuse_broken(pipe: LatentPipeline) -> None:
    """Raises ValueError for a network with weights that are not finite, from which no noise leads to a picture."""
    bad = [name for name, weight in pipe.network.named_parameters() if not _finite(weight)]
    if bad:
        raise ValueError(f"{pipe.name}: {len(bad)} weights of the network are not finite, such as {bad[0]}; load it in "
                         f"bfloat16 or float32, or download it again")  # fmt: skip


def _finite(weight: Tensor) -> bool:
    return bool(weight.sum().isfinite()) or bool(weight.isfinite().all())
