"""TKTO: Text Preference Optimization's unpaired form, arXiv 2509.25771: Diffusion-KTO on (picture, caption) samples.

    u = y beta (g - z),   L = 1 - sigmoid(u),   y = 1 under the picture's own caption, -1 under the perturbed one

g, z and the utilities are those of `kto`; a row's loss is the mean of its two samples, which share the latent, t and
eps, so that z is over as many right captions as wrong ones. As for `tdpo`, constants of the paper are not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.losses.unary import UTILITIES, liked_or_not
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, noise_together
from diffalign.methods.checks import check_choice, check_positive, check_times
from diffalign.methods.kto import BASELINES, gains, with_baseline
from diffalign.methods.pairs import pair_loss
from diffalign.perturb import PERTURBERS
from diffalign.table import Section, bind


@dataclass(frozen=True)
class TKTO:
    """Right and perturbed captions of one picture as a like and a dislike.

    Args:
        beta: as in `kto`, without a 1/2.
        utility: kto | loss_averse | risk_seeking.
        baseline: batch | balanced (the same here, where there are as many of either) | none.
        perturber: as in `tdpo`.
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with g.
        time_low, time_high: the part of the noise axis to train on.

    Raises:
        ValueError: a value outside its range, or an unknown perturber or keyword of one.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE})

    beta: float = 1000.0
    utility: str = "kto"
    baseline: str = "batch"
    perturber: str | Mapping[str, Any] = "rules"
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        check_choice("utility", self.utility, UTILITIES)
        check_choice("baseline", self.baseline, BASELINES)
        check_times(self.time_low, self.time_high, self.timestep_weight)
        bind(PERTURBERS, self.perturber, what="method.perturber")

    @property
    def view(self) -> Section:
        return {"name": "perturbed", "perturber": self.perturber}

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        noised = noise_together(run, batch, (self.time_low, self.time_high))
        return [with_baseline(run, noised, right_then_wrong(noised), self.timestep_weight, self.baseline)]

    def loss(self, run: Run, batch: Noised) -> Loss:
        gain, m, r = gains(run, batch, self.timestep_weight)
        u = liked_or_not(gain, batch.aux["z"].repeat(2), right_then_wrong(batch), self.beta)
        value = UTILITIES[self.utility](u)
        right, wrong = (self.beta * gain).chunk(2)
        value = torch.stack(value.chunk(2)).mean(0)
        return pair_loss(run, batch, value, right - wrong, m, r, z=batch.aux["z"])


def right_then_wrong(batch: Noised) -> Tensor:
    """[2 B]: 1 for the first half, the right captions, 0 for the second."""
    rows = len(batch.label)
    return torch.cat([torch.ones(rows), torch.zeros(rows)]).to(batch.t.device)
