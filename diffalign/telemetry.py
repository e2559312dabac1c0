"""What a model that games its reward does to its pictures, in numbers: they get gaudy, sharp, dark, and all alike.

Each is per picture and means little alone; watch how it moves while the reward rises. Pixels are [B, 3, H, W], 0 to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, of red, green and blue
DARK = 0.1  # luma below which a pixel counts as black


def looks(pixels: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
    """Name -> [B]; `drift` only with pictures [B, 3, H, W] of the base model from the same prompts and noise.

    Of clips [B, F, 3, H, W] the means over frames, and their `motion`.
    """
    if pixels.ndim == 5:
        frames = looks(pixels.flatten(0, 1), None if base is None else base.flatten(0, 1))
        return {name: row.view(len(pixels), -1).mean(1) for name, row in frames.items()} | {"motion": motion(pixels)}
    found = {"saturation": saturation(pixels), "sharpness": sharpness(pixels), "dark": dark(pixels)}
    return found if base is None else {**found, "drift": drift(pixels, base)}


def motion(clips: Tensor) -> Tensor:
    """[B] in [0, 1] of clips [B, F, 3, H, W]: the mean difference of a frame from the one before."""
    if clips.shape[1] < 2:
        return torch.zeros(len(clips))
    return clips.diff(dim=1).abs().flatten(1).mean(1)


def saturation(pixels: Tensor) -> Tensor:
    """[B] in [0, 1]: the mean of HSV's S, (max - min) / max of the three colors; black has none."""
    high, low = pixels.amax(1), pixels.amin(1)
    return ((high - low) / high.clamp(min=1e-6)).flatten(1).mean(1)


def sharpness(pixels: Tensor) -> Tensor:
    """[B], at least 0: the mean of |Laplacian of luma| over inner pixels; noise and hard outlines raise it."""
    y = luma(pixels)
    around = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
    return (around - 4 * y[:, 1:-1, 1:-1]).abs().flatten(1).mean(1)


def dark(pixels: Tensor) -> Tensor:
    """[B] in [0, 1]: the share of pixels that are black, or nearly."""
    return (luma(pixels) < DARK).float().flatten(1).mean(1)


def drift(pixels: Tensor, base: Tensor) -> Tensor:
    """[B] in [0, 1]: the root of the mean squared difference from the base model's picture."""
    return (pixels - base).square().flatten(1).mean(1).sqrt()


def luma(pixels: Tensor) -> Tensor:
    """[B, H, W]: how bright, in [0, 1]."""
    return (pixels * pixels.new_tensor(LUMA).view(3, 1, 1)).sum(1)
