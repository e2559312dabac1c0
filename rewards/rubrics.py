"""The questions that reward models were trained on. Their words are part of the model, so they are kept as data.

A rubric is a json file in assets/rubrics: version, source, license and lines. `{text_prompt}` stands where the caption goes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache

from diffalign.assets import asset

CAPTION = "{text_prompt}"


@cache
def rubric(name: str) -> str:
    """The text of a shipped rubric, with `CAPTION` in it once."""
    content = json.loads(asset(f"rubrics/{name}.json").read_text(encoding="utf-8"))
    return "\n".join(content["lines"])


def asked(name: str, caption: str, special: Iterable[str]) -> str:
    """The rubric with the caption in its place.

    Args:
        special: tokens that mean something to the model. One that a caption spells gets a space after its first
            letter, so that it is read as text: the released codes let a caption close the question, or add a token
            that a score is read from. No caption without such a token is changed.
    """
    for token in special:
        caption = caption.replace(token, f"{token[0]} {token[1:]}")
    return rubric(name).replace(CAPTION, caption)
