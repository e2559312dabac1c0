"""ReNO's iterations at full size on one GPU: SDXL in one step at 512 pixels under four rewards, random weights.

    python -m benchmarks.noise_gpu --out runs/bench-noise-gpu.json         # or make bench-noise-gpu
    python -m benchmarks.noise_gpu --small                                 # tiny models; runs on a CPU

Needs no download. The rewards are ReNO's: three ViT-H/14 and ImageReward, in bf16 as U-Net and VAE are; noise and
regularizer are fp32. Each row first takes a few iterations, and where they move the noise is compared with the first
row of as many pictures: memory modes and compiling change no arithmetic but rounding, and a row that went elsewhere is
not timed. Then iterations are timed, and the time of 50 is what is reported, a picture. The file is written anew after
every row, so a killed run leaves what it had.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.gpu import Clock, device_for, memory_given_back, synchronize
from benchmarks.measure import table, versions
from benchmarks.models import Architecture, build_pipeline, sdxl, sdxl_mini
from benchmarks.reward_models import Scorer, four_of_reno
from benchmarks.steps import random_cached
from diffalign.errors import first_line
from diffalign.noise.objective import MEMORY, Counted, Objective
from diffalign.noise.reno import ReNO
from diffalign.noise.seen import Seen
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.common import stock_warnings_off, vae_decode
from diffalign.pipelines.compiling import compile_blocks
from diffalign.rewards.base import Weighted
from diffalign.writing import write_json

ITERATIONS = 50  # of which the time is told
COMPARED = 3  # looks after which rows are compared
SAME = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # share of the way that rows may be apart by rounding
PROMPTS = tuple(f"a photograph of {number} lighthouses at the sea" for number in range(8))
GOALS = {1: 2.0, 8: 1.3}  # seconds a picture on an H200, by pictures at once
GOAL_GIB = 20.0


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    model: Architecture
    tower: str
    small: bool
    pictures: tuple[int, ...]
    warm: int
    timed: int

    def rows(self) -> list[tuple[int, str, bool]]:
        """(pictures at once, memory mode, whether the network is compiled), compiled ones last."""
        return [(pictures, memory, compiled) for compiled, memories in ((False, MEMORY), (True, ("fast", "balanced")))
                for pictures in self.pictures for memory in memories]  # fmt: skip


FULL = Size(replace(sdxl(), resolution=512), "ViT-H-14", False, (1, 8), 3, 10)
SMALL = Size(sdxl_mini(), "ViT-S-32-alt", True, (1, 2), 1, 1)


@dataclass(frozen=True)
class Parts:
    """What every row uses."""

    pipe: LatentPipeline
    vae: Any
    scorer: Scorer
    size: Size
    device: torch.device
    dtype: torch.dtype

    def objective(self, pictures: int, memory: str) -> Objective:
        """Of the first prompts, one step from noise to picture."""
        model, latent = self.size.model, self.size.model.resolution // 8
        condition = {name: value.to(self.dtype) for name, value in
                     random_cached(model, pictures, self.device).condition.items()}  # fmt: skip
        rewards = self.scorer.fresh()
        assert isinstance(rewards, Weighted)
        return Objective(
            PROMPTS[:pictures], rewards, Counted(self.predict), self.pipe.process, self.pipe.parametrization,
            condition, condition, 1.0, self.pipe.times(1).to(self.device), (4, latent, latent),
            functools.partial(vae_decode, self.vae),
            tuple(torch.Generator().manual_seed(seed) for seed in range(pictures)), MEMORY[memory],
            MEMORY[memory].at_once,
        )  # fmt: skip

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The network in its own dtype."""
        return self.pipe.predict(x_t.to(self.dtype), t, condition).float()


