"""From what a command line says to rewards, prompts, pictures and a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.assets import asset
from diffalign.data.records import BrokenRow
from diffalign.manifests import Entry, read_manifest
from diffalign.prompts import Prompt, read_prompts
from diffalign.rewards import REWARDS, load_rewards
from diffalign.rewards.base import Weighted
from diffalign.rewards.pairwise import PREFERENCES, Preference
from diffalign.scoring.engines import Job, load_job
from diffalign.strict_yaml import apply_override
from diffalign.table import build, coerce


@dataclass(frozen=True)
class Asked:
    """What a command line says of pictures that may have scores already; nothing is loaded before it is needed."""

    reward: Sequence[str] = ()
    weights: Sequence[str] = ()
    settings: Sequence[str] = ()
    prompt: Sequence[str] = ()
    prompts: str | None = None
    engine: str = "local"
    actors: int | None = None
    batch_size: int | None = None
    device: str | None = None
    attention: str = "auto"

    def pictures(self, places: Sequence[str]) -> Iterator[Entry | BrokenRow]:
        """As `read_pictures`."""
        return read_pictures(places, self.prompt, self.prompts)

    def job(self) -> Job:
        """The rewards, loaded.

        Raises:
            ValueError: no reward, or what `load_job` raises.
        """
        sections = read_sections(self.reward, self.weights, self.settings)
        return load_job(sections, default_device(self.device), self.attention, self.engine, self.actors)

    def weights_of_files(self) -> Mapping[str, float]:
        """Reward -> weight for files of scores; none are all that they have.

        Raises:
            ValueError: an option of rewards that would have to look at the pictures again.
        """
        for option, given in (("--weights", self.weights), ("--set", self.settings), ("--prompt", self.prompt),
                              ("--prompts", self.prompts)):  # fmt: skip
            if given:
                raise ValueError(f"expected no {option}: the scores are read from a file; give the pictures to score "
                                 f"them again")  # fmt: skip
        return self.reward_weights() if self.reward else {}

    def reward_weights(self) -> dict[str, float]:
        """Reward -> weight, of those that are named.

        Raises:
            ValueError: none.
        """
        return {name: section["weight"] for name, section in read_sections(self.reward, (), ()).items()}


def read_rewards(named: Sequence[str], weights: Sequence[str], settings: Sequence[str], device: str) -> Weighted:
    """--reward NAME[=WEIGHT], --weights NAME=PATH and --set NAME.KEY=VALUE as one weighted sum.

    Raises:
        ValueError: no reward, one that is set but not asked for, or whatever `load_rewards` refuses.
    """
    return load_rewards(read_sections(named, weights, settings), device=device)


def read_sections(named: Sequence[str], weights: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
    """The same options as the sections that `load_rewards` takes: NAME -> {"weight": ..., keywords}.

    Raises:
        ValueError: no reward, or one that is set but not asked for.
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
    return sections


def read_preference(
    section: str | None, named: Sequence[str], weights: Sequence[str], settings: Sequence[str], margin: float,
    device: str,
) -> Preference:  # fmt: skip
    """--preference as a row of `PREFERENCES` (vlm if it has no name), or the rewards of --reward as one.

    Raises:
        ValueError: both or neither, a section that is not one, or whatever the row refuses.
    """
    if (section is None) == (not named):
        raise ValueError("expected --reward NAME[=WEIGHT] or --preference SECTION: one of them says what is better")
    if section is None:
        chosen: Any = {"name": "reward", "rewards": read_sections(named, weights, settings), "margin": margin}
    else:
        values: dict[str, Any] = {}
        apply_override(values, f"preference={section}")
        chosen = values["preference"]
        if not isinstance(chosen, Mapping):
            raise ValueError(f"--preference: expected a section such as {{judge: {{...}}, template: vlm-clip-pair}}, "
                             f"got {section!r}")  # fmt: skip
    preference: Preference = build(PREFERENCES, {"name": "vlm", **chosen}, what="preference", device=device)
    return preference


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


def read_pictures(places: Sequence[str], prompts: Sequence[str], file: str | None) -> Iterator[Entry | BrokenRow]:
    """Pictures with their prompts: files, folders, globs and manifests, with --prompt or --prompts where they lack one.

    Raises:
        ValueError: nothing found, or another number of prompts than pictures (one prompt serves all).
    """
    texts = [prompt.text for prompt in read_prompt_options(prompts, file)] if prompts or file else []
    return read_manifest(places, texts)


def default_device(asked: str | None) -> str:
    """The device that was asked for, else CUDA where there is one."""
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")
