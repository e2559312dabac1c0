"""A frozen generator with an exact law, and rewards that can be written down: for noise optimization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from toy import PROCESSES, sampling_times

from diffalign.noise.objective import MEMORY, Counted, Objective
from diffalign.process import per_sample
from diffalign.rewards.base import Card, Images, Weighted, dispatch, each_prompt
from diffalign.sampling import Condition

SHAPE = (3, 2, 2)
CARD = Card("toy", (-10.0, 10.0), "toy", "none", "none", differentiable=True, side=None, across_prompts=True,
            checked="formula only")  # fmt: skip


class Bent:
    """A network that is not linear in what it is given, another one for each prompt."""

    def __init__(self, process: str, kind: str) -> None:
        g = torch.Generator().manual_seed(0)
        self.weight, self.bias = 0.4 * torch.randn(3, 3, generator=g), torch.randn(9, 3, generator=g)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        mixed = torch.einsum("bchw,cd->bdhw", x_t, self.weight.to(x_t.dtype))
        return torch.tanh(mixed + per_sample(self.bias[condition["prompt"]].flatten(), x_t[:1, :1]).view(-1, 3, 1, 1))


class Wavy:
    """sum sin(k pixel): several hills, a gradient everywhere."""

    name, card = "wavy", CARD

    def __init__(self, k: float = 3.0) -> None:
        self.k = k
        self.asked: list[int] = []

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        self.asked.append(len(prompts))
        scale = torch.tensor([float(len(prompt)) for prompt in each_prompt(prompts, len(images))])
        assert isinstance(images, Tensor)
        return torch.sin(self.k * images + per_sample(scale, images)).flatten(1).sum(1)


class Box:
    """The same without a gradient: it looks at 8-bit pictures."""

    name = "box"
    card = replace(CARD, differentiable=False)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return dispatch("box", images, prompts, differentiable=None, exact=lambda pictures, said: torch.tensor(
            [sum(picture.getdata(0)) / 255 for picture in pictures]))  # fmt: skip


def objective(
    prompts: Sequence[str] = ("a", "bc", "def"),
    seeds: Sequence[int] = (3, 4, 5),
    process: str = "vp",
    kind: str = "epsilon",
    steps: int = 4,
    guidance: float = 1.0,
    memory: str = "fast",
    at_once: int = 8,
    rewards: Weighted | None = None,
) -> Objective:
    ids = torch.tensor([len(prompt) for prompt in prompts])
    return Objective(
        tuple(prompts), rewards or Weighted({"wavy": (Wavy(), 1.0)}), Counted(Bent(process, kind)), PROCESSES[process],
        kind, {"prompt": ids}, {"prompt": torch.zeros_like(ids)}, guidance, sampling_times(PROCESSES[process], steps),
        SHAPE, torch.sigmoid, tuple(torch.Generator().manual_seed(seed) for seed in seeds), MEMORY[memory], at_once,
    )  # fmt: skip


def alone(number: int, **keywords: Any) -> Objective:
    """The objective of one of the default prompts."""
    prompts, seeds = ("a", "bc", "def"), (3, 4, 5)
    return objective(prompts[number : number + 1], seeds[number : number + 1], **keywords)
