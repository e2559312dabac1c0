"""The user adapter on any `LatentPipeline`: attach, save and load. What it computes is in `user_attention`.

A file of its own, user_adapter.safetensors, holds Wk and Wv of every attention by the name of that attention, and in
its metadata, as JSON under "diffalign", family, base model, width of the tokens and where the adapter comes from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.user_attention import UserProjection, attach_projections, detach_projections

USER_WEIGHTS = "user_adapter.safetensors"


def attach_user_adapter(pipe: LatentPipeline, width: int, seed: int = 0) -> list[torch.nn.Parameter]:
    """A fresh adapter for tokens of this width; returns its fp32 parameters, the only ones that are trained.

    Raises:
        ValueError: the network has an adapter already, or no attention to a prompt.
    """
    if projections(pipe):
        raise ValueError(f"{pipe.name}: a user adapter is attached already")
    made = attach_projections(pipe.network, width, torch.Generator().manual_seed(seed))
    if not made:
        raise ValueError(f"{pipe.name}: no attention of this {pipe.family} network looks at a prompt")
    return made


def save_user_adapter(pipe: LatentPipeline, folder: str | Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Writes folder/user_adapter.safetensors in one piece; returns the file."""
    found = projections(pipe)
    assert found, "save_user_adapter needs an attached adapter"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    said = {**(facts or {}), "family": pipe.family, "width": next(iter(found.values())).key.in_features}
    weights = {f"{name}.{key}": value.detach().cpu().contiguous()
               for name, module in found.items() for key, value in module.state_dict().items()}  # fmt: skip
    partial = folder / f".{USER_WEIGHTS}.partial"
    save_file(weights, partial, metadata={"diffalign": json.dumps(said, sort_keys=True)})
    os.replace(partial, folder / USER_WEIGHTS)
    return folder / USER_WEIGHTS


def load_user_adapter(pipe: LatentPipeline, path: str | Path) -> dict[str, Any]:
    """Loads a file or a run's folder onto a pipeline, frozen and in the network's dtype; returns what the file says.

    Afterwards `generate(..., user=tokens)` draws for a user; without one, and for tokens of zeros, it is the base.

    Raises:
        ValueError: no such file, not a user adapter, made for another network, or one is attached already.
    """
    file = Path(path) / USER_WEIGHTS if Path(path).is_dir() else Path(path)
    facts = read_facts(file)
    attach_user_adapter(pipe, facts["width"])
    own = {f"{name}.{key}": value for name, module in projections(pipe).items()
           for key, value in module.state_dict().items()}  # fmt: skip
    stored = load_file(file)
    strange = sorted(key for key in own.keys() | stored.keys()
                     if key not in own or key not in stored or own[key].shape != stored[key].shape)  # fmt: skip
    if strange:
        remove_user_adapter(pipe)
        raise ValueError(f"{file}: expected a user adapter for the {pipe.lora_prefix} of {pipe.name} ({pipe.family}), "
                         f"got one for {facts.get('base_model', 'another model')} ({facts['family']}): "
                         f"{len(strange)} weights differ, such as {strange[0]}")  # fmt: skip
    dtype = next(p.dtype for name, p in pipe.network.named_parameters() if ".user." not in name)
    for name, module in projections(pipe).items():
        module.load_state_dict({key: stored[f"{name}.{key}"] for key in module.state_dict()})
        module.to(dtype).requires_grad_(False)
    return facts


def remove_user_adapter(pipe: LatentPipeline) -> None:
    """The network without its user adapter."""
    detach_projections(pipe.network)


def projections(pipe: LatentPipeline) -> dict[str, UserProjection]:
    """What is attached, by the name of the attention that it belongs to."""
    return {name.removesuffix(".user"): module for name, module in pipe.network.named_modules()
            if isinstance(module, UserProjection)}  # fmt: skip


def read_facts(file: Path) -> dict[str, Any]:
    """What a user adapter says of itself: family, width, and what training knew of it.

    Raises:
        ValueError: no such file, or not a user adapter.
    """
    try:
        with safe_open(file, "pt") as stored:
            facts = json.loads((stored.metadata() or {}).get("diffalign", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: expected a user adapter, {USER_WEIGHTS} as a run with train: user writes it, and "
                         f"it cannot be read ({error})") from error  # fmt: skip
    if not isinstance(facts, dict) or "width" not in facts or "family" not in facts:
        raise ValueError(f"{file}: expected a user adapter, {USER_WEIGHTS} as a run with train: user writes it, got "
                         f"another kind of file")  # fmt: skip
    return facts
