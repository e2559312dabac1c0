"""Does noise that was found with a distilled model seed its teacher? Verifier's pass rates, plain and found, of both.

    python -m benchmarks.noise_seeds

On validation captions of two objects: ReNO with tiny-sd-turbo's 4 steps looks for noise that tiny-clip likes, and
tiny-sd walks from the same noise in 20 steps with guidance. About five minutes of a core.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from torch import Tensor

from benchmarks.league_noise import captions
from diffalign import load_pipeline, optimize_noise
from diffalign.generation import sample_latents
from diffalign.pipelines.base import LatentPipeline
from diffalign.rewards.preprocess import to_pictures
from diffalign.shapes.verify import verify

LOOKS, BATCH = 10, 24
GUIDANCE, STEPS = 4.5, 20  # of the teacher


def pass_rate(pixels: Tensor, prompts: list[str]) -> float:
    """Of pictures [N, 3, H, W]."""
    return float(np.mean([verify(shown, text).ok for shown, text in zip(to_pictures(pixels), prompts, strict=True)]))


@torch.no_grad()
def walked(teacher: LatentPipeline, noise: Tensor, prompts: list[str]) -> Tensor:
    """Pixels [N, 3, H, W] that the teacher makes of starting noise."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        condition, negative = teacher.encode_prompts(some), teacher.encode_prompts([""] * len(some))
        begun = noise[start : start + BATCH]
        latents = sample_latents(teacher, condition, negative, begun, teacher.times(STEPS), GUIDANCE)
        parts.append(teacher.decode(latents).clamp(0, 1))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=48)
    prompts = list(captions("validation", parser.parse_args().captions))
    turbo, teacher = load_pipeline("tiny-sd-turbo"), load_pipeline("tiny-sd")
    found = optimize_noise(turbo, prompts, {"tiny-clip": 1.0}, steps=LOOKS, sampling_steps=4, lr=2, regularization=5,
                           memory="fast", batch_size=BATCH, seed=0)  # fmt: skip
    rates = {
        "turbo, plain noise": pass_rate(found.first.pixels, prompts),
        "turbo, found noise": pass_rate(found.best.pixels, prompts),
        "teacher, plain noise": pass_rate(walked(teacher, found.first.noise, prompts), prompts),
        "teacher, found noise": pass_rate(walked(teacher, found.best.noise, prompts), prompts),
    }
    print(json.dumps({"captions": len(prompts), **rates}, indent=1))


if __name__ == "__main__":
    main()
