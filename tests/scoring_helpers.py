"""Rewards for tests of scoring that follow from a picture's pixels, and pictures whose scores are known."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.rewards.base import Card, dispatch
from diffalign.rewards.pairwise import WinRate

CARD = Card("level", (0.0, 255.0), "tests", "none", "none", False, None, True, "formula only")


class Red:
    """Mean of the red channel; `offset` is an option to change."""

    name, card = "red", CARD

    def __init__(self, *, offset: float = 0.0, device: Any = "cpu") -> None:
        self.offset = offset
        self.sizes: list[int] = []  # of the batches it was given

    def __call__(self, images: Any, prompts: Sequence[str]) -> torch.Tensor:
        self.sizes.append(len(prompts))
        return dispatch(self.name, images, prompts, exact=self._exact, differentiable=None)

    def _exact(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([np.asarray(p.convert("RGB"), np.float64)[..., 0].mean() + self.offset for p in pictures])


class Slow(Red):
    """Red, half a second per batch, so that there is time to kill it."""

    name = "slow"

    def _exact(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        time.sleep(0.5)
        return super()._exact(pictures, prompts)


class Choosy(Red):
    """Refuses captions with "refuse" in them, has no score for those with "unsure"."""

    name = "choosy"

    def _exact(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        if refused := [prompt for prompt in prompts if "refuse" in prompt]:
            raise ValueError(f"expected another caption, got {refused[0]!r}")
        self.reasons = ["it is unsure" if "unsure" in prompt else "" for prompt in prompts]
        scores = super()._exact(pictures, prompts)
        return torch.where(torch.tensor([bool(reason) for reason in self.reasons]), float("nan"), scores)


class RefusesAll(Red):
    """No caption is good enough."""

    name = "refuses-all"

    def _exact(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        raise ValueError("expected another caption")


class Mortal(Red):
    """Takes its process with it, once: with SIGKILL, when it has left the file `grave`."""

    name = "mortal"

    def __init__(self, *, grave: str, device: Any = "cpu") -> None:
        super().__init__()
        self.grave = Path(grave)

    def _exact(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        if self.sizes[1:] and not self.grave.exists():
            self.grave.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._exact(pictures, prompts)


class Redder:
    """A preference: the redder picture wins."""

    workers = 1

    def __init__(self, device: Any = "cpu") -> None:
        pass

    def prefer(self, a: Image.Image, b: Image.Image, prompt: str) -> float:
        return float(np.asarray(a)[..., 0].mean() > np.asarray(b)[..., 0].mean())


def redder_wins(*, device: Any = "cpu") -> WinRate:
    """The share of the other pictures of a prompt that are less red."""
    return WinRate(preference=Redder())


def save_reds(folder: Path, count: int) -> list[Path]:
    """count pictures 000.png ... whose red is 5, 10, 15 ..."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:03d}.png" for number in range(count)]
    for number, file in enumerate(files):
        Image.new("RGB", (8, 8), (5 * (number + 1), 0, 0)).save(file)
    return files
