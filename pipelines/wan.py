"""Wan 2.1 text to video: a flow transformer over space and time, a causal VAE, a UMT5 text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from diffalign.pipelines.base import LatentPipeline, latent_frames, wrong_size
from diffalign.pipelines.common import flow_times, load_stock, own_dtype, t5_embeds
from diffalign.process import RectifiedFlow
from diffalign.sampling import Condition

FRAMES, HEIGHT, WIDTH = 81, 480, 832  # the stock pipeline's defaults: nothing in a checkpoint tells its own size


class Wan(LatentPipeline):
    """Loads any stock WanPipeline folder with one transformer (Wan 2.1, T2V).

    Pixels are clips, fp32 [B, F, 3, H, W] in [0, 1]; latents [B, C, f, h, w] with f = (F - 1) / 4 + 1: the first frame
    has a latent of its own, and four frames share each of the others. A condition holds `prompt_embeds`
    [B, `max_sequence_length`, 4096], zeros beyond the prompt's end.
    """

    family: ClassVar[str] = "wan"
    clips: ClassVar[bool] = True
    t5_tokens: ClassVar[tuple[int, int]] = (512, 512)  # of UMT5; the stock pipeline's default
    lora_prefix: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    parts: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")

    def __init__(self, stock: WanPipeline, name: str) -> None:
        refuse_two_stages(stock, name)
        super().__init__(stock, name)
        self.parametrization = "flow"
        self._frames_a_latent: int = stock.vae_scale_factor_temporal
        config = stock.scheduler.config
        # Wan ships with UniPC, a sampler of higher order of the same flow; its shift has a name of its own there
        shift = config.get("flow_shift", config.get("shift", 1.0))
        self._scheduler = FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=shift)
        self.process = RectifiedFlow(shift=shift, scale=config.num_train_timesteps)

    @classmethod
    def load(
        cls, folder: str, *, dtype: torch.dtype, device: torch.device | str, revision: str | None, variant: str | None
    ) -> Wan:
        stock = load_stock(WanPipeline, folder, dtype=dtype, revision=revision, variant=variant)
        return cls(stock.to(device), folder)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return {"prompt_embeds": t5_embeds(self.stock, prompts, self.max_sequence_length)}

    def times(self, steps: int) -> Tensor:
        return flow_times(self._scheduler, steps)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = self.network.dtype  # its norms and modulations stay fp32 in a 16-bit folder
        y = self.network(x_t.to(dtype), timestep=self.process.network_time(t), return_dict=False,
                         encoder_hidden_states=condition["prompt_embeds"].to(dtype))  # fmt: skip
        return y[0].float()

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log-variance) of the latents, each fp32 [B, C, f, h, w], of clips [B, F, 3, H, W] in [0, 1]."""
        vae = self.stock.vae
        with own_dtype(vae):
            posterior = vae.encode(pixels.transpose(1, 2).to(vae.device, vae.dtype) * 2 - 1).latent_dist
        mean, std = channel_scales(vae)
        return (posterior.mean.float() - mean) / std, posterior.logvar.float() - 2 * std.log()

    def decode(self, latents: Tensor) -> Tensor:
        """Clips [B, F, 3, H, W] in [0, 1] of latents [B, C, f, h, w]; the stock VAE clamps, with no gradient beyond."""
        return self.decoder()(latents)

    def decoder(self) -> Callable[[Tensor], Tensor]:
        vae = self.stock.vae

        def decode(latents: Tensor) -> Tensor:
            mean, std = channel_scales(vae)
            code = latents.float() * std + mean
            with own_dtype(vae):
                pixels: Tensor = vae.decode(code.to(vae.dtype)).sample.float() / 2 + 0.5
            return pixels.transpose(1, 2)

        return decode

    def frames_of(self, frames: int | None) -> int:
        return frames or FRAMES

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        """Shape of one latent for a clip of this size in pixels and frames.

        Raises:
            ValueError: a size or a number of frames that VAE or network cannot represent.
        """
        height, width, space = height or HEIGHT, width or WIDTH, self._factor
        _, *patch = self.network.config.patch_size
        step = space * patch[0]
        if height % step or width % step or min(height, width) <= 0:
            raise ValueError(wrong_size(height, width, step, None))
        count = latent_frames(self.frames_of(frames), self._frames_a_latent)
        return (self.network.config.in_channels, count, height // space, width // space)


def channel_scales(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of each channel of the codes, [1, C, 1, 1, 1]: latents have 0 and 1."""
    stored = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(values, device=vae.device).float().view(1, -1, 1, 1, 1) for values in stored)
    return mean, std


def refuse_two_stages(stock: WanPipeline, name: str) -> None:
    """Raises ValueError for Wan 2.2, which has a transformer for high noise and another one for low noise."""
    if stock.transformer is None or stock.config.get("boundary_ratio") or stock.config.get("expand_timesteps"):
        raise ValueError(f"{name}: expected a Wan 2.1 model with one transformer, got one of Wan 2.2, whose two stages "
                         f"or times for each token are not served")  # fmt: skip
