"""AlignProp: Prabhudesai et al. 2023, Aligning Text-to-Image Models with Reward Backpropagation, arXiv 2310.03739.

    L = -R(picture),   differentiated through the steps from a random one on, the same for the whole rollout

Deviations from the released code (mihirp1998/AlignProp, and TRL's copy of it), each on purpose:
- the step from which on there is a gradient is drawn once per rollout. There it is drawn anew at every step and
  compared with it, so that single steps all over the walk are differentiated (issue 15, which its author calls wrong);
- pictures are in [0, 1] when a reward sees them; the newest code maps them there twice, to [1/2, 1];
- the walk is deterministic, as in the first version; the newest has eta = 1;
- the steps before run without gradient, not with one that is thrown away.

Rewards are over-optimized within some hundred pictures: stop early, use `kl_weight`, or draw with the LoRA at a part of
its strength afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.checks import check_choice, check_not_negative, check_positive
from diffalign.methods.direct import reward_loss, steer_last

TRUNCATIONS = ("normal", "uniform")


@dataclass(frozen=True)
class AlignProp:
    """Gradient of a reward through a random part of a walk, its end.

    Args:
        truncation: normal | uniform: how the first step with a gradient is drawn, out of 1 .. steps - 1.
        mean, deviation: of normal, as shares of the steps; 0.84 and 0.1 are the paper's 42 and 5 of 50, which
            differentiates about nine.
        goal, kl_weight, steps, guidance, at_once: as in `draft`.

    Metrics: those of `draft`.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROMPTS, Need.REWARD_GRADIENT, Need.REFERENCE})
    view: ClassVar[str] = "prompts"

    truncation: str = "normal"
    mean: float = 0.84
    deviation: float = 0.1
    goal: float | None = None
    kl_weight: float = 0.0
    steps: int = 50
    guidance: float = 7.5
    at_once: int = 8

    def __post_init__(self) -> None:
        check_choice("truncation", self.truncation, TRUNCATIONS)
        check_positive(at_once=self.at_once)
        check_not_negative(deviation=self.deviation, guidance=self.guidance, kl_weight=self.kl_weight)
        if not 0 < self.mean < 1:
            raise ValueError(f"method.mean: expected a share of the steps between 0 and 1, got {self.mean}")
        if self.steps < 2:
            raise ValueError(f"method.steps: expected at least 2, one of them without gradient, got {self.steps}")

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        last = self.steps - self.first(run.generator)
        return steer_last(run, batch, last, self.steps, self.guidance, self.goal, self.at_once)

    def loss(self, run: Run, batch: Noised) -> Loss:
        return reward_loss(run, batch, self.guidance, self.kl_weight)

    def first(self, generator: torch.Generator) -> int:
        """Index of the first step with a gradient, in 1 .. steps - 1."""
        if self.truncation == "uniform":
            return int(torch.randint(1, self.steps, (1,), generator=generator))
        drawn = self.steps * (self.mean + self.deviation * torch.randn(64, generator=generator))
        inside = [int(m) for m in drawn.tolist() if 1 <= int(m) < self.steps]
        return inside[0] if inside else min(max(1, round(self.steps * self.mean)), self.steps - 1)
