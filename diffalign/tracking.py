"""What a run says about itself: averaged metrics, metrics.jsonl, picture grids and warnings."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, final

import torch
from PIL import Image
from torch import Tensor

from diffalign.data.clips import contact_sheet
from diffalign.writing import write_text

log = logging.getLogger("diffalign")

BINS = 10  # of the noise axis, for the metrics that change along it
BINNED = ("h", "d_w")
JUDGED = ("loss", "grad_norm")  # a step where these are not finite is skipped, and not averaged
Totals = dict[str, tuple[float, int]]  # name -> sum and number of values


class Averages:
    """Means of per-sample metrics since the last `pop`; `BINNED` ones also per tenth of the noise axis.

    What is added stays on its device, unread, until `read`: reading waits for the device.
    """

    def __init__(self) -> None:
        self._unread: list[tuple[tuple[str, ...], Tensor, Tensor | None]] = []
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, metrics: Mapping[str, Tensor], fraction: Tensor | None = None) -> None:
        """metrics: name -> [B]; fraction: [B] in [0, 1], of the noise axis, for the binned ones."""
        values = torch.stack([value.detach().float() for value in metrics.values()])
        self._unread.append((tuple(metrics), values, None if fraction is None else fraction.detach()))

    def read(self) -> list[dict[str, Tensor]]:
        """Counts in what was added, and returns it, on the CPU; a batch with a loss that is not finite is left out."""
        read = [(dict(zip(names, values.cpu(), strict=True)), where) for names, values, where in self._unread]
        self._unread.clear()
        finite = [(m, where) for m, where in read if all(m[name].isfinite().all() for name in JUDGED if name in m)]
        for metrics, where in finite:
            self._count(metrics, None if where is None else where.float().cpu())
        return [metrics for metrics, _ in finite]

    def pop(self, gather: Callable[[list[Totals]], list[Totals]] = list) -> dict[str, float]:
        """The means of all that was read, and a fresh start. h_std is derived from the mean and the mean square.

        `gather` puts the lists of all ranks one after the other; the means are then of all samples of all ranks.
        """
        self.read()
        totals: Totals = {}
        for part in gather([{name: (self._sums[name], self._counts[name]) for name in self._sums}]):
            for name, (value, count) in part.items():
                so_far = totals.get(name, (0.0, 0))
                totals[name] = (so_far[0] + value, so_far[1] + count)
        means = {name: value / count for name, (value, count) in totals.items()}
        if "h_square" in means:
            means["h_std"] = max(0.0, means.pop("h_square") - means["h"] ** 2) ** 0.5
        self._sums.clear()
        self._counts.clear()
        return means

    def _count(self, metrics: Mapping[str, Tensor], fraction: Tensor | None) -> None:
        for name, values in metrics.items():
            self._add(name, values)
            if name == "h":
                self._add("h_abs", values.abs())
                self._add("h_square", values.square())
            if name in BINNED and fraction is not None:
                bins = (fraction * BINS).long().clamp(max=BINS - 1)
                for index in bins.unique().tolist():
                    self._add(f"{name}/bin{index}", values[bins == index])

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] += values.sum().item()
        self._counts[name] += values.numel()


class Skips(NamedTuple):
    """Steps that were not finite: in all, in a row up to now, and the longest row since the last look."""

    total: int
    row: int
    longest: int


class SkippedSteps:
    """Counts skipped steps on the device, without waiting for it; `read` does."""

    def __init__(self, device: torch.device, total: int = 0, row: int = 0) -> None:
        self.total, self.row = total, row  # as of the last `read`
        self._counts = torch.tensor([total, row, 0.0], device=device)

    def update(self, skipped: Tensor) -> None:
        """skipped: 1.0 or 0.0, a scalar on the device."""
        total, row, longest = self._counts
        row = (row + skipped) * skipped
        self._counts = torch.stack([total + skipped, row, torch.maximum(longest, row)])

    def read(self, step: int, limit: int) -> Skips:
        """Warns where steps were skipped since the last look.

        Raises:
            RuntimeError: `limit` steps in a row were skipped.
        """
        before, counts = self.total, Skips(*(int(count) for count in self._counts.tolist()))
        self.total, self.row = counts.total, counts.row
        self._counts[2] = 0
        if counts.total > before:
            log.warning("step %d: the loss is not finite, step skipped (%d in all, %d in a row)",
                        step, counts.total, counts.row)  # fmt: skip
        if counts.longest >= limit:
            raise RuntimeError(
                f"the loss was not finite for {counts.longest} steps in a row, stopped at step {step}; its checkpoints "
                f"are kept. Start again with a lower learning_rate, a higher method.beta, or mixed_precision: bf16"
            )
        return counts


class Pace:
    """Steps per second since it was made, at a given step."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.time = step, time.perf_counter()

    def steps_per_second(self, step: int) -> float:
        return (step - self.step) / (time.perf_counter() - self.time)


class MetricsFile:
    """metrics.jsonl: one line per logged step; a resumed run first forgets the lines after its checkpoint.

    A value that is no number is left out, as of a reward that had no score for any picture: JSON has no NaN.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if _step(line) <= resume_step]
        write_text(path, "".join(line + "\n" for line in kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {name: value for name, value in values.items() if math.isfinite(value)}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")


class DisplacementAlarm:
    """Warns once when the winners' excess error stays above 0: they get less likely while accuracy may still rise."""

    def __init__(self, patience: int = 50, decay: float = 0.95) -> None:
        self.patience, self.decay = patience, decay
        self.average, self.above, self.warned = 0.0, 0, False

    def update(self, d_w: float) -> None:
        self.average = self.decay * self.average + (1 - self.decay) * d_w
        self.above = self.above + 1 if self.average > 0 else 0
        if self.above >= self.patience and not self.warned:
            self.warned = True
            log.warning(
                "likelihood displacement: the winners' error has been above the reference's for %d steps (d_w %.2e). "
                "Lower the learning rate, raise beta, or anchor the winner (method.sft_weight, method.dpop_weight).",
                self.above, self.average,
            )  # fmt: skip


@final
class RewardAlarm:
    """Warns once of pictures without a score, and once when rewards have told no pictures apart for some steps."""

    def __init__(self, patience: int = 10) -> None:
        self.patience, self.row, self.told = patience, 0, set[str]()

    def update(self, missing: float, same: float) -> None:
        """Shares of a step's pictures: those without a score, and those whose prompt's pictures all got the same."""
        if missing > 0:
            self._tell("missing", f"rewards: {missing:.0%} of a step's pictures have no score and are left out; the "
                                  f"log counts them as missing")  # fmt: skip
        self.row = self.row + 1 if same == 1 else 0
        if self.row >= self.patience:
            self._tell("same", f"rewards: for {self.row} steps all pictures of each prompt have got the same score, so "
                               f"there was nothing to learn; look at the reward (a constant one?), draw more pictures "
                               f"(method.group), or take other prompts")  # fmt: skip

    def _tell(self, what: str, text: str) -> None:
        if what not in self.told:
            self.told.add(what)
            log.warning("%s", text)


def peak_memory(device: torch.device) -> dict[str, float]:
    """{"peak_memory_gib"}: the most that this process has held: tensors on a GPU, resident memory on a CPU.

    Empty where the system does not say (Windows).
    """
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    try:
        import resource
    except ImportError:
        return {}
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def grid(pixels: Tensor, columns: int) -> Image.Image:
    """One picture of many [N, 3, H, W] in [0, 1], row by row."""
    return contact_sheet((pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy(), columns)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")  # the half line of a killed run
