"""How often a shapes model draws what it is asked, as a user without this project has it.

    python -m diffalign.shapes.rates --model tiny-sdxl --split heldout --draws 540
    python -m diffalign.shapes.rates --model tiny-sd-turbo --steps 4 --guidance-scale 1 --split heldout --draws 540
    python -m diffalign.shapes.rates --model tiny-video --split heldout --draws 300

The stock pipeline with its defaults, except 20 steps, or what is given; judged by the verifier. Captions are in the mix
of those that ship; of a video model they are of things that move, and "moves" is the share of clips in which all goes
where it should, "all" of those in which the frames are right as well.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

from diffalign.pipelines import load_pipeline
from diffalign.shapes.grammar import SPLITS, Scene, sample_scenes
from diffalign.shapes.motion import MovingScene, sample_moving
from diffalign.shapes.tiny_video import FRAMES, SIDE
from diffalign.shapes.verify import verify
from diffalign.shapes.verify_clip import verify_clip


@torch.no_grad()
def pass_rates(
    stock: Any, scenes: list[Scene], seed: int = 0, batch: int = 64, steps: int = 20, **options: Any
) -> dict[str, float]:
    """Share of pictures that the verifier accepts, per category and in all, with the stock defaults but for options."""
    stock.set_progress_bar_config(disable=True)
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        generators = [torch.Generator(stock.device).manual_seed(seed + start + i) for i in range(len(part))]
        images = stock([str(s) for s in part], num_inference_steps=steps, generator=generators, output_type="np",
                       **options).images  # fmt: skip
        for scene, image in zip(part, images, strict=True):
            ok = verify((image * 255).round().astype(np.uint8), scene).ok
            hits[scene.category].append(ok)
            hits["all"].append(ok)
    return {name: sum(found) / len(found) for name, found in sorted(hits.items())}


@torch.no_grad()
def clip_rates(
    stock: Any, scenes: Sequence[MovingScene], seed: int = 0, batch: int = 20, steps: int = 20, **options: Any
) -> dict[str, float]:
    """As `pass_rates`, of clips of 9 frames of 64 pixels."""
    stock.set_progress_bar_config(disable=True)
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        generators = [torch.Generator(stock.device).manual_seed(seed + start + i) for i in range(len(part))]
        clips = stock([str(s) for s in part], num_inference_steps=steps, generator=generators, output_type="np",
                      num_frames=FRAMES, height=SIDE, width=SIDE, **options).frames  # fmt: skip
        for moving, clip in zip(part, clips, strict=True):
            verdict = verify_clip((clip * 255).round().astype(np.uint8), moving)
            for name, found in {moving.category: verdict.ok, "all": verdict.ok, "moves": verdict.moves}.items():
                hits[name].append(found)
    return {name: sum(found) / len(found) for name, found in sorted(hits.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a shipped model or a folder")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--draws", type=int, default=192)
    parser.add_argument("--seed", type=int, default=1, help="of the captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, help="the pipeline's own if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    stock = load_pipeline(args.model, device=args.device).stock
    how = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    if isinstance(stock, WanPipeline):
        rates = clip_rates(stock, sample_moving(args.split, args.draws, seed=args.seed), steps=args.steps, **how)
    else:
        rates = pass_rates(stock, sample_scenes(args.split, args.draws, seed=args.seed), steps=args.steps, **how)
    shares = "  ".join(f"{name} {100 * rate:.1f} %" for name, rate in rates.items())
    print(f"{shares}  of {args.draws} {args.split} draws")


if __name__ == "__main__":
    main()
