"""Stock model folders with random weights: real layouts, small enough to build in a second."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    MotionAdapter,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from diffalign.shapes.tiny_sd import build_tokenizer

HOME = tempfile.TemporaryDirectory(prefix="diffalign-miniatures-")  # gone when the process ends

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "euler": (EulerDiscreteScheduler, {}),
}


@functools.cache
def stable_diffusion(prediction_type: str = "epsilon", scheduler: str = "ddim", seed: int = 0) -> Path:
    """A folder of a StableDiffusionPipeline with every part present, 32-pixel pictures, 8 x 8 latents."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip(CLIPTextModel, tokenizer), tokenizer=tokenizer, unet=_unet(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        scheduler=_scheduler(prediction_type, scheduler),
    )  # fmt: skip
    return _saved(pipe)


@functools.cache
def stable_diffusion_xl(
    prediction_type: str = "epsilon", scheduler: str = "euler", seed: int = 0, zeros: bool = True
) -> Path:
    """A folder of a StableDiffusionXLPipeline: two text encoders of different widths, pooled embedding, time ids."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    pipe = StableDiffusionXLPipeline(
        vae=_vae(force_upcast=True), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=_clip(CLIPTextModel, tokenizer, layers=2),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer, width=24, layers=2),
        unet=_unet(cross_attention_dim=40, addition_embed_type="text_time", addition_time_embed_dim=8,
                   projection_class_embeddings_input_dim=24 + 6 * 8, transformer_layers_per_block=(1, 2)),
        scheduler=_scheduler(prediction_type, scheduler), force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    )  # fmt: skip
    return _saved(pipe)


@functools.cache
def wan(scheduler: str = "euler", seed: int = 0) -> Path:
    """A folder of a WanPipeline: clips of 5 frames of 32 pixels, latents of 2 x 4 x 4."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0)
    transformer = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
                                        text_dim=24, freq_dim=16, ffn_dim=32, num_layers=2)  # fmt: skip
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1,
                           latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 2.0, 1.5, 1.0])  # fmt: skip
    schedulers = {"euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
                  "unipc": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                                   flow_shift=3.0)}  # fmt: skip
    pipe = WanPipeline(tokenizer=tokenizer, text_encoder=UMT5EncoderModel(text), vae=vae, transformer=transformer,
                       scheduler=schedulers[scheduler])  # fmt: skip
    return _saved(pipe)


@functools.cache
def cogvideox(rotary: bool = True, scheduler: str = "ddim", seed: int = 0) -> Path:
    """A folder of a CogVideoXPipeline, as 5B with rotary positions, as 2B without: clips of 9 frames of 32 pixels."""
    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=48, num_layers=2, sample_width=4, sample_height=4, sample_frames=9,
        use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(block_out_channels=(4,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
                                 scaling_factor=0.7, sample_height=32, sample_width=32)  # fmt: skip
    kind = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}[scheduler]
    walked = kind(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True,
                  snr_shift_scale=1.0 if rotary else 3.0)  # fmt: skip
    return _saved(CogVideoXPipeline(tokenizer=t5_tokenizer(), text_encoder=_t5(), vae=vae, transformer=transformer,
                                    scheduler=walked))  # fmt: skip


@functools.cache
def animatediff(adapter_saved: bool = False, seed: int = 0) -> Path:
    """A folder of an AnimateDiffPipeline, of a U-Net of pictures and a motion adapter that knows 8 frames."""
    torch.manual_seed(seed)
    tokenizer, unet = build_tokenizer(), _unet()
    adapter = MotionAdapter(block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2,
                            motion_norm_num_groups=4, motion_max_seq_length=8, use_motion_mid_block=False)  # fmt: skip
    for name, weight in adapter.named_parameters():  # motion modules begin as none: their last layers are zero
        if "proj_out" in name:
            torch.nn.init.normal_(weight, std=0.3)
    pipe = AnimateDiffPipeline(vae=_vae(), text_encoder=_clip(CLIPTextModel, tokenizer), tokenizer=tokenizer, unet=unet,
                               motion_adapter=adapter, scheduler=_scheduler("epsilon", "ddim"))  # fmt: skip
    if not adapter_saved:
        pipe.register_modules(motion_adapter=None)
    return _saved(pipe)


@functools.cache
def stable_diffusion_3(t5: bool = True, dual: bool = False, seed: int = 0) -> Path:
    """A folder of a StableDiffusion3Pipeline; `dual` is SD3.5-medium's second attention and normed queries."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=40, out_channels=16,
        pos_embed_max_size=12, dual_attention_layers=(0,) if dual else (), qk_norm="rms_norm" if dual else None,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=_vae(latent_channels=16, shift_factor=0.06, scaling_factor=1.5,
                                          use_quant_conv=False, use_post_quant_conv=False),
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=t5_tokenizer() if t5 else None,
        text_encoder=_clip(CLIPTextModelWithProjection, tokenizer, layers=2),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer, width=24, layers=2),
        text_encoder_3=_t5() if t5 else None, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    return _saved(pipe)


FAMILIES: dict[str, Callable[[], Path]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "sd3.5": lambda: stable_diffusion_3(dual=True),
    "sd3-without-t5": lambda: stable_diffusion_3(t5=False),
}


def t5_tokenizer() -> T5Tokenizer:
    """A handful of whole words; the rest letter by letter."""
    words = ["a", "red", "blue", "green", "circle", "squares", "square", "cross", "above", "two"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    scores = [*((f"\u2581{word}", -1.0) for word in words), *((letter, -9.0) for letter in ["\u2581", *letters])]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scores], extra_ids=0,
                       model_max_length=512)  # fmt: skip


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), d_model=48, d_kv=8, d_ff=32, num_layers=1,
                                   num_heads=2, feed_forward_proj="gated-gelu"))  # fmt: skip


def _clip(kind: Any, tokenizer: CLIPTokenizer, width: int = 16, layers: int = 1) -> Any:
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, projection_dim=width,
                            num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=77,
                            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                            pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    return kind(config)


def _unet(**options: Any) -> UNet2DConditionModel:
    settings = {"cross_attention_dim": 16, **options}
    return UNet2DConditionModel(sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
                                **settings)  # fmt: skip


def _vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,) * 3, norm_num_groups=4, sample_size=32,
                         down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                         **options)  # fmt: skip


def _scheduler(prediction_type: str, name: str) -> Any:
    kind, options = SCHEDULERS[name]
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                timestep_spacing="leading", prediction_type=prediction_type, **options)  # fmt: skip


def _saved(pipe: DiffusionPipeline) -> Path:
    folder = Path(tempfile.mkdtemp(dir=HOME.name))
    pipe.save_pretrained(folder)
    return folder
