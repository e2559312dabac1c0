"""Who computes: this process, which decodes the next batch meanwhile, or Ray's workers (`scoring.ray_engine`)."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from diffalign.fitting import Fitted
from diffalign.manifests import Entry
from diffalign.rewards import load_rewards
from diffalign.rewards.base import Weighted
from diffalign.rewards.clips import Shown
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
Opening = tuple[Entry, "Future[Shown | str]"]


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
    """Scores batches in order, in halves where the memory runs out; threads open the next one's pictures meanwhile.

    Raises:
        ValueError: one picture alone does not fit the memory of the device, or those that a reward compares.
    """
    waiting: deque[tuple[int, list[Opening]]] = deque()
    fitted = Fitted(functools.partial(_outcomes, rewards), divisible=not rewards.card.compares)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for number, batch in enumerate(batches):
                waiting.append((number, [(entry, pool.submit(opened, entry)) for entry in batch]))
                if len(waiting) > AHEAD:
                    done, openings = waiting.popleft()
                    yield done, fitted(openings)
            while waiting:
                done, openings = waiting.popleft()
                yield done, fitted(openings)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _outcomes(rewards: Weighted, openings: Sequence[Opening]) -> list[Outcome]:
    return score_batch(rewards, [entry for entry, _ in openings], [picture.result() for _, picture in openings])
