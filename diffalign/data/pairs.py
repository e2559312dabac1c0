"""Training pairs: which records, in which split, with which label, as pixels when they are asked for."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.data import DATASETS
from diffalign.data.images import Frame, bucket, frame, resize_and_crop
from diffalign.data.options import TIES, Framing, PairOptions, parse_section
from diffalign.data.records import BrokenRow, ImageSource, PreferenceRecord, Row
from diffalign.table import build

log = logging.getLogger("diffalign")

NAMED = 20  # broken rows that are named one by one in the log
MEMORY = 8 << 30  # bytes of streamed pictures that a set of pairs may hold
CHUNK = 64  # records that are decoded at a time, by as many threads as there are cores
PROGRESS = 10_000  # rows between two lines of the log that say how far reading is


@dataclass(frozen=True)
class View:
    """How a pair's pictures become pixels; all of it is part of the cache key."""

    size: tuple[int, int]  # (height, width)
    crop: tuple[float, float] = (0.5, 0.5)
    flip: bool = False


@dataclass(frozen=True)
class Pair:
    """Two pictures of a record, the view that both share, and P(the winner is the better one): 1, or 1/2 for a tie."""

    record: PreferenceRecord
    view: View
    label: float
    winner: int  # indices of record.images
    loser: int

    @property
    def prompt(self) -> str:
        return self.record.prompt

    @property
    def sources(self) -> tuple[ImageSource, ImageSource]:
        """Winner and loser."""
        return self.record.images[self.winner], self.record.images[self.loser]

    def cache_keys(self) -> tuple[str, str]:
        """Of winner and loser: the file's bytes and the view."""
        (height, width), (vertical, horizontal) = self.view.size, self.view.crop
        view = f"{height}x{width} crop {vertical!r},{horizontal!r} flip {self.view.flip:d}"
        winner, loser = (f"{source.sha256} {view}" for source in self.sources)
        return winner, loser

    @property
    def frame(self) -> Frame:
        """Of the winner. A pair has one condition, and it is the winner that a policy is to say under it."""
        return frame(self.sources[0].size, self.view.size, self.view.crop, self.view.flip)

    def pixels(self) -> tuple[Tensor, Tensor]:
        """uint8 [3, H, W] of winner and loser.

        Raises:
            ValueError: a picture that cannot be read; the pair is to be dropped whole.
        """
        view = self.view
        winner, loser = (
            resize_and_crop(source.decode(self.record.source), view.size, view.crop, view.flip)
            for source in self.sources
        )
        return winner, loser


