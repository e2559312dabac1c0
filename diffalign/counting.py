"""Counts what a piece of work costs without doing it: FLOPs, and the bytes that autograd keeps, on the meta device.

Matrix products and convolutions are counted by torch's own counter. Attention is replaced by a stand-in that keeps what
a fused kernel keeps and costs what it costs: 4 B H S T D forward, 10 B H S T D backward (FlashAttention recomputes the
scores). Torch's decomposition would count a score matrix that no fused kernel ever writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Count:
    """What a block of `counted` has cost: FLOPs, and bytes that are kept for a backward pass, each storage once."""

    flops: float = 0.0
    kept_bytes: int = 0
    _seen: dict[int, Any] = field(default_factory=dict, repr=False)

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage  # held, or its address would be given to another
            self.kept_bytes += storage.nbytes()
        return tensor

    def ignore(self, module: torch.nn.Module) -> None:
        """Weights are kept anyway: what is saved of them is no activation."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage()


@contextlib.contextmanager
def counted(module: torch.nn.Module) -> Iterator[Count]:
    """Counts everything inside the block, `module`'s weights excepted from what is kept."""
    count, counter = Count(), FlopCounterMode(display=False)
    count.ignore(module)
    original = F.scaled_dot_product_attention

    def stand_in(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        return _FusedAttention.apply(count, query, key, value)

    # not by a function mode, which is off while a backward pass recomputes checkpointed blocks
    F.scaled_dot_product_attention = stand_in  # type: ignore[assignment]
    try:
        with counter, torch.autograd.graph.saved_tensors_hooks(count.keep, lambda tensor: tensor):
            yield count
    finally:
        F.scaled_dot_product_attention = original
        count.flops += counter.get_total_flops()


class _FusedAttention(torch.autograd.Function):
    """Shapes, FLOPs and kept tensors of a fused attention; no numbers."""

    @staticmethod
    def forward(ctx: Any, count: Count, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        *lead, length, width = query.shape
        ctx.count, ctx.products = count, query.shape[:-2].numel() * length * key.shape[-2] * width
        out = query.new_empty(*lead, length, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(*lead, length, dtype=torch.float32))
        count.flops += 4 * ctx.products
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        ctx.count.flops += 10 * ctx.products
        query, key, value = ctx.saved_tensors[:3]
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
