"""Zero-order search: Ma et al. 2025, Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps,
arXiv 2501.09732.

A round looks at neighbours of a pivot, ||z|| (c u + sqrt(1 - c^2) w) with u = z / ||z|| and w a random unit vector at a
right angle to it. The best of them becomes the pivot if it beats the old one; if none does, a fresh noise becomes it,
which is the first that the next round looks at.

The paper has no official code; moving and starting again follow tt-scale-flux.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.methods.checks import check_positive
from diffalign.noise.objective import Objective
from diffalign.noise.seen import Seen, best_of
from diffalign.process import per_sample


@dataclass(frozen=True)
class ZeroOrder:
    """Any rewards will do.

    Args:
        steps: looks in all: the plain picture, then neighbours, and new pivots.
        neighbours: looks of a round.
        closeness: c, the cosine between a neighbour and its pivot, in (0, 1).

    Raises:
        ValueError: a value outside its range.
    """

    steps: int = 50
    neighbours: int = 4
    closeness: float = 0.95

    def __post_init__(self) -> None:
        check_positive("optimize_noise", steps=self.steps, neighbours=self.neighbours)
        if not 0 < self.closeness < 1:
            raise ValueError(f"optimize_noise.closeness: expected a cosine between 0 and 1, got {self.closeness}")

    def check(self, objective: Objective) -> None:
        """Goes with everything."""

    def search(self, objective: Objective, noise: Tensor) -> Iterator[Seen]:
        owners, left = list(range(len(noise))), self.steps - 1
        pivot, anew = objective.look(noise), torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
        yield pivot
        while left:
            count = min(left, self.neighbours)
            draws = [objective.fresh() for _ in range(count)]
            around = torch.where(per_sample(anew, noise), draws[0], pivot.noise)
            tried = [neighbour(around, draw, self.closeness) for draw in draws]
            tried[0] = torch.where(per_sample(anew, noise), around, tried[0])
            looks = list(objective.look(torch.cat(tried), owners * count).split(len(noise)))
            yield from looks
            found = best_of([without_total(pivot, anew), *looks])
            anew = (found.noise == pivot.noise).flatten(1).all(1)
            pivot, left = found, left - count


def without_total(seen: Seen, which: Tensor) -> Seen:
    """These rows lose against anything."""
    total = seen.scores.total.masked_fill(which, -torch.inf)
    return replace(seen, scores=replace(seen.scores, total=total))


def neighbour(z: Tensor, draw: Tensor, closeness: float) -> Tensor:
    """Each row of z [B, ...] turned towards a draw until their cosine is this; norms stay."""
    norm = per_sample(z.flatten(1).norm(dim=1), z)
    u = z / norm
    across = draw - per_sample((draw * u).flatten(1).sum(1), z) * u
    w = across / per_sample(across.flatten(1).norm(dim=1), z)
    return norm * (closeness * u + (1 - closeness**2) ** 0.5 * w)
