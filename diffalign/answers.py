"""What a judge answers, who may be asked, and answers kept on a disk.

Whoever answers questions about pictures is an `Asker`: an endpoint, a model on this machine, anyone's own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What came back: a text, or None and the reason why there is none."""

    text: str | None
    reason: str = ""


class Unreached(ValueError):
    """Nobody answers at all: no later question would do better."""


class Asker(Protocol):
    """Answers one question about pictures; the same question gets the same answer."""

    @property
    def workers(self) -> int:
        """How many questions it takes at once; 1 for one that is not to be called from several threads."""

    def ask(self, pictures: Sequence[Image.Image], text: str) -> Answer:
        """The answer to `text`, which follows the pictures; a failure is an answer without text, and no error.

        Raises:
            ValueError: what no later question would do better: nobody is there, or a picture that cannot be sent.
        """


def in_order(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """[function(item) for item in items], at most `workers` at a time; the first error ends it all."""
    if workers == 1 or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(workers, len(items))) as pool:
        try:
            return list(pool.map(function, items))
        except BaseException:  # an interrupt too is not to wait for all that was not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class AnswerCache:
    """Texts by key, one small json file each: root/ab/cdef....json. Several processes may share it.

    Args:
        root: the folder; made when the first answer comes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._told = False

    def get(self, key: str) -> str | None:
        """The text, or None; a file that is damaged counts as absent, so that it is asked and written again."""
        try:
            kept = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        text = kept.get("text") if isinstance(kept, dict) else None
        return text if isinstance(text, str) else None

    def put(self, key: str, text: str, **facts: str) -> None:
        """Keeps a text, and beside it facts for whoever opens the file. A disk that is full costs no answer."""
        path = self._path(key)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({**facts, "text": text}, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self._say_once(error)

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key[2:]}.json"

    def _say_once(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            log.warning("answers are not kept in %s (%s); they will be asked for again", self.root, error.strerror)
