"""Stable Diffusion 1.x, 2.x and SD-Turbo: one U-Net, one CLIP text encoder, epsilon or v prediction."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.common import ddim_times, fingerprint, vae_decode, vae_moments, variance_preserving
from diffalign.sampling import Condition

log = logging.getLogger("diffalign")


class StableDiffusion(LatentPipeline):
    """Loads any stock StableDiffusionPipeline folder; the safety checker is not loaded."""

    family: ClassVar[str] = "sd"
    lora_prefix: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipe: StableDiffusionPipeline, name: str) -> None:
        self.name = name
        self.stock: StableDiffusionPipeline | None = pipe
        self.network: Any = pipe.unet.requires_grad_(False).eval()
        pipe.vae.requires_grad_(False).eval()
        pipe.text_encoder.requires_grad_(False).eval()
        self.parametrization = pipe.scheduler.config.prediction_type
        self.process, self.scheduler = variance_preserving(pipe.scheduler.config)
        self._sample_size = pipe.unet.config.sample_size
        self._factor = pipe.vae_scale_factor

    @classmethod
    def load(
        cls, folder: str, *, dtype: torch.dtype, device: torch.device | str, revision: str | None, variant: str | None
    ) -> StableDiffusion:
        try:
            pipe = StableDiffusionPipeline.from_pretrained(
                folder,
                # an explicit dtype for all parts: transformers would else load its own in the dtype of the file
                dtype=dtype,
                revision=revision,
                variant=variant,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{folder}: the model folder is not complete or not readable: {error}") from error
        return cls(pipe.to(device), folder)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        pipe = self._encoders()
        limit = pipe.tokenizer.model_max_length
        tokens = pipe.tokenizer(list(prompts), truncation=False, add_special_tokens=True).input_ids
        if long := [text for text, ids in zip(prompts, tokens, strict=True) if len(ids) > limit]:
            log.warning("%d of %d prompts are longer than the text encoder reads (%d tokens) and are cut, such as %r",
                        len(long), len(prompts), limit, long[0][:80])  # fmt: skip
        ids = pipe.tokenizer(
            list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).input_ids
        embeds = pipe.text_encoder(ids.to(pipe.text_encoder.device)).last_hidden_state
        return {"prompt_embeds": embeds.float()}

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return vae_moments(self._encoders().vae, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return vae_decode(self._encoders().vae, latents)

    def decoder(self) -> Callable[[Tensor], Tensor]:
        return functools.partial(vae_decode, self._encoders().vae)

    def times(self, steps: int) -> Tensor:
        return ddim_times(self.scheduler, steps)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        embeds = condition["prompt_embeds"].to(dtype)
        y = self.network(x_t.to(dtype), self.process.network_time(t), encoder_hidden_states=embeds, return_dict=False)
        return y[0].float()

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        own = self._sample_size * self._factor
        height, width = height or own, width or own
        if height % self._factor or width % self._factor or min(height, width) <= 0:
            raise ValueError(
                f"expected a height and width that are multiples of {self._factor}, got {height} x {width}"
            )
        return (self.network.config.in_channels, height // self._factor, width // self._factor)

    def fingerprint(self, part: str) -> str:
        pipe = self._encoders()
        if part == "vae":
            return fingerprint(pipe.vae, dict(pipe.vae.config))
        if part == "text":
            settings = {"vocabulary": pipe.tokenizer.get_vocab(), "length": pipe.tokenizer.model_max_length}
            return fingerprint(pipe.text_encoder, settings)
        raise ValueError(f"expected part 'vae' or 'text', got {part!r}")

    def release(self) -> None:
        self.stock = None

    def save_pretrained(self, folder: str) -> None:
        self._encoders().save_pretrained(folder)

    def _encoders(self) -> StableDiffusionPipeline:
        if self.stock is None:
            raise ValueError(f"{self.name}: VAE and text encoder were released to save memory; load the model again")
        return self.stock
