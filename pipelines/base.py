"""What a checkpoint must offer to be aligned: the one abstract class of the house.

A family (SD1.5, SDXL, SD3 ...) is one final subclass in one file: how it loads, encodes prompts, walks times and
predicts. What all of them do with the stock diffusers pipeline that they wrap is here. LoRA, saving, references and
sampling are functions elsewhere that take a `LatentPipeline`.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from diffalign.data.images import Frame
from diffalign.pipelines.common import CLIP_TOKENS, fingerprint, text_parts, vae_decode, vae_moments
from diffalign.process import NoiseProcess
from diffalign.sampling import Condition


class LatentPipeline(ABC):
    """A text-conditioned latent diffusion or flow model, around a stock diffusers pipeline.

    Pixels are fp32 [B, 3, H, W] in [0, 1], of clips [B, F, 3, H, W]; latents are what the network works on, [B, C, h,
    w] or [B, C, f, h, w]: scaled (and shifted) VAE codes. Every weight is frozen and in evaluation mode.
    """

    family: ClassVar[str]  # "sd", "sdxl", ...
    lora_prefix: ClassVar[str]  # the network's name in the stock pipeline and in a LoRA file: "unet" or "transformer"
    lora_targets: ClassVar[tuple[str, ...]]  # default modules to adapt, as endings of module names
    parts: ClassVar[tuple[str, ...]] = ()  # of the stock pipeline, without which it does not work
    clips: ClassVar[bool] = False  # whether pixels are clips
    t5_tokens: ClassVar[tuple[int, int] | None] = None  # that its T5 is padded or cut to: (usually, at most)

    process: NoiseProcess
    parametrization: str  # a key of diffalign.process.PARAMETRIZATIONS
    max_sequence_length: int  # of T5's, where there is one

    def __init__(self, stock: Any, name: str) -> None:
        self.name = name  # what it was loaded from
        if self.t5_tokens:
            self.max_sequence_length = self.t5_tokens[0]
        self.network: Any = getattr(stock, self.lora_prefix)  # the one module to train, with diffusers' adapter methods
        self._stock: Any = stock
        spatial = "vae_scale_factor_spatial"  # the name that video pipelines have for it
        self._factor: int = getattr(stock, spatial) if hasattr(stock, spatial) else stock.vae_scale_factor
        for part in stock.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()

    @classmethod
    @abstractmethod
    def load(
        cls, folder: str, *, dtype: torch.dtype, device: torch.device | str, revision: str | None, variant: str | None
    ) -> Self:
        """From a stock diffusers folder or hub id."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Conditions with batch len(prompts), fp32, on the network's device; "" is the unconditional one."""

    @abstractmethod
    def times(self, steps: int) -> Tensor:
        """[steps + 1] times from noise to picture, as the stock deterministic sampler walks them."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the network says, fp32 [B, ...], at process times t [B]: the policy."""

    def frame_condition(self, frames: Sequence[Frame]) -> Condition:
        """What the network is told of where its training pictures come from, beside the prompt; of most nothing."""
        return {}

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log-variance) of the latents, each fp32 [B, C, h, w], of pixels [B, 3, H, W] in [0, 1]."""
        return vae_moments(self.stock.vae, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped (gradients flow), of latents [B, C, h, w]."""
        return vae_decode(self.stock.vae, latents)

    def decoder(self) -> Callable[[Tensor], Tensor]:
        """`decode` as a function that outlives `release`, and keeps the VAE alive for it."""
        return functools.partial(vae_decode, self.stock.vae)

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        """Shape of one latent for a picture of this size in pixels; the model's own size if not given.

        Raises:
            ValueError: a size that VAE or network cannot represent, or frames of a model that draws pictures.
        """
        if frames is not None:
            self.frames_of(frames)
        factor, config = self._factor, self.network.config
        own = config.sample_size * factor
        height, width = height or own, width or own
        step = factor * config.get("patch_size", 1)
        largest = config.get("pos_embed_max_size", 0) * step or None  # of SD3's table of positions
        fits = height % step == width % step == 0 < min(height, width) and max(height, width) <= (largest or math.inf)
        if not fits:
            raise ValueError(wrong_size(height, width, step, largest))
        return (config.in_channels, height // factor, width // factor)

    @property
    def pixels_a_latent(self) -> int:
        """Side of the square of pixels that a latent's place stands for."""
        return self._factor

    def frames_of(self, frames: int | None) -> int:
        """How many frames a clip has, the model's own number if not given; of a model that draws clips."""
        raise ValueError(f"{self.name} draws pictures: expected no number of frames, got {frames}")

    def fingerprint(self, part: str) -> str:
        """Hash of the weights and settings of "vae" or "text": what cached latents and embeddings depend on."""
        if part == "vae":
            return fingerprint([self.stock.vae], dict(self.stock.vae.config))
        if part == "text":
            usual = self.t5_tokens is None or self.max_sequence_length == self.t5_tokens[0]
            return fingerprint(*text_parts(self.stock)) + ("" if usual else f"-{self.max_sequence_length}")
        raise ValueError(f"expected part 'vae' or 'text', got {part!r}")

    def set_max_sequence_length(self, tokens: int) -> None:
        """Pads or cuts prompts to so many tokens where the family leaves a choice (T5); before anything is encoded.

        Raises:
            ValueError: a family without a choice, or a length that its text encoder does not read.
        """
        if self.t5_tokens is None:
            raise ValueError(f"max_sequence_length: expected a model with a T5 text encoder, got {self.name} of the "
                             f"family {self.family}, whose prompts always have {CLIP_TOKENS} tokens; leave it "
                             f"out")  # fmt: skip
        if not 1 <= tokens <= self.t5_tokens[1]:
            raise ValueError(f"max_sequence_length: expected 1 to {self.t5_tokens[1]} tokens of T5, got {tokens}")
        self.max_sequence_length = tokens

    def release(self) -> None:
        """Frees VAE and text encoders; encode, decode and encode_prompts fail with a clear message from then on."""
        self._stock = None

    def save_pretrained(self, folder: str) -> None:
        """Writes the whole model as a stock diffusers folder."""
        self.stock.save_pretrained(folder)

    @property
    def stock(self) -> Any:
        """The diffusers pipeline.

        Raises:
            ValueError: it was released.
        """
        if self._stock is None:
            raise ValueError(f"{self.name}: VAE and text encoder were released to save memory; load the model again")
        return self._stock


def latent_frames(frames: int, compression: int) -> int:
    """Of a causal VAE: the first frame has a latent of its own, `compression` share each of the others.

    Raises:
        ValueError: a number that is not of that form.
    """
    if frames < 1 or (frames - 1) % compression:
        near = max(0, round((frames - 1) / compression)) * compression + 1
        raise ValueError(f"expected a number of frames of the form {compression} n + 1, got {frames}; the nearest is "
                         f"{near}")  # fmt: skip
    return (frames - 1) // compression + 1


def wrong_size(height: int, width: int, step: int, largest: int | None) -> str:
    """What to say of a size that a model cannot take, with the nearest that it can."""
    limit = "" if largest is None else f", at most {largest}"
    high, wide = (min(max(step, round(side / step) * step), largest or math.inf) for side in (height, width))
    return (f"expected a height and width that are multiples of {step}{limit}, got {height} x {width}; "
            f"the nearest is {high} x {wide}")  # fmt: skip