@dataclass(frozen=True)
class Pairs:
    """Usable pairs of both splits, and the count of everything that was left out. Pictures stay where they are."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    ties: int
    tie_policy: str
    broken: tuple[BrokenRow, ...]

    def summary(self) -> str:
        """One line for the log: what is there, what was dropped, what happened to ties."""
        text = f"{len(self.train)} training and {len(self.validation)} validation pairs; {self.ties} ties "
        text += TIES[self.tie_policy]
        if self.broken:
            first = self.broken[0]
            text += f"; {len(self.broken)} broken rows dropped, the first {first.source}: {first.reason}"
        return text


def load_pairs(
    section: Mapping[str, Any],
    resolution: int,
    *,
    random_crop: bool = False,
    random_flip: bool = False,
    seed: int = 0,
) -> Pairs:
    """Reads a `data` section of a config: a row of DATASETS with its keywords, and those of `PairOptions`.

    Every picture is decoded once here, so that a broken row is known, and dropped whole, before training starts. What
    stays in memory is light (prompts, labels, hashes), but for the pictures of a stream.

    Raises:
        ValueError: nothing usable, a bad keyword, or a stream that is too large to be held.
    """
    options, reader = parse_section(section)
    framing = Framing(resolution, random_crop, random_flip, seed)
    pairs: list[Pair] = []
    broken: list[BrokenRow] = []
    ties = records = held = 0
    for number, row in enumerate(checked(build(DATASETS, reader, what="data")), start=1):
        if number % PROGRESS == 0:
            log.info("data: %d rows read, %d of them broken", number, len(broken))
        if isinstance(row, BrokenRow):
            broken.append(row)
            continue
        records += 1
        ties += row.tie
        made = make_pairs(row, options, framing)
        pairs += made
        held += sum(len(image.content) for image in row.images if made and isinstance(image.content, bytes))
        if options.max_pairs and len(pairs) >= options.max_pairs:
            break
        if held > MEMORY:
            raise ValueError(f"data {reader['name']!r}: the pictures of {len(pairs)} streamed pairs fill "
                             f"{MEMORY >> 30} GiB of memory; set data.max_pairs, or give files on "
                             f"disk: parquet, or tar shards that are not compressed")  # fmt: skip
    pairs = pairs[: options.max_pairs]
    _name_broken(broken)
    _count_enlarged(pairs)
    if not pairs:
        reasons = Counter(row.reason for row in broken).most_common(1)
        why = f": {reasons[0][0]}" if reasons else ""
        raise ValueError(f"data {reader['name']!r}: no usable training pair; {records} readable records, {ties} ties "
                         f"({options.tie}), {len(broken)} broken rows{why}")  # fmt: skip
    held_out = held_out_prompts([pair.prompt for pair in pairs], options.val_fraction, options.split_seed)
    train = tuple(pair for pair in pairs if pair.prompt not in held_out)
    return Pairs(train, tuple(pair for pair in pairs if pair.prompt in held_out), ties, options.tie, tuple(broken))


def iterate_pairs(section: Mapping[str, Any], framing: Framing) -> Iterator[Pair | BrokenRow]:
    """The pairs of a `data` section one by one, in the order of the file, without holding any: for data sets that fit
    neither memory nor disk. There is no split; `max_pairs` is kept to.

    Raises:
        ValueError: a bad keyword, or a layout that is not what it says it is.
    """
    options, reader = parse_section(section)
    left = options.max_pairs
    for row in checked(build(DATASETS, reader, what="data")):
        if isinstance(row, BrokenRow):
            yield row
            continue
        made = make_pairs(row, options, framing)[:left]
        yield from made
        left = None if left is None else left - len(made)
        if left == 0:
            return


def make_pairs(record: PreferenceRecord, options: PairOptions, framing: Framing) -> list[Pair]:
    """The training pairs of a readable record: none for a tie that is dropped, several for a ranking with "all"."""
    pairs = []
    for winner, loser in record.comparisons(options.ranking):
        tie = record.scores[winner] == record.scores[loser]
        if tie and options.tie == "drop":
            continue
        # draws follow from the content, not from the place in a file: every layout of the same pairs gives the same
        content = f"{record.prompt}/{record.images[winner].sha256}/{record.images[loser].sha256}"
        if tie and options.tie == "random" and random.Random(f"tie/{options.split_seed}/{content}").random() < 0.5:
            winner, loser = loser, winner
        label = 0.5 if tie and options.tie == "half" else 1.0
        size = _size(record.images[winner], options.bucket_step, framing.resolution)
        rng = random.Random(f"view/{framing.seed}/{content}")
        crop, flip = (rng.random(), rng.random()), rng.random() < 0.5
        view = View(size, crop if framing.random_crop else (0.5, 0.5), framing.random_flip and flip)
        pairs.append(Pair(record, view, label, winner, loser))
    return pairs


def _size(winner: ImageSource, step: int, resolution: int) -> tuple[int, int]:
    """(height, width): with buckets that of the winner, for both members."""
    if not step:
        return resolution, resolution
    height, width = winner.size
    return bucket(width, height, resolution, step)


def checked(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows in their order, with a broken row in place of a record of which any picture cannot be read and decoded."""
    rows = iter(rows)
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(rows, CHUNK)):
            yield from pool.map(_checked, chunk)


def _checked(row: Row) -> Row:
    if isinstance(row, BrokenRow):
        return row
    try:
        for number, image in enumerate(row.images):
            image.decode(f"image {number}")
            _ = image.sha256  # computed, and kept, while the bytes are near
    except ValueError as error:
        return BrokenRow(row.source, str(error))
    return row


def held_out_prompts(prompts: Sequence[str], fraction: float, seed: int) -> frozenset[str]:
    """The prompts of the validation split: by prompt and not by row, or the same prompt would be in both.

    Prompts that differ in case or spaces alone go together. Which are held out depends on their hashes, not on their
    order; at least one is left to train on.
    """
    groups: dict[str, set[str]] = {}
    for prompt in prompts:
        groups.setdefault(" ".join(prompt.casefold().split()), set()).add(prompt)
    ranked = sorted(groups, key=lambda text: hashlib.sha256(f"held-out/{seed}/{text}".encode()).digest())
    chosen = ranked[: min(round(fraction * len(ranked)), len(ranked) - 1)]
    return frozenset(prompt for text in chosen for prompt in groups[text])


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch: a permutation that follows from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def _count_enlarged(pairs: Sequence[Pair]) -> None:
    """One line of the log where pictures are blown up to the size of the crop, which makes none of them sharper."""
    small = [
        (pair, source.size)
        for pair in pairs
        for source in pair.sources
        if source.size[0] < pair.view.size[0] or source.size[1] < pair.view.size[1]
    ]
    if small:
        pair, size = small[0]
        log.warning("%d of %d pictures are smaller than the crop and are enlarged, such as one of %s (%d x %d for "
                    "%d x %d): a lower resolution avoids that",
                    len(small), 2 * len(pairs), pair.record.source, *size, *pair.view.size)  # fmt: skip


def _name_broken(broken: Sequence[BrokenRow]) -> None:
    for row in broken[:NAMED]:
        log.warning("dropped %s: %s", row.source, row.reason)
    if len(broken) > NAMED:
        log.warning("... and %d more broken rows", len(broken) - NAMED)
