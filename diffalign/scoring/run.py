"""All pictures of a manifest through an engine and a journal; what is kept of them; what they amount to."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffalign.data.records import BrokenRow
from diffalign.manifests import Entry
from diffalign.rewards.base import Weighted
from diffalign.scoring.batch import Outcome, batches
from diffalign.scoring.engines import ENGINES, Job
from diffalign.scoring.files import SUM, ScoreRow
from diffalign.scoring.journal import Journal, keys
from diffalign.table import resolve

log = logging.getLogger(__name__)

Progress = Callable[[int, str], None]  # how many more are done, and what to show beside it


@dataclass(frozen=True)
class Scored:
    """What a run gave.

    Attributes:
        entries, rows: every picture that has been looked at by all rewards, in the order of the manifest.
        broken: rows and pictures that were skipped, and why.
        new: how many were scored by this run and not taken from the journal.
        seconds: that those took.
    """

    entries: list[Entry]
    rows: list[ScoreRow]
    broken: list[BrokenRow]
    new: int
    seconds: float

    @property
    def rate(self) -> float:
        """New pictures per second."""
        return self.new / self.seconds if self.seconds > 0 else 0.0


def score_entries(
    listed: Iterable[Entry | BrokenRow],
    job: Job,
    *,
    engine: str = "local",
    batch_size: int = 32,
    journal: Journal | None = None,
    strict: bool = False,
    progress: Callable[[int, int], Progress] | None = None,
) -> Scored:
    """Scores what a manifest lists and the journal does not hold yet.

    All entries are in memory, with their scores about 2 kB each; pictures only while they are scored.

    Args:
        journal: of the same rewards; without one nothing is kept on the disk.
        strict: a broken row or picture is an error.
        progress: told how many there are and how many of them are done, gives what is told of progress.

    Raises:
        ValueError: nothing to score, a reward that refuses all of the first batch, or with `strict` anything broken.
    """
    entries, broken = _split(listed, strict)
    names = keys(entries)
    outcomes = dict(journal.kept) if journal else {}
    todo = _todo(entries, names, outcomes, job.rewards.card.compares)
    advance = progress(len(entries), len(entries) - len(todo)) if progress else lambda more, state: None
    cut = batches([entries[index].prompt for index in todo], batch_size, job.rewards.card.compares)
    places = [[todo[index] for index in batch] for batch in cut]
    started, done, new = time.monotonic(), 0, 0
    for number, found in resolve(ENGINES, engine, "engine")(job, [[entries[i] for i in batch] for batch in places]):
        _check(found, strict, nothing_yet=not any(outcome.scores for outcome in outcomes.values()))
        batch = [(names[index], outcome) for index, outcome in zip(places[number], found, strict=True)]
        outcomes.update(batch)
        if journal:
            journal.append(batch)
        done, new = done + len(found), new + sum(outcome.scores is not None for outcome in found)
        advance(len(found), f"{done / max(time.monotonic() - started, 1e-9):.1f} images/s")
    seconds = time.monotonic() - started
    found_all = [(entry, outcomes[name]) for entry, name in zip(entries, names, strict=True)]
    broken += [BrokenRow(entry.where, outcome.broken) for entry, outcome in found_all if outcome.scores is None]
    whole = [(entry, outcome) for entry, outcome in found_all if outcome.scores is not None]
    rows = [score_row(entry, outcome, job.rewards) for entry, outcome in whole]
    return Scored([entry for entry, _ in whole], rows, broken, new, seconds)


def score_row(entry: Entry, outcome: Outcome, rewards: Weighted) -> ScoreRow:
    """The terms and their weighted sum, which is missing where a term that counts is."""
    scores = dict(zip(rewards.rewards, outcome.scores or (), strict=True))
    scores[SUM] = total(scores, rewards.weights)
    return ScoreRow(entry.image, entry.prompt, scores, outcome.missing, entry.extra)


def total(scores: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted sum of the rewards whose weight is not 0; NaN where one of them is missing."""
    return sum((weight * scores[name] for name, weight in weights.items() if weight), start=0.0)


