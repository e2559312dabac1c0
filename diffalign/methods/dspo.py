"""DSPO: Zhu et al. 2025, Direct Score Preference Optimization for Diffusion Model Alignment, ICLR 2025.

    L = mean over elements of ( R - strength (1 - sigmoid(h)) P )^2        R = y_hat - y,  P = y_hat - y_ref,  on x_t^w
    h as in `dpo`; the loser enters through it alone, and the gate 1 - sigmoid(h) has its gradient too

It is SFT on the winner whose residual leans away from the reference as long as the pair is not yet ranked right.

Deviations from the released code (huaishengzhu/DSPO, train.py), each on purpose:
- there one number is both the coefficient of P, 0.001 to 0.05, and beta in h, where it leaves h at 0 and the gate at
  1/2: within 0.1 % of plain SFT. Here h has its own beta, in the thousands. `as_released: true` has the one number;
- for SDXL the code trains (1 - sigmoid(h))^2 wherever the mean of P^2 is below 0.1, in practice always: that is
  form: brier. Above 0.1 it multiplies by the mean of P^2, which is left out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.losses import squared_error
from diffalign.losses.unary import gated_residual
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, noise_together, reference_of
from diffalign.methods.checks import check_choice, check_positive, check_times
from diffalign.methods.pairs import log_ratios, pair_loss


@dataclass(frozen=True)
class DSPO:
    """Winner-SFT with a gate that the pair's logit opens and closes.

    Args:
        beta: of the logit, as in `dpo`.
        strength: coefficient of P, in (0, 1]; at 1 with h far below 0 nothing of the policy's own output is left.
        form: score (the paper's) | brier ((1 - sigmoid(h))^2, what the released code trains on SDXL).
        as_released: h takes `strength` for its beta.
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with m - r in h.
        time_low, time_high: the part of the noise axis to train on.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE})
    view: ClassVar[str] = "pairs"

    beta: float = 5000.0
    strength: float = 0.05
    form: str = "score"
    as_released: bool = False
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        if not 0 < self.strength <= 1:
            raise ValueError(f"method.strength: expected a number above 0 and at most 1, got {self.strength}")
        check_choice("form", self.form, ("score", "brier"))
        check_times(self.time_low, self.time_high, self.timestep_weight)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return [noise_together(run, batch, (self.time_low, self.time_high))]

    def loss(self, run: Run, batch: Noised) -> Loss:
        with torch.no_grad():
            theirs = reference_of(run)(batch.x_t, batch.t, batch.condition)
        ours = run.policy(batch.x_t, batch.t, batch.condition)
        m, r = squared_error(ours, batch.y), squared_error(theirs, batch.y)
        beta = self.strength if self.as_released else self.beta
        rho_w, rho_l = log_ratios(run, batch, m, r, beta, self.timestep_weight)
        gate = torch.sigmoid(rho_l - rho_w)
        y_w, theirs_w, target = (value.chunk(2)[0] for value in (ours, theirs, batch.y))
        value = gate.square()
        if self.form == "score":
            value = gated_residual(y_w - target, y_w - theirs_w, self.strength * gate)
        return pair_loss(run, batch, value, rho_w - rho_l, m, r)
