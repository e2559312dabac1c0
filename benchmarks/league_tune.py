"""What a setting comes to on *validation* captions, at the league's own budget and data: how its configs are chosen.

    python -m benchmarks.league_tune --method tdpo "method.beta=500" "method.beta=500 learning_rate=1e-4"
    python -m benchmarks.league_tune --method tdpo ""                    # as the config is

Each argument is one variant: overrides of configs/tiny-sd/<method>.yaml, separated by spaces. Held-out is never drawn.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch

from benchmarks.league import DRAWN, Drawn, drawn, overrides, probed, trained
from benchmarks.league_data import league_data, loaded, settings
from diffalign.shapes.grammar import CATEGORIES, Scene, sample_scenes
from diffalign.statistics import mean_gain

SEED = 1  # of the captions


def base_of(model: str, scenes: list[Scene], work: Path) -> Drawn:
    """The pictures of the model as it ships, drawn once."""
    key = hashlib.sha256(f"{settings(model)}/{DRAWN}/{len(scenes)}/{SEED}".encode()).hexdigest()[:12]
    file = work / f"validation-{key}.pt"
    if not file.exists():
        torch.save(vars(drawn(model, None, scenes)), file)
    return Drawn(**torch.load(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--method", required=True)
    parser.add_argument("--draws", type=int, default=360)
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--work", type=Path, default=Path("runs/league"))
    args = parser.parse_args()
    work, data = args.work / args.model, args.work / args.model / f"data-{settings(args.model)}"
    work.mkdir(parents=True, exist_ok=True)
    league_data(loaded(args.model), data)
    scenes = sample_scenes("validation", args.draws, SEED)
    kinds = np.array([scene.category for scene in scenes])
    base = np.array(base_of(args.model, scenes, work).passed, dtype=float)
    print(line("base", base, base, kinds), flush=True)
    for variant in args.variants:
        folder = work / f"tune-{args.method}"
        changes = [*overrides(args.model, args.method, args.seed, data, folder), *variant.split()]
        steps = probed(f"tiny-sd/{args.method}", changes, folder).steps
        run = trained(f"tiny-sd/{args.method}", changes, steps, folder)
        passed = np.array(drawn(args.model, run.folder, scenes).passed, dtype=float)
        name = f"{args.method} {variant}"
        print(line(name, base, passed, kinds) + f"  {steps} steps, {run.seconds:.0f} s", flush=True)


def line(name: str, base: np.ndarray, passed: np.ndarray, kinds: np.ndarray) -> str:
    """One row of the table, in points."""
    gain = mean_gain(base, passed, np.random.default_rng(0))
    rates = "  ".join(f"{kind} {100 * passed[kinds == kind].mean():5.1f}" for kind in CATEGORIES)
    return (f"{name:60s} all {100 * passed.mean():5.1f}  {rates}  gain {100 * (passed - base).mean():+5.1f} "
            f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]")  # fmt: skip


if __name__ == "__main__":
    main()
