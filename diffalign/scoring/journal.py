"""What has been scored, on the disk: a header that says by what, then one line per picture, only appended to.

A run that is killed loses at most the batch in hand. The journal stays beside the finished file, so that more pictures,
other weights or other filters cost nothing again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from diffalign.manifests import Entry
from diffalign.scoring.batch import Outcome

VERSION = 1
SYNC_SECONDS = 5.0  # a killed process loses nothing that was written; a machine that fails loses so much

log = logging.getLogger(__name__)


def keys(entries: Iterable[Entry]) -> list[str]:
    """One per entry: of its image, its prompt, and which time the two come together.

    What is in a picture is not looked at: one that is replaced under its name counts as scored.
    """
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for entry in entries:
        seen[entry.image, entry.prompt] += 1
        text = f"{entry.image}\0{entry.prompt}\0{seen[entry.image, entry.prompt]}"
        found.append(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest())
    return found


class Journal:
    """`kept` maps keys to outcomes; use it as a context. A line that the last process did not finish is cut off.

    Args:
        path: of the journal; made if it is not there.
        rewards: reward -> its keywords, without the weight, which does not change a term.

    Raises:
        ValueError: a journal of other rewards or options, of another program, or that another process writes to.
    """

    def __init__(self, path: Path, rewards: Mapping[str, Mapping[str, Any]]) -> None:
        self.path, self.names = path, list(rewards)
        self.kept: dict[str, Outcome] = {}
        header = {"diffalign scores": VERSION, "rewards": json.loads(json.dumps(rewards, default=str))}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            self._lock()
            self._read(header)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def append(self, found: Sequence[tuple[str, Outcome]]) -> None:
        """Writes those outcomes that have scores; a broken picture is tried again by the next run."""
        rows = [(key, outcome) for key, outcome in found if outcome.scores is not None]
        self.kept.update(rows)
        self._file.write(b"".join(_line(key, outcome) for key, outcome in rows))
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:  # fmt: skip
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path}: another process is scoring into it; wait for it, or choose another "
                             f"--out") from error  # fmt: skip
        except OSError as error:  # some network file systems have none
            log.info("%s: not locked (%s)", self.path, error.strerror)

    def _read(self, header: Mapping[str, Any]) -> None:
        self._file.seek(0)
        first = self._file.readline()
        written = json.dumps(header).encode() + b"\n"
        if not first.endswith(b"\n"):  # new, or killed before its first line was whole
            if not written.startswith(first):
                raise self._foreign()
            self._file.truncate(0)
            self._file.write(written)
            self._file.flush()
            return
        self._check(first, header)
        end, damaged = self._file.tell(), 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                key, outcome = self._outcome(json.loads(line))
                self.kept[key] = outcome
            except (ValueError, KeyError, TypeError):
                damaged += 1
        self._file.truncate(end)
        if damaged:
            log.warning("%s: %d lines are damaged; those pictures are scored again", self.path, damaged)

    def _check(self, line: bytes, header: Mapping[str, Any]) -> None:
        try:
            found = json.loads(line)
            version, rewards = found["diffalign scores"], found["rewards"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign() from error
        if version != VERSION:
            raise ValueError(f"{self.path}: was written by another version of diffalign; delete it, or choose another "
                             f"--out")  # fmt: skip
        if rewards != header["rewards"]:
            raise ValueError(
                f"{self.path}: holds scores of {_said(rewards)}, and {_said(header['rewards'])} was asked for; ask for "
                f"the same rewards with the same options, choose another --out, or delete the journal to score "
                f"all again"
            )

    def _foreign(self) -> ValueError:
        return ValueError(f"{self.path}: expected a journal of diffalign score, found something else; choose another "
                          f"--out")  # fmt: skip

    def _outcome(self, row: Mapping[str, Any]) -> tuple[str, Outcome]:
        scores = tuple(math.nan if score is None else float(score) for score in row["scores"])
        if len(scores) != len(self.names):
            raise ValueError("another number of scores than of rewards")
        return str(row["key"]), Outcome(scores, dict(row.get("missing", {})))


def _line(key: str, outcome: Outcome) -> bytes:
    scores = [None if math.isnan(score) else score for score in outcome.scores or ()]
    row: dict[str, Any] = {"key": key, "scores": scores}
    if outcome.missing:
        row["missing"] = outcome.missing
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _said(rewards: Mapping[str, Mapping[str, Any]]) -> str:
    told = []
    for name, options in rewards.items():
        with_options = ", ".join(f"{key}={value}" for key, value in options.items())
        told.append(f"{name} ({with_options})" if with_options else name)
    return " and ".join(told)
