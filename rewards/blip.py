"""BLIP's networks in the layout of its checkpoints: a ViT, and a BERT whose layers also attend to what the ViT saw.

Li et al. 2022, arXiv 2201.12086. Only what a score needs is here: no dropout and no drop path (rewards run in eval
mode), no pooler, no momentum copies, no decoder. Half of the names follow timm and half BERT, because the keys do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.rewards.checkpoints import load_strictly

VIT_EPS, BERT_EPS = 1e-6, 1e-12  # of their layer norms
HEAD_WIDTH = 64  # of every released BLIP: 12 heads in ViT-B and BERT base, 16 in ViT-L

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class ViTSizes:
    """A ViT for pictures of `grid * patch` pixels a side."""

    grid: int
    patch: int
    width: int
    hidden: int
    layers: int
    heads: int


@dataclass(frozen=True)
class BertSizes:
    """`seen_width` is that of the ViT whose tokens the layers attend to."""

    words: int
    positions: int
    width: int
    seen_width: int
    hidden: int
    layers: int
    heads: int


@final
class ViT(nn.Module):
    """Pre-norm vision transformer with a class token; every token is kept."""

    def __init__(self, sizes: ViTSizes) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + sizes.grid**2, sizes.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, sizes.width, sizes.patch, stride=sizes.patch)})
        self.blocks = nn.ModuleList([ViTBlock(sizes) for _ in range(sizes.layers)])
        self.norm = nn.LayerNorm(sizes.width, VIT_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, 1 + grid^2, width], class token first, of normalized pixels [B, 3, side, side] of any dtype."""
        x = self.patch_embed["proj"](x.to(self.cls_token.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@final
class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, sizes: ViTSizes) -> None:
        super().__init__()
        width, self.heads = sizes.width, sizes.heads
        self.norm1 = nn.LayerNorm(width, VIT_EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, VIT_EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, sizes.hidden), "fc2": nn.Linear(sizes.hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] of [B, N, width]."""
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn["proj"](attention(q, k, v, self.heads))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


@final
class MedBert(nn.Module):
    """BERT without token types and pooler, with cross-attention in every layer (section 3.1 of the paper)."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(sizes.words, sizes.width),
            "position_embeddings": nn.Embedding(sizes.positions, sizes.width),
            "LayerNorm": nn.LayerNorm(sizes.width, BERT_EPS),
        })  # fmt: skip
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([BertLayer(sizes) for _ in range(sizes.layers)])})

    def forward(self, ids: Tensor, mask: Tensor, seen: Tensor | None = None) -> Tensor:
        """Tokens [B, N, width].

        Args:
            ids: [B, N] of the vocabulary.
            mask: [B, N], true where a token is not padding.
            seen: tokens [B, M, seen_width] of a picture, all of which are attended to; None reads the text alone.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["position_embeddings"](positions)
        x = self.embeddings["LayerNorm"](x)
        # BERT adds -10000 to the logits of padding; in fp32 its softmax is then 0 as well, bit for bit
        keep = mask.bool()[:, None, None]
        for layer in self.encoder["layer"]:  # type: ignore[attr-defined]  # a ModuleList
            x = layer(x, keep, seen)
        return x


@final
class BertLayer(nn.Module):
    """Attention to the text, to the picture if there is one, and an mlp; each norm comes after its sum."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        width, hidden = sizes.width, sizes.hidden
        self.attention = BertAttention(width, width, sizes.heads)
        self.crossattention = BertAttention(width, sizes.seen_width, sizes.heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width), "LayerNorm": nn.LayerNorm(width, BERT_EPS)})

    def forward(self, x: Tensor, keep: Tensor, seen: Tensor | None) -> Tensor:
        """[B, N, width] of [B, N, width]; `keep` is broadcast to [B, heads, N, N]."""
        x = self.attention(x, x, keep)
        if seen is not None:
            x = self.crossattention(x, seen)
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


