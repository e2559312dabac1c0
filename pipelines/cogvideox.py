"""CogVideoX text to video: a diffusion transformer that predicts v over space and time, a causal VAE, a T5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor

from diffalign.pipelines.base import LatentPipeline, latent_frames, wrong_size
from diffalign.pipelines.common import ddim_times, load_stock, t5_embeds, vae_decode, vae_moments
from diffalign.process import VariancePreserving
from diffalign.sampling import Condition

Rotary = tuple[Tensor, Tensor]


class CogVideoX(LatentPipeline):
    """Loads any stock CogVideoXPipeline folder whose transformer has patches of one frame (CogVideoX 2B and 5B).

    Pixels are clips, fp32 [B, F, 3, H, W] in [0, 1]; latents [B, C, f, h, w] with f = (F - 1) / 4 + 1. The network
    wants frames before channels, which is turned around here alone. A condition holds `prompt_embeds` [B, 226, 4096].

    Where the number of steps does not divide the 1000 times, a step of the stock sampler ends beside the time at which
    the next begins (333 and 332 of three steps); here it ends there.
    """

    family: ClassVar[str] = "cogvideox"
    clips: ClassVar[bool] = True
    t5_tokens: ClassVar[tuple[int, int]] = (226, 226)  # the stock pipeline's, which the 2B's positions are made for
    lora_prefix: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    parts: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")

    def __init__(self, stock: CogVideoXPipeline, name: str) -> None:
        super().__init__(stock, name)
        if self.network.config.patch_size_t is not None:
            raise ValueError(f"{name}: expected CogVideoX 2B or 5B, got one of 1.5, whose patches span two frames")
        # 5B ships with DPM, a sampler of higher order of the same process
        self._scheduler = CogVideoXDDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
        self.parametrization = self._scheduler.config.prediction_type
        self.process = VariancePreserving(self._scheduler.alphas_cumprod.float(),
                                          float(self._scheduler.final_alpha_cumprod))  # fmt: skip
        self._frames_a_latent: int = stock.vae_scale_factor_temporal
        self._rotary: dict[tuple[int, int, int, torch.device], Rotary] = {}

    @classmethod
    def load(
        cls, folder: str, *, dtype: torch.dtype, device: torch.device | str, revision: str | None, variant: str | None
    ) -> CogVideoX:
        stock = load_stock(CogVideoXPipeline, folder, dtype=dtype, revision=revision, variant=variant)
        return cls(stock.to(device), folder)

    def set_max_sequence_length(self, tokens: int) -> None:
        if not self.network.config.use_rotary_positional_embeddings and tokens != self.t5_tokens[0]:
            raise ValueError(f"max_sequence_length: expected {self.t5_tokens[0]}, which the positions of {self.name} "
                             f"are made for, got {tokens}; leave it out")  # fmt: skip
        super().set_max_sequence_length(tokens)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return {"prompt_embeds": t5_embeds(self.stock, prompts, self.max_sequence_length)}

    def times(self, steps: int) -> Tensor:
        return ddim_times(self._scheduler, steps)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = self.network.dtype
        y = self.network(x_t.transpose(1, 2).to(dtype), timestep=self.process.network_time(t), return_dict=False,
                         encoder_hidden_states=condition["prompt_embeds"].to(dtype),
                         image_rotary_emb=self._positions(x_t))  # fmt: skip
        return y[0].float().transpose(1, 2)

    def _positions(self, x_t: Tensor) -> Rotary | None:
        """Of latents [B, C, f, h, w], for a network that turns its queries by them; kept for each size."""
        config = self.network.config
        if not config.use_rotary_positional_embeddings:
            return None
        frames, height, width = x_t.shape[2:]
        key = (frames, height, width, x_t.device)
        if key not in self._rotary:
            patch = config.patch_size
            grid = (height // patch, width // patch)
            base = (config.sample_width // patch, config.sample_height // patch)
            self._rotary[key] = get_3d_rotary_pos_embed(
                config.attention_head_dim, get_resize_crop_region_for_grid(grid, *base), grid, frames, device=x_t.device
            )
        return self._rotary[key]

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log-variance) of the latents, each fp32 [B, C, f, h, w], of clips [B, F, 3, H, W] in [0, 1]."""
        return vae_moments(self.stock.vae, pixels.transpose(1, 2))

    def decode(self, latents: Tensor) -> Tensor:
        """Clips [B, F, 3, H, W], not clamped (gradients flow), of latents [B, C, f, h, w]."""
        return self.decoder()(latents)

    def decoder(self) -> Callable[[Tensor], Tensor]:
        vae = self.stock.vae
        return lambda latents: vae_decode(vae, latents).transpose(1, 2)

    def frames_of(self, frames: int | None) -> int:
        return frames or int(self.network.config.sample_frames)

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        """Shape of one latent for a clip of this size in pixels and frames; the model's own if not given.

        Raises:
            ValueError: a size or a number of frames that VAE or network cannot represent.
        """
        config = self.network.config
        height = height or config.sample_height * self._factor
        width = width or config.sample_width * self._factor
        step = self._factor * config.patch_size
        if height % step or width % step or min(height, width) <= 0:
            raise ValueError(wrong_size(height, width, step, None))
        count = latent_frames(self.frames_of(frames), self._frames_a_latent)
        return (config.in_channels, count, height // self._factor, width // self._factor)
