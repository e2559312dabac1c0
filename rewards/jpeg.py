"""How well a picture compresses, the test rewards of DDPO. Black et al. 2023, arXiv 2305.13301, section 5.1.

    score = -size / 1000, or size / 1000: kilobytes of 1000 bytes of Pillow's JPEG at quality 95

The size is that of one build of libjpeg; another gives numbers that differ by less than 1 %. flow_grpo reports the same
divided by 500.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, final

import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.base import Card, Images, dispatch
from diffalign.rewards.preprocess import to_rgb

QUALITY = 95
MODES = {"compressibility": -1.0, "incompressibility": 1.0}  # the names that DDPO gives them


@final
class JPEG:
    """Minus the kilobytes of the picture as a JPEG, so that a smaller file scores higher; or plus.

    Args:
        mode: "compressibility" for minus the size, "incompressibility" for the size.

    Raises:
        ValueError: unknown mode.
    """

    name: ClassVar[str] = "jpeg"
    card = Card(
        unit="-kB",
        range=(-float("inf"), 0.0),
        source="Pillow's JPEG at quality 95; arXiv 2305.13301",
        code="MIT",
        weights="none",
        differentiable=False,
        side=None,
        across_prompts=True,
        checked="official code, no weights",
    )

    def __init__(self, mode: str = "compressibility") -> None:
        if mode not in MODES:
            raise ValueError(f"jpeg.mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self._sign = MODES[mode]
        if self._sign > 0:
            self.card = replace(self.card, unit="kB", range=(0.0, float("inf")))

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B], whatever the prompts; see `Reward.__call__`. Float pixels are rounded to 8 bits first."""
        return dispatch(self.name, images, prompts, exact=self._score, differentiable=None)

    def _score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._sign * torch.tensor([kilobytes(picture) for picture in pictures])


def kilobytes(picture: Image.Image) -> float:
    """The size of a picture of any mode as an RGB JPEG, in units of 1000 bytes; an alpha channel is dropped.

    Raises:
        ValueError: more than 8 bits per channel.
    """
    buffer = io.BytesIO()
    to_rgb(picture).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000
