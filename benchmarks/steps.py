"""One Diffusion-DPO LoRA step, twice: as this package takes it, and plainly, in the order that scripts take it.

`Ours` calls the package's own method, pipeline, reference and optimizer on cached latents and embeddings, as the
trainer does. `Plain` is written from the public API of diffusers and peft: at every step it encodes pictures and
prompts, asks the policy, switches the adapters off with `disable_adapters`, asks the reference, switches them on again,
and takes an AdamW step with torch's defaults. Both draw posterior, time and noise in one order from one generator, so
from one seed they see the same latents, times and noise, and must find the same loss and gradient.

Neither reads files or writes logs; for the plain step that is a favor (it would decode pictures at every step).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from benchmarks.models import CLIP_TOKENS, SCHEDULE, Architecture, Encoders, build_pipeline, example_ids
from diffalign.config import RunConfig, load_config
from diffalign.methods.base import PairBatch, Run, reference_errors
from diffalign.methods.dpo import DPO
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.lora import attach_lora, without_adapters
from diffalign.sampling import Condition
from diffalign.startup import adamw

BETA = 5000.0
VAE_BATCH = 8  # pictures that the plain step encodes at once, as the script's default


@dataclass(frozen=True)
class Subject:
    """The network in training, its LoRA parameters, and where and in what precision it computes."""

    model: Architecture
    pipe: LatentPipeline
    parameters: list[torch.nn.Parameter]
    device: torch.device
    dtype: torch.dtype
    config: RunConfig

    def autocast(self) -> AbstractContextManager[None]:
        """As the trainer's: on for 16 bit, off for fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype != torch.float32)


def build_subject(model: Architecture, device: torch.device, dtype: torch.dtype, rank: int) -> Subject:
    """The model with a fresh adapter, whose B is not zero: at zero every logit is 0 and parity would show little."""
    torch.manual_seed(0)
    pipe = build_pipeline(model, device, dtype)
    parameters = attach_lora(pipe, rank=rank)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1e-2 * torch.randn_like(parameter))
    config = load_config({"pretrained_model_name_or_path": "none", "learning_rate": 1e-5,
                          "data": {"name": "pickapic", "path": "none"}})  # fmt: skip
    return Subject(model, pipe, parameters, device, dtype, config)


@dataclass(frozen=True)
class Cached:
    """B pairs as the cache has them: moments of the scaled latents [2B, C, h, w] on the CPU, conditions [B, ...]."""

    mean: Tensor
    logvar: Tensor
    condition: Condition

    def batch(self, generator: torch.Generator, device: torch.device) -> PairBatch:
        """Draws from the posteriors on the CPU, winners first, as `diffalign.batches` does."""
        pairs = zip(self.mean.chunk(2), self.logvar.chunk(2), strict=True)
        drawn = [mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator) for mean, logvar in pairs]
        winner, loser = (latents.to(device) for latents in drawn)
        return PairBatch(winner, loser, self.condition, torch.ones(len(winner), device=device))


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


def random_cached(model: Architecture, pairs: int, device: torch.device) -> Cached:
    """Latents and embeddings of the right shapes, always the same."""
    generator = torch.Generator().manual_seed(1)
    network, side = model.network, model.resolution // 8
    shape = (2 * pairs, network["in_channels"], side, side)
    wide = "joint_attention_dim" if model.flow else "cross_attention_dim"
    tokens = CLIP_TOKENS + (model.t5_tokens if model.t5 else 0)
    condition = {
        "prompt_embeds": torch.randn(pairs, tokens, network[wide], generator=generator),
        "text_embeds": torch.randn(pairs, pooled_width(model), generator=generator),
    }
    moved = {name: value.to(device) for name, value in condition.items()}
    return Cached(torch.randn(shape, generator=generator), torch.full(shape, -6.0), moved)


def pooled_width(model: Architecture) -> int:
    """Width of the pooled embedding."""
    first, second = (config["projection_dim"] for config in model.texts)
    return first + second if model.flow else second


class Step(ABC):
    """One optimizer step; `loss` is apart so that gradients can be compared and kept activations counted."""

    def __init__(self, subject: Subject, optimizer: torch.optim.Optimizer, checkpointing: bool) -> None:
        self.subject, self.optimizer, self.checkpointing = subject, optimizer, checkpointing

    def enter(self) -> None:
        """Switches checkpointing as this variant wants it; before a step, and not part of its time."""
        network = self.subject.pipe.network
        if self.checkpointing:
            network.enable_gradient_checkpointing()
        else:
            network.disable_gradient_checkpointing()

    @abstractmethod
    def loss(self, seed: int) -> Tensor:
        """The mean loss of the pairs, from draws that follow from the seed alone."""

    def __call__(self, seed: int) -> None:
        with self.subject.autocast():
            self.loss(seed).backward()
        torch.nn.utils.clip_grad_norm_(self.subject.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Ours(Step):
    """The package's step: method, pipeline, reference and optimizer are its own.

    Args:
        cached_reference: the reference's errors are computed once per seed and then looked up.
    """

    def __init__(
        self, subject: Subject, cached: Cached, checkpointing: bool = False, cached_reference: bool = False
    ) -> None:
        super().__init__(subject, adamw(subject.parameters, subject.config), checkpointing)
        self.cached, self.method = cached, DPO(beta=BETA)
        self.reference = without_adapters(subject.pipe)
        self.reference_errors: dict[int, Tensor] | None = {} if cached_reference else None

    def loss(self, seed: int) -> Tensor:
        pipe = self.subject.pipe
        generator = torch.Generator().manual_seed(seed)
        run = Run(pipe.predict, self.reference, pipe.process, pipe.parametrization, generator)
        with self.subject.autocast():
            with torch.no_grad():
                (noised,) = self.method.prepare(run, self.cached.batch(generator, self.subject.device))
                if self.reference_errors is not None:
                    if seed not in self.reference_errors:
                        self.reference_errors[seed] = reference_errors(run, noised)
                    noised = replace(noised, reference_errors=self.reference_errors[seed])
            return self.method.loss(run, noised).value.mean()


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


def gradients(step: Step, seed: int) -> tuple[float, Tensor]:
    """(loss, all gradients as one vector) of one step that changes no weight."""
    step.enter()
    with step.subject.autocast():
        value = step.loss(seed)
        value.backward()
    parameters = step.subject.parameters
    vector = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return value.item(), vector
