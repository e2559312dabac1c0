"""Features of prompts, each encoded once: what a tower says of a prompt depends on the prompt alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.rewards.base import full_precision
from diffalign.rewards.towers import Tower

LIMIT = 4096  # prompts; 16 MB at a width of 1024
TOGETHER = 64  # new prompts in one forward pass, where they are encoded together


class TextFeatures:
    """Unit features of the latest prompts by one tower, fp32, without gradient.

    On a CPU a prompt is encoded alone: a row changes in its last bits with the size of its batch, and no score is to
    depend on what was asked before. On other devices, where the launches of a forward pass cost more than its
    arithmetic, new prompts are encoded together, and such last bits are accepted.

    Features are forgotten when the tower is another one, moves, changes its type, or gets other weights.

    Args:
        limit: prompts that are kept; the one that was asked for longest ago goes first.
        new: told of the prompts that are encoded for the first time, or again.
    """

    def __init__(self, limit: int = LIMIT, new: Callable[[Sequence[str]], None] | None = None) -> None:
        self.limit, self._new = limit, new
        self._of: tuple[Tower, Hashable] | None = None
        self._rows: dict[str, Tensor] = {}  # oldest first

    def __call__(self, tower: Tower, prompts: Sequence[str]) -> Tensor:
        """[B, D] of B prompts, on the tower's device; each distinct one goes through the tower at most once."""
        self._forget_unless_of(tower)
        found = {prompt: self._rows.pop(prompt) for prompt in dict.fromkeys(prompts) if prompt in self._rows}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if missing and self._new:
            self._new(missing)
        for some in _parts(missing, tower):
            found |= zip(some, _encoded(tower, some), strict=True)
        self._rows |= found
        for prompt in list(self._rows)[: max(0, len(self._rows) - self.limit)]:
            del self._rows[prompt]
        return torch.stack([found[prompt] for prompt in prompts])

    def _forget_unless_of(self, tower: Tower) -> None:
        state = tower.state
        if self._of is None or self._of[0] is not tower or self._of[1] != state:
            self._of, self._rows = (tower, state), {}


def _parts(prompts: Sequence[str], tower: Tower) -> Iterator[Sequence[str]]:
    size = 1 if tower.device.type == "cpu" else TOGETHER
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _encoded(tower: Tower, prompts: Sequence[str]) -> list[Tensor]:
    # what is made in inference mode could not be used for a gradient later
    with torch.inference_mode(False), torch.no_grad(), full_precision():
        rows = F.normalize(tower.text_features(prompts), dim=-1)
        return [row.clone() for row in rows]  # a view would keep its whole batch alive
