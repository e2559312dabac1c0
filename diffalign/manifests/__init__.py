"""Manifests: pictures with their prompts, from a folder, a table, webdataset shards, or plain paths.

One reader per form, in a table; each yields a `Listed` or a `BrokenRow` per row and opens no picture. Used by whatever
looks at pictures that exist: `diffalign score`, `label`, `compare`.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from diffalign.data.records import BrokenRow
from diffalign.data.webdataset import SUFFIXES as SHARDS
from diffalign.data.webdataset import find_shards
from diffalign.manifests.entry import MEDIA_SUFFIXES, Entry, Listed
from diffalign.table import resolve

__all__ = ["FORMS", "BrokenRow", "Entry", "read_manifest", "sniff"]

FORMS: dict[str, str] = {
    "folder": "diffalign.manifests.folder:read_folder",
    "jsonl": "diffalign.manifests.tables:read_jsonl",
    "csv": "diffalign.manifests.tables:read_csv",
    "parquet": "diffalign.manifests.parquet:read_parquet",
    "webdataset": "diffalign.manifests.webdataset:read_webdataset",
    "picture": "diffalign.manifests.folder:read_picture",
}
BY_SUFFIX = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
LISTINGS = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "generations.jsonl")  # a folder's own manifest


def read_manifest(places: Sequence[str | Path], prompts: Sequence[str] = ()) -> Iterator[Entry | BrokenRow]:
    """Every picture of every place with its prompt, in order; a row that is broken is named and dropped whole.

    Args:
        places: picture files, globs, folders, and manifests of any form in `FORMS`. A folder with a metadata.jsonl,
            .csv or .parquet, or with the generations.jsonl of `diffalign generate`, is read by that.
        prompts: for pictures that come without one, and for those of folders whatever lies beside them: one for all,
            or one for each in order.

    Raises:
        ValueError: nothing there, a form that is not known or not what it says, a picture of a folder or path without a
            prompt where none of its kind has one, or another number of prompts than of pictures that take one.
    """
    if isinstance(prompts, str):
        raise ValueError(f"expected a list of prompts, got one string; write [{prompts!r}]")
    if not places:
        raise ValueError("expected at least one picture: FILE, FOLDER, 'GLOB', or a manifest (.jsonl, .csv, .parquet, "
                         ".tar)")  # fmt: skip
    listed = (row for place in places for row in _listed(str(place), bool(prompts)))
    yield from _entries(listed, prompts)


def sniff(path: Path) -> str:
    """The row of `FORMS` that a file or folder looks like.

    Raises:
        ValueError: a file that is no picture and no manifest.
    """
    if path.is_dir():
        if any(file.suffix.lower() in MEDIA_SUFFIXES for file in path.iterdir()):
            return "folder"
        if any(path.glob("*.parquet")):
            return "parquet"
        return "webdataset" if find_shards(path) else "folder"
    if path.name.endswith(SHARDS):
        return "webdataset"
    suffix = path.suffix.lower()
    if suffix not in BY_SUFFIX and suffix in (".json", ".txt", ".yaml", ".xlsx", ".arrow", ".zip"):
        raise ValueError(f"{path}: expected a picture or a manifest that ends in {', '.join(BY_SUFFIX)} or .tar")
    return BY_SUFFIX.get(suffix, "picture")


def _listed(place: str, prompted: bool) -> Iterator[Listed | BrokenRow]:
    for path in _found(place):
        form = sniff(path)
        own = [path / name for name in LISTINGS if form == "folder" and not prompted and (path / name).is_file()]
        path, form = (own[0], sniff(own[0])) if own else (path, form)
        rows = resolve(FORMS, form, "manifest")(path)
        yield from (_unprompted(row) for row in rows) if form == "folder" and prompted else rows


def _unprompted(row: Listed | BrokenRow) -> Listed | BrokenRow:
    """A prompt that is given goes before the caption that lies beside a picture."""
    return row if isinstance(row, BrokenRow) else row.without_prompt()


def _found(place: str) -> list[Path]:
    path = Path(place)
    if path.exists():
        return [path]
    inside = [Path(match) for match in sorted(glob.glob(place, recursive=True))]
    if not inside:
        raise ValueError(f"{place}: no picture or clip there; expected a file, a folder with "
                         f"{', '.join(MEDIA_SUFFIXES)}, a glob, or a manifest ({', '.join(BY_SUFFIX)}, "
                         f".tar)")  # fmt: skip
    return inside


def _writable(row: Listed | BrokenRow) -> Listed | BrokenRow:
    """Refuses what no file of scores could hold: half a character in a prompt, or a file name that is not UTF-8."""
    if isinstance(row, BrokenRow):
        return row
    for what, text in (("the path", row.image), ("the prompt", row.prompt or "")):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            where, shown = (t.encode("utf-8", "backslashreplace").decode() for t in (row.where, text[:100]))
            return BrokenRow(where, f"{what} is not valid Unicode: {shown}")
    return row


def _entries(listed: Iterable[Listed | BrokenRow], prompts: Sequence[str]) -> Iterator[Entry | BrokenRow]:
    taken = whole = 0
    for row in map(_writable, listed):
        if isinstance(row, BrokenRow) or row.prompt is not None:
            whole += not isinstance(row, BrokenRow)
            yield row if isinstance(row, BrokenRow) else row.entry(row.prompt or "")
            continue
        taken += 1
        if not prompts:
            yield BrokenRow(row.where, f"{row.image} has no prompt: give --prompt \"...\", a column prompt, or a .txt "
                                       f"beside it")  # fmt: skip
        elif len(prompts) == 1:
            yield row.entry(prompts[0])
        elif taken <= len(prompts):
            yield row.entry(prompts[taken - 1])
    if prompts and not taken and whole:
        raise ValueError("expected no --prompt: every row of the manifest has its own; leave it out")
    if len(prompts) > 1 and taken != len(prompts):
        raise ValueError(f"expected one prompt for all or one for each of {taken} pictures, got {len(prompts)}")
