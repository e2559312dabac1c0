"""Clips [B, F, 3, H, W]: rewards that watch them whole, and picture rewards that see some of their frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.base import (
    Explains,
    Images,
    Reward,
    check_images,
    each_prompt,
    flatten_frames,
    full_precision,
)
from diffalign.rewards.missing import of_clips
from diffalign.rewards.preprocess import to_rgb

ScoreClips = Callable[[Sequence[Tensor], Sequence[str]], Tensor]
WHOLE = ("moving-shapes", "videoreward", "videoscore")  # rows of REWARDS that watch a clip as one thing
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.mean(1),
    "min": lambda scores: scores.amin(1),
    "first": lambda scores: scores[:, 0],
}


Shown = Image.Image | Tensor  # a picture, or a clip uint8 [F, 3, H, W]


def together(shown: Sequence[Shown]) -> Images:
    """Pictures as a list, clips of one size and length as a tensor [B, F, 3, H, W]."""
    clips = [one for one in shown if isinstance(one, Tensor)]
    return torch.stack(clips) if clips else [one for one in shown if isinstance(one, Image.Image)]


def spread(count: int, taken: int | None) -> list[int]:
    """Which of `count` frames are taken: all, or `taken` from the first to the last at equal distances, rounded."""
    if taken is None or taken >= count:
        return list(range(count))
    return torch.linspace(0, count - 1, taken).round().long().tolist()


def dispatch_clips(
    name: str, images: Images, prompts: Sequence[str], score: ScoreClips, *, differentiable: bool
) -> Tensor:
    """The body of rewards of clips, as `base.dispatch` is of pictures. Scores [B].

    Args:
        score: scores [B] of clips [F, 3, H, W], uint8 or float in [0, 1], and their prompts. A picture is a clip of
            one frame.
        differentiable: whether float clips reach `score` as they are; else they are rounded to 8 bits.

    Raises:
        ValueError: see `Reward.__call__`.
    """
    check_images(images)
    prompts = each_prompt(prompts, len(images))
    if not isinstance(images, Tensor):
        clips = [_of_picture(picture) for picture in images]
        with full_precision(), torch.no_grad():
            return score(clips, prompts).float().cpu()
    if not differentiable and images.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"reward {name!r} has no gradient, but pixels that require one were given; pass pixels.detach()"
        )
    watched = images if images.ndim == 5 else images[:, None]
    if watched.is_floating_point() and not differentiable:
        watched = (watched.float() * 255).round().to(torch.uint8)
    with full_precision(), torch.set_grad_enabled(torch.is_grad_enabled() and watched.is_floating_point()):
        clips = [clip.float() if clip.is_floating_point() else clip for clip in watched]
        return score(clips, prompts).float().to(images.device)


@final
class Frames:
    """A picture reward on clips: which frames it sees, and how their scores become one. Pictures are scored as ever.

    A still clip scores what its picture does, whatever the choice. A gradient reaches the frames that are taken; with
    `min` and `first` only one of them. Where the reward says why a score is missing (`Explains`), so does this: of a
    clip, what it says of the first frame without one.

    Args:
        reward: of pictures.
        frames: how many are taken of a clip, spread from its first to its last; None takes all.
        reduce: "mean", "min" or "first" (which scores no other).

    Raises:
        ValueError: a number below 1, an unknown reduction, or a reward that watches whole clips itself.
    """

    def __init__(self, *, reward: Reward, frames: int | None = None, reduce: str = "mean") -> None:
        if frames is not None and frames < 1:
            raise ValueError(f"clips.frames: expected at least 1, got {frames}")
        if reduce not in REDUCTIONS:
            raise ValueError(f"clips.reduce: expected one of {', '.join(REDUCTIONS)}, got {reduce!r}")
        if reward.name in WHOLE:
            raise ValueError(f"clips: {reward.name} watches whole clips; how many frames it takes is its own keyword")
        self.reward, self.frames, self.reduce = reward, frames, reduce
        self.name, self.card = reward.name, reward.card
        if isinstance(reward, Explains):  # else there is no such attribute, so that this is no `Explains` either
            self.reasons = list(reward.reasons)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`."""
        if not isinstance(images, Tensor) or images.ndim != 5:
            return self._scored(images, prompts, 1)
        check_images(images)
        prompts = each_prompt(prompts, len(images))
        taken = images[:, spread(images.shape[1], 1 if self.reduce == "first" else self.frames)]
        flat, count = flatten_frames(taken)
        scores = self._scored(flat, [prompt for prompt in prompts for _ in range(count)], count)
        return REDUCTIONS[self.reduce](scores.view(-1, count))

    def _scored(self, pictures: Images, prompts: Sequence[str], count: int) -> Tensor:
        """Of every picture; the reasons are of every `count` of them."""
        scores = self.reward(pictures, prompts)
        if isinstance(self.reward, Explains):
            self.reasons = of_clips(self.reward.reasons, len(self.reward.reasons) // count)
        return scores


def _of_picture(picture: Image.Image) -> Tensor:
    """uint8 [1, 3, H, W]."""
    return torch.from_numpy(np.array(to_rgb(picture))).permute(2, 0, 1)[None]
