"""From what a command line says to rewards, prompts, pictures and a device."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from diffalign.assets import asset
from diffalign.config import apply_override
from diffalign.prompts import Prompt, read_prompts
from diffalign.rewards import REWARDS, load_rewards
from diffalign.rewards.base import Weighted
from diffalign.table import coerce

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_rewards(named: Sequence[str], weights: Sequence[str], settings: Sequence[str], device: str) -> Weighted:
    """--reward NAME[=WEIGHT], --weights NAME=PATH and --set NAME.KEY=VALUE as one weighted sum.

    Raises:
        ValueError: no reward, one that is set but not asked for, or whatever `load_rewards` refuses.
    """
    sections: dict[str, Any] = {}
    for item in named:
        name, equals, weight = item.partition("=")
        sections[name] = {"weight": coerce(weight if equals else 1.0, float, f"--reward {name}")}
    if not sections:
        raise ValueError(f"expected at least one --reward NAME[=WEIGHT]; known are {', '.join(sorted(REWARDS))}")
    for item in weights:
        name, equals, path = item.partition("=")
        if not equals or name not in sections:
            raise ValueError(f"--weights {item}: expected NAME=PATH of one of {', '.join(sections)}")
        sections[name]["weights"] = path
    for item in settings:
        apply_override(sections, item)
        if extra := [
            name for name in sections if not isinstance(sections[name], dict) or "weight" not in sections[name]
        ]:
            raise ValueError(f"--set {item}: {extra[0]!r} is not among the rewards asked for: {', '.join(named)}")
    return load_rewards(sections, device=device)


def read_prompt_options(texts: Sequence[str], file: str | None) -> list[Prompt]:
    """--prompt texts and --prompts file (a path, or a shipped list such as "shapes-heldout") as one list.

    Raises:
        ValueError: neither, or a file that cannot be read.
    """
    prompts = [Prompt(text) for text in texts]
    if file and not Path(file).exists() and "." not in file:
        prompts += read_prompts(asset(f"prompts/{file}.jsonl"))
    elif file:
        prompts += read_prompts(file)
    if not prompts:
        raise ValueError('expected --prompt "..." (as often as you like) or --prompts FILE')
    return prompts


def read_pictures(images: Sequence[str], prompts: Sequence[str], file: str | None) -> list[tuple[Path, str]]:
    """Pictures with their prompts: from .jsonl listings, or files, folders and globs with --prompt or --prompts.

    Raises:
        ValueError: nothing found, or another number of prompts than pictures (one prompt serves all).
    """
    listed = [pair for place in images if place.endswith(".jsonl") for pair in _listed(Path(place))]
    found = [path for place in images if not place.endswith(".jsonl") for path in _found(place)]
    if not found:
        if not listed:
            raise ValueError("expected at least one picture: --images FILE, FOLDER, 'GLOB' or LISTING.jsonl")
        return listed
    texts = [prompt.text for prompt in read_prompt_options(prompts, file)]
    if len(texts) == 1:
        texts = texts * len(found)
    if len(texts) != len(found):
        raise ValueError(f"expected one prompt for all or one for each of {len(found)} pictures, got {len(texts)}")
    return listed + list(zip(found, texts, strict=True))


def default_device(asked: str | None) -> str:
    """The device that was asked for, else CUDA where there is one."""
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _found(place: str) -> list[Path]:
    path = Path(place)
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    else:
        inside = [path] if path.is_file() else [Path(match) for match in sorted(glob.glob(place, recursive=True))]
    if not inside:
        raise ValueError(
            f"--images {place}: no picture there; expected a file, a folder with {', '.join(SUFFIXES)}, or a glob"
        )
    return inside


def _listed(path: Path) -> Iterator[tuple[Path, str]]:
    """(picture, prompt) of each line; paths are relative to the listing."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        expected = f'{path}, line {number}: expected {{"image": "...", "prompt": "..."}}'
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{expected}, got no JSON: {error}") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("image", "prompt")):
            raise ValueError(f"{expected}, got {line[:100]}")
        yield path.parent / row["image"], row["prompt"]
