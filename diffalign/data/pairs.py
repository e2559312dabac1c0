"""Training pairs: which records, in which split, with which label, as pixels when they are asked for."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.data import DATASETS
from diffalign.data.images import bucket, decode, resize_and_crop
from diffalign.data.records import BrokenRow, PreferenceRecord, Row
from diffalign.table import build, split_section

log = logging.getLogger("diffalign")

TIES = ("drop", "half", "random")
SPLIT_KEYS = ("tie", "val_fraction", "max_pairs", "buckets", "split_seed")


@dataclass(frozen=True)
class View:
    """How a pair's pictures become pixels; all of it is part of the cache key."""

    size: tuple[int, int]  # (height, width)
    crop: tuple[float, float] = (0.5, 0.5)
    flip: bool = False


@dataclass(frozen=True)
class Pair:
    """A prompt, its winner and loser, the view that both share, and P(the winner is the better one): 1, or 0.5 for a tie."""

    record: PreferenceRecord
    view: View
    label: float
    swapped: bool = False  # a tie broken at random may make the second picture the winner

    @property
    def prompt(self) -> str:
        return self.record.prompt

    def keys(self) -> tuple[str, str]:
        """Cache keys of winner and loser: the file's bytes and the view."""
        winner, loser = (f"{source.sha256}/{self.view}" for source in self._sources())
        return winner, loser

    def pixels(self) -> tuple[Tensor, Tensor]:
        """uint8 [3, H, W] of winner and loser.

        Raises:
            ValueError: a picture that cannot be read; the pair is to be dropped whole.
        """
        views = [
            resize_and_crop(decode(source.read(), self.record.source), self.view.size, self.view.crop, self.view.flip)
            for source in self._sources()
        ]
        return views[0], views[1]

    def _sources(self) -> tuple:  # type: ignore[type-arg]
        winner, loser = self.record.winner_loser()
        return (loser, winner) if self.swapped else (winner, loser)


@dataclass(frozen=True)
class Pairs:
    """Usable pairs of both splits, and the count of everything that was left out."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    ties: int
    tie_policy: str
    broken: tuple[BrokenRow, ...]

    def summary(self) -> str:
        """One line for the log: what is there, what was dropped, what happened to ties."""
        did = {"drop": "dropped", "half": "kept with label 1/2", "random": "broken at random"}[self.tie_policy]
        text = f"{len(self.train)} training and {len(self.validation)} validation pairs; {self.ties} ties {did}"
        if self.broken:
            first = self.broken[0]
            text += f"; {len(self.broken)} broken rows dropped, the first {first.source}: {first.reason}"
        return text


def load_pairs(
    section: dict,  # type: ignore[type-arg]
    resolution: int,
    *,
    random_crop: bool = False,
    random_flip: bool = False,
    seed: int = 0,
) -> Pairs:
    """Reads a `data` section of a config: a row of DATASETS with its keywords, and these of every data set:

        tie: drop (default) | half | random     val_fraction: share of *prompts* held out (0.05)
        max_pairs: read no more than so many    buckets: true for aspect-ratio buckets instead of square crops
        split_seed: of the split by prompt, and of ties broken at random (0)

    Every picture is decoded once here, so that a broken row is known, and dropped whole, before training starts.

    Raises:
        ValueError: nothing usable, or a bad keyword.
    """
    name, keywords = split_section(section, "data")
    options = {key: keywords.pop(key) for key in SPLIT_KEYS if key in keywords}
    tie = options.get("tie", "drop")
    if tie not in TIES:
        raise ValueError(f"data.tie: expected one of {', '.join(TIES)}, got {tie!r}")
    limit, split_seed = options.get("max_pairs"), options.get("split_seed", 0)
    records, broken = collect(build(DATASETS, {"name": name, **keywords}, what="data"), limit)
    usable, ties = _apply_tie_policy(records, tie, split_seed)
    views = [_view(r, resolution, bool(options.get("buckets")), random_crop, random_flip, seed) for r, _, _ in usable]
    pairs = [Pair(r, v, label, swapped) for (r, label, swapped), v in zip(usable, views, strict=True)]
    held_out = held_out_prompts([p.prompt for p in pairs], float(options.get("val_fraction", 0.05)), split_seed)
    train = tuple(p for p in pairs if p.prompt not in held_out)
    if not train:
        reasons = Counter(row.reason for row in broken).most_common(1)
        raise ValueError(f"data {name!r}: no usable training pair; {len(records)} readable records, {ties} ties "
                         f"({tie}), {len(broken)} broken rows{': ' + reasons[0][0] if reasons else ''}")  # fmt: skip
    return Pairs(train, tuple(p for p in pairs if p.prompt in held_out), ties, tie, tuple(broken))


def collect(rows: Iterable[Row], limit: int | None = None) -> tuple[list[PreferenceRecord], list[BrokenRow]]:
    """Readable records, and broken rows with those whose pictures do not decode; stops at `limit` records."""
    records: list[PreferenceRecord] = []
    broken: list[BrokenRow] = []
    for row in rows:
        if isinstance(row, PreferenceRecord):
            row = checked(row)
        if isinstance(row, BrokenRow):
            broken.append(row)
            continue
        records.append(row)
        if limit is not None and len(records) >= limit:
            break
    return records, broken


def checked(record: PreferenceRecord) -> Row:
    """The record, or a broken row if any of its pictures cannot be read."""
    try:
        for source in record.images:
            decode(source.read(), record.source)
    except ValueError as error:
        return BrokenRow(record.source, str(error).removeprefix(f"{record.source}: "))
    return record


def held_out_prompts(prompts: Sequence[str], fraction: float, seed: int) -> frozenset[str]:
    """A share of the distinct prompts; by prompt and not by row, or validation would have been trained on."""
    distinct = sorted(set(prompts))
    random.Random(f"held-out/{seed}").shuffle(distinct)
    return frozenset(distinct[: round(fraction * len(distinct))])


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch: a permutation that follows from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def _apply_tie_policy(
    records: list[PreferenceRecord], tie: str, seed: int
) -> tuple[list[tuple[PreferenceRecord, float, bool]], int]:
    usable = []
    ties = 0
    for index, record in enumerate(records):
        if not record.tie:
            usable.append((record, 1.0, False))
            continue
        ties += 1
        if tie == "half":
            usable.append((record, 0.5, False))
        elif tie == "random":
            usable.append((record, 1.0, random.Random(f"tie/{seed}/{index}").random() < 0.5))
    return usable, ties


def _view(record: PreferenceRecord, resolution: int, buckets: bool, crop: bool, flip: bool, seed: int) -> View:
    size = (resolution, resolution)
    if buckets:  # both members in one bucket: that of the winner
        picture = decode(record.winner_loser()[0].read(), record.source)
        size = bucket(picture.width, picture.height, resolution)
    rng = random.Random(f"view/{seed}/{record.source}")
    where = (rng.random(), rng.random()) if crop else (0.5, 0.5)
    return View(size, where, flip and rng.random() < 0.5)
