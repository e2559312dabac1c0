"""Curriculum-DPO: Croitoru et al. 2024, Curriculum Direct Preference Optimization, arXiv 2405.13637.

The loss is Diffusion-DPO's; what is new is the order: pairs with a large gap of scores first, then more and more
(`selection: {name: curriculum}`, see `diffalign.selection.Curriculum`, which this method has unless told otherwise).
beta is the 2000 that the authors trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.dpo import DPO


@dataclass(frozen=True)
class CurriculumDPO:
    """Diffusion-DPO on easy pairs first. Keywords are those of DPO of the same names.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = DPO.needs
    view: ClassVar[str] = "pairs"

    beta: float = 2000.0
    link: str = "sigmoid"
    label_smoothing: float = 0.0
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        self._dpo()

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return self._dpo().prepare(run, batch)

    def loss(self, run: Run, batch: Noised) -> Loss:
        return self._dpo().loss(run, batch)

    def _dpo(self) -> DPO:
        return DPO(**asdict(self))
