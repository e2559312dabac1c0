"""Files of scores: JSON lines, csv and parquet, each a manifest again (image, prompt, and the scores beside them).

    {"image": "a.png", "prompt": "...", "scores": {"clip": 24.1, "vlm": null, "weighted": null},
     "missing": {"vlm": "why"}, ...}

In csv and parquet a score is the column "score.NAME", empty or null where it is missing, and `missing` holds JSON.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.manifests.tables import LONGEST_CELL
from diffalign.writing import replacing

SUM = "weighted"  # the weighted sum beside its terms
PREFIX = "score."
OWN = ("image", "prompt", "scores", "missing")
FORMATS = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One picture's scores.

    Attributes:
        image: as in `Entry.image`; from a file it is the path from the current folder.
        scores: reward -> score, NaN where it is missing; "weighted" is the weighted sum.
        missing: reward -> why it has no score.
        extra: the other columns of the manifest.
    """

    image: str
    prompt: str
    scores: Mapping[str, float]
    missing: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def check_format(path: Path) -> None:
    """
    Raises:
        ValueError: a name that does not say a format.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {path}: expected a file that ends in {', '.join(FORMATS)}")


def write_scores(path: Path, rows: Sequence[ScoreRow], names: Sequence[str], units: Mapping[str, str]) -> None:
    """Writes a file of scores in one piece; relative paths of pictures become relative to it.

    Columns of the manifest that have the name of one of ours are replaced by it.

    Args:
        names: the rewards and "weighted", in the order of the columns.
        units: of each, for parquet's metadata ("unit.NAME").

    Raises:
        ValueError: another ending than .jsonl, .csv or .parquet.
    """
    check_format(path)
    with replacing(path) as partial:
        moved = (_moved(row, path.parent) for row in rows)
        if path.suffix.lower() == ".jsonl":
            _write_jsonl(partial, moved)
            return
        flat = [_flat(row, names) for row in moved]
        columns = list(dict.fromkeys([*_columns(names), *(name for row in flat for name in row)]))
        writer = _write_csv if path.suffix.lower() == ".csv" else _write_parquet
        writer(partial, flat, columns, {f"unit.{name}": unit for name, unit in units.items()})


def read_scores(path: str | Path) -> Iterator[ScoreRow]:
    """The rows of a file that `write_scores` wrote.

    Raises:
        ValueError: no such file, another ending, or a row without image, prompt or scores (named).
    """
    path = Path(path)
    check_format(path)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    rows = readers[path.suffix.lower()](path)
    for number in itertools.count(1):
        try:
            record = next(rows, None)
            found = None if record is None else _row(record, path.parent)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, row {number}: expected scores as diffalign score writes them, could not read "
                             f"them ({error})") from error  # fmt: skip
        if found is None:
            return
        yield found


def seen_from(image: str, folder: Path) -> str:
    """The path of a picture, as given from the current folder, for a file in `folder`; absolute ones stay."""
    if os.path.isabs(image):
        return image
    image = os.path.abspath(image)
    if os.path.realpath(folder) == os.path.abspath(folder):  # through a link, ".." would lead elsewhere
        image = os.path.relpath(image, os.path.abspath(folder))
    return image


def _moved(row: ScoreRow, folder: Path) -> ScoreRow:
    return ScoreRow(seen_from(row.image, folder), row.prompt, row.scores, row.missing, row.extra)


def _others(row: ScoreRow) -> dict[str, Any]:
    return {name: value for name, value in row.extra.items() if name not in OWN and not name.startswith(PREFIX)}


def _number(score: float) -> float | None:
    return None if math.isnan(score) else score


def _write_jsonl(path: Path, rows: Iterable[ScoreRow]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for row in rows:
            scores = {name: _number(score) for name, score in row.scores.items()}
            record: dict[str, Any] = {"image": row.image, "prompt": row.prompt, "scores": scores}
            if row.missing:
                record["missing"] = dict(row.missing)
            file.write(json.dumps(record | _others(row), ensure_ascii=False, allow_nan=False, default=str) + "\n")


def _columns(names: Sequence[str]) -> list[str]:
    return ["image", "prompt", *(f"{PREFIX}{name}" for name in names), "missing"]


def _flat(row: ScoreRow, names: Sequence[str]) -> dict[str, Any]:
    missing = json.dumps(dict(row.missing), ensure_ascii=False) if row.missing else ""
    scores = {f"{PREFIX}{name}": _number(row.scores[name]) for name in names}
    return {"image": row.image, "prompt": row.prompt, **scores, "missing": missing, **_others(row)}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], _: Mapping[str, str]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _text(value) for name, value in row.items()})


def _text(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else value


def _write_parquet(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], metadata: Mapping[str, str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: _array([row.get(name) for row in rows], name) for name in columns}
    pq.write_table(pa.table(arrays).replace_schema_metadata(dict(metadata)), path)


def _array(values: list[Any], name: str) -> Any:
    import pyarrow as pa

    if name.startswith(PREFIX):
        return pa.array(values, pa.float64())
    try:
        return pa.array(values, pa.string() if name in OWN else None)
    except (pa.ArrowException, TypeError, ValueError):  # a column of several types, or text that is no Unicode
        return pa.array([None if v is None else json.dumps(v, default=str) for v in values], pa.string())


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _row(record: Mapping[str, Any], folder: Path) -> ScoreRow:
    nested = record.get("scores")
    flat = {name.removeprefix(PREFIX): value for name, value in record.items() if name.startswith(PREFIX)}
    scores = {name: math.nan if value in (None, "") else float(value) for name, value in (nested or flat).items()}
    missing = record.get("missing") or {}
    extra = {name: value for name, value in record.items() if name not in OWN and not name.startswith(PREFIX)}
    if not scores:
        raise ValueError("no scores in it")
    image, prompt = str(record["image"]), str(record["prompt"])
    image = image if os.path.isabs(image) else os.path.normpath(folder / image)
    return ScoreRow(image, prompt, scores, json.loads(missing) if isinstance(missing, str) else missing, extra)
