"""What a run trains on: which examples of which records, in which split, and all that was left out."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from diffalign.answers import Unreached
from diffalign.data import DATASETS
from diffalign.data.example import Example
from diffalign.data.options import TIES, DataOptions, Framing, parse_section
from diffalign.data.records import BrokenRow, PreferenceRecord, Row
from diffalign.data.views import View, pairs
from diffalign.table import build

log = logging.getLogger("diffalign")

NAMED = 20  # broken rows that are named one by one in the log
MEMORY = 8 << 30  # bytes of streamed pictures that a set of pairs may hold
CHUNK = 64  # records that are decoded at a time, by as many threads as there are cores
PROGRESS = 10_000  # rows between two lines of the log that say how far reading is


@dataclass(frozen=True)
class Examples:
    """Usable examples of both splits, and the count of everything that was left out. Pictures stay where they are."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    ties: int
    tie_policy: str
    broken: tuple[BrokenRow, ...]
    contradicted: int = 0  # pairs of pictures that are preferred one way in one row and the other way in another

    def summary(self) -> str:
        """One line for the log: what is there, what was dropped, what happened to ties."""
        text = f"{len(self.train)} training and {len(self.validation)} validation {self._kind}; {self.ties} ties "
        text += TIES[self.tie_policy]
        if self.broken:
            first = self.broken[0]
            text += f"; {len(self.broken)} broken rows dropped, the first {first.source}: {first.reason}"
        if self.contradicted:
            text += f"; {self.contradicted} pairs of pictures are labeled both ways, and pull both ways"
        return text

    @property
    def _kind(self) -> str:
        sizes = {len(example.members) for example in (*self.train, *self.validation)}
        return "lists" if len(sizes) > 1 else {0: "prompts", 1: "pictures", 2: "pairs"}.get(sizes.pop(), "lists")


def load_examples(
    section: Mapping[str, Any],
    framing: Framing | int,
    view: View = pairs,
) -> Examples:
    """Reads a `data` section of a config: a row of DATASETS with its keywords, and those of `DataOptions`.

    `framing` may be a resolution alone. `view` says what a record is to the method, see `diffalign.data.views`; a row
    that it cannot use is a broken one.

    Every picture or clip is decoded once here, so that a broken row is known, and dropped whole, before training
    starts. What stays in memory is light (prompts, labels, hashes), but for the pictures of a stream.

    Raises:
        ValueError: nothing usable, a bad keyword, or a stream that is too large to be held.
    """
    options, reader = parse_section(section)
    framing = Framing(framing) if isinstance(framing, int) else framing
    examples: list[Example] = []
    broken: list[BrokenRow] = []
    ties = records = held = 0
    for number, row in enumerate(checked(build(DATASETS, reader, what="data"), framing), start=1):
        if number % PROGRESS == 0:
            log.info("data: %d rows read, %d of them broken", number, len(broken))
        if isinstance(row, BrokenRow):
            broken.append(row)
            continue
        records += 1
        ties += len(row.images) > 1 and row.tie
        made = examples_of(row, view, options, framing)
        if isinstance(made, BrokenRow):
            broken.append(made)
            continue
        examples += made
        held += sum(len(image.content) for image in row.images if made and isinstance(image.content, bytes))
        if options.max_pairs and len(examples) >= options.max_pairs:
            break
        if held > MEMORY:
            raise ValueError(f"data {reader['name']!r}: the pictures of {len(examples)} streamed examples fill "
                             f"{MEMORY >> 30} GiB of memory; set data.max_pairs, or give files on "
                             f"disk: parquet, or tar shards that are not compressed")  # fmt: skip
    examples = examples[: options.max_pairs]
    _name_broken(broken)
    _count_enlarged(examples)
    if not examples:
        reasons = Counter(row.reason for row in broken).most_common(1)
        why = f": {reasons[0][0]}" if reasons else ""
        raise ValueError(f"data {reader['name']!r}: no usable training example; {records} readable records, "
                         f"{ties} ties ({options.tie}), {len(broken)} broken rows{why}")  # fmt: skip
    held_out = held_out_prompts([example.prompt for example in examples], options.val_fraction, options.split_seed)
    train = tuple(example for example in examples if example.prompt not in held_out)
    validation = tuple(example for example in examples if example.prompt in held_out)
    return Examples(train, validation, ties, options.tie, tuple(broken), contradictions(examples))


def contradictions(examples: Sequence[Example]) -> int:
    """How many pairs of pictures of one prompt one user prefers one way in one record and the other way in another."""
    preferred = {
        ((example.prompt, example.record.user), example.sources[better].sha256, example.sources[worse].sha256)
        for example in examples
        for better, worse in itertools.combinations(range(len(example.members)), 2)
        if example.scores[better] > example.scores[worse]
    }
    return sum((prompt, worse, better) in preferred for prompt, better, worse in preferred) // 2


def iterate_examples(section: Mapping[str, Any], framing: Framing, view: View = pairs) -> Iterator[Example | BrokenRow]:
    """The examples of a `data` section one by one, in the order of the file, without holding any: for data sets that
    fit neither memory nor disk. There is no split; `max_pairs` is kept to.

    Raises:
        ValueError: a bad keyword, or a layout that is not what it says it is.
    """
    options, reader = parse_section(section)
    left = options.max_pairs
    for row in checked(build(DATASETS, reader, what="data"), framing):
        if isinstance(row, BrokenRow):
            yield row
            continue
        made = examples_of(row, view, options, framing)
        if isinstance(made, BrokenRow):
            yield made
            continue
        made = made[:left]
        yield from made
        left = None if left is None else left - len(made)
        if left == 0:
            return


def examples_of(
    record: PreferenceRecord, view: View, options: DataOptions, framing: Framing
) -> list[Example] | BrokenRow:
    """What a view sees in a readable record, or why it cannot see anything.

    Raises:
        Unreached: the view asks an endpoint, and nobody answers there.
    """
    try:
        return view(record, options, framing)
    except Unreached:  # of a perturber's endpoint: no later row would do better
        raise
    except ValueError as error:
        return BrokenRow(record.source, str(error))


def checked(rows: Iterable[Row], framing: Framing) -> Iterator[Row]:
    """Rows in their order, with a broken row in place of a record of which any picture or clip cannot be used."""
    rows = iter(rows)
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(rows, CHUNK)):
            yield from pool.map(functools.partial(_checked, framing=framing), chunk)


def _checked(row: Row, framing: Framing) -> Row:
    if isinstance(row, BrokenRow):
        return row
    try:
        for number, image in enumerate(row.images):
            if framing.frames is None:
                image.decode(f"image {number}")
            else:
                image.clip(f"clip {number}", framing.frames, framing.fps)
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


def _count_enlarged(examples: Sequence[Example]) -> None:
    """One line of the log where pictures are blown up to the size of the crop, which makes none of them sharper."""
    small = [
        (example, source.size)
        for example in examples
        for source in example.sources
        if source.size[0] < example.crop.size[0] or source.size[1] < example.crop.size[1]
    ]
    if small:
        example, size = small[0]
        log.warning("%d of %d pictures are smaller than the crop and are enlarged, such as one of %s (%d x %d for "
                    "%d x %d): a lower resolution avoids that",
                    len(small), sum(len(e.members) for e in examples), example.record.source, *size,
                    *example.crop.size)  # fmt: skip


def _name_broken(broken: Sequence[BrokenRow]) -> None:
    for row in broken[:NAMED]:
        log.warning("dropped %s: %s", row.source, row.reason)
    if len(broken) > NAMED:
        log.warning("... and %d more broken rows", len(broken) - NAMED)
