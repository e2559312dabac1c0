"""DPOK: Fan et al. 2023, Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models, arXiv 2305.16381.

    L = -w_r A clamp(r, 1 - c, 1 + c) + w_kl mean (y - y_ref)^2,   r = exp(lp - lp_old) of every step

y and y_ref are what policy and reference say after guidance.

Deviations from the released code (google-research, dpok): those of `ddpo`, and
- no value network: A is the reward less the mean of the rollout, over its deviation, so that w_r is about 1 and w_kl is
  on that scale (theirs are 10 and 0.01, or 1000 and 0.1, for raw rewards);
- every update takes all steps of its pictures, not random transitions of a buffer.

Outside the band there is no gradient even where it would pull the policy back; `ddpo` has PPO's form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.episodes import Explorer
from diffalign.losses import squared_error
from diffalign.losses.policy import clamped_ratio
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, reference_of
from diffalign.methods.checks import check_not_negative, check_positive
from diffalign.methods.paid import advantages_of, draw_and_replay, logged


@dataclass(frozen=True)
class DPOK:
    """Policy gradient with a clamped ratio and a leash to the reference.

    Args:
        reward_weight: w_r.
        kl_weight: w_kl; 0 saves the reference's evaluations.
        clip: c.
        updates: optimizer steps on one rollout, each on its own share of the pictures.
        steps, guidance, dynamics, noise_level, group, window, window_start, at_once, store, spread: see
            `diffalign.episodes.Explorer`.

    Metrics: those of `ddpo`, and `kl`, the squared difference of the two predictions.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROMPTS, Need.REWARD, Need.REFERENCE})
    view: ClassVar[str] = "prompts"

    reward_weight: float = 1.0
    kl_weight: float = 0.01
    clip: float = 1e-4
    updates: int = 1
    steps: int = 50
    guidance: float = 7.5
    dynamics: str = "auto"
    noise_level: float | None = None
    group: int = 1
    window: int = 0
    window_start: int | None = None
    at_once: int = 8
    store: str = "float32"
    spread: bool = False

    def __post_init__(self) -> None:
        check_positive(reward_weight=self.reward_weight, clip=self.clip, updates=self.updates)
        check_not_negative(kl_weight=self.kl_weight)
        _ = self.explorer  # checks its own

    @property
    def explorer(self) -> Explorer:
        return Explorer.of(self)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return draw_and_replay(run, batch, self.explorer, self.updates, lambda scores: {
            "advantage": advantages_of(run, scores, self.explorer.groups, "batch", "sum", torch.inf)
        })  # fmt: skip

    def loss(self, run: Run, batch: Noised) -> Loss:
        ours = self.explorer.predict(run, run.policy, batch)
        log_ratio = self.explorer.law_of(run, ours, batch).log_prob(batch.y) - batch.aux["log_prob"]
        kl = self._kl(run, ours, batch) if self.kl_weight else torch.zeros_like(log_ratio)
        value = self.reward_weight * clamped_ratio(log_ratio, batch.aux["advantage"], self.clip) + self.kl_weight * kl
        off = log_ratio.detach().expm1().abs()
        metrics = {"ratio_off": off, "clipped": (off > self.clip).float(), "kl": kl.detach()} | logged(batch)
        return Loss(value, run.process.fraction(batch.t), metrics)

    def _kl(self, run: Run, ours: Tensor, batch: Noised) -> Tensor:
        with torch.no_grad():
            theirs = self.explorer.predict(run, reference_of(run), batch)
        return squared_error(ours, theirs)
