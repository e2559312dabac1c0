"""Cached pairs as training batches: order, posterior sampling and prompt dropout, all from given generators."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.cache import Cache
from diffalign.data.images import Frame
from diffalign.data.pairs import Pair, epoch_order
from diffalign.methods.base import PairBatch
from diffalign.process import moved
from diffalign.sampling import Condition

FrameCondition = Callable[[Sequence[Frame]], Condition]


@dataclass(frozen=True)
class Batches:
    """Training and validation pairs of one run; holds neither VAE nor text encoder."""

    cache: Cache
    train: Sequence[Pair]
    validation: Sequence[Pair]
    batch_size: int
    validation_batch_size: int
    seed: int
    frame_condition: FrameCondition | None = None  # what the network is told of a pair beside its prompt

    @functools.cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each training pair."""
        return tuple(pair.view.size for pair in self.train)

    def fingerprint(self) -> str:
        """Hash of what is trained on: pictures, views, prompts and labels."""
        digest = hashlib.sha256()
        for pair in self.train:
            digest.update(f"{pair.cache_keys()} {pair.prompt!r} {pair.label}".encode())
        return digest.hexdigest()

    def batch(self, number: int, generator: torch.Generator, prompt_dropout: float, device: torch.device) -> PairBatch:
        """The batch of this number in the endless sequence of shuffled epochs."""
        epoch, index = divmod(number, len(epoch_batches(self.sizes, self.batch_size, self.seed, 0)))
        pairs = [self.train[i] for i in epoch_batches(self.sizes, self.batch_size, self.seed, epoch)[index]]
        dropped = torch.rand(len(pairs), generator=generator) < prompt_dropout
        prompts = ["" if drop else pair.prompt for pair, drop in zip(pairs, dropped.tolist(), strict=True)]
        return self._collate(pairs, prompts, generator, device)

    def validation_batches(self, seed: int, device: torch.device) -> Iterator[PairBatch]:
        """All held-out pairs, in order, with a fixed draw of their latents."""
        generator = torch.Generator().manual_seed(seed)
        size = self.validation_batch_size
        for start in range(0, len(self.validation), size):
            pairs = self.validation[start : start + size]
            yield self._collate(pairs, [pair.prompt for pair in pairs], generator, device)

    def _collate(
        self, pairs: Sequence[Pair], prompts: Sequence[str], generator: torch.Generator, device: torch.device
    ) -> PairBatch:
        moments = [self.cache.moments(pair) for pair in pairs]
        winner, loser = (moved(_posterior_sample([m[side] for m in moments], generator), device) for side in (0, 1))
        condition = self.cache.condition(prompts)
        if self.frame_condition:
            condition |= self.frame_condition([pair.frame for pair in pairs])
        condition = {name: moved(value, device) for name, value in condition.items()}
        return PairBatch(winner, loser, condition, moved(torch.tensor([pair.label for pair in pairs]), device))


def _posterior_sample(moments: Sequence[dict[str, Tensor]], generator: torch.Generator) -> Tensor:
    """A draw from each VAE posterior, not its mode: what the network was trained on."""
    mean, logvar = (torch.stack([m[name] for m in moments]).float() for name in ("mean", "logvar"))
    return mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)


@functools.lru_cache(maxsize=4)
def epoch_batches(
    sizes: tuple[tuple[int, int], ...], batch_size: int, seed: int, epoch: int
) -> tuple[tuple[int, ...], ...]:
    """Indices of each batch of one epoch, from (seed, epoch) alone; pictures of one batch are of one size.

    What does not fill a batch is left out of this epoch (another part each time); a size with too few pictures for
    one batch fills it by repeating them.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in epoch_order(len(sizes), seed, epoch):
        groups[sizes[index]].append(index)
    batches = []
    for size in sorted(groups):
        group = groups[size]
        group = group * -(-batch_size // len(group)) if len(group) < batch_size else group
        batches += [tuple(group[i : i + batch_size]) for i in range(0, len(group) - batch_size + 1, batch_size)]
    order = epoch_order(len(batches), seed + 1, epoch)
    return tuple(batches[i] for i in order)
