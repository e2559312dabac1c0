"""Distils a small model of the shapes world to a few steps without guidance, as SD-Turbo is of Stable Diffusion.

    python -m diffalign.shapes.distill --teacher tiny-sd --out runs/tiny-sd-turbo --stages 4

The teacher walks from noise to picture with guidance, several of its steps to each of the student's. One step of the
student, without guidance, is to land where the teacher's steps land:

    L = mean |x_s of the student - x_s of the teacher|^2,   both from the teacher's x_t

which is progressive distillation (Salimans and Ho 2022, arXiv 2202.00512) in one go, with guidance as in Meng et al.
(2210.03142). The walk is deterministic, so a noise has one picture, and the student learns which.

What is saved is the network in fp16 and a scheduler with trailing times, the rest being the teacher's: a folder whose
model_index.json names it in `_rest_of`. A file beside it (OUT.state.pt) continues a killed run where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffalign.pipelines import as_pipeline, load_pipeline
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.parts import REST_OF
from diffalign.sampling import Condition, ddim_stepper, draw, guided, sample
from diffalign.seeds import mix
from diffalign.shapes.grammar import sample_scenes
from diffalign.shapes.rates import pass_rates
from diffalign.shapes.train_common import Learner, learn, save_atomically
from diffalign.writing import replacing


@dataclass(frozen=True)
class Walks:
    """The teacher's: `states` fp16 [N, stages + 1, C, h, w] at the student's times, and what was drawn."""

    states: Tensor
    prompts: tuple[str, ...]


def trailing(pipe: LatentPipeline) -> LatentPipeline:
    """The same network with times that begin at pure noise, however few."""
    stock = copy.copy(pipe.stock)
    options = {"timestep_spacing": "trailing", "clip_sample": False}
    stock.register_modules(scheduler=DDIMScheduler.from_config(stock.scheduler.config, **options))
    return as_pipeline(stock)


def turbo_of(teacher: LatentPipeline) -> LatentPipeline:
    """`trailing`, with a network of its own."""
    stock = trailing(teacher).stock
    stock.register_modules(unet=copy.deepcopy(teacher.network))
    return as_pipeline(stock)


@torch.no_grad()
def walked(teacher: LatentPipeline, prompts: Sequence[str], seeds: Sequence[int], args: argparse.Namespace) -> Walks:
    """Guided DDIM of `args.substeps` to a stage, a picture of each prompt."""
    times = trailing(teacher).times(args.stages * args.substeps)
    parts = []
    for start in range(0, len(prompts), args.batch):
        rows = slice(start, start + args.batch)
        noise = draw(teacher.latent_shape(), [torch.Generator().manual_seed(seed) for seed in seeds[rows]])
        here, away = (
            on(args.device, teacher.encode_prompts(texts)) for texts in (prompts[rows], [""] * len(prompts[rows]))
        )
        policy = guided(teacher.predict, away, args.guidance_scale)
        step = ddim_stepper(policy, teacher.process, teacher.parametrization, here)
        states = sample(step, noise.to(args.device), times.to(args.device), record=True).states
        assert states is not None
        parts.append(states[:, :: args.substeps].half().cpu())
    return Walks(torch.cat(parts), tuple(prompts))


def on(device: str, condition: Condition) -> Condition:
    """The condition there."""
    return {name: value.to(device) for name, value in condition.items()}


class Distiller:
    """A student and the pool of walks that it learns; one `step` at a time, which follows from (seed, step)."""

    def __init__(self, teacher: LatentPipeline, args: argparse.Namespace) -> None:
        self.args, self.teacher, self.student = args, teacher, turbo_of(teacher)
        self.network = self.student.network.train().requires_grad_(True)
        self.times = self.student.times(args.stages).to(args.device)
        self.learner = Learner(self.network, args, weight_decay=1e-3, warmup=100)
        self.pool = -1

    def step(self) -> list[float]:
        """One optimizer step; the error of each stage, NaN where none was drawn."""
        done, n, device = self.learner.done, self.args.batch, self.args.device
        if (number := done // self.args.pool_steps) != self.pool:
            self.pool, self.walks = number, pool(self.teacher, number, self.args)
        g = torch.Generator().manual_seed(mix(self.args.seed, done))
        pick = torch.randint(len(self.walks.states), (n,), generator=g)
        stage = torch.randint(self.args.stages, (n,), generator=g)
        x_t, aim = (self.walks.states[pick, stage + more].float().to(device) for more in (0, 1))
        with torch.no_grad():
            condition = on(device, self.student.encode_prompts([self.walks.prompts[i] for i in pick.tolist()]))
        take = ddim_stepper(self.student.predict, self.student.process, self.student.parametrization, condition)
        landed = take(x_t, self.times[stage.to(device)], self.times[stage.to(device) + 1]).mean
        errors = (landed - aim).square().flatten(1).mean(1)
        self.learner.update(errors.mean())
        found = errors.detach().cpu()
        return [found[stage == one].mean().item() for one in range(self.args.stages)]

    def save(self) -> None:
        with self.learner.averaged():
            save_atomically(Rest(self.student, self.args.teacher), self.args.out)
        self.learner.save_state()


class Rest:
    """Saves the network in fp16 and the scheduler; model_index.json says whose the rest is."""

    def __init__(self, pipe: LatentPipeline, of: str) -> None:
        self.pipe, self.of = pipe, of

    def save_pretrained(self, save_directory: str) -> None:
        folder, stock = Path(save_directory), self.pipe.stock
        own = {self.pipe.lora_prefix: copy.deepcopy(self.pipe.network).half(), "scheduler": stock.scheduler}
        for name, part in own.items():
            part.save_pretrained(str(folder / name))
        index = {"_class_name": type(stock).__name__, REST_OF: self.of,
                 **{name: ["diffusers", type(part).__name__] for name, part in own.items()}}  # fmt: skip
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def pool(teacher: LatentPipeline, number: int, args: argparse.Namespace) -> Walks:
    """Walks with captions of the training split, which are kept in a file; each number has its own."""
    file = args.out.with_name(f"{args.out.name}.walks-{number}.pt")
    if file.exists():
        kept: dict[str, Any] = torch.load(file, weights_only=True)
        return Walks(kept["states"], tuple(kept["prompts"]))
    begun, scenes = time.time(), sample_scenes("train", args.pool, mix(args.seed, number, 1) % 2**31)
    seeds = [mix(args.seed, number, 2, row) for row in range(args.pool)]
    walks = walked(teacher, [str(scene) for scene in scenes], seeds, args)
    with replacing(file) as partial:
        torch.save({"states": walks.states, "prompts": list(walks.prompts)}, partial)
    print(f"pool {number}: {args.pool} walks of the teacher in {time.time() - begun:.0f} s", flush=True)
    return walks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny-sd", help="a shipped model with a U-Net, or a folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", type=int, default=4, help="steps of the student")
    parser.add_argument("--substeps", type=int, default=3, help="steps of the teacher to each")
    parser.add_argument("--guidance-scale", type=float, default=4.5, help="of the teacher")
    parser.add_argument("--pool", type=int, default=8000, help="walks that are drawn at a time")
    parser.add_argument("--pool-steps", type=int, default=4000, help="steps on a pool")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--eval-every", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--draws", type=int, default=192, help="validation pictures of an evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    args.out.parent.mkdir(parents=True, exist_ok=True)
    distiller = Distiller(load_pipeline(args.teacher, device=args.device), args)
    distiller.learner.resume()
    steps, scenes = args.stages * args.substeps, sample_scenes("validation", args.draws, seed=1)
    said = pass_rates(trailing(distiller.teacher).stock, scenes, steps=steps, guidance_scale=args.guidance_scale)
    print(f"teacher, {steps} steps: {said}", flush=True)

    def report() -> None:
        with distiller.learner.averaged():
            said = pass_rates(distiller.student.stock, scenes, steps=args.stages, guidance_scale=0.0)
        print(f"step {distiller.learner.done}: {said}", flush=True)

    learn(distiller.learner, distiller.step, distiller.save, report)


if __name__ == "__main__":
    main()
