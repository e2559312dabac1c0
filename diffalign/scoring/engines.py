"""Who computes: this process, which decodes the next batch meanwhile, or Ray's workers (`scoring.ray_engine`)."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from diffalign.manifests import Entry
from diffalign.rewards import load_rewards
from diffalign.rewards.base import Weighted
from diffalign.scoring.batch import Outcome, opened, score_batch

ENGINES: dict[str, str] = {
    "local": "diffalign.scoring.engines:run_here",
    "ray": "diffalign.scoring.ray_engine:run_on_ray",
}
AHEAD = 1  # batches that are decoded while one is scored: their pictures are in memory whole
MOST_THREADS = 8


@dataclass(frozen=True)
class Job:
    """What an engine needs; it is sent to other processes but for `rewards`, which they load themselves.

    Args:
        rewards: loaded here.
        sections: what they were loaded from: reward -> {"weight": ..., options}.
        device: of this process; workers of another one choose between cpu and cuda by it.
        attention: the kernel that was asked for.
        actors: how many workers; None for one per GPU or CPU.
    """

    rewards: Weighted
    sections: Mapping[str, Mapping[str, Any]]
    device: str
    attention: str = "auto"
    actors: int | None = None


def load_job(
    sections: Mapping[str, Mapping[str, Any]],
    device: str,
    attention: str = "auto",
    engine: str = "local",
    actors: int | None = None,
) -> Job:
    """A job whose rewards are loaded here, which finds out at once what cannot be had.

    For another engine than the local one they are loaded on the CPU: the devices are the workers'.

    Raises:
        ValueError: as `load_rewards`, or fewer than one actor.
    """
    if actors is not None and actors < 1:
        raise ValueError(f"expected at least one of --actors, got {actors}")
    here = device if engine == "local" else "cpu"
    return Job(load_rewards(sections, device=here), sections, device, attention, actors)


Found = Iterator[tuple[int, list[Outcome]]]  # number of the batch, one outcome per entry


def run_here(job: Job, batches: Sequence[Sequence[Entry]]) -> Found:
    """Scores batches in order, in this process."""
    with attending(job.attention, job.device):
        yield from score_ahead(job.rewards, batches)


def attending(backend: str, device: str) -> contextlib.AbstractContextManager[Any]:
    """The kernel of attention that was asked for; torch's own choice loads nothing, least of all diffusers.

    Raises:
        ValueError: one that is unknown, or does not run here.
    """
    if backend == "auto":
        return contextlib.nullcontext()
    from diffalign.pipelines.attention import preferring, require

    require(backend, torch.device(device), torch.float32)
    return preferring(backend)


def score_ahead(rewards: Weighted, batches: Iterable[Sequence[Entry]]) -> Found:
    """Scores batches in order; threads open the pictures of the next one meanwhile.

    Raises:
        ValueError: a batch that does not fit the memory of the device.
    """
    waiting: deque[tuple[int, Sequence[Entry], list[Future[Image.Image | str]]]] = deque()
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for number, batch in enumerate(batches):
                waiting.append((number, batch, [pool.submit(opened, entry) for entry in batch]))
                if len(waiting) > AHEAD:
                    yield _finished(rewards, *waiting.popleft())
            while waiting:
                yield _finished(rewards, *waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(
    rewards: Weighted, number: int, batch: Sequence[Entry], pictures: Sequence[Future[Image.Image | str]]
) -> tuple[int, list[Outcome]]:
    try:
        return number, score_batch(rewards, batch, [picture.result() for picture in pictures])
    except torch.OutOfMemoryError as error:
        raise ValueError(f"a batch of {len(batch)} pictures does not fit the memory of the device; give a smaller "
                         f"--batch-size; with --out, what is scored so far is kept") from error  # fmt: skip
