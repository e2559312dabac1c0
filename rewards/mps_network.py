"""The head of MPS: picture tokens that look at the words of the prompt, in layers of attention beside a feed-forward.

Written from the layout of the released state dict (github.com/Kwai-Kolors/MPS, trainer/models/cross_modeling.py): both
attentions have many queries and one key and value, as in PaLM (arXiv 2204.02311); norms have no trained bias, but the
file holds one of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadSizes:
    """width: of the tokens. layers, heads: as released 4 and 16. inner: of one head, as released 64."""

    width: int
    layers: int
    heads: int
    inner: int


def head_sizes(state: Mapping[str, Tensor], where: Path) -> HeadSizes:
    """What the shapes of a released state dict say.

    Raises:
        ValueError: the keys that say it are missing.
    """
    try:
        queries = state["cross_model.layers.0.0.fn.to_q.weight"]
        inner = state["cross_model.layers.0.0.fn.to_kv.weight"].shape[0] // 2
    except KeyError as error:
        raise ValueError(f"{where}: expected the state dict of MPS, it lacks {error}") from error
    layers = {key.split(".")[2] for key in state if key.startswith("cross_model.layers.")}
    return HeadSizes(width=queries.shape[1], layers=len(layers), heads=queries.shape[0] // inner, inner=inner)


@final
class CrossModel(nn.Module):
    """`cross_model.` of the released file, key by key."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.ModuleDict({"fn": Looking(sizes)}), nn.ModuleDict({"fn": Mixing(sizes)})])
            for _ in range(sizes.layers)
        )

    def forward(self, seen: Tensor, said: Tensor, kept: Tensor) -> Tensor:
        """[B, N, D] of picture tokens [B, N, D], words [B, M, D] and which of these count, bool [B, M]."""
        layer: Any  # a ModuleList of two
        for layer in self.layers:
            seen = seen + layer[0]["fn"](seen, said, kept)
            seen = seen + layer[1]["fn"](seen)
        return seen


@final
class Looking(nn.Module):
    """Attention from picture tokens to words, with a feed-forward beside it."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        width, inside = sizes.width, sizes.heads * sizes.inner
        self.heads = sizes.heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inside, bias=False)
        self.to_kv = nn.Linear(width, 2 * sizes.inner, bias=False)
        self.to_out = nn.Linear(inside, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 8 * width, bias=False), SwiGLU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, seen: Tensor, said: Tensor, kept: Tensor) -> Tensor:
        x = self.norm(seen)
        key, value = self.to_kv(said).chunk(2, -1)
        out = _one_key(self.to_q(x), key, value, self.heads, kept[:, None, None])
        return self.to_out(out) + self.ff(x)


@final
class Mixing(nn.Module):
    """Attention among picture tokens with rotary positions, a feed-forward beside it; one projection makes both."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        width, inside = sizes.width, sizes.heads * sizes.inner
        self.heads, self.split = sizes.heads, (inside, sizes.inner, sizes.inner, 8 * width)
        self.norm = nn.LayerNorm(width)
        self.rotary_emb = Rotary(sizes.inner)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.split), bias=False)
        self.attn_out = nn.Linear(inside, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(4 * width, width, bias=False))

    def forward(self, seen: Tensor) -> Tensor:
        query, key, value, rest = self.fused_attn_ff_proj(self.norm(seen)).split(self.split, -1)
        query = self.rotary_emb(query.unflatten(-1, (self.heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
        out = _one_key(query, self.rotary_emb(key), value, self.heads, None)
        return self.attn_out(out) + self.ff_out(rest)


@final
class Rotary(nn.Module):
    """Turns vectors [..., N, D] by their position in the sequence; frequencies come from the file."""

    inv_freq: Tensor

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(inner // 2))

    def forward(self, x: Tensor) -> Tensor:
        # in the type of the frequencies: in fp16 angles are rounded, which is what the released code computes there
        positions = torch.arange(x.shape[-2], device=x.device, dtype=self.inv_freq.dtype)
        angles = (positions[:, None] * self.inv_freq).repeat(1, 2)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


@final
class SwiGLU(nn.Module):
    """silu(second half) * first half (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return F.silu(gate) * value


def _one_key(query: Tensor, key: Tensor, value: Tensor, heads: int, kept: Tensor | None) -> Tensor:
    """Attention [B, N, heads * D] of queries of the same shape to one key and value [B, M, D] for all heads."""
    many = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    shape = (-1, heads, -1, -1)
    out = F.scaled_dot_product_attention(many, key[:, None].expand(shape), value[:, None].expand(shape), attn_mask=kept)
    return out.transpose(1, 2).flatten(2)
