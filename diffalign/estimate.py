"""What a training run will take, before anything is downloaded: parameters, FLOPs, memory and time.

The network is built on the meta device and one picture is passed through it, forward and backward; everything else is
multiplication. Exact: parameters, and FLOPs of matrix products, convolutions and attention. Counted but not complete:
memory, where the allocator's waste, the CUDA context (0.5 to 1 GB) and temporary buffers come on top; and memory and
time of methods that draw pictures, without the decoder and the rewards, with or without their gradient.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from diffalign.config import RunConfig
from diffalign.counting import Count, counted
from diffalign.methods import METHODS
from diffalign.methods.base import Need
from diffalign.pipelines.architectures import (
    BLOCKS,
    attach_meta_lora,
    attach_meta_user,
    example_call,
    meta_network,
    network_config,
)
from diffalign.reference import MOVING, POOL_SIZE
from diffalign.table import build
from diffalign.work import work_of


@dataclass(frozen=True)
class Card:
    """A GPU as its maker prints it."""

    tflops: float  # dense, 16 bit with fp32 accumulation
    gigabytes: float


CARDS: dict[str, Card] = {  # from the makers' data sheets
    "H200": Card(989, 141),
    "H100": Card(989, 80),
    "A100-80GB": Card(312, 80),
    "A100-40GB": Card(312, 40),
    "L40S": Card(362, 48),
    "RTX 4090": Card(165, 24),
    "RTX 3090": Card(71, 24),
    "RTX 3060": Card(25, 12),
}
ADAM = 16  # bytes a trained parameter: fp32 weight and gradient, and Adam's two moments
USER_WIDTHS = {"clip": 3 * 768, "vlm": 3584}  # of a token, by embedder: CLIP ViT-L, a language model of 7B


@dataclass(frozen=True)
class Estimate:
    """Counts are plain numbers, FLOPs are of one picture or one pair, memory is in bytes on one device."""

    parameters: int
    trained_parameters: int
    forward_flops: float  # of one picture
    pair_flops: float  # of one example: policy forward and backward, and the passes without gradient
    memory: dict[str, float]  # by part

    @property
    def total_bytes(self) -> float:
        return sum(self.memory.values())

    def seconds_per_step(self, config: RunConfig, card: Card) -> float:
        """At the printed rate, which no training reaches: a floor."""
        return self.pair_flops * config.train_batch_size * config.gradient_accumulation_steps / (card.tflops * 1e12)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total_bytes}


def estimate(config: RunConfig, architecture: Mapping[str, Any] | None = None) -> Estimate:
    """Of one microbatch and one optimizer step of this run, latents and embeddings cached.

    Args:
        architecture: the network's config, where it is loaded already; looked up by the model's name if not given.

    Raises:
        ValueError: an architecture that is not known, or a resolution that it cannot take.
    """
    full = config.train == "full"
    dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
    found = dict(architecture or network_config(config.pretrained_model_name_or_path))
    parameters, trained, forward, step, kept = _counts(json.dumps(found), dtype, _Adapter.of(config), config.extent,
                                                       bool(config.gradient_checkpointing),
                                                       config.max_sequence_length)  # fmt: skip
    method = build(METHODS, config.method, what="method")
    compared = Need.REFERENCE in method.needs
    work = work_of(config.method_name, method)
    width = torch.finfo(dtype).bits / 8
    copy = 4 if config.reference_name == "frozen_copy" and full else width  # a full run's copy is fp32 as well
    memory = {
        "weights": 0.0 if full else parameters * width,
        "trained weights, gradients, Adam": float(trained * ADAM),
        "16-bit copy of the weights": parameters * width if full and width < 4 else 0.0,
        "reference": parameters * copy if compared and config.reference_name == "frozen_copy" else 0.0,
        "weights the reference keeps": 4.0 * trained * _kept_sets(config),
        "averaged weights": 4.0 * trained if config.ema_decay else 0.0,
        "activations": float(kept * min(work.at_once * config.train_batch_size, work.most)),
    }
    flops = work.trained * step + work.forwards * forward
    return Estimate(parameters, trained, forward, flops, {part: size for part, size in memory.items() if size})


@dataclass(frozen=True)
class _Adapter:
    """What is trained: everything, a user's tokens of a width, or a LoRA."""

    train: str
    user_width: int
    rank: int
    targets: str

    @classmethod
    def of(cls, config: RunConfig) -> _Adapter:
        width = USER_WIDTHS.get(str(config.users["name"]), max(USER_WIDTHS.values()))
        return cls(config.train, width, config.lora.rank, json.dumps(config.lora.targets))

    def attach(self, network: Any, parameters: int) -> int:
        """Frees what is trained, and counts it."""
        if self.train == "full":
            network.requires_grad_(True)
            return parameters
        if self.train == "user":
            return attach_meta_user(network, self.user_width)
        return attach_meta_lora(network, self.rank, json.loads(self.targets))


@functools.lru_cache(maxsize=64)
def _counts(
    architecture: str,
    dtype: torch.dtype,
    adapter: _Adapter,
    extent: tuple[int, ...],
    checkpointing: bool,
    t5_tokens: int | None,
) -> tuple[int, int, float, float, int]:
    """(parameters, trained ones, FLOPs of a forward pass, of one with its backward, bytes kept) of one picture."""
    network = meta_network(json.loads(architecture), dtype)
    parameters = sum(p.numel() for p in network.parameters())
    forward = _forward(network, extent, t5_tokens).flops
    trained = adapter.attach(network, parameters)
    step, kept = _forward_and_backward(network, extent, checkpointing, t5_tokens)
    return parameters, trained, forward, step, kept


def _kept_sets(config: RunConfig) -> int:
    """How many copies of what is trained a moving reference holds at most."""
    if config.reference_name not in MOVING:
        return 0
    return int(config.reference.get("size", POOL_SIZE)) if config.reference_name == "pool" else 1


def _forward(network: Any, extent: tuple[int, ...], t5_tokens: int | None) -> Count:
    x_t, call = example_call(network, extent, t5_tokens)
    with counted(network) as count, torch.no_grad():
        network(x_t, **call)
    return count


def _forward_and_backward(
    network: Any, extent: tuple[int, ...], checkpointing: bool, t5_tokens: int | None
) -> tuple[float, int]:
    """(FLOPs, bytes kept at the fullest moment) of one picture or clip."""
    x_t, call = example_call(network, extent, t5_tokens)
    with counted(network) as count:
        block = _LargestBlock(network, count)
        out = network(x_t, **call, return_dict=False)[0]
        block.remove()
        kept = count.kept_bytes
        if not checkpointing:
            out.sum().backward()
    if not checkpointing:
        return count.flops, kept
    network.enable_gradient_checkpointing()
    network.train()
    with counted(network) as count:
        out = network(x_t, **call, return_dict=False)[0]
        kept = count.kept_bytes + block.bytes  # one block is recomputed at a time
        out.sum().backward()
    return count.flops, kept


class _LargestBlock:
    """What the block that keeps most keeps."""

    def __init__(self, network: Any, count: Count) -> None:
        self.bytes = 0
        self._count, self._before = count, 0
        blocks = [module for module in network.modules() if type(module).__name__ in BLOCKS]
        self._hooks = [hook for block in blocks for hook in (
            block.register_forward_pre_hook(self._enter), block.register_forward_hook(self._leave)
        )]  # fmt: skip

    def _enter(self, *_: Any) -> None:
        self._before = self._count.kept_bytes

    def _leave(self, *_: Any) -> None:
        self.bytes = max(self.bytes, self._count.kept_bytes - self._before)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
