"""The plain step: Diffusion-DPO written from the public API of diffusers and peft, in the order that scripts take.

At every step it encodes pictures (VAE in fp32) and prompts, asks the policy, switches the adapters off with
`disable_adapters`, asks the reference, switches them on again, and takes an AdamW step with torch's defaults. From one
seed it draws posterior, time and noise in the order of the package, so both see the same and must find the same loss
and gradient.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from peft.tuners.lora.layer import Linear
from torch import Tensor

from benchmarks.models import CLIP_TOKENS, SCHEDULE, Architecture, Encoders, example_ids
from benchmarks.steps import BETA, Cached, Step, Subject
from diffalign.pipelines.attention import Routed
from diffalign.pipelines.fused_lora import FusedLinear

VAE_BATCH = 8  # pictures that are encoded at once


@dataclass(frozen=True)
class Raw:
    """B pairs as a script has them: pixels [2B, 3, H, W] in [-1, 1], winners first; token ids [B, n] per encoder."""

    pixels: Tensor
    ids: tuple[Tensor, ...]


def random_raw(model: Architecture, pairs: int, device: torch.device) -> Raw:
    """Pictures of noise and prompts of random tokens, always the same."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2 * pairs, 3, model.resolution, model.resolution, generator=generator) * 2 - 1
    ids = [example_ids(config, pairs, CLIP_TOKENS, generator) for config in model.texts]
    if model.t5:
        ids.append(example_ids(model.t5, pairs, model.t5_tokens, generator))
    return Raw(pixels.to(device), tuple(i.to(device) for i in ids))