def kept(rows: Sequence[ScoreRow], minimum: Mapping[str, float], best_of: int | None) -> list[int]:
    """Indices of the rows that have every minimum, and of those the `best_of` of each prompt by the weighted sum.

    A row whose score is missing has no minimum and is not among the best; of equal ones the earlier is.
    """
    enough = [index for index, row in enumerate(rows)
              if all(row.scores[name] >= least for name, least in minimum.items())]  # fmt: skip
    if best_of is None:
        return enough
    groups: dict[str, list[int]] = defaultdict(list)
    for index in enough:
        if not math.isnan(rows[index].scores[SUM]):
            groups[rows[index].prompt].append(index)
    best = [sorted(group, key=lambda index: -rows[index].scores[SUM])[:best_of] for group in groups.values()]
    return sorted(index for group in best for index in group)


def summarize(rows: Sequence[ScoreRow], rewards: Weighted) -> dict[str, dict[str, Any]]:
    """Per reward, and for the weighted sum: weight, unit, source and what its scores amount to.

    mean, min and max are over the pictures that have a score (None if there is none); `missing` counts the others.
    """
    cards = {name: reward.card for name, reward in rewards.rewards.items()}
    cards[SUM] = replace(rewards.card, unit=formula(rewards.weights), source="the sum of the above, weighted")
    facts = {name: {"weight": rewards.weights.get(name, 1.0), "unit": card.unit, "source": card.source,
                    "across_prompts": card.across_prompts} for name, card in cards.items()}  # fmt: skip
    return {name: fact | _numbers(np.array([row.scores[name] for row in rows])) for name, fact in facts.items()}


def formula(weights: Mapping[str, float]) -> str:
    """The weighted sum spelled out: "1 pickscore + 0.5 hpsv2.1".

    >>> formula({"pickscore": 1.0, "clip": 0.0, "hpsv2.1": 0.5})
    '1 pickscore + 0.5 hpsv2.1'
    """
    return " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight) or "no weight above 0"


def _numbers(scores: Any) -> dict[str, Any]:
    there = scores[np.isfinite(scores)]
    counts = {"scored": len(there), "missing": len(scores) - len(there)}
    if not len(there):
        return counts | {"mean": None, "min": None, "max": None}
    return counts | {"mean": float(there.mean()), "min": float(there.min()), "max": float(there.max())}


def _split(listed: Iterable[Entry | BrokenRow], strict: bool) -> tuple[list[Entry], list[BrokenRow]]:
    entries: list[Entry] = []
    broken: list[BrokenRow] = []
    for row in listed:
        if isinstance(row, Entry):
            entries.append(row)
            continue
        if strict:
            raise ValueError(f"{row.source}: {row.reason}")
        broken.append(row)
    if not entries:
        reason = f"; the first of {len(broken)} broken rows is {broken[0].source}: {broken[0].reason}" if broken else ""
        raise ValueError(f"expected at least one picture with a prompt, found none{reason}")
    return entries, broken


def _todo(entries: Sequence[Entry], names: Sequence[str], done: Mapping[str, Outcome], compares: bool) -> list[int]:
    """Indices of what is not in the journal; where a reward compares, of all groups that are not there whole."""
    todo = [index for index, name in enumerate(names) if name not in done]
    if not compares:
        return todo
    prompts = {entries[index].prompt for index in todo}
    return [index for index, entry in enumerate(entries) if entry.prompt in prompts]


def _check(found: Sequence[Outcome], strict: bool, nothing_yet: bool) -> None:
    """What every picture of the first batch suffers from is a fault of the call, not of the pictures."""
    refused = [outcome for outcome in found if outcome.refused]
    if refused and nothing_yet and all(outcome.scores is None for outcome in found):
        raise ValueError(refused[0].broken)
    broken = [outcome for outcome in found if outcome.scores is None]
    if broken and strict:
        raise ValueError(broken[0].broken)
