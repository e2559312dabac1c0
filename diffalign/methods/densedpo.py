"""DenseDPO: Wu et al. 2025, Fine-Grained Temporal Preference Optimization for Video Diffusion Models, arXiv 2506.03517.

    L = softplus(-h),   h = sum over parts f of l_f (rho_f(0) - rho_f(1)) / norm                                 (eq. 7)
    rho_f = -(beta / 2) (m_f - r_f)

l_f is 1 where the first picture (or clip) is the better one, -1 where the second is, 0 for a tie. Parts are frames of a
clip's latent, labeled by segments, or places of a picture's latent, labeled by a coarse map of regions: the sum is
inside the link, so one pair can pull both ways at once. There is no released code.

Choices where the paper, as far as it could be read, is silent:
- m_f is a mean over the elements of a part, and the norm is the number of all parts (segment_norm: mean_all), so h has
  the size of `dpo`'s; mean_nontie divides by the labels that are no tie, sum by nothing;
- beta / 2 as in `dpo`: 1000 here is the printed 500, whose logit has no 1/2;
- t and eps are shared by the two (share_noise), which the paper leaves open: such pairs are aligned in space and time;
- labels go to the nearest latent frame or place. The first latent frame of a causal VAE covers less time than the
  others, so a label may sit off by less than one latent frame.

Pairs that are nearly the same picture push the policy off its data (likelihood displacement, appendix B): look at d_w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from diffalign.losses import log_ratio
from diffalign.losses.parts import NORMS, better_then_worse, labels_of_parts, part_errors, weights_of_parts
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, noise_together, reference_of, weight_at
from diffalign.methods.checks import check_choice, check_positive, check_times
from diffalign.methods.pairs import pair_loss


@dataclass(frozen=True)
class DenseDPO:
    """Preference by segment or region; pairs without a label that is no tie are skipped.

    Args:
        beta: as in `dpo`.
        segment_norm: mean_all | mean_nontie | sum.
        share_noise: one eps for both members of a pair.
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with m - r.
        time_low, time_high: the part of the noise axis to train on.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE})
    view: ClassVar[str] = "labeled_parts"

    beta: float = 1000.0
    segment_norm: str = "mean_all"
    share_noise: bool = True
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        check_choice("segment_norm", self.segment_norm, NORMS)
        check_times(self.time_low, self.time_high, self.timestep_weight)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        """Raises ValueError where labels and latents do not fit each other."""
        if batch.signs is None:
            raise ValueError("densedpo needs labels of parts: give segments (clips) or regions (pictures) in the data")
        aux = {"labels": labels_of_parts(batch.signs, batch.winner.shape)}
        return [noise_together(run, batch, (self.time_low, self.time_high), self.share_noise, aux)]

    def loss(self, run: Run, batch: Noised) -> Loss:
        labels, axes = batch.aux["labels"], 1 if batch.x_t.ndim == 5 else 2
        with torch.no_grad():
            r = part_errors(reference_of(run)(batch.x_t, batch.t, batch.condition), batch.y, axes)
        m = part_errors(run.policy(batch.x_t, batch.t, batch.condition), batch.y, axes)
        weight = weight_at(run, batch.t, self.timestep_weight)[:, None]
        first, second = (weight * log_ratio(m, r, self.beta)).chunk(2)
        h = (weights_of_parts(labels, self.segment_norm) * (first - second)).sum(1)
        m_bw, r_bw = better_then_worse(m, labels), better_then_worse(r, labels)
        return pair_loss(run, batch, F.softplus(-h), h, m_bw, r_bw)
