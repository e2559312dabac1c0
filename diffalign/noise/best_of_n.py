"""Best of N: fresh noise again and again, the baseline that every other method has to beat at equal evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.methods.checks import check_positive
from diffalign.noise.objective import Objective
from diffalign.noise.seen import Seen


@dataclass(frozen=True)
class BestOfN:
    """Any rewards will do.

    Args:
        steps: N, the plain picture among them.

    Raises:
        ValueError: a value outside its range.
    """

    steps: int = 50

    def __post_init__(self) -> None:
        check_positive("optimize_noise", steps=self.steps)

    def check(self, objective: Objective) -> None:
        """Goes with everything."""

    def search(self, objective: Objective, noise: Tensor) -> Iterator[Seen]:
        yield objective.look(noise)
        left = self.steps - 1
        while left:
            count = min(left, objective.together)
            drawn = torch.cat([objective.fresh() for _ in range(count)])
            yield from objective.look(drawn, list(range(len(noise))) * count).split(len(noise))
            left -= count
