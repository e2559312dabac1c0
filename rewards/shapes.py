"""The verifier of the shapes world as a reward: exact, not learned, and so not to be fooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.base import Card, Images, dispatch
from diffalign.shapes.verify import verify

MODES = ("pass", "score")


class Shapes:
    """1.0 for a picture that shows what its caption says and nothing else, else 0.0 (or the share of facts that hold).

    Args:
        mode: "pass" for 1.0 or 0.0; "score" for the verifier's graded score in [0, 1], which is 1.0 only on a pass.

    Raises:
        ValueError: unknown mode; when called, a caption that is not of the shapes world.
    """

    name: ClassVar[str] = "shapes"
    card: ClassVar[Card] = Card(
        unit="1 or 0",
        range=(0.0, 1.0),
        source="diffalign/shapes/verify.py",
        code="Apache-2.0",
        weights="none",
        differentiable=False,
        side=None,
        across_prompts=True,
        checked="formula only",
    )

    def __init__(self, mode: str = "pass") -> None:
        if mode not in MODES:
            raise ValueError(f"shapes.mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`. Float pixels are rounded to 8 bits first."""
        return dispatch(self.name, images, prompts, exact=self._score, differentiable=None)

    def _score(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        verdicts = [verify(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
        return torch.tensor([float(v.ok) if self.mode == "pass" else v.score for v in verdicts])
