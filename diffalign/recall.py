"""What a fixed reference made of pictures, kept beside the caches of latents and embeddings: computed once, then read.

The key is the hash of the reference's weights, of what is computed (the levels, the guidance ...) and of the very bytes
that a row follows from: its latent and its condition. So nothing has to be invalidated by hand.

A resumed run repeats the killed one bit for bit. Kernels round differently for other batch shapes, so a whole batch is
computed as soon as one of its rows is missing, and what was kept earlier wins; and since rows are written in the order
in which they were computed, a run that goes on from a checkpoint misses what the killed run missed at that step.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from diffalign.config import RunConfig
from diffalign.methods.base import Remember, computed
from diffalign.process import moved
from diffalign.reference import Fixed
from diffalign.shards import FLUSH_BYTES, Entry, Shards

NAME = "value"  # of the one tensor of an entry


def fingerprint(network: torch.nn.Module, settings: str) -> str:
    """Hash of all weights and buffers that are not in training, and of settings that results depend on."""
    digest = hashlib.sha256(f"{type(network).__name__} {settings}".encode())
    frozen = [(name, p) for name, p in network.named_parameters() if not p.requires_grad]
    for name, value in sorted([*frozen, *network.named_buffers()]):
        digest.update(f"{name} {value.dtype}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()[:32]


@final
class Recall:
    """`diffalign.methods.base.Remember` of one reference.

    Args:
        root: the cache folder; runs with the same reference share what is in it.
        network: the reference's; its weights are hashed at the first call, which takes seconds for a large one.
        settings: what else the results depend on, such as the precision.
    """

    def __init__(self, root: Path, network: torch.nn.Module, settings: str = "") -> None:
        self._root, self._network, self._settings = root, network, settings
        self._pending: dict[str, Entry] = {}

    @functools.cached_property
    def shards(self) -> Shards:
        """Where the rows are; made when the first is asked for."""
        return Shards(self._root / f"trajectories-{fingerprint(self._network, self._settings)}")

    def __call__(self, what: str, rows: Mapping[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """[B, ...], fp32: of each row what was kept, or what `compute` [B, ...] makes of all of them now.

        Raises:
            OSError: the disk is full; what was written stays valid.
        """
        keys = _keys(what, rows)
        known = {key: value for key in dict.fromkeys(keys) if (value := self._kept(key)) is not None}
        if len(known) == len(set(keys)):
            return moved(torch.stack([known[key] for key in keys]), next(iter(rows.values())).device)
        fresh = compute()
        for key, value in zip(keys, fresh.float().cpu(), strict=True):
            if key not in known:
                known[key] = value.clone()
            if key not in self.shards:  # or not any more: a damaged file takes its other rows with it
                self._pending[key] = {NAME: known[key]}
        if sum(e[NAME].nbytes for e in self._pending.values()) >= FLUSH_BYTES:
            self.flush()
        return moved(torch.stack([known[key] for key in keys]), fresh.device)

    def flush(self) -> None:
        """Writes what is only in memory yet; a run does so before each checkpoint."""
        if self._pending:
            pending, self._pending = self._pending, {}
            self.shards.put(pending)

    def _kept(self, key: str) -> Tensor | None:
        if key in self._pending:
            return self._pending[key][NAME]
        if key not in self.shards:
            return None
        try:
            return self.shards.get(key)[NAME]
        except ValueError:  # went bad on the disk: set aside, to be computed again
            self.shards.verify([key])
            return None


def recalling(config: RunConfig, reference: object, shards: bool) -> Remember:
    """What a run keeps of its reference; nothing if that moves, or is in shards, which all ranks must call together."""
    if not isinstance(reference, Fixed) or shards:
        return computed
    return Recall(Path(config.cache_dir), reference.network, config.mixed_precision)


def _keys(what: str, rows: Mapping[str, Tensor]) -> list[str]:
    """One per row, of all that it follows from."""
    names = sorted(rows)
    content = [rows[name].detach().cpu() for name in names]
    keys = []
    for index in range(len(content[0])):
        digest = hashlib.sha256(what.encode())
        for name, values in zip(names, content, strict=True):
            digest.update(f"{name} {values.dtype} {list(values.shape[1:])}".encode())
            digest.update(_bytes(values[index]))
        keys.append(digest.hexdigest()[:40])
    return keys


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
