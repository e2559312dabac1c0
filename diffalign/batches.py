"""Cached examples as training batches: order, posterior sampling and prompt dropout, all from given generators."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffalign.cache import Cache
from diffalign.data.example import Example
from diffalign.data.examples import epoch_order
from diffalign.data.images import Frame
from diffalign.methods.base import Batch
from diffalign.pipelines.user_attention import for_nobody, with_user
from diffalign.process import moved
from diffalign.sampling import Condition
from diffalign.selection import Chooser

FrameCondition = Callable[[Sequence[Frame]], Condition]


@dataclass(frozen=True)
class Batches:
    """Training and validation examples of one run; holds neither VAE nor text encoder."""

    cache: Cache
    train: Sequence[Example]
    validation: Sequence[Example]
    batch_size: int
    validation_batch_size: int
    seed: int
    latent_shape: Callable[..., tuple[int, ...]]  # of one picture or clip, from `Crop.extent`
    frame_condition: FrameCondition | None = None  # what the network is told of an example beside its prompts
    chooser: Chooser | None = None  # which training examples are drawn from; None: all
    sampled: bool = True  # latents are draws from their posteriors; else the means
    users: Mapping[str, Tensor] | None = None  # tokens [N, D] of each example's user, where the policy is told of them

    @functools.cached_property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """(height, width, number of members) of each training example: what all of a batch have in common.

        Labels of segments have to be as many too, those of regions are as the size is.
        """
        return tuple(_kind(example) for example in self.train)

    def fingerprint(self) -> str:
        """Hash of what is trained on: pictures, views, prompts and labels."""
        digest = hashlib.sha256()
        for example in self.train:
            digest.update(f"{example.cache_keys()} {example.prompts!r} {example.label} {example.scores}".encode())
            if self.users is not None:
                digest.update(f"{example.record.user!r}".encode())
            if (signs := example.signs) is not None:
                digest.update(f" {signs}".encode())
        return digest.hexdigest()

    def batch(
        self, number: int, generator: torch.Generator, prompt_dropout: float, device: torch.device, step: int = 0
    ) -> Batch:
        """The batch of this number in the endless sequence of shuffled epochs over what is chosen at a step."""
        examples = [self.train[i] for i in self._order(self.chooser.chosen(step) if self.chooser else None).at(number)]
        dropped = (torch.rand(len(examples), generator=generator) < prompt_dropout).tolist()
        return self._collate(examples, dropped, generator, device)

    def _order(self, chosen: tuple[int, ...] | None) -> Order:
        """Of what is chosen; kept until something else is, since it is as long as the data."""
        if not self._orders or self._orders[0].chosen is not chosen:
            self._orders[:] = [Order(self.kinds, self.batch_size, self.seed, chosen)]
        return self._orders[0]

    @functools.cached_property
    def _orders(self) -> list[Order]:
        return []

    def validation_batches(self, seed: int, device: torch.device) -> Iterator[Batch]:
        """All held-out examples, in order, with a fixed draw of their latents."""
        yield from self.all_batches(self.validation, torch.Generator().manual_seed(seed), device)

    def all_batches(
        self, examples: Sequence[Example], generator: torch.Generator, device: torch.device
    ) -> Iterator[Batch]:
        """These examples in order, those of one kind together as long as they follow each other."""
        for start in range(0, len(examples), self.validation_batch_size):
            some = examples[start : start + self.validation_batch_size]
            for _, alike in itertools.groupby(some, _kind):
                same = list(alike)
                yield self._collate(same, [False] * len(same), generator, device)

    def _collate(
        self, examples: Sequence[Example], dropped: Sequence[bool], generator: torch.Generator, device: torch.device
    ) -> Batch:
        """`dropped`: which examples lose their prompts, all members at once."""
        moments = [self.cache.moments(example) for example in examples]
        told = self.frame_condition([example.frame for example in examples]) if self.frame_condition else {}
        tokens = self._tokens(examples)
        members: list[Tensor] = []
        conditions: list[Condition] = []
        for place in range(len(examples[0].prompts)):
            if examples[0].members:
                same = place > 0 and all(e.members[place] == e.members[0] for e in examples)
                # one picture under several prompts is one latent, or not the prompts alone would differ
                drawn = members[0] if same else self._latents([m[place] for m in moments], generator)
                members.append(moved(drawn, device))
            prompts = ["" if drop else e.prompts[place] for e, drop in zip(examples, dropped, strict=True)]
            conditions.append(self._condition(prompts, with_user(told, tokens), device))
        return Batch(
            tuple(members),
            tuple(conditions),
            label=moved(torch.tensor([example.label for example in examples]), device),
            scores=moved(torch.tensor([example.scores for example in examples]), device),
            negative=self._condition([""] * len(examples), for_nobody(told, tokens), device),
            signs=_signs(examples, device),
            prompts=tuple(example.prompt for example in examples),
            shape=self.latent_shape(*examples[0].crop.extent),
        )

    def _latents(self, moments: Sequence[dict[str, Tensor]], generator: torch.Generator) -> Tensor:
        drawn = _posterior_sample(moments, generator)
        return drawn if self.sampled else torch.stack([m["mean"] for m in moments]).float()

    def _tokens(self, examples: Sequence[Example]) -> Tensor | None:
        """[B, N, D], or None where nobody is told of users."""
        return None if self.users is None else torch.stack([self.users[str(e.record.user)] for e in examples])

    def _condition(self, prompts: Sequence[str], told: Condition, device: torch.device) -> Condition:
        return {name: moved(value, device) for name, value in (self.cache.condition(prompts) | told).items()}


def _kind(example: Example) -> tuple[int, ...]:
    segments = example.record.segments
    return (*example.crop.size, len(example.members), *([] if segments is None else [len(segments)]))


def _signs(examples: Sequence[Example], device: torch.device) -> Tensor | None:
    """[B, S] or [B, H, W], if the examples have labels of segments or regions; +1 where the first member is better."""
    signs = [example.signs for example in examples]
    return None if None in signs else moved(torch.tensor(signs, dtype=torch.float32), device)


def _posterior_sample(moments: Sequence[dict[str, Tensor]], generator: torch.Generator) -> Tensor:
    """A draw from each VAE posterior, not its mode: what the network was trained on."""
    mean, logvar = (torch.stack([m[name] for m in moments]).float() for name in ("mean", "logvar"))
    return mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)


@final
class Order:
    """The endless sequence of batches over the chosen examples (None: all); the epoch that is under way is kept."""

    def __init__(
        self, kinds: Sequence[tuple[int, ...]], batch_size: int, seed: int, chosen: tuple[int, ...] | None = None
    ) -> None:
        self.chosen = chosen
        self._kinds = kinds if chosen is None else [kinds[i] for i in chosen]
        self._batch_size, self._seed = batch_size, seed
        self._epoch, self._batches = 0, epoch_batches(self._kinds, batch_size, seed, 0)

    def at(self, number: int) -> Sequence[int]:
        """Indices of the examples of this batch."""
        epoch, index = divmod(number, len(self._batches))  # every epoch has as many
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, epoch_batches(self._kinds, self._batch_size, self._seed, epoch)
        places = self._batches[index]
        return places if self.chosen is None else [self.chosen[place] for place in places]


def epoch_batches(
    kinds: Sequence[tuple[int, ...]], batch_size: int, seed: int, epoch: int
) -> tuple[tuple[int, ...], ...]:
    """Indices of each batch of one epoch, from (seed, epoch) alone; the examples of one batch are of one kind.

    What does not fill a batch is left out of this epoch (another part each time); a kind with too few examples for
    one batch fills it by repeating them.
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index in epoch_order(len(kinds), seed, epoch):
        groups[kinds[index]].append(index)
    batches = []
    for kind in sorted(groups):
        group = groups[kind]
        group = group * -(-batch_size // len(group)) if len(group) < batch_size else group
        batches += [tuple(group[i : i + batch_size]) for i in range(0, len(group) - batch_size + 1, batch_size)]
    order = epoch_order(len(batches), seed + 1, epoch)
    return tuple(batches[i] for i in order)
