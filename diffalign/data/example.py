"""An example: what a training step takes of a record, and how its pictures are framed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffalign.data.images import Frame, frame, framed_regions, resize_and_crop
from diffalign.data.records import ImageSource, PreferenceRecord


@dataclass(frozen=True)
class Crop:
    """How pictures become pixels; all of it is part of the cache key."""

    size: tuple[int, int]  # (height, width)
    place: tuple[float, float] = (0.5, 0.5)
    flip: bool = False


@dataclass(frozen=True)
class Example:
    """K pictures of a record, best first, each under its prompt, all framed alike.

    Attributes:
        members: indices of record.images; the same one twice where one picture stands under two prompts.
        prompts: one per member.
        label: P(the first is better than the second): 1, or 1/2 for a tie. Of a thumb: 1 liked, 0 disliked.
    """

    record: PreferenceRecord
    crop: Crop
    members: tuple[int, ...]
    prompts: tuple[str, ...]
    label: float = 1.0

    @property
    def prompt(self) -> str:
        """Of the record: what splits and groups go by, whatever captions the members have."""
        return self.record.prompt

    @property
    def winner(self) -> int:
        """Index of the best picture."""
        return self.members[0]

    @property
    def loser(self) -> int:
        """Index of the worst picture."""
        return self.members[-1]

    @property
    def scores(self) -> tuple[float, ...]:
        """The record's scores of the members."""
        return tuple(self.record.scores[member] for member in self.members)

    @property
    def signs(self) -> tuple[int, ...] | tuple[tuple[int, ...], ...] | None:
        """Labels of segments, or of regions as the crop shows them: +1 where the first member is the better one."""
        if len(self.members) < 2:
            return None
        side = 1 if self.members[0] < self.members[-1] else -1
        if self.record.segments is not None:
            return tuple(side * sign for sign in self.record.segments)
        if self.record.regions is None:
            return None
        crop = self.crop
        framed = framed_regions(self.record.regions, self.sources[0].size, crop.size, crop.place, crop.flip)
        return tuple(tuple(side * sign for sign in row) for row in framed)

    @property
    def sources(self) -> tuple[ImageSource, ...]:
        """Where the members' bytes are."""
        return tuple(self.record.images[member] for member in self.members)

    def cache_keys(self) -> tuple[str, ...]:
        """Of each member: the file's bytes and the crop."""
        (height, width), (vertical, horizontal) = self.crop.size, self.crop.place
        framing = f"{height}x{width} crop {vertical!r},{horizontal!r} flip {self.crop.flip:d}"
        return tuple(f"{source.sha256} {framing}" for source in self.sources)

    @property
    def frame(self) -> Frame:
        """Of the winner. An example has one frame, and it is the winner that a policy is to say under it."""
        if not self.members:
            return frame(self.crop.size, self.crop.size, self.crop.place, self.crop.flip)
        return frame(self.sources[0].size, self.crop.size, self.crop.place, self.crop.flip)

    def pixels(self) -> tuple[Tensor, ...]:
        """uint8 [3, H, W] of each member.

        Raises:
            ValueError: a picture that cannot be read; the example is to be dropped whole.
        """
        crop = self.crop
        return tuple(
            resize_and_crop(source.decode(self.record.source), crop.size, crop.place, crop.flip)
            for source in self.sources
        )
