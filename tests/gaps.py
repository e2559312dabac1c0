"""How far apart a reward's recipes and number formats are: `python tests/gaps.py` prints the table of docs/rewards.md.

The networks are those of `zoo`, small with random weights that spread scores more than trained ones do, so the figures
are to be read beside the spread. Twelve photographs, as RGB, with every prompt of the row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import zoo
from PIL import Image
from torch import Tensor

from diffalign.rewards import REWARDS
from diffalign.rewards.base import Reward
from diffalign.table import resolve

HEADER = ("reward", "spread", "float median", "float most", "bfloat16 most", "float16 most", "aliased most")


@dataclass(frozen=True)
class Gaps:
    """Absolute differences of scores from those of the exact recipe in fp32, in the reward's own unit.

    Args:
        spread: standard deviation of the scores.
        median, most: of the float recipe.
        bfloat16, float16: the largest with networks of that type, by the exact recipe.
        aliased: the largest of the float recipe without antialiasing, a mistake that must show.
    """

    spread: float
    median: float
    most: float
    bfloat16: float
    float16: float
    aliased: float

    def row(self) -> list[str]:
        return [f"{value:.2g}" for value in vars(self).values()]


def with_gradient() -> list[str]:
    """The rows of REWARDS that have both recipes."""
    return [name for name in REWARDS if resolve(REWARDS, name, "reward").card.differentiable]


def measure(name: str) -> Gaps:
    """The row of one reward."""
    small = zoo.ZOO[name]
    reward, pictures = small.build(), [picture.convert("RGB") for picture in zoo.pictures()]
    exact = _scores(reward, small.prompts, pictures)
    drift = {
        dtype: (_scores(small.build(dtype=dtype), small.prompts, pictures) - exact).abs().max().item()
        for dtype in ("bfloat16", "float16")
    }
    pixels = [as_pixels(picture) for picture in pictures]
    float_gap = (_scores(reward, small.prompts, pixels) - exact).abs()
    with resizing(antialias=False):
        aliased = (_scores(reward, small.prompts, pixels) - exact).abs()
    return Gaps(exact.std().item(), float_gap.median().item(), float_gap.max().item(), **drift,
                aliased=aliased.max().item())  # fmt: skip


@contextmanager
def resizing(**other: Any) -> Iterator[None]:
    """Wrong float recipes, in all of torch: `antialias=False` as torchvision before 0.17, `mode="bilinear"` as
    AlignProp."""
    interpolate = F.interpolate

    def wrong(x: Tensor, **keywords: Any) -> Tensor:
        return interpolate(x, **keywords | other)

    with mock.patch.object(F, "interpolate", wrong):
        yield


@torch.no_grad()
def _scores(reward: Reward, prompts: tuple[str, ...], images: list[Any]) -> Tensor:
    """[pictures * prompts]; a picture at a time, since their sizes differ."""
    return torch.cat([reward(_repeated(one, len(prompts)), prompts) for one in images])


def _repeated(image: Any, count: int) -> Any:
    return image.expand(count, -1, -1, -1) if isinstance(image, Tensor) else [image] * count


def as_pixels(picture: Image.Image) -> Tensor:
    """[1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def main() -> int:
    print(f"| {' | '.join(HEADER)} |\n|---|{'---:|' * (len(HEADER) - 1)}")
    for name in with_gradient():
        print(f"| `{name}` | {' | '.join(measure(name).row())} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
