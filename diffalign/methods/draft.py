"""DRaFT: Clark et al. 2023, Directly Fine-Tuning Diffusion Models on Differentiable Rewards, arXiv 2309.17400.

    L = -R(picture),   differentiated through the last K steps of a deterministic walk; K = N is plain DRaFT

There is no official code. The steps before run without gradient, so a step's activations are all that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.checks import check_last, check_not_negative, check_positive
from diffalign.methods.direct import reward_loss, steer_last


@dataclass(frozen=True)
class DRaFT:
    """Gradient of a reward through the end of a walk.

    Args:
        last: K, steps that are differentiated.
        goal: pictures whose reward has reached it give no gradient, max(0, goal - R); None for all.
        kl_weight: of a leash, the squared difference to the reference's prediction at the first of the K steps.
        steps, guidance: of the walk; both branches of guidance carry a gradient.
        at_once: pictures in one call of the network.

    Metrics: `reward`, `missing` (pictures without a score), `kl`.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROMPTS, Need.REWARD_GRADIENT, Need.REFERENCE})
    view: ClassVar[str] = "prompts"

    last: int = 1
    goal: float | None = None
    kl_weight: float = 0.0
    steps: int = 50
    guidance: float = 7.5
    at_once: int = 8

    def __post_init__(self) -> None:
        check_positive(at_once=self.at_once)
        check_not_negative(guidance=self.guidance, kl_weight=self.kl_weight)
        check_last("last", self.last, self.steps)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return steer_last(run, batch, self.last, self.steps, self.guidance, self.goal, self.at_once)

    def loss(self, run: Run, batch: Noised) -> Loss:
        return reward_loss(run, batch, self.guidance, self.kl_weight)
