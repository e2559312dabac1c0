"""Combinations that cannot be trained, each named with what would work, before anything is loaded."""

from __future__ import annotations

import torch

from diffalign.config import RunConfig
from diffalign.episodes import Replays
from diffalign.methods.base import Method, Need, spreads, updates_of
from diffalign.pipelines.base import LatentPipeline
from diffalign.reference import MOVING

# what the trainer can give a method
SERVED = {Need.PAIRS, Need.REFERENCE, Need.FIXED_REFERENCE, Need.PROMPTS, Need.REWARD, Need.REWARD_GRADIENT,
          Need.SNAPSHOTS, Need.USERS, Need.BASE, Need.COMPARISON}  # fmt: skip


def refuse(config: RunConfig, method: Method) -> None:
    """Combinations that cannot work, named with what would, before anything is loaded."""
    if unserved := method.needs - SERVED:
        raise ValueError(f"method {config.method_name!r} needs {', '.join(sorted(n.value for n in unserved))}, "
                         f"which this trainer does not give yet")  # fmt: skip
    if Need.PAIRS in method.needs and "name" not in config.data:
        raise ValueError(
            f"method {config.method_name!r} needs preference pairs: set data: {{name: pickapic, path: ...}}"
        )
    if Need.PROMPTS in method.needs and "name" not in config.data:
        raise ValueError(f"method {config.method_name!r} needs prompts: set data: {{name: jsonl, path: ...}} with "
                         f'lines such as {{"prompt": "a red circle"}}')  # fmt: skip
    if (config.train == "user") != (Need.USERS in method.needs):
        raise ValueError(f"train: user and a method that is told of users go together, such as ppd; got train: "
                         f"{config.train} and method {config.method_name!r}")  # fmt: skip
    if Need.USERS in method.needs and config.num_frames is not None:
        raise ValueError(f"method {config.method_name!r} tells the network of users, which is there for pictures "
                         f"alone: leave num_frames out, or take dpo")  # fmt: skip
    if Need.BASE in method.needs and config.train != "lora":
        raise ValueError(f"method {config.method_name!r} compares with the base model under a LoRA: set train: lora")
    if isinstance(method, Replays) and config.lora.dropout:
        raise ValueError(f"lora.dropout: expected 0 with method {config.method_name!r}, which replays steps on the "
                         f"network that walked them, got {config.lora.dropout}")  # fmt: skip
    updates = updates_of(method)
    for key in ("max_train_steps", "checkpointing_steps"):
        if getattr(config, key) % updates:
            raise ValueError(f"{key}: expected a multiple of method.updates, which is {updates}, since a rollout is "
                             f"not kept in checkpoints; got {getattr(config, key)}")  # fmt: skip
    if {Need.REWARD, Need.REWARD_GRADIENT} & method.needs and not config.rewards:
        raise ValueError(f"method {config.method_name!r} scores what it draws: set rewards, such as {{shapes: 1.0}}")
    if Need.FIXED_REFERENCE in method.needs and config.reference_name in MOVING:
        raise ValueError(f"method {config.method_name!r} needs a reference that stays as it is, and "
                         f"{config.reference_name!r} moves: set reference: {{name: adapter_off}}, or frozen_copy for "
                         f"train: full")  # fmt: skip
    if getattr(method, "cache", False) and config.posterior == "sample":
        raise ValueError("method.cache keeps what is made of a latent, and with posterior: sample each is a new one: "
                         "set posterior: mean, or method.cache: false")  # fmt: skip
    if config.reference_name in MOVING and config.cuda_graph:
        raise ValueError(f"reference {config.reference_name!r} moves, and cuda_graph: true replays one that does not")
    if config.early_stopping_patience and not config.validation_steps:
        raise ValueError("early_stopping_patience counts validations: set validation_steps")
    if Need.REFERENCE in method.needs and config.reference_name == "none":
        raise ValueError(f"method {config.method_name!r} needs a reference: set reference: {{name: adapter_off}}, "
                         f"or frozen_copy for train: full")  # fmt: skip
    if config.train == "full" and Need.REFERENCE in method.needs and config.reference_name == "adapter_off":
        raise ValueError("train: full has no adapter to switch off: set reference: {name: frozen_copy}")
    if config.rewards and not config.validation_prompts and not {Need.REWARD, Need.REWARD_GRADIENT} & method.needs:
        raise ValueError("rewards are measured on pictures of validation_prompts, and there are none: set some")
    if config.train != "lora" and config.init_lora:
        raise ValueError(
            f"init_lora continues a LoRA, and train: {config.train} has none: set train: lora, or leave init_lora out"
        )


def refuse_other_pixels(config: RunConfig, pipe: LatentPipeline) -> None:
    """Clips for a model that draws pictures, or the other way round.

    Raises:
        ValueError: says which key to set.
    """
    if pipe.clips and config.num_frames is None:
        raise ValueError(f"{pipe.name} draws clips: set num_frames (and height, width, fps), such as 81 for Wan 2.1, "
                         f"or 1 for still pictures")  # fmt: skip
    if config.num_frames is not None and not pipe.clips:
        raise ValueError(f"num_frames is for models that draw clips, and {pipe.name} draws pictures: leave it out")


def refuse_blind_stop(config: RunConfig, held_out: int) -> None:
    """An early stop that has nothing to look at.

    Raises:
        ValueError: says what is missing.
    """
    if config.early_stopping_patience and not held_out:
        raise ValueError("early_stopping_patience goes by held-out examples, and there are none: set a larger "
                         "data.val_fraction, with at least two different prompts in the data")  # fmt: skip


def refuse_uneven_groups(method: Method, processes: int) -> None:
    """Groups that cannot be shared out.

    Raises:
        ValueError: says which sizes can.
    """
    group = getattr(method, "group", 1)
    if spreads(method) and group % processes:
        raise ValueError(f"method.spread shares a group out to {processes} processes: expected method.group to be a "
                         f"multiple of {processes}, got {group}")  # fmt: skip


def refuse_graph(config: RunConfig, device: torch.device, processes: int) -> None:
    """What a recorded step cannot hold."""
    reasons = {
        "a CUDA device": device.type != "cuda",
        "one process": processes > 1,
        "mixed_precision: bf16 or no": config.mixed_precision == "fp16",
        "gradient_checkpointing: false": bool(config.gradient_checkpointing),
        "lora.dropout: 0": config.lora.dropout > 0,
    }
    if config.cuda_graph and (missing := [what for what, absent in reasons.items() if absent]):
        raise ValueError(f"cuda_graph: true needs {' and '.join(missing)}; leave it out here")
