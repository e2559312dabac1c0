"""`make bench-noise`: ReNO's iterations against a straightforward loop in the order of its released code.

    python -m benchmarks.noise --out runs/bench-noise.json
    python -m benchmarks.noise --memory low balanced fast --pictures 1 8

The straightforward loop takes one prompt at a time; in every iteration the model's text encoder and each reward's read
the prompt again, and network, VAE and rewards are all recomputed in the backward pass. Its arithmetic is otherwise the
same (noise in fp32, clipping, the regularizer), and first both must come to the same noise. Memory is what autograd
keeps for the backward pass, in bytes, which is the same on every machine.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from benchmarks.measure import median, table, versions
from diffalign.noise.driver import optimize_noise
from diffalign.noise.objective import MEMORY, Objective
from diffalign.noise.reno import ReNO
from diffalign.noise.setup import objective_of
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.base import LatentPipeline
from diffalign.rewards.base import Weighted
from diffalign.rewards.clip import TinyCLIP
from diffalign.rewards.texts import NetworkReader
from diffalign.sampling import ddim_stepper, sample
from diffalign.writing import write_json

TOLERANCE = 1e-4  # of the noise after all iterations, relative rms: batches and recomputation round differently
PROMPTS = ("a red circle above a blue square", "three green triangles", "a yellow cross", "two red squares",
           "a blue circle left of a red cross", "a green square", "four blue circles", "a yellow triangle")  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A model, what judges its pictures, and how long."""

    pipe: LatentPipeline
    rewards: dict[str, tuple[TinyCLIP, float]]
    sampling_steps: int
    iterations: int
    how: ReNO = field(default_factory=ReNO)

    def weighted(self) -> Weighted:
        return Weighted(self.rewards)


def work_of(model: str, sampling_steps: int, iterations: int, towers: int) -> Work:
    """Several rewards of one kind, each with weights of its own in memory: what counts is that each is a tower."""
    rewards = {f"clip-{number}": (TinyCLIP(), 1.0 / (number + 1)) for number in range(towers)}
    return Work(load_pipeline(model), rewards, sampling_steps, iterations, ReNO(steps=iterations))


