"""GRPO on flow and diffusion models: Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) and its relatives.

    L = max(-A r, -A clamp(r, 1 - c, 1 + c)) + b KL,   A = (R - mean of the prompt's group) / std
    KL = mean (mu - mu_ref)^2 / (2 s^2), of every random step with mean mu and standard deviation s

The forms of the papers are choices of the keywords:
- Flow-GRPO: dynamics: flow_sde, kl_weight: 0.04 (0.01 with PickScore);
- Flow-GRPO-Fast: window: 2, dynamics: cps, clip: 1e-5, kl_weight: 0; walks are random, and trained, there alone;
- DanceGRPO (arXiv 2505.07818): dynamics: dance_sde, advantage: group, same_start: true, kl_weight: 0;
- on SD1.5 and SDXL: dynamics: ddim, with DanceGRPO's other settings.

Deviations from the released codes (yifan123/flow_grpo, XueZeyue/DanceGRPO), each on purpose:
- the last step is deterministic, so that rewards see no noise (std 0.2 of it with ten steps in flow_grpo);
- CPS has the log-density of its step, with 1 / (2 s^2), which the released code leaves out: its clip is another;
- both branches of guidance carry a gradient; flow_grpo detaches the unconditional one;
- KL has no factor of the time step, as in flow_grpo and unlike the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.advantages import ADVANTAGES, COMBINATIONS
from diffalign.episodes import Explorer
from diffalign.losses.policy import clipped_ratio
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, reference_of
from diffalign.methods.checks import check_choice, check_group, check_not_negative, check_positive
from diffalign.methods.paid import advantages_of, draw_and_replay, logged
from diffalign.process import per_sample
from diffalign.transition import Gaussian


@dataclass(frozen=True)
class GRPO:
    """Clipped policy gradient on groups of pictures of one prompt.

    Args:
        clip: c; 1e-4 suits lp that is a mean over elements, 1e-5 few steps.
        kl_weight: b; 0 needs no reference and saves its evaluations.
        largest: advantages are cut to +-this.
        advantage: global | group | centre | batch, see `diffalign.advantages`.
        combine: sum | per_reward | gdpo | pareto, of several rewards.
        updates: optimizer steps on one rollout, each on its own share of the pictures.
        steps, guidance, dynamics, noise_level, group, same_start, window, window_start, at_once, store, spread: how
            pictures are drawn, see `diffalign.episodes.Explorer`.

    Metrics: those of `ddpo`, and `kl`.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROMPTS, Need.REWARD, Need.REFERENCE})
    view: ClassVar[str] = "prompts"

    clip: float = 1e-4
    kl_weight: float = 0.04
    largest: float = 5.0
    advantage: str = "global"
    combine: str = "sum"
    updates: int = 1
    steps: int = 10
    guidance: float = 4.5
    dynamics: str = "auto"
    noise_level: float | None = None
    group: int = 24
    same_start: bool = False
    window: int = 0
    window_start: int | None = None
    at_once: int = 8
    store: str = "float32"
    spread: bool = False

    def __post_init__(self) -> None:
        check_positive(clip=self.clip, largest=self.largest, updates=self.updates)
        check_not_negative(kl_weight=self.kl_weight)
        check_choice("advantage", self.advantage, ADVANTAGES)
        check_choice("combine", self.combine, COMBINATIONS)
        check_group(self.group)
        _ = self.explorer  # checks its own

    @property
    def explorer(self) -> Explorer:
        return Explorer.of(self)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return draw_and_replay(run, batch, self.explorer, self.updates, lambda scores: {
            "advantage": advantages_of(run, scores, self.explorer.groups, self.advantage, self.combine, self.largest)
        })  # fmt: skip

    def loss(self, run: Run, batch: Noised) -> Loss:
        law = self.explorer.law(run, run.policy, batch)
        log_ratio = law.log_prob(batch.y) - batch.aux["log_prob"]
        kl = self._kl(run, law, batch) if self.kl_weight else torch.zeros_like(log_ratio)
        value = clipped_ratio(log_ratio, batch.aux["advantage"], self.clip) + self.kl_weight * kl
        off = log_ratio.detach().expm1().abs()
        metrics = {"ratio_off": off, "clipped": (off > self.clip).float(), "kl": kl.detach()} | logged(batch)
        return Loss(value, run.process.fraction(batch.t), metrics)

    def _kl(self, run: Run, law: Gaussian, batch: Noised) -> torch.Tensor:
        """[B], a mean over elements as lp is."""
        with torch.no_grad():
            other = self.explorer.law(run, reference_of(run), batch)
        return ((law.mean - other.mean).square() / (2 * per_sample(law.std, law.mean).square())).flatten(1).mean(1)
