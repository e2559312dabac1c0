"""Batches on the workers of a Ray cluster, with Ray Data (extra `ray`): one actor per GPU, or per CPU without GPUs.

An actor loads the rewards once and runs what `run_here` runs. A worker that dies is replaced and its batches are scored
again; what has come back is in the journal of the process that started the run.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffalign.errors import lines
from diffalign.manifests import Entry
from diffalign.rewards import load_rewards
from diffalign.scoring.batch import Outcome
from diffalign.scoring.engines import Job, attending, score_ahead

AT_ONCE = 4  # batches that an actor is given at once, so that it decodes the next while it scores one


def run_on_ray(job: Job, batches: Sequence[Sequence[Entry]]) -> Iterator[tuple[int, list[Outcome]]]:
    """Scores batches in whatever order they come back: on the cluster that RAY_ADDRESS names, else on one that is
    started here.

    Files of pictures, and of weights, must be where the workers can read them, under the same paths.

    Raises:
        ValueError: Ray is not installed, too few places for the workers, or what `score_batch` raises in one.
    """
    if not batches:
        return
    ray = _ray()
    gpu = job.device.startswith("cuda")
    table = [{"number": number, "batch": pickle.dumps(list(batch))} for number, batch in enumerate(batches)]
    data = ray.data.from_items(table, override_num_blocks=max(1, len(table) // AT_ONCE))
    scored = data.map_batches(
        Worker,
        fn_constructor_args=(dict(job.sections), "cuda" if gpu else "cpu", job.attention),
        batch_size=AT_ONCE,
        compute=ray.data.ActorPoolStrategy(size=_places(ray, gpu, job.actors)),
        **({"num_gpus": 1} if gpu else {"num_cpus": 1}),
    )
    try:
        for row in scored.iter_rows():
            yield int(row["number"]), pickle.loads(row["outcomes"])
    except ray.exceptions.RayError as error:
        raise ValueError(f"a worker of Ray failed: {_cause(error)}") from error


class Worker:
    """What each actor holds: the rewards, loaded there."""

    def __init__(self, sections: Mapping[str, Mapping[str, Any]], device: str, attention: str) -> None:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))  # Ray sets it to the CPUs it gave
        self.rewards, self.device, self.attention = load_rewards(sections, device=device), device, attention

    def __call__(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """{"number", "batch"} of some batches to {"number", "outcomes"}."""
        with attending(self.attention, self.device):
            found = list(score_ahead(self.rewards, [pickle.loads(batch) for batch in given["batch"]]))
        outcomes = np.array([pickle.dumps(outcomes) for _, outcomes in found], dtype=object)
        return {"number": np.asarray(given["number"]), "outcomes": outcomes}


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--engine ray needs Ray Data: pip install 'diffalign[ray]'") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails becomes one sentence
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return ray


def _places(ray: Any, gpu: bool, actors: int | None) -> int:
    """How many actors are asked for, or the cluster has room for.

    Raises:
        ValueError: more than it has room for: Ray would wait for more machines, for ever.
    """
    kind = "GPU" if gpu else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if there < (actors or 1):
        raise ValueError(f"--engine ray: expected room for {actors or 1} workers, and the cluster has {there} {kind}s; "
                         f"give fewer --actors, {'--device cpu, ' if gpu else ''}or a larger cluster")  # fmt: skip
    return actors or there


def _cause(error: BaseException) -> str:
    """The innermost error's last line: what the worker itself would have said."""
    while error.__cause__ is not None:
        error = error.__cause__
    return lines(error)[-1]
