"""Pick-a-Pic v2's schema: jpg_0, jpg_1, label_0, caption ... from parquet, a `datasets` folder, or the hub (streamed)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffalign.assets import asset
from diffalign.data.records import BrokenRow, ImageSource, Row, label_scores, make_record

SHIPPED = "shapes-pairs"
COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")


def read_pickapic(path: str, split: str = "train", max_rows: int | None = None) -> Iterator[Row]:
    """Rows of Pick-a-Pic v2 (yuvalkirstain/pickapic_v2) or of data in its columns; label_0 is 1, 0, or 0.5 for a tie.

    Args:
        path: "shapes-pairs", the pairs that ship; a parquet file, a folder of them, a folder of `datasets.save_to_disk`, or a hub id, which is streamed: the
            train split is 322 GB.
        split: of a hub id or a saved DatasetDict.
        max_rows: stop after so many rows.

    Raises:
        ValueError: not there, or without the columns, or a label_0 column of the wrong type.
    """
    rows = _rows(path, split)
    for index, row in enumerate(itertools.islice(rows, max_rows)):
        source = f"{Path(path).name} row {index}"
        if index == 0 and (missing := [c for c in COLUMNS if c not in row]):
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)} of Pick-a-Pic, {', '.join(missing)} "
                             f"missing; found {', '.join(row)}")  # fmt: skip
        yield _record(row, source)


def _record(row: Mapping[str, Any], source: str) -> Row:
    scores = label_scores(row["label_0"], source)
    data = [row["jpg_0"], row["jpg_1"]]
    # a column that `datasets` decodes as images comes as {"bytes": ..., "path": ...}
    data = [one.get("bytes") if isinstance(one, Mapping) else one for one in data]
    if not all(isinstance(one, bytes) and one for one in data):
        return BrokenRow(source, "jpg_0 or jpg_1 is empty")
    user = None if row.get("user_id") is None else str(row["user_id"])
    return make_record(source, row["caption"], [ImageSource(one) for one in data], list(scores), user=user)


def _rows(path: str, split: str) -> Iterator[Mapping[str, Any]]:
    place = asset("shapes-pairs.parquet") if path == SHIPPED and not Path(path).exists() else Path(path)
    files = [place] if place.is_file() else sorted(place.rglob("*.parquet")) if place.is_dir() else []
    if files and not (place / "dataset_info.json").exists():
        return _parquet_rows(files)
    return _datasets_rows(path, split)


def _parquet_rows(files: list[Path]) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            table = pq.ParquetFile(file)
            for batch in table.iter_batches(batch_size=64):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{file}: not a readable parquet file ({error})") from error


def _datasets_rows(path: str, split: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        if Path(path).is_dir():
            loaded = datasets.load_from_disk(path)
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(path, split=split, streaming=True)
        columns = loaded.features or {}
        images = [c for c in ("jpg_0", "jpg_1") if isinstance(columns.get(c), datasets.Image)]
        for column in images:  # bytes, not decoded pictures: they are the key of the cache
            loaded = loaded.cast_column(column, datasets.Image(decode=False))
        yield from loaded
    except (OSError, KeyError, ValueError, ConnectionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: neither parquet, nor a folder of datasets.save_to_disk with a split {split!r}, nor a "
                         f"data set that can be had from the hub ({first})") from error  # fmt: skip
