"""Diffusion-DPO: Wallace et al. 2023, Diffusion Model Alignment Using Direct Preference Optimization, arXiv 2311.12908.

    L = softplus(-h),   h = -(beta / 2) [(m_w - r_w) - (m_l - r_l)]                                            (eq. 14)

x_t of winner and loser share t and eps; m and r are mean squared errors on the network's own target.

Deviations from the released code (SalesforceAIResearch/DiffusionDPO, train.py), each on purpose:
- the reference's error is taken in fp32 like the policy's; theirs is fp16, which biases the logit by up to 0.1;
- one crop and one flip for both pictures of a pair; theirs are drawn per picture;
- ties are dropped by default as there, and can also be kept with P = 1/2 or broken at random (data.tie);
- rectified flows use the velocity's error with a constant beta (Flow-DPO, arXiv 2501.13918), not (1-t)^2 of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.losses import (
    LINKS,
    NEEDS_SMOOTHING,
    scaled_gradient,
    squared_error,
    winner_preserving_scale,
)
from diffalign.losses.divergences import DIVERGENCES
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, noise_together, prediction_and_reference
from diffalign.methods.checks import check_positive, check_times
from diffalign.methods.pairs import log_ratios, pair_loss


@dataclass(frozen=True)
class DPO:
    """Diffusion-DPO with other links and anchors as options.

    Args:
        beta: the leash; error is a mean over elements, so thousands are usual (see `diffalign.losses`).
        link: sigmoid (DPO; cDPO with label_smoothing) | robust | hinge | ipo | exo (DMPO, SDPO's bounded form) | nca.
        label_smoothing: e of the link, in [0, 0.5); exo needs it above 0.
        sft_weight: adds sft_weight * (beta / 2) * m_w (DPO+SFT, RPO): holds the winner's own likelihood up.
        dpop_weight: subtracts dpop_weight * max(0, (beta / 2) d_w) from h (DPOP): punishes a winner that gets worse.
        loser_weight: coefficient of d_l in h; below 1 pushes losers away less than it pulls winners.
        divergence: reverse_kl (DPO) | forward_kl | js | alpha: f-DPO, see `diffalign.losses.divergences`; the three
            others clamp rho at 10 either way.
        alpha: of the alpha divergence; 0 is forward_kl, 1 reverse_kl.
        winner_preserving: mu of Diffusion-SDPO (arXiv 2511.03317) in [0, 1], which shrinks the loser's gradient where
            it would raise the winner's error; the paper has 0.9 for SD1.5 and 0.6 for SDXL. None leaves it alone. One
            scale per pair, where the released code has one per batch.
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with d inside the link.
        time_low, time_high: the part of the noise axis to train on, 0 clean and 1 pure noise.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE})
    view: ClassVar[str] = "pairs"

    beta: float = 5000.0
    link: str = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    dpop_weight: float = 0.0
    loser_weight: float = 1.0
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    winner_preserving: float | None = None
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        if self.link not in LINKS:
            raise ValueError(f"method.link: expected one of {', '.join(LINKS)}, got {self.link!r}")
        if not 0 <= self.label_smoothing < 0.5 or (self.link in NEEDS_SMOOTHING and self.label_smoothing == 0):
            raise ValueError(f"method.label_smoothing: expected a number in [0, 0.5), above 0 for exo, "
                             f"got {self.label_smoothing}")  # fmt: skip
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"method.divergence: expected one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        if self.winner_preserving is not None and not 0 <= self.winner_preserving <= 1:
            raise ValueError(f"method.winner_preserving: expected a number in [0, 1], or leave it out, "
                             f"got {self.winner_preserving}")  # fmt: skip
        check_times(self.time_low, self.time_high, self.timestep_weight)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return [noise_together(run, batch, (self.time_low, self.time_high))]

    def loss(self, run: Run, batch: Noised) -> Loss:
        m, r = self._errors(run, batch)
        rho_w, rho_l = log_ratios(run, batch, m, r, self.beta, self.timestep_weight)
        winner_worse = torch.relu(-rho_w)
        pulled = rho_w - self.dpop_weight * winner_worse
        psi = DIVERGENCES[self.divergence]
        value = self._soft_link(psi(pulled, self.alpha), psi(self.loser_weight * rho_l, self.alpha), batch.label)
        value = value + self.sft_weight * 0.5 * self.beta * m.chunk(2)[0]
        return pair_loss(run, batch, value, rho_w - rho_l, m, r)

    def _errors(self, run: Run, batch: Noised) -> tuple[Tensor, Tensor]:
        """(m, r) [N]; with winner_preserving the losers' m has a scaled gradient."""
        prediction, r = prediction_and_reference(run, batch)
        m = squared_error(prediction, batch.y)
        if self.winner_preserving is None:
            return m, r
        residual_w, residual_l = (prediction - batch.y).chunk(2)
        scale = winner_preserving_scale(residual_w, residual_l, self.winner_preserving)
        return scaled_gradient(m, torch.cat([torch.ones_like(scale), scale])), r

    def _soft_link(self, rho_w: Tensor, rho_l: Tensor, label: Tensor) -> Tensor:
        """label * link(w over l) + (1 - label) * link(l over w): a tie kept as 1/2 pulls neither way."""
        link = LINKS[self.link]
        forward, backward = link(rho_w, rho_l, self.label_smoothing), link(rho_l, rho_w, self.label_smoothing)
        return torch.where(label == 1, forward, label * forward + (1 - label) * backward)
