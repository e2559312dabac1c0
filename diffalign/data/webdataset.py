"""webdataset shards: tar files with jpg_0.jpg, jpg_1.jpg, label_0.txt and caption.txt per key."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from diffalign.data.records import BrokenRow, FileSlice, MediaSource, Row, label_scores, make_record

SUFFIXES = (".tar", ".tar.gz", ".tgz")
CAPTIONS = ("caption.txt", "original_prompt.txt", "txt")
Sample = dict[str, MediaSource]


def read_webdataset(path: str) -> Iterator[Row]:
    """Samples of one tar file, or of all in a folder; read in order with the standard library, nothing is unpacked.

    Per key: <key>.jpg_0.jpg (or .png, .webp), <key>.jpg_1.jpg, <key>.label_0.txt, and the caption in <key>.caption.txt,
    <key>.original_prompt.txt, <key>.txt, or "caption" of <key>.json. Pictures are read again from their place in the
    tar file when they are needed; those of a compressed one are kept in memory.

    A shard that is damaged is a broken row, and what stands before the damage is read.

    Raises:
        ValueError: no tar file.
    """
    shards = find_shards(Path(path))
    if not shards:
        raise ValueError(f"{path}: expected webdataset shards ({', '.join(SUFFIXES)}), found none")
    for shard in shards:
        for sample in samples(shard):
            yield sample if isinstance(sample, BrokenRow) else _record(f"{shard.name} key {sample[0]}", sample[1])


def find_shards(place: Path) -> list[Path]:
    """The tar files of a folder in order, or the file itself."""
    if place.is_file():
        return [place]
    return sorted(file for file in place.glob("*") if file.name.endswith(SUFFIXES))


def samples(shard: Path) -> Iterator[tuple[str, Sample] | BrokenRow]:
    """(key, members by suffix) of members that stand side by side; what stands before a damage is read."""
    current: str | None = None
    members: Sample = {}
    try:
        for name, source in _members(shard):
            key, suffix = _key_and_suffix(name)
            if key != current and current is not None:
                yield current, members
                members = {}
            current = key
            members[suffix] = source
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        after = f" after key {current}" if current else ""
        # the sample in hand may be incomplete, and its own check says so
        yield BrokenRow(f"{shard.name}{after}", f"not a readable tar file, or a truncated one ({error})")
    if current is not None:
        yield current, members


def _members(shard: Path) -> Iterator[tuple[str, MediaSource]]:
    try:
        archive = tarfile.open(shard, "r:")  # noqa: SIM115  closed below
        plain = True
    except tarfile.TarError:
        archive = tarfile.open(shard)  # noqa: SIM115
        plain = False
    with archive:
        for member in archive:
            if not member.isfile():
                continue
            if plain:
                yield member.name, MediaSource(FileSlice(shard, member.offset_data, member.size))
            elif stream := archive.extractfile(member):
                yield member.name, MediaSource(stream.read())


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _record(source: str, sample: Sample) -> Row:
    images = [next((s for name, s in sample.items() if name.startswith(f"jpg_{i}.")), None) for i in (0, 1)]
    if images[0] is None or images[1] is None or "label_0.txt" not in sample:
        return BrokenRow(source, f"expected jpg_0.*, jpg_1.* and label_0.txt, found {', '.join(sorted(sample))}")
    try:
        scores = label_scores(_label(sample["label_0.txt"]))
        caption = _caption(sample)
    except ValueError as error:
        return BrokenRow(source, str(error))
    return make_record(source, caption, [images[0], images[1]], scores)


def _label(stored: MediaSource) -> object:
    text = stored.read().decode("utf-8", "replace").strip()
    try:
        return float(text)
    except ValueError:
        return text


def _caption(sample: Sample) -> object:
    """The caption, "" if there is none; raises ValueError for a file that does not hold one."""
    for name in CAPTIONS:
        if name in sample:
            return sample[name].read().decode("utf-8")
    if "json" not in sample:
        return ""
    try:
        values = json.loads(sample["json"].read())
    except ValueError as error:
        raise ValueError(f"the json is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object with a caption, got {type(values).__name__}")
    return values.get("caption", "")
