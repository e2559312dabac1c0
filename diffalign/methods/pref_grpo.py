"""Pref-GRPO: Wang et al. 2025, Pairwise Preference Reward-based GRPO for Stable Text-to-Image RL, arXiv 2508.20751.

GRPO whose reward is a picture's share of wins against the others of its prompt, by a judge of pairs (`rewards:
{winrate: {...}}`, which takes a vision-language model or another reward for that). A small difference of scores then
cannot be blown up by the group's deviation.

Deviations from the released code (CodeGoat24/Pref-GRPO): those of `grpo`; shares of wins are not rounded; GRPO-Guard's
ratio is not here. Several rewards are z-scored one by one (`combine: per_reward`), as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from diffalign.episodes import Explorer
from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.grpo import GRPO


@dataclass(frozen=True)
class PrefGRPO:
    """GRPO on shares of wins. Keywords are those of GRPO of the same names.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = GRPO.needs | {Need.COMPARISON}
    view: ClassVar[str] = GRPO.view

    clip: float = 1e-4
    kl_weight: float = 0.0
    largest: float = 5.0
    advantage: str = "group"
    combine: str = "per_reward"
    updates: int = 1
    steps: int = 25
    guidance: float = 3.5
    dynamics: str = "auto"
    noise_level: float | None = None
    group: int = 8
    window: int = 0
    window_start: int | None = None
    at_once: int = 8
    store: str = "float32"

    def __post_init__(self) -> None:
        self._grpo()

    @property
    def explorer(self) -> Explorer:
        return self._grpo().explorer

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return self._grpo().prepare(run, batch)

    def loss(self, run: Run, batch: Noised) -> Loss:
        return self._grpo().loss(run, batch)

    def _grpo(self) -> GRPO:
        return GRPO(**asdict(self))