class Plain(Step):
    """The script-shaped step. Families differ in text, noise and the network's call."""

    def __init__(self, subject: Subject, encoders: Encoders, raw: Raw, checkpointing: bool = False) -> None:
        settings = subject.config
        optimizer = torch.optim.AdamW(
            subject.parameters,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay,
            eps=settings.adam_epsilon,
        )
        super().__init__(subject, optimizer, checkpointing)
        self.encoders, self.raw, self.network = encoders, raw, subject.pipe.network

    @abstractmethod
    def encode_text(self) -> tuple[Tensor, Tensor]:
        """(embeddings [B, tokens, width], pooled [B, width]) of the prompts."""

    @abstractmethod
    def add_noise(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, target, network's time) of latents [2B, ...]; winner and loser share time and noise."""

    @abstractmethod
    def predict(self, x_t: Tensor, time: Tensor, embeddings: Tensor, pooled: Tensor) -> Tensor:
        """The network's output."""

    def equip(self, network: Any) -> None:
        """The layers that peft has made, and the attention that diffusers chooses."""
        for module in network.modules():
            if isinstance(module, FusedLinear):
                module.__class__ = Linear
            if isinstance(getattr(module, "processor", None), Routed):
                module.processor = module.processor.inner

    def loss(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            latents = self.encode_pixels(generator)
            x_t, target, time = self.add_noise(latents, generator)
            embeddings, pooled = (part.repeat(2, *[1] * (part.ndim - 1)) for part in self.encode_text())
        inputs = (x_t.to(self.subject.dtype), time, embeddings, pooled)
        with self.subject.autocast():
            policy = self.error(self.predict(*inputs), target)
            self.network.disable_adapters()
            with torch.no_grad():
                reference = self.error(self.predict(*inputs), target)
            self.network.enable_adapters()
        policy_w, policy_l = policy.chunk(2)
        reference_w, reference_l = reference.chunk(2)
        inside = -0.5 * BETA * ((policy_w - policy_l) - (reference_w - reference_l))
        return -F.logsigmoid(inside).mean()

    def encode_pixels(self, generator: torch.Generator) -> Tensor:
        """A draw from the VAE's posterior of every picture, fp32, scaled as the network wants it."""
        vae = self.encoders.vae
        latents = [vae.encode(part).latent_dist.sample(generator) for part in self.raw.pixels.split(VAE_BATCH)]
        shift = vae.config.shift_factor or 0.0
        return (torch.cat(latents) - shift) * vae.config.scaling_factor

    @staticmethod
    def error(prediction: Tensor, target: Tensor) -> Tensor:
        """[2B] mean squared errors."""
        return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=[1, 2, 3])


class PlainSDXL(Plain):
    """Two CLIPs, their last hidden states but one; the pooled state of the second; sizes and crop as numbers."""

    def __init__(self, subject: Subject, encoders: Encoders, raw: Raw, checkpointing: bool = False) -> None:
        super().__init__(subject, encoders, raw, checkpointing)
        self.scheduler = DDPMScheduler(**SCHEDULE)
        side = subject.model.resolution
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=subject.device)
        self.time_ids = sizes.repeat(len(raw.pixels), 1)

    def encode_text(self) -> tuple[Tensor, Tensor]:
        said = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip(self.encoders.texts, self.raw.ids, strict=True)
        ]
        return torch.cat([s.hidden_states[-2] for s in said], dim=-1), said[1].text_embeds

    def add_noise(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        pairs = len(latents) // 2
        total = self.scheduler.config.num_train_timesteps
        time = torch.randint(0, total, (pairs,), generator=generator).to(latents.device).repeat(2)
        noise = torch.randn(latents[:pairs].shape, generator=generator).to(latents.device).repeat(2, 1, 1, 1)
        return self.scheduler.add_noise(latents, noise, time), noise, time

    def predict(self, x_t: Tensor, time: Tensor, embeddings: Tensor, pooled: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": self.time_ids}
        return self.network(x_t, time, encoder_hidden_states=embeddings, added_cond_kwargs=added).sample


class PlainSD3(Plain):
    """Two CLIPs side by side, padded to T5's width, above T5's tokens; a rectified flow with shifted times."""

    def encode_text(self) -> tuple[Tensor, Tensor]:
        said = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip(self.encoders.texts, self.raw.ids[:2], strict=True)
        ]
        clip = torch.cat([s.hidden_states[-2] for s in said], dim=-1)
        t5 = self.encoders.t5(self.raw.ids[2]).last_hidden_state
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], dim=1), torch.cat([s.text_embeds for s in said], dim=-1)

    def add_noise(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        pairs, shift = len(latents) // 2, 3.0
        u = torch.sigmoid(torch.randn(pairs, generator=generator))
        t = (shift * u / (1 + (shift - 1) * u)).to(latents.device).repeat(2)
        noise = torch.randn(latents[:pairs].shape, generator=generator).to(latents.device).repeat(2, 1, 1, 1)
        share = t.view(-1, 1, 1, 1)
        return (1 - share) * latents + share * noise, noise - latents, 1000 * t

    def predict(self, x_t: Tensor, time: Tensor, embeddings: Tensor, pooled: Tensor) -> Tensor:
        return self.network(x_t, timestep=time, encoder_hidden_states=embeddings, pooled_projections=pooled).sample


def plain(subject: Subject, encoders: Encoders, raw: Raw, checkpointing: bool) -> Plain:
    """The plain step of the model's family."""
    return (PlainSD3 if subject.model.flow else PlainSDXL)(subject, encoders, raw, checkpointing)


@torch.no_grad()
def cached_from(step: Plain, seed: int) -> Cached:
    """The plain step's own draw of the latents, with a posterior of width 0, and its embeddings.

    From the same seed ours then takes the very latents, times and noise of the plain step. The shipped cache keeps mean
    and variance in the network's scale, where the same draw differs in the last bit: beta / 2 times the fp32 rounding
    of four errors around 1, about 1e-3 in the logit.
    """
    latents = step.encode_pixels(torch.Generator().manual_seed(seed)).cpu()
    embeddings, pooled = step.encode_text()
    condition = {"prompt_embeds": embeddings.float(), "text_embeds": pooled.float()}
    return Cached(latents, torch.full_like(latents, -torch.inf), condition)
