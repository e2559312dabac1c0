"""TDPO: Text Preference Optimization, arXiv 2509.25771: one picture, its caption against a perturbed one.

    L = softplus(-h),   h = -(beta / 2) [ (m - r)(x_t, c+) - (m - r)(x_t, c-) ]

Both branches have the same latent, t and eps, so only the text differs, and no preference data is needed: the best
picture of a record and its own prompt are enough. What the perturber changes is what the policy learns to tell apart.
The authors' code was not to be had and their constants are not known; the formula is that of their abstract and of
reviews.

Prompt dropout empties both captions of a row at once; such a row has h = 0 and no gradient, so it is wasted, and
prompt_dropout: 0 is the setting to have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign.losses import sigmoid
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, noise_together
from diffalign.methods.checks import check_positive, check_times
from diffalign.methods.pairs import pair_errors, pair_loss
from diffalign.perturb import PERTURBERS
from diffalign.table import Section, bind


@dataclass(frozen=True)
class TDPO:
    """Matched against perturbed captions of one picture.

    Args:
        beta: as in `dpo`.
        perturber: a row of `diffalign.perturb.PERTURBERS` and its keywords: rules | llm | given (prompt_loser).
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with m - r. Text matters most at high noise,
            so eps, which is least there on flow models, is a poor choice.
        time_low, time_high: the part of the noise axis to train on.

    Raises:
        ValueError: a value outside its range, or an unknown perturber or keyword of one.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE})

    beta: float = 2000.0
    perturber: str | Mapping[str, Any] = "rules"
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        check_times(self.time_low, self.time_high, self.timestep_weight)
        bind(PERTURBERS, self.perturber, what="method.perturber")

    @property
    def view(self) -> Section:
        return {"name": "perturbed", "perturber": self.perturber}

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return [noise_together(run, batch, (self.time_low, self.time_high))]

    def loss(self, run: Run, batch: Noised) -> Loss:
        rho_right, rho_wrong, m, r = pair_errors(run, batch, self.beta, self.timestep_weight)
        return pair_loss(run, batch, sigmoid(rho_right, rho_wrong), rho_right - rho_wrong, m, r)
