"""Parquet tables as a manifest: pictures as bytes, as `datasets` stores them ({bytes, path}), or as paths."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.data.pickapic import cell
from diffalign.data.records import BrokenRow, MediaSource
from diffalign.errors import first_line
from diffalign.manifests.entry import Listed, columns, row_of_path

ONE_AT_A_TIME = threading.Lock()  # else every thread that opens pictures would read the same row group for itself


@dataclass(frozen=True, slots=True)
class PictureCell:
    """One picture inside a parquet file."""

    file: Path
    group: int
    row: int
    column: str

    def read(self) -> bytes:
        """The bytes.

        Raises:
            ValueError: the file is gone or damaged, or the cell is empty.
        """
        with ONE_AT_A_TIME:
            value = cell(self.file, self.group, self.row, self.column, (self.column,))
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(data, bytes):
            return data
        path = value.get("path") if isinstance(value, Mapping) else None
        if not path:
            raise ValueError(f"{self.file}: row {self.row} of row group {self.group} has no picture in {self.column}")
        return MediaSource(self.file.parent / path).read()


def read_parquet(place: Path) -> Iterator[Listed | BrokenRow]:
    """Rows of one file, or of all in a folder. Columns of bytes other than the picture are left out.

    Raises:
        ValueError: not parquet, or without a column of pictures.
    """
    for file in sorted(place.glob("*.parquet")) if place.is_dir() else [place]:
        yield from _rows(file)


def _rows(file: Path) -> Iterator[Listed | BrokenRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: not a readable parquet file ({first_line(error)})") from error
    schema = opened.schema_arrow
    image, prompt = columns(schema.names, str(file))
    as_path = pa.types.is_string(schema.field(image).type) or pa.types.is_large_string(schema.field(image).type)
    read = [field.name for field in schema if (field.name == image and as_path) or
            (field.name != image and not _holds_bytes(field.type))]  # fmt: skip
    first = 0
    for group in range(opened.num_row_groups):
        count = opened.metadata.row_group(group).num_rows
        try:
            rows = opened.read_row_group(group, columns=read).to_pylist() or [{}] * count
        except (OSError, pa.ArrowException) as error:  # other row groups may be whole
            yield BrokenRow(f"{file}, rows {first} to {first + count - 1}", f"not readable ({first_line(error)})")
            rows = []
        for index, row in enumerate(rows):
            where = f"{file}, row {first + index}"
            source = MediaSource(PictureCell(file, group, index, image))
            yield row_of_path(row, file.parent, where) if as_path else _row(row, prompt, source, where,
                                                                            f"{file}:{first + index}")  # fmt: skip
        first += count


def _row(row: Mapping[str, Any], column: str | None, source: MediaSource, where: str, name: str) -> Listed | BrokenRow:
    prompt = row.get(column) if column else None
    if not isinstance(prompt, str | None):
        return BrokenRow(where, f"expected the prompt as text in {column}, got {str(prompt)[:100]!r}")
    return Listed(name, prompt, source, where, {key: value for key, value in row.items() if key != column})


def _holds_bytes(kind: Any) -> bool:
    """Whether a column would bring pictures into memory that nobody asked for."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))
