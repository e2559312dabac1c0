"""Which picture of B meets which picture of A."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from diffalign.scoring.files import ScoreRow

WAYS = {"seed": "by seed", "order": "in order", "all": "each with each"}
SEED = "seed"  # the column that `diffalign generate` writes


@dataclass(frozen=True)
class Meeting:
    """The pairs of one prompt.

    Attributes:
        pairs: (row of A, row of B).
        way: a row of `WAYS`.
    """

    prompt: str
    pairs: tuple[tuple[int, int], ...]
    way: str


@dataclass(frozen=True)
class Match:
    """Everything that can be compared, and what was left out.

    Attributes:
        meetings: one per prompt that both have, in the order of A.
        only_a, only_b: prompts that one side alone has.
        unmatched: pictures of common prompts that meet nobody, because the other side lacks their seed.
    """

    meetings: tuple[Meeting, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    unmatched: int

    @property
    def ways(self) -> dict[str, int]:
        """How many prompts were matched which way."""
        found = Counter(meeting.way for meeting in self.meetings)
        return {way: found[way] for way in WAYS if found[way]}


def match(a: Sequence[ScoreRow], b: Sequence[ScoreRow]) -> Match:
    """Pairs of pictures of one prompt: of equal seeds where both sides have them, else of equal places where both have
    equally many, else every one of A with every one of B.

    A seed counts where every picture of the prompt has one, in a column `seed`, and no two of a side the same.
    """
    first, second = _groups(a), _groups(b)
    meetings = tuple(_meet(prompt, a, b, first[prompt], second[prompt]) for prompt in first if prompt in second)
    there = sum(len(first[meeting.prompt]) + len(second[meeting.prompt]) for meeting in meetings)
    met = sum(len({i for i, _ in meeting.pairs}) + len({j for _, j in meeting.pairs}) for meeting in meetings)
    only_a, only_b = (tuple(p for p in x if p not in y) for x, y in ((first, second), (second, first)))
    return Match(meetings, only_a, only_b, there - met)


def said(matched: Match) -> str:
    """What meets what, and what is left out, in words."""
    told = ", ".join(f"{count} {WAYS[way]}" for way, count in matched.ways.items())
    text = f"{len(matched.meetings)} prompts in both (pictures paired: {told})"
    text += f"; only in A {len(matched.only_a)}, only in B {len(matched.only_b)}"
    return text + (f"; {matched.unmatched} pictures have a seed that the other side lacks" if matched.unmatched else "")


def _groups(rows: Sequence[ScoreRow]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.prompt].append(index)
    return dict(groups)


def _meet(
    prompt: str, a: Sequence[ScoreRow], b: Sequence[ScoreRow], first: Sequence[int], second: Sequence[int]
) -> Meeting:
    seeds, others = _seeds(a, first), _seeds(b, second)
    common = [seed for seed in seeds if seed in others]
    if common:
        return Meeting(prompt, tuple((seeds[seed], others[seed]) for seed in common), "seed")
    if len(first) == len(second):
        return Meeting(prompt, tuple(zip(first, second, strict=True)), "order")
    return Meeting(prompt, tuple(itertools.product(first, second)), "all")


def _seeds(rows: Sequence[ScoreRow], group: Sequence[int]) -> dict[str, int]:
    """Seed -> row, as text, which is what csv makes of it; empty if they say nothing."""
    seeds = {str(rows[index].extra[SEED]): index for index in group if rows[index].extra.get(SEED) not in (None, "")}
    return seeds if len(seeds) == len(group) else {}
