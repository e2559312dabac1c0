"""Files and folders that are whole or not there: written under a temporary name beside their own, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`, in a folder that is made if need be. The file of that name becomes `path` at the end.

    A block that fails leaves what was there before, and nothing else. Two writers of one path would get in each other's
    way: the name is the same for both, so that what a kill leaves is overwritten by the next attempt.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # what failed is said by the block's own error
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """The same of a folder: an empty one beside `folder`, which takes its place at the end, with all that is in it.

    No folder can be renamed onto a full one, so the old one is set aside for that moment, as FOLDER.previous.
    """
    partial, previous = (folder.with_name(folder.name + ending) for ending in (".partial", ".previous"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(folder, previous)
        _put_in_place(partial, folder, previous)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path, previous: Path) -> None:
    try:
        os.replace(partial, folder)
    except OSError:
        if previous.exists():
            os.replace(previous, folder)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8, in one piece; what of a file's name is no text becomes an escape such as \\udcff."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, data: Any, **options: Any) -> None:
    """Writes a JSON document, indented and in ASCII unless `options` of json.dumps say otherwise, in one piece."""
    write_text(path, json.dumps(data, **{"indent": 2, **options}) + "\n")
