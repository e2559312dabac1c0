"""Readers of plain files: JSONL with images beside it, two folders of winners and losers, HPDv2's json.

A reader is a generator of records and broken rows; it opens no image. It raises ValueError only when the whole layout is
not what it says it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign.data.records import BrokenRow, ImageSource, Row, label_scores, make_record

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def read_jsonl(path: str) -> Iterator[Row]:
    """One JSON object per line; image paths are relative to the file.

    {"prompt": ..., "chosen": "a.png", "rejected": "b.png"}                        winner and loser
    {"prompt": ..., "image_0": "a.png", "image_1": "b.png", "label_0": 1}          1, 0, or 0.5 for a tie
    {"prompt": ..., "images": ["a.png", "b.png", "c.png"], "scores": [3, 1, 2]}    a ranking, higher is better

    "caption" may stand for "prompt"; "user" and "prompt_loser" are optional.

    Raises:
        ValueError: no such file, or a label_0 column of the wrong type.
    """
    file = Path(path) / "metadata.jsonl" if Path(path).is_dir() else Path(path)
    for number, line in enumerate(_text(file).splitlines(), start=1):
        source = f"{file.name} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield BrokenRow(source, f"not JSON: {error}")
            continue
        if not isinstance(row, dict):
            yield BrokenRow(source, f"expected an object, got {type(row).__name__}")
            continue
        yield _jsonl_record(row, file.parent, source)


def _jsonl_record(row: dict[str, Any], folder: Path, source: str) -> Row:
    if "chosen" in row and "rejected" in row:
        names, scores = [row["chosen"], row["rejected"]], [1.0, 0.0]
    elif "image_0" in row and "image_1" in row and "label_0" in row:
        names, scores = [row["image_0"], row["image_1"]], list(label_scores(row["label_0"], source))
    elif isinstance(row.get("images"), list) and isinstance(row.get("scores"), list):
        names, scores = row["images"], row["scores"]
    else:
        keys = ", ".join(sorted(row))
        return BrokenRow(source, f"expected chosen and rejected, or image_0, image_1 and label_0, or images and scores; "
                                 f"found the keys {keys}")  # fmt: skip
    if not all(isinstance(n, str) for n in names) or not all(_is_number(s) for s in scores):
        return BrokenRow(source, f"expected image paths as text and scores as numbers, got {names!r}, {scores!r}")
    prompt = row.get("prompt", row.get("caption"))
    user = None if row.get("user") is None else str(row["user"])
    images = [ImageSource(folder / name) for name in names]
    return make_record(source, prompt, images, [float(s) for s in scores], user=user,
                       prompt_loser=row.get("prompt_loser"))  # fmt: skip


def read_folders(path: str, caption: str | None = None) -> Iterator[Row]:
    """Two folders w/ and l/ with files of equal stems: winners and losers, captions in w/<stem>.txt or l/<stem>.txt.

    path, or each folder in it (as in 1_name/w, 1_name/l), may hold the two. `caption` is for pictures without a text.

    Raises:
        ValueError: no folder with both w/ and l/.
    """
    root = Path(path)
    homes = [h for h in (root, *sorted(root.glob("*/"))) if (h / "w").is_dir() and (h / "l").is_dir()]
    if not homes:
        raise ValueError(f"{path}: expected the folders w/ and l/ with equal stems, found none")
    for home in homes:
        winners, losers = ({f.stem: f for f in sorted((home / side).iterdir()) if f.suffix.lower() in IMAGE_SUFFIXES}
                           for side in ("w", "l"))  # fmt: skip
        for stem in sorted(winners | losers):
            source = f"{home.name}/{{w,l}}/{stem}"
            if stem not in winners or stem not in losers:
                yield BrokenRow(source, f"no file of this stem in {'l' if stem in winners else 'w'}/")
                continue
            texts = [home / side / f"{stem}.txt" for side in ("w", "l")]
            found = next((_text(t).strip() for t in texts if t.is_file()), caption)
            images = [ImageSource(winners[stem]), ImageSource(losers[stem])]
            yield make_record(source, found or "", images, [1.0, 0.0])


def read_hpdv2(path: str) -> Iterator[Row]:
    """HPDv2: train.json with human_preference (1 the preferred), test.json with rank (lower is better).

    Images lie in train/ or test/ beside the json, under file_path or image_path.

    Raises:
        ValueError: no such file, or not a JSON list.
    """
    file = Path(path) / "train.json" if Path(path).is_dir() else Path(path)
    try:
        rows = json.loads(_text(file))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected a JSON list of rows as in HPDv2, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        source = f"{file.name} row {number}"
        names = row.get("file_path") or row.get("image_path") if isinstance(row, dict) else None
        scores = (row.get("human_preference") or [-r for r in row.get("rank") or []]) if names else None
        if not isinstance(names, list) or not scores or not all(_is_number(s) for s in scores):
            yield BrokenRow(source, "expected file_path with human_preference, or image_path with rank")
            continue
        images = [ImageSource(_hpdv2_image(file, name)) for name in names]
        yield make_record(source, row.get("prompt"), images, [float(s) for s in scores])


def _hpdv2_image(file: Path, name: str) -> Path:
    inside = file.parent / file.stem / name
    return inside if inside.exists() else file.parent / name


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as text ({error})") from error
