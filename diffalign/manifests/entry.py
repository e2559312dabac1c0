"""A row of a manifest: one picture or clip, its prompt, and whatever else stands in the row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.data import readers
from diffalign.data.images import open_as_stored
from diffalign.data.readers import VIDEO_SUFFIXES
from diffalign.data.records import BrokenRow, MediaSource

IMAGE_SUFFIXES, MEDIA_SUFFIXES = tuple(sorted(readers.IMAGE_SUFFIXES)), tuple(sorted(readers.SUFFIXES))
IMAGES, PROMPTS = ("image", "video", "path", "file", "file_name"), ("prompt", "caption", "text")  # the first one counts


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture or clip with its prompt; nothing of it is in memory until it is opened.

    Attributes:
        image: its path, or for one inside a larger file "shard.tar:key.jpg", "table.parquet:17"; for people and as key.
        prompt: may be empty.
        source: where the bytes are read.
        where: the row, for messages: "list.jsonl line 3".
        extra: all other columns of the row.
    """

    image: str
    prompt: str
    source: MediaSource = field(repr=False)
    where: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> Image.Image:
        """The picture in its own mode, of an animation the first frame.

        Raises:
            ValueError: missing, truncated, no picture, or too large; the message begins with `image`.
        """
        return open_as_stored(self.source.read(), self.image)

    @property
    def clip(self) -> bool:
        """Whether it is a video, by its name; an animation is a picture, whose first frame counts."""
        return Path(self.image).suffix.lower() in VIDEO_SUFFIXES

    def frames(self) -> NDArray[np.uint8]:
        """[F, H, W, 3]: all frames of a clip.

        Raises:
            ValueError: missing, or no video that can be read; the message begins with `image`.
        """
        return np.stack([np.asarray(frame) for frame in self.source.clip(self.image, None, None)])


@dataclass(frozen=True, slots=True)
class Listed:
    """What a reader yields: an `Entry` that may still lack its prompt (None, which is not the same as empty)."""

    image: str
    prompt: str | None
    source: MediaSource = field(repr=False)
    where: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def entry(self, prompt: str) -> Entry:
        """With this prompt."""
        return Entry(self.image, prompt, self.source, self.where, self.extra)

    def without_prompt(self) -> Listed:
        """The same picture, in want of a prompt."""
        return replace(self, prompt=None)


def columns(names: Mapping[str, Any] | list[str], where: str) -> tuple[str, str | None]:
    """The column of the picture and that of the prompt, or None.

    Raises:
        ValueError: no column of a picture.
    """
    found = [name for name in IMAGES if name in names]
    if not found:
        raise ValueError(f"{where}: expected a column {', '.join(IMAGES[:-1])} or {IMAGES[-1]}, found "
                         f"{', '.join(map(str, names)) or 'none'}")  # fmt: skip
    return found[0], next((name for name in PROMPTS if name in names), None)


def row_of_path(row: Mapping[str, Any], folder: Path, where: str) -> Listed | BrokenRow:
    """The row of a table whose picture is a path, relative to `folder`."""
    try:
        image_column, prompt_column = columns(row, where)
    except ValueError as error:
        return BrokenRow(where, str(error).partition(": ")[2])
    image, prompt = row[image_column], row[prompt_column] if prompt_column else None
    if not isinstance(image, str) or not image or "\0" in image:
        return BrokenRow(where, f"expected the path of a picture in {image_column}, got {str(image)[:100]!r}")
    if not isinstance(prompt, str | None):
        return BrokenRow(where, f"expected the prompt as text in {prompt_column}, got {str(prompt)[:100]!r}")
    extra = {str(key): value for key, value in row.items() if key not in (image_column, prompt_column)}
    path = folder / image
    return Listed(str(path), prompt, MediaSource(path), where, extra)