def build(size: Size, device: torch.device) -> Parts:
    """Everything on the device; fp32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = build_pipeline(size.model, device, dtype)
    pipe.network.requires_grad_(False).eval()
    with torch.device(device):
        vae = AutoencoderKL(**size.model.vae).requires_grad_(False).eval().to(dtype)
    scorer = four_of_reno(str(device), size.tower, size.small)
    if dtype != torch.float32:
        scorer.cast()
    return Parts(pipe, vae, scorer, size, device, dtype)


def looks(parts: Parts, pictures: int, memory: str) -> Iterator[Seen]:
    """Endless iterations."""
    objective = parts.objective(pictures, memory)
    return ReNO(steps=10**6).search(objective, objective.fresh())


def moved(parts: Parts, pictures: int, memory: str) -> Tensor:
    """How far a few iterations bring the noise, fp32 [B, C, h, w]."""
    first, *_, last = (look.noise.float().cpu() for look in itertools.islice(looks(parts, pictures, memory), COMPARED))
    return last - first


def timed(parts: Parts, pictures: int, memory: str) -> dict[str, float]:
    """Seconds, and on a GPU the peak of its memory."""
    iterations, seconds = looks(parts, pictures, memory), []
    if parts.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(parts.device)
    for number in range(parts.size.warm + parts.size.timed):
        synchronize(parts.device)
        start = time.perf_counter()
        next(iterations)
        synchronize(parts.device)
        if number >= parts.size.warm:
            seconds.append(time.perf_counter() - start)
    row = {"seconds": ITERATIONS * statistics.median(seconds) / pictures, "ms_per_iteration":
           1000 * statistics.median(seconds)}  # fmt: skip
    if parts.device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated(parts.device) / 2**30
    return row


def measure(size: Size, device: torch.device, minutes: float, out: Path) -> dict[str, Any]:
    """Every row while there is time; what does not fit into memory, or is other work, is a row that says so."""
    clock, document = Clock(minutes), {"device": name_of(device), "versions": versions(), "rows": []}
    rows, first, compiled_already = document["rows"], {}, False
    parts = build(size, device)
    for pictures, memory, compiled in size.rows():
        row: dict[str, Any] = {"pictures": pictures, "memory": memory, "compiled": compiled}
        rows.append(row)
        if clock.left() < 0:
            row["failed"] = "no time left"
        else:
            if compiled and not compiled_already:
                compile_blocks(parts.pipe.network, "inductor" if device.type == "cuda" else "aot_eager")
                compiled_already = True
            with memory_given_back(device):
                try:
                    way = moved(parts, pictures, memory)
                    reference = first.setdefault(pictures, way)
                    row["difference"] = ((way - reference).norm() / reference.norm()).item()
                    if row["difference"] <= SAME[parts.dtype]:
                        row |= timed(parts, pictures, memory)
                    else:
                        row["failed"] = f"went elsewhere than the first row, by {row['difference']:.2g} of the way"
                except torch.cuda.OutOfMemoryError as error:
                    row["failed"] = first_line(error)
        write_json(out, document)
    return document


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def report(document: dict[str, Any]) -> str:
    """The table, and what was to be reached on an H200."""
    header = ("pictures", "memory", "compiled", "s a picture, 50 iterations", "ms an iteration", "peak, GiB",
              "difference", "goal")  # fmt: skip
    return table(header, [cells(row) for row in document["rows"]])


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line."""
    start = (str(row["pictures"]), row["memory"], "yes" if row["compiled"] else "no")
    if "failed" in row:
        return (*start, row["failed"], "", "", "", "")
    peak = row.get("peak_gib")
    goal = GOALS.get(row["pictures"])
    met = "" if peak is None or goal is None else str(row["seconds"] <= goal and peak <= GOAL_GIB)
    return (*start, f"{row['seconds']:.2f}", f"{row['ms_per_iteration']:.1f}", "" if peak is None else f"{peak:.1f}",
            f"{row['difference']:.1e}", met)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models; runs on a CPU, and its figures mean nothing")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-noise-gpu.json"))
    args = parser.parse_args(arguments)
    if (device := device_for(args.small)) is None:
        return 1
    with stock_warnings_off():
        document = measure(SMALL if args.small else FULL, device, args.minutes, args.out)
    print(report(document))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
