"""An affine head on a picture's normalized features: what aesthetic scores are. The prompt is not read."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffalign.rewards.base import Card, Images, dispatch
from diffalign.rewards.checkpoints import UrlFile, load_strictly, read_state
from diffalign.rewards.preprocess import Recipe

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


class AffineScore(ABC):
    """head(f / |f|) in fp32, with the features f that `features` finds in the pictures that `recipe` makes."""

    name: ClassVar[str]
    card: Card
    file: ClassVar[UrlFile]
    layers: ClassVar[tuple[int, ...]]  # the numbers of the linear layers in that file
    prefix: ClassVar[str]

    def __init__(self, recipe: Recipe, weights: str | Path | None, device: torch.device | str) -> None:
        self.recipe = recipe
        self.path = self.file.locate(self.name, weights)
        state = {key: value.float() for key, value in read_state(self.path).items()}
        self.width = width_of(state, self.path)
        self.head = AffineHead(self.width, self.layers, self.prefix)
        load_strictly(self.head, state, self.path)
        self.head.to(device)

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """[B, width], not normalized, of what `recipe` made."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; the prompts are not read. See `Reward.__call__`.

        Raises:
            ValueError: a head for features of another width.
        """
        return dispatch(self.name, images, prompts, exact=self._score_pictures, differentiable=self._score_pixels)

    def _score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._score(self.recipe.pictures(pictures))

    def _score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(self.recipe.pixels(pixels))

    def _score(self, x: Tensor) -> Tensor:
        found = self.features(x).float()
        if found.shape[-1] != self.width:
            raise ValueError(f"{self.name}: expected a backbone with features of width {self.width}, which "
                             f"{self.path} is for, got width {found.shape[-1]}")  # fmt: skip
        scores: Tensor = self.head(F.normalize(found, dim=-1))
        return scores


def width_of(state: dict[str, Any], path: Path) -> int:
    """Of the features that a head reads.

    Raises:
        ValueError: the file has no first layer.
    """
    first = next((value for key, value in state.items() if key.endswith(".0.weight")), None)
    if first is None:
        raise ValueError(f"{path}: expected the linear layers of an aesthetic head, got {sorted(state)[:3]}")
    return int(first.shape[1])
