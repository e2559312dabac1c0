"""What a checkpoint must offer to be aligned: the one abstract class of the house.

A family (SD1.5, SDXL, SD3 ...) is one final subclass in one file. LoRA, saving, references and sampling are functions
elsewhere that take a `LatentPipeline`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from diffalign.process import NoiseProcess
from diffalign.sampling import Condition


class LatentPipeline(ABC):
    """A text-conditioned latent diffusion or flow model.

    Pixels are fp32 [B, 3, H, W] in [0, 1]; latents are what the network works on: scaled (and shifted) VAE codes.
    """

    family: ClassVar[str]  # "sd", "sdxl", ...
    lora_prefix: ClassVar[str]  # the network's prefix in a LoRA file: "unet" or "transformer"
    lora_targets: ClassVar[tuple[str, ...]]  # default modules to adapt, as endings of module names

    name: str  # what it was loaded from
    network: Any  # the one trainable module: a diffusers model, with its adapter methods
    process: NoiseProcess
    parametrization: str  # a key of diffalign.process.PARAMETRIZATIONS

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
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log-variance) of the latents, each fp32 [B, C, h, w], of pixels [B, 3, H, W] in [0, 1]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped (gradients flow), of latents [B, C, h, w]."""

    @abstractmethod
    def decoder(self) -> Callable[[Tensor], Tensor]:
        """`decode` as a function that outlives `release`, and keeps the VAE alive for it."""

    @abstractmethod
    def times(self, steps: int) -> Tensor:
        """[steps + 1] times from noise to picture, as the stock deterministic sampler walks them."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the network says, fp32 [B, ...], at process times t [B]: the policy."""

    @abstractmethod
    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Shape of one latent for a picture of this size in pixels; the model's own size if not given.

        Raises ValueError for a size that the VAE cannot represent.
        """

    @abstractmethod
    def fingerprint(self, part: str) -> str:
        """Hash of the weights and settings of "vae" or "text": what cached latents and embeddings depend on."""

    @abstractmethod
    def release(self) -> None:
        """Frees VAE and text encoder; encode, decode and encode_prompts fail with a clear message from then on."""

    @abstractmethod
    def save_pretrained(self, folder: str) -> None:
        """Writes the whole model as a stock diffusers folder."""
