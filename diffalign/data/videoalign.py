"""VideoAlign's csv: two clips of a prompt a row, and which of them is better in three respects."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from diffalign.data.records import BrokenRow, MediaSource, Row, make_record
from diffalign.table import unknown

AXES = {"VQ": "visual quality", "MQ": "motion quality", "TA": "text alignment"}
VERDICTS = ("A", "B", "same")
NEEDED = ("path_A", "path_B", "prompt")


def read_videoalign(path: str, axis: str = "all", root: str | None = None) -> Iterator[Row]:
    """Columns path_A, path_B, prompt and VQ, MQ, TA, each A, B or same (https://github.com/KwaiVGI/VideoAlign, its
    datasets/train/README.md). A column segments may hold a JSON list of 1, -1 and 0 for `densedpo`.

    A score is the number of axes in which a clip is better, so that a row with as many either way is a tie. What the
    file says of frame rates and counts is not looked at: clips say so themselves.

    Args:
        path: the csv file, or a folder with a single one.
        axis: VQ | MQ | TA | all.
        root: the folder that paths are relative to; that of the csv if not given.

    Raises:
        ValueError: no such file, a header without the columns that are needed, or an unknown axis.
    """
    if axis not in (*AXES, "all"):
        raise unknown("axis of videoalign", axis, (*AXES, "all"))
    file, axes = _csv_file(Path(path)), tuple(AXES) if axis == "all" else (axis,)
    folder = Path(root) if root else file.parent
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened)
            names = reader.fieldnames or ()
            if missing := [name for name in (*NEEDED, *axes) if name not in names]:
                raise ValueError(f"{file}: expected the columns {', '.join((*NEEDED, *axes))}; missing: "
                                 f"{', '.join(missing)}; found {', '.join(names) or 'none'}")  # fmt: skip
            for number, row in enumerate(reader, start=1):
                yield _record(row, axes, folder, f"{file.name} row {number}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: cannot be read as csv in UTF-8 ({error})") from error


def _csv_file(place: Path) -> Path:
    if not place.is_dir():
        return place
    files = sorted(place.glob("*.csv"))
    if len(files) != 1:
        raise ValueError(f"{place}: expected a single .csv file, found {len(files)}; name the file")
    return files[0]


def _record(row: Mapping[str, str | None], axes: tuple[str, ...], folder: Path, source: str) -> Row:
    said = {axis: (row[axis] or "").strip() for axis in axes}
    if wrong := {axis: verdict for axis, verdict in said.items() if verdict not in VERDICTS}:
        axis, verdict = next(iter(wrong.items()))
        return BrokenRow(source, f"expected {axis} ({AXES[axis]}) to be A, B or same, got {verdict!r}")
    paths = [(row[name] or "").strip() for name in ("path_A", "path_B")]
    if not all(paths) or paths[0] == paths[1]:
        return BrokenRow(source, f"expected two clips in path_A and path_B, got {paths[0]!r} and {paths[1]!r}")
    try:
        segments = json.loads(text) if (text := row.get("segments")) else None
    except ValueError:
        return BrokenRow(source, f"expected segments as a JSON list of -1, 0 and 1, got {row['segments']!r}")
    scores = [float(sum(verdict == clip for verdict in said.values())) for clip in ("A", "B")]
    return make_record(source, row["prompt"], [MediaSource(folder / path) for path in paths], scores,
                       segments=segments)  # fmt: skip
