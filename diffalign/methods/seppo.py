"""SePPO: Zhang et al. 2024, Semi-Policy Preference Optimization for Diffusion Models, arXiv 2410.05255.

    L = softplus(-h),   h = -(beta / 2) (d_w - s d_r),   d = m - r                                      (eqs. 7 to 14)

The winner w is of the data; the opponent r is drawn by the reference, a random one of the policy's past checkpoints
(`reference: {name: pool}`). s asks whether the opponent is worth pushing away: +1 where the policy fits the winner no
worse than the reference does, else -1, and then both are imitated.

No training code was released. What the paper leaves open is a choice of this file:
- winner and opponent share t but not eps (`share_noise: true` shares it);
- at d_w = 0, where every run starts, s is +1;
- opponents are drawn anew for every step, by 50 steps of DDIM at guidance 7.5;
- beta is Diffusion-DPO's 2000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffalign.losses import FLIPS, flip_sign, sigmoid
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, noise_together, reference_of, with_members
from diffalign.methods.checks import check_choice, check_positive, check_times
from diffalign.methods.pairs import pair_errors, pair_loss
from diffalign.rollouts import Sampler, roll_out


@dataclass(frozen=True)
class SePPO:
    """Winners against pictures that a past checkpoint draws.

    Args:
        beta: the leash, as in DPO.
        flip: sign | indicator | none, see `diffalign.losses.flip_sign`.
        share_noise: one eps for winner and opponent.
        steps, guidance, eta, at_once: how opponents are drawn, see `diffalign.rollouts.Sampler`.
        reuse: noisings of a winner and its opponent per optimizer step; drawing costs steps * 2 evaluations of the
            network at guidance other than 1, one noising 4.
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with d.
        time_low, time_high: the part of the noise axis to train on, 0 clean and 1 pure noise.

    Metrics: `h` and `accuracy` are DPO's, before the flip; `flipped` is the share with s other than 1; d_l is d_r.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE, Need.SNAPSHOTS})
    view: ClassVar[str] = "winners"

    beta: float = 2000.0
    flip: str = "sign"
    share_noise: bool = False
    steps: int = 50
    guidance: float = 7.5
    eta: float = 0.0
    at_once: int = 8
    reuse: int = 1
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta, reuse=self.reuse)
        check_choice("flip", self.flip, FLIPS)
        check_times(self.time_low, self.time_high, self.timestep_weight)
        self._sampler()

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        opponent = roll_out(run, reference_of(run), batch.condition, batch.negative, batch.winner.shape[1:],
                            self._sampler()).x  # fmt: skip
        pair, times = with_members(batch, batch.winner, opponent), (self.time_low, self.time_high)
        return [noise_together(run, pair, times, self.share_noise) for _ in range(self.reuse)]

    def loss(self, run: Run, batch: Noised) -> Loss:
        rho_w, rho_r, m, r = pair_errors(run, batch, self.beta, self.timestep_weight)
        s = flip_sign(-rho_w, self.flip)  # rho_w has the sign of -d_w
        value = batch.label * sigmoid(rho_w, s * rho_r)  # the winner of a kept tie counts half
        return pair_loss(run, batch, value, rho_w - rho_r, m, r, flipped=(s != 1).float())

    def _sampler(self) -> Sampler:
        return Sampler(self.steps, self.guidance, self.eta, self.at_once)
