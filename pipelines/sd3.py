"""Stable Diffusion 3 and 3.5: a flow transformer (MMDiT), two CLIP text encoders and a T5 that may be absent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.common import (
    CLIP_TOKENS,
    T5_TOKENS,
    flow_times,
    load_stock,
    stock_warnings_off,
    warn_of_long_prompts,
)
from diffalign.pipelines.user_attention import user_options
from diffalign.process import RectifiedFlow
from diffalign.sampling import Condition

log = logging.getLogger("diffalign")


class StableDiffusion3(LatentPipeline):
    """Loads any stock StableDiffusion3Pipeline folder, with T5 or without; its prompts are then zeros, as stock.

    A condition holds `prompt_embeds` [B, 77 + `max_sequence_length`, 4096] and the pooled `text_embeds` [B, 2048].
    """

    family: ClassVar[str] = "sd3"
    t5_tokens: ClassVar[tuple[int, int]] = (T5_TOKENS, 512)  # what the stock pipeline takes
    lora_prefix: ClassVar[str] = "transformer"
    # both streams of every block: the picture's projections and the text's
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0",
                                               "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # fmt: skip
    parts: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2",
                                        "tokenizer", "tokenizer_2", "scheduler")  # fmt: skip

    def __init__(self, stock: StableDiffusion3Pipeline, name: str) -> None:
        super().__init__(stock, name)
        self.parametrization = "flow"
        self._scheduler: FlowMatchEulerDiscreteScheduler = stock.scheduler
        config = stock.scheduler.config
        if config.get("use_dynamic_shifting"):
            raise ValueError(f"{name}: expected a scheduler with a fixed shift, got use_dynamic_shifting: true")
        self.process = RectifiedFlow(shift=config.shift, scale=config.num_train_timesteps)

    @classmethod
    def load(
        cls, folder: str, *, dtype: torch.dtype, device: torch.device | str, revision: str | None, variant: str | None
    ) -> StableDiffusion3:
        index = StableDiffusion3Pipeline.load_config(folder, revision=revision)
        # of a folder that was saved without T5 stock diffusers wants to hear so
        absent = dict.fromkeys(part for part in ("text_encoder_3", "tokenizer_3") if not index.get(part, [None])[0])
        if "text_encoder_3" not in absent and "tokenizer_3" in absent:
            raise ValueError(f"{folder}: expected T5 (text_encoder_3) with its tokenizer_3, and model_index.json names "
                             f"no tokenizer_3; download it too, or set text_encoder_3 to [null, null]")  # fmt: skip
        if "text_encoder_3" in absent:
            log.info("%s: T5 is not in the folder, so its tokens are zeros, as in stock diffusers", folder)
        stock = load_stock(StableDiffusion3Pipeline, folder, dtype=dtype, revision=revision, variant=variant, **absent)
        return cls(stock.to(device), folder)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        stock = self.stock
        # where T5 reads on, what CLIP cuts is not lost
        read = (stock.tokenizer_3, self.max_sequence_length) if stock.text_encoder_3 else (stock.tokenizer, CLIP_TOKENS)
        warn_of_long_prompts(read[0], prompts, read[1])
        with stock_warnings_off():
            embeds, _, pooled, _ = stock.encode_prompt(list(prompts), None, None, device=stock.text_encoder.device,
                                                       do_classifier_free_guidance=False,
                                                       max_sequence_length=self.max_sequence_length)  # fmt: skip
        return {"prompt_embeds": embeds.float(), "text_embeds": pooled.float()}

    def times(self, steps: int) -> Tensor:
        return flow_times(self._scheduler, steps)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        y = self.network(x_t.to(dtype), timestep=self.process.network_time(t), return_dict=False,
                         encoder_hidden_states=condition["prompt_embeds"].to(dtype),
                         pooled_projections=condition["text_embeds"].to(dtype),
                         joint_attention_kwargs=user_options(condition, dtype))  # fmt: skip
        return y[0].float()
