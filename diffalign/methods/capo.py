"""CaPO: Lee et al. 2025, Calibrated Preference Optimization of Text-to-Image Diffusion Models, arXiv 2502.02588.

    L = ( R_ca(w) - R_ca(l) - (rho_w - rho_l) )^2,   rho = -(beta / 2) w(t) (m - r),   w(t) = sigmoid(-log SNR + bias)
    R_ca(i) = mean over the other pictures j of the prompt of sigmoid(R_i - R_j)

The margin to reach is not one constant, as in IPO, but how often the winner's reward wins against how often the
loser's does. Winner and loser are the best and the worst of a prompt's pictures and share t and eps. There is no
released code; beta and the bias of the paper are not known.

Choices of our own:
- beta / 2 as in `dpo`, so that a beta means the same;
- with several rewards the paper takes pairs from Pareto fronts of their R_ca and averages those. Here a picture has one
  score: `diffalign label --aggregate capo` averages R_ca over rewards, and calibrated: true takes the result as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.losses import log_ratio
from diffalign.losses.listwise import calibrated
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, errors, noise_together, with_members
from diffalign.methods.checks import check_positive, check_times
from diffalign.methods.pairs import pair_loss
from diffalign.table import Section


@dataclass(frozen=True)
class CaPO:
    """Regression of the implicit reward's margin on a calibrated one.

    Args:
        beta: as in `dpo`; targets lie in (-1, 1), so the margin that is reached shrinks as beta grows.
        calibrated: whether the record's scores are R_ca already, in [0, 1]; else they are rewards, and R_ca is taken
            over the prompt's pictures. Scores of 1 and 0 of a plain pair give a target of tanh(1/2) = 0.46.
        temperature: rewards are divided by it before they are calibrated; PickScore's differ by hundredths.
        bias: of the sigmoid weight; above 0 the clean end of the noise axis counts for more.
        time_low, time_high: the part of the noise axis to train on.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE})

    beta: float = 1000.0
    calibrated: bool = False
    temperature: float = 1.0
    bias: float = 0.0
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta, temperature=self.temperature)
        check_times(self.time_low, self.time_high)

    @property
    def view(self) -> Section:
        return {"name": "lists", "unit_scores": self.calibrated}

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        rewards = batch.scores if self.calibrated else calibrated(batch.scores / self.temperature)
        ends = with_members(batch, batch.winner, batch.loser, conditions=(batch.conditions[0], batch.conditions[-1]))
        aux = {"target": rewards[:, 0] - rewards[:, -1]}
        return [noise_together(run, ends, (self.time_low, self.time_high), aux=aux)]

    def loss(self, run: Run, batch: Noised) -> Loss:
        m, r = errors(run, batch)
        alpha, sigma = run.process.coefficients(batch.t)
        weight = torch.sigmoid(self.bias - 2 * (alpha / sigma).log())
        rho_w, rho_l = (weight * log_ratio(m, r, self.beta)).chunk(2)
        h, target = rho_w - rho_l, batch.aux["target"]
        return pair_loss(run, batch, (target - h).square(), h, m, r, target=target)
