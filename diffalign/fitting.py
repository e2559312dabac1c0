"""How many pictures go through a reward at once: what the device holds, and half of it whenever that was too much."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

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

Item = TypeVar("Item")
Result = TypeVar("Result")


def batch_size_for(side: int | None, device: torch.device | str) -> int:
    """Pictures in a batch for a reward that reads squares of `side` pixels, a power of two from 1 to 256.

    On a CPU it is 16, on a GPU what half of the memory that is free now holds by the estimate of `BYTES_PER_PIXEL`. A
    GPU that only the workers of a cluster have is not looked at.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
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


class Fitted(Generic[Item, Result]):
    """A function of a batch, one result per item, that is called with half as many from where the memory runs out.

    A batch that did not fit is done again in halves, so nothing is left out, and nothing is done twice that succeeded.

    Args:
        do: (items) -> as many results.
        divisible: False where the items of a batch belong together, as for a reward that compares them.
    """

    def __init__(self, do: Callable[[Sequence[Item]], list[Result]], *, divisible: bool = True) -> None:
        self._do, self._divisible = do, divisible
        self._most: int | None = None

    def __call__(self, items: Sequence[Item]) -> list[Result]:
        """One result per item, in order.

        Raises:
            ValueError: one item alone does not fit, or a batch that cannot be divided.
        """
        results: list[Result] = []
        while len(results) < len(items):
            some = items[len(results) :][: self._most]
            found = _unless_out_of_memory(self._do, some)
            if found is None:
                self._most = self._halved(len(some))
            else:
                results += found
        return results

    def _halved(self, size: int) -> int:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size == 1:
            raise ValueError("a single picture does not fit into the memory of the device: use fewer rewards at once, "
                             "dtype: bfloat16, or another --device")  # fmt: skip
        if not self._divisible:
            raise ValueError(f"{size} pictures that are compared with each other do not fit into the memory of the "
                             f"device: give a smaller --batch-size, or fewer pictures of a prompt")  # fmt: skip
        log.warning("%d pictures at once do not fit into the memory of the device; going on with %d", size, size // 2)
        return size // 2


def _unless_out_of_memory(do: Callable[[Sequence[Item]], list[Result]], some: Sequence[Item]) -> list[Result] | None:
    try:
        return do(some)
    except torch.OutOfMemoryError:
        # returned from here, so that the frames of the failed pass, which hold its tensors, are gone before the next
        return None
