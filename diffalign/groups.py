"""Groups, the pictures of one prompt: drawn by one rank, or spread over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffalign.methods.base import Run


@dataclass(frozen=True)
class Group:
    """`size` pictures of each of P prompts, of which this rank draws R in all, a prompt's one after the other.

    Attributes:
        spread: whether all ranks have the same prompts, and draw an equal share of each group. Else a rank draws whole
            groups of prompts of its own.
    """

    size: int
    spread: bool = False

    def here(self, run: Run) -> int:
        """How many pictures of a prompt this rank draws."""
        return self.size // run.ranks if self.spread else self.size

    def whole(self, run: Run, values: Tensor) -> Tensor:
        """[P, size] of this rank's [R] and, if spread, those of the others."""
        own = values.view(-1, self.here(run))
        if not self.spread:
            return own
        return run.gather(own).view(run.ranks, *own.shape).transpose(0, 1).reshape(len(own), self.size)

    def own(self, run: Run, grouped: Tensor) -> Tensor:
        """[R] of [P, size]: the way back from `whole`."""
        here = self.here(run)
        start = run.rank * here if self.spread else 0
        return grouped[:, start : start + here].reshape(-1)

    def gather(self, run: Run) -> Callable[[Tensor], Tensor]:
        """[P, ...] of this rank -> of all ranks; of spread groups each of them has everything."""
        return (lambda values: values) if self.spread else run.gather
