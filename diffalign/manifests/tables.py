"""Tables as text: JSON lines and csv. Paths are relative to the file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from diffalign.data.readers import lines
from diffalign.data.records import BrokenRow
from diffalign.manifests.entry import Listed, columns, row_of_path

LONGEST_CELL = 2**31 - 1  # characters; python's own limit is less than some captions have


def read_jsonl(file: Path) -> Iterator[Listed | BrokenRow]:
    """One object per line: {"image": "a.png", "prompt": "...", ...}; `diffalign generate` and `score` write such files.

    Raises:
        ValueError: it cannot be read.
    """
    for number, line in enumerate(lines(file), start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            yield BrokenRow(where, f'expected {{"image": "...", "prompt": "..."}}, got no JSON: {error}')
            continue
        if not isinstance(row, dict):
            yield BrokenRow(where, f'expected {{"image": "...", "prompt": "..."}}, got {str(row)[:100]}')
            continue
        yield row_of_path(row, file.parent, where)


def read_csv(file: Path) -> Iterator[Listed | BrokenRow]:
    """A header and one row per picture; commas, in a .tsv tabs. All other columns are kept as text.

    Raises:
        ValueError: it cannot be read, or its header names no picture.
    """
    csv.field_size_limit(LONGEST_CELL)
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
            columns(list(reader.fieldnames or []), str(file))
            for number, row in enumerate(reader, start=1):
                where = f"{file}, row {number}"
                if None in row or None in row.values():
                    yield BrokenRow(where, f"expected {len(reader.fieldnames or [])} cells, as the header has; quote "
                                           f"what holds a comma or a line break")  # fmt: skip
                    continue
                yield row_of_path(row, file.parent, where)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: cannot be read as csv in UTF-8 ({error})") from error
