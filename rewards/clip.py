"""CLIPScore: the cosine between a picture and its prompt, in a CLIP's or a SigLIP's space.

Hessel et al. 2021, arXiv 2104.08718; Radford et al. 2021.

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


class _CLIP(CosineScore):
    """scale * cosine, for any CLIP or SigLIP of transformers or open_clip; the final classes differ in their default.

    Args:
        model: folder or hub id of a CLIPModel or SiglipModel, "tiny-clip", or "open_clip:ARCHITECTURE/TAG"
            (such as "open_clip:ViT-B-32/laion2b_s34b_b79k"); None for the reward's own.
        weights: local copy to load instead of the hub's: the checkpoint's folder, or for open_clip its file.
        scale: 100 is the usual unit; 1 gives the cosine.
        device: where the towers live; pixels are brought there.
        dtype: of the towers: float32, bfloat16 or float16. Pictures are made in fp32 whatever it is.

    Raises:
        ValueError: a checkpoint that is not to be had or of another kind, or a scale that is not above 0.
    """

    default: ClassVar[str]

    def __init__(
        self,
        model: str | None = None,
        *,
        weights: str | Path | None = None,
        scale: float = 100.0,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
    ) -> None:
        if not scale > 0:
            raise ValueError(f"{self.name}.scale: expected a number above 0, got {scale}")
        model = model or self.default
        super().__init__(load_tower(model, weights, device, dtype=dtype, reward=self.name), float(scale))
        side = self.tower.recipe.size
        self.card = replace(self.card, unit=f"{scale:g} cos", range=(-scale, scale), source=model, side=side)


def _card(source: str, code: str, weights: str, side: int) -> Card:
    return Card("100 cos", (-100.0, 100.0), source, code, weights, differentiable=True, side=side,
                across_prompts=False, checked="official code, small weights")  # fmt: skip


@final
class CLIPScore(_CLIP):
    """100 cos in the space of a CLIP of your choice; see `_CLIP` for the keywords."""

    name: ClassVar[str] = "clip"
    default: ClassVar[str] = "openai/clip-vit-large-patch14"
    card = _card(f"{default}; arXiv 2104.08718", "MIT", "MIT (the default)", 224)


@final
class SigLIPScore(_CLIP):
    """100 cos in SigLIP's space. Zhai et al. 2023, arXiv 2303.15343; see `_CLIP` for the keywords."""

    name: ClassVar[str] = "siglip"
    default: ClassVar[str] = "google/siglip-so400m-patch14-384"
    card = replace(_card(f"{default}; arXiv 2303.15343", "Apache-2.0", "Apache-2.0", 384), checked="formula only")


@final
class TinyCLIP(_CLIP):
    """100 cos in the space of the CLIP that ships, which knows the shapes world; see `_CLIP` for the keywords."""

    name: ClassVar[str] = "tiny-clip"
    default: ClassVar[str] = "tiny-clip"
    card = _card("assets/tiny-clip", "Apache-2.0", "Apache-2.0", 64)
