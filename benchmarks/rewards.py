"""`make bench-rewards`: scores a second, ours against the plain way, on the same networks with random weights.

    python -m benchmarks.rewards --out runs/bench-rewards.json                # ViT-B/32, and two of one recipe, fp32
    python -m benchmarks.rewards --device cuda --out runs/bench-rewards.json  # ViT-H/14, and the four of ReNO, bf16

The plain way is the usual script: a picture at a time through the model's PIL processor, its prompt encoded each time.
Ours is the package. First the scores of both must agree, and ours is counted: one forward pass of a text tower per
distinct prompt, one opening and one resize per picture and recipe. Only then is anything timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import median, table, versions
from benchmarks.reward_models import Scorer, four_of_reno, vit_b32, vit_b32_twice, vit_h14
from diffalign.evaluation import score_images
from diffalign.writing import write_json

PER_PROMPT, SEED = 4, 7
TOLERANCE = 1e-4  # of the scores, relative to the largest: the same fp32 numbers, summed in another order
SPREAD = 0.01  # of the scores, relative to the largest; else agreement would show nothing
RATIO, TENSORS = "from files, times the plain way", "from tensors, pictures/s"
GOALS = {("clip, ViT-B/32", RATIO): 1.5, ("hpsv2.1, ViT-H/14", TENSORS): 1200.0, ("four of ReNO", TENSORS): 350.0}
WORDS = ("red", "small", "wooden", "quiet", "open", "round", "old", "bright")
THINGS = ("boat", "kitchen", "fox", "tower", "garden", "train", "bottle", "bridge")

Times = dict[str, list[float]]


def pictures(count: int, side: int) -> list[Image.Image]:
    """Smooth noise, on which a decoder and a resize have work as on photographs."""
    small = np.random.default_rng(SEED).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in small]


def prompts(count: int) -> list[str]:
    """As of a run that draws `PER_PROMPT` pictures of each."""
    numbers = [i // PER_PROMPT for i in range(count)]
    return [f"a {WORDS[i % 8]} {THINGS[i // 8 % 8]} beside the number {i}" for i in numbers]


def assert_equal_work(scorer: Scorer, files: Sequence[Path], texts: Sequence[str], batch: int) -> dict[str, Any]:
    """The largest difference from the plain way's scores, and what was counted of ours.

    Raises:
        AssertionError: another score, or more work than each prompt and each picture once.
    """
    for tower in scorer.towers:
        tower.encoded.clear()
    opening = mock.patch.object(Image, "open", side_effect=Image.open)
    resizing = mock.patch.object(Image.Image, "resize", autospec=True, side_effect=Image.Image.resize)
    with opening as opened, resizing as resized:
        ours = score_images(scorer.fresh(), files, texts, batch_size=batch)
    encoded = [sorted(tower.encoded) for tower in scorer.towers]
    assert encoded == [sorted(set(texts))] * len(scorer.towers), f"{scorer.name}: prompts encoded {encoded}"
    assert opened.call_count == len(files), f"{scorer.name}: {opened.call_count} files opened of {len(files)}"
    most = scorer.pil_resizes * len(files)
    assert resized.call_count == most, f"{scorer.name}: {resized.call_count} resizes, {most} expected"
    gaps = [0.0]
    for term, plain in scorer.plain.items():
        wanted = [plain(file, text) for file, text in zip(files, texts, strict=True)]
        assert np.std(wanted) > SPREAD * max(map(abs, wanted)), f"{scorer.name}: {term} gives every picture the same"
        gaps.append(max(abs(a - b) for a, b in zip(ours[term], wanted, strict=True)) / max(map(abs, wanted)))
        assert gaps[-1] <= TOLERANCE, f"{scorer.name}: scores of {term} differ by {gaps[-1]:.2g}"
    return {"gap": max(gaps), "prompts_encoded": len(set(texts)), "files_opened": opened.call_count,
            "resizes": resized.call_count, "pictures": len(files)}  # fmt: skip


def ways(
    scorer: Scorer, files: Sequence[Path], texts: Sequence[str], batch: int, pixels: Tensor
) -> dict[str, Callable[[], object]]:
    """What is timed. Each call begins with rewards that have not seen a prompt yet."""

    def from_tensors() -> None:
        reward = scorer.fresh()
        with torch.no_grad():
            for start in range(0, len(texts), batch):
                reward(pixels[start : start + batch], texts[start : start + batch])

    def plainly() -> None:
        for plain in scorer.plain.values():
            for file, text in zip(files, texts, strict=True):
                plain(file, text)

    return {
        "plain": plainly,
        "files": lambda: score_images(scorer.fresh(), files, texts, batch_size=batch),
        "tensors": from_tensors,
    }


def timed(ways: Mapping[str, Callable[[], object]], rounds: int, device: str) -> Times:
    """Seconds of each in turn: CPU time of this process, on a GPU time on the clock. A first round warms up."""
    times: Times = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = _clock(device)
            way()
            if number:
                times[name].append(_clock(device) - start)
    return times


def _clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def figures(times: Times, count: int) -> dict[str, float]:
    """Pictures a second of each way, each scored by every term of the row, and ratios to the plain way."""
    rates = {name: count / median(seconds) for name, seconds in times.items()}
    return {
        "plain, pictures/s": rates["plain"],
        "from files, pictures/s": rates["files"],
        TENSORS: rates["tensors"],
        RATIO: rates["files"] / rates["plain"],
        "from tensors, times the plain way": rates["tensors"] / rates["plain"],
    }


def goals(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Each goal of a row that was measured, beside what it is."""
    return [f"goal: {name}: {key} at least {least:g}: {rows[name][key]:.4g}"
            for (name, key), least in GOALS.items() if name in rows]  # fmt: skip


