"""The verifier of the moving shapes world as a reward of clips: exact, not learned, and so not to be fooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.rewards.base import Card, Images
from diffalign.rewards.clips import dispatch_clips
from diffalign.rewards.shapes import MODES, Shapes
from diffalign.shapes.verify_clip import verify_clip


class MovingShapes:
    """1.0 for a clip that shows and does what its caption says, else 0.0 (or the share of facts that hold).

    A picture is a clip in which nothing moves.

    Args:
        mode: "pass" for 1.0 or 0.0; "score" for the verifier's graded score in [0, 1], which is 1.0 only on a pass.

    Raises:
        ValueError: unknown mode; when called, a caption that is not of the moving shapes world, or two frames.
    """

    name: ClassVar[str] = "moving-shapes"
    card: ClassVar[Card] = replace(Shapes.card, source="diffalign/shapes/verify_clip.py")

    def __init__(self, mode: str = "pass") -> None:
        if mode not in MODES:
            raise ValueError(f"moving-shapes.mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`. Float pixels are rounded to 8 bits first."""
        return dispatch_clips(self.name, images, prompts, self._score, differentiable=False)

    def _score(self, clips: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        whole = [clip.expand(3, -1, -1, -1) if len(clip) == 1 else clip for clip in clips]
        arrays = [clip.permute(0, 2, 3, 1).cpu().numpy() for clip in whole]
        verdicts = [verify_clip(array, caption) for array, caption in zip(arrays, captions, strict=True)]
        return torch.tensor([float(v.ok) if self.mode == "pass" else v.score for v in verdicts])
