"""The one schema of preference data, whatever file it came from."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from diffalign.data.clips import FrameFolder, decode_clip
from diffalign.data.images import decode


class Stored(Protocol):
    """Where the bytes of an image lie inside a larger file, such as a tar archive or a table."""

    def read(self) -> bytes:
        """The bytes; raises ValueError when they are not there any more."""
        ...


@dataclass(frozen=True)
class FileSlice:
    """`size` bytes of a file from `offset` on: a member of an uncompressed tar archive."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes.

        Raises:
            ValueError: the file is missing, or shorter than it was.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror})") from error
        if len(data) < self.size:
            raise ValueError(f"{self.path} is truncated: expected {self.size} bytes at {self.offset}, got {len(data)}")
        return data


@dataclass(frozen=True)
class MediaSource:
    """The bytes of a picture or clip, or where to read them when they are needed: a path (of a clip a folder of frames
    too), or a part of a larger file.
    """

    content: bytes | Path | Stored = field(repr=False)

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            ValueError: the file is missing or not readable.
        """
        if isinstance(self.content, bytes):
            return self.content
        if not isinstance(self.content, Path):
            return self.content.read()
        if folder := self._folder:
            return folder.read()
        try:
            return self.content.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.content} cannot be read ({error.strerror})") from error

    @property
    def _folder(self) -> FrameFolder | None:
        """Of frames, if it is one."""
        return FrameFolder(self.content) if isinstance(self.content, Path) and self.content.is_dir() else None

    def decode(self, name: str) -> Image.Image:
        """The picture, as `diffalign.data.images.decode` reads it; its `size` is kept.

        Raises:
            ValueError: missing, or not a picture that can be used; the message begins with `name`.
        """
        if folder := self._folder:
            raise ValueError(f"{name}: {folder.path} is a folder where a picture was expected; for clips set "
                             f"num_frames")  # fmt: skip
        picture = decode(self.read(), name)
        vars(self)["size"] = (picture.height, picture.width)  # where cached_property looks first
        return picture

    def clip(self, name: str, frames: int | None, fps: float | None) -> list[Image.Image]:
        """The first frames of the clip, or all, as `diffalign.data.clips.decode_clip` reads them; their `size` is kept.

        Raises:
            ValueError: missing, or not a clip that can be used; the message begins with `name`.
        """
        found = decode_clip(self._folder or self.read(), name, frames, fps)
        vars(self)["size"] = (found[0].height, found[0].width)
        return found

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, upright; known without another look once it has been decoded."""
        picture = self.decode("the image")
        return picture.height, picture.width

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file's bytes: what caches are keyed by. Read once, so that training never goes back to the files."""
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True)
class PreferenceRecord:
    """One prompt, its pictures (or clips), and what was preferred.

    A single picture is liked (1) or disliked (0); without any it is a prompt to draw from.

    Attributes:
        scores: one per image, finite, higher is better; equal scores are a tie. A label of 1 against 0 is (1.0, 0.0).
        source: where the row came from, for messages: "train.parquet row 17".
        user: who preferred (personalization).
        prompt_loser: the loser's own caption, when the members of a pair have two (DCPO).
        segments: one label in {-1, 0, 1} per temporal segment of a clip pair (DenseDPO): 1 where the first is better.
        regions: rows of such labels, a coarse map over a pair of pictures: 1 where the first is better.

    Raises:
        ValueError: an empty caption, a missing or non-finite score, another segment label.
    """

    prompt: str
    images: tuple[MediaSource, ...]
    scores: tuple[float, ...]
    source: str
    user: str | None = None
    prompt_loser: str | None = None
    segments: tuple[int, ...] | None = None
    regions: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the caption is empty")
        if self.prompt_loser is not None and not self.prompt_loser.strip():
            raise ValueError("prompt_loser is empty: give it a text, or leave it out")
        if len(self.images) != len(self.scores):
            raise ValueError(f"expected images with a score each, got {len(self.images)} and "
                             f"{len(self.scores)}")  # fmt: skip
        if not all(math.isfinite(score) for score in self.scores):
            raise ValueError(f"expected finite scores, got {list(self.scores)}")
        if self.segments is not None and not (self.segments and set(self.segments) <= {-1, 0, 1}):
            raise ValueError(f"expected segment labels of -1, 0 or 1, got {list(self.segments)}")
        if self.regions is not None and (
            len({len(row) for row in self.regions}) != 1 or not {s for row in self.regions for s in row} <= {-1, 0, 1}
            or not self.regions[0]
        ):  # fmt: skip
            raise ValueError(f"expected regions as rows of equal length of -1, 0 and 1, got {self.regions}")

    @property
    def tie(self) -> bool:
        """Whether best and worst are equally good."""
        return len(self.scores) > 1 and max(self.scores) == min(self.scores)

    def winner_loser(self) -> tuple[MediaSource, MediaSource]:
        """The best and the worst picture; for a tie the first and the last."""
        [(winner, loser)] = self.comparisons("best_worst")
        return self.images[winner], self.images[loser]

    def comparisons(self, ranking: str) -> list[tuple[int, int]]:
        """Pairs of indices (i, j) with scores[i] >= scores[j]: the best and the worst one, or all pairs of a ranking.

        Args:
            ranking: "best_worst" or "all".
        """
        # stable: among equals the earlier picture stays first
        order = sorted(range(len(self.scores)), key=lambda i: -self.scores[i])
        if ranking == "best_worst":
            return [(order[0], order[-1])]
        return [(winner, loser) for place, winner in enumerate(order) for loser in order[place + 1 :]]


@dataclass(frozen=True)
class BrokenRow:
    """A row that was dropped whole, and why."""

    source: str
    reason: str


Row = PreferenceRecord | BrokenRow


def make_record(
    source: str,
    prompt: object,
    images: Sequence[MediaSource],
    scores: Sequence[float],
    *,
    user: str | None = None,
    prompt_loser: object = None,
    segments: object = None,
    regions: object = None,
) -> Row:
    """A record of values as they come out of a file, or the `BrokenRow` that says what is wrong with them."""
    if not isinstance(prompt, str):
        return BrokenRow(source, f"expected the caption as text, got {prompt!r}")
    if not isinstance(prompt_loser, str | None):
        return BrokenRow(source, f"expected prompt_loser as text, got {prompt_loser!r}")
    try:
        labels = None if segments is None else _numbers("segments as a list of -1, 0 and 1", segments)
        areas = None if regions is None else _rows("regions as a list of rows of -1, 0 and 1", regions)
        return PreferenceRecord(prompt.strip(), tuple(images), tuple(scores), source, user=user,
                                prompt_loser=prompt_loser, segments=labels, regions=areas)  # fmt: skip
    except ValueError as error:
        return BrokenRow(source, str(error))


def _numbers(expected: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError(f"expected {expected}, got {value!r}")
    return tuple(value)


def _rows(expected: str, value: object) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list):
        raise ValueError(f"expected {expected}, got {value!r}")
    return tuple(_numbers(expected, row) for row in value)


def label_scores(label: object) -> tuple[float, float]:
    """(score of image 0, score of image 1) of a label_0: 1 the first wins, 0 the second, 0.5 a tie.

    >>> label_scores(0)
    (0.0, 1.0)

    Raises:
        ValueError: anything else; the column has the wrong type, or is not label_0 at all.
    """
    if isinstance(label, bool) or not isinstance(label, (int, float)) or label not in (0, 0.5, 1):
        raise ValueError(f"expected label_0 to be 1 (image 0 wins), 0 (image 1 wins) or 0.5 (tie), got {label!r}")
    return float(label), 1 - float(label)
