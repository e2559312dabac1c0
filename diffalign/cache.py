"""Latents and text embeddings, computed once and kept: keyed by content, shared between runs, safe to interrupt.

A cache is a folder of safetensors shards. Each shard is written under a temporary name and renamed, so it is complete or
not there; several processes may write at once, since nobody writes into another's shard. Shards, not a file per key,
because a million small files are slow on every file system.

The key of a latent is the hash of the picture's bytes, the view (size, crop, flip) and the VAE's weights; that of an
embedding, of the prompt and the text encoder's weights. So nothing ever needs to be invalidated by hand.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.data.pairs import Pair
from diffalign.pipelines.base import LatentPipeline
from diffalign.sampling import Condition

log = logging.getLogger("diffalign")

Entry = dict[str, Tensor]
Progress = Callable[[str, int, int], None]  # (what, done, total)


class Shards:
    """A folder of safetensors files as one mapping from key to named tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[str, list[str]] = {}  # key -> names inside its shard
        self._shard: dict[str, safe_open] = {}  # type: ignore[type-arg]
        self._known: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def refresh(self) -> None:
        """Learns of shards that this or another process has written; a damaged one is set aside, to be written again."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file in self._known:
                continue
            self._known.add(file)
            try:
                opened = safe_open(file, "pt")
                names = list(opened.keys())
            except (SafetensorError, OSError) as error:
                log.warning("cache: %s is damaged (%s) and will be computed again", file.name, error)
                file.rename(file.with_suffix(".damaged"))
                continue
            for name in names:
                key = name.rpartition(":")[0]
                if self._shard.setdefault(key, opened) is opened:  # two processes may have computed the same key
                    self._names.setdefault(key, []).append(name)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not there, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._shard]

    def put(self, entries: dict[str, Entry]) -> None:
        """Writes one shard.

        Raises:
            OSError: with what to do, when the disk is full; no half-written shard is left under its final name.
        """
        flat = {f"{key}:{name}": t.contiguous() for key, entry in entries.items() for name, t in entry.items()}
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        partial = file.with_suffix(".partial")
        try:
            save_file(flat, partial)
            os.replace(partial, file)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"the cache in {self.folder} could not be written ({error}); what is there stays valid: free "
                          f"some space, or set cache_dir to another disk, and start again") from error  # fmt: skip
        self.refresh()

    def get(self, key: str) -> Entry:
        """The named tensors of one key."""
        return {name.rpartition(":")[2]: self._shard[key].get_tensor(name) for name in self._names[key]}


class Cache:
    """Latent moments and text embeddings of one model, under `root`."""

    def __init__(self, root: Path, pipe: LatentPipeline) -> None:
        self.latents = Shards(root / f"latents-{pipe.fingerprint('vae')}")
        self.texts = Shards(root / f"texts-{pipe.fingerprint('text')}")

    def fill(
        self, pipe: LatentPipeline, pairs: Sequence[Pair], prompts: Iterable[str], batch_size: int, progress: Progress
    ) -> None:
        """Computes what is missing for these pairs and prompts; what is there is not computed again."""
        self._fill_texts(pipe, [*dict.fromkeys([*(p.prompt for p in pairs), *prompts])], batch_size, progress)
        self._fill_latents(pipe, pairs, batch_size, progress)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """The conditions of cached prompts, stacked."""
        entries = [self.texts.get(_hash(prompt)) for prompt in prompts]
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

    def moments(self, pair: Pair) -> tuple[Entry, Entry]:
        """{"mean", "logvar"} [C, h, w] of winner and loser."""
        winner, loser = (self.latents.get(_hash(key)) for key in pair.keys())
        return winner, loser

    def _fill_texts(self, pipe: LatentPipeline, prompts: list[str], batch_size: int, progress: Progress) -> None:
        wanted = {_hash(prompt): prompt for prompt in prompts}
        missing = self.texts.missing(wanted)
        for start in range(0, len(missing), batch_size):
            some = missing[start : start + batch_size]
            encoded = pipe.encode_prompts([wanted[key] for key in some])
            self.texts.put({key: {n: v[i].cpu() for n, v in encoded.items()} for i, key in enumerate(some)})
            progress("prompts", min(start + batch_size, len(missing)), len(missing))

    @torch.no_grad()
    def _fill_latents(self, pipe: LatentPipeline, pairs: Sequence[Pair], batch_size: int, progress: Progress) -> None:
        todo = [pair for pair in pairs if self.latents.missing(map(_hash, pair.keys()))]
        todo.sort(key=lambda pair: pair.view.size)  # batches of one size
        done = 0
        while done < len(todo):
            size = todo[done].view.size
            some = [pair for pair in todo[done : done + batch_size] if pair.view.size == size]
            pictures = {_hash(key): pixels for pair in some for key, pixels in zip(pair.keys(), pair.pixels(), strict=True)}
            keys = self.latents.missing(pictures)
            if keys:  # two pairs may share all their pictures
                mean, logvar = pipe.encode(torch.stack([pictures[key] for key in keys]).float() / 255)
                self.latents.put({key: {"mean": mean[i].cpu(), "logvar": logvar[i].cpu()} for i, key in enumerate(keys)})
            done += len(some)
            progress("pairs", done, len(todo))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:40]