@final
class BertAttention(nn.Module):
    """norm(x + attention of x to y)."""

    def __init__(self, width: int, other_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict({
            "query": nn.Linear(width, width),
            "key": nn.Linear(other_width, width),
            "value": nn.Linear(other_width, width),
        })  # fmt: skip
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, BERT_EPS)})

    def forward(self, x: Tensor, y: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, N, width] of x [B, N, width] and y [B, M, other_width]."""
        attended = attention(self.self["query"](x), self.self["key"](y), self.self["value"](y), self.heads, keep)
        return self.output["LayerNorm"](x + self.output["dense"](attended))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, keep: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(width / heads)) v per head: [B, N, width] of q [B, N, width], k and v [B, M, width].

    Args:
        keep: false where a key counts for nothing, broadcast to [B, heads, N, M].
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)


def vit_sizes(state: Mapping[str, Any], prefix: str, where: Path, heads: int | None = None) -> ViTSizes:
    """The ViT that a state dict holds under `prefix`.

    Args:
        heads: the one size that no shape tells; None is width / 64.

    Raises:
        ValueError: no such ViT in there, or heads that do not divide its width.
    """
    tokens = shape_of(state, f"{prefix}pos_embed", 3, where)[1]
    width, _, patch, _ = shape_of(state, f"{prefix}patch_embed.proj.weight", 4, where)
    hidden = shape_of(state, f"{prefix}blocks.0.mlp.fc1.weight", 2, where)[0]
    return ViTSizes(
        grid=square_side(tokens - 1, where),
        patch=patch,
        width=width,
        hidden=hidden,
        layers=_count(state, f"{prefix}blocks.", ".norm1.weight"),
        heads=_heads("vision_heads", heads, width),
    )


def bert_sizes(state: Mapping[str, Any], prefix: str, where: Path, heads: int | None = None) -> BertSizes:
    """The BERT that a state dict holds under `prefix`; see `vit_sizes`.

    Raises:
        ValueError: no such BERT in there, or heads that do not divide its width.
    """
    layer = f"{prefix}encoder.layer."
    words, width = shape_of(state, f"{prefix}embeddings.word_embeddings.weight", 2, where)
    return BertSizes(
        words=words,
        positions=shape_of(state, f"{prefix}embeddings.position_embeddings.weight", 2, where)[0],
        width=width,
        seen_width=shape_of(state, f"{layer}0.crossattention.self.key.weight", 2, where)[1],
        hidden=shape_of(state, f"{layer}0.intermediate.dense.weight", 2, where)[0],
        layers=_count(state, layer, ".intermediate.dense.weight"),
        heads=_heads("text_heads", heads, width),
    )


def resized_positions(table: Tensor, grid: int, where: Path) -> Tensor:
    """A position table [1, 1 + n^2, width] for `grid`^2 patches instead: bicubic, the class token's row stays.

    Raises:
        ValueError: a table of no square.
    """
    side = square_side(table.shape[1] - 1, where)
    if side == grid:
        return table
    plane = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1].float(), plane.flatten(2).transpose(1, 2)], dim=1)


def square_side(patches: int, where: Path) -> int:
    """
    Raises:
        ValueError: not the number of patches of a square picture.
    """
    side = math.isqrt(max(patches, 0))
    if patches < 1 or side**2 != patches:
        raise ValueError(f"{where}: expected a ViT for square pictures, got positions for {patches} patches")
    return side


def loaded(
    build: Callable[[], Network],
    state: Mapping[str, Tensor],
    where: Path,
    ignored: Iterable[str],
    device: torch.device | str,
) -> Network:
    """A frozen network with every weight from `state`, in fp32 and eval mode; see `load_strictly`.

    Raises:
        ValueError: a missing or surplus key, or another shape.
    """
    with torch.device("meta"):  # no time is lost on initial weights
        network = build()
    network = network.to_empty(device="cpu")
    load_strictly(network, state, where, ignored)
    return network.to(device).requires_grad_(False).eval()


def shape_of(state: Mapping[str, Any], key: str, dimensions: int, where: Path) -> list[int]:
    """
    Raises:
        ValueError: no tensor of so many dimensions under this key.
    """
    value = state.get(key)
    if not isinstance(value, Tensor) or value.ndim != dimensions:
        found = "nothing" if value is None else f"{list(value.shape) if isinstance(value, Tensor) else type(value)}"
        raise ValueError(f"{where}: expected the official checkpoint, with a weight {key} of {dimensions} dimensions, "
                         f"got {found} there")  # fmt: skip
    return list(value.shape)


def _count(state: Mapping[str, Any], start: str, end: str) -> int:
    return sum(key.startswith(start) and key.endswith(end) for key in state)


def _heads(keyword: str, heads: int | None, width: int) -> int:
    count = width // HEAD_WIDTH if heads is None else heads
    if count < 1 or width % count:
        raise ValueError(f"{keyword}: expected a number of attention heads that divides the width {width}, got {count}")
    return count
