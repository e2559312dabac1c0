"""Reward models: name -> class. A dotted path, "package.module:Class", names anyone's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffalign.rewards.base import Reward, Weighted
from diffalign.table import build, coerce

REWARDS: dict[str, str] = {
    "aesthetic": "diffalign.rewards.aesthetic:Aesthetic",
    "aesthetic-v2.5": "diffalign.rewards.aesthetic_siglip:AestheticV25",
    "blip-itm": "diffalign.rewards.blip_itm:BlipITM",
    "clip": "diffalign.rewards.clip:CLIPScore",
    "geneval": "diffalign.rewards.geneval:GenEval",
    "hpsv2": "diffalign.rewards.hps:HPSv2",
    "hpsv2.1": "diffalign.rewards.hps:HPSv21",
    "hpsv3": "diffalign.rewards.hpsv3:HPSv3",
    "imagereward": "diffalign.rewards.imagereward:ImageReward",
    "jpeg": "diffalign.rewards.jpeg:JPEG",
    "moving-shapes": "diffalign.rewards.moving_shapes:MovingShapes",
    "mps": "diffalign.rewards.mps:MPS",
    "ocr": "diffalign.rewards.ocr:OCR",
    "pickscore": "diffalign.rewards.pickscore:PickScore",
    "shapes": "diffalign.rewards.shapes:Shapes",
    "siglip": "diffalign.rewards.clip:SigLIPScore",
    "tiny-clip": "diffalign.rewards.clip:TinyCLIP",
    "unifiedreward": "diffalign.rewards.judge:UnifiedReward",
    "videoreward": "diffalign.rewards.videoreward:VideoReward",
    "videoscore": "diffalign.rewards.videoscore:VideoScore",
    "vlm": "diffalign.rewards.judge:VLM",
    "vqascore": "diffalign.rewards.vqascore:VQAScore",
    "winrate": "diffalign.rewards.pairwise:WinRate",
    "human": "diffalign.rewards.human:Human",
}
CLIPS: dict[str, str] = {"clips": "diffalign.rewards.clips:Frames"}


def load_reward(
    name: str,
    /,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: str | torch.dtype | None = None,
    clips: Mapping[str, object] | None = None,
    **keywords: Any,
) -> Reward:
    """One reward by name, or by the dotted path of your own.

    Args:
        weights: a local file or folder, or a hub id, instead of the official checkpoint.
        device: where its weights live, if it has any.
        dtype: of its networks, "bfloat16" or torch.bfloat16; None is the reward's own choice, float32 for most.
        clips: how a reward of pictures scores clips: {"frames": 8, "reduce": "min"}, see `rewards.clips.Frames`. If not
            given, the mean over all frames.
        keywords: the others of its constructor.

    Raises:
        ValueError: unknown name or keyword, or a checkpoint that is not to be had; the message says what to do.
    """
    given = {"weights": weights, "dtype": None if dtype is None else str(dtype).removeprefix("torch.")}
    named = {key: value for key, value in given.items() if value is not None}  # what has none says so if it is given
    reward: Reward = build(REWARDS, {"name": name, **named, **keywords}, what="reward", device=device)
    if clips is None:
        return reward
    framed: Reward = build(CLIPS, clip_section(name, clips), what="reward", reward=reward)
    return framed


def clip_section(name: str, clips: object) -> dict[str, object]:
    """The section of `CLIPS` that the key `clips` of a reward stands for.

    Raises:
        ValueError: no mapping.
    """
    if not isinstance(clips, Mapping):
        raise ValueError(f"{name}.clips: expected a mapping such as {{frames: 8, reduce: min}}, got {clips!r}")
    return {**clips, "name": "clips"}


def load_rewards(
    sections: Mapping[str, float | Mapping[str, object]], *, device: torch.device | str = "cpu"
) -> Weighted:
    """The weighted sum that a `rewards` section asks for: {"shapes": 1.0, "clip": {"weight": 0.01, "model": ...}}.

    A mapping may give a `name`; then its key is only the label in the log, and one reward can be there twice with
    different models. The weight is 1 if not given; 0 only logs. It may also give a `device` of its own.

    Raises:
        ValueError: as `load_reward`, an empty section, or a weight that is not a finite number.
    """
    if not isinstance(sections, Mapping):
        raise ValueError(f"rewards: expected a mapping of name -> weight, got {sections!r}")
    return Weighted({label: _weighted(label, section, device) for label, section in sections.items()})


def _weighted(label: str, section: float | Mapping[str, object], device: torch.device | str) -> tuple[Reward, float]:
    keywords: dict[str, Any] = dict(section) if isinstance(section, Mapping) else {"weight": section}
    weight = coerce(keywords.pop("weight", 1.0), float, f"rewards.{label}")
    name = str(keywords.pop("name", label))
    return load_reward(name, **{"device": device} | keywords), weight
