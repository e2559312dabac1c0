"""Stock model folders with random weights: real layouts, small enough to build in a second."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffalign.shapes.tiny_sd import build_tokenizer


@functools.cache
def stable_diffusion(prediction_type: str = "epsilon", scheduler: str = "ddim", seed: int = 0) -> Path:
    """A folder of a StableDiffusionPipeline with every part present, 32-pixel pictures, 8 x 8 latents."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=16,
                       num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=77,
                       bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                       pad_token_id=tokenizer.pad_token_id)
    )  # fmt: skip
    unet = UNet2DConditionModel(sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                                cross_attention_dim=16, attention_head_dim=2)  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,) * 3,
        norm_num_groups=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    kind = {"ddim": DDIMScheduler, "pndm": PNDMScheduler}[scheduler]
    options = {"clip_sample": False} if scheduler == "ddim" else {"skip_prk_steps": True}
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
        scheduler=kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                       set_alpha_to_one=False, prediction_type=prediction_type, **options),
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="diffalign-miniature-"))
    pipe.save_pretrained(folder)
    return folder
