"""The architecture of assets/tiny-video: every part of Wan 2.1 in small, as stock classes.

Clips of 9 frames of 64 pixels are latents of 3 x 8 x 8 x 16: the first frame has one of its own, four frames share each
of the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from diffalign.shapes.motion import DIRECTIONS, SPEEDS
from diffalign.shapes.tiny_sd3 import build_t5_tokenizer, spoken

FRAMES, SIDE = 9, 64
CHANNELS = 16
TEXT_WIDTH = 96
HEADS, HEAD_WIDTH, LAYERS = 5, 24, 8
BRANCH = 0.5  # what residual branches add at first
NARROW = -6.0  # log-variance of the posterior at first


def build_vae() -> AutoencoderKLWan:
    """1.6 million parameters: three halvings in space, two in time, as Wan's."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 3, 3],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * CHANNELS,  # training sets both
        latents_std=[1.0] * CHANNELS,
    )
    start_on_pictures(vae)
    return vae


@torch.no_grad()
def start_on_pictures(vae: AutoencoderKLWan) -> None:
    """Weights to start training from: those of a VAE of pictures, laid over time.

    Each convolution keeps the variance of its input, without biases, and looks at the newest frame alone; those over
    time pass frames on, so that a latent frame is that of the last of its four pictures. With torch's own start biases
    outweigh the signal, which norms over channels cannot undo as norms over space do: after 700 steps such a VAE drew
    flat gray, while this one has outlines after 150. The posterior begins narrow, or its noise hides what the decoder
    is to learn from.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Conv3d) or "attentions" in name:
            continue
        assert module.bias is not None
        module.bias.zero_()
        if name.endswith("time_conv"):
            module.weight.copy_(_passing(*module.weight.shape[:2]))
            continue
        newest = module.weight.zero_() if module.weight.dim() == 4 else module.weight.zero_()[:, :, -1]
        newest.normal_(std=(BRANCH if name.endswith("conv2") else 1.0) * newest[0].numel() ** -0.5)
    assert vae.quant_conv.bias is not None
    vae.quant_conv.bias[CHANNELS:] = NARROW


def _passing(made: int, channels: int) -> torch.Tensor:
    """Weights [made, channels, 3, 1, 1] over time: the newest of three frames, as often as there is room for it."""
    same = torch.eye(channels)[:, :, None, None, None]
    return F.pad(same, (0, 0, 0, 0, 2, 0)).repeat(made // channels, 1, 1, 1, 1)


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
