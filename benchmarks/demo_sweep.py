"""What the demo gains on *validation* captions: what `configs/tiny-sd` is tuned with; held-out is never drawn.

    python benchmarks/demo_sweep.py "method.beta=2000" "method.beta=1000 max_train_steps=300" --draws 360
    python benchmarks/demo_sweep.py --config tiny-sd/sft "learning_rate=1e-5"

Each argument is one variant: overrides of the config, separated by spaces. Base and variants draw the same captions
from the same seeds with the same sampler; the gain's interval is a paired bootstrap. Finished variants are kept in
--out and not computed again as long as model and pairs stay the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.assets import asset
from diffalign.demo import GUIDANCE_SCALE
from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.lora import load_lora
from diffalign.rewards.preprocess import to_pictures
from diffalign.shapes.grammar import CATEGORIES, Scene, sample_scenes
from diffalign.shapes.verify import verify
from diffalign.statistics import mean_gain
from diffalign.trainer import train
from diffalign.writing import write_json

SEED_OF_DRAWS = 50_000


def passed(lora: Path | None, scenes: list[Scene], guidance_scale: float) -> np.ndarray:
    """[N] of 0 and 1: which pictures the verifier accepts."""
    pipe = load_pipeline("tiny-sd")
    if lora:
        load_lora(pipe, lora)
    seeds = range(SEED_OF_DRAWS, SEED_OF_DRAWS + len(scenes))
    pixels = generate(pipe, [str(s) for s in scenes], seeds=seeds, batch_size=60, guidance_scale=guidance_scale)
    pictures = to_pictures(pixels)
    return np.array([float(verify(np.asarray(p), s).ok) for p, s in zip(pictures, scenes, strict=True)])


def measured(args: argparse.Namespace, scenes: list[Scene], variant: str, key: str) -> dict[str, Any]:
    """Trains one variant, unless that is done, and draws: the pass marks and the run's last metrics."""
    name = hashlib.sha256(f"{key}/{args.config}/{args.seed}/{variant}".encode()).hexdigest()[:12]
    file = args.out / f"{name}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    start = time.perf_counter()
    overrides = [f"output_dir={args.out / name}", f"cache_dir={args.out / 'cache'}", f"seed={args.seed}",
                 "resume_from_checkpoint=latest", "validation_prompts=[]", *variant.split()]  # fmt: skip
    run = train(args.config, overrides)
    seconds = time.perf_counter() - start
    marks = passed(run.folder, scenes, args.guidance_scale)
    result = {"variant": variant, "seconds": seconds, "passed": marks.tolist(), "metrics": run.metrics}
    write_json(file, result, indent=None)
    return result


def line(name: str, base: np.ndarray, marks: np.ndarray, categories: np.ndarray, metrics: dict[str, float]) -> str:
    """One row of the table, in points."""
    gain = mean_gain(base, marks, np.random.default_rng(0))
    rates = "  ".join(f"{c} {100 * marks[categories == c].mean():5.1f}" for c in CATEGORIES)
    shown = "  ".join(f"{k} {metrics[k]:.3g}" for k in ("accuracy", "validation/accuracy", "d_w") if k in metrics)
    low, high = 100 * gain.low, 100 * gain.high
    return (f"{name:60s} all {100 * marks.mean():5.1f}  {rates}  "
            f"gain {100 * (marks - base).mean():+5.1f} [{low:+.1f}, {high:+.1f}]  {shown}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help="overrides of one variant each")
    parser.add_argument("--config", default="tiny-sd/dpo")
    parser.add_argument("--draws", type=int, default=360)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    args = parser.parse_args()

    scenes = sample_scenes("validation", args.draws, seed=1)
    categories = np.array([scene.category for scene in scenes])
    files = [asset("shapes-pairs.parquet"), *sorted(p for p in asset("tiny-sd").rglob("*") if p.is_file())]
    content = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:12]
    key = f"{content}/{args.draws}/{args.guidance_scale}"

    stored = args.out / f"base-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    if not stored.exists():
        write_json(stored, passed(None, scenes, args.guidance_scale).tolist(), indent=None)
    base = np.array(json.loads(stored.read_text()))
    print(line("base", base, base, categories, {}), flush=True)
    for variant in args.variants:
        result = measured(args, scenes, variant, key)
        print(line(f"{args.config} {variant}", base, np.array(result["passed"]), categories, result["metrics"])
              + f"  {result['seconds']:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
