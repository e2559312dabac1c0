"""DDIM-InPO: Lu et al. 2025, Inversion Preference Optimization with Reparametrized DDIM, arXiv 2503.18454.

    x_tau = the policy's own DDIM inversion of the picture, up to time tau (no gradient)
    eps*  = (x_tau - alpha x0) / sigma, the noise that leads from x_tau to the picture
    L     = softplus(-h),   h = -(beta / 2) [(m_w - r_w) - (m_l - r_l)]     Diffusion-DPO's, with target eps*

A pair shares tau; winner and loser each have the noise of their own picture.

Deviations from the released code (JaydenLyh/InPO, train.py), each on purpose:
- tau is one of the levels of the inversion. There tau is any time and x_tau stops at a level: the next higher one with
  the diffusers that the code is pinned to (mode: round_up), the next lower one with those of today, which index past
  their table above 901. Either way the network is told another noise level than there is;
- the network is asked at the level that a step lands on, first at the lowest one; there first at the negative time -99;
- the inversion starts at the picture and not at alphas_cumprod[0], see `diffalign.inversion.departure`;
- batches of any size; there all pairs of a batch go to the first one's tau, so that a batch has to be one pair;
- schedules are fp32; in their fp16 1 - alphas_cumprod[0] is a sixth too large;
- no noise within the inversion; theirs is eta: 0.1.

Rectified flows: Euler steps up the model's own shifted times, target (x_tau - x0) / tau, constant beta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffalign.losses import soft_ce
from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.checks import check_positive, check_times
from diffalign.methods.inverted import Inversion, noised_by_inversion
from diffalign.methods.pairs import pair_errors, pair_loss


@dataclass(frozen=True)
class InPO:
    """Diffusion-DPO at inverted latents.

    A step evaluates the policy 0.5 to 0.65 `steps` times more per picture than DPO does, without gradient.

    Args:
        beta: the leash, as in `dpo`.
        steps: levels of the inversion, those of the sampler with so many steps.
        mode: snap | exact | round_up, see `diffalign.inversion.walks`.
        model: policy | reference: who inverts.
        renoise: further evaluations per step that correct it (the fixed point in `diffalign.inversion`).
        eta: noise within the inversion.
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with d inside the link.
        time_low, time_high: the part of the noise axis to train on, 0 clean and 1 pure noise.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE})
    view: ClassVar[str] = "pairs"

    beta: float = 5000.0
    steps: int = 10
    mode: str = "snap"
    model: str = "policy"
    renoise: int = 0
    eta: float = 0.0
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        check_times(self.time_low, self.time_high, self.timestep_weight)
        self._inversion()

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return [noised_by_inversion(run, batch, self._inversion())]

    def loss(self, run: Run, batch: Noised) -> Loss:
        rho_w, rho_l, m, r = pair_errors(run, batch, self.beta, self.timestep_weight)
        h = rho_w - rho_l
        return pair_loss(run, batch, soft_ce(h, batch.label), h, m, r)

    def _inversion(self) -> Inversion:
        return Inversion(self.steps, self.mode, self.model, self.renoise, False, self.eta, self.time_low,
                         self.time_high)  # fmt: skip
