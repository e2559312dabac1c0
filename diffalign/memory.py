"""Whether a run fits a device, and whether it needs gradient checkpointing for that: by counting, not by habit.

Checkpointing costs a quarter more arithmetic and twice as many kernel launches, so it is worth having only where memory
is short.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch

from diffalign.config import RunConfig
from diffalign.estimate import estimate

log = logging.getLogger("diffalign")

USABLE = 0.9  # of the memory: what the allocator wastes and cuBLAS takes is not counted by `estimate`


def memory_budget(config: RunConfig, device: torch.device) -> float | None:
    """Bytes that the run may take: `memory_gb`, else what the GPU has free; None on a CPU, which is not limited."""
    if config.memory_gb is not None:
        return config.memory_gb * 1e9
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device))  # what this process holds already is the run's own


def with_checkpointing_planned(
    config: RunConfig, budget: float | None, architecture: Mapping[str, Any] | None = None
) -> RunConfig:
    """The config with `gradient_checkpointing` decided where it was left open: off when it fits without.

    Raises:
        ValueError: the run does not fit; says by how much, and what to set.
    """
    if budget is None:
        return dataclasses.replace(config, gradient_checkpointing=bool(config.gradient_checkpointing))
    for checkpointing in (False, True):
        if config.gradient_checkpointing not in (None, checkpointing):
            continue
        planned = dataclasses.replace(config, gradient_checkpointing=checkpointing)
        needed = estimate(planned, architecture).total_bytes
        if needed <= USABLE * budget:
            log.info("memory: about %.1f of %.1f GB%s", needed / 1e9, budget / 1e9,
                     ", with gradient checkpointing" if checkpointing else "")  # fmt: skip
            return planned
    usable = USABLE * budget
    raise ValueError(
        f"the run needs about {needed / 1e9:.2f} GB, and of {budget / 1e9:.2f} GB that are free "
        f"{usable / 1e9:.2f} can be used: {(needed - usable) / 1e9:.2f} GB too few; {smaller(planned)}"
    )


def smaller(config: RunConfig) -> str:
    """The next setting that takes less memory."""
    if config.mixed_precision == "no":
        return "set mixed_precision: bf16"
    if not config.gradient_checkpointing:
        return "set gradient_checkpointing: true"
    if config.train_batch_size > 1:
        return "lower train_batch_size, and raise gradient_accumulation_steps by as much"
    return "set train: lora" if config.train == "full" else "lower resolution, or take a smaller model"
