"""What a judge sees next and what becomes of an answer; the page and its server only pass it on."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.judging.groups import Group
from diffalign.judging.store import CHOSEN, SKIP, TIE, Choice, Store
from diffalign.manifests import Entry

LONGEST_NAME = 80


@dataclass(frozen=True)
class Session:
    """The groups of one folder, one database, any number of judges.

    Attributes:
        ask: a row of `diffalign.judging.groups.ASKS`.
        seed: of the places in which pictures are shown.
    """

    groups: Sequence[Group]
    store: Store
    ask: str
    seed: int = 0

    @property
    def count(self) -> int:
        """How many groups there are to judge."""
        return len(self.groups)

    @functools.cached_property
    def by_key(self) -> Mapping[str, Group]:
        """Key -> group, in order."""
        return {group.key: group for group in self.groups}

    @functools.cached_property
    def pictures(self) -> Mapping[str, Entry]:
        """sha256 -> picture: all that a page may ask for."""
        return {sha256: entry for group in self.groups for sha256, entry in group.pictures.items()}

    def look(self, judge: str, at: str | None = None) -> dict[str, Any]:
        """How far a judge is and the group to judge: `at`, or the first without an answer; None at the end.

        `waiting` is whether more groups are to come.
        """
        said = {choice.group: choice.verdict for choice in self._said(judge)}
        left = [key for key in self.by_key if key not in said]
        turn = [at, *(key for key in left if key != at)] if at else left
        counts = Counter(said.values())
        return {
            "judged": len(said),
            "of": len(self.by_key),
            "chosen": counts[CHOSEN],
            "ties": counts[TIE],
            "skipped": counts[SKIP],
            "group": self._shown(turn[0], judge) if turn else None,
            "ahead": self._shown(turn[1], judge)["pictures"] if turn[1:] else [],
            "ask": self.ask,
            "waiting": False,
        }

    def choose(self, judge: str, group: str, verdict: str, picks: Sequence[str]) -> dict[str, Any]:
        """Saves an answer, then the next group; an answer to a group that has one takes its place.

        Raises:
            ValueError: not a group of this session, or not an answer to it.
            OSError: it could not be saved.
        """
        found = self.by_key.get(group)
        if found is None:
            raise ValueError("this group is not among those that are judged here: load the page again")
        _check(found, verdict, picks, len(found.pictures) if self.ask == "order" else 1)
        shown = tuple(found.shuffled(judge, self.seed))
        self.store.add(Choice(judge, group, verdict, tuple(picks), shown))
        return self.look(judge)

    def undo(self, judge: str) -> dict[str, Any]:
        """Takes the last answer of a judge back and asks for it again; nothing happens where there is none."""
        if not (said := self._said(judge)):
            return self.look(judge)
        self.store.undo(judge, [said[-1].group])
        return self.look(judge, at=said[-1].group)

    def retake(self, judge: str) -> dict[str, Any]:
        """Asks again for all that a judge has skipped."""
        self.store.undo(judge, [choice.group for choice in self._said(judge) if choice.verdict == SKIP])
        return self.look(judge)

    def _said(self, judge: str) -> list[Choice]:
        return [choice for choice in self.store.choices(judge) if choice.group in self.by_key]

    def _shown(self, key: str, judge: str) -> dict[str, Any]:
        group = self.by_key[key]
        return {"key": key, "prompt": group.prompt, "pictures": group.shuffled(judge, self.seed)}


def named(judge: object) -> str:
    """A judge's name, spaces put right.

    >>> named("  Ada   L. ")
    'Ada L.'

    Raises:
        ValueError: not a text of 1 to 80 characters that can be printed.
    """
    name = " ".join(judge.split()) if isinstance(judge, str) else ""
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise ValueError(f"expected the judge's name, 1 to {LONGEST_NAME} characters, got {str(judge)[:100]!r}")
    return name


def _check(group: Group, verdict: str, picks: Sequence[str], count: int) -> None:
    wanted = {CHOSEN: count, TIE: 0, SKIP: 0}.get(verdict)
    if wanted is None:
        raise ValueError(f"expected {CHOSEN}, {TIE} or {SKIP}, got {verdict!r}")
    if len(picks) != wanted or len(set(picks)) != wanted or not set(picks) <= group.pictures.keys():
        raise ValueError(f"expected {wanted} of the pictures of the group, got {len(picks)}")
