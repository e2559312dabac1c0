"""Diffusion-KTO: Li et al. 2024, Aligning Diffusion Models by Optimizing Human Utility, arXiv 2404.04465.

    g = r - m,   z = max(0, mean of g over the batch),   u = y beta (g - z),   L = lambda_y (1 - sigmoid(u))

y is 1 for a picture that is liked and -1 for one that is not; every picture has its own t and eps. beta has no 1/2, as
in the released code: 1000 is `dpo`'s 2000.

Deviations from the released code (jacklishufan/diffusion-kto):
- z is taken by a pass of its own before the loss, over the microbatch of all ranks (`Run.mean`), so that a sample's
  loss is a function of the sample and z alone; the reference's errors of that pass are kept, so the price is one more
  forward pass of the policy. z is not taken over accumulated microbatches: with few pictures per device it is noisy;
- likes and dislikes are weighed (liked_weight, disliked_weight) where the code draws 80 % likes: with as many of
  either, 1.6 and 0.4 have the same expectation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.losses.unary import UTILITIES, liked_or_not
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, errors, noise_together, weight_at
from diffalign.methods.checks import check_choice, check_not_negative, check_positive, check_times

BASELINES = ("batch", "balanced", "none")


@dataclass(frozen=True)
class KTO:
    """Likes and dislikes of single pictures; rankings are seen as thumbs above and below their middle.

    Args:
        beta: the leash, on errors that are means over elements.
        utility: kto | loss_averse | risk_seeking, the three of the paper; `diffalign.losses.unary` has them.
        baseline: what z is the mean of: batch (all of it) | balanced (the means of likes and dislikes, halved) |
            none (z = 0, which spares a pass).
        liked_weight, disliked_weight: lambda of either.
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with g.
        time_low, time_high: the part of the noise axis to train on.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE})
    view: ClassVar[str] = "thumbs"

    beta: float = 1000.0
    utility: str = "kto"
    baseline: str = "batch"
    liked_weight: float = 1.0
    disliked_weight: float = 1.0
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        check_choice("utility", self.utility, UTILITIES)
        check_choice("baseline", self.baseline, BASELINES)
        check_not_negative(liked_weight=self.liked_weight, disliked_weight=self.disliked_weight)
        check_times(self.time_low, self.time_high, self.timestep_weight)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        noised = noise_together(run, batch, (self.time_low, self.time_high))
        return [with_baseline(run, noised, noised.label, self.timestep_weight, self.baseline)]

    def loss(self, run: Run, batch: Noised) -> Loss:
        gain, m, r = gains(run, batch, self.timestep_weight)
        u = liked_or_not(gain, batch.aux["z"], batch.label, self.beta)
        value = UTILITIES[self.utility](u)
        weighed = torch.where(batch.label > 0, self.liked_weight * value, self.disliked_weight * value)
        return Loss(weighed, run.process.fraction(batch.t), thumb_metrics(u, gain, m, r, batch))


def gains(run: Run, batch: Noised, weight: str) -> tuple[Tensor, Tensor, Tensor]:
    """(g, m, r), each [N]: g = w(t) (r - m), how much better the policy fits a sample than the reference does."""
    m, r = errors(run, batch)
    return weight_at(run, batch.t, weight) * (r - m), m, r


def with_baseline(run: Run, noised: Noised, label: Tensor, weight: str, kind: str) -> Noised:
    """The same samples with z in `aux` ([B], one number) and the reference's errors, which the loss then has.

    label: [N], which samples are right, for `balanced`.
    """
    rows = len(noised.label)
    if kind == "none":
        return replace(noised, aux={"z": torch.zeros(rows, device=noised.t.device)})
    gain, _, r = gains(run, noised, weight)
    z = run.mean(gain.mean()) if kind == "batch" else _balanced(run, gain, label)
    return replace(noised, reference_errors=r, aux={"z": z.clamp(min=0).expand(rows).clone()})


def _balanced(run: Run, gain: Tensor, label: Tensor) -> Tensor:
    """Half the mean of the likes and half that of the dislikes, over all ranks; of one kind alone, its mean."""
    means, present = [], []
    for kind in ((label > 0).float(), (label <= 0).float()):
        total, count = run.mean((kind * gain).sum()), run.mean(kind.sum())
        means.append(total / count.clamp(min=1e-6))
        present.append((count > 0).float())
    both = torch.stack(present)
    return (torch.stack(means) * both).sum() / both.sum()


def thumb_metrics(u: Tensor, gain: Tensor, m: Tensor, r: Tensor, batch: Noised) -> dict[str, Tensor]:
    """What is logged of thumbs, per picture and detached: u, the baseline, the gain and both errors.

    `accuracy` is whether a picture is on its label's side of the reference (g above 0 for likes), 1/2 on it. `d_w` is
    m - r of likes and 0 of dislikes, `d_l` the other way round: their means are shares of the whole batch's, with the
    signs that they have for pairs.
    """
    with torch.no_grad():
        liked = (batch.label > 0).float()
        right = (2 * liked - 1) * gain
        accuracy = (right > 0).float() + 0.5 * (right == 0).float()
        d = m - r
        return {"u": u.detach(), "z": batch.aux["z"], "gain": gain.detach(), "accuracy": accuracy, "m": m.detach(),
                "r": r, "d_w": (liked * d).detach(), "d_l": ((1 - liked) * d).detach()}  # fmt: skip
