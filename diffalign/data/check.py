"""What is in a preference data set: the report of `diffalign data check`."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.data import DATASETS
from diffalign.data.examples import checked
from diffalign.data.options import Framing
from diffalign.data.pickapic import SHIPPED
from diffalign.data.records import BrokenRow, MediaSource
from diffalign.data.webdataset import SUFFIXES as SHARDS
from diffalign.data.webdataset import find_shards
from diffalign.table import build

NAMED = 20  # broken rows that are named one by one
READ_LENGTH = 77  # tokens that a CLIP text encoder reads, start and end among them
SUFFIXES = {".jsonl": "jsonl", ".parquet": "pickapic", ".json": "hpdv2", ".csv": "videoalign"}


@dataclass(frozen=True)
class Report:
    """Counts of everything in a data set; `usable` says whether anything can be trained on."""

    path: str
    schema: str
    records: int
    ties: int
    broken: int
    broken_rows: tuple[BrokenRow, ...]  # the first `NAMED`
    reasons: dict[str, int]
    prompts: int  # different ones
    duplicate_prompts: int  # records whose prompt has been there before
    long_prompts: int
    images_per_record: dict[int, int]
    sizes: dict[str, int]  # "width x height" of a file, most frequent first

    @property
    def usable(self) -> bool:
        """Whether there is a record with a preference."""
        return self.records > self.ties

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "usable": self.usable}

    def render(self) -> str:
        """For people."""
        common = ", ".join(f"{size} ({n})" for size, n in list(self.sizes.items())[:5])
        more = f" and {len(self.sizes) - 5} more sizes" if len(self.sizes) > 5 else ""
        lines = [
            f"{self.path}: {self.schema}",
            f"  {self.records} records, {self.ties} ties, {self.broken} broken rows",
            f"  {self.prompts} different prompts; {self.duplicate_prompts} records repeat one",
            f"  picture sizes: {common or 'none'}{more}",
            *(f"  {n} records of {images} pictures" for images, n in self.images_per_record.items() if images > 2),
            *(f"  broken: {row.source}: {row.reason}" for row in self.broken_rows),
        ]
        if self.long_prompts:
            lines.insert(3, f"  {self.long_prompts} prompts are longer than the {READ_LENGTH} tokens that a CLIP text "
                            f"encoder reads: their ends are cut off")  # fmt: skip
        if self.broken > len(self.broken_rows):
            lines.append(f"  ... and {self.broken - len(self.broken_rows)} more broken rows")
        lines.append("  usable" if self.usable else "  NOT USABLE: no record with a preference")
        return "\n".join(lines)


def sniff(path: str) -> str:
    """The row of DATASETS that a path looks like.

    Raises:
        ValueError: nothing fits.
    """
    place = Path(path)
    if not place.exists() and path == SHIPPED:
        return "pickapic"
    if not place.exists():
        raise ValueError(f"{path}: no such file or folder; a hub id is checked with --name pickapic")
    if place.is_dir():
        found = _sniff_folder(place)
    else:
        found = "webdataset" if place.name.endswith(SHARDS) else SUFFIXES.get(place.suffix)
    if found is None:
        raise ValueError(f"{path}: expected one of the layouts {', '.join(DATASETS)}, and it looks like none of them; "
                         f"name it with --name")  # fmt: skip
    return found


def _sniff_folder(place: Path) -> str | None:
    inside = {file.name for file in place.iterdir()}
    if any((home / "w").is_dir() and (home / "l").is_dir() for home in (place, *place.glob("*/"))):
        return "folders"
    if "metadata.jsonl" in inside or sum(name.endswith(".jsonl") for name in inside) == 1:
        return "jsonl"
    if find_shards(place):
        return "webdataset"
    if inside & {"dataset_info.json", "dataset_dict.json"} or any(place.rglob("*.parquet")):
        return "pickapic"
    if inside & {"train.json", "test.json"}:
        return "hpdv2"
    return "videoalign" if sum(name.endswith(".csv") for name in inside) == 1 else None


def check(
    path: str, name: str | None = None, max_rows: int | None = None, count_tokens: Callable[[str], int] | None = None,
    frames: int | None = None, fps: float | None = None,
) -> Report:  # fmt: skip
    """Reads a whole data set, decodes every picture or clip, and counts what it finds.

    Args:
        name: a row of DATASETS; found out by `sniff` if not given.
        max_rows: look at so many rows only.
        count_tokens: the length of a prompt. Without it, words are counted, start and end added: an estimate that is
            too low for rare words, and never too high.
        frames, fps: of clips, as in `Framing`; None for pictures.

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
    for row in checked(itertools.islice(rows, max_rows), Framing(1, frames=frames, fps=fps)):
        if isinstance(row, BrokenRow):
            broken.append(row)
            continue
        sizes.update("x".join(map(str, _as_stored(image, frames))) for image in row.images)
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
        prompts=len(prompts),
        duplicate_prompts=prompts.total() - len(prompts),
        long_prompts=sum(length(prompt) > READ_LENGTH for prompt in prompts),
        images_per_record=dict(sorted(images.items())),
        sizes=dict(sizes.most_common()),
    )


def _as_stored(source: MediaSource, frames: int | None) -> tuple[int, int]:
    """(width, height); of a picture before it is turned upright."""
    return Image.open(io.BytesIO(source.read())).size if frames is None else source.size[::-1]
