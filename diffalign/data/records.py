"""The one schema of preference data, whatever file it came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImageSource:
    """The bytes of an image file, or the path to read them from when they are needed."""

    content: bytes | Path

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            ValueError: the file is missing or not readable.
        """
        if isinstance(self.content, bytes):
            return self.content
        try:
            return self.content.read_bytes()
        except OSError as error:
            raise ValueError(f"image {self.content} cannot be read ({error.strerror})") from error

    @property
    def sha256(self) -> str:
        """Of the file's bytes: what caches are keyed by."""
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True)
class PreferenceRecord:
    """One prompt, two or more pictures (or clips) of it, and what was preferred.

    Attributes:
        scores: one per image, higher is better; equal scores are a tie. A label of 1 against 0 is (1.0, 0.0).
        source: where the row came from, for messages: "train.parquet row 17".
        prompt_loser: the loser's own caption, when the members of a pair have two (DCPO).
        segments: one label in {-1, 0, 1} per temporal segment of a clip pair (DenseDPO).
        user: who preferred (personalization).
    """

    prompt: str
    images: tuple[ImageSource, ...]
    scores: tuple[float, ...]
    source: str
    user: str | None = None
    prompt_loser: str | None = None
    segments: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the caption is empty")
        if len(self.images) < 2 or len(self.images) != len(self.scores):
            raise ValueError(f"expected two or more images with a score each, got {len(self.images)} and "
                             f"{len(self.scores)}")  # fmt: skip

    @property
    def tie(self) -> bool:
        """Whether best and worst are equally good."""
        return max(self.scores) == min(self.scores)

    def winner_loser(self) -> tuple[ImageSource, ImageSource]:
        """The best and the worst picture; for a tie the first and the last."""
        order = sorted(range(len(self.scores)), key=lambda i: -self.scores[i])  # stable: a tie keeps its order
        return self.images[order[0]], self.images[order[-1]]


@dataclass(frozen=True)
class BrokenRow:
    """A row that was dropped whole, and why."""

    source: str
    reason: str


Row = PreferenceRecord | BrokenRow


def make_record(source: str, prompt: object, images: list[ImageSource], scores: list[float], **extra: str | None) -> Row:
    """A record, or the `BrokenRow` that says what is wrong with it."""
    if not isinstance(prompt, str):
        return BrokenRow(source, f"expected the caption as text, got {prompt!r}")
    try:
        return PreferenceRecord(prompt, tuple(images), tuple(scores), source, user=extra.get("user"),
                                prompt_loser=extra.get("prompt_loser"))  # fmt: skip
    except ValueError as error:
        return BrokenRow(source, str(error))


def label_scores(label: object, source: str) -> tuple[float, float]:
    """(score of image 0, score of image 1) of a label_0: 1 the first wins, 0 the second, 0.5 a tie.

    Raises:
        ValueError: anything else; the column has the wrong type, or is not label_0 at all.
    """
    if isinstance(label, bool) or not isinstance(label, (int, float)) or label not in (0, 0.5, 1):
        raise ValueError(f"{source}: expected label_0 to be 1 (image 0 wins), 0 (image 1 wins) or 0.5 (tie), got {label!r}")
    return float(label), 1 - float(label)
