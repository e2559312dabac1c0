"""MaPO: Hong et al. 2024, Margin-aware Preference Optimization without Reference, arXiv 2406.06424.

    L = m_w - beta log sigmoid(ell),   ell = T (phi(m_w) - phi(m_l)),   phi(m) = s m / (exp(s m) - 1)

Winner-SFT plus a margin, with no reference at all; x_t of winner and loser share t and eps.

Deviations from the released code (mapo-t2i/mapo):
- phi by expm1, and 1 at m = 0, where the plain quotient is 0 / 0;
- s belongs to the size of the error: 0.5 for epsilon as there. Other targets have larger errors, and `scale` left out
  takes the number of `SCALES`, which gives s m the size that it has for epsilon (about 0.05).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from diffalign.losses import squared_error
from diffalign.losses.unary import margin_aware
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, noise_together, weight_at
from diffalign.methods.checks import check_not_negative, check_positive, check_times
from diffalign.methods.pairs import pair_metrics

SCALES = {"epsilon": 0.5, "v_prediction": 0.25, "sample": 0.25, "flow": 0.1}


@dataclass(frozen=True)
class MaPO:
    """Winner-SFT plus a margin, without a reference.

    Args:
        beta: weight of the margin against the winner's own error.
        scale: s; None is that of the network's parametrization (`SCALES`).
        steepness: T.
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with every m; eps on another target is the
            other way to keep s at 0.5.
        time_low, time_high: the part of the noise axis to train on.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS})
    view: ClassVar[str] = "pairs"

    beta: float = 0.1
    scale: float | None = None
    steepness: float = 1000.0
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative(beta=self.beta)
        check_positive(steepness=self.steepness, **({} if self.scale is None else {"scale": self.scale}))
        check_times(self.time_low, self.time_high, self.timestep_weight)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return [noise_together(run, batch, (self.time_low, self.time_high))]

    def loss(self, run: Run, batch: Noised) -> Loss:
        m = squared_error(run.policy(batch.x_t, batch.t, batch.condition), batch.y)
        weight = weight_at(run, batch.t, self.timestep_weight)
        m_w, m_l = (weight * m).chunk(2)
        scale = SCALES[run.parametrization] if self.scale is None else self.scale
        ell = margin_aware(m_w, m_l, scale, self.steepness)
        # a tie that is kept (label 1/2) pulls both pictures alike
        value = batch.label * (m_w - self.beta * F.logsigmoid(ell)) + (1 - batch.label) * (
            m_l - self.beta * F.logsigmoid(-ell)
        )
        shown = pair_metrics(ell, m, m.detach())
        kept = {name: shown[name] for name in ("h", "accuracy", "saturated", "m_w", "m_l")}  # no reference: no r, no d
        return Loss(value, run.process.fraction(batch.t).chunk(2)[0], kept)
