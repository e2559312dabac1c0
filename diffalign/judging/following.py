"""One page for all that a run asks people while it learns from them: each of its rollouts is a folder of its own."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.judging.session import Session
from diffalign.manifests import Entry

log = logging.getLogger("diffalign")


@dataclass(frozen=True)
class Following:
    """The sessions of the folders that there are, in the order in which they came; the page sees one of them.

    Attributes:
        known: the folders that can be judged by now.
        opened: folder -> its session.
        asked: what is asked before the first folder is there.
    """

    known: Callable[[], Sequence[Path]]
    opened: Callable[[Path], Session]
    asked: str = "best"
    sessions: dict[Path, Session] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ask(self) -> str:
        """What is asked of the latest pictures."""
        return self._open[-1].ask if self._open else self.asked

    @property
    def count(self) -> None:
        """How many groups there will be is not known."""
        return None

    @property
    def pictures(self) -> Mapping[str, Entry]:
        """sha256 -> picture: all that a page may ask for."""
        return {sha256: entry for session in self._open for sha256, entry in session.pictures.items()}

    def look(self, judge: str) -> dict[str, Any]:
        """`Session.look` of all folders, after taking in those that are new."""
        self.refresh()
        return self._shown([session.look(judge) for session in self._open])

    def choose(self, judge: str, group: str, verdict: str, picks: Sequence[str]) -> dict[str, Any]:
        """`Session.choose` of the folder that has the group.

        Raises:
            ValueError: not a group of any folder, or not an answer to it.
            OSError: it could not be saved.
        """
        session = next((s for s in self._open if group in s.by_key), None)
        if session is None:
            raise ValueError("this group is not among those that are judged here: load the page again")
        session.choose(judge, group, verdict, picks)
        return self.look(judge)

    def undo(self, judge: str) -> dict[str, Any]:
        """`Session.undo` of the latest folder of which this judge has said anything."""
        sessions = self._open
        for session in reversed(sessions):
            if session.look(judge)["judged"]:
                again = session.undo(judge)
                return self._shown([again, *(other.look(judge) for other in sessions if other is not session)])
        return self.look(judge)

    def retake(self, judge: str) -> dict[str, Any]:
        """`Session.retake` of all folders."""
        for session in self._open:
            session.retake(judge)
        return self.look(judge)

    def refresh(self) -> None:
        """Opens what is new; a folder that cannot be opened yet is tried again at the next look."""
        with self._lock:
            for folder in self.known():
                if folder not in self.sessions:
                    try:
                        self.sessions[folder] = self.opened(folder)
                    except (ValueError, OSError) as error:
                        log.warning("%s cannot be judged yet: %s", folder, error)

    @property
    def _open(self) -> list[Session]:
        """A list of its own, since another judge's look may take in a folder meanwhile."""
        return list(self.sessions.values())

    def _shown(self, looks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Counts of all; the group of the first that has one."""
        counts = sum((Counter({key: look[key] for key in COUNTED}) for look in looks), Counter())
        turn = next((look for look in looks if look["group"]), None)
        ask = turn["ask"] if turn else self.ask
        return {**{key: counts[key] for key in COUNTED}, "ask": ask, "waiting": True,
                "group": turn["group"] if turn else None, "ahead": turn["ahead"] if turn else []}  # fmt: skip


COUNTED = ("judged", "of", "chosen", "ties", "skipped")
