"""The questions that reward models were trained on. Their words are part of the model, so they are kept as data.

A rubric is a json file in assets/rubrics: version, source, license and lines. `{text_prompt}`
stands where the caption goes.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from diffalign.assets import asset

CAPTION = "{text_prompt}"


@cache
def rubric(name: str) -> str:
    """The text of a shipped rubric, with `CAPTION` in it once."""
    content = json.loads(asset(f"rubrics/{name}.json").read_text(encoding="utf-8"))
    return "\n".join(content["lines"])


def asked(name: str, caption: str, tokenizer: Any) -> str:
    """The rubric with the caption in its place, see `harmless`."""
    return rubric(name).replace(CAPTION, harmless(caption, tokenizer))


def harmless(caption: str, tokenizer: Any) -> str:
    """The caption, in which no special token of the tokenizer is spelled: it gets a space after its first letter.

    The released codes let a caption end the user's turn, or add a token that a score is read from. A caption without
    one, and so every caption that anybody trained on, stays as it is.
    """
    for token in special_tokens(tokenizer):
        caption = caption.replace(token, f"{token[0]} {token[1:]}")
    return caption


def special_tokens(tokenizer: Any) -> list[str]:
    """Those that mean something to the model and are no text."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
