"""What is in a preference data set: the report of `diffalign data check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffalign.data import DATASETS
from diffalign.data.images import decode
from diffalign.data.records import BrokenRow, Row
from diffalign.table import build

NAMED = 20  # broken rows that are named one by one


@dataclass(frozen=True)
class Report:
    """Counts of everything in a data set; `usable` says whether anything can be trained on."""

    path: str
    schema: str
    records: int
    ties: int
    broken: int
    broken_rows: tuple[BrokenRow, ...]
    reasons: dict[str, int]
    duplicate_prompts: int
    long_prompts: int
    images_per_record: dict[int, int]
    sizes: dict[str, int]

    @property
    def usable(self) -> bool:
        return self.records > self.ties

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "usable": self.usable}

    def render(self) -> str:
        """For people."""
        common = ", ".join(f"{size} ({n})" for size, n in list(self.sizes.items())[:5])
        lines = [
            f"{self.path}: {self.schema}",
            f"  {self.records} records, {self.ties} ties, {self.broken} broken rows",
            f"  {self.duplicate_prompts} records repeat a prompt; {self.long_prompts} prompts are longer than 77 tokens",
            f"  picture sizes: {common or 'none'}",
            *(f"  broken: {row.source}: {row.reason}" for row in self.broken_rows),
        ]
        if self.broken > len(self.broken_rows):
            lines.append(f"  ... and {self.broken - len(self.broken_rows)} more")
        lines.append("  usable" if self.usable else "  NOT USABLE: no record with a preference")
        return "\n".join(lines)


def sniff(path: str) -> str:
    """The row of DATASETS that a path looks like.

    Raises:
        ValueError: nothing fits.
    """
    place = Path(path)
    if place.is_dir():
        inside = {f.name for f in place.iterdir()}
        for name, found in (
            ("folders", any((h / "w").is_dir() and (h / "l").is_dir() for h in (place, *place.glob("*/")))),
            ("jsonl", "metadata.jsonl" in inside),
            ("webdataset", any(n.endswith(".tar") for n in inside)),
            ("hpdv2", "train.json" in inside),
            ("pickapic", "dataset_info.json" in inside or "dataset_dict.json" in inside or any(place.rglob("*.parquet"))),
        ):
            if found:
                return name
    suffixes = {".jsonl": "jsonl", ".parquet": "pickapic", ".json": "hpdv2", ".tar": "webdataset"}
    if place.is_file() and place.suffix in suffixes:
        return suffixes[place.suffix]
    if not place.exists():
        raise ValueError(f"{path}: no such file or folder; a hub id is checked with --name pickapic")
    raise ValueError(f"{path}: expected one of the layouts {', '.join(DATASETS)}, and it looks like none of them; "
                     f"name it with --name")  # fmt: skip


def check(
    path: str, name: str | None = None, max_rows: int | None = None, count_tokens: Callable[[str], int] | None = None
) -> Report:
    """Reads a whole data set, decodes every picture, and counts what it finds.

    Args:
        count_tokens: length of a prompt; by default its words and punctuation marks are counted.

    Raises:
        ValueError: the layout as a whole is not what it says it is.
    """
    schema = name or sniff(path)
    rows = build(DATASETS, {"name": schema, "path": path}, what="data")
    prompts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    images: Counter[int] = Counter()
    broken: list[BrokenRow] = []
    ties = 0
    length = count_tokens or (lambda text: len(text.split()) + 2)
    for index, row in enumerate(rows):
        if max_rows is not None and index >= max_rows:
            break
        row, found = _sizes(row)
        if isinstance(row, BrokenRow):
            broken.append(row)
            continue
        sizes.update(found)
        prompts[row.prompt] += 1
        images[len(row.images)] += 1
        ties += row.tie
    return Report(
        path=path,
        schema=schema,
        records=prompts.total(),
        ties=ties,
        broken=len(broken),
        broken_rows=tuple(broken[:NAMED]),
        reasons=dict(Counter(row.reason for row in broken).most_common()),
        duplicate_prompts=sum(n - 1 for n in prompts.values()),
        long_prompts=sum(length(p) > 77 for p in prompts),
        images_per_record=dict(images),
        sizes=dict(sizes.most_common()),
    )


def _sizes(row: Row) -> tuple[Row, list[str]]:
    if isinstance(row, BrokenRow):
        return row, []
    try:
        pictures = [decode(source.read(), row.source) for source in row.images]
    except ValueError as error:
        return BrokenRow(row.source, str(error).removeprefix(f"{row.source}: ")), []
    return row, [f"{p.width}x{p.height}" for p in pictures]
