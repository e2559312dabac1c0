"""SmPO: Lu et al. 2025, Smoothed Preference Optimization via ReNoise Inversion, arXiv 2506.02698.

    x_tau, eps*   as in InPO, each step of the inversion with the mean of two predictions (ReNoise)
    p = sigmoid((s_w - s_l) / range)                    from the pair's scores, higher is better
    L = softplus(-gamma (2 p - 1) h)                    soft: smpo, as released
    L = p softplus(-h) + (1 - p) softplus(h)            soft: soft_ce, the cross entropy to p

Deviations from the released code (JaydenLyh/SmPO, train.py): those of InPO, and
- probabilities belong to their pairs; there the first pair's serve the whole batch;
- pictures are ranked by the record's own scores. There PickScore ranks them anew and people's labels only remove ties:
  `diffalign label` with pickscore writes such records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffalign.losses import smpo, soft_ce, win_probability
from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.checks import check_choice, check_positive, check_times
from diffalign.methods.inverted import Inversion, noised_by_inversion
from diffalign.methods.pairs import pair_errors, pair_loss

PICKSCORE_RANGE = 0.28201571106910706 - 0.11543526500463486  # of the cosines over Pick-a-Pic, in the released code


@dataclass(frozen=True)
class SmPO:
    """InPO with ReNoise and soft labels.

    Data with labels alone have scores 1 and 0, so that all their pairs are equally clear: set `score_range` to about 1
    there, or take `inpo`.

    Args:
        beta, steps, mode, model, timestep_weight, time_low, time_high: as in `inpo`; steps 5 is the released code's.
        soft: smpo | soft_ce.
        gamma: of smpo; above it a model overfits its scorer, says the paper.
        score_range: largest less smallest score over the training data, in the scores' own units. The default is of
            PickScore's raw cosine; for its logit (20 and more) multiply by 100.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE})
    view: ClassVar[str] = "pairs"

    beta: float = 5000.0
    steps: int = 5
    mode: str = "snap"
    model: str = "policy"
    soft: str = "smpo"
    gamma: float = 10.0
    score_range: float = PICKSCORE_RANGE
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta, gamma=self.gamma, score_range=self.score_range)
        check_choice("soft", self.soft, ("smpo", "soft_ce"))
        check_times(self.time_low, self.time_high, self.timestep_weight)
        self._inversion()

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        p = win_probability(batch.scores, self.score_range)
        return [noised_by_inversion(run, batch, self._inversion(), {"p": p})]

    def loss(self, run: Run, batch: Noised) -> Loss:
        rho_w, rho_l, m, r = pair_errors(run, batch, self.beta, self.timestep_weight)
        h, p = rho_w - rho_l, batch.aux["p"]
        value = smpo(h, p, self.gamma) if self.soft == "smpo" else soft_ce(h, p)
        return pair_loss(run, batch, value, h, m, r, p=p)

    def _inversion(self) -> Inversion:
        return Inversion(self.steps, self.mode, self.model, 1, True, 0.0, self.time_low, self.time_high)
