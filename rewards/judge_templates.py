"""What a judge is asked: instructions that never change, then the caption as one escaped field.

A template is a json file in assets/judges, or anyone's own: version, scale, parser (a row of `judge_parse`),
instructions (lines) and closing, with license and source where the words are somebody else's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.assets import asset
from diffalign.rewards.judge_parse import Parser, Scale
from diffalign.table import unknown

SHIPPED = ("unifiedreward", "unifiedreward-pair", "vlm", "vlm-clip-pair", "vlm-pair")
BRACKETS = "<>[]"  # of chat templates' own marks, such as <|im_end|> and [INST], and of <image>


@dataclass(frozen=True)
class Template:
    """One question about pictures and a caption, and how its answer is read.

    Args:
        version: changes with the words, and is part of what a score means.
        instructions: the beginning of every question, byte for byte.
        closing: what follows the caption. Empty: the caption stands there as a JSON string in its quotes. Else it is
            the end of a field that the instructions open, and the caption stands there without quotes of its own.
        scale: lowest and highest score.
        parse: (answer, scale) -> score, a ValueError where there is none.
    """

    version: str
    instructions: str
    closing: str
    scale: Scale
    parse: Parser

    def question(self, caption: str) -> str:
        """The text that goes with the pictures."""
        field = escaped(caption)
        return f"{self.instructions}{field[1:-1] if self.closing else field}{self.closing}"


def escaped(caption: str) -> str:
    r"""The caption as a JSON string that cannot be mistaken for anything else; `json.loads` gives it back.

    Letters of all scripts stay as they are. What does not print, and `BRACKETS`, become \u....: a server reads
    <|im_end|> inside a text as the end of the turn, and </caption> may look like the end of the field.
    """
    written = json.dumps(caption, ensure_ascii=False)
    return "".join(_code_units(letter) if _is_odd(letter) else letter for letter in written)


def _is_odd(letter: str) -> bool:
    return letter in BRACKETS or not letter.isprintable()


def _code_units(letter: str) -> str:
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def load_template(template: str | Path, parsers: Mapping[str, Parser]) -> Template:
    """A shipped template by name, or one's own by its file.

    Args:
        parsers: those that can read its answers: of one picture, or of a pair.

    Raises:
        ValueError: neither a name nor a file, or a file of another layout; for instance a template for pairs where
            single pictures are judged.
    """
    path = asset(f"judges/{template}.json") if template in SHIPPED else Path(template)
    if not path.is_file():
        raise unknown("template", str(template), [*SHIPPED, "FILE.json"])
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _built(content, parsers)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"template {path}: expected version, scale [low, high], instructions (lines), closing and "
            f"parser (one of {', '.join(parsers)}), got {type(error).__name__}: {error}"
        ) from error


def _built(content: Mapping[str, Any], parsers: Mapping[str, Parser]) -> Template:
    low, high = (float(bound) for bound in content["scale"])
    if not low < high:
        raise ValueError(f"scale from {low:g} to {high:g}")
    return Template(
        version=str(content["version"]),
        instructions="\n".join(content["instructions"]),
        closing=str(content["closing"]),
        scale=(low, high),
        parse=parsers[content["parser"]],
    )
