"""Features of prompts, each encoded once: what a tower says of a prompt depends on the prompt alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.rewards.base import full_precision

LIMIT = 4096  # prompts; 16 MB at a width of 1024
TOGETHER = 64  # new prompts in one forward pass, where they are encoded together


class Reader(Protocol):
    """The text side of a `Tower`, or what reads prompts as one does."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def state(self) -> Hashable:
        """Another value after its weights have moved, changed their type or were overwritten."""

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """[B, ...], a row for each prompt, which depends on that prompt alone."""


@dataclass(frozen=True)
class NetworkReader(ABC):
    """A `Reader` that is a frozen network: where its weights are, and whether they are still the same."""

    model: Any  # transformers' annotations do not survive strict checking: config.text_config may be a dict there

    @abstractmethod
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """As `Reader.text_features`."""

    @abstractmethod
    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of which only a part is read."""

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def state(self) -> Hashable:
        # every write in place counts up a tensor's version; a move or a cast gives it other memory
        first = self._first
        versions = sum(0 if weight.is_inference() else weight._version for weight in (first, *self._weights))
        return first.device, first.dtype, first.data_ptr(), versions

    @property
    def _first(self) -> Tensor:
        """Anew from the model: other parameters may have been put in the place of `_weights`."""
        first: Tensor = next(self.model.parameters())
        return first

    @cached_property
    def _weights(self) -> list[Tensor]:
        return list(self.model.parameters())  # walking over a large model takes milliseconds


def longer_than(context: int, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The prompts of which a tokenizer of transformers makes more than `context` tokens."""
    # verbose=False: the tokenizer's own warning would say that indexing errors follow, which truncation prevents
    ids = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
    return [prompt for prompt, own in zip(prompts, ids, strict=True) if len(own) > context]


class TextFeatures:
    """What one reader makes of the latest prompts, without gradient; of a tower, features of unit length in fp32.

    On a CPU a prompt is encoded alone: a row changes in its last bits with the size of its batch, and no score is to
    depend on what was asked before. On other devices, where the launches of a forward pass cost more than its
    arithmetic, new prompts are encoded together, and such last bits are accepted.

    Features are forgotten when the tower is another one, moves, changes its type, or gets other weights.

    Args:
        limit: prompts that are kept; the one that was asked for longest ago goes first.
        new: told of the prompts that are encoded for the first time, or again.
        unit: whether features [D] are brought to unit length.
    """

    def __init__(
        self, limit: int = LIMIT, new: Callable[[Sequence[str]], None] | None = None, unit: bool = True
    ) -> None:
        self.limit, self._new, self._unit = limit, new, unit
        self._of: tuple[Reader, Hashable] | None = None
        self._rows: dict[str, Tensor] = {}  # oldest first

    def __call__(self, tower: Reader, prompts: Sequence[str]) -> Tensor:
        """[B, ...] of B prompts, on the tower's device; each distinct one goes through the tower at most once."""
        self._forget_unless_of(tower)
        found = {prompt: self._rows.pop(prompt) for prompt in dict.fromkeys(prompts) if prompt in self._rows}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if missing and self._new:
            self._new(missing)
        for some in _parts(missing, tower):
            found |= zip(some, _encoded(tower, some, self._unit), strict=True)
        self._rows |= found
        for prompt in list(self._rows)[: max(0, len(self._rows) - self.limit)]:
            del self._rows[prompt]
        return torch.stack([found[prompt] for prompt in prompts])

    def _forget_unless_of(self, tower: Reader) -> None:
        state = tower.state
        if self._of is None or self._of[0] is not tower or self._of[1] != state:
            self._of, self._rows = (tower, state), {}


def _parts(prompts: Sequence[str], tower: Reader) -> Iterator[Sequence[str]]:
    size = 1 if tower.device.type == "cpu" else TOGETHER
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _encoded(tower: Reader, prompts: Sequence[str], unit: bool) -> list[Tensor]:
    # what is made in inference mode could not be used for a gradient later
    with torch.inference_mode(False), torch.no_grad(), full_precision():
        rows = tower.text_features(prompts)
        return [
            row.clone() for row in (F.normalize(rows, dim=-1) if unit else rows)
        ]  # a view would keep its whole batch alive
