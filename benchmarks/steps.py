"""One Diffusion-DPO LoRA step as this package takes it, and what it has in common with the plain one.

`Ours` calls the package's own method, pipeline, reference and optimizer on cached latents and embeddings, as the
trainer does. Neither step reads files or writes logs; for the plain one (`benchmarks/plain.py`) that is a favor: it
would decode pictures and tokenize prompts at every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import CLIP_TOKENS, Architecture, build_pipeline
from diffalign.config import RunConfig, load_config
from diffalign.graphs import cuda_graph, graphed
from diffalign.methods.base import Batch, Noised, Run, pair_batch, reference_errors
from diffalign.methods.dpo import DPO
from diffalign.pipelines.attention import require, set_attention
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.compiling import compile_blocks
from diffalign.pipelines.fused_lora import fuse_lora_layers
from diffalign.pipelines.lora import attach_lora, without_adapters
from diffalign.sampling import Condition
from diffalign.startup import adamw

BETA = 5000.0


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

    def batch(self, generator: torch.Generator, device: torch.device) -> Batch:
        """Draws from the posteriors on the CPU, winners first, as `diffalign.batches` does."""
        pairs = zip(self.mean.chunk(2), self.logvar.chunk(2), strict=True)
        drawn = [mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator) for mean, logvar in pairs]
        winner, loser = (latents.to(device) for latents in drawn)
        return pair_batch(winner, loser, self.condition, torch.ones(len(winner), device=device))


def random_cached(model: Architecture, pairs: int, device: torch.device) -> Cached:
    """Latents and embeddings of the right shapes, always the same."""
    generator = torch.Generator().manual_seed(1)
    if model.clip:
        return _random_clips(model, model.clip, pairs, device, generator)
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


def _random_clips(
    model: Architecture, clip: tuple[int, int, int], pairs: int, device: torch.device, generator: torch.Generator
) -> Cached:
    height, width, frames = clip
    shape = (2 * pairs, model.network["in_channels"], (frames - 1) // 4 + 1, height // 8, width // 8)
    prompts = torch.randn(pairs, model.t5_tokens, model.network["text_dim"], generator=generator)
    return Cached(torch.randn(shape, generator=generator), torch.full(shape, -6.0),
                  {"prompt_embeds": prompts.to(device)})  # fmt: skip


def pooled_width(model: Architecture) -> int:
    """Width of the pooled embedding."""
    first, second = (config["projection_dim"] for config in model.texts)
    return first + second if model.flow else second


class Step(ABC):
    """One optimizer step; `loss` is apart so that gradients can be compared and kept activations counted."""

    def __init__(self, subject: Subject, optimizer: torch.optim.Optimizer, checkpointing: bool) -> None:
        self.subject, self.optimizer, self.checkpointing = subject, optimizer, checkpointing
        self.compiled: dict[str, Any] = {}  # module -> what torch.compile made of it

    def enter(self) -> None:
        """Sets the network up as this variant wants it; before a step, and not part of its time."""
        network = self.subject.pipe.network
        if self.checkpointing:
            network.enable_gradient_checkpointing()
        else:
            network.disable_gradient_checkpointing()
        for name, module in network.named_modules():
            module._compiled_call_impl = self.compiled.get(name)
        self.equip(network)

    @abstractmethod
    def equip(self, network: Any) -> None:
        """Gives the network this variant's LoRA layers and attention."""

    @abstractmethod
    def loss(self, seed: int) -> Tensor:
        """The mean loss of the pairs, from draws that follow from the seed alone."""

    def __call__(self, seed: int) -> None:
        self.loss(seed).backward()
        torch.nn.utils.clip_grad_norm_(self.subject.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Ours(Step):
    """The package's step: method, pipeline, reference and optimizer are its own.

    Args:
        cached_reference: the reference's errors are computed once per seed and then looked up.
        attention: a row of `diffalign.pipelines.attention.BACKENDS`.
        compiled: as with `compile: true`; the other variants on this network are not affected.

    Raises:
        ValueError: an attention backend that does not run here.
    """

    def __init__(
        self,
        subject: Subject,
        cached: Cached,
        checkpointing: bool = False,
        cached_reference: bool = False,
        attention: str = "auto",
        compiled: bool = False,
    ) -> None:
        super().__init__(subject, adamw(subject.parameters, subject.config), checkpointing)
        if compiled:
            compile_blocks(subject.pipe.network)
            self.compiled = {n: m._compiled_call_impl for n, m in subject.pipe.network.named_modules()}
        require(attention, subject.device, subject.dtype)
        self.cached, self.method, self.attention = cached, DPO(beta=BETA), attention
        self.reference = without_adapters(subject.pipe)
        self.reference_errors: dict[int, Tensor] | None = {} if cached_reference else None

    def equip(self, network: Any) -> None:
        fuse_lora_layers(network)
        set_attention(network, self.attention)

    def run(self, seed: int) -> Run:
        """What the method is given."""
        pipe, generator = self.subject.pipe, torch.Generator().manual_seed(seed)
        return Run(pipe.predict, self.reference, pipe.process, pipe.parametrization, generator)

    @torch.no_grad()
    def noised(self, run: Run, seed: int) -> Noised:
        """The batch, and the noise that it is trained at."""
        (noised,) = self.method.prepare(run, self.cached.batch(run.generator, self.subject.device))
        if self.reference_errors is None:
            return noised
        if seed not in self.reference_errors:
            self.reference_errors[seed] = reference_errors(run, noised)
        return replace(noised, reference_errors=self.reference_errors[seed])

    def loss(self, seed: int) -> Tensor:
        run = self.run(seed)
        with self.subject.autocast():
            return self.method.loss(run, self.noised(run, seed)).value.mean()


class Recorded(Ours):
    """Ours, with reference, policy and backward pass recorded once as a CUDA graph, and replayed.

    Without a GPU it is not recorded, and runs through the same buffers.
    """

    def __init__(self, subject: Subject, cached: Cached, checkpointing: bool = False) -> None:
        super().__init__(subject, cached, checkpointing)
        record = cuda_graph if subject.device.type == "cuda" else _as_it_is
        self.replayed = graphed(self._learn, subject.parameters, record)

    def __call__(self, seed: int) -> None:
        with self.subject.autocast():
            self.replayed(self.noised(self.run(seed), seed))
        torch.nn.utils.clip_grad_norm_(self.subject.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def _learn(self, noised: Noised) -> dict[str, Tensor]:
        value = self.method.loss(self.run(0), noised).value
        value.mean().backward()
        return {"loss": value.detach()}


def _as_it_is(run: Callable[[], None]) -> Callable[[], None]:
    return run


def gradients(step: Step, seed: int) -> tuple[float, Tensor]:
    """(loss, all gradients as one vector) of one step that changes no weight."""
    step.enter()
    value = step.loss(seed)
    value.backward()
    parameters = step.subject.parameters
    vector = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return value.item(), vector