def straightforward(work: Work, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """The noise after the last iteration, of one prompt after the other."""
    return torch.cat([alone(work, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)])


def alone(work: Work, prompt: str, seed: int) -> Tensor:
    """One prompt, all of it in one loop."""
    pipe, how = work.pipe, work.how
    times, shape = pipe.times(work.sampling_steps), pipe.latent_shape()
    z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimizer, d = torch.optim.SGD([z], how.lr, how.momentum, nesterov=True), z.numel()
    for _ in range(work.iterations - 1):
        with torch.no_grad():
            condition = pipe.encode_prompts([prompt])
        step = ddim_stepper(pipe.predict, pipe.process, pipe.parametrization, condition)
        x = sample(step, z, times, grad_steps=range(work.sampling_steps), checkpoint=True).x
        pixels = recompute(pipe.decode, x, use_reentrant=False).clamp(0, 1)
        total = torch.stack([weight * plain_score(reward, pixels, prompt)
                             for reward, weight in work.rewards.values()]).sum()  # fmt: skip
        norm = z.norm()
        optimizer.zero_grad()
        (-total + how.regularization * (norm.square() / 2 - (d - 1) * norm.log())).backward()
        torch.nn.utils.clip_grad_norm_([z], how.grad_clip)
        optimizer.step()
    return z.detach()


def plain_score(reward: TinyCLIP, pixels: Tensor, prompt: str) -> Tensor:
    """The cosine with both towers run."""
    with torch.no_grad():
        text = F.normalize(reward.tower.text_features([prompt]), dim=-1)
    tower = reward.tower
    picture = recompute(lambda x: tower.image_features(tower.recipe.pixels(x)), pixels, use_reentrant=False)
    return reward.scale * (F.normalize(picture, dim=-1) * text).sum()


def ours(work: Work, prompts: Sequence[str], seeds: Sequence[int], memory: str) -> Tensor:
    """The same noise by `optimize_noise`, all prompts at once."""
    result = optimize_noise(work.pipe, list(prompts), work.weighted(), steps=work.iterations, seed=list(seeds),
                            sampling_steps=work.sampling_steps, memory=memory)  # fmt: skip
    return result.last.noise


def parity(work: Work, prompts: Sequence[str], seeds: Sequence[int], memory: str) -> float:
    """Largest relative rms difference of the noise of any prompt.

    Raises:
        AssertionError: it is above the tolerance, or nothing has moved.
    """
    plain, fast = straightforward(work, prompts, seeds), ours(work, prompts, seeds, memory)
    worst = ((fast - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)).max().item()
    assert worst <= TOLERANCE, f"the two ways differ by {worst:.2g}, allowed {TOLERANCE:.0e}"
    start = torch.stack([torch.randn(plain.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    assert ((plain - start).flatten(1).norm(dim=1) > 0.1).all(), "the noise has not moved"
    return worst


class Kept:
    """Bytes that autograd keeps at a time, each storage once; weights are there anyway and do not count."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        weights = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        self.ignored = {weight.untyped_storage()._cdata for weight in weights}
        self.holders: dict[int, int] = {}
        self.now = self.most = 0

    def keep(self, tensor: Tensor) -> Holder:
        return Holder(self, tensor)


class Holder:
    """What autograd holds in the place of a tensor, for as long as it needs it."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.kept, self.tensor, self.place, self.size = kept, tensor, storage._cdata, storage.nbytes()
        if self.place in kept.ignored:
            self.size = 0
        kept.holders[self.place] = kept.holders.get(self.place, 0) + 1
        if kept.holders[self.place] == 1:
            kept.now += self.size
            kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        self.kept.holders[self.place] -= 1
        if not self.kept.holders[self.place]:
            self.kept.now -= self.size


def kept_bytes(work: Work, prompts: Sequence[str], seeds: Sequence[int], memory: str) -> int:
    """Of autograd for one gradient, at the moment when they are the most, weights not counted."""
    objective: Objective = objective_of(work.pipe, prompts, work.weighted(), seeds, work.sampling_steps, 1.0,
                                        work.pipe.latent_shape(), memory, None, None)  # fmt: skip
    towers = [reward.tower.model for reward, _ in work.rewards.values() if isinstance(reward.tower, NetworkReader)]
    kept = Kept((work.pipe.network, work.pipe.stock.vae, *towers))
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda one: one.tensor):
        objective.slope(objective.fresh())
    return kept.most


def seconds(ways: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way, interleaved; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number:
                times[name].append(time.process_time() - start)
    return times


def measured(work: Work, pictures: int, memories: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each memory mode: parity first, then times."""
    prompts, seeds = PROMPTS[:pictures], range(pictures)
    differences = {memory: parity(work, prompts, seeds, memory) for memory in memories}
    ways: dict[str, Callable[[], Tensor]] = {"straightforward": lambda: straightforward(work, prompts, seeds)}
    ways |= {memory: functools.partial(ours, work, prompts, seeds, memory) for memory in memories}
    times = {name: median(values) for name, values in seconds(ways, rounds).items()}
    return [{"pictures": pictures, "memory": memory, "difference": differences[memory],
             "straightforward": times["straightforward"], "seconds": times[memory],
             "ratio": times["straightforward"] / times[memory],
             "kept_bytes": kept_bytes(work, prompts, seeds, memory)} for memory in memories]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--sampling-steps", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--towers", type=int, default=4, help="rewards")
    parser.add_argument("--pictures", type=int, nargs="*", default=[1, 8], help="prompts that are optimized")
    parser.add_argument("--memory", nargs="*", default=list(MEMORY), choices=MEMORY)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-noise.json"))
    args = parser.parse_args(arguments)
    if not all(1 <= count <= len(PROMPTS) for count in args.pictures):
        print(f"--pictures: expected 1 to {len(PROMPTS)}", file=sys.stderr)
        return 2
    work = work_of(args.model, args.sampling_steps, args.iterations, args.towers)
    rows = [row for pictures in args.pictures for row in measured(work, pictures, args.memory, args.rounds)]
    facts = {"model": args.model, "sampling_steps": args.sampling_steps, "iterations": args.iterations, "towers":
             args.towers, "threads": torch.get_num_threads(), "versions": versions(), "rows": rows}  # fmt: skip
    write_json(args.out, facts)
    header = ("pictures", "memory", "difference", "straightforward, s", "ours, s", "ratio", "kept, MB")
    print(table(header, [cells(row) for row in rows]))
    print(f"wrote {args.out}")
    return 0


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    numbers = (f"{row[key]:.2f}" for key in ("straightforward", "seconds", "ratio"))
    return str(row["pictures"]), row["memory"], f"{row['difference']:.1e}", *numbers, f"{row['kept_bytes'] / 1e6:.1f}"


if __name__ == "__main__":
    sys.exit(main())
