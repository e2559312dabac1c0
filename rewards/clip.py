"""CLIPScore: the cosine between a picture and its prompt. Hessel et al. 2021, arXiv 2104.08718; Radford et al. 2021.

    score = scale * cos(f_image, f_text)

Units differ between papers: the CLIPScore paper has 2.5 max(cos, 0), torchmetrics 100 max(cos, 0), others the bare
cosine. Here it is 100 cos, not clamped, so that a gradient is left where the cosine is negative.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, final

import torch

from diffalign.rewards.base import Card
from diffalign.rewards.cosine import CosineScore
from diffalign.rewards.towers import load_tower


@final
class CLIPScore(CosineScore):
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
    card = Card(
        unit="100 cos",
        range=(-100.0, 100.0),
        source="openai/clip-vit-large-patch14; arXiv 2104.08718",
        code="MIT",
        weights="MIT (openai/clip-vit-large-patch14); other checkpoints have their own",
        differentiable=True,
        side=224,
        across_prompts=False,
        checked="official code, small weights",
    )

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
        super().__init__(load_tower(model, weights, device), float(scale))
        side = self.tower.recipe.size
        self.card = replace(self.card, unit=f"{scale:g} cos", range=(-scale, scale), source=model, side=side)
