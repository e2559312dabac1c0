"""Whom a picture is for: users of preference data, the few pairs that say what each likes, and their embeddings.

A user's embedding u [N, D] is made once, before training, of a few of the user's own pairs (the shots), by a row of
`USERS`. The shots are taken from the training split and are not trained on, nor is another row of that user with the
same two pictures; the held-out split has other prompts, so it never sees them either. A prompt of a shot may come again
with other pictures, and its pictures under another user, who says something else of them. Which pairs are shots follows
from their content, not from their order in a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.data.example import Example
from diffalign.data.examples import Examples
from diffalign.table import Section, bind, build, coerce, split_section
from diffalign.writing import replacing

log = logging.getLogger("diffalign")

USERS: dict[str, str] = {
    "clip": "diffalign.rewards.user_embeddings:CLIPUsers",
    "vlm": "diffalign.rewards.user_embeddings:VLMUsers",
}
SHOTS = 4  # of the paper (arXiv 2501.06655)
FOLDER = "users"  # of a run's folder, where the embeddings lie


@dataclass(frozen=True)
class Shot:
    """One thing that is known of a user: of these two pictures of a prompt the first one was preferred."""

    prompt: str
    preferred: Image.Image
    dispreferred: Image.Image


class Embedder(Protocol):
    """From N shots to tokens [N', D], fp32 on the CPU; N' and D are the same for every user with N shots."""

    def __call__(self, shots: Sequence[Shot]) -> Tensor: ...


@dataclass(frozen=True)
class Divided:
    """Examples to train on, without the shots [of each user], and who was left out for want of pairs."""

    examples: Examples
    shots: Mapping[str, tuple[Example, ...]]
    dropped: Mapping[str, int]  # user -> pairs, of both splits

    def summary(self, count: int) -> str:
        """One line for the log."""
        text = f"{len(self.shots)} users with {count} shots each and {len(self.examples.train)} pairs to train on"
        if self.dropped:
            first = next(iter(self.dropped))
            text += (f"; {len(self.dropped)} users with fewer than {count + 1} training pairs dropped, with "
                     f"{sum(self.dropped.values())} pairs, such as {first!r}")  # fmt: skip
        return text


def parse_users(section: Section) -> tuple[int, dict[str, Any]]:
    """(shots per user, section of the embedder) of a config's `users`.

    Raises:
        ValueError: an unknown embedder or keyword, or fewer shots than one.
    """
    name, keywords = split_section(section, "users")
    shots = coerce(keywords.pop("shots", SHOTS), int, "users.shots")
    if shots < 1:
        raise ValueError(f"users.shots: expected at least 1 pair per user, got {shots}")
    own = {"name": name, **keywords}
    bind(USERS, own, what="users", device="cpu")
    return shots, own


def divide(examples: Examples, count: int) -> Divided:
    """Takes `count` shots of each user out of the training pairs; a user who has no pair left then is dropped whole.

    Raises:
        ValueError: no user is left.
    """
    own: dict[str, list[Example]] = defaultdict(list)
    for example in examples.train:
        own[_user(example)].append(example)
    shots: dict[str, tuple[Example, ...]] = {}
    train: list[Example] = []
    for user, theirs in sorted(own.items()):
        chosen = _shots(theirs, count)
        known = {_pictures(example) for example in chosen}
        rest = [example for example in theirs if _pictures(example) not in known]
        if len(chosen) == count and rest:
            shots[user] = chosen
            train += rest
    if not shots:
        most = max((len(theirs) for theirs in own.values()), default=0)
        raise ValueError(f"no user has {count + 1} training pairs, {count} as shots and one to train on: the most are "
                         f"{most}; lower users.shots or data.val_fraction, or give more pairs of a user")  # fmt: skip
    dropped: dict[str, int] = defaultdict(int)
    for example in (*examples.train, *examples.validation):
        if (user := _user(example)) not in shots:
            dropped[user] += 1
    in_place = {id(example) for example in train}
    kept = replace(
        examples,
        train=tuple(example for example in examples.train if id(example) in in_place),
        validation=tuple(example for example in examples.validation if _user(example) in shots),
    )
    return Divided(kept, shots, dict(dropped))


def known_users(
    section: Section, examples: Examples, folder: Path, device: torch.device | str
) -> tuple[Examples, dict[str, Tensor]]:
    """(what is left to train on, tokens [N, D] by user, which are in the run's folder too) of a config's `users`.

    Raises:
        ValueError: no user with enough pairs, or an embedder that is not to be had.
    """
    count, own = parse_users(section)
    divided = divide(examples, count)
    log.info(divided.summary(count))
    return divided.examples, embed_users(divided.shots, own, folder / FOLDER, device)


def embed_users(
    shots: Mapping[str, Sequence[Example]], section: Section, folder: Path, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Each user's tokens [N, D], which are also in folder/<user>.safetensors; what is there already is not made again.

    Raises:
        ValueError: the embedder is not to be had, or a picture that cannot be read.
    """
    found: dict[str, Tensor] = {}
    embedder: Embedder | None = None
    for user, examples in shots.items():
        file = folder / file_name(user)
        facts = {"user": user, "embedder": section, "shots": len(examples), "made_of": _digest(section, examples)}
        if not (file.is_file() and _facts(file) == facts):
            embedder = embedder or build(USERS, section, what="users", device=device)
            save_user(file, embedder([shot_of(example) for example in examples]), facts)
        found[user] = load_user(file)
    return found


def embed_user(shots: Sequence[Shot], section: Section = "clip", device: torch.device | str = "cpu") -> Tensor:
    """The tokens [N, D] of somebody new: as many shots, and the same section, as in the run that made the adapter.

    Raises:
        ValueError: no shot, or an embedder that is not to be had.
    """
    if not shots:
        raise ValueError("expected at least one shot of the user: a prompt, the preferred and the other picture")
    embedder: Embedder = build(USERS, parse_users(section)[1], what="users", device=device)
    return embedder(shots)


def save_user(file: Path, tokens: Tensor, facts: Mapping[str, Any] | None = None) -> Path:
    """Writes tokens [N, D] to one safetensors file, in one piece; returns the file."""
    metadata = {"diffalign": json.dumps(dict(facts or {}), sort_keys=True)}
    with replacing(file) as partial:
        save_file({"user": tokens.detach().float().cpu().contiguous()}, partial, metadata=metadata)
    return file


def load_user(path: str | Path, folder: str | Path | None = None) -> Tensor:
    """The tokens [N, D] of a file, or of the user of that name in the folder of a run.

    Raises:
        ValueError: no such file or user (names those that are there), or another kind of file.
    """
    file = Path(path)
    if folder is not None and not file.is_file():
        home = Path(folder) if Path(folder).is_dir() else Path(folder).parent
        file = home / FOLDER / file_name(str(path))
        if not file.is_file():
            there = sorted(str(_facts(f).get("user")) for f in file.parent.glob("*.safetensors"))
            known = ", ".join(there[:10]) or "none"
            raise ValueError(f"user {str(path)!r}: expected a file, or a user of {file.parent}; {len(there)} are "
                             f"there: {known}")  # fmt: skip
    try:
        with safe_open(file, "pt") as stored:
            tokens: Tensor = stored.get_tensor("user")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: expected a user's embedding, as embed_user and save_user make it, and it cannot be "
                         f"read ({error})") from error  # fmt: skip
    return tokens


def file_name(user: str) -> str:
    """Of a user's embedding: any name is one, and two never share a file."""
    safe = quote(user, safe=" ")
    return f"{safe if len(safe) <= 120 else hashlib.sha256(user.encode()).hexdigest()}.safetensors"


def shot_of(example: Example) -> Shot:
    """An example's pictures as they are, uncropped.

    Raises:
        ValueError: one that cannot be read.
    """
    preferred, dispreferred = (source.decode(example.record.source) for source in example.sources)
    return Shot(example.prompt, preferred, dispreferred)


def _shots(examples: Sequence[Example], count: int) -> tuple[Example, ...]:
    """Up to `count` of them with different pictures, in the order of a hash of their content; ties say nothing."""
    clear = {_pictures(e): e for e in examples if e.label == 1}
    ranked = sorted(clear.values(), key=lambda e: hashlib.sha256(f"shot/{_content(e)}".encode()).digest())
    return tuple(ranked[:count])


def _user(example: Example) -> str:
    assert example.record.user is not None, "the view of a method that needs users refuses a row without one"
    return example.record.user


def _pictures(example: Example) -> frozenset[str]:
    return frozenset(source.sha256 for source in example.sources)


def _content(example: Example) -> str:
    return "/".join([example.prompt, *(source.sha256 for source in example.sources)])


def _digest(section: Section, examples: Sequence[Example]) -> str:
    said = json.dumps([section, [_content(example) for example in examples]], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _facts(file: Path) -> dict[str, Any]:
    """What a user's file says of itself; nothing where it cannot be read."""
    try:
        with safe_open(file, "pt") as stored:
            said = json.loads((stored.metadata() or {}).get("diffalign", "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
