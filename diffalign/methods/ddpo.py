"""DDPO: Black et al. 2023, Training Diffusion Models with Reinforcement Learning, arXiv 2305.13301.

    L = max(-A r, -A clamp(r, 1 - c, 1 + c)),   r = exp(lp - lp_old) of every step of a stochastic walk

lp is a mean over the latent's elements, as in every released code: published clip ranges are of it.

Deviations from the released code (kvablack/ddpo-pytorch), each on purpose:
- the last step is not random and not trained: 49 of 50 steps are, and no picture has noise left in it;
- states are rounded to the type that they are stored in before their log-probability is taken;
- advantages are over all pictures of a rollout, or of a prompt (`advantage: group`, with `group` above 1); there is no
  history of prompts, which a hundred thousand prompts never fill;
- all steps of a picture are in one optimizer step, so gradient accumulation does not have to count them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffalign.advantages import ADVANTAGES, COMBINATIONS
from diffalign.episodes import Explorer
from diffalign.losses.policy import clipped_ratio
from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.checks import check_choice, check_positive
from diffalign.methods.paid import advantages_of, draw_and_replay, logged


@dataclass(frozen=True)
class DDPO:
    """Policy gradient on the steps of the policy's own walks, clipped as in PPO.

    Args:
        clip: c.
        largest: advantages are cut to +-this.
        advantage: batch | group | global | centre, see `diffalign.advantages`.
        combine: sum | per_reward | gdpo | pareto, of several rewards.
        updates: optimizer steps on one rollout, each on its own share of the pictures.
        steps, guidance, dynamics, noise_level, group, window, window_start, at_once, store, spread: how pictures are
            drawn, see `diffalign.episodes.Explorer`; guidance is the same in the replay.

    Metrics: `reward`, `missing` (pictures without a score), `same` (of prompts whose pictures all got one score),
    `ratio_off` |r - 1|, `clipped`.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROMPTS, Need.REWARD})
    view: ClassVar[str] = "prompts"

    clip: float = 1e-4
    largest: float = 5.0
    advantage: str = "batch"
    combine: str = "sum"
    updates: int = 1
    steps: int = 50
    guidance: float = 5.0
    dynamics: str = "auto"
    noise_level: float | None = None
    group: int = 1
    window: int = 0
    window_start: int | None = None
    at_once: int = 8
    store: str = "float32"
    spread: bool = False

    def __post_init__(self) -> None:
        check_positive(clip=self.clip, largest=self.largest, updates=self.updates)
        check_choice("advantage", self.advantage, ADVANTAGES)
        check_choice("combine", self.combine, COMBINATIONS)
        if self.group == 1 and self.advantage != "batch":
            raise ValueError(f"method.advantage: {self.advantage} compares the pictures of a prompt, and method.group "
                             f"is 1: draw two or more, or set advantage: batch")  # fmt: skip
        _ = self.explorer  # checks its own

    @property
    def explorer(self) -> Explorer:
        return Explorer.of(self)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return draw_and_replay(run, batch, self.explorer, self.updates, lambda scores: {
            "advantage": advantages_of(run, scores, self.explorer.groups, self.advantage, self.combine, self.largest)
        })  # fmt: skip

    def loss(self, run: Run, batch: Noised) -> Loss:
        log_ratio = self.explorer.law(run, run.policy, batch).log_prob(batch.y) - batch.aux["log_prob"]
        value = clipped_ratio(log_ratio, batch.aux["advantage"], self.clip)
        off = log_ratio.detach().expm1().abs()
        metrics = {"ratio_off": off, "clipped": (off > self.clip).float()} | logged(batch)
        return Loss(value, run.process.fraction(batch.t), metrics)
