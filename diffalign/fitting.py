"""How many pictures go through a reward at once: what the device holds, and half of it whenever that was too much."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from diffalign.rewards.base import Reward, Weighted

log = logging.getLogger("diffalign")

ON_CPU = 16  # beyond it a ViT gets no faster per picture: its matrices fill the caches already
MOST = 256  # beyond it a GPU does not either, and a broken file costs more
SHARE = 0.5  # of the free memory; the rest is for what the estimate leaves out
SIDE = 224  # of a reward that does not say what it reads
# What a picture takes on the way through a ViT, per pixel that the ViT reads: an estimate, not measured on a GPU. A
# block of a ViT-H/14 at 224 pixels holds 13 MB at its widest in fp32 (257 tokens x 1280 x 10: residual, its norm, the
# hidden layer before and after GELU). 640 bytes are 32 MB: as much again is left for the picture before the resize.
BYTES_PER_PIXEL = 640

Result = TypeVar("Result")


def batch_size_for(side: int | None, device: torch.device | str) -> int:
    """Pictures in a batch for a reward that reads squares of `side` pixels, a power of two from 1 to 256.

    On a CPU it is 16, on a GPU what half of the memory that is free now holds by the estimate of `BYTES_PER_PIXEL`.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, used by nothing
    return fitting(side, free + idle)


def side_of(rewards: Reward) -> int | None:
    """The largest square that one of them reads, in pixels; None where none reads a square."""
    terms = rewards.rewards.values() if isinstance(rewards, Weighted) else [rewards]
    return max((term.card.side or 0 for term in terms), default=0) or None


def fitting(side: int | None, free_bytes: float) -> int:
    """The largest power of two, 1 to 256, whose pictures take at most half of `free_bytes` by the estimate."""
    wanted = SHARE * free_bytes / (BYTES_PER_PIXEL * (side or SIDE) ** 2)
    size = 1
    while size < MOST and 2 * size <= wanted:
        size *= 2
    return size


def in_batches(count: int, size: int, do: Callable[[slice], Result]) -> Iterator[tuple[slice, Result]]:
    """(which, do(which)) for `count` items in order, `size` at a time; half as many from where the memory runs out.

    A batch that did not fit is done again in halves, so nothing is left out and nothing done twice that succeeded.

    Raises:
        ValueError: a size below 1, or one item alone does not fit.
    """
    if size < 1:
        raise ValueError(f"expected a batch_size of at least 1, got {size}")
    start = 0
    while start < count:
        some = slice(start, min(start + size, count))
        result = _unless_out_of_memory(do, some)
        if result is None:
            size = _halved(some.stop - start)
            continue
        yield some, result[0]
        start = some.stop


def _unless_out_of_memory(do: Callable[[slice], Result], some: slice) -> tuple[Result] | None:
    try:
        return (do(some),)
    except torch.OutOfMemoryError:
        # returned from here, so that the frames of the failed pass, which hold its tensors, are gone before the next
        return None


def _halved(size: int) -> int:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if size == 1:
        raise ValueError("a single picture does not fit into the memory of the device: use fewer rewards at once, "
                         "dtype: bfloat16, or another --device")  # fmt: skip
    log.warning("%d pictures at once do not fit into the memory of the device; going on with %d", size, size // 2)
    return size // 2
