"""Stable Diffusion 1.x, 2.x and SD-Turbo: one U-Net, one CLIP text encoder, epsilon or v prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.common import clip_embeds, ddim_times, load_stock, variance_preserving
from diffalign.pipelines.user_attention import user_options
from diffalign.sampling import Condition


class StableDiffusion(LatentPipeline):
    """Loads any stock StableDiffusionPipeline folder; the safety checker is not loaded."""

    family: ClassVar[str] = "sd"
    lora_prefix: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    parts: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def __init__(self, stock: StableDiffusionPipeline, name: str) -> None:
        super().__init__(stock, name)
        self.parametrization = stock.scheduler.config.prediction_type
        self.process, self._scheduler = variance_preserving(stock.scheduler.config)

    @classmethod
    def load(
        cls, folder: str, *, dtype: torch.dtype, device: torch.device | str, revision: str | None, variant: str | None
    ) -> StableDiffusion:
        # an explicit dtype for all parts: transformers would else load its own in the dtype of the file
        stock = load_stock(StableDiffusionPipeline, folder, dtype=dtype, revision=revision, variant=variant,
                           safety_checker=None, feature_extractor=None, requires_safety_checker=False)  # fmt: skip
        return cls(stock.to(device), folder)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return {"prompt_embeds": clip_embeds(self.stock, prompts)}

    def times(self, steps: int) -> Tensor:
        return ddim_times(self._scheduler, steps)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        embeds = condition["prompt_embeds"].to(dtype)
        y = self.network(x_t.to(dtype), self.process.network_time(t), encoder_hidden_states=embeds, return_dict=False,
                         cross_attention_kwargs=user_options(condition, dtype))  # fmt: skip
        return y[0].float()
