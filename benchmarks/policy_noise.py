"""From which steps of a walk does a policy gradient learn? Its signal against its noise, step by step.

    python -m benchmarks.policy_noise --model tiny-sd

A shipped model with a new LoRA draws pictures of training captions, every step but the last at random, and the exact
verifier scores them. Each rollout gives a gradient per step, advantage times the gradient of the log-probability: the
dot product of those of two rollouts has the squared signal as its mean, and their mean squared length is signal and
noise. Their ratio says how much of one rollout's gradient is signal; its inverse is how many rollouts make as much
signal as noise. About four minutes of a core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.league_data import loaded
from benchmarks.measure import table, versions
from diffalign.advantages import ADVANTAGES
from diffalign.episodes import Episodes, Explorer, every_step, explore
from diffalign.methods.base import Batch, Run
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.lora import attach_lora
from diffalign.rewards.preprocess import to_pictures
from diffalign.scores import Scores, known, scores_of
from diffalign.shapes.grammar import sample_scenes
from diffalign.shapes.verify import verify
from diffalign.writing import write_json


def run_of(pipe: LatentPipeline, seed: int) -> Run:
    """Draws from this seed, paid by the verifier."""
    decode = pipe.decoder()

    def score(latents: Tensor, prompts: Sequence[str]) -> Future[Scores]:
        pictures = to_pictures(decode(latents).clamp(0, 1))
        found = [verify(np.asarray(one), text).score for one, text in zip(pictures, prompts, strict=True)]
        return known(scores_of({"verifier": torch.tensor(found)}, {"verifier": 1.0}))

    return Run(pipe.predict, None, pipe.process, pipe.parametrization, torch.Generator().manual_seed(seed),
               times=pipe.times, score=score)  # fmt: skip


def batch_of(pipe: LatentPipeline, prompts: Sequence[str]) -> Batch:
    condition, negative = pipe.encode_prompts(list(prompts)), pipe.encode_prompts([""] * len(prompts))
    ones = torch.ones(len(prompts))
    return Batch((), (condition,), ones, ones[:, None], negative, prompts=tuple(prompts),
                 shape=pipe.latent_shape(64, 64))  # fmt: skip


def gradients(
    run: Run, episodes: Episodes, how: Explorer, advantages: str, parameters: Sequence[torch.nn.Parameter]
) -> Tensor:
    """[W, parameters]: of the mean over pictures, one row per random step."""
    scores = episodes.scores.total.view(-1, how.group).double()
    advantage = ADVANTAGES[advantages](scores, lambda own: own).flatten().float()
    rows = slice(0, len(episodes.x))
    found: dict[float, Tensor] = {}
    for step in every_step(episodes, rows, how, {"advantage": advantage}):
        lp = how.law(run, run.policy, step).log_prob(step.y)
        parts = torch.autograd.grad((lp * step.aux["advantage"]).sum() / rows.stop, list(parameters), allow_unused=True)
        flat = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                          for p, g in zip(parameters, parts, strict=True)])  # fmt: skip
        time = float(step.t[0])
        found[time] = found.get(time, torch.zeros_like(flat)) + flat
    return torch.stack([found[time] for time in sorted(found, reverse=True)])


def signal(rollouts: Tensor) -> dict[str, float]:
    """Of gradients [N, parameters]: length, share of its square that is signal, and that share's standard error."""
    dots = rollouts.double() @ rollouts.double().T
    first, second = torch.triu_indices(len(dots), len(dots), 1)
    pairs, square = dots[first, second], dots.trace() / len(dots)
    return {"length": float(square.sqrt()), "signal": float(pairs.mean() / square),
            "error": float(pairs.std() / square / len(pairs) ** 0.5)}  # fmt: skip


def report(by_step: Tensor) -> list[dict[str, Any]]:
    """Rows of the table, of gradients [W, N, parameters]: each step, and several of them."""
    rows: list[dict[str, Any]] = [{"steps": str(k), **signal(found)} for k, found in enumerate(by_step)]
    lengths = torch.tensor([row["length"] for row in rows])
    for name, last, weights in (
        ("all", len(rows), torch.ones_like(lengths)),
        ("the first six", 6, torch.ones_like(lengths)),
        ("all, made equally long", len(rows), 1 / lengths),
    ):
        found = torch.einsum("k,knp->np", weights[:last], by_step[:last])
        rows.append({"steps": name, **signal(found)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--rollouts", type=int, default=12)
    parser.add_argument("--captions", type=int, default=16, help="of a rollout")
    parser.add_argument("--group", type=int, default=8, help="pictures of a caption")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--advantage", default="group", choices=ADVANTAGES)
    parser.add_argument("--dynamics", default="auto")
    parser.add_argument("--noise-level", type=float)
    parser.add_argument("--same-start", action="store_true", help="pictures of a caption begin with one noise")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pipe = loaded(args.model)
    parameters = attach_lora(pipe, rank=16, seed=0)
    how = Explorer(args.steps, args.guidance, args.dynamics, args.noise_level, args.group, args.same_start, at_once=32)
    every = []
    for number in range(args.rollouts):
        prompts = [str(scene) for scene in sample_scenes("train", args.captions, 1000 + number)]
        run = run_of(pipe, number)
        episodes = explore(run, run.policy, batch_of(pipe, prompts), how)
        every.append(gradients(run, episodes, how, args.advantage, parameters))
        print(f"rollout {number + 1} of {args.rollouts}", flush=True)
    by_step = torch.stack(every, 1)
    rows = report(by_step)
    print(table(("random steps", "length of the gradient", "signal"), [
        [row["steps"], f"{row['length']:.2g}", f"{row['signal']:+.3f} ± {row['error']:.3f}"] for row in rows
    ]))  # fmt: skip
    if args.out:
        write_json(args.out, {"arguments": json.loads(json.dumps(vars(args), default=str)), "rows": rows,
                              "versions": versions()}, indent=1)  # fmt: skip


if __name__ == "__main__":
    main()
