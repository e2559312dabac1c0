"""ImageReward v1.0: BLIP with a head fine-tuned on expert rankings. Xu et al. 2023, arXiv 2304.05977.

    score = (head(BERT(prompt | ViT(picture))[CLS]) - mean) / std

A z-score over the authors' pictures: most lie in [-1, 1], nearly all in [-2, 2]. The head is five linear layers with
nothing between them but dropout, so an affine map; its layers are kept apart because the checkpoint does. The released
loader needs med_config.json too; its one fact that no weight's shape tells, 12 heads, is `text_heads`' default here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from diffalign.rewards.base import Card
from diffalign.rewards.blip import BertSizes, MedBert, ViT, ViTSizes, bert_sizes, loaded, vit_sizes
from diffalign.rewards.blip_score import BlipScore
from diffalign.rewards.checkpoints import HubFile, read_state
from diffalign.rewards.preprocess import openai_recipe
from diffalign.rewards.towers import dtype_named

FILE = HubFile("THUDM/ImageReward", "ImageReward.pt")
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # ImageReward.py of the released code
HEAD = (1024, 128, 64, 16, 1)
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


@final
class ImageRewardNetwork(nn.Module):
    """ImageReward.pt, key by key; the dropout of the head is an identity, so that its layers keep their numbers."""

    def __init__(self, vision: ViTSizes, text: BertSizes) -> None:
        super().__init__()
        self.blip = nn.ModuleDict({"visual_encoder": ViT(vision), "text_encoder": MedBert(text)})
        a, b, c, d, e = (nn.Linear(*widths) for widths in zip((text.width, *HEAD), HEAD, strict=False))
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(a, nn.Identity(), b, nn.Identity(), c, nn.Identity(), d, e)})

    def forward(self, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Raw scores [B], fp32, of pixels [B, 3, side, side] and tokens [B, N]; the head is fp32 whatever the rest."""
        seen = self.blip["visual_encoder"](x)
        first = self.blip["text_encoder"](ids, mask, seen)[:, 0]
        return self.mlp["layers"](first.float())[:, 0]


@final
class ImageReward(BlipScore):
    """ImageReward's z-score.

    Args:
        weights: ImageReward.pt, a folder that holds it, or a hub id with it, instead of THUDM/ImageReward.
        device: where the network lives; pixels are brought there.
        dtype: of the two transformers: float32, bfloat16 or float16. Pictures and the head are fp32 whatever it is.
        vision_heads: attention heads of the ViT; None is width / 64, 16 as released.
        text_heads: those of the BERT; None is width / 64, 12 as released.

    Raises:
        ValueError: a checkpoint that is not to be had, or of another layout.
    """

    name: ClassVar[str] = "imagereward"
    card = Card(
        unit="z-score",
        range=(-float("inf"), float("inf")),
        source=f"{FILE.repo}, {FILE.name}; arXiv 2304.05977",
        code="Apache-2.0",
        weights="Apache-2.0",
        differentiable=True,
        side=224,
        across_prompts=False,
        checked="official code, small weights",
    )

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        vision_heads: int | None = None,
        text_heads: int | None = None,
    ) -> None:
        kind = dtype_named(dtype)
        path = FILE.locate(self.name, weights)
        state = read_state(path)
        vision = vit_sizes(state, "blip.visual_encoder.", path, vision_heads)
        text = bert_sizes(state, "blip.text_encoder.", path, text_heads)
        self.network = loaded(lambda: ImageRewardNetwork(vision, text), state, path, UNUSED, device)
        self.network.blip.to(kind)
        super().__init__(openai_recipe(vision.grid * vision.patch))
        self.card = replace(self.card, side=self.recipe.size)

    def _score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        device = self.network.mlp["layers"][0].weight.device  # type: ignore[index]  # a Sequential
        return (self.network(x.to(device), *self._tokens(prompts, device)) - MEAN) / STD
