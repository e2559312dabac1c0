"""The database of choices: each is on disk before it is answered, and none is ever deleted."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from diffalign.judging.groups import Group

log = logging.getLogger("diffalign")

MARK = 0x6A756467  # "judg": the file is ours
PATIENCE = 30.0  # seconds to wait for another writer
CHOSEN, TIE, SKIP = "chosen", "tie", "skip"
TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE groups (key TEXT PRIMARY KEY, prompt TEXT NOT NULL);
CREATE TABLE choices (
    id INTEGER PRIMARY KEY,
    judge TEXT NOT NULL,
    group_key TEXT NOT NULL REFERENCES groups (key),
    verdict TEXT NOT NULL CHECK (verdict IN ('chosen', 'tie', 'skip')),
    picks TEXT NOT NULL,
    shown TEXT NOT NULL,
    time TEXT NOT NULL,
    undone INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX choices_of_judge ON choices (judge, group_key);
"""


@dataclass(frozen=True)
class Choice:
    """What a judge said of a group.

    Attributes:
        verdict: CHOSEN, TIE or SKIP.
        picks: sha256s of what was chosen, the best first: one, or all of the group; none of a tie or a skip.
        shown: sha256s of the group by place, as the judge saw them.
    """

    judge: str
    group: str
    verdict: str
    picks: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Store:
    """A database file that `open_store` has checked. Threads and processes share the file and nothing else.

    Every method raises OSError when the file cannot be read or written.
    """

    path: Path

    def add(self, choice: Choice) -> None:
        """Saves a choice; when this returns, it is on disk."""
        row = (choice.judge, choice.group, choice.verdict, json.dumps(choice.picks), json.dumps(choice.shown),
               datetime.now(UTC).isoformat(timespec="milliseconds"))  # fmt: skip
        with connected(self.path) as db:
            db.execute("INSERT INTO choices (judge, group_key, verdict, picks, shown, time) VALUES (?, ?, ?, ?, ?, ?)",
                       row)  # fmt: skip

    def undo(self, judge: str, groups: Iterable[str]) -> None:
        """Marks all that a judge has said of these groups as undone, also what was said twice in two windows."""
        with connected(self.path) as db:
            db.executemany("UPDATE choices SET undone = 1 WHERE judge = ? AND group_key = ?",
                           [(judge, group) for group in groups])  # fmt: skip

    def choices(self, judge: str | None = None) -> list[Choice]:
        """The last choice of each judge, or of this one, for each group, oldest first; undone ones do not count."""
        with connected(self.path) as db:
            rows = db.execute(
                "SELECT judge, group_key, verdict, picks, shown FROM choices WHERE id IN (SELECT max(id) FROM choices "
                "WHERE NOT undone AND (?1 IS NULL OR judge = ?1) GROUP BY judge, group_key) ORDER BY id",
                (judge,),
            ).fetchall()
        return [Choice(*row[:3], *(tuple(json.loads(text)) for text in row[3:])) for row in rows]


@contextlib.contextmanager
def connected(path: Path, mode: str = "rw") -> Iterator[sqlite3.Connection]:
    """A connection for one transaction, committed at the end of the block; `mode` is SQLite's: rwc makes the file.

    Raises:
        OSError: what SQLite says of the file.
    """
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", PATIENCE, isolation_level="IMMEDIATE", uri=True)
        with contextlib.closing(db), db:
            db.execute("PRAGMA synchronous = FULL")
            yield db
    except sqlite3.Error as error:
        raise OSError(f"{path}: the database of choices cannot be used ({error})"
                      + ("; choose another --db" if mode == "rwc" else "")) from error  # fmt: skip


def agreed(path: Path, ask: str | None) -> str | None:
    """What the judges of a database are asked, where there is one; else `ask`.

    Raises:
        ValueError: the file is not a database of judges, or `ask` is something else.
        OSError: it cannot be read.
    """
    if not path.exists():
        return ask
    _check_file(path)
    with connected(path) as db:
        before = str(db.execute("SELECT value FROM about WHERE name = 'ask'").fetchone()[0])
    if ask not in (None, before):
        raise ValueError(f"{path}: its judges are asked for {before!r}, and --ask {ask} was given; leave --ask out to "
                         f"go on, or choose another --db")  # fmt: skip
    return before


def open_store(path: Path, groups: Sequence[Group], ask: str, place: str) -> Store:
    """Opens or makes the database of these groups; groups that it does not know yet are added.

    Args:
        place: where the pictures lie, for messages.

    Raises:
        ValueError: not a database of judges, one that asks something else, or one of other pictures.
        OSError: it cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _make(path, ask, place)
    agreed(path, ask)
    with connected(path) as db:
        known = {key for (key,) in db.execute("SELECT key FROM groups")}
        made_for = db.execute("SELECT value FROM about WHERE name = 'place'").fetchone()[0]
        mine = {group.key: group.prompt for group in groups}
        if known and mine and not known & mine.keys():
            raise ValueError(f"{path}: holds choices of another run, {made_for}: none of its {len(known)} groups has "
                             f"the prompt and pictures of one here; choose another --db, or give the pictures that it "
                             f"was made for")  # fmt: skip
        if new := [row for row in mine.items() if row[0] not in known]:
            db.executemany("INSERT OR IGNORE INTO groups VALUES (?, ?)", new)
    if elsewhere := len(known - mine.keys()):
        log.info("%s: %d of its groups are not here; what was chosen of them is kept", path, elsewhere)
    return Store(path)


def _make(path: Path, ask: str, place: str) -> None:
    with connected(path, "rwc") as db:
        db.execute("PRAGMA journal_mode = WAL")  # readers do not wait, and a kill in the middle leaves what was there
        db.execute("BEGIN IMMEDIATE")
        if db.execute("PRAGMA application_id").fetchone()[0] == MARK:  # another server was a moment faster
            return
        for statement in filter(str.strip, TABLES.split(";")):
            db.execute(statement)
        db.executemany("INSERT INTO about VALUES (?, ?)", [("ask", ask), ("place", place)])
        db.execute(f"PRAGMA application_id = {MARK}")


def _check_file(path: Path) -> None:
    try:
        with connected(path) as db:
            ours = db.execute("PRAGMA application_id").fetchone()[0] == MARK
    except OSError as error:
        if "not a database" not in str(error):
            raise
        ours = False
    if not ours:
        raise ValueError(f"{path}: expected a database that diffalign judge made, got another file; choose another "
                         f"--db")  # fmt: skip
