"""The architecture of assets/tiny-video: every part of Wan 2.1 in small, as stock classes.

Clips of 9 frames of 64 pixels are latents of 3 x 8 x 8 x 16: the first frame has one of its own, four frames share each
of the others.
"""

from __future__ import annotations

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from diffalign.shapes.motion import DIRECTIONS, SPEEDS
from diffalign.shapes.tiny_sd3 import build_t5_tokenizer, spoken

FRAMES, SIDE = 9, 64
CHANNELS = 16
TEXT_WIDTH = 96
HEADS, HEAD_WIDTH, LAYERS = 5, 24, 8


def build_vae() -> AutoencoderKLWan:
    """1.6 million parameters: three halvings in space, two in time, as Wan's."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 3, 3],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * CHANNELS,  # training sets both
        latents_std=[1.0] * CHANNELS,
    )


def build_tokenizer() -> T5Tokenizer:
    """Each word of captions is one token; the rest is spelled."""
    moved = {*DIRECTIONS, *SPEEDS, "moving", "standing", "still", "then", "stopping"}
    return build_t5_tokenizer(spoken(("single", "two")) | moved)


def build_text(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """Three layers of UMT5; no dropout, which the network's training would not switch off."""
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=24,
        d_ff=2 * TEXT_WIDTH,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config)


def build_transformer() -> WanTransformer3DModel:
    """2.0 million parameters on 192 tokens. Patches of 1, for the reason that `tiny_sd3.build_transformer` tells."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=4 * HEADS * HEAD_WIDTH,
        num_layers=LAYERS,
        rope_max_seq_len=64,
    )


def build(vae: AutoencoderKLWan) -> WanPipeline:
    """The stock pipeline around a trained VAE, everything else untrained."""
    tokenizer = build_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text(tokenizer),
        vae=vae,
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
