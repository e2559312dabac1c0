"""Aesthetic predictor v2.5: an affine head on SigLIP so400m at 384 pixels.

    score = head(f / |f|), f the pooled output of google/siglip-so400m-patch14-384's vision tower

Scores of 5.5 and more are called great by its author (github.com/discus0434/aesthetic-predictor-v2-5). The author's
code and head are AGPL-3.0: neither is part of this project. This file was written from the layout of the head, which is
downloaded when it is first used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, final

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import SiglipVisionModel

from diffalign.errors import first_line
from diffalign.rewards.affine import AffineScore
from diffalign.rewards.base import Card
from diffalign.rewards.checkpoints import UrlFile, download, revision_of
from diffalign.rewards.preprocess import square_recipe
from diffalign.rewards.towers import dtype_named

HEAD = UrlFile(
    "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth",
    "aesthetic_predictor_v2_5.pth",
    sha256="a6caf256b3dc434273c98dcb12f6bf17c5d4fc647d8df11f038386923dd06220",
)
HALF = (0.5, 0.5, 0.5)


@final
class AestheticV25(AffineScore):
    """The score of the released head on SigLIP.

    Args:
        weights: the head's file, instead of the one from github.
        backbone: folder or hub id of a SigLIP model.
        device: where tower and head live; pixels are brought there.
        dtype: of the tower: float32, bfloat16 or float16. The head computes in fp32.

    Raises:
        ValueError: weights that are not to be had or of another layout.
    """

    name: ClassVar[str] = "aesthetic-v2.5"
    card: Card = Card(
        unit="1 to 10",
        range=(-23.6, 27.4),
        source=f"{HEAD.name} on google/siglip-so400m-patch14-384",
        code="AGPL-3.0 (not used: written from the layout)",
        weights="AGPL-3.0 (head), Apache-2.0 (tower)",
        differentiable=True,
        side=384,
        across_prompts=True,
        checked="formula only",
    )
    file: ClassVar[UrlFile] = HEAD
    layers: ClassVar[tuple[int, ...]] = (0, 2, 4, 6, 8)
    prefix: ClassVar[str] = "scoring_head"

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        backbone: str = "google/siglip-so400m-patch14-384",
        device: torch.device | str = "cpu",
        dtype: str = "float32",
    ) -> None:
        try:
            tower: Any = SiglipVisionModel.from_pretrained(
                backbone, revision=revision_of(backbone), dtype=dtype_named(dtype)
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{self.name}: {backbone} is neither the folder of a SigLIP model nor to be had from the "
                             f"hub ({first_line(error)}); with a network, run `{download(backbone)}` once, or give a "
                             f"local copy as backbone=FOLDER") from error  # fmt: skip
        self.tower = tower.requires_grad_(False).eval().to(device)
        super().__init__(square_recipe(tower.config.image_size, HALF, HALF), weights, device)

    def features(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.tower(pixel_values=x.to(self.tower.device, self.tower.dtype)).pooler_output
        return pooled
