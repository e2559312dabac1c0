"""LAION's aesthetic score v2 (sac+logos+ava1-l14-linearMSE): how much people like a picture, whatever its prompt.

    score = MLP(f / |f|), f the image embedding of OpenAI's CLIP ViT-L/14

The MLP has five layers and no activation between them, so it is one affine map: with the released head
5.2366 + w . f with |w| = 17.9956. Most pictures score 3.5 to 7.5.
Source: github.com/christophschuhmann/improved-aesthetic-predictor
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor

from diffalign.rewards.affine import AffineScore
from diffalign.rewards.base import Card
from diffalign.rewards.checkpoints import UrlFile
from diffalign.rewards.preprocess import openai_recipe
from diffalign.rewards.towers import load_tower

HEAD = UrlFile(
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
    "sac+logos+ava1-l14-linearMSE.pth",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)


@final
class Aesthetic(AffineScore):
    """The score of the released head on CLIP ViT-L/14.

    Pictures are made as OpenAI's own code makes them, as the head's script does; through transformers' processor they
    shift by a pixel where a margin is odd. The head computes in fp32 whatever `dtype` is: bf16 would cost 0.025.

    Args:
        weights: the head's file, instead of the one from github.
        backbone: folder or hub id of the CLIPModel, or "open_clip:ViT-L-14-quickgelu/openai".
        backbone_weights: local copy of it: the folder, or for open_clip its file.
        device: where tower and head live; pixels are brought there.
        dtype: of the tower: float32, bfloat16 or float16.

    Raises:
        ValueError: weights that are not to be had, of another layout, or a backbone of another width.
    """

    name: ClassVar[str] = "aesthetic"
    card: Card = Card(
        unit="1 to 10",
        range=(-12.8, 23.3),
        source=f"{HEAD.name} on openai/clip-vit-large-patch14",
        code="Apache-2.0",
        weights="Apache-2.0 (head), MIT (tower)",
        differentiable=True,
        side=224,
        across_prompts=True,
        checked="official code, small weights",
    )
    file: ClassVar[UrlFile] = HEAD
    layers: ClassVar[tuple[int, ...]] = (0, 2, 4, 6, 7)
    prefix: ClassVar[str] = "layers"

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        backbone: str = "openai/clip-vit-large-patch14",
        backbone_weights: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.tower = load_tower(backbone, backbone_weights, device, dtype=dtype, reward=self.name)
        super().__init__(openai_recipe(self.tower.recipe.size), weights, device)

    def features(self, x: Tensor) -> Tensor:
        return self.tower.image_features(x)
