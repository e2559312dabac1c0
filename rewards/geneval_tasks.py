"""What GenEval's prompts ask for: its evaluation_metadata.jsonl, or the same rows in a mapping, as `Task`s."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.rewards.geneval_rules import COLORS, RELATIONS, Requirement, Task
from diffalign.table import unknown

Metadata = str | Path | Mapping[str, Mapping[str, Any]]


def read_tasks(metadata: Metadata, classes: Sequence[str]) -> dict[str, Task]:
    """Prompt -> task.

    Args:
        metadata: a .jsonl file, each row of it {"prompt", "tag", "include": [{"class", "count", "color"?,
            "position"?: [side, index]}], "exclude"?: [{"class", "count"}]}; or a mapping prompt -> such a row, in which
            the prompt may be left out. Only the tag "counting" matters. Other keys of a row are not read.
        classes: what the detector can find.

    Raises:
        ValueError: a file that cannot be read, a row of another layout (named by its line), two that differ for one
            prompt, or a class that the detector does not know.
    """
    tasks: dict[str, Task] = {}
    for where, prompt, row in _rows(metadata):
        task = _task(where, row, classes)
        if tasks.setdefault(prompt, task) != task:
            raise ValueError(f"{where}: expected one row per prompt, got another one for {prompt!r} that differs")
    if not tasks:
        raise ValueError(f"geneval.metadata: expected at least one row, got none in {metadata}")
    return tasks


def _rows(metadata: Metadata) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(where, prompt, row)."""
    if isinstance(metadata, Mapping):
        for prompt, row in metadata.items():
            yield f"geneval.metadata, {prompt!r}", prompt, row
        return
    try:
        lines = Path(metadata).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"geneval.metadata: expected GenEval's evaluation_metadata.jsonl, could not read {metadata} "
                         f"({error.strerror})") from error  # fmt: skip
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{metadata}, line {number}", *_parsed(f"{metadata}, line {number}", line)


def _parsed(where: str, line: str) -> tuple[str, Mapping[str, Any]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected JSON, got {line[:100]!r} ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{where}: expected {{"prompt": "...", "include": [...]}}, got {line[:100]}')
    return row["prompt"], row


def _task(where: str, row: Mapping[str, Any], classes: Sequence[str]) -> Task:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected a mapping with include, got {row!r:.100}")
    rows = {key: _list(where, key, row.get(key, ())) for key in ("include", "exclude")}
    if not any(rows.values()):
        raise ValueError(f"{where}: expected at least one object in include or exclude, got none")
    include = [
        _requirement(f"{where}: include[{index}]", index, item, ("class", "count", "color", "position"), classes)
        for index, item in enumerate(rows["include"])
    ]
    exclude = [
        _requirement(f"{where}: exclude[{index}]", index, item, ("class", "count"), classes)
        for index, item in enumerate(rows["exclude"])
    ]
    return Task(tuple(include), tuple(exclude), counting=row.get("tag") == "counting")


def _list(where: str, key: str, value: object) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: expected {key} to be a list, got {value!r:.100}")
    return value


def _requirement(
    where: str, index: int, item: Mapping[str, Any], keys: Sequence[str], classes: Sequence[str]
) -> Requirement:
    if not isinstance(item, Mapping) or "class" not in item:
        raise ValueError(f'{where}: expected {{"class": ..., "count": ...}}, got {item!r:.100}')
    for key in item:
        if key not in keys:
            raise ValueError(f"{where}: {unknown('key', key, keys)}")
    if item["class"] not in classes:
        raise ValueError(f"{where}: {unknown('class', str(item['class']), classes)}")
    count, color = item.get("count", 1), item.get("color")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{where}: expected count to be a whole number from 1 on, got {count!r}")
    if color is not None and color not in COLORS:
        raise ValueError(f"{where}: {unknown('color', str(color), COLORS)}")
    return Requirement(item["class"], count, color, _position(where, index, item.get("position")))


def _position(where: str, index: int, value: object) -> tuple[str, int] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 2:
        side, target = value
        if side in RELATIONS and type(target) is int and 0 <= target < index:
            return side, target
    raise ValueError(f"{where}: expected position to be [one of {', '.join(RELATIONS)}, index of an earlier object], "
                     f"got {value!r}")  # fmt: skip
