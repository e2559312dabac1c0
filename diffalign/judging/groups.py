"""What is judged: the pictures of one prompt, known by the hashes of their bytes, in the places of each judge."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from diffalign.console import progress_bar
from diffalign.data.records import BrokenRow
from diffalign.manifests import Entry

LEFT_OUT = {  # what is counted as left out, and how it is said
    "rows": "rows of the manifest that cannot be used",
    "broken": "prompts with a picture or a text that cannot be used",
    "repeated": "pictures that were there before under the same prompt",
    "alone": "prompts with fewer than two pictures left",
}


@dataclass(frozen=True)
class Group:
    """Two or more different pictures of one prompt.

    Attributes:
        pictures: sha256 of the file -> the picture, in the manifest's order.
    """

    prompt: str
    pictures: Mapping[str, Entry]

    @functools.cached_property
    def key(self) -> str:
        """Hash of the prompt and of the pictures, whatever their order and names: a choice belongs to these alone."""
        return hashlib.sha256(json.dumps([self.prompt, sorted(self.pictures)]).encode()).hexdigest()

    def shuffled(self, judge: str, seed: int) -> list[str]:
        """The pictures as this judge sees them, always the same way: no place is preferred over all judges."""
        return sorted(self.pictures, key=lambda picture: _draw(seed, judge, self.key, picture))


@dataclass(frozen=True)
class Found:
    """The groups of a manifest in its order, and what was left out: named one by one, and counted as in `LEFT_OUT`."""

    groups: Sequence[Group]
    broken: Sequence[BrokenRow] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


def together(found: Sequence[Found]) -> Found:
    """What was found in several folders, as one."""
    return Found(
        [group for one in found for group in one.groups],
        [row for one in found for row in one.broken],
        sum((Counter(one.counts) for one in found), Counter()),
    )


def _whole(group: Group) -> Iterator[Group]:
    yield group


def _pairs(group: Group) -> Iterator[Group]:
    for pair in itertools.combinations(group.pictures.items(), 2):
        yield Group(group.prompt, dict(pair))


ASKS: dict[str, Callable[[Group], Iterator[Group]]] = {  # what a judge is asked -> the groups that are shown for it
    "best": _whole,
    "order": _whole,
    "pairs": _pairs,
}


def read_groups(listed: Iterable[Entry | BrokenRow], ask: str) -> Found:
    """The pictures of each prompt, every one decoded once; a group with one that cannot be used is left out whole.

    Args:
        ask: a row of `ASKS`.
    """
    prompts: dict[str, list[Entry]] = defaultdict(list)
    broken: list[BrokenRow] = []
    for row in listed:
        if isinstance(row, BrokenRow):
            broken.append(row)
        else:
            prompts[row.prompt].append(row)
    counts = Counter(rows=len(broken))
    groups: list[Group] = []
    with progress_bar("reading pictures", len(prompts)) as advance, ThreadPoolExecutor() as pool:
        for found in pool.map(_read, prompts, prompts.values()):
            advance(1)
            if isinstance(found, BrokenRow):
                counts["broken"] += 1
                broken.append(found)
                continue
            counts["repeated"] += len(prompts[found.prompt]) - len(found.pictures)
            if len(found.pictures) < 2:
                counts["alone"] += 1
            else:
                groups += ASKS[ask](found)
    return Found(groups, broken, counts)


def _read(prompt: str, entries: Sequence[Entry]) -> Group | BrokenRow:
    if not prompt.strip():
        return BrokenRow(entries[0].where, "the prompt is empty")
    pictures: dict[str, Entry] = {}
    try:
        for entry in entries:
            entry.source.decode(entry.image)  # as training will
            pictures.setdefault(entry.source.sha256, entry)
    except ValueError as error:
        return BrokenRow(f"the group of {prompt!r}", str(error))
    return Group(prompt, pictures)


def _draw(*parts: object) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()
