"""Stable Diffusion XL and its Turbo and Lightning kin: a U-Net that is also told the picture's size and crop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from diffalign.data.images import Frame
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.common import (
    ddim_times,
    load_stock,
    stock_warnings_off,
    variance_preserving,
    warn_of_long_prompts,
)
from diffalign.pipelines.user_attention import user_options
from diffalign.process import per_sample
from diffalign.sampling import Condition

log = logging.getLogger("diffalign")


class StableDiffusionXL(LatentPipeline):
    """Loads any stock StableDiffusionXLPipeline folder; the watermark is left out.

    A condition holds `prompt_embeds` [B, 77, 2048], the pooled `text_embeds` [B, 1280] and, where the data tells,
    `time_ids` [B, 6]: height and width of the original, top and left of the crop, height and width of the target, in
    pixels. Without them a picture is taken to be of its own size and not cropped, as the stock pipeline does.
    """

    family: ClassVar[str] = "sdxl"
    lora_prefix: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    parts: ClassVar[tuple[str, ...]] = (
        "unet",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    )

    def __init__(self, stock: StableDiffusionXLPipeline, name: str) -> None:
        super().__init__(stock, name)
        self.parametrization = stock.scheduler.config.prediction_type
        self.process, self._scheduler = variance_preserving(stock.scheduler.config)

    @classmethod
    def load(
        cls, folder: str, *, dtype: torch.dtype, device: torch.device | str, revision: str | None, variant: str | None
    ) -> StableDiffusionXL:
        stock = load_stock(StableDiffusionXLPipeline, folder, dtype=dtype, revision=revision, variant=variant,
                           add_watermarker=False)  # fmt: skip
        _keep_in_range(stock.vae, folder)
        return cls(stock.to(device), folder)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        warn_of_long_prompts(self.stock.tokenizer, prompts, self.stock.tokenizer.model_max_length)
        with stock_warnings_off():
            embeds, _, pooled, _ = self.stock.encode_prompt(
                list(prompts), device=self.stock.text_encoder_2.device, do_classifier_free_guidance=False
            )
        condition = {"prompt_embeds": embeds.float(), "text_embeds": pooled.float()}
        if not self.stock.config.force_zeros_for_empty_prompt:
            return condition
        said = torch.tensor([prompt != "" for prompt in prompts], device=embeds.device)
        return {name: value * per_sample(said, value) for name, value in condition.items()}

    def frame_condition(self, frames: Sequence[Frame]) -> Condition:
        """`time_ids` [B, 6], fp32: original size, corner of the crop, size of the crop.

        So SDXL was trained (arXiv 2307.01952, section 2.2), and so the scripts of diffusers train it, so it is
        the default: told the truth, the network keeps apart what a picture shows and how it was enlarged or cut.
        """
        ids = [[*frame.original, *frame.corner, *frame.target] for frame in frames]
        return {"time_ids": torch.tensor(ids, dtype=torch.float32)}

    def times(self, steps: int) -> Tensor:
        return ddim_times(self._scheduler, steps)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        added = {
            "text_embeds": condition["text_embeds"].to(dtype),
            "time_ids": condition["time_ids"] if "time_ids" in condition else self._uncropped(x_t),
        }
        y = self.network(x_t.to(dtype), self.process.network_time(t), return_dict=False, added_cond_kwargs=added,
                         encoder_hidden_states=condition["prompt_embeds"].to(dtype),
                         cross_attention_kwargs=user_options(condition, dtype))  # fmt: skip
        return y[0].float()

    def _uncropped(self, x_t: Tensor) -> Tensor:
        height, width = (side * self._factor for side in x_t.shape[-2:])
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=x_t.device)
        return ids.expand(len(x_t), 6)


def _keep_in_range(vae: Any, folder: str) -> None:
    """The activations of SDXL's own VAE are too large for fp16, so it goes to fp32; bf16 has the range of fp32.

    A VAE that was repaired for fp16 (such as sdxl-vae-fp16-fix) says force_upcast: false, and stays.
    """
    if vae.dtype != torch.float16:
        return
    if vae.config.force_upcast:
        vae.to(torch.float32)
        log.info("%s: the VAE works in fp32, because its config says force_upcast: true (it overflows in fp16)", folder)
    else:
        log.info("%s: the VAE works in fp16, because its config says force_upcast: false (repaired for fp16)", folder)
