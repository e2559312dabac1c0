"""AnimateDiff: Stable Diffusion 1.5 with motion modules between the layers of its U-Net; each frame is a latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AnimateDiffPipeline, UNetMotionModel
from torch import Tensor

from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.common import (
    clip_embeds,
    ddim_times,
    load_stock,
    vae_decode,
    vae_moments,
    variance_preserving,
)
from diffalign.sampling import Condition

FRAMES = 16  # the stock pipeline's default, and what the released motion modules were trained on
AT_ONCE = 16  # frames that the VAE is given, as in the stock pipeline


class AnimateDiff(LatentPipeline):
    """Loads any stock AnimateDiffPipeline folder, as that saves one of a Stable Diffusion 1.5 and a motion adapter.

    Pixels are clips, fp32 [B, F, 3, H, W] in [0, 1]; latents [B, C, F, h, w], since the VAE is one of pictures. A
    condition holds `prompt_embeds` [B, 77, 768], which all frames share.

    Where the scheduler of the folder spaces its times linearly (`linspace`, the motion adapters' own), a step of the
    stock sampler ends beside the time at which the next begins; here it ends there.
    """

    family: ClassVar[str] = "animatediff"
    clips: ClassVar[bool] = True
    lora_prefix: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")  # of space and of time
    parts: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def __init__(self, stock: AnimateDiffPipeline, name: str) -> None:
        if not isinstance(stock.unet, UNetMotionModel):
            raise ValueError(f"{name}: expected a U-Net with motion modules, got one of pictures; load the base with "
                             f"AnimateDiffPipeline.from_pretrained(..., motion_adapter=...) and save it")  # fmt: skip
        super().__init__(stock, name)
        self.parametrization = stock.scheduler.config.prediction_type
        self.process, self._scheduler = variance_preserving(stock.scheduler.config)

    @classmethod
    def load(
        cls, folder: str, *, dtype: torch.dtype, device: torch.device | str, revision: str | None, variant: str | None
    ) -> AnimateDiff:
        # the adapter's weights are in the U-Net already
        stock = load_stock(AnimateDiffPipeline, folder, dtype=dtype, revision=revision, variant=variant,
                           motion_adapter=None, feature_extractor=None, image_encoder=None)  # fmt: skip
        return cls(stock.to(device), folder)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return {"prompt_embeds": clip_embeds(self.stock, prompts)}

    def times(self, steps: int) -> Tensor:
        return ddim_times(self._scheduler, steps)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        each = condition["prompt_embeds"].to(dtype).repeat_interleave(x_t.shape[2], 0)
        y = self.network(x_t.to(dtype), self.process.network_time(t), encoder_hidden_states=each, return_dict=False)
        return y[0].float()

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log-variance) of the latents, each fp32 [B, C, F, h, w], of clips [B, F, 3, H, W] in [0, 1]."""
        parts = [vae_moments(self.stock.vae, some) for some in pixels.flatten(0, 1).split(AT_ONCE)]
        mean, logvar = (torch.cat(part).unflatten(0, pixels.shape[:2]) for part in zip(*parts, strict=True))
        return mean.transpose(1, 2), logvar.transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Clips [B, F, 3, H, W], not clamped (gradients flow), of latents [B, C, F, h, w]."""
        return self.decoder()(latents)

    def decoder(self) -> Callable[[Tensor], Tensor]:
        vae: Any = self.stock.vae

        def decode(latents: Tensor) -> Tensor:
            frames = latents.transpose(1, 2)
            pixels = torch.cat([vae_decode(vae, some) for some in frames.flatten(0, 1).split(AT_ONCE)])
            return pixels.unflatten(0, frames.shape[:2])

        return decode

    def frames_of(self, frames: int | None) -> int:
        """Raises ValueError for more frames than the motion modules have places for."""
        most = self.network.config.motion_max_seq_length
        if frames is not None and not 1 <= frames <= most:
            raise ValueError(f"expected 1 to {most} frames, which the motion modules of {self.name} know, got {frames}")
        return frames or min(FRAMES, most)

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        """Shape of one latent for a clip of this size in pixels and frames; the model's own if not given.

        Raises:
            ValueError: a size or a number of frames that VAE or network cannot represent.
        """
        channels, *sides = super().latent_shape(height, width)
        return (channels, self.frames_of(frames), *sides)
