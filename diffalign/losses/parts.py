"""Errors by part of a picture or clip, and preferences about parts (DenseDPO). fp32 in, no reduction over samples."""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = ("mean_all", "mean_nontie", "sum")


def part_errors(prediction: Tensor, target: Tensor, parts: int) -> Tensor:
    """Mean squared error over channels and all axes that have no label of their own, fp32.

    [N, C, F, h, w] with parts = 1 axis -> [N, F] (frames of a clip); [N, C, h, w] with 2 -> [N, h w] (places).
    """
    error = (prediction.float() - target.float()).square().mean(1)
    return error.flatten(1 + parts).mean(-1).flatten(1) if error.ndim > 1 + parts else error.flatten(1)


def labels_of_parts(signs: Tensor, shape: torch.Size) -> Tensor:
    """Labels at the latent's own grain, the nearest one of each frame or place: [B, F] or [B, h w].

    Args:
        signs: [B, S] of segments for latents [B, C, F, ...], or [B, H, W] of regions for latents [B, C, h, w].
        shape: of the latents.

    Raises:
        ValueError: segments for still pictures, regions for clips, or more segments than the latent has frames.
    """
    if signs.ndim == 2:
        if len(shape) != 5:
            raise ValueError(f"densedpo: expected regions (rows of labels) for still pictures, got {signs.shape[1]} "
                             f"segments, which are for clips")  # fmt: skip
        if signs.shape[1] > shape[2]:
            raise ValueError(f"densedpo: expected at most as many segments as a clip's latent has frames ({shape[2]}), "
                             f"got {signs.shape[1]}")  # fmt: skip
        return signs[:, _nearest(signs.shape[1], shape[2], signs.device)]
    if len(shape) != 4:
        raise ValueError("densedpo: expected segments (one label per part of a clip), got regions, which are for "
                         "still pictures")  # fmt: skip
    rows, columns = (_nearest(signs.shape[1 + axis], shape[2 + axis], signs.device) for axis in (0, 1))
    return signs[:, rows][:, :, columns].flatten(1)


def _nearest(labels: int, places: int, device: torch.device) -> Tensor:
    """[places] index of the label that holds each place's center."""
    return ((torch.arange(places, device=device) + 0.5) * labels / places).long()


def weights_of_parts(labels: Tensor, norm: str) -> Tensor:
    """[B, P] labels over their number (mean_all), over that of the labels that are no tie, or as they are (sum)."""
    count = {
        "mean_all": torch.full_like(labels[:, :1], labels.shape[1]),
        "mean_nontie": labels.abs().sum(1, keepdim=True).clamp(min=1),
        "sum": torch.ones_like(labels[:, :1]),
    }
    return labels / count[norm]


def better_then_worse(errors: Tensor, labels: Tensor) -> Tensor:
    """[2 B] of errors [2 B, P] and labels [B, P]: means over the parts that are no tie, of each part's better member,
    then of its worse one. They are what m_w and m_l are for pairs without parts.
    """
    first, second = errors.chunk(2)
    told = labels != 0
    count = told.sum(1).clamp(min=1)
    better, worse = torch.where(labels > 0, first, second), torch.where(labels > 0, second, first)
    return torch.cat([(better * told).sum(1) / count, (worse * told).sum(1) / count])
