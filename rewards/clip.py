"""CLIPScore: the cosine between a picture and its prompt. Hessel et al. 2021, arXiv 2104.08718; Radford et al. 2021.

    score = scale * cos(f_image, f_text)

Units differ between papers: the CLIPScore paper has 2.5 max(cos, 0), torchmetrics 100 max(cos, 0), others the bare
cosine. Here it is 100 cos, not clamped, so that a gradient is left where the cosine is negative.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffalign.rewards.base import Images, check_images, check_prompts, dispatch, flatten_frames, full_precision
from diffalign.rewards.preprocess import to_pictures
from diffalign.rewards.towers import load_tower

log = logging.getLogger(__name__)


class CLIPScore:
    """scale * cosine, for any CLIP of transformers or open_clip.

    Args:
        model: folder or hub id of a CLIPModel, "tiny-clip", or "open_clip:ARCHITECTURE/TAG"
            (such as "open_clip:ViT-B-32/laion2b_s34b_b79k").
        weights: local copy to load instead of the hub's: the checkpoint's folder, or for open_clip its file.
        scale: 100 is the usual unit; 1 gives the cosine.
        device: where the towers live; pixels are brought there.

    Raises:
        ValueError: a checkpoint that is not to be had or not a CLIP, or a scale that is not above 0.
    """

    name: ClassVar[str] = "clip"
    differentiable: ClassVar[bool] = True
    licence: ClassVar[str] = "MIT (openai/clip-vit-large-patch14); other checkpoints have their own"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        *,
        weights: str | Path | None = None,
        scale: float = 100.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not scale > 0:
            raise ValueError(f"clip.scale: expected a number above 0, got {scale}")
        self.tower = load_tower(model, weights, device)
        self.scale = float(scale)
        self.range = (-self.scale, self.scale)
        self.source = model
        self._told = False
        self._known: tuple[tuple[str, ...], Tensor] = ((), torch.empty(0))

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

        The latest set of prompts is kept. The key is the whole set, not the prompt, so that no result depends on what
        was asked before: a row changes in its last bits with the size of its batch.
        """
        check_prompts(prompts, len(prompts))
        distinct = tuple(dict.fromkeys(prompts))
        if distinct != self._known[0]:
            self._say_once(self.tower.too_long(distinct))
            with full_precision():
                self._known = (distinct, F.normalize(self.tower.text_features(distinct), dim=-1))
        index = {prompt: row for row, prompt in enumerate(distinct)}
        return self._known[1][[index[prompt] for prompt in prompts]]

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

    def _say_once(self, too_long: Sequence[str]) -> None:
        if too_long and not self._told:
            self._told = True
            log.warning("clip: the prompt %r... is longer than the text encoder reads; the rest of it is ignored "
                        "(said once, also true of other prompts)", too_long[0][:60])  # fmt: skip
