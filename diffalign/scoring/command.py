"""What `diffalign score` does once its arguments are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.console import Result, progress_bar
from diffalign.data.records import BrokenRow
from diffalign.fitting import batch_size_for, side_of
from diffalign.manifests import Entry
from diffalign.rewards.base import Weighted
from diffalign.scoring.engines import ENGINES, Job, attending
from diffalign.scoring.files import SUM, ScoreRow, check_format, write_scores
from diffalign.scoring.journal import Journal
from diffalign.scoring.page import page_file, write_page
from diffalign.scoring.run import Scored, kept, score_entries, summarize
from diffalign.scoring.sources import SUMMARY
from diffalign.table import coerce, unknown
from diffalign.writing import write_json

JOURNAL = ".journal"  # beside --out
NAMED = 20  # broken rows that are named one by one; the summary names all


@dataclass(frozen=True)
class Wanted:
    """What is to be done with the scores.

    Args:
        out: file of the scores; without it they are only printed, and anything broken is an error.
        best_of: how many of each prompt are kept, by the weighted sum.
        minimum: NAME=VALUE; what is below is not kept.
        page: .html file or folder of the page.
        batch_size: None for what the device holds.
    """

    out: Path | None = None
    best_of: int | None = None
    minimum: Sequence[str] = ()
    page: Path | None = None
    batch_size: int | None = None
    engine: str = "local"


def score_pictures(listed: Iterable[Entry | BrokenRow], job: Job, wanted: Wanted) -> Result:
    """Every reward's score of every picture, and what they amount to.

    Raises:
        ValueError: an option that does not fit, and what `score_entries` raises.
    """
    limits = _checked(wanted, job.rewards)
    scored = score_beside(wanted.out, listed, job, engine=wanted.engine, batch_size=wanted.batch_size,
                          strict=wanted.out is None)  # fmt: skip
    summary = summarize(scored.rows, job.rewards)
    chosen = [scored.rows[index] for index in kept(scored.rows, limits, wanted.best_of)]
    if wanted.page:
        write_page(page_file(wanted.page), scored.entries, scored.rows, summary, scored.broken)
    result = _to_file(wanted.out, scored, chosen, summary) if wanted.out else _to_print(scored, chosen, summary)
    return result if wanted.page is None else _mentioning(result, page_file(wanted.page))


def score_beside(
    out: Path | None,
    listed: Iterable[Entry | BrokenRow],
    job: Job,
    *,
    engine: str = "local",
    batch_size: int | None = None,
    strict: bool = False,
) -> Scored:
    """`score_entries` with a bar, and with the journal of the file `out`, so that a run that is killed goes on.

    Args:
        batch_size: None for what the device holds.

    Raises:
        ValueError: as `score_entries`, an engine that is unknown, or a journal of other rewards.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    attending(job.attention, job.device)
    size = batch_size_for(side_of(job.rewards), job.device) if batch_size is None else batch_size
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(_journal(out, job)) if out else None

        def progress(total: int, done: int) -> Any:
            return stack.enter_context(progress_bar("scoring", total, done=done))

        return score_entries(listed, job, engine=engine, batch_size=size, journal=journal, strict=strict,
                             progress=progress)  # fmt: skip


def _checked(wanted: Wanted, rewards: Weighted) -> dict[str, float]:
    """The limits of --min, after all that can be refused before anything is scored."""
    if wanted.out:
        check_format(wanted.out)
    if wanted.engine not in ENGINES:
        raise unknown("engine", wanted.engine, ENGINES)
    if any(value is not None and value < 1 for value in (wanted.batch_size, wanted.best_of)):
        raise ValueError("expected --batch-size and --best-of of at least 1")
    if wanted.best_of is not None and not any(rewards.weights.values()):
        raise ValueError("--best-of chooses by the weighted sum, and every weight is 0; give one a weight")
    limits = {}
    for item in wanted.minimum:
        name, equals, value = item.rpartition("=")
        if not equals or name not in (*rewards.rewards, SUM):
            raise ValueError(f"--min {item}: expected NAME=VALUE of one of {', '.join([*rewards.rewards, SUM])}")
        limits[name] = coerce(value, float, f"--min {name}")
    return limits


def _journal(out: Path, job: Job) -> Journal:
    options = {name: {key: value for key, value in section.items() if key != "weight"}
               for name, section in job.sections.items()}  # fmt: skip
    return Journal(out.with_name(out.name + JOURNAL), options)


def _to_print(scored: Scored, chosen: Sequence[ScoreRow], summary: Mapping[str, Mapping[str, Any]]) -> Result:
    names = _shown(summary)
    means = {name: summary[name]["mean"] for name in names}
    images = [_printed(row, names) for row in chosen]
    cells = [(row.image, row.prompt, *(_cell(row.scores[name]) for name in names)) for row in chosen]
    cells.append(("mean", f"of {len(scored.rows)}", *(_cell(means[name]) for name in names)))
    cells.append(("unit", "", *(summary[name]["unit"] for name in names)))
    units = {name: summary[name]["unit"] for name in names}
    return Result({"mean": means, "units": units, "images": images}, header=("image", "prompt", *names), rows=cells)


def _printed(row: ScoreRow, names: Sequence[str]) -> dict[str, Any]:
    told = {"image": row.image, "prompt": row.prompt, "scores": {name: row.scores[name] for name in names}}
    return told | ({"missing": dict(row.missing)} if row.missing else {})


def _to_file(out: Path, scored: Scored, chosen: Sequence[ScoreRow], summary: Mapping[str, Mapping[str, Any]]) -> Result:
    write_scores(out, chosen, list(summary), {name: facts["unit"] for name, facts in summary.items()})
    broken = [{"where": row.source, "reason": row.reason} for row in scored.broken]
    counts = {"pictures": len(scored.rows), "kept": len(chosen), "new": scored.new, "broken": len(broken)}
    told = {"out": str(out), **counts, "images_per_second": round(scored.rate, 2), "rewards": summary}
    write_json(out.with_name(out.name + SUMMARY), told | {"broken_pictures": broken})
    rows = [(name, f"{facts['weight']:g}", _cell(facts["mean"]), _cell(facts["min"]), _cell(facts["max"]),
             str(facts["missing"]), facts["unit"])
            for name, facts in summary.items() if name in _shown(summary)]  # fmt: skip
    text = [
        f"{len(scored.rows)} pictures scored, {scored.new} of them now, at {scored.rate:.1f} images/s; "
        f"{len(chosen)} rows in {out}"
    ]
    text += [f"skipped: {reason(row)}" for row in scored.broken[:NAMED]]
    if scored.broken:
        text.append(f"{len(broken)} skipped in all, every one named in {out.with_name(out.name + SUMMARY)}")
    header = ("reward", "weight", "mean", "least", "most", "missing", "unit")
    return Result(told | {"broken_pictures": broken[:NAMED]}, "\n".join(text), header, rows)


def _shown(summary: Mapping[str, Any]) -> list[str]:
    """The weighted sum of a single reward is left out where people read."""
    return [name for name in summary if name != SUM or len(summary) > 2]


def reason(row: BrokenRow) -> str:
    """The row and what is wrong with it, the row once."""
    return row.reason if row.reason.startswith(row.source) else f"{row.source}: {row.reason}"


def _cell(score: float | None) -> str:
    return "missing" if score is None or score != score else f"{score:.4f}"


def _mentioning(result: Result, page: Path) -> Result:
    text = "\n".join(filter(None, (result.text, f"best and worst pictures in {page}")))
    return Result(result.data | {"page": str(page)}, text, result.header, result.rows)
