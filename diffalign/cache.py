"""Latents and text embeddings, computed once and kept: keyed by content, shared between runs, safe to interrupt.

The key of a latent is the hash of the picture's bytes, the view (size, crop, flip) and the VAE's weights; that of an
embedding, of the prompt and the text encoder's weights. So nothing ever needs to be invalidated by hand. Mean and
log-variance are kept, not a draw: training draws a fresh latent each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffalign.data.example import Example
from diffalign.pipelines.base import LatentPipeline
from diffalign.sampling import Condition
from diffalign.shards import Entry, Shards

Progress = Callable[[str, int, int], None]  # (what, done, total)


class Cache:
    """Latent moments and text embeddings of one model, under `root`.

    Args:
        root: the folder; several models and several runs, also at once, may share it.
        dtype: of what is stored; float16 halves the space and rounds to 3 digits. Each has its own files.
        flush_seconds: how much work a kill may cost.
    """

    def __init__(
        self, root: Path, pipe: LatentPipeline, *, dtype: torch.dtype = torch.float32, flush_seconds: float = 15.0
    ) -> None:
        self.dtype = dtype
        suffix = "" if dtype == torch.float32 else f"-{str(dtype).removeprefix('torch.')}"
        self.latents = Shards(root / f"latents-{pipe.fingerprint('vae')}{suffix}", flush_seconds)
        self.texts = Shards(root / f"texts-{pipe.fingerprint('text')}{suffix}", flush_seconds)

    def fill(
        self,
        pipe: LatentPipeline,
        examples: Sequence[Example],
        prompts: Iterable[str],
        batch_size: int,
        progress: Progress,
    ) -> None:
        """Computes what is missing for these examples and prompts; what is there is verified, and not computed again.

        Raises:
            OSError: the disk is full; what is complete is kept.
            ValueError: a size that the model cannot take, or a picture that could be read when the data were loaded
                and cannot be now.
        """
        for extent in sorted({example.crop.extent for example in examples}):
            pipe.latent_shape(*extent)
        own = (prompt for example in examples for prompt in example.prompts)
        self._fill_texts(pipe, [*dict.fromkeys([*own, *prompts])], batch_size, progress)
        self._fill_latents(pipe, examples, batch_size, progress)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """The conditions of cached prompts, stacked: every value [len(prompts), ...].

        Raises:
            ValueError: a prompt that was not cached.
        """
        entries = [self._get(self.texts, prompt, f"prompt {prompt!r}") for prompt in prompts]
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

    def moments(self, example: Example) -> tuple[Entry, ...]:
        """{"mean", "logvar"}, each fp32 [C, h, w], of each member.

        Raises:
            ValueError: an example that was not cached.
        """
        what = f"a picture of {example.record.source}"
        return tuple(self._get(self.latents, key, what) for key in example.cache_keys())

    def _get(self, shards: Shards, key: str, what: str) -> Entry:
        hashed = _hash(key)
        if hashed not in shards:
            raise ValueError(f"{what} is not in the cache {shards.folder}; fill the cache with it first")
        return {name: _float32(value) for name, value in shards.get(hashed).items()}

    def _stored(self, value: Tensor) -> Tensor:
        value = value.detach().cpu()
        return value.to(self.dtype, copy=True) if value.is_floating_point() else value.clone()

    @torch.no_grad()
    def _fill_texts(self, pipe: LatentPipeline, prompts: list[str], batch_size: int, progress: Progress) -> None:
        wanted = {_hash(prompt): prompt for prompt in prompts}
        self.texts.verify(wanted)
        missing = self.texts.missing(wanted)
        with self.texts.writer() as put:
            for start in range(0, len(missing), batch_size):
                some = missing[start : start + batch_size]
                encoded = pipe.encode_prompts([wanted[key] for key in some])
                put({key: {n: self._stored(v[i]) for n, v in encoded.items()} for i, key in enumerate(some)})
                progress("prompts", min(start + batch_size, len(missing)), len(missing))

    @torch.no_grad()
    def _fill_latents(
        self, pipe: LatentPipeline, examples: Sequence[Example], batch_size: int, progress: Progress
    ) -> None:
        self.latents.verify(_hash(key) for example in examples for key in example.cache_keys())
        todo = [example for example in examples if self.latents.missing(map(_hash, example.cache_keys()))]
        # batches of one size; otherwise the order of the file, which is quick to read
        todo.sort(key=lambda example: example.crop.size)
        seen: set[str] = set()  # two examples may share a picture
        done = 0
        with self.latents.writer() as put:
            while done < len(todo):
                size = todo[done].crop.size
                some = [example for example in todo[done : done + batch_size] if example.crop.size == size]
                pictures = _pictures(some)
                keys = [key for key in self.latents.missing(pictures) if key not in seen]
                seen.update(keys)
                if keys:
                    mean, logvar = pipe.encode(torch.stack([pictures[key] for key in keys]).float() / 255)
                    _refuse_overflow(mean, logvar, some)
                    moments = [
                        {"mean": self._stored(m), "logvar": self._stored(v)} for m, v in zip(mean, logvar, strict=True)
                    ]
                    put(dict(zip(keys, moments, strict=True)))
                done += len(some)
                progress("pairs", done, len(todo))


def _pictures(examples: Sequence[Example]) -> dict[str, Tensor]:
    return {
        _hash(key): pixels
        for example in examples
        for key, pixels in zip(example.cache_keys(), example.pixels(), strict=True)
    }


def _refuse_overflow(mean: Tensor, logvar: Tensor, examples: Sequence[Example]) -> None:
    """What is not finite would stay in the cache, and spoil every run that reads it."""
    if not (mean.isfinite().all() and logvar.isfinite().all()):
        raise ValueError(f"the VAE gave latents that are not finite for pictures of {examples[0].record.source} to "
                         f"{examples[-1].record.source}: expected numbers; in fp16 a VAE may overflow, so set "
                         f"mixed_precision: bf16, or take a VAE that is repaired for fp16")  # fmt: skip


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:40]
