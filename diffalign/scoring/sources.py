"""Scores from where they are: a file that `diffalign score` wrote, or the rewards, asked now.

Whatever works with scores (`diffalign label`, `compare`) takes either, and sees the same entries and rows.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.data.records import MediaSource
from diffalign.manifests import FORMS, Entry, sniff
from diffalign.manifests.entry import Listed
from diffalign.rewards import REWARDS
from diffalign.rewards.base import Card
from diffalign.scoring.files import FORMATS, PREFIX, SUM, ScoreRow, read_scores
from diffalign.scoring.run import Scored, total
from diffalign.table import resolve

SUMMARY = ".summary.json"  # beside a file of scores
CONTAINERS = (".tar", ".tar.gz", ".tgz", ".parquet")  # files that hold pictures: "shard.tar:key.jpg"


def is_score_file(place: str | Path) -> bool:
    """Whether a path is a file of scores, as its first row or its header says; other manifests have none in them."""
    path = Path(place)
    if not path.is_file() or path.suffix.lower() not in FORMATS:
        return False
    try:
        return _has_scores[path.suffix.lower()](path)
    except (OSError, ValueError, csv.Error):  # whoever reads it as a manifest says what is wrong with it
        return False


def read_score_files(places: Sequence[str | Path], weights: Mapping[str, float]) -> tuple[Scored, dict[str, float]]:
    """Files of scores as if their pictures had been scored now, and the weights that count.

    Args:
        weights: reward -> weight, of those that are wanted. None means all that the files have, with the weights of
            the summary that lies beside a file; those that none names weigh 1.

    Raises:
        ValueError: no row, a row that is not as `diffalign score` writes them, a reward that a file lacks, or summaries
            that contradict each other.
    """
    found: dict[Path, list[ScoreRow]] = {Path(place): list(read_scores(place)) for place in places}
    counted = dict(weights) or _weights_beside({path: _names(rows) for path, rows in found.items()})
    for path, rows in found.items():
        if not rows:
            raise ValueError(f"{path}: expected at least one scored picture, found none")
        if lacking := [name for name in counted if name not in _names(rows)]:
            raise ValueError(f"{path}: has no scores of {', '.join(lacking)}, only of {', '.join(_names(rows))}; ask "
                             f"for those, or score its pictures again with diffalign score")  # fmt: skip
    entries = [entry for path, rows in found.items() for entry in _entries(rows, path)]
    kept = [_of(row, counted) for rows in found.values() for row in rows]
    return Scored(entries, kept, [], 0, 0.0), counted


def card_of(name: str) -> Card | None:
    """What a reward says of itself, without its weights; None for a label that is no reward's name."""
    if name not in REWARDS and ":" not in name:
        return None
    try:
        return resolve(REWARDS, name, "reward").card
    except (AttributeError, ValueError):
        return None


def _of(row: ScoreRow, weights: Mapping[str, float]) -> ScoreRow:
    scores = {name: row.scores.get(name, math.nan) for name in weights}
    return replace(row, scores=scores | {SUM: total(scores, weights)})


def _names(rows: Sequence[ScoreRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.scores if name != SUM))


def _weights_beside(found: Mapping[Path, Sequence[str]]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for path, names in found.items():
        own = {name: _weights_of(path.with_name(path.name + SUMMARY)).get(name, 1.0) for name in names}
        if other := [name for name in own if weights.get(name, own[name]) != own[name]]:
            raise ValueError(f"{path}: {other[0]} weighs {own[other[0]]:g} there and {weights[other[0]]:g} in another "
                             f"file; name rewards and weights with --reward NAME=WEIGHT")  # fmt: skip
        weights |= own
    return weights


def _weights_of(summary: Path) -> dict[str, float]:
    if not summary.is_file():
        return {}
    try:
        return {name: float(facts["weight"]) for name, facts in json.loads(summary.read_bytes())["rewards"].items()}
    except (OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{summary}: expected the summary of diffalign score ({error!r}); delete it, or name rewards "
                         f"and weights with --reward NAME=WEIGHT") from error  # fmt: skip


def _entries(rows: Sequence[ScoreRow], path: Path) -> list[Entry]:
    inside: dict[str, dict[str, Any]] = {}
    found = []
    for number, row in enumerate(rows, start=1):
        container = row.image.rpartition(":")[0]
        if container.endswith(CONTAINERS) and container not in inside:
            inside[container] = _pictures_in(Path(container))
        source = inside.get(container, {}).get(row.image) or MediaSource(Path(row.image))
        found.append(Entry(row.image, row.prompt, source, f"{path}, row {number}", row.extra))
    return found


def _pictures_in(container: Path) -> dict[str, MediaSource]:
    """Of a file that is gone nothing: its pictures then cannot be opened, which is said where they are needed."""
    if not container.is_file():
        return {}
    listed = resolve(FORMS, sniff(container), "manifest")(container)
    return {row.image: row.source for row in listed if isinstance(row, Listed)}


def _jsonl_has_scores(path: Path) -> bool:
    with path.open("rb") as file:
        first = json.loads(next((line for line in file if line.strip()), b"null"))
    return isinstance(first, dict) and isinstance(first.get("scores"), dict) and "image" in first


def _csv_has_scores(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return any(name.startswith(PREFIX) for name in next(csv.reader(file), []))


def _parquet_has_scores(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return any(name.startswith(PREFIX) for name in pq.read_schema(path).names)
    except pa.ArrowException:
        return False


_has_scores = {".jsonl": _jsonl_has_scores, ".csv": _csv_has_scores, ".parquet": _parquet_has_scores}
