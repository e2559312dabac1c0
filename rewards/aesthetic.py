"""LAION's aesthetic score v2 (sac+logos+ava1-l14-linearMSE): how much people like a picture, whatever its prompt.

    score = MLP(f / |f|), f the image embedding of OpenAI's CLIP ViT-L/14

The MLP has five layers and no activation between them, so it is one affine map: with the released head
5.2366 + w . f with |w| = 17.9956. Most pictures score 3.5 to 7.5.
Source: github.com/christophschuhmann/improved-aesthetic-predictor
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffalign.rewards.base import Card, Images, dispatch
from diffalign.rewards.checkpoints import UrlFile, load_strictly, read_state
from diffalign.rewards.preprocess import openai_recipe
from diffalign.rewards.towers import load_tower

HEAD = UrlFile(
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
    "sac+logos+ava1-l14-linearMSE.pth",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)
HIDDEN = (1024, 128, 64, 16)


class AffineHead(nn.Module):
    """Linear layers one after the other under the numbers that the released files have; dropouts had the others."""

    def __init__(self, width: int, names: Sequence[int], prefix: str) -> None:
        super().__init__()
        sizes = (width, *HIDDEN, 1)
        self._order = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.add_module(prefix, nn.ModuleDict(dict(zip(map(str, names), self._order, strict=True))))
        self.requires_grad_(False).eval()

    def forward(self, features: Tensor) -> Tensor:
        """[B] of [B, width]."""
        for layer in self._order:
            features = layer(features)
        return features.squeeze(-1)


@final
class Aesthetic:
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
        self.recipe = openai_recipe(self.tower.recipe.size)
        path = HEAD.locate(self.name, weights)
        state = read_state(path)
        self.head = AffineHead(width_of(state, path), names=(0, 2, 4, 6, 7), prefix="layers")
        load_strictly(self.head, state, path)
        self.head.to(device)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; the prompts are not read. See `Reward.__call__`."""
        return dispatch(self.name, images, prompts, exact=self._score_pictures, differentiable=self._score_pixels)

    def _score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._score(self.recipe.pictures(pictures))

    def _score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(self.recipe.pixels(pixels))

    def _score(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(F.normalize(self.tower.image_features(x).float(), dim=-1))
        return scores


def width_of(state: dict[str, Tensor], path: Path) -> int:
    """Of the features that a head reads.

    Raises:
        ValueError: the file has no first layer.
    """
    first = next((value for key, value in state.items() if key.endswith(".0.weight")), None)
    if first is None:
        raise ValueError(f"{path}: expected the linear layers of an aesthetic head, got {sorted(state)[:3]}")
    return int(first.shape[1])
