"""Readers of plain files: JSONL with images beside it, two folders of winners and losers, HPDv2's json.

A reader is a generator of records and broken rows; it opens no image. It raises ValueError only when the whole layout
is not what it says it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.records import BrokenRow, MediaSource, Row, label_scores, make_record

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
VIDEO_SUFFIXES = {".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"}
SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
CAPTIONS = "captions.json"


def read_jsonl(path: str) -> Iterator[Row]:
    """One JSON object per line; image paths are relative to the file.

    {"prompt": ..., "chosen": "a.png", "rejected": "b.png"}                        winner and loser
    {"prompt": ..., "image_0": "a.png", "image_1": "b.png", "label_0": 1}          1, 0, or 0.5 for a tie
    {"prompt": ..., "images": ["a.png", "b.png", "c.png"], "scores": [3, 1, 2]}    a ranking, higher is better
    {"prompt": ..., "image": "a.png", "liked": true}                               a thumb: true or false
    {"prompt": ...}                                                                a prompt to draw from

    "caption" may stand for "prompt" and "video" for "image"; "user", "prompt_loser", "segments" and "regions" are
    optional. A clip is a video file, an animation, or a folder of frames.

    Args:
        path: the file, or a folder with metadata.jsonl or with a single .jsonl file.

    Raises:
        ValueError: no such file.
    """
    file = _jsonl_file(Path(path))
    for number, line in enumerate(lines(file), start=1):
        source = f"{file.name} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            yield BrokenRow(source, f"not JSON: {error}")
            continue
        if not isinstance(row, dict):
            yield BrokenRow(source, f"expected an object, got {type(row).__name__}")
            continue
        yield _jsonl_record({_as_image(key): value for key, value in row.items()}, file.parent, source)


def _as_image(key: str) -> str:
    return f"image{key.removeprefix('video')}" if key.startswith("video") else key


def _jsonl_file(place: Path) -> Path:
    if not place.is_dir():
        return place
    files = sorted(place.glob("*.jsonl"))
    if (place / "metadata.jsonl") in files or len(files) != 1:
        return place / "metadata.jsonl"
    return files[0]


def _jsonl_record(row: dict[str, Any], folder: Path, source: str) -> Row:
    try:
        names, scores = _jsonl_ranking(row)
    except ValueError as error:
        return BrokenRow(source, str(error))
    return make_record(
        source,
        row.get("prompt", row.get("caption")),
        [MediaSource(folder / name) for name in names],
        scores,
        user=None if row.get("user") is None else str(row["user"]),
        prompt_loser=row.get("prompt_loser"),
        segments=row.get("segments"),
        regions=row.get("regions"),
    )


def _jsonl_ranking(row: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    if "chosen" in row and "rejected" in row:
        names, scores = [row["chosen"], row["rejected"]], [1.0, 0.0]
    elif "image_0" in row and "image_1" in row and "label_0" in row:
        names, scores = [row["image_0"], row["image_1"]], list(label_scores(row["label_0"]))
    elif "images" in row and "scores" in row:
        names, scores = row["images"], row["scores"]
    elif "image" in row and "liked" in row:
        names, scores = [row["image"]], [_liked(row["liked"])]
    elif "prompt" in row and not any(key.startswith(("image", "chosen", "rejected")) for key in row):
        names, scores = [], []
    else:
        raise ValueError(f"expected chosen and rejected, or image_0, image_1 and label_0, or images and scores, "
                         f"or image and liked, or a prompt alone; found the keys "
                         f"{', '.join(sorted(row)) or 'none'}")  # fmt: skip
    return _texts(names), _numbers(scores)


def _liked(value: object) -> float:
    if value not in (True, False):
        raise ValueError(f"expected liked to be true or false, got {value!r}")
    return float(bool(value))


def read_folders(path: str, caption: str | None = None) -> Iterator[Row]:
    """Two folders w/ and l/ with files of equal stems: winners and losers. Of clips video files or folders of frames.

    path, or each folder in it (as in 1_name/w, 1_name/l), may hold the two. Captions come from w/<stem>.txt,
    l/<stem>.txt, <stem>.txt, or captions.json ({"<stem>": "caption"}) beside the two folders; if w/ and l/ have
    different ones, each picture keeps its own. `caption` is for pictures without any.

    Raises:
        ValueError: no folder with both w/ and l/, or a captions.json that is not an object.
    """
    root = Path(path)
    homes = [h for h in (root, *sorted(root.glob("*/"))) if (h / "w").is_dir() and (h / "l").is_dir()]
    if not homes:
        raise ValueError(f"{path}: expected the folders w/ and l/ with equal stems, found none")
    for home in homes:
        captions = _captions(home / CAPTIONS)
        winners, losers = _by_stem(home / "w"), _by_stem(home / "l")
        for stem in sorted(winners | losers):
            source = f"{home.name}/{{w,l}}/{stem}"
            try:
                pair = _only(winners, stem, "w"), _only(losers, stem, "l")
                own = [_first_text([home / side / f"{stem}.txt"]) for side in ("w", "l")]
                found = own[0] or own[1] or _first_text([home / f"{stem}.txt"]) or captions.get(stem, caption) or ""
            except ValueError as error:
                yield BrokenRow(source, str(error))
                continue
            other = own[1] if all(own) and own[0] != own[1] else None
            yield make_record(source, found, [MediaSource(file) for file in pair], [1.0, 0.0], prompt_loser=other)


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        known = file.is_dir() or file.suffix.lower() in SUFFIXES
        if known and not file.name.startswith("."):
            files.setdefault(file.name if file.is_dir() else file.stem, []).append(file)
    return files


def _only(files: Mapping[str, Sequence[Path]], stem: str, side: str) -> Path:
    found = files.get(stem, [])
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"no image of this stem in {side}/")
    raise ValueError(f"{len(found)} images of this stem in {side}/: {', '.join(f.name for f in found)}")


def _captions(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    captions = _json(file)
    if not isinstance(captions, dict):
        raise ValueError(f'{file}: expected an object {{"stem": "caption"}}, got {type(captions).__name__}')
    return captions


def _first_text(files: Sequence[Path]) -> str | None:
    return next((_text(file).strip() for file in files if file.is_file()), None)


def read_hpdv2(path: str, split: str = "train") -> Iterator[Row]:
    """HPDv2: train.json with human_preference (1 the preferred), test.json with rank (lower is better).

    Images lie in train/ or test/ beside the json, under file_path or image_path.

    Args:
        path: the json file, or its folder.
        split: which json of a folder.

    Raises:
        ValueError: no such file, or not a JSON list.
    """
    file = Path(path) / f"{split}.json" if Path(path).is_dir() else Path(path)
    rows = _json(file)
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected a JSON list of rows as in HPDv2, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        source = f"{file.name} row {number}"
        try:
            names, scores = _hpdv2_ranking(row)
        except ValueError as error:
            yield BrokenRow(source, str(error))
            continue
        yield make_record(source, row.get("prompt"), [MediaSource(_hpdv2_image(file, name)) for name in names], scores)


def _hpdv2_ranking(row: object) -> tuple[list[str], list[float]]:
    if isinstance(row, dict) and "file_path" in row and "human_preference" in row:
        return _texts(row["file_path"]), _numbers(row["human_preference"])
    if isinstance(row, dict) and "image_path" in row and "rank" in row:
        return _texts(row["image_path"]), [-rank for rank in _numbers(row["rank"])]
    keys = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
    raise ValueError(f"expected file_path with human_preference, or image_path with rank; found {keys}")


def _hpdv2_image(file: Path, name: str) -> Path:
    inside = file.parent / file.stem / name
    return inside if inside.exists() else file.parent / name


def _texts(values: object) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise ValueError(f"expected image paths as text, got {values!r}")
    if repeated := [name for name, count in Counter(values).items() if count > 1]:
        raise ValueError(f"an image stands against itself: {repeated[0]}")
    return values


def _numbers(values: object) -> list[float]:
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"expected scores as numbers, got {values!r}")
    return [float(value) for value in values]


def lines(file: Path) -> Iterator[bytes]:
    """Lines as bytes: in text, some characters inside a caption would count as ends of lines."""
    try:
        with file.open("rb") as opened:
            yield from opened
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as text ({error})") from error
