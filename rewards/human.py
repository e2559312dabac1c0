"""People as a reward: pictures wait in a folder until they have been judged on the page of `diffalign judge`.

    score = the share of judges who chose the picture among those of its prompt (ask: best), 1/2 for a tie

Of an order it is the place, from 1 for the best to 0. A prompt that every judge skipped has no score, and neither has a
picture that is alone with its prompt.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, final

import torch
from PIL import Image
from torch import Tensor

from diffalign.judging.command import Place
from diffalign.judging.export import preferences
from diffalign.judging.groups import ASKS
from diffalign.judging.store import Choice
from diffalign.rewards.base import Card, Images, dispatch
from diffalign.rewards.missing import MISSING
from diffalign.rewards.preprocess import to_rgb
from diffalign.table import unknown
from diffalign.writing import replacing, write_text

LISTING = "generations.jsonl"  # as `diffalign generate` writes it
log = logging.getLogger("diffalign")


@final
class Human:
    """Waits for people to judge the pictures of a call, each prompt's among themselves.

    Every call has a folder of its own, named by its pictures, with its own database of choices. So a run that is killed
    while it waits finds what was said when it draws the same pictures again. A time limit on rewards does not suit it.

    Args:
        folder: where the pictures of every call go.
        ask: best | order, what the page asks.
        judges: how many people have to judge each prompt.
        poll: seconds between two looks at the database.

    Raises:
        ValueError: an unknown `ask`, or fewer than one judge; when called, a database of something else.
    """

    name: ClassVar[str] = "human"
    card: ClassVar[Card] = Card(
        unit="share of votes",
        range=(0.0, 1.0),
        source="people",
        code="none",
        weights="none",
        differentiable=False,
        side=None,
        across_prompts=False,
        checked="formula only",
        compares=True,
    )

    def __init__(self, *, folder: str | Path, ask: str = "best", judges: int = 1, poll: float = 2.0) -> None:
        if ask not in ASKS or ask == "pairs":
            raise unknown("ask", ask, [name for name in ASKS if name != "pairs"])
        if judges < 1:
            raise ValueError(f"human: expected at least one judge, got {judges}")
        self.folder, self.ask, self.judges = Path(folder), ask, judges
        self.wait: Callable[[], None] = lambda: time.sleep(poll)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`. Comes back when everything has been judged."""
        return dispatch(self.name, images, prompts, exact=self._score, differentiable=None)

    def _score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        data = [_png(picture) for picture in pictures]
        names = [hashlib.sha256(content).hexdigest() for content in data]
        folder = self.folder / hashlib.sha256(json.dumps([names, list(prompts)]).encode()).hexdigest()[:16]
        if all(prompts.count(prompt) < 2 for prompt in prompts):
            return torch.full((len(pictures),), MISSING)
        self._write(folder, names, data, prompts)
        scored = self._judged(folder)
        return torch.tensor([scored.get((prompt, name), MISSING) for prompt, name in zip(prompts, names, strict=True)])

    def _write(self, folder: Path, names: Sequence[str], data: Sequence[bytes], prompts: Sequence[str]) -> None:
        if (folder / LISTING).exists():  # the last to be written
            return
        for name, content in zip(names, data, strict=True):
            with replacing(folder / f"{name}.png") as partial:
                partial.write_bytes(content)
        rows = [{"image": f"{name}.png", "prompt": prompt} for name, prompt in zip(names, prompts, strict=True)]
        write_text(folder / LISTING, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _judged(self, folder: Path) -> dict[tuple[str, str], float]:
        """(prompt, sha256) -> score, once every group has enough judges."""
        found, store, _ = Place(str(folder), ask=self.ask).open()
        keys, told = {group.key for group in found.groups}, False
        while left := keys - judged_by(store.choices(), self.judges):
            if not told:
                log.warning("%d prompts wait to be judged: diffalign judge %s --watch", len(left), self.folder)
                told = True
            self.wait()
        rows = preferences(store.choices(), found.groups, merge=True)
        return {(row.prompt, entry.source.sha256): score for row in rows
                for entry, score in zip(row.entries, row.scores, strict=True)}  # fmt: skip


def judged_by(choices: Sequence[Choice], judges: int) -> set[str]:
    """Keys of the groups that so many judges have chosen from, found equal or skipped."""
    said: dict[str, set[str]] = defaultdict(set)
    for choice in choices:
        said[choice.group].add(choice.judge)
    return {group for group, names in said.items() if len(names) >= judges}


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    to_rgb(picture).save(file, "PNG")
    return file.getvalue()
