"""Who the policy is compared with: functions from a pipeline to a policy, so that no objective can tell them apart.

A reference is made after the adapter is attached and before the first step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.compiling import compile_blocks, compiled
from diffalign.pipelines.lora import without_adapters
from diffalign.sampling import Policy

REFERENCES: dict[str, str] = {
    "adapter_off": "diffalign.reference:adapter_off",
    "frozen_copy": "diffalign.reference:frozen_copy",
    "none": "diffalign.reference:none",
}
MakeReference = Callable[[LatentPipeline], Policy | None]


def adapter_off(pipe: LatentPipeline) -> Policy:
    """The same weights with the adapter off: no second copy, and exactly the starting point of a fresh LoRA."""
    return without_adapters(pipe)


def frozen_copy(pipe: LatentPipeline) -> Policy:
    """A copy of the network as it is now: for full fine-tuning, or to stay close to an `init_lora`."""
    frozen = copy.copy(pipe)
    frozen.network = copy.deepcopy(pipe.network).requires_grad_(False).eval()
    if compiled(pipe.network):  # a copy is not; both are to run the same kernels
        compile_blocks(frozen.network)
    return frozen.predict


def none(pipe: LatentPipeline) -> None:
    """Nobody: for methods that compare with nothing, such as SFT."""
