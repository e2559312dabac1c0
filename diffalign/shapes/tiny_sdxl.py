"""The architecture of assets/tiny-sdxl: every part of Stable Diffusion XL in small, as stock classes."""

from __future__ import annotations

from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffalign.shapes.tiny_sd import build_tokenizer, clip_config

WIDTHS = 48, 64  # of the two text encoders; the U-Net reads both side by side, and the second one's pooled state
TIME_WIDTH = 16  # of each of the six numbers that say size and crop


def build_unet() -> UNet2DConditionModel:
    """2.1 million parameters on 16 x 16 latents; no attention at the top level and more of it the deeper, as SDXL."""
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64, 72),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=sum(WIDTHS),
        attention_head_dim=4,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=WIDTHS[1] + 6 * TIME_WIDTH,
    )


def build(vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """The stock pipeline around a trained VAE of four channels, everything else untrained; without a watermark.

    Three layers a text encoder: what SDXL reads is the last but one.
    """
    tokenizer = build_tokenizer()
    first, second = (clip_config(tokenizer, width, layers=3) for width in WIDTHS)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=build_unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
