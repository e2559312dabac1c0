"""The page of a comparison: numbers, how rewards agree, and the prompts on which the two sides differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.comparing.match import Match, Meeting, said
from diffalign.comparing.measure import Verdict, prompt_scores
from diffalign.manifests import Entry
from diffalign.pages import write_html
from diffalign.scoring.files import ScoreRow
from diffalign.scoring.page import thumbnail
from diffalign.scoring.run import Scored

SHOWN = 8  # prompts at either end
PAIRS = 4  # pairs of a prompt


@dataclass(frozen=True)
class Compared:
    """Two sides and what was found of them."""

    names: tuple[str, str]
    sides: tuple[Scored, Scored]
    match: Match
    verdicts: Mapping[str, Verdict]
    units: Mapping[str, str]
    correlations: Mapping[str, Mapping[str, Mapping[str, float]]]  # over all pictures, within prompts


def write_comparison(path: Path, found: Compared) -> None:
    """Writes the page in one piece; pictures that have gone since they were scored are said to be gone."""
    shown: dict[str, str] = {}
    sections = [_section(name, found, shown) for name in found.verdicts]
    write_html(path, "compare.html.j2", a=found.names[0], b=found.names[1], said=said(found.match), sections=sections,
               correlations=found.correlations)  # fmt: skip


def extremes(
    name: str, match: Match, a: Sequence[ScoreRow], b: Sequence[ScoreRow], shown: int = SHOWN
) -> tuple[list[tuple[Meeting, float]], list[tuple[Meeting, float]]]:
    """The prompts on which B is better by the most, and those on which A is, the largest mean difference first.

    A prompt on which they are equal is in neither.
    """
    scores = [(meeting, prompt_scores(name, meeting, a, b)) for meeting in match.meetings]
    gaps = [(meeting, float((second - first).mean())) for meeting, (first, second) in scores if len(first)]
    for_b = sorted((gap for gap in gaps if gap[1] > 0), key=lambda gap: -gap[1])
    for_a = sorted((gap for gap in gaps if gap[1] < 0), key=lambda gap: gap[1])
    return for_b[:shown], for_a[:shown]


def _section(name: str, found: Compared, shown: dict[str, str]) -> dict[str, Any]:
    ends = extremes(name, found.match, found.sides[0].rows, found.sides[1].rows)
    parts = [[_prompt(name, meeting, gap, found.sides, shown) for meeting, gap in end] for end in ends]
    return {"name": name, "unit": found.units[name], "verdict": found.verdicts[name], "for_b": parts[0],
            "for_a": parts[1]}  # fmt: skip


def _prompt(
    name: str, meeting: Meeting, gap: float, sides: tuple[Scored, Scored], shown: dict[str, str]
) -> dict[str, Any]:
    """The first pairs in their order, not those that differ most: what is picked is the prompt."""
    rows = [[_figure(side.entries[i], side.rows[i].scores[name], shown) for i in places]
            for side, places in zip(sides, _places(meeting), strict=True)]  # fmt: skip
    return {"prompt": meeting.prompt, "gap": gap, "a": rows[0], "b": rows[1], "pairs": len(meeting.pairs)}


def _places(meeting: Meeting) -> tuple[list[int], list[int]]:
    first, second = (list(dict.fromkeys(side))[:PAIRS] for side in zip(*meeting.pairs, strict=True))
    return first, second


def _figure(entry: Entry, score: float, shown: dict[str, str]) -> dict[str, Any]:
    if entry.image not in shown:
        shown[entry.image] = thumbnail(entry)
    return {"uri": shown[entry.image], "score": score, "image": entry.image}
