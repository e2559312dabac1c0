"""webdataset shards: tar files with jpg_0.jpg, jpg_1.jpg, label_0.txt and caption.txt per key."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from diffalign.data.records import BrokenRow, ImageSource, Row, label_scores, make_record


def read_webdataset(path: str) -> Iterator[Row]:
    """Samples of one tar file, or of all in a folder; read in order with the standard library, so nothing is unpacked.

    Per key: <key>.jpg_0.jpg (or .png, .webp), <key>.jpg_1.jpg, <key>.label_0.txt, and the caption in <key>.caption.txt,
    <key>.original_prompt.txt, <key>.txt, or "caption" of <key>.json.

    Raises:
        ValueError: no tar file, or one that cannot be read, or a label_0 of the wrong type.
    """
    shards = sorted(Path(path).glob("*.tar")) if Path(path).is_dir() else [Path(path)]
    if not shards:
        raise ValueError(f"{path}: expected webdataset shards (*.tar), found none")
    for shard in shards:
        for key, parts in _samples(shard):
            yield _record(f"{shard.name} key {key}", parts)


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    current, parts = None, {}
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key != current and current is not None:
                    yield current, parts
                    parts = {}
                current = key
                stream = archive.extractfile(member)
                parts[suffix] = stream.read() if stream else b""
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{shard}: not a readable tar file ({error})") from error
    if current is not None:
        yield current, parts


def _record(source: str, parts: dict[str, bytes]) -> Row:
    images = [next((d for name, d in parts.items() if name.startswith(f"jpg_{i}.")), None) for i in (0, 1)]
    if images[0] is None or images[1] is None or "label_0.txt" not in parts:
        return BrokenRow(source, f"expected jpg_0.*, jpg_1.* and label_0.txt, found {', '.join(sorted(parts))}")
    text = parts["label_0.txt"].decode("utf-8", "replace").strip()
    try:
        label: object = float(text)
    except ValueError:
        label = text
    captions = [parts[n].decode("utf-8", "replace") for n in ("caption.txt", "original_prompt.txt", "txt") if n in parts]
    if not captions and "json" in parts:
        captions = [json.loads(parts["json"]).get("caption", "")]
    return make_record(source, captions[0].strip() if captions else "", [ImageSource(i) for i in images if i],
                       list(label_scores(label, source)))  # fmt: skip
