"""webdataset shards as a manifest: per key one picture and its caption; nothing is unpacked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign.data.records import BrokenRow
from diffalign.data.webdataset import CAPTIONS, Sample, find_shards, samples
from diffalign.manifests.entry import IMAGE_SUFFIXES, PROMPTS, Listed


def read_webdataset(place: Path) -> Iterator[Listed | BrokenRow]:
    """Samples of one tar file or of all in a folder: <key>.jpg (or another picture), the caption in <key>.txt,
    <key>.caption.txt, or "prompt", "caption" or "text" of <key>.json, whose other keys are the row's other columns.

    Pictures are read from their place in the tar file when they are needed; a compressed one is kept in memory whole.

    Raises:
        ValueError: no tar file.
    """
    shards = find_shards(place)
    if not shards:
        raise ValueError(f"{place}: expected webdataset shards (.tar), found none")
    for shard in shards:
        for sample in samples(shard):
            yield sample if isinstance(sample, BrokenRow) else _row(shard, *sample)


def _row(shard: Path, key: str, sample: Sample) -> Listed | BrokenRow:
    where = f"{shard} key {key}"
    pictures = [suffix for suffix in sample if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    if len(pictures) != 1:
        return BrokenRow(where, f"expected one picture, found {', '.join(sorted(sample)) or 'nothing'}")
    try:
        values = _values(sample)
        written = next((sample[name].read().decode("utf-8").strip() for name in CAPTIONS if name in sample), None)
    except ValueError as error:  # a caption that is no UTF-8 is one too
        return BrokenRow(where, str(error))
    column = next((name for name in PROMPTS if name in values), None) if written is None else None
    prompt = values.pop(column) if column else written
    if not isinstance(prompt, str | None):
        return BrokenRow(where, f"expected the prompt as text in {column} of the json, got {str(prompt)[:100]!r}")
    return Listed(f"{shard}:{key}.{pictures[0]}", prompt, sample[pictures[0]], where, values)


def _values(sample: Sample) -> dict[str, Any]:
    if "json" not in sample:
        return {}
    try:
        values = json.loads(sample["json"].read())
    except ValueError as error:
        raise ValueError(f"the json is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    return values
