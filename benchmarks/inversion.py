"""`make bench-inversion`: InPO's inversion of a batch of pictures, in one go against one picture at a time.

    python -m benchmarks.inversion --out runs/bench-inversion.json
    python -m benchmarks.inversion --device cuda --full       # SDXL and SD3-medium at full size, random weights, bf16

Every picture has its own time to be walked to, so walks have different lengths. In a batch the k-th steps of all that
have one are one call; by the released code's way a batch is one pair, here one picture. Both take the same network
evaluations. First both must come to the same latents and targets; only then is anything timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import median, table, versions
from benchmarks.models import MODELS, Architecture, build_pipeline, sd3_mini, sdxl_8m
from benchmarks.steps import random_cached
from diffalign.inversion import Walk, inversion_stepper, invert_each, levels_of, walks
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.common import stock_warnings_off
from diffalign.sampling import Condition, Stepper
from diffalign.writing import write_json

SEED = 7
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative rms: kernels round differently by batch shape
SMALL: dict[str, Callable[[], Architecture]] = {"sdxl-8m": sdxl_8m, "sd3-mini": sd3_mini}


@dataclass(frozen=True)
class Task:
    """Pictures [B, ...] of one model, their conditions, and how far each is walked."""

    pipe: LatentPipeline
    x0: Tensor
    condition: Condition
    levels: Tensor
    tau: Tensor

    def walk(self, rows: Sequence[int]) -> Walk:
        return walks(self.levels, self.tau[list(rows)])

    def step_of(self, condition: Condition) -> Stepper:
        pipe = self.pipe
        return inversion_stepper(pipe.predict, pipe.process, pipe.parametrization, condition, clean=True)

    @torch.no_grad()
    def invert(self, rows: Sequence[int]) -> Tensor:
        """[len(rows), ...]: these pictures, in one go."""
        some = {name: value[list(rows)] for name, value in self.condition.items()}
        return invert_each(self.step_of, self.x0[list(rows)], some, self.walk(rows))


def task(model: Architecture, pictures: int, steps: int, device: torch.device, dtype: torch.dtype) -> Task:
    """Random latents and embeddings; times as the model trains them, snapped to the levels."""
    torch.manual_seed(SEED)
    pipe = build_pipeline(model, device, dtype)
    cached = random_cached(model, pictures, device)
    tau = pipe.process.training_times(pictures, torch.Generator().manual_seed(SEED))
    return Task(pipe, cached.mean[:pictures].to(device), cached.condition, levels_of(pipe.times(steps)), tau)


def together(work: Task) -> Tensor:
    return work.invert(range(len(work.x0)))


def one_by_one(work: Task) -> Tensor:
    return torch.cat([work.invert([row]) for row in range(len(work.x0))])


WAYS: dict[str, Callable[[Task], Tensor]] = {"one by one": one_by_one, "together": together}


def parity(work: Task, dtype: torch.dtype) -> float:
    """Largest relative rms difference of the latents of any picture.

    Raises:
        AssertionError: it is above the tolerance, or the inversion has led nowhere.
    """
    slow, fast = one_by_one(work), together(work)
    worst = ((fast - slow).flatten(1).norm(dim=1) / slow.flatten(1).norm(dim=1)).max().item()
    assert worst <= TOLERANCE[dtype], f"one by one and together differ by {worst:.2g}, allowed {TOLERANCE[dtype]:.0e}"
    assert ((slow - work.x0).flatten(1).norm(dim=1) > 0).all(), "a picture has not moved"
    return worst


def seconds(work: Task, rounds: int) -> dict[str, list[float]]:
    """Wall seconds of each way, interleaved, so that a slow minute is everyone's; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, way in WAYS.items():
            _wait(work)
            start = time.perf_counter()
            way(work)
            _wait(work)
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def _wait(work: Task) -> None:
    if work.x0.device.type == "cuda":
        torch.cuda.synchronize(work.x0.device)


def measured(model: Architecture, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One row: parity first, then times."""
    work = task(model, args.pictures, args.steps, device, dtype)
    difference = parity(work, dtype)
    counts = work.walk(range(args.pictures)).counts
    times = {name: median(values) for name, values in seconds(work, args.rounds).items()}
    ratio = times["one by one"] / times["together"]
    return {"model": model.name, "pictures": args.pictures, "evaluations": int(counts.sum()),
            "calls": int(counts.max()), "difference": difference, "seconds": times, "ratio": ratio}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="levels of the inversion")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="full size in bf16; otherwise small models in fp32")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-inversion.json"))
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here: leave out --device", file=sys.stderr)
        return 1
    dtype = torch.bfloat16 if args.full else torch.float32
    models = MODELS if args.full else SMALL
    with stock_warnings_off():
        rows = [measured(build(), args, torch.device(args.device), dtype) for build in models.values()]
    write_json(
        args.out, {"device": args.device, "threads": torch.get_num_threads(), "versions": versions(), "rows": rows}
    )
    header = ["model", "pictures", "evaluations", "calls", "difference", *(f"{name}, s" for name in WAYS), "ratio"]
    print(table(header, [_cells(row) for row in rows]))
    print(f"wrote {args.out}")
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    times = [f"{value:.3g}" for value in row["seconds"].values()]
    return [row["model"], str(row["pictures"]), str(row["evaluations"]), str(row["calls"]),
            f"{row['difference']:.1e}", *times, f"{row['ratio']:.2f}"]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
