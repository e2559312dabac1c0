"""Files of preferences: JSON lines beside their pictures, or parquet in Pick-a-Pic's columns with the pictures inside.

Both are layouts that `diffalign.data` reads; both keep the scores behind a preference, and so its margin.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.manifests import Entry
from diffalign.scoring.files import seen_from
from diffalign.writing import replacing

FORMATS = (".jsonl", ".parquet")
PICTURES = ".pictures"  # folder beside a .jsonl for pictures that are no files of their own
GROUP = 100  # rows of a row group: a reader decompresses one whole for any picture in it


@dataclass(frozen=True)
class Labeled:
    """One record to be written.

    Attributes:
        entries: its pictures, the best first.
        scores: one each; equal ones are a tie.
        terms: reward -> one score each, what `scores` were made from; none where a person chose.
        user: who chose; in JSON lines alone.
    """

    prompt: str
    entries: tuple[Entry, ...]
    scores: tuple[float, ...]
    terms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    user: str | None = None


def check_out(path: Path, rank: bool) -> None:
    """
    Raises:
        ValueError: a name that does not say a format, or one that cannot hold rankings.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {path}: expected a file that ends in {' or '.join(FORMATS)}")
    if rank and path.suffix.lower() == ".parquet":
        raise ValueError(f"--out {path}: a row of Pick-a-Pic's columns holds two pictures, and --rank writes rankings; "
                         f"choose a file that ends in .jsonl")  # fmt: skip


def write_labels(path: Path, rows: Iterable[Labeled]) -> None:
    """Writes a file of preferences in one piece; rows are asked for one by one.

    Raises:
        ValueError: another ending, or a picture that has gone.
    """
    check_out(path, rank=False)
    with replacing(path) as partial:
        (_write_jsonl if path.suffix.lower() == ".jsonl" else _write_parquet)(partial, path, rows)


def _write_jsonl(partial: Path, path: Path, rows: Iterable[Labeled]) -> None:
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            images = [_beside(entry, path) for entry in row.entries]
            terms = {name: list(scores) for name, scores in row.terms.items()}
            record: dict[str, Any] = {"prompt": row.prompt, "images": images, "scores": list(row.scores)}
            record |= ({"terms": terms} if terms else {}) | ({} if row.user is None else {"user": row.user})
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _beside(entry: Entry, path: Path) -> str:
    """The picture's path from the file; one inside a larger file is copied out, under the hash of its bytes."""
    if isinstance(entry.source.content, Path):
        return seen_from(entry.image, path.parent)
    data = entry.source.read()
    with Image.open(io.BytesIO(data)) as picture:
        kind = (picture.format or "image").lower()
    name = f"{path.name}{PICTURES}/{hashlib.sha256(data).hexdigest()[:32]}.{kind}"
    place = path.parent / name
    if not place.exists():
        with replacing(place) as partial:
            partial.write_bytes(data)
    return name


def _write_parquet(partial: Path, path: Path, rows: Iterable[Labeled]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    schema = pa.schema({"caption": text, "jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": number,
                        "label_1": number, "reward_0": number, "reward_1": number, "image_0": text, "image_1": text,
                        "terms": text})  # fmt: skip
    with pq.ParquetWriter(partial, schema) as writer:
        for group in _groups(map(_pick, rows)):
            writer.write_table(pa.Table.from_pylist(group, schema))


def _pick(row: Labeled) -> dict[str, Any]:
    label = 0.5 if row.scores[0] == row.scores[1] else 1.0
    sides = {
        f"{column}_{side}": value
        for side, entry in enumerate(row.entries)
        for column, value in (("jpg", entry.source.read()), ("image", entry.image), ("reward", row.scores[side]))
    }
    terms = json.dumps({name: list(scores) for name, scores in row.terms.items()}, allow_nan=False)
    return {"caption": row.prompt, "label_0": label, "label_1": 1 - label, "terms": terms, **sides}


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while group := list(itertools.islice(rows, GROUP)):
        yield group
