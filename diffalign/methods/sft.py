"""SFT on the chosen pictures: the plain diffusion loss on winners, the baseline that many papers skip.

    L = w(t) m_w

Ties (label 1/2) count half. No reference, no loser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffalign.losses import squared_error
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, noise_together, weight_at
from diffalign.methods.checks import check_times


@dataclass(frozen=True)
class SFT:
    """Denoising loss on winners.

    Args:
        timestep_weight: native | eps | x0 | sigmoid | snr_clip.
        time_low, time_high: the part of the noise axis to train on, 0 clean and 1 pure noise.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS})
    view: ClassVar[str] = "winners"

    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_times(self.time_low, self.time_high, self.timestep_weight)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return [noise_together(run, batch, (self.time_low, self.time_high))]

    def loss(self, run: Run, batch: Noised) -> Loss:
        m = squared_error(run.policy(batch.x_t, batch.t, batch.condition), batch.y)
        weight = weight_at(run, batch.t, self.timestep_weight)
        return Loss(batch.label * weight * m, run.process.fraction(batch.t), {"m_w": m.detach()})
