"""Which pairs, or which ranking, the values of one prompt's pictures become; ties and margins."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffalign.table import unknown

Pair = tuple[int, int]


@dataclass(frozen=True)
class Choice:
    """What becomes a record.

    Args:
        pairs: best-worst (one per prompt), all, or adjacent (neighbors in the ranking).
        rank: one ranking of all pictures per prompt instead of pairs.
        tie_margin: values that differ by no more are a tie.
        min_margin: values that differ by less, and are no tie, are left out; of a ranking its best and its worst.

    Raises:
        ValueError: an unknown kind of pairs, a negative margin, or one that leaves nothing to do for the other.
    """

    pairs: str = "best-worst"
    rank: bool = False
    tie_margin: float | None = None
    min_margin: float = 0.0

    def __post_init__(self) -> None:
        if self.pairs not in PAIRS:
            raise unknown("kind of --pairs", self.pairs, PAIRS)
        if not (self.tie_margin or 0.0) >= 0 or not self.min_margin >= 0:
            raise ValueError("expected --tie-margin and --min-margin of at least 0")
        if self.min_margin and self.tie_margin and self.min_margin <= self.tie_margin:
            raise ValueError(f"expected --min-margin above --tie-margin, got {self.min_margin:g} and "
                             f"{self.tie_margin:g}: what is not a tie is above it in any case")  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """Pictures of a record, the best first, and what goes into its `scores`: equal ones for a tie."""

    pictures: tuple[int, ...]
    scores: tuple[float, ...]

    @property
    def tie(self) -> bool:
        return self.scores[0] == self.scores[-1]


def choose(values: Sequence[float], equal: NDArray[np.bool_], choice: Choice) -> tuple[list[Chosen], int]:
    """The records of one prompt, and how many were left out for their margin.

    A tie has the mean of its values as both scores. In a ranking the best picture and those behind it come first, as
    equals, up to the first that is no tie with it; then that one, and so on: being a tie is not transitive.

    Args:
        values: of the prompt's pictures, two or more.
        equal: [N, N], pictures that are a tie whatever their values.
    """
    order = sorted(range(len(values)), key=lambda i: -values[i])  # stable: of equals the earlier stays first
    tied = np.asarray(equal) | (np.abs(np.subtract.outer(values, values)) <= (choice.tie_margin or 0.0))
    pairs = [] if choice.rank else PAIRS[choice.pairs](order)
    made = [_ranking(values, tied, order)] if choice.rank else [_pair(values, tied, *pair) for pair in pairs]
    kept = [record for record in made if _enough(record, choice)]
    return kept, len(made) - len(kept)


def _enough(record: Chosen, choice: Choice) -> bool:
    """A tie is kept where ties were asked for by a margin of their own, or where nothing is dropped."""
    if record.tie:
        return choice.tie_margin is not None or not choice.min_margin
    return record.scores[0] - record.scores[-1] >= choice.min_margin


def _pair(values: Sequence[float], tied: NDArray[np.bool_], winner: int, loser: int) -> Chosen:
    scores = (values[winner], values[loser])
    return Chosen((winner, loser), (sum(scores) / 2,) * 2 if tied[winner, loser] else scores)


def _ranking(values: Sequence[float], tied: NDArray[np.bool_], order: Sequence[int]) -> Chosen:
    groups: list[list[int]] = []
    for index in order:
        if groups and tied[groups[-1][0], index]:
            groups[-1].append(index)
        else:
            groups.append([index])
    scores = [sum(values[index] for index in group) / len(group) for group in groups for _ in group]
    return Chosen(tuple(order), tuple(scores))


def _best_worst(order: Sequence[int]) -> list[Pair]:
    return [(order[0], order[-1])]


def _all(order: Sequence[int]) -> list[Pair]:
    return list(itertools.combinations(order, 2))


def _adjacent(order: Sequence[int]) -> list[Pair]:
    return list(itertools.pairwise(order))


PAIRS = {"best-worst": _best_worst, "all": _all, "adjacent": _adjacent}
