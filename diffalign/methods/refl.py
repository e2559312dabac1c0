"""ReFL: Xu et al. 2023, ImageReward: Learning and Evaluating Human Preferences for Text-to-Image, arXiv 2304.05977.

    L = max(0, goal - R(x0)),   x0 what the network says of the picture at a random one of the late steps

The steps before run without gradient. As released there is no guidance in training; a model that is drawn with guidance
afterwards then comes out oversaturated, so set `guidance` to what it will be drawn with.

Deviations from the released code (THUDM/ImageReward, ReFL.py): DDIM instead of the stochastic DDPM step; no factor of
1e-3, which AdamW does not feel; no term of pre-training (the paper has one, the code has not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.checks import check_last, check_not_negative, check_positive
from diffalign.methods.direct import below, random_step, reward_loss, start_of, steered, walked_in_parts


@dataclass(frozen=True)
class ReFL:
    """Gradient of a reward through one prediction of the picture.

    Args:
        late: from which of the last steps the picture is predicted, one of them per rollout.
        goal: pictures whose reward has reached it give no gradient; 2 suits ImageReward. None for all.
        kl_weight, steps, guidance, at_once: as in `draft`.

    Metrics: those of `draft`.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROMPTS, Need.REWARD_GRADIENT, Need.REFERENCE})
    view: ClassVar[str] = "prompts"

    late: int = 10
    goal: float | None = 2.0
    kl_weight: float = 0.0
    steps: int = 40
    guidance: float = 1.0
    at_once: int = 8

    def __post_init__(self) -> None:
        check_positive(at_once=self.at_once)
        check_not_negative(guidance=self.guidance, kl_weight=self.kl_weight)
        check_last("late", self.late, self.steps)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        times = run.times(self.steps)
        place = random_step(run, range(self.steps - self.late, self.steps))
        x = start_of(run, batch)
        if place:
            x = walked_in_parts(run, batch, x, times[: place + 1], self.guidance, self.at_once)
        path = torch.stack([times[place], times[-1]])
        end = walked_in_parts(run, batch, x, path, self.guidance, self.at_once)
        scores, slope = run.reward_gradient(end, batch.prompts)
        return steered(run, batch, x, path, below(slope, scores, self.goal), scores, self.at_once)

    def loss(self, run: Run, batch: Noised) -> Loss:
        return reward_loss(run, batch, self.guidance, self.kl_weight)
