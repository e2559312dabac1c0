"""The folder of a run: claimed by one config, gone on with by the same one, and what is left in it at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffalign import checkpoint as ckpt
from diffalign.batches import Batches
from diffalign.card import write_card
from diffalign.config import RunConfig, as_dict, dump
from diffalign.config import resolve as resolve_config
from diffalign.distributed import whole
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.lora import save_lora
from diffalign.pipelines.user_adapter import save_user_adapter

RESUMED_CONFIG = "config.yaml"
# what may differ between a run and its continuation; everything else would make it another run
FREE_ON_RESUME = {
    "resume_from_checkpoint", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "logging_steps",
    "validation_steps", "report_to", "output_dir", "cache_dir", "cpu", "validation_prompts", "rewards", "attention",
    "gradient_checkpointing", "memory_gb", "compile", "cuda_graph",
}  # fmt: skip


def claim_folder(folder: Path, config: RunConfig, trains_on_rewards: bool) -> Path | None:
    """Makes the run's folder and writes its config there; returns the checkpoint to go on from, if any.

    Rewards that only measure may change when a run goes on, those that it `trains_on_rewards` may not.

    Raises:
        ValueError: the folder holds another run, or the run that is continued had another config.
    """
    stored = folder / RESUMED_CONFIG
    checkpoint = ckpt.find_checkpoint(folder, config.resume_from_checkpoint)
    if stored.is_file():
        if config.resume_from_checkpoint is None:
            raise ValueError(f"{folder} already holds a run: go on with it by resume_from_checkpoint=latest, "
                             f"or choose another output_dir")  # fmt: skip
        free = FREE_ON_RESUME - ({"rewards"} if trains_on_rewards else set())
        _same_run(as_dict(resolve_config(yaml.safe_load(stored.read_text()))), as_dict(config), folder, free)
    elif config.resume_from_checkpoint not in (None, "latest"):
        raise ValueError(f"{folder} holds no run to go on with ({RESUMED_CONFIG} is missing)")
    folder.mkdir(parents=True, exist_ok=True)
    dump(config, stored)
    return checkpoint


def _same_run(old: dict[str, Any], new: dict[str, Any], folder: Path, free: set[str]) -> None:
    different = [key for key in new if key not in free and old.get(key) != new[key]]
    if different:
        key = different[0]
        raise ValueError(f"{folder} holds a run with another {', '.join(different)} ({key}: {old.get(key)!r} there, "
                         f"{new[key]!r} now): a resumed run keeps its config; choose another output_dir")  # fmt: skip


def facts_of(config: RunConfig, data: Batches, steps: int) -> dict[str, Any]:
    """What a LoRA file says of where it comes from."""
    return {
        "base_model": config.pretrained_model_name_or_path,
        "method": config.method,
        "rank": config.lora.rank,
        "data": config.data,
        "data_sha256": data.fingerprint(),
        "pairs": len(data.train),
        "rewards": config.rewards,
        "steps": steps,
        "seed": config.seed,
        "resolution": config.resolution,
        **({"users": config.users} if config.train == "user" else {}),
    }


def save_result(
    pipe: LatentPipeline, config: RunConfig, folder: Path, facts: Mapping[str, Any], main: bool = True
) -> None:
    """folder/pytorch_lora_weights.safetensors or user_adapter.safetensors, or the whole model in folder/model.

    The main rank writes; the others must call this too, since the network may be in shards.
    """
    if config.train == "user":
        if main:
            save_user_adapter(pipe, folder, facts)
        return
    if config.train == "lora":
        if main:
            save_lora(pipe, folder, facts=facts)
            write_card(folder)
        return
    state = whole(pipe.network.state_dict(), main)
    if main:
        model = load_pipeline(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
        model.network.load_state_dict(state)
        model.save_pretrained(str(folder / "model"))
