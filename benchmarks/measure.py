"""What the benchmarks read off a step, and how they write it down."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.steps import Step
from diffalign.counting import Count

# what computes; everything else moves bytes
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_dot_product")


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched, views too, and the bytes that those which only move data touch.

    `moved_bytes` is inputs plus outputs of every operator that is neither a view nor a matrix product, convolution or
    attention: what would go through memory if nothing were fused and nothing cached.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.moved_bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        name = func.overloadpacket.__name__
        if not func.is_view and name != "_unsafe_view" and not name.startswith(PRODUCTS):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.moved_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def counts(step: Step, seed: int) -> dict[str, int]:
    """Operators and moved bytes of one whole step, and the bytes that its forward pass keeps for the backward pass.

    Deterministic: the first step, which makes the optimizer's state, is taken before. With checkpointing the block that
    is recomputed comes on top of `kept_bytes`.
    """
    step.enter()
    step(seed)
    with Operators() as operators:
        step(seed)
    kept = Count()
    kept.ignore(step.subject.pipe.network)
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
        step.loss(seed)
    return {"operators": operators.operators, "moved_bytes": operators.moved_bytes, "kept_bytes": kept.kept_bytes}


def cpu_times(steps: Mapping[str, Step], rounds: int, seed: int) -> dict[str, list[float]]:
    """CPU milliseconds of `rounds` steps of each variant, interleaved, so that a slow minute is everyone's.

    Time of this process (all its threads), not wall time: other work on the machine matters little.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            step.enter()
            gc.collect()
            start = time.process_time()
            step(seed)
            if number:  # the first round warms up
                times[name].append(1000 * (time.process_time() - start))
    return times


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "peft")}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, with columns that also line up on a screen."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *padded[1:]]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(line(cells) for cells in (header, rule, *rows))
