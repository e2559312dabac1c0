"""Networks without weights: the architecture of a checkpoint on the meta device, from its config alone.

`assets/architectures` holds the published network configs of the checkpoints in `KNOWN`, so that nothing need be
downloaded to say what training them takes; their exact numbers of parameters are tested.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNetMotionModel,
    WanTransformer3DModel,
)
from peft import LoraConfig

from diffalign.assets import asset
from diffalign.pipelines import PIPELINES, locate
from diffalign.pipelines.common import CLIP_TOKENS, T5_TOKENS, stock_warnings_off
from diffalign.pipelines.user_attention import UserProjection, attach_projections, user_options
from diffalign.table import resolve

KNOWN: dict[str, str] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/sd-turbo": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/sdxl-turbo": "sdxl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3-medium",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5-large",
    "guoyww/animatediff-motion-adapter-v1-5-2": "animatediff",
    "zai-org/CogVideoX-2b": "cogvideox-2b",
    "zai-org/CogVideoX-5b": "cogvideox-5b",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1-1.3b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-14b",
}
NETWORKS = {"UNet2DConditionModel": UNet2DConditionModel, "SD3Transformer2DModel": SD3Transformer2DModel,
            "UNetMotionModel": UNetMotionModel, "CogVideoXTransformer3DModel": CogVideoXTransformer3DModel,
            "WanTransformer3DModel": WanTransformer3DModel}  # fmt: skip
OF_CLIPS = {"UNetMotionModel": "AnimateDiffPipeline", "CogVideoXTransformer3DModel": "CogVideoXPipeline",
            "WanTransformer3DModel": "WanPipeline"}  # fmt: skip
# what gradient checkpointing recomputes one at a time
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "JointTransformerBlock", "WanTransformerBlock", "CogVideoXBlock")
USER_TOKENS = 16


def network_config(name_or_path: str) -> dict[str, Any]:
    """The network's config: of a folder, or of a checkpoint or architecture that is known.

    Raises:
        ValueError: neither a model folder nor known; says what is.
    """
    folder = Path(locate(name_or_path))
    for part in ("unet", "transformer"):
        if (folder / part / "config.json").is_file():
            return dict(json.loads((folder / part / "config.json").read_text()))
    name = KNOWN.get(name_or_path, name_or_path)
    if name not in KNOWN.values():
        raise ValueError(
            f"{name_or_path}: expected a diffusers folder, one of the architectures "
            f"{', '.join(sorted(set(KNOWN.values())))}, or a checkpoint of them: {', '.join(KNOWN)}"
        )
    return dict(json.loads(asset(f"architectures/{name}.json").read_text()))


def meta_network(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The network on the meta device, frozen.

    Raises:
        ValueError: a class that no family serves.
    """
    kind = config.get("_class_name")
    if kind not in NETWORKS:
        raise ValueError(f"expected a network of class {', '.join(NETWORKS)}, got {kind}")
    with torch.device("meta"), stock_warnings_off():
        return NETWORKS[kind].from_config(dict(config)).to(dtype).requires_grad_(False)


def attach_meta_lora(network: Any, rank: int, targets: Sequence[str] | str | None) -> int:
    """Adds an adapter as training would, of the family's own targets if none are given; returns its parameters.

    Raises:
        ValueError: no module matches.
    """
    dtype = network.dtype
    wanted = list(_family(network).lora_targets) if targets is None else targets
    try:
        network.add_adapter(LoraConfig(r=rank, target_modules=wanted, init_lora_weights=False))
    except ValueError as error:
        raise ValueError(f"lora.targets {wanted}: no module of the network has such a name ({error})") from error
    with stock_warnings_off():  # that some norms are to stay in fp32, which shapes do not
        network.to(dtype)
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def attach_meta_user(network: Any, width: int) -> int:
    """Adds a user adapter for tokens of this width, as training would; returns its parameters."""
    dtype = network.dtype
    added = attach_projections(network, width, torch.Generator())
    with stock_warnings_off():  # that some norms are to stay in fp32, which shapes do not
        network.to(dtype)
    return sum(p.numel() for p in added)


def example_call(
    network: Any, extent: tuple[int, ...], t5_tokens: int | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """x_t of one picture or clip, and the keywords that stand for its time and prompt; nothing but shapes.

    Args:
        extent: (height, width), of a clip (height, width, frames), in pixels.
        t5_tokens: the family's own number if not given.
    """
    config, dtype = network.config, network.dtype
    height, width = extent[0] // 8, extent[1] // 8

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(1, *shape, dtype=dtype, device="meta")

    common: dict[str, Any] = {"timestep": torch.empty(1, device="meta")}
    if isinstance(network, UNetMotionModel):
        frames = extent[2] if len(extent) == 3 else 1
        common["encoder_hidden_states"] = empty(CLIP_TOKENS, config.cross_attention_dim).expand(frames, -1, -1)
        return empty(config.in_channels, frames, height, width), common
    if type(network).__name__ in OF_CLIPS:
        frames = (extent[2] - 1) // 4 + 1 if len(extent) == 3 else 1
        count = t5_tokens or _family(network).t5_tokens[0]
        if isinstance(network, WanTransformer3DModel):
            common["encoder_hidden_states"] = empty(count, config.text_dim)
            return empty(config.in_channels, frames, height, width), common
        common["encoder_hidden_states"] = empty(count, config.text_embed_dim)
        places = frames * (height // config.patch_size) * (width // config.patch_size)
        angles = torch.empty(places, config.attention_head_dim, device="meta")
        common["image_rotary_emb"] = (angles, angles) if config.use_rotary_positional_embeddings else None
        return empty(frames, config.in_channels, height, width), common
    x_t = empty(config.in_channels, height, width)
    if user := next((module for module in network.modules() if isinstance(module, UserProjection)), None):
        attentions = "joint" if isinstance(network, SD3Transformer2DModel) else "cross"
        told = user_options({"user": empty(USER_TOKENS, user.key.in_features)}, dtype)
        common[f"{attentions}_attention_kwargs"] = told
    if isinstance(network, SD3Transformer2DModel):
        tokens = empty(CLIP_TOKENS + (t5_tokens or T5_TOKENS), config.joint_attention_dim)
        return x_t, {**common, "encoder_hidden_states": tokens,
                     "pooled_projections": empty(config.pooled_projection_dim)}  # fmt: skip
    call = {**common, "encoder_hidden_states": empty(CLIP_TOKENS, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        call["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": torch.empty(1, 6, device="meta")}
    return x_t, call


def _family(network: Any) -> Any:
    if isinstance(network, SD3Transformer2DModel):
        return resolve(PIPELINES, "StableDiffusion3Pipeline", "model family")
    if (name := OF_CLIPS.get(type(network).__name__)) is not None:
        return resolve(PIPELINES, name, "model family")
    larger = network.config.addition_embed_type is not None
    return resolve(PIPELINES, "StableDiffusionXLPipeline" if larger else "StableDiffusionPipeline", "model family")
