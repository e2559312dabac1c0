"""A folder of safetensors files as one mapping from key to named tensors, which only grows.

Each file is written under a temporary name, synced and renamed, so it is complete or not there; several processes may
write at once, since nobody writes into another's file. Packed files and not one per key, because a million small ones
are slow on every file system. A checksum per key, in the file's own metadata, finds what went bad on the disk later.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import uuid
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

log = logging.getLogger("diffalign")

Entry = dict[str, Tensor]

VERSION = "1"  # of the layout of a shard; one without a number has this
FLUSH_BYTES = 64 << 20  # a shard is written when so much is there
OPEN_FILES = 64
ABANDONED = 24 * 3600  # seconds after which a temporary file belongs to no live process


class Shards:
    """The mapping; `folder` is made if it is not there.

    Of a key that two processes computed at the same time, the older copy counts.
    """

    def __init__(self, folder: Path, flush_seconds: float = 15.0) -> None:
        self.folder = folder
        self.flush_seconds = flush_seconds
        self._file: dict[str, Path] = {}  # key -> its shard
        self._index: dict[Path, dict[str, tuple[int, list[str]]]] = {}  # shard -> key -> checksum, names of tensors
        self._warned = False  # of shards of another version, once
        self._open: dict[Path, safe_open] = {}  # type: ignore[type-arg]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"the cache folder {folder} cannot be made ({error.strerror}): expected a cache_dir that "
                             f"is a folder, and in which this user may write; set another") from error  # fmt: skip
        self._remove_abandoned()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._file

    def refresh(self) -> None:
        """Learns of shards that this or another process has written; sets damaged ones aside, to be written again."""
        for file in sorted(self.folder.glob("*.safetensors")):  # names begin with a time: oldest first
            if file in self._index:
                continue
            try:
                with safe_open(file, "pt") as opened:  # fails for a file that is shorter than its header says
                    index = self._index_of(file, opened.metadata() or {})
            except FileNotFoundError:
                continue  # another process has just set it aside
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                self._set_aside(file, str(error))
                continue
            self._index[file] = index
            for key in index:
                self._file.setdefault(key, file)

    def _index_of(self, file: Path, metadata: dict[str, str]) -> dict[str, tuple[int, list[str]]]:
        """What a shard says is in it; of another version nothing, and the file is left to those who can read it."""
        version = metadata.get("version", VERSION)
        if version == VERSION:
            return dict(json.loads(metadata["index"]))
        if not self._warned:
            log.warning("cache: %s was written by another version of diffalign (its format is %s, this one reads %s): "
                        "such files are left alone, what is in them is computed again",
                        file, version, VERSION)  # fmt: skip
        self._warned = True
        return {}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not there, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._file]

    def verify(self, keys: Iterable[str]) -> None:
        """Reads what is there of `keys`, and sets aside every shard in which one of them is damaged."""
        by_file: dict[Path, list[str]] = defaultdict(list)
        for key in dict.fromkeys(keys):
            if key in self._file:
                by_file[self._file[key]].append(key)
        for file, inside in by_file.items():
            try:
                for key in inside:
                    self._read(file, key)
            except ValueError as error:
                self._set_aside(file, str(error))
            self._close(file)

    def get(self, key: str) -> Entry:
        """The named tensors of one key.

        Raises:
            KeyError: it is not there.
            ValueError: its file has been damaged or removed since it was opened.
        """
        file = self._file[key]
        try:
            return self._read(file, key)
        except ValueError as error:
            raise ValueError(f"{error}; start again, and what is damaged will be computed again") from error

    def put(self, entries: dict[str, Entry]) -> None:
        """Writes one shard with those entries that are not there yet.

        Raises:
            OSError: with what to do, when the disk is full; no half-written shard is left.
        """
        self.refresh()  # another process may have been quicker
        entries = {key: entries[key] for key in self.missing(entries)}
        if not entries:
            return
        # copies, because the format refuses tensors that share memory
        flat = {f"{key}:{name}": t.clone(memory_format=torch.contiguous_format)
                for key, entry in entries.items() for name, t in entry.items()}  # fmt: skip
        index = {key: (_checksum(entry), sorted(entry)) for key, entry in entries.items()}
        name = uuid.uuid4().hex[:12]
        partial = self.folder / f"{name}.partial"
        try:
            with partial.open("wb") as opened:  # not safetensors' own writer: its error would not be an OSError
                opened.write(save(flat, {"index": json.dumps(index), "version": VERSION}))
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(partial, self.folder / f"{time.time_ns():020d}-{name}.safetensors")
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OSError(error.errno, f"the cache in {self.folder} could not be written ({error.strerror}); what is "
                          f"there stays valid: free some space, or set cache_dir to another disk, and start "
                          f"again") from error  # fmt: skip
        self.refresh()

    @contextlib.contextmanager
    def writer(self) -> Iterator[Callable[[dict[str, Entry]], None]]:
        """A function like `put` that gathers entries and writes a shard when it has enough, after some seconds, and at
        the end, also if that is an exception: an interrupt loses nothing, a kill the last seconds."""
        gathered: dict[str, Entry] = {}
        size, since = 0, time.monotonic()

        def flush() -> None:
            nonlocal size, since
            some = dict(gathered)
            gathered.clear()  # first: what cannot be written now is not tried again at the end
            size, since = 0, time.monotonic()
            self.put(some)

        def gather(entries: dict[str, Entry]) -> None:
            nonlocal size
            gathered.update(entries)
            size += sum(tensor.nbytes for entry in entries.values() for tensor in entry.values())
            if size >= FLUSH_BYTES or time.monotonic() - since >= self.flush_seconds:
                flush()

        try:
            yield gather
        finally:
            flush()

    def _read(self, file: Path, key: str) -> Entry:
        checksum, names = self._index[file][key]
        try:
            opened = self._opened(file)
            entry = {name: opened.get_tensor(f"{key}:{name}") for name in names}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the cache file {file} cannot be read any more ({error})") from error
        if _checksum(entry) != checksum:
            raise ValueError(f"the cache file {file} is damaged: {key} is not what was written")
        return entry

    def _opened(self, file: Path) -> safe_open:  # type: ignore[type-arg]
        if file not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._close(next(iter(self._open)))
            self._open[file] = safe_open(file, "pt")
        return self._open[file]

    def _close(self, file: Path) -> None:
        self._open.pop(file, None)

    def _set_aside(self, file: Path, why: str) -> None:
        log.warning("cache: %s is damaged (%s): set aside, to be computed again", file.name, why)
        self._close(file)
        for key in self._index.pop(file, {}):
            if self._file.get(key) == file:
                del self._file[key]
        with contextlib.suppress(FileNotFoundError):  # another process has done the same
            file.rename(file.with_suffix(".damaged"))

    def _remove_abandoned(self) -> None:
        for partial in self.folder.glob("*.partial"):
            with contextlib.suppress(OSError):  # gone meanwhile, or in a folder that only its owner may write
                if time.time() - partial.stat().st_mtime > ABANDONED:
                    partial.unlink()


def _checksum(entry: Entry) -> int:
    total = 0
    for name in sorted(entry):
        value = entry[name]
        total = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), total)
        total = zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total
