"""What `diffalign compare` does once its arguments are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.arguments import Asked
from diffalign.comparing.match import match, said
from diffalign.comparing.measure import correlations, flattened, judge
from diffalign.comparing.page import Compared, write_comparison
from diffalign.console import Result
from diffalign.data.records import BrokenRow
from diffalign.manifests import Entry
from diffalign.rewards.base import Card
from diffalign.scoring.command import NAMED, reason, score_beside
from diffalign.scoring.files import SUM
from diffalign.scoring.page import page_file
from diffalign.scoring.run import Scored, formula
from diffalign.scoring.sources import card_of, is_score_file, read_score_files
from diffalign.statistics import Interval

Sides = tuple[Scored, Scored, Mapping[str, float], Mapping[str, Card]]  # A, B, weights, what rewards say of themselves


def compare_pictures(a: str, b: str, asked: Asked, page: Path | None) -> Result:
    """B against A on the prompts that both have, per reward.

    Raises:
        ValueError: no common prompt, what scoring or `read_score_files` raise, or a reward that compares pictures with
            each other where one side was scored before.
    """
    first, second, weights, cards = _sides(a, b, asked)
    found = match(first.rows, second.rows)
    if not found.meetings:
        raise ValueError(f"expected prompts that both have, found none: {len(found.only_a)} in {a}, "
                         f"{len(found.only_b)} in {b}, such as {found.only_a[0][:60]!r} and "
                         f"{found.only_b[0][:60]!r}")  # fmt: skip
    names = [*weights, *([SUM] if len([w for w in weights.values() if w]) > 1 else [])]
    rows = [*first.rows, *second.rows]
    agreement = {"all": correlations(names, rows), "within_prompts": correlations(names, rows, within=True)}
    verdicts = {name: judge(name, found, first.rows, second.rows) for name in names}
    units = {name: cards[name].unit if name in cards else "" for name in names} | {SUM: formula(weights)}
    compared = Compared((a, b), (first, second), found, verdicts, units, agreement)
    if page:
        write_comparison(page_file(page), compared)
    return _result(compared, weights, None if page is None else page_file(page))


def _sides(a: str, b: str, asked: Asked) -> Sides:
    files = [place for place in (a, b) if is_score_file(place)]
    if not files:
        return _scored_together(a, b, asked)
    named = asked.weights_of_files() if len(files) == 2 else asked.reward_weights()
    weights = named or read_score_files([files[0]], {})[1]
    cards = {name: card for name in weights if (card := card_of(name))}
    if comparing := [name for name, card in cards.items() if card.compares]:
        raise ValueError(f"{comparing[0]} compares the pictures of one prompt with each other: what it gave to one "
                         f"side says nothing of the other; give pictures on both sides, not scores")  # fmt: skip
    first, second = (_one_side(place, weights, asked) for place in (a, b))
    return first, second, weights, cards


def _one_side(place: str, weights: Mapping[str, float], asked: Asked) -> Scored:
    if is_score_file(place):
        return read_score_files([place], weights)[0]
    return score_beside(None, asked.pictures([place]), asked.job(), engine=asked.engine, batch_size=asked.batch_size)


def _scored_together(a: str, b: str, asked: Asked) -> Sides:
    """In one run, so that a reward that compares the pictures of a prompt sees those of both sides."""
    listed = [list(asked.pictures([place])) for place in (a, b)]
    for place, side in zip((a, b), listed, strict=True):
        if not any(isinstance(row, Entry) for row in side):
            raise ValueError(f"{place}: no picture with a prompt; {_first(side)}")
    job = asked.job()
    scored = score_beside(None, [*listed[0], *listed[1]], job, engine=asked.engine, batch_size=asked.batch_size)
    first, second = (_part(scored, side) for side in listed)
    return first, second, job.rewards.weights, {name: reward.card for name, reward in job.rewards.rewards.items()}


def _part(scored: Scored, listed: Sequence[Entry | BrokenRow]) -> Scored:
    own = {id(row) for row in listed}  # by identity: both sides may list the same picture
    mine = [place for place, entry in enumerate(scored.entries) if id(entry) in own]
    wheres = {row.source if isinstance(row, BrokenRow) else row.where for row in listed}
    broken = [row for row in scored.broken if row.source in wheres]
    return Scored([scored.entries[i] for i in mine], [scored.rows[i] for i in mine], broken, len(mine), scored.seconds)


def _first(side: Sequence[Entry | BrokenRow]) -> str:
    return next((f"the first row is {reason(row)}" for row in side if isinstance(row, BrokenRow)), "it has no row")


def _result(found: Compared, weights: Mapping[str, float], page: Path | None) -> Result:
    (a, b), matched = found.names, found.match
    broken = [row for side in found.sides for row in side.broken]
    data: dict[str, Any] = {
        "a": a,
        "b": b,
        "weights": dict(weights),
        "prompts": len(matched.meetings),
        "only_a": len(matched.only_a),
        "only_b": len(matched.only_b),
        "pictures": [len(side.rows) for side in found.sides],
        "matched_by": matched.ways,
        "unmatched_pictures": matched.unmatched,
        "broken_pictures": [{"where": row.source, "reason": row.reason} for row in broken],
        "rewards": {name: {"unit": found.units[name], **v.as_dict()} for name, v in found.verdicts.items()},
        "spearman": found.correlations["all"],
        "spearman_within_prompts": found.correlations["within_prompts"],
    } | ({"page": str(page)} if page else {})
    header = ("reward", "win rate of B", "B - A", "pairs", "ties", "missing", "unit")
    rows = [(name, _interval(v.win_rate, ".3f"), _interval(v.difference, "+.4g"), str(v.pairs), str(v.ties),
             str(v.missing), found.units[name]) for name, v in found.verdicts.items()]  # fmt: skip
    return Result(data, "\n".join(_text(found, broken, page)), header, rows)


def _text(found: Compared, broken: Sequence[BrokenRow], page: Path | None) -> list[str]:
    text = [f"A is {found.names[0]}, B is {found.names[1]}: {said(found.match)}"]
    within = found.correlations["within_prompts"]
    text += [f"Spearman of {first} and {second}: {_rho(rho)} over all pictures, {_rho(within[first][second])} within "
             f"prompts" for first, second, rho in flattened(found.correlations["all"])]  # fmt: skip
    text += [f"skipped: {reason(row)}" for row in broken[:NAMED]]
    if len(broken) > NAMED:
        text.append(f"{len(broken)} skipped in all; --json names every one")
    return text + ([f"where they differ most: {page}"] if page else [])


def _interval(found: Interval, form: str) -> str:
    if math.isnan(found.estimate):
        return "missing"
    if math.isnan(found.low):
        return f"{found.estimate:{form}}"
    return f"{found.estimate:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _rho(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
