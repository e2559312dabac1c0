"""PPD: Dang et al. 2025, Personalized Preference Fine-tuning of Diffusion Models, arXiv 2501.06655.

    L = softplus(-h),   h = -(beta / 2) [(m_w - r_w) - (m_l - r_l)]

Diffusion-DPO in which the policy is told whose preference it is: m is the error of f(x_t, t, c, u), r that of the
frozen base without u. u [N, D] is made of N = 4 pairs of the user (`diffalign.users`), and only the keys and values of
a second cross-attention to it are trained (`train: user`, pipelines/user_attention.py).

No code was released; what the paper leaves open, or what is another here, on purpose:
- Stable Diffusion, XL and 3 in place of Stable Cascade's stage C, whose blocks have the same cross-attention;
- u is brought to mean 0 and variance 1 per token without weights, and the adapter has no bias, so u = 0 is the base;
- `user_dropout`, the rate at which u is zeroed, is not public. Here u = 0 is the base without any training, so guidance
  against nobody needs none, and such a row gives no gradient: the default is 0;
- x_t of winner and loser share t and eps, as in Diffusion-DPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from diffalign.losses import soft_ce
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, noise_together
from diffalign.methods.checks import check_positive, check_times
from diffalign.methods.pairs import pair_errors, pair_loss
from diffalign.process import moved, per_sample


@dataclass(frozen=True)
class PPD:
    """Diffusion-DPO on condition of a user.

    Args:
        beta: the leash; error is a mean over elements, so thousands are usual (see `diffalign.losses`).
        user_dropout: share of pairs trained without their user, in [0, 1).
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with d inside the link.
        time_low, time_high: the part of the noise axis to train on, 0 clean and 1 pure noise.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE, Need.USERS})
    view: ClassVar[str] = "user_pairs"

    beta: float = 5000.0
    user_dropout: float = 0.0
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        if not 0 <= self.user_dropout < 1:
            raise ValueError(f"method.user_dropout: expected a number in [0, 1), got {self.user_dropout}")
        check_times(self.time_low, self.time_high, self.timestep_weight)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        if "user" not in batch.condition:
            raise ValueError("ppd: the batch names no users: expected condition['user'] [B, N, D]; train with "
                             "train: user, which adds it")  # fmt: skip
        return [noise_together(run, self._dropped(run, batch), (self.time_low, self.time_high))]

    def _dropped(self, run: Run, batch: Batch) -> Batch:
        """Some rows without their user, the same ones for both members."""
        if not self.user_dropout:
            return batch
        user = batch.condition["user"]
        kept = moved(torch.rand(len(user), generator=run.generator) >= self.user_dropout, user.device)
        conditions = tuple({**c, "user": c["user"] * per_sample(kept, c["user"])} for c in batch.conditions)
        return replace(batch, conditions=conditions)

    def loss(self, run: Run, batch: Noised) -> Loss:
        rho_w, rho_l, m, r = pair_errors(run, batch, self.beta, self.timestep_weight)
        h = rho_w - rho_l
        return pair_loss(run, batch, soft_ce(h, batch.label), h, m, r)  # a tie that is kept as 1/2 pulls neither way
