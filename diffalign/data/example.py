"""An example: what a training step takes of a record, and how its pictures or clips are framed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.data.images import Frame, frame, framed_regions, resize_and_crop
from diffalign.data.records import MediaSource, PreferenceRecord


@dataclass(frozen=True)
class Crop:
    """How pictures or clips become pixels; all of it is part of the cache key."""

    size: tuple[int, int]  # (height, width)
    place: tuple[float, float] = (0.5, 0.5)
    flip: bool = False
    frames: int | None = None  # of a clip; None for a picture
    fps: float | None = None  # that the clip is seen at; None: every frame

    @property
    def extent(self) -> tuple[int, ...]:
        """(height, width), of a clip (height, width, frames): what latents' shapes follow from."""
        return self.size if self.frames is None else (*self.size, self.frames)


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
    def sources(self) -> tuple[MediaSource, ...]:
        """Where the members' bytes are."""
        return tuple(self.record.images[member] for member in self.members)

    def cache_keys(self) -> tuple[str, ...]:
        """Of each member: the file's bytes and the crop; of a clip its frames too."""
        (height, width), (vertical, horizontal) = self.crop.size, self.crop.place
        framing = f"{height}x{width} crop {vertical!r},{horizontal!r} flip {self.crop.flip:d}"
        if self.crop.frames is not None:
            framing += f" frames {self.crop.frames} fps {self.crop.fps}"
        return tuple(f"{source.sha256} {framing}" for source in self.sources)

    @property
    def frame(self) -> Frame:
        """Of the winner. An example has one frame, and it is the winner that a policy is to say under it."""
        if not self.members:
            return frame(self.crop.size, self.crop.size, self.crop.place, self.crop.flip)
        return frame(self.sources[0].size, self.crop.size, self.crop.place, self.crop.flip)

    def pixels(self) -> tuple[Tensor, ...]:
        """uint8 [3, H, W] of each member, of clips [F, 3, H, W].

        Raises:
            ValueError: a picture or clip that cannot be read; the example is to be dropped whole.
        """
        return tuple(self._framed(source) for source in self.sources)

    def _framed(self, source: MediaSource) -> Tensor:
        crop, name = self.crop, self.record.source
        pictures = [source.decode(name)] if crop.frames is None else source.clip(name, crop.frames, crop.fps)
        framed = [resize_and_crop(picture, crop.size, crop.place, crop.flip) for picture in pictures]
        return framed[0] if crop.frames is None else torch.stack(framed)
