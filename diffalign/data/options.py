"""The keys of a config's `data` section that every data set has, and what a run asks of its pictures."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from diffalign.data import DATASETS
from diffalign.table import coerce, resolve, split_section, unknown

TIES = {"drop": "dropped", "half": "kept with label 1/2", "random": "broken at random"}
RANKINGS = ("best_worst", "all")


@dataclass(frozen=True)
class DataOptions:
    """Keys of a `data` section that every row of DATASETS has, beside the keywords of its reader."""

    tie: str = "drop"  # drop | half (label 1/2) | random (a coin, by split_seed)
    ranking: str = "best_worst"  # of three or more pictures: best_worst | all pairs
    val_fraction: float = 0.05  # share of *prompts* that is held out
    max_pairs: int | None = None  # stop reading when so many pairs are there
    buckets: bool | int = False  # aspect-ratio buckets instead of square crops: true (multiples of 64), or the multiple
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.tie not in TIES:
            raise ValueError(f"data.tie: expected one of {', '.join(TIES)}, got {self.tie!r}")
        if self.ranking not in RANKINGS:
            raise ValueError(f"data.ranking: expected one of {', '.join(RANKINGS)}, got {self.ranking!r}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction: expected at least 0 and less than 1, got {self.val_fraction}")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ValueError(f"data.max_pairs: expected at least 1, or leave it out, got {self.max_pairs}")
        if self.buckets < 0:
            raise ValueError(f"data.buckets: expected true, false, or a number of pixels, got {self.buckets}")

    @property
    def bucket_step(self) -> int:
        """The multiple of which both sides of a bucket are; 0 for square crops."""
        return 64 if self.buckets is True else int(self.buckets)


@dataclass(frozen=True)
class Framing:
    """How a run wants its pictures or clips: the crop, and whether its place and a flip are drawn (by seed).

    Attributes:
        resolution: the side of a square crop, and of buckets.
        crop: (height, width) of one that is not square; buckets go before it.
        frames: of a clip; None for pictures.
        fps: frames a second that clips are seen at; None: every frame of a file.
    """

    resolution: int
    random_crop: bool = False
    random_flip: bool = False
    seed: int = 0
    crop: tuple[int, int] | None = None
    frames: int | None = None
    fps: float | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the crop, buckets left aside."""
        return self.crop or (self.resolution, self.resolution)


def parse_section(section: Mapping[str, Any]) -> tuple[DataOptions, dict[str, Any]]:
    """The options that all data sets share, and the rest: the section of the reader.

    Raises:
        ValueError: an unknown name or key, with the nearest one, or a value of the wrong type.
    """
    name, keywords = split_section(section, "data")
    shared = [field.name for field in fields(DataOptions)]
    own = list(inspect.signature(resolve(DATASETS, name, "data")).parameters)
    for key in keywords:
        if key not in (*own, *shared):
            raise unknown(f"key of data {name!r}", key, [*own, *shared])
    hints = get_type_hints(DataOptions)
    given = {key: coerce(keywords[key], hints[key], f"data.{key}") for key in shared if key in keywords}
    return DataOptions(**given), {"name": name, **{key: v for key, v in keywords.items() if key not in shared}}
