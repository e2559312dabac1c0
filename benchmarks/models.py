"""Random-weight models for the benchmarks: the real layouts, in full size and in small; nothing is downloaded.

The network comes apart from VAE and text encoders, because our step holds only the network: the plain step builds the
others when it needs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffalign.counting import counted
from diffalign.pipelines.architectures import NETWORKS, attach_meta_lora, example_call, meta_network, network_config
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.sd3 import StableDiffusion3
from diffalign.pipelines.sdxl import StableDiffusionXL
from diffalign.pipelines.wan import Wan

Config = dict[str, Any]
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Architecture:
    """The configs of one model: U-Net or transformer, VAE, two CLIP text encoders, a T5 for SD3; side in pixels.

    A model of clips has the (height, width, frames) of one, and is a network alone: there is no plain step of it.
    """

    name: str
    network: Config
    vae: Config
    texts: tuple[Config, ...]
    resolution: int
    t5: Config | None = None
    t5_tokens: int = 256
    clip: tuple[int, int, int] | None = None

    @property
    def flow(self) -> bool:
        """A transformer of the SD3 kind, and not a U-Net of the SDXL kind."""
        return bool(self.network["_class_name"] == "SD3Transformer2DModel")

    @property
    def extent(self) -> tuple[int, ...]:
        """(height, width) of a picture, (height, width, frames) of a clip."""
        return self.clip or (self.resolution, self.resolution)


@dataclass(frozen=True)
class Encoders:
    """What the plain step calls at every step: the VAE in fp32, the text encoders in the network's dtype."""

    vae: Any
    texts: tuple[Any, Any]
    t5: Any


def _vae(*widths: int, groups: int, **options: Any) -> Config:
    return {"block_out_channels": widths, "norm_num_groups": groups, "layers_per_block": 2, "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * len(widths), "scaling_factor": 0.13025,
            "up_block_types": ("UpDecoderBlock2D",) * len(widths), **options}  # fmt: skip


def _sd3_vae(*widths: int, groups: int) -> Config:
    return _vae(*widths, groups=groups, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
                use_quant_conv=False, use_post_quant_conv=False)  # fmt: skip


def _clip(width: int, layers: int, heads: int, projection: int, activation: str, vocabulary: int = 49408) -> Config:
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "projection_dim": projection, "hidden_act": activation,
            "vocab_size": vocabulary, "max_position_embeddings": CLIP_TOKENS,
            "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}  # fmt: skip


CLIP_L = _clip(768, 12, 12, 768, "quick_gelu")
CLIP_BIG_G = _clip(1280, 32, 20, 1280, "gelu")
T5_XXL: Config = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
                  "feed_forward_proj": "gated-gelu"}  # fmt: skip


def sdxl() -> Architecture:
    """Stable Diffusion XL at 1024 x 1024: 2.57 billion parameters in the U-Net."""
    vae = _vae(128, 256, 512, 512, groups=32)
    return Architecture("sdxl", network_config("sdxl"), vae, (CLIP_L, CLIP_BIG_G), 1024)


def sd3_medium() -> Architecture:
    """Stable Diffusion 3 medium at 1024 x 1024: 2.03 billion parameters in the transformer, T5-XXL beside it."""
    vae = _sd3_vae(128, 256, 512, 512, groups=32)
    return Architecture("sd3-medium", network_config("sd3-medium"), vae, (CLIP_L, CLIP_BIG_G), 1024, T5_XXL)


def small_unet(widths: tuple[int, ...], layers: tuple[int, ...], heads: tuple[int, ...], text: Config) -> Config:
    """SDXL's U-Net with other widths and depths; `text` says what it reads."""
    return network_config("sdxl") | {
        "sample_size": 32,
        "block_out_channels": widths,
        "transformer_layers_per_block": layers,
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "norm_num_groups": 8,
        "addition_time_embed_dim": 16,
        **text,
    }


def sdxl_8m() -> Architecture:
    """SDXL in small for `make bench`: a U-Net of a tenth of its widths, with 1, 1, 2 transformer layers for 1, 2, 10.

    The VAE's share of the FLOPs is SDXL's own, text is a little above it; `shares` counts both.
    """
    texts = (_clip(32, 6, 4, 32, "quick_gelu", 1000), _clip(40, 12, 4, 40, "gelu", 1000))
    read = {"cross_attention_dim": 32 + 40, "projection_class_embeddings_input_dim": 40 + 6 * 16}
    network = small_unet((32, 64, 128), (1, 1, 2), (1, 2, 4), read)
    return Architecture("sdxl-8m", network, _vae(8, 16, 36, 36, groups=4), texts, 256)


def sdxl_mini() -> Architecture:
    """As little of SDXL as still has every kind of part, for `--small`."""
    texts = (_clip(16, 2, 2, 16, "quick_gelu", 100), _clip(24, 2, 2, 24, "gelu", 100))
    read = {"cross_attention_dim": 16 + 24, "projection_class_embeddings_input_dim": 24 + 6 * 16}
    network = small_unet((8, 16, 16), (1, 1, 1), (1, 2, 2), read) | {"layers_per_block": 1}
    return Architecture("sdxl", network, _vae(8, 8, 8, 8, groups=4), texts, 64)


def sd3_mini() -> Architecture:
    """As little of SD3 as still has every kind of part, for `--small`; 24 + 16 wide CLIPs are padded to T5's 48."""
    network = network_config("sd3-medium") | {
        "sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 48, "caption_projection_dim": 16, "pooled_projection_dim": 40,
        "pos_embed_max_size": 12,
    }  # fmt: skip
    texts = (_clip(16, 2, 2, 16, "quick_gelu", 100), _clip(24, 2, 2, 24, "gelu", 100))
    t5 = {"vocab_size": 100, "d_model": 48, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
          "feed_forward_proj": "gated-gelu"}  # fmt: skip
    return Architecture("sd3-medium", network, _sd3_vae(8, 8, 8, 8, groups=4), texts, 64, t5)


