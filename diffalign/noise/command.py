"""`diffalign optimize-noise`: prompts from a command line, a folder for each, a live table, and a page at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import Tensor

from diffalign.claiming import claim_results
from diffalign.console import Result
from diffalign.noise.driver import Progress, optimize_noise
from diffalign.noise.page import STRIP, Shown, write_noise_page
from diffalign.noise.result import REPORT
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.attention import preferring
from diffalign.pipelines.base import LatentPipeline
from diffalign.rewards import load_rewards
from diffalign.rewards.base import Weighted
from diffalign.rewards.preprocess import to_pictures

PAGE = "index.html"
DTYPES = ("float32", "bfloat16", "float16")
IN_STRIP = 12  # pictures over the iterations, at most


@dataclass(frozen=True)
class Wanted:
    """What the command line says.

    Attributes:
        model, prompts, rewards: which, and the sections of the rewards.
        keywords: those of `optimize_noise`, the method's among them.
        at_once: prompts that are optimized together.
    """

    model: str
    prompts: Sequence[str]
    rewards: Mapping[str, Any]
    keywords: Mapping[str, Any]
    seed: int
    at_once: int
    out: Path
    device: str
    attention: str
    dtype: str

    def settings(self) -> dict[str, Any]:
        """What pictures follow from, but for their own prompt and seed."""
        return {"model": self.model, "rewards": self.rewards, "keywords": dict(self.keywords), "dtype": self.dtype}


@dataclass
class Strip:
    """Pictures of a search at even distances, however many looks it comes to."""

    every: int = 1
    kept: list[tuple[int, Tensor]] = field(default_factory=list)  # (look, uint8 [B, 3, H, W])

    def add(self, number: int, pixels: Tensor) -> None:
        """One more look; every second one is let go when there are too many."""
        if number % self.every == 0:
            self.kept.append((number, (pixels * 255).round().to("cpu", torch.uint8)))
        if len(self.kept) > IN_STRIP:
            self.every *= 2
            self.kept = [one for one in self.kept if one[0] % self.every == 0]

    def picture(self, row: int) -> Image.Image:
        """Those of one prompt, side by side."""
        pictures = [to_pictures(pixels[row : row + 1])[0] for _, pixels in self.kept]
        width, height = pictures[0].size
        whole = Image.new("RGB", (width * len(pictures), height))
        for place, picture in enumerate(pictures):
            whole.paste(picture, (width * place, 0))
        return whole


def optimize_prompts(wanted: Wanted) -> Result:
    """Folders 00000, 00001 ... of results; prompts whose folder is there already are not done again.

    Raises:
        ValueError: bad input, or a folder that holds something else, or results of other settings.
        KeyboardInterrupt: after what was found so far has been written, marked as interrupted.
    """
    if wanted.at_once < 1:
        raise ValueError(f"--prompts-at-once: expected at least 1, got {wanted.at_once}")
    dtype = dtype_of(wanted.dtype)
    claim_results(wanted.out, wanted.settings(), made=any(wanted.out.glob(f"*/{REPORT}")))
    left = [number for number in range(len(wanted.prompts)) if not finished(wanted, number)]
    stopped = False
    if left:
        pipe = load_pipeline(wanted.model, dtype=dtype, device=wanted.device, attention=wanted.attention)
        rewards = load_rewards(wanted.rewards, device=wanted.device)
        for start in range(0, len(left), wanted.at_once):
            if stopped := run_some(wanted, pipe, rewards, left[start : start + wanted.at_once]):
                break
    shown = list(written(wanted))
    write_noise_page(wanted.out / PAGE, wanted.model, shown)
    if stopped:
        raise KeyboardInterrupt
    first, best, scored = means(shown)
    data = {"folder": str(wanted.out), "page": str(wanted.out / PAGE), "prompts": len(shown), "done_before":
            len(wanted.prompts) - len(left), "scored": scored, "first": first, "best": best}  # fmt: skip
    text = (f"{len(shown)} prompts: mean total {first:.4g} at first, {best:.4g} at best, of {scored} that have both; "
            f"look at {wanted.out / PAGE}")  # fmt: skip
    return Result(data, text)


def dtype_of(name: str) -> torch.dtype:
    """
    Raises:
        ValueError: another name than float32, bfloat16 or float16.
    """
    if name not in DTYPES:
        raise ValueError(f"--dtype: expected float32, bfloat16 or float16, got {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def means(shown: Sequence[Shown]) -> tuple[float, float, int]:
    """(mean first total, mean best total, prompts that have both); not a number where none has."""
    pairs = [(one.report["first"]["total"][0], one.report["best"]["total"][0]) for one in shown]
    known = np.array([pair for pair in pairs if None not in pair], dtype=float)
    first, best = known.mean(0) if len(known) else (math.nan, math.nan)
    return float(first), float(best), len(known)


def run_some(wanted: Wanted, pipe: LatentPipeline, rewards: Weighted, numbers: Sequence[int]) -> bool:
    """Optimizes some prompts at once and writes their folders; whether it was interrupted."""
    prompts, strip = [wanted.prompts[number] for number in numbers], Strip()
    with Live(console=Console(stderr=True), transient=True) as live, preferring(wanted.attention):

        def told(progress: Progress) -> None:
            strip.add(progress.iteration, progress.seen.pixels)
            live.update(table(prompts, progress))

        result = optimize_noise(pipe, prompts, rewards, seed=[wanted.seed + number for number in numbers],
                                callback=told, **wanted.keywords)  # fmt: skip
    for row, (number, one) in enumerate(zip(numbers, result.each(), strict=True)):
        one.save(place(wanted, number), more={STRIP: strip.picture(row)})
    return result.interrupted


def table(prompts: Sequence[str], progress: Progress) -> Table:
    """What is known after a look, a row for each prompt."""
    names = list(progress.seen.scores.terms)
    shown = Table("prompt", "look", "total", "best", *names, box=None, pad_edge=False)
    for row, prompt in enumerate(prompts):
        terms = [f"{progress.seen.scores.terms[name][row].item():.4g}" for name in names]
        now, best = (seen.scores.total[row].item() for seen in (progress.seen, progress.best))
        shown.add_row(prompt[:60], str(progress.iteration), f"{now:.4g}", f"{best:.4g}", *terms)
    return shown


def keywords(options: Sequence[str], **given: Any) -> dict[str, Any]:
    """What `optimize_noise` is called with: what is given, and KEY=VALUE of the method.

    Raises:
        ValueError: an option that is not as above, or says again what has an option of its own.
    """
    found = {key: value for key, value in given.items() if value is not None}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--option {option}: expected KEY=VALUE, such as lr=5")
        if key in given:
            raise ValueError(f"--option {option}: has an option of its own, --{key.replace('_', '-')}")
        found[key] = {"true": True, "false": False}.get(value.lower(), value)
    return found


def place(wanted: Wanted, number: int) -> Path:
    """The folder of a prompt."""
    return wanted.out / f"{number:05d}"


def finished(wanted: Wanted, number: int) -> bool:
    """Whether a prompt's result is there and was not interrupted.

    Raises:
        ValueError: the folder has the result of another prompt or seed.
    """
    report = read_report(place(wanted, number))
    if report is None:
        return False
    before, now = (report["prompts"][0], report["seeds"][0]), (wanted.prompts[number], wanted.seed + number)
    if before != now:
        raise ValueError(f"{place(wanted, number)}: expected the result of {now[0]!r} with seed {now[1]}, got that of "
                         f"{before[0]!r} with seed {before[1]}; choose another --out")  # fmt: skip
    return not report["interrupted"]


def read_report(folder: Path) -> dict[str, Any] | None:
    """noise.json, if there is one that can be read: a folder is written in one piece."""
    try:
        report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report


def written(wanted: Wanted) -> Iterator[Shown]:
    """The results that are there."""
    for number in range(len(wanted.prompts)):
        if (report := read_report(place(wanted, number))) is not None:
            yield Shown(place(wanted, number), report)
