"""SPIN-Diffusion: Yuan et al. 2024, Self-Play Fine-Tuning of Diffusion Models, arXiv 2402.10210, as a case of SePPO.

    L = softplus(-h),   h = -(beta / 2) (d_w - d_r)

The winner is of the data, the opponent is drawn by the policy as it was at the last synchronization
(`reference: {name: sync}`), and it is always the loser: SePPO without a pool and without a flip.

Deviations: the paper's own form takes both errors along the sampler's whole trajectory; this one takes them at noised
end points, as its approximation there and SePPO do. The released code was not consulted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.seppo import SePPO


@dataclass(frozen=True)
class SPIN:
    """Winners against pictures of the policy's last synchronized self. Keywords are those of SePPO, without `flip`.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = SePPO.needs
    view: ClassVar[str] = "winners"

    beta: float = 2000.0
    share_noise: bool = False
    steps: int = 50
    guidance: float = 7.5
    eta: float = 0.0
    at_once: int = 8
    reuse: int = 1
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        self._seppo()

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        return self._seppo().prepare(run, batch)

    def loss(self, run: Run, batch: Noised) -> Loss:
        return self._seppo().loss(run, batch)

    def _seppo(self) -> SePPO:
        return SePPO(flip="none", **asdict(self))
