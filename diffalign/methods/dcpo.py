"""DCPO: Saeidi et al. 2025, Dual Caption Preference Optimization for Diffusion Models, arXiv 2502.06023.

    L = softplus(-h),   h = -(beta / 2) [ (m - r)(x_t^w, c_w) - (m - r)(x_t^l, c_l) ]

Diffusion-DPO in which the loser stands under a caption of its own (prompt_loser): what a captioner says of it, or the
prompt perturbed. x_t of winner and loser share t and eps. The authors' code was not read; the formula is that of the
paper's summaries. Where the loser's caption fits it well, h says less about the picture than in `dpo`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign.losses import soft_ce
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, noise_together
from diffalign.methods.checks import check_positive, check_times
from diffalign.methods.pairs import pair_errors, pair_loss
from diffalign.perturb import PERTURBERS
from diffalign.table import Section, bind


@dataclass(frozen=True)
class DCPO:
    """Winner and loser, each under its own caption.

    Args:
        beta: as in `dpo`; the paper has 500.
        perturber: writes the loser's caption from the prompt, a row of `diffalign.perturb.PERTURBERS`; None takes the
            record's prompt_loser, and drops rows without one.
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with m - r.
        time_low, time_high: the part of the noise axis to train on.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE})

    beta: float = 500.0
    perturber: str | Mapping[str, Any] | None = None
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        check_times(self.time_low, self.time_high, self.timestep_weight)
        if self.perturber is not None:
            bind(PERTURBERS, self.perturber, what="method.perturber")

    @property
    def view(self) -> Section:
        return {"name": "captioned_pairs", "perturber": self.perturber}

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return [noise_together(run, batch, (self.time_low, self.time_high))]

    def loss(self, run: Run, batch: Noised) -> Loss:
        rho_w, rho_l, m, r = pair_errors(run, batch, self.beta, self.timestep_weight)
        h = rho_w - rho_l
        return pair_loss(run, batch, soft_ce(h, batch.label), h, m, r)  # a tie that is kept as 1/2 pulls neither way
