"""Pictures and videos as files: one, or a folder of them with captions in .txt files beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffalign.data.records import BrokenRow, MediaSource
from diffalign.manifests.entry import MEDIA_SUFFIXES, Listed


def read_folder(folder: Path) -> Iterator[Listed | BrokenRow]:
    """The pictures and videos of a folder by name; the caption of a.png is a.txt.

    Hidden files and folders inside are passed over.

    Raises:
        ValueError: nothing of the kind in it.
    """
    files = [file for file in sorted(folder.iterdir())
             if file.suffix.lower() in MEDIA_SUFFIXES and not file.name.startswith(".") and file.is_file()]  # fmt: skip
    if not files:
        raise ValueError(
            f"{folder}: no picture or clip there; expected files that end in {', '.join(MEDIA_SUFFIXES)}, a "
            f"metadata.jsonl, or shards that end in .tar or .parquet; for folders inside it give a glob, "
            f"'{folder}/**/*.jpg'"
        )
    for file in files:
        caption = file.with_suffix(".txt")
        try:
            prompt = caption.read_text(encoding="utf-8-sig").strip() if caption.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            yield BrokenRow(str(file), f"its caption {caption.name} cannot be read as text ({error})")
            continue
        yield Listed(str(file), prompt, MediaSource(file), str(file))


def read_picture(file: Path) -> Iterator[Listed | BrokenRow]:
    """One picture, in want of a prompt."""
    yield Listed(str(file), None, MediaSource(file), str(file))