def wan_1_3b() -> Architecture:
    """Wan 2.1 T2V 1.3B on 81 frames of 480 x 832: 1.42 billion parameters, 32,760 tokens."""
    return Architecture("wan2.1-1.3b", network_config("wan2.1-1.3b"), {}, (), 480, t5_tokens=512, clip=(480, 832, 81))


def wan_mini() -> Architecture:
    """Wan in small, on 5 frames, for `--small`."""
    network = network_config("wan2.1-1.3b") | {
        "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 24, "freq_dim": 16, "ffn_dim": 32,
        "num_layers": 2,
    }  # fmt: skip
    return Architecture("wan2.1-1.3b", network, {}, (), 32, t5_tokens=8, clip=(32, 48, 5))


MODELS: dict[str, Callable[[], Architecture]] = {"sdxl": sdxl, "sd3-medium": sd3_medium}
CLIP_MODELS: dict[str, Callable[[], Architecture]] = {"wan2.1-1.3b": wan_1_3b}
SMALL_MODELS: dict[str, Callable[[], Architecture]] = {"sdxl": sdxl_mini, "sd3-medium": sd3_mini,
                                                       "wan2.1-1.3b": wan_mini}  # fmt: skip


@contextlib.contextmanager
def _born_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside are made on the device and in this dtype: no 10 GB in fp32 that are copied later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_pipeline(model: Architecture, device: torch.device, dtype: torch.dtype) -> LatentPipeline:
    """The package's pipeline around a random network, without VAE and text encoders: what a cached run holds."""
    with _born_on(device, dtype):
        network = NETWORKS[model.network["_class_name"]].from_config(model.network).to(device, dtype)
    absent = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    if model.flow:
        flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
        stock = StableDiffusion3Pipeline(
            transformer=network, scheduler=flow, text_encoder_3=None, tokenizer_3=None, **absent
        )
        return StableDiffusion3(stock, model.name)
    if model.clip:
        none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return Wan(WanPipeline(transformer=network, scheduler=flow, **none), model.name)
    scheduler = EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading")
    return StableDiffusionXL(StableDiffusionXLPipeline(unet=network, scheduler=scheduler, **absent), model.name)


def build_encoders(model: Architecture, device: torch.device, dtype: torch.dtype) -> Encoders:
    """VAE and text encoders, random, frozen and in evaluation mode."""
    if model.clip:
        raise ValueError(f"{model.name}: a model of clips is a network alone here")
    first, second = (CLIPTextConfig(**config) for config in model.texts)
    with _born_on(device, torch.float32):
        vae = AutoencoderKL(**model.vae)
    with _born_on(device, dtype):
        kind = CLIPTextModelWithProjection if model.flow else CLIPTextModel
        texts = (kind(first), CLIPTextModelWithProjection(second))
        t5 = T5EncoderModel(T5Config(**model.t5)) if model.t5 else None
    for part in (vae, *texts, t5):
        if part is not None:
            part.requires_grad_(False).eval().to(device)
    return Encoders(vae, texts, t5)


def example_ids(config: Config, count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """[count, tokens] random token ids that end as a prompt of that encoder ends."""
    vocabulary = config["vocab_size"]
    ids = torch.randint(2, vocabulary - 2, (count, tokens), generator=generator)
    if "bos_token_id" in config:
        ids[:, 0], ids[:, -1] = config["bos_token_id"], config["eos_token_id"]
    return ids


def pair_flops(model: Architecture, rank: int) -> float:
    """FLOPs that one pair needs: policy forward and backward and reference forward of two pictures, no recompute."""
    network = meta_network(model.network, torch.bfloat16)
    forward = _forward_flops(network, model.extent, model.t5_tokens)
    attach_meta_lora(network, rank, None)
    x_t, call = example_call(network, model.extent, model.t5_tokens)
    with counted(network) as count:
        network(x_t, **call, return_dict=False)[0].sum().backward()
    return 2 * (count.flops + forward)


@dataclass(frozen=True)
class Shares:
    """FLOPs of a U-Net forward on one picture, and of VAE and text encoders (one picture, one prompt) beside it."""

    network_parameters: int
    network_flops: float
    vae: float  # of network_flops
    text: float


def shares(model: Architecture) -> Shares:
    """Counted on the meta device."""
    meta = torch.device("meta")
    network = meta_network(model.network, torch.float32)
    forward = _forward_flops(network, model.extent, model.t5_tokens)
    encoders = build_encoders(model, meta, torch.float32)
    picture = torch.empty(1, 3, model.resolution, model.resolution, device=meta)
    vae = _counted(encoders.vae, lambda: encoders.vae.encode(picture))
    ids = torch.zeros(1, CLIP_TOKENS, dtype=torch.long, device=meta)
    text = sum(_counted(encoder, partial(encoder, ids)) for encoder in encoders.texts)
    return Shares(sum(p.numel() for p in network.parameters()), forward, vae / forward, text / forward)


def _forward_flops(network: Any, extent: tuple[int, ...], t5_tokens: int) -> float:
    x_t, call = example_call(network, extent, t5_tokens)
    return _counted(network, lambda: network(x_t, **call))


def _counted(module: nn.Module, call: Callable[[], Any]) -> float:
    with counted(module) as count, torch.no_grad():
        call()
    return count.flops
