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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from diffalign.shapes.train_common import cosine_lr, save_atomically, update_ema
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
    """Student, its average and optimizer; one `step` at a time on walks that are there."""

    def __init__(self, teacher: LatentPipeline, args: argparse.Namespace) -> None:
        self.args, self.teacher, self.student = args, teacher, turbo_of(teacher)
        self.network = self.student.network.train().requires_grad_(True)
        self.times = self.student.times(args.stages).to(args.device)
        self.average = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
        self.done = 0

    def step(self, walks: Walks) -> list[float]:
        """One optimizer step; the error of each stage. Everything random follows from (seed, step)."""
        g, n, device = torch.Generator().manual_seed(mix(self.args.seed, self.done)), self.args.batch, self.args.device
        pick = torch.randint(len(walks.states), (n,), generator=g)
        stage = torch.randint(self.args.stages, (n,), generator=g)
        x_t, aim = (walks.states[pick, stage + more].float().to(device) for more in (0, 1))
        with torch.no_grad():
            condition = on(device, self.student.encode_prompts([walks.prompts[i] for i in pick.tolist()]))
        take = ddim_stepper(self.student.predict, self.student.process, self.student.parametrization, condition)
        landed = take(x_t, self.times[stage.to(device)], self.times[stage.to(device) + 1]).mean
        errors = (landed - aim).square().flatten(1).mean(1)
        self.optimizer.param_groups[0]["lr"] = cosine_lr(self.args.lr, self.done, self.args.steps, warmup=100)
        self.optimizer.zero_grad(set_to_none=True)
        errors.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        update_ema(self.average, self.network, min(self.args.ema, (1 + self.done) / (10 + self.done)))
        found, which = errors.detach().cpu(), stage
        return [found[which == one].mean().item() for one in range(self.args.stages)]

    def averaged(self) -> LatentPipeline:
        """A student with the averaged weights."""
        student = turbo_of(self.teacher)
        student.network.load_state_dict(self.average)
        return student

    def save(self) -> None:
        save_atomically(Rest(self.averaged(), self.args.teacher), self.args.out)
        state = {"done": self.done, "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "average": self.average}  # fmt: skip
        with replacing(self.args.out.with_name(self.args.out.name + ".state.pt")) as partial:
            torch.save(state, partial)

    def resume(self) -> None:
        """Goes on from what an earlier call left, if there is something."""
        file = self.args.out.with_name(self.args.out.name + ".state.pt")
        if not file.exists():
            return
        state = torch.load(file, map_location=self.args.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.average = state["done"], state["average"]
        print(f"resumed at step {self.done}", flush=True)


class Rest:
    """Saves the network in fp16 and the scheduler; model_index.json says whose the rest is."""

    def __init__(self, pipe: LatentPipeline, of: str) -> None:
        self.pipe, self.of = pipe, of

    def save_pretrained(self, save_directory: str) -> None:
        folder, stock = Path(save_directory), self.pipe.stock
        own = {self.pipe.lora_prefix: self.pipe.network.half(), "scheduler": stock.scheduler}
        for name, part in own.items():
            part.save_pretrained(str(folder / name))
        index = {"_class_name": type(stock).__name__, REST_OF: self.of,
                 **{name: ["diffusers", type(part).__name__] for name, part in own.items()}}  # fmt: skip
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def pools(teacher: LatentPipeline, args: argparse.Namespace) -> Iterator[Walks]:
    """Fresh walks whenever they are asked for, from the captions of the training split."""
    number = 0
    while True:
        scenes = sample_scenes("train", args.pool, mix(args.seed, number, 1) % 2**31)
        file = args.out.with_name(f"{args.out.name}.walks-{number}.pt")
        if file.exists():
            kept: dict[str, Any] = torch.load(file, weights_only=True)
            yield Walks(kept["states"], tuple(kept["prompts"]))
        else:
            begun = time.time()
            walks = walked(teacher, [str(scene) for scene in scenes], [mix(args.seed, number, 2, i) for i in
                                                                       range(args.pool)], args)  # fmt: skip
            with replacing(file) as partial:
                torch.save({"states": walks.states, "prompts": list(walks.prompts)}, partial)
            print(f"pool {number}: {args.pool} walks of the teacher in {time.time() - begun:.0f} s", flush=True)
            yield walks
        number += 1


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
    distiller.resume()
    steps, scenes = args.stages * args.substeps, sample_scenes("validation", args.draws, seed=1)
    teacher = trailing(distiller.teacher).stock
    said = pass_rates(teacher, scenes, steps=steps, guidance_scale=args.guidance_scale)
    print(f"teacher, {steps} steps: {said}", flush=True)
    start, first, errors = time.time(), distiller.done, []
    for number, walks in enumerate(pools(distiller.teacher, args)):
        while distiller.done < min(args.steps, (number + 1) * args.pool_steps):
            errors.append(distiller.step(walks))
            done = distiller.done
            if done % 100 == 0:
                mean = [round(float(value), 5) for value in np.nanmean(errors[-100:], 0)]
                print(f"step {done} errors {mean} {(time.time() - start) / (done - first):.3f} s/step", flush=True)
            if done % args.save_every == 0 or done == args.steps:
                distiller.save()
            if done % args.eval_every == 0 or done == args.steps:
                said = pass_rates(distiller.averaged().stock, scenes, steps=args.stages, guidance_scale=0.0)
                print(f"step {done}: {said}", flush=True)
        if distiller.done >= args.steps:
            return


if __name__ == "__main__":
    main()
