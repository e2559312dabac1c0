"""The architecture of assets/tiny-sd3: every part of Stable Diffusion 3 in small, a T5 included, as stock classes."""

from __future__ import annotations

import string
from collections.abc import Sequence

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from diffalign.shapes.grammar import CATEGORIES, SPLITS, scenes
from diffalign.shapes.tiny_sd import build_tokenizer, clip_config

WIDTHS = 48, 64  # of the two CLIP text encoders
T5_WIDTH = sum(WIDTHS)  # the transformer reads CLIP tokens, side by side, above T5's, so neither need be padded
HEADS, HEAD_WIDTH, LAYERS = 6, 16, 5


def spoken(kinds: Sequence[str]) -> set[str]:
    """The words of all captions of these categories."""
    return {word for split in SPLITS for kind in kinds for one in scenes(split, kind) for word in str(one).split()}


def build_t5_tokenizer(words: set[str]) -> T5Tokenizer:
    """Each of these words is one token; the rest is spelled."""
    spelled = ["\u2581", *string.ascii_lowercase, *string.digits, *".,;:!?'\"()-&"]
    scores = [*((f"\u2581{word}", -1.0) for word in sorted(words)), *((letter, -9.0) for letter in spelled)]
    return T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scores], extra_ids=0, model_max_length=512
    )


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Two layers of T5 v1.1; no dropout, which the network's training would not switch off."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def build_transformer() -> SD3Transformer2DModel:
    """1.6 million parameters on 8 x 8 latents of 16 channels; normed queries, as SD3.5.

    Patches of 1: a patch of 2 x 2 is 64 numbers, of which a stream as narrow as this one has to carry the noise to the
    end, and what was left of its width never learned to draw (1.6 % of the pictures after 4,000 steps).
    """
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def build(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """The stock pipeline around a trained VAE of sixteen channels, everything else untrained."""
    tokenizer, tokenizer_3 = build_tokenizer(), build_t5_tokenizer(spoken(CATEGORIES))
    first, second = (clip_config(tokenizer, width, layers=3) for width in WIDTHS)
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        text_encoder_3=build_t5(tokenizer_3),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
