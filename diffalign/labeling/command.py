"""What `diffalign label` does once its arguments are read."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffalign.arguments import Asked
from diffalign.console import Result
from diffalign.data.examples import checked
from diffalign.data.options import Framing
from diffalign.data.records import BrokenRow, Row, make_record
from diffalign.labeling.aggregate import AGGREGATES, NEED_POSITIVE, equal
from diffalign.labeling.choose import Choice, choose
from diffalign.labeling.files import Labeled, check_out, write_labels
from diffalign.manifests import Entry
from diffalign.scoring.command import NAMED, reason, score_beside
from diffalign.scoring.files import ScoreRow
from diffalign.scoring.run import Scored, formula
from diffalign.scoring.sources import SUMMARY, is_score_file, read_score_files
from diffalign.table import coerce, resolve, unknown
from diffalign.writing import write_json

LEFT_OUT = {  # what is counted as left out, and how it is said
    "broken": "pictures or rows that cannot be scored",
    "without_score": "pictures that lack a score",
    "repeated": "pictures that were there before under the same prompt",
    "alone": "prompts with fewer than two pictures left",
    "small_margin": "pairs or rankings below --min-margin",
    "unusable": "pairs or rankings that could not be trained on",
}


@dataclass(frozen=True)
class Wanted:
    """How scores become preferences.

    Args:
        out: .jsonl or .parquet.
        aggregate: a row of `AGGREGATES`.
        margins: reward -> how far two scores may be apart and still be equal by it.
    """

    out: Path
    choice: Choice
    aggregate: str = "total"
    margins: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_out(self.out, self.choice.rank)
        if self.aggregate not in AGGREGATES:
            raise unknown("--aggregate", self.aggregate, AGGREGATES)


def read_wanted(
    out: Path, aggregate: str, pairs: str | None, rank: bool, tie_margin: Sequence[str], min_margin: float
) -> Wanted:
    """The options as a `Wanted`; each of `tie_margin` is VALUE, of what ranks, or NAME=VALUE, of a reward.

    Raises:
        ValueError: an unknown name, a margin that is no number of at least 0, or --pairs with --rank.
    """
    if rank and pairs is not None:
        raise ValueError("expected --pairs or --rank, got both: a ranking holds all pairs; data.ranking of the "
                         "training config says which of them are trained on")  # fmt: skip
    whole, single = None, {}
    for item in tie_margin:
        name, equals, value = item.rpartition("=")
        margin = coerce(value, float, f"--tie-margin {item}")
        if not 0 <= margin < math.inf:
            raise ValueError(f"--tie-margin {item}: expected a number of at least 0")
        if equals:
            single[name] = margin
        else:
            whole = margin
    return Wanted(out, Choice(pairs or "best-worst", rank, whole, min_margin), aggregate, single)


def label_pictures(places: Sequence[str], asked: Asked, wanted: Wanted) -> Result:
    """Ranks the pictures of each prompt and writes the records.

    Raises:
        ValueError: what `score_entries` or `read_score_files` raise, a weight or margin that does not fit, or
            no record.
    """
    scored, weights = _scores(places, asked, wanted)
    counted = _counted(weights, wanted)
    counts: Counter[str] = Counter(broken=len(scored.broken))
    broken = list(scored.broken)
    groups = list(_groups(scored, counted, counts, broken))
    labeled = [record for group in groups for record in _records(group, scored, counted, wanted, counts)]
    if not labeled:
        raise ValueError(f"no preference to write: {_told(counts) or 'no pictures'}; expected two pictures or more of "
                         f"a prompt, with a score each")  # fmt: skip
    if wanted.out.suffix.lower() == ".parquet" and any(entry.clip for row in labeled for entry in row.entries):
        raise ValueError(f"--out {wanted.out}: Pick-a-Pic's columns hold pictures, and there are clips; choose a file "
                         f"that ends in .jsonl")  # fmt: skip
    written: list[Labeled] = []
    write_labels(wanted.out, _usable(labeled, written, broken))
    counts["unusable"] = len(labeled) - len(written)
    return _result(scored, weights, wanted, written, counts, broken)


def _scores(places: Sequence[str], asked: Asked, wanted: Wanted) -> tuple[Scored, dict[str, float]]:
    files = [place for place in places if is_score_file(place)]
    if wanted.out.resolve() in [Path(place).resolve() for place in places]:
        raise ValueError(f"--out {wanted.out}: is what is read; choose another file")
    if files and len(files) == len(places):
        scored, weights = read_score_files(places, asked.weights_of_files())
        if wanted.aggregate in NEED_POSITIVE and not asked.reward:
            # the summary's weights are those of a sum: they make up for units, which play no part here
            weights = {name: float(weight != 0) for name, weight in weights.items()}
        return scored, weights
    if files:
        raise ValueError(f"expected files of scores or pictures, got both: {files[0]} holds scores; label them apart")
    listed, job = asked.pictures(places), asked.job()
    _counted(job.rewards.weights, wanted)  # refused before hours of scoring, not after
    scored = score_beside(wanted.out, listed, job, engine=asked.engine, batch_size=asked.batch_size)
    return scored, dict(job.rewards.weights)


def _counted(weights: Mapping[str, float], wanted: Wanted) -> dict[str, float]:
    """The rewards that have a say: those whose weight is not 0."""
    if foreign := [name for name in wanted.margins if not weights.get(name)]:
        raise ValueError(f"--tie-margin {foreign[0]}: expected one of the rewards that count, "
                         f"{', '.join(name for name, weight in weights.items() if weight)}")  # fmt: skip
    counted = {name: weight for name, weight in weights.items() if weight}
    if not counted:
        raise ValueError("every weight is 0, so nothing ranks the pictures; give a reward a weight")
    if wanted.aggregate in NEED_POSITIVE and min(counted.values()) < 0:
        raise ValueError(f"--aggregate {wanted.aggregate}: expected weights above 0, got "
                         f"{min(counted.values()):g}; total takes negative ones")  # fmt: skip
    return counted


def _groups(
    scored: Scored, counted: Mapping[str, float], counts: Counter[str], broken: list[BrokenRow]
) -> Iterator[list[int]]:
    """Rows of each prompt that can be compared, two or more; what is left out is counted."""
    groups: dict[str, list[int]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    for index, row in enumerate(scored.rows):
        group = groups[row.prompt]  # there even if nothing of it is left: the prompt counts as dropped
        lacking = [name for name in counted if not math.isfinite(row.scores[name])]
        if (row.image, row.prompt) in seen:
            counts["repeated"] += 1
        elif lacking:
            counts["without_score"] += 1
            broken.append(BrokenRow(row.image, _why(row, lacking)))
        else:
            group.append(index)
        seen.add((row.image, row.prompt))
    counts["alone"] += sum(len(group) < 2 for group in groups.values())
    yield from (group for group in groups.values() if len(group) >= 2)


def _why(row: ScoreRow, lacking: Sequence[str]) -> str:
    return "; ".join(f"no score of {name}" + (f": {row.missing[name]}" if row.missing.get(name) else "")
                     for name in lacking)  # fmt: skip


def _records(
    group: Sequence[int], scored: Scored, counted: Mapping[str, float], wanted: Wanted, counts: Counter[str]
) -> Iterator[Labeled]:
    rows = [scored.rows[index] for index in group]
    scores = np.array([[row.scores[name] for row in rows] for name in counted], np.float64)
    weights = np.array(list(counted.values()), np.float64)
    margins = np.array([wanted.margins.get(name, 0.0) for name in counted], np.float64)
    values = resolve(AGGREGATES, wanted.aggregate, "aggregate")(scores, weights, margins).tolist()
    made, dropped = choose(values, equal(scores, margins), wanted.choice)
    counts["small_margin"] += dropped
    for record in made:
        entries = tuple(scored.entries[group[place]] for place in record.pictures)
        terms = {name: scores[k, list(record.pictures)].tolist() for k, name in enumerate(counted)}
        yield Labeled(rows[0].prompt, entries, record.scores, terms)


def _usable(labeled: Sequence[Labeled], written: list[Labeled], broken: list[BrokenRow]) -> Iterator[Labeled]:
    """Those that training would not drop: with a caption, and with pictures that its own reader takes.

    Raises:
        ValueError: none of them, so that no file is written.
    """
    rows: Iterable[Row] = (
        make_record(_named(row.entries), row.prompt, [entry.source for entry in row.entries], row.scores)
        for row in labeled
    )
    clips = any(entry.clip for row in labeled for entry in row.entries)
    for row, record in zip(labeled, checked(rows, Framing(1, frames=1 if clips else None)), strict=True):
        if isinstance(record, BrokenRow):
            broken.append(record)
            continue
        written.append(row)
        yield row
    if not written:
        raise ValueError(f"no preference to write: training would drop all {len(labeled)}, such as "
                         f"{reason(broken[-1])}")  # fmt: skip


def _named(entries: Sequence[Entry]) -> str:
    return " and ".join(entry.image for entry in entries[:2]) + (" ..." if len(entries) > 2 else "")


def _told(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{counts[name]} {said}" for name, said in LEFT_OUT.items() if counts[name])


def _result(
    scored: Scored,
    weights: Mapping[str, float],
    wanted: Wanted,
    written: Sequence[Labeled],
    counts: Mapping[str, int],
    broken: Sequence[BrokenRow],
) -> Result:
    out, choice = wanted.out, wanted.choice
    kind = "rankings" if choice.rank else "pairs"
    prompts, ties = len({row.prompt for row in written}), sum(len(set(row.scores)) == 1 for row in written)
    data = {
        "out": str(out),
        "kind": "rankings" if choice.rank else choice.pairs,
        "records": len(written),
        "ties": ties,
        "prompts": prompts,
        "aggregate": wanted.aggregate,
        "weights": dict(weights),
        "tie_margin": choice.tie_margin,
        "tie_margins": dict(wanted.margins),
        "min_margin": choice.min_margin,
        "pictures": len(scored.rows),
        "new": scored.new,
        "left_out": {name: counts[name] for name in LEFT_OUT},
    }
    named = [{"where": row.source, "reason": row.reason} for row in broken]
    summary = out.with_name(out.name + SUMMARY)
    write_json(summary, data | {"named": named}, ensure_ascii=False)
    text = [
        f"{len(written)} {kind} of {prompts} prompts in {out}, {ties} of them ties; "
        f"{len(scored.rows)} pictures, {scored.new} scored now; ranked by {wanted.aggregate} of {formula(weights)}"
    ]
    if _told(counts):
        text.append(f"left out: {_told(counts)}")
    text += [f"left out: {reason(row)}" for row in broken[:NAMED]]
    if broken:
        text.append(f"every one is named in {summary}")
    layout = "jsonl" if out.suffix.lower() == ".jsonl" else "pickapic"
    text.append(f"look: diffalign data check {out}; train: data={{name: {layout}, path: {out}}}")
    return Result(data | {"named": named[:NAMED]}, "\n".join(text))
