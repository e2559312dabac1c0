"""PickScore v1: a CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic. Kirstain et al. 2023, arXiv 2305.01569.

    score = exp(logit_scale) * cos(f_image, f_text)

About 15 to 25 with the released weights. Others report the bare cosine, or divide by 26.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, final

import torch

from diffalign.rewards.base import Card
from diffalign.rewards.cosine import CosineScore
from diffalign.rewards.towers import load_tower

REPO = "yuvalkirstain/PickScore_v1"


@final
class PickScore(CosineScore):
    """exp(logit_scale) * cosine, with the checkpoint's own scale.

    Args:
        weights: folder or hub id with model, tokenizer and processor, instead of yuvalkirstain/PickScore_v1.
        device: where the towers live; pixels are brought there.
        dtype: of the towers: float32, bfloat16 or float16. Pictures are made in fp32 whatever it is.

    Raises:
        ValueError: a checkpoint that is not to be had or not a CLIP.
    """

    name: ClassVar[str] = "pickscore"
    card = Card(
        unit="exp(logit_scale) cos",
        range=(-100.1, 100.1),
        source=f"{REPO}; arXiv 2305.01569",
        code="MIT",
        weights="not stated",
        differentiable=True,
        side=224,
        across_prompts=False,
        checked="official code, small weights",
    )

    def __init__(
        self, *, weights: str | Path | None = None, device: torch.device | str = "cpu", dtype: str = "float32"
    ) -> None:
        tower = load_tower(str(weights or REPO), None, device, dtype=dtype, reward=self.name)
        scale = tower.scale
        super().__init__(tower, scale)
        self.card = replace(self.card, range=(-scale, scale), side=tower.recipe.size)
