"""`make bench-gpu`: the Diffusion-DPO step at full size on one GPU, ours and the plain one, beside the card's ceilings.

    python -m benchmarks.gpu --minutes 9 --out runs/bench-gpu.json
    python -m benchmarks.gpu --small          # the same code on tiny models, also without a GPU

Needs no download: SDXL, SD3-medium and Wan 2.1 1.3B are built with random weights on the device, in bf16 with a LoRA of
rank 16 in fp32. First the card: bf16 matrix products, copies, launches. Then for 1, 2 and 8 pairs every row of
`VARIANTS`, and for a pair of clips of 81 frames at 480 x 832 every row of `CLIP_VARIANTS`. What no
longer fits into the time is left out and said so; what does not fit into memory is a row that says so. The result file
is written anew after every row, so a killed run leaves what it had.

    floor   FLOPs that the pairs need (recomputing and encoding not counted) / the measured matrix rate
    MFU     the same FLOPs / time / the printed rate of an H200, 989 TFLOP/s
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_report import BASELINE, CACHED_REFERENCE, Row, goals, report
from benchmarks.inversion_step import Inverted
from benchmarks.measure import versions
from benchmarks.models import CLIP_MODELS, MODELS, SMALL_MODELS, Architecture, Encoders, build_encoders, pair_flops
from benchmarks.plain import plain, random_raw
from benchmarks.steps import Ours, Recorded, Step, Subject, build_subject, random_cached
from diffalign.errors import first_line
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.common import stock_warnings_off
from diffalign.pipelines.compiling import compile_blocks
from diffalign.writing import write_json

RANK = 16
PRINTED_RATE = 989e12  # FLOP/s of an H200: dense bf16, from the data sheet
Around = Callable[[LatentPipeline], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Variant:
    """One row: whose step, with checkpointing or without.

    `make` builds our step from (subject, pairs, checkpointing); a row without it is the plain step, and is given VAE
    and text encoders. `around` is entered with the pipeline before the step is built and left after the last one: a
    place for what changes how the network computes. `dpo`: it does the work of a DPO step, which the floor is of.
    """

    make: Callable[[Subject, int, bool], Step] | None
    checkpointing: bool = False
    around: Around = lambda pipe: contextlib.nullcontext()
    dpo: bool = True


def _ours(**options: Any) -> Callable[[Subject, int, bool], Step]:
    def make(subject: Subject, pairs: int, checkpointing: bool) -> Step:
        return Ours(subject, random_cached(subject.model, pairs, subject.device), checkpointing, **options)

    return make


def _recorded(subject: Subject, pairs: int, checkpointing: bool) -> Step:
    return Recorded(subject, random_cached(subject.model, pairs, subject.device), checkpointing)


def _inverted(kept: bool) -> Callable[[Subject, int, bool], Step]:
    def make(subject: Subject, pairs: int, checkpointing: bool) -> Step:
        return Inverted(subject, random_cached(subject.model, pairs, subject.device), checkpointing, kept)

    return make


@contextlib.contextmanager
def _compiled(pipe: LatentPipeline) -> Iterator[None]:
    compile_blocks(pipe.network, "inductor" if pipe.network.device.type == "cuda" else "aot_eager")
    try:
        yield
    finally:
        for module in pipe.network.modules():
            module._compiled_call_impl = None
        torch._dynamo.reset()


# Top to bottom while there is time; VAE and text encoders are in memory for the plain rows only.
# A new way to run the step is one line.
VARIANTS: dict[str, Variant] = {
    BASELINE: Variant(None, checkpointing=True),
    "ours": Variant(_ours()),
    "ours, recorded": Variant(_recorded),
    "ours, checkpointing": Variant(_ours(), checkpointing=True),
    "ours, compiled": Variant(_ours(), around=_compiled),
    "ours, recorded and compiled": Variant(_recorded, around=_compiled),
    "ours, flash attention": Variant(_ours(attention="flash")),
    "ours, cudnn attention": Variant(_ours(attention="cudnn")),
    CACHED_REFERENCE: Variant(_ours(cached_reference=True)),
    "plain": Variant(None),
    "inversion-dpo, trajectories kept": Variant(_inverted(kept=True), dpo=False),
    "inversion-dpo": Variant(_inverted(kept=False), dpo=False),
}

# of models of clips, whose activations of one pair fill a card: no plain step, one pair at a time
CLIP_VARIANTS: dict[str, Variant] = {
    "ours, checkpointing": VARIANTS["ours, checkpointing"],
    "ours, checkpointing, cudnn attention": Variant(_ours(attention="cudnn"), checkpointing=True),
    "ours, checkpointing, compiled": Variant(_ours(), checkpointing=True, around=_compiled),
    "ours, checkpointing, flash attention": Variant(_ours(attention="flash"), checkpointing=True),
    "ours": VARIANTS["ours"],
}


@dataclass(frozen=True)
class Size:
    """How large everything is: the whole of `--small` is here."""

    models: dict[str, Callable[[], Architecture]]
    product_side: int  # of the square matrices
    copy_bytes: int
    launches: int
    pairs: tuple[int, ...]
    least_steps: int
    row_seconds: float


EVERY = MODELS | CLIP_MODELS
FULL = Size(EVERY, 8192, 8 * 10**9, 10_000, (8, 1, 2), 3, 8.0)
SMALL = Size(SMALL_MODELS, 256, 10**6, 100, (1,), 1, 0.0)


class Clock:
    """Seconds since the start, against a budget."""

    def __init__(self, minutes: float) -> None:
        self._start, self.budget = time.perf_counter(), 60 * minutes

    def left(self, share: float = 1.0) -> float:
        """Seconds left of this share of the budget."""
        return share * self.budget - (time.perf_counter() - self._start)


def synchronize(device: torch.device) -> None:
    """Waits for the GPU; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median wall seconds of a call, waited for, after three that warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(size: Size, device: torch.device) -> dict[str, float]:
    """The card's own rates: FLOP/s of bf16 matrix products, bytes/s read and written by a copy, launches/s."""
    side = size.product_side
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = seconds_of(lambda: left @ right, device, 20)
    source = torch.empty(size.copy_bytes // 2, dtype=torch.bfloat16, device=device).zero_()
    destination = torch.empty_like(source)
    copy = seconds_of(lambda: destination.copy_(source), device, 10)
    one = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(size.launches):
            one.add_(1)

    return {
        "flops_per_second": 2 * side**3 / product,
        "copy_bytes_per_second": 2 * size.copy_bytes / copy,
        "launches_per_second": size.launches / seconds_of(launch, device, 3),
    }


@contextlib.contextmanager
def memory_given_back(device: torch.device) -> Iterator[None]:
    """What was made inside, and is held by no one any more, is gone after it."""
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def timed(step: Step, pairs: int, size: Size, device: torch.device) -> dict[str, float]:
    """Wall and CPU milliseconds a step (medians) and the peak of memory, after two steps that warm up."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step.enter()
    for seed in range(2):
        step(seed)
    synchronize(device)
    wall: list[float] = []
    cpu: list[float] = []
    begin = time.perf_counter()
    while len(wall) < size.least_steps or (time.perf_counter() - begin < size.row_seconds and len(wall) < 30):
        start, started = time.perf_counter(), time.process_time()
        step(len(wall) % 2)  # seeds of the warm-up: cached reference errors are there
        cpu.append(time.process_time() - started)  # until everything is launched
        synchronize(device)
        wall.append(time.perf_counter() - start)
    seconds = statistics.median(wall)
    row = {"ms_per_pair": 1000 * seconds / pairs, "pairs_per_second": pairs / seconds,
           "cpu_ms_per_step": 1000 * statistics.median(cpu), "steps": float(len(wall))}  # fmt: skip
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


def measured_row(variant: Variant, subject: Subject, encoders: Encoders | None, pairs: int, size: Size) -> Row:
    """One row's figures, or {"failed": why}: a row that fails costs no other."""
    try:
        with variant.around(subject.pipe):
            if variant.make:
                step = variant.make(subject, pairs, variant.checkpointing)
            else:
                assert encoders is not None
                raw = random_raw(subject.model, pairs, subject.device)
                step = plain(subject, encoders, raw, variant.checkpointing)
            return timed(step, pairs, size, subject.device)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except (RuntimeError, ValueError) as error:  # ValueError: an attention backend that is not there
        return {"failed": first_line(error)}
    finally:
        subject.pipe.network.enable_adapters()  # a plain step that failed may have left them off
        for parameter in subject.parameters:
            parameter.grad = None  # a recording wants to find them in place, and is gone by now


def model_rows(name: str, size: Size, device: torch.device, clock: Clock, share: float, rate: float) -> Iterator[Row]:
    """Every row of one model, until its share of the time is used up."""
    model = size.models[name]()
    flops = pair_flops(model, RANK)
    subject = build_subject(model, device, torch.bfloat16, RANK)
    encoders, longest = None, 0.0
    for label, variant in (CLIP_VARIANTS if model.clip else VARIANTS).items():
        if variant.make:
            encoders = None  # ours must fit without them
        for pairs in (1,) if model.clip else size.pairs:
            row: Row = {"model": name, "variant": label, "pairs": pairs}
            if variant.dpo:
                row["floor_ms_per_pair"] = 1000 * flops / rate
            if clock.left(share) < longest:
                yield {**row, "failed": "no time left"}
                continue
            started = time.perf_counter()
            if not variant.make:
                encoders = encoders or build_encoders(model, device, torch.bfloat16)
            with memory_given_back(device):
                row |= measured_row(variant, subject, encoders, pairs, size)
            longest = max(longest, time.perf_counter() - started)
            if (seconds := row.get("ms_per_pair", 0.0) / 1000) and variant.dpo:
                row |= {"of_floor": flops / rate / seconds, "mfu": flops / seconds / PRINTED_RATE}
            yield row


def measure(size: Size, names: Sequence[str], device: torch.device, minutes: float, out: Path) -> dict[str, Any]:
    """Everything, written to `out` again and again while it grows."""
    clock = Clock(minutes)
    with memory_given_back(device):
        card = ceilings(size, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result: dict[str, Any] = {
        "device": name, "small": size is SMALL, "versions": versions(), "ceilings": card, "rows": [],
        "goals": [],
    }  # fmt: skip
    for index, model in enumerate(names):
        with memory_given_back(device):
            share = (index + 1) / len(names)
            for row in model_rows(model, size, device, clock, share, card["flops_per_second"]):
                result["rows"].append(row)
                write_json(out, result)
                print(f"{model}, {row['variant']}, {row['pairs']} pairs: "
                      f"{row.get('failed') or '{:.4g} ms a pair'.format(row['ms_per_pair'])}", flush=True)  # fmt: skip
    result["goals"] = [] if size is SMALL else goals(result["rows"])
    write_json(out, result)
    return result


def device_for(small: bool) -> torch.device | None:
    """The GPU; without one the CPU for what is small, and otherwise none, which is said."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not small:
        print("there is no CUDA device here: --small tries the script on tiny models", file=sys.stderr)
    return torch.device("cpu") if small else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models; runs on a CPU, and its figures mean nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument("--models", nargs="+", choices=list(EVERY), default=list(EVERY))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu.json"))
    args = parser.parse_args(arguments)
    if (device := device_for(args.small)) is None:
        return 1
    with stock_warnings_off():
        result = measure(SMALL if args.small else FULL, args.models, device, args.minutes - 0.5, args.out)
    print(report(result))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