def run(scorers: Sequence[Scorer], device: str, count: int, batch: int, side: int, rounds: int) -> dict[str, Any]:
    """The document: a row of figures and one of counts per scorer."""
    rows, counts = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number:05d}.png" for number in range(count)]
        made, texts = pictures(count, side), prompts(count)
        for file, picture in zip(files, made, strict=True):
            picture.save(file)
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in made])).permute(0, 3, 1, 2)
        pixels = pixels.to(device).float() / 255
        for scorer in scorers:
            counts[scorer.name] = assert_equal_work(scorer, files, texts, batch)
            scorer.cast()
            rows[scorer.name] = figures(timed(ways(scorer, files, texts, batch, pixels), rounds, device), count)
            print(f"{scorer.name}: scores agree to {counts[scorer.name]['gap']:.1e} of the largest", flush=True)
    return {"device": device, "pictures": count, "batch": batch, "per_prompt": PER_PROMPT, "side": side,
            "rounds": rounds, "versions": versions(), "counts": counts, "rows": rows}  # fmt: skip


def report(document: Mapping[str, Any]) -> str:
    """The table, and each goal beside what was measured."""
    rows = document["rows"]
    header = ["rewards", *next(iter(rows.values()))]
    cells = [[name, *(f"{value:.2f}" for value in row.values())] for name, row in rows.items()]
    return "\n".join([table(header, cells), "", *goals(rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pictures", type=int, help="default 16, on a GPU 256")
    parser.add_argument("--batch", type=int, help="default 16, on a GPU 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-rewards.json"))
    args = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if args.device == "cpu" else threads)
    try:
        if args.device == "cpu":
            document = run([vit_b32(), vit_b32_twice()], "cpu", args.pictures or 16, args.batch or 16, 512, args.rounds)
        else:
            some = [vit_h14("cuda"), four_of_reno("cuda")]
            document = run(some, "cuda", args.pictures or 256, args.batch or 64, 512, args.rounds)
    finally:
        torch.set_num_threads(threads)
    print(report(document))
    write_json(args.out, document)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
