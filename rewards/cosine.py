"""Rewards that are a cosine of a picture's and a prompt's features; a file each says which, and in what unit."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffalign.rewards.base import (
    Card,
    CutPrompts,
    Images,
    check_images,
    dispatch,
    each_prompt,
    flatten_frames,
    full_precision,
)
from diffalign.rewards.preprocess import to_pictures
from diffalign.rewards.texts import TextFeatures
from diffalign.rewards.towers import Tower


class CosineScore(ABC):
    """scale * cos(f_image, f_text), with the pictures that the tower's recipe makes."""

    name: ClassVar[str]
    card: Card

    def __init__(self, tower: Tower, scale: float) -> None:
        self.tower, self.scale = tower, scale
        tell_cut = CutPrompts(self.name)
        self._texts = TextFeatures(new=lambda prompts: tell_cut(tower.too_long(prompts)))

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`."""
        return dispatch(self.name, images, prompts, exact=self._score_pictures, differentiable=self._score_pixels)

    def image_features(self, images: Images) -> Tensor:
        """[B, D] of unit length, or [B * F, D] for clips, on the towers' device; float pixels keep their gradient."""
        check_images(images)
        if not isinstance(images, Tensor):
            return self._embed_pictures(images)
        flat, _ = flatten_frames(images)
        return self._embed_pixels(flat) if images.is_floating_point() else self._embed_pictures(to_pictures(flat))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """[B, D] of unit length, without gradient, on the towers' device; a prompt that is too long is cut, said once.

        A prompt is encoded once, however often and with whatever others it is asked for; see `TextFeatures`.
        """
        each_prompt(prompts, len(prompts))
        return self._texts(self.tower, prompts)

    def _score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._cosine(self._embed_pictures(pictures), prompts)

    def _score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._cosine(self._embed_pixels(pixels), prompts)

    def _cosine(self, image_features: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * (image_features * self.text_features(prompts)).sum(-1)

    @torch.no_grad()
    def _embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self._embed(self.tower.recipe.pictures(pictures))

    def _embed_pixels(self, pixels: Tensor) -> Tensor:
        return self._embed(self.tower.recipe.pixels(pixels))

    def _embed(self, x: Tensor) -> Tensor:
        with full_precision():
            return F.normalize(self.tower.image_features(x), dim=-1)
