"""DRaFT-LV: DRaFT's form of low variance (Clark et al. 2023, arXiv 2309.17400, section 4.2).

    L = -mean R(x0'),   x0' = one step from the last time, from the walk's own end noised afresh, several times

One walk serves several gradients of its last step. There is no official code. The picture that is noised again has no
gradient itself, as in FlowBP's re-implementation: that keeps it DRaFT-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.checks import check_not_negative, check_positive
from diffalign.methods.direct import below, reward_loss, start_of, steered, walked_in_parts
from diffalign.process import moved


@dataclass(frozen=True)
class DRaFTLV:
    """Gradient of a reward through the last step, from several noisings of a picture.

    Args:
        draws: n, noisings of each picture.
        goal, kl_weight, steps, guidance, at_once: as in `draft`.

    Metrics: those of `draft`.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROMPTS, Need.REWARD_GRADIENT, Need.REFERENCE})
    view: ClassVar[str] = "prompts"

    draws: int = 2
    goal: float | None = None
    kl_weight: float = 0.0
    steps: int = 50
    guidance: float = 7.5
    at_once: int = 8

    def __post_init__(self) -> None:
        check_positive(draws=self.draws, at_once=self.at_once, steps=self.steps)
        check_not_negative(guidance=self.guidance, kl_weight=self.kl_weight)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        times, made = run.times(self.steps), []
        x0 = walked_in_parts(run, batch, start_of(run, batch), times, self.guidance, self.at_once)
        t = moved(times[-2].cpu().expand(len(x0)), x0.device)
        for _ in range(self.draws):
            eps = moved(torch.randn(x0.shape, generator=run.generator), x0.device)
            x_t = run.process.add_noise(x0, eps, t)
            end = walked_in_parts(run, batch, x_t, times[-2:], self.guidance, self.at_once)
            scores, slope = run.reward_gradient(end, batch.prompts)
            made += steered(run, batch, x_t, times[-2:], below(slope, scores, self.goal), scores, self.at_once)
        return made

    def loss(self, run: Run, batch: Noised) -> Loss:
        return reward_loss(run, batch, self.guidance, self.kl_weight)
