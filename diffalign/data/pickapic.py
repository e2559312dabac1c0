"""Pick-a-Pic v2's schema (jpg_0, jpg_1, label_0, caption ...): parquet, a `datasets` folder, or the hub, streamed."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.assets import asset
from diffalign.data.records import BrokenRow, MediaSource, Row, label_scores, make_record
from diffalign.errors import first_line

SHIPPED = "shapes-pairs"
COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")
OPTIONAL = ("label_1", "has_label", "user_id", "reward_0", "reward_1")
READ = (*COLUMNS, *OPTIONAL)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_pickapic(path: str, split: str = "train", max_rows: int | None = None) -> Iterator[Row]:
    """Rows of Pick-a-Pic v2 (yuvalkirstain/pickapic_v2) or of data in its columns; label_0 is 1, 0, or 0.5 for a tie.

    Where reward_0 and reward_1 are there (`diffalign label` writes them), they are the record's scores.

    Pictures of files on disk are read again when they are needed, a row group at a time, and not kept in memory; those
    of a stream are kept by whoever keeps the record.

    Args:
        path: "shapes-pairs", the pairs that ship; a parquet file, a folder of them, a folder of
            `datasets.save_to_disk`, or a hub id, which is streamed: the train split is 322 GB.
        split: of a hub id or a saved DatasetDict.
        max_rows: stop after so many rows.

    Raises:
        ValueError: not there, or without the columns, or a label_0 column of the wrong type.
    """
    for row in itertools.islice(_rows(path, split), max_rows):
        yield row if isinstance(row, BrokenRow) else _record(*row)


@dataclass(frozen=True)
class ParquetCell:
    """One value of a parquet file."""

    file: Path
    group: int
    row: int
    column: str

    def read(self) -> bytes:
        """The bytes.

        Raises:
            ValueError: the file is gone, or has changed.
        """
        value = _bytes(cell(self.file, self.group, self.row, self.column, READ))
        if value is None:
            raise _changed(self.file, self.group, self.row, self.column)
        return value


@dataclass(frozen=True)
class ArrowCell:
    """One value of a folder of `datasets.save_to_disk`, which is mapped into memory."""

    table: Any
    row: int
    column: str

    def read(self) -> bytes:
        """The bytes; b"" if there are none."""
        return _bytes(self.table[self.row][self.column]) or b""


NumberedRow = tuple[str, Mapping[str, Any], tuple[MediaSource, MediaSource]]  # source, values, pictures


def _record(source: str, row: Mapping[str, Any], images: tuple[MediaSource, MediaSource]) -> Row:
    if row.get("has_label") is False:
        return BrokenRow(source, "has_label is false: nobody has judged this pair")
    if not all(_bytes(row[column]) for column in ("jpg_0", "jpg_1")):
        return BrokenRow(source, "jpg_0 or jpg_1 is empty")
    try:
        labels = label_scores(row["label_0"])
    except ValueError as error:
        return BrokenRow(source, str(error))
    if row.get("label_1") is not None and row["label_1"] != labels[1]:
        return BrokenRow(source, f"label_0 {row['label_0']!r} and label_1 {row['label_1']!r} contradict each other")
    rewards: tuple[Any, Any] = row.get("reward_0"), row.get("reward_1")
    if None not in rewards and not _agree(labels, rewards):
        return BrokenRow(source, f"label_0 {row['label_0']!r}, reward_0 {rewards[0]!r} and reward_1 {rewards[1]!r} "
                                 f"contradict each other")  # fmt: skip
    scores = labels if None in rewards else rewards
    user = None if row.get("user_id") is None else str(row["user_id"])
    return make_record(source, row["caption"], images, scores, user=user)


def _agree(labels: tuple[float, float], rewards: tuple[Any, Any]) -> bool:
    """Whether the picture that a label prefers has the higher reward, and those of a tie equal ones."""
    if not all(isinstance(reward, int | float) for reward in rewards):
        return False
    margins = labels[0] - labels[1], rewards[0] - rewards[1]
    return (margins[0] > 0, margins[0] < 0) == (margins[1] > 0, margins[1] < 0)


def _rows(path: str, split: str) -> Iterator[NumberedRow | BrokenRow]:
    place = asset("shapes-pairs.parquet") if path == SHIPPED and not Path(path).exists() else Path(path)
    if place.is_dir() and ((place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists()):
        return _saved_rows(place, split)
    if place.is_file():
        return _parquet_rows([place])
    if place.is_dir():
        files = sorted(place.rglob("*.parquet"))
        if not files:
            raise ValueError(f"{path}: expected parquet files or a folder of datasets.save_to_disk, found neither")
        return _parquet_rows(files)
    if not HUB_ID.fullmatch(path) or place.suffix in (".parquet", ".arrow"):
        raise ValueError(f"{path}: no such file or folder")
    return _streamed_rows(path, split)


def _parquet_rows(files: list[Path]) -> Iterator[NumberedRow | BrokenRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        index = 0
        try:
            opened = pq.ParquetFile(file)
            _check_columns(str(file), {field.name: str(field.type) for field in opened.schema_arrow})
            for group in range(opened.num_row_groups):
                for number, row in enumerate(row_group(file, group, READ).to_pylist()):
                    cells = [MediaSource(ParquetCell(file, group, number, column)) for column in ("jpg_0", "jpg_1")]
                    yield f"{file.name} row {index}", row, (cells[0], cells[1])
                    index += 1
        except (OSError, pa.ArrowException) as error:  # the other files may be whole
            yield BrokenRow(f"{file.name} from row {index} on", f"not a readable parquet file ({first_line(error)})")


def row_group(file: Path, group: int, columns: tuple[str, ...]) -> Any:
    """Those of `columns` that a parquet file has, of one of its row groups, as a table; the latest two are kept.

    A file that was written again, which its size or time of change tells, is read again.

    Raises:
        ValueError: gone, changed or damaged.
    """
    import pyarrow as pa

    try:
        found = file.stat()
        return _row_group(file, group, columns, (found.st_size, found.st_mtime_ns))
    except FileNotFoundError as error:
        raise ValueError(f"{file} is gone") from error
    except (OSError, IndexError, pa.ArrowException) as error:
        raise ValueError(f"{file}: row group {group} is not readable ({first_line(error)})") from error


def cell(file: Path, group: int, row: int, column: str, columns: tuple[str, ...]) -> Any:
    """One value of a parquet file; `columns` are those that are read with it, and kept.

    Raises:
        ValueError: as `row_group`, or the file was written again, without that cell.
    """
    try:
        return row_group(file, group, columns)[column][row].as_py()
    except (IndexError, KeyError) as error:
        raise _changed(file, group, row, column) from error


def _changed(file: Path, group: int, row: int, column: str) -> ValueError:
    return ValueError(f"{file} has changed: row {row} of group {group} has no {column} now")


@functools.lru_cache(maxsize=2)  # readers go in order: a group is decompressed once, not once per picture
def _row_group(file: Path, group: int, columns: tuple[str, ...], written: tuple[int, int]) -> Any:
    """`written` only tells one content of the file from the next."""
    import pyarrow.parquet as pq

    opened = pq.ParquetFile(file)
    return opened.read_row_group(group, columns=[name for name in columns if name in opened.schema_arrow.names])


def _saved_rows(place: Path, split: str) -> Iterator[NumberedRow | BrokenRow]:
    import datasets

    try:
        table = datasets.load_from_disk(str(place))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{place}: not a readable folder of datasets.save_to_disk ({first_line(error)})") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise ValueError(f"{place}: no split {split!r}; set data.split to one of {', '.join(sorted(table))}")
        table = table[split]
    _check_columns(str(place), {name: str(feature.dtype) for name, feature in table.features.items()})
    table = _undecoded(table)
    for index in range(len(table)):
        cells = [MediaSource(ArrowCell(table, index, column)) for column in ("jpg_0", "jpg_1")]
        yield f"{place.name} row {index}", table[index], (cells[0], cells[1])


def _streamed_rows(path: str, split: str) -> Iterator[NumberedRow | BrokenRow]:
    import datasets

    try:
        stream = _undecoded(datasets.load_dataset(path, split=split, streaming=True))
        for index, row in enumerate(stream):
            if index == 0:
                _check_columns(path, {name: type(value).__name__ for name, value in row.items()})
            pictures = [MediaSource(_bytes(row[column]) or b"") for column in ("jpg_0", "jpg_1")]
            yield f"{path} row {index}", row, (pictures[0], pictures[1])
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: no such file or folder, and no data set with a split {split!r} that can be had from "
                         f"the hub ({first_line(error)})") from error  # fmt: skip


def _undecoded(table: Any) -> Any:
    """With image columns as their bytes, not as decoded pictures: the bytes are the key of the cache."""
    import datasets

    for column in ("jpg_0", "jpg_1"):
        if isinstance((table.features or {}).get(column), datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _check_columns(path: str, types: Mapping[str, str]) -> None:
    """Raises ValueError for a table that is not in this schema, so that not every single row has to be refused."""
    if missing := [name for name in COLUMNS if name not in types]:
        raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)} of Pick-a-Pic, {', '.join(missing)} "
                         f"missing; found {', '.join(types)}")  # fmt: skip
    if not types["label_0"].startswith(("float", "double", "half", "int", "uint")):
        raise ValueError(f"{path}: expected numbers in column label_0 (1 image 0 wins, 0 image 1 wins, 0.5 tie), its "
                         f"type is {types['label_0']}")  # fmt: skip


def _bytes(cell: Iterable[Any] | None) -> bytes | None:
    """A cell's bytes: a column of `datasets` images comes as {"bytes": ..., "path": ...}."""
    value = cell.get("bytes") if isinstance(cell, Mapping) else cell
    return value if isinstance(value, bytes) else None
