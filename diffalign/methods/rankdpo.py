"""RankDPO: Karthik et al. 2024, Scalable Ranked Preference Optimization for Text-to-Image Generation, arXiv 2410.18013.

    L = sum over phi_i > phi_j of W_ij softplus(-(rho_i - rho_j)),   rho_i = -(beta / 2) (m_i - r_i)
    W_ij = |2^phi_i - 2^phi_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|

phi is how good a picture is, in [0, 1]; all K pictures of a prompt share t, and each has its own eps. There is no
released code. The loss couples all K pictures, but not through the network: `prepare` takes all rho_i without gradient
and dL / dm_i from them, and each of K microbatches backpropagates one m_i times that number. So one picture per list is
in memory at a time, and the gradient is that of the whole sum.

Choices where the paper, as far as it could be read, is silent or says two things:
- kappa = beta / 2 as in `dpo`, so that a beta means the same; the paper's beta and learning rate are not known;
- ranks are those of phi (rank_source: phi), so W is a constant; rank_source: model is LambdaLoss's choice;
- the natural logarithm; another base only scales the loss;
- pictures with equal phi are no pair.

The policy is evaluated twice on each picture. Dropout of the adapter would differ between the two; leave it at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.losses import log_ratio, squared_error
from diffalign.losses.listwise import rank_preference, rank_weights, share_of_wins, share_ordered
from diffalign.methods.base import (
    Batch,
    Loss,
    Need,
    Noised,
    Run,
    drawn_together,
    noised_at,
    reference_errors,
    weight_at,
)
from diffalign.methods.checks import check_choice, check_positive, check_times
from diffalign.methods.pairs import pair_metrics
from diffalign.table import Section


@dataclass(frozen=True)
class RankDPO:
    """Preference over a ranked list.

    Args:
        beta: as in `dpo`.
        phi: wins (the share of the list's other pictures that a picture's score is above, for scores on any scale) |
            scores (the record's own, which must lie in [0, 1], as `diffalign label --aggregate rankdpo` writes them).
        rank_source: phi | model (ranks by the policy's own rho).
        share_noise: one eps for the whole list instead of one per picture.
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with m - r.
        time_low, time_high: the part of the noise axis to train on.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE})

    beta: float = 5000.0
    phi: str = "wins"
    rank_source: str = "phi"
    share_noise: bool = False
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        check_choice("phi", self.phi, ("wins", "scores"))
        check_choice("rank_source", self.rank_source, ("phi", "model"))
        check_times(self.time_low, self.time_high, self.timestep_weight)

    @property
    def view(self) -> Section:
        return {"name": "lists", "unit_scores": self.phi == "scores"}

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        members = self._noised(run, batch)
        r = torch.stack([reference_errors(run, member) for member in members], 1)  # [B, K]
        m = torch.stack([_error(run, member) for member in members], 1)
        weight = weight_at(run, members[0].t, self.timestep_weight)
        phi = batch.scores if self.phi == "scores" else share_of_wins(batch.scores)
        value, slope = self.value_and_slope(m, r, weight, phi)
        rho = weight[:, None] * log_ratio(m, r, self.beta)
        ends = [0, -1]  # lists are best first
        pair = pair_metrics(rho[:, 0] - rho[:, -1], m[:, ends].T.flatten(), r[:, ends].T.flatten())
        shown = pair | {"accuracy": share_ordered(rho, phi)}
        return [
            replace(member, aux={"value": value, "slope": len(members) * slope[:, place], **shown})
            for place, member in enumerate(members)
        ]

    @torch.enable_grad()
    def value_and_slope(self, m: Tensor, r: Tensor, weight: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """(L [B], dL/dm [B, K]) of errors m, r [B, K], weights of the time [B] and phi [B, K]."""
        m = m.detach().requires_grad_()
        rho = weight[:, None] * log_ratio(m, r, self.beta)
        order_by = phi if self.rank_source == "phi" else rho.detach()
        value = rank_preference(rho, phi, rank_weights(phi, order_by))
        (slope,) = torch.autograd.grad(value.sum(), m)
        return value.detach(), slope

    def loss(self, run: Run, batch: Noised) -> Loss:
        """L itself as the value, and one picture's part of its gradient."""
        m = _error(run, batch)
        aux = dict(batch.aux)
        value, slope = aux.pop("value"), aux.pop("slope")
        return Loss(value + slope * (m - m.detach()), run.process.fraction(batch.t), aux)

    def _noised(self, run: Run, batch: Batch) -> list[Noised]:
        """One Noised of each member, at one t per list."""
        t, noises = drawn_together(run, batch, (self.time_low, self.time_high), self.share_noise)
        return [
            noised_at(run, [member], [condition], batch.label, t, [eps])
            for member, condition, eps in zip(batch.members, batch.conditions, noises, strict=True)
        ]


def _error(run: Run, batch: Noised) -> Tensor:
    return squared_error(run.policy(batch.x_t, batch.t, batch.condition), batch.y)
