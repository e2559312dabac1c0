"""The architecture of assets/tiny-sd: every part of Stable Diffusion 1.5 in small, as stock classes."""

from __future__ import annotations

import itertools
import json

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffalign.shapes.grammar import CATEGORIES, SPLITS, scenes

TEXT_WIDTH = 80
START, END = "<|startoftext|>", "<|endoftext|>"
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-&"


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary holds each word of the grammar as one token, and single characters else."""
    corpus = [
        str(scene) for split, category in itertools.product(SPLITS, CATEGORIES) for scene in scenes(split, category)
    ]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]
    singles = [character + end for end in ("", "</w>") for character in _CHARACTERS]
    longer = [token for token in learned["vocab"] if token not in singles]
    words = [*singles, *longer, START, END]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[tuple(pair) for pair in learned["merges"]],
        model_max_length=77,
    )


def clip_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """A CLIP text encoder in small; what it pools is as wide as what it says."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_unet() -> UNet2DConditionModel:
    """2.2 million parameters on 16 x 16 latents; attention below the top level only, where it would cost most."""
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64, 80),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule; DDIM, so that the default sampler is deterministic."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def build(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The stock pipeline around a trained VAE, everything else untrained; without a safety checker."""
    tokenizer = build_tokenizer()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(clip_config(tokenizer, TEXT_WIDTH, layers=2)),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
