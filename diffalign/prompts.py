"""Prompt files: one prompt per line, or JSON lines with categories."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt file."""

    text: str
    category: str | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a .txt file (one per line, blank lines skipped) or .jsonl ({"prompt": ..., "category": ...} per line).

    Raises:
        ValueError: missing, empty, not UTF-8, of another type, or a line that is not as above (named by its number).
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: expected a prompt file that ends in .txt or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a prompt file in UTF-8, could not read it: {error}") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path}: the prompt file is empty; write one prompt per line")
    if path.suffix == ".txt":
        return [Prompt(line) for _, line in numbered]
    return [_prompt_of_json(line, f"{path}, line {number}") for number, line in numbered]


def _prompt_of_json(line: str, where: str) -> Prompt:
    expected = 'expected {"prompt": "...", "category": "..."} (category may be left out)'
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {expected}, got no JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f"{where}: {expected}, got {line[:100]}")
    if not isinstance(row.get("category"), str | None):
        raise ValueError(f"{where}: expected a category that is a string, got {row['category']!r}")
    return Prompt(row["prompt"], row.get("category"))
