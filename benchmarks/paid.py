"""`make bench-paid`: updates of methods that are paid for pictures, against the straightforward way.

    python -m benchmarks.paid --out runs/bench-paid.json

On tiny-sd with a LoRA, after the rollout, which is the same for both. The straightforward way is that of the released
codes, written from their descriptions: D3PO asks policy and reference for every picture of every pair anew; AlignProp
runs the whole walk in grad mode, with what the network says before the cut detached, and holds VAE and reward in the
same graph; PRDP holds the graphs of all steps of all pictures. First both must have one gradient; only then is anything
timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import median, table, versions
from diffalign.counting import Count
from diffalign.episodes import Episodes, explore, log_probs_of, replayed, slices
from diffalign.losses.policy import pairs_of, reward_differences, step_preferences
from diffalign.methods.base import Batch, Noised, Run
from diffalign.methods.d3po import D3PO
from diffalign.methods.draft import DRaFT
from diffalign.methods.prdp import PRDP
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.lora import attach_lora, without_adapters
from diffalign.rewards import load_rewards
from diffalign.sampling import ddim_stepper, guided, sample
from diffalign.scores import Scores, known, scores_of
from diffalign.writing import write_json

PROMPTS = ("a red circle", "a blue square above a green triangle")
TOLERANCE = 1e-4  # relative, of gradients: sums in another order
GUIDANCE = 4.5


@dataclass(frozen=True)
class Subject:
    """tiny-sd with a LoRA that has been trained a little, and its reward."""

    pipe: Any
    parameters: list[torch.nn.Parameter]
    batch: Batch
    reward: Callable[[Tensor, Sequence[str]], Tensor]  # latents -> [B], with a gradient

    def run(self, step: int = 1) -> Run:
        """Of a step other than the first, so that the reference has to be asked."""
        pipe = self.pipe
        return Run(
            pipe.predict, without_adapters(pipe), pipe.process, pipe.parametrization,
            torch.Generator().manual_seed(0), times=pipe.times, score=self._score, reward_gradient=self._gradient,
            step=step,
        )  # fmt: skip

    def _score(self, latents: Tensor, prompts: Sequence[str]) -> Future[Scores]:
        with torch.no_grad():
            return known(scores_of({"clip": self.reward(latents, prompts)}, {"clip": 1.0}))

    @torch.enable_grad()
    def _gradient(self, latents: Tensor, prompts: Sequence[str]) -> tuple[Scores, Tensor]:
        leaf = latents.detach().requires_grad_()
        total = self.reward(leaf, prompts)
        return scores_of({"clip": total.detach()}, {"clip": 1.0}), torch.autograd.grad(total.sum(), leaf)[0]


def subject(rank: int = 4) -> Subject:
    pipe = load_pipeline("tiny-sd")
    parameters = attach_lora(pipe, rank=rank, seed=0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=g))
    condition, negative = pipe.encode_prompts(list(PROMPTS)), pipe.encode_prompts([""] * len(PROMPTS))
    empty = torch.ones(len(PROMPTS))
    batch = Batch((), (condition,), empty, empty[:, None], negative, prompts=PROMPTS, shape=pipe.latent_shape(64, 64))
    rewards, decode = load_rewards({"clip": {"model": "tiny-clip"}}), pipe.decoder()
    return Subject(pipe, parameters, batch, lambda x, prompts: rewards(decode(x).clamp(0, 1), list(prompts)))


@dataclass(frozen=True)
class Cost:
    """Of one update: pictures that the network was evaluated on, seconds, bytes kept for a backward pass at most."""

    evaluations: int
    seconds: float
    kept_bytes: int


class Meter:
    """What an update costs and what gradient it leaves."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.evaluations, self.most = subject, 0, 0
        subject.pipe.network.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Sequence[Any], kwargs: Any, output: Any) -> None:
        self.evaluations += len(args[0])

    def of(self, update: Callable[[], None], rounds: int) -> tuple[Cost, list[Tensor]]:
        """The gradient of one update, and its cost as the median of `rounds`."""
        gradient, seconds = self.gradient(update), []
        evaluations = self.evaluations
        for _ in range(rounds):
            start = time.perf_counter()
            self.gradient(update)
            seconds.append(time.perf_counter() - start)
        return Cost(evaluations, median(seconds) if seconds else 0.0, self.most), gradient

    def gradient(self, update: Callable[[], None]) -> list[Tensor]:
        for parameter in self.subject.parameters:
            parameter.grad = None
        self.evaluations = self.most = 0
        update()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.subject.parameters]

    def backward(self, loss: Callable[[], Tensor]) -> None:
        """Forward and backward, counting what is kept between."""
        kept = Count()
        kept.ignore(self.subject.pipe.network)
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            value = loss()
        self.most = max(self.most, kept.kept_bytes)
        value.backward()


def microbatches(meter: Meter, rule: Any, run: Run, batch: Batch) -> None:
    """As the trainer takes them."""
    with torch.no_grad():
        prepared = list(rule.prepare(run, batch))
    for noised in prepared:
        meter.backward(lambda noised=noised: rule.loss(run, noised).value.mean() / len(prepared))  # type: ignore[misc]


def plain_d3po(meter: Meter, rule: D3PO, run: Run, episodes: Episodes) -> None:
    """Every pair by itself: policy and reference, both pictures, every step."""
    assert run.reference is not None
    better, worse = pairs_of(episodes.scores.total.view(-1, rule.group))
    steps, how = episodes.log_probs.shape[1], rule.explorer
    won = torch.tensor([[1.0, 0.0]])
    for winner, loser in zip(better.tolist(), worse.tolist(), strict=True):
        for k in range(steps):
            step = replayed(episodes, torch.tensor([winner, loser]), k)
            with torch.no_grad():
                theirs = how.law(run, run.reference, step).log_prob(step.y)

            def loss(step: Noised = step, theirs: Tensor = theirs) -> Tensor:
                q = how.law(run, run.policy, step).log_prob(step.y) - theirs
                return step_preferences(q.view(1, 2), won, rule.beta, rule.clip)[0].sum() / (steps * len(better))

            meter.backward(loss)


def plain_draft(meter: Meter, rule: DRaFT, run: Run, batch: Batch, reward: Callable[..., Tensor]) -> None:
    """One graph from the noise to the reward; what is said before the cut is detached, steps after it checkpointed."""
    x = torch.randn(len(batch.prompts), *batch.shape, generator=run.generator)
    times, cut = run.times(rule.steps), rule.steps - rule.last
    policy = guided(run.policy, batch.negative, rule.guidance)

    def walk() -> Tensor:
        state = x
        for k in range(rule.steps):
            if k < cut:
                said = policy(state, times[k].expand(len(x)), batch.conditions[0]).detach()
                step = ddim_stepper(lambda *_, said=said: said, run.process, run.parametrization, {})
                state = sample(step, state, times[k : k + 2]).x
            else:
                step = ddim_stepper(policy, run.process, run.parametrization, batch.conditions[0])
                state = checkpoint(lambda s, k=k, step=step: sample(step, s, times[k : k + 2], grad_steps=range(1)).x,
                                   state, use_reentrant=False)  # fmt: skip
        return -reward(state, batch.prompts).mean()

    meter.backward(walk)


def plain_prdp(meter: Meter, rule: PRDP, run: Run, episodes: Episodes, reference: Tensor) -> None:
    """One graph of all steps of all pictures."""

    def loss() -> Tensor:
        count, width = episodes.log_probs.shape
        lp = torch.cat([
            torch.stack([rule.explorer.law(run, run.policy, step).log_prob(step.y)
                         for step in (replayed(episodes, rows, k) for k in range(width))], 1)
            for rows in slices(0, count, rule.at_once)
        ])  # fmt: skip
        shape = (-1, rule.group, width)
        ours, old = ((x - reference).view(shape) for x in (lp, episodes.log_probs))
        return reward_differences(ours, old, episodes.scores.total.view(-1, rule.group), rule.beta, rule.clip,
                                  rule.reduction)[0].mean()  # fmt: skip

    meter.backward(loss)


def apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Relative rms of the difference of two gradients."""
    mine, other = (torch.cat([g.flatten().double() for g in part]) for part in (ours, theirs))
    assert other.norm() > 0, "there is no gradient to compare"
    return float((mine - other).norm() / other.norm())


def compared(meter: Meter, names: Sequence[str], updates: Sequence[Callable[[], None]], rounds: int) -> dict[str, Cost]:
    """Costs by name, once all gradients agree with the first.

    Raises:
        AssertionError: two gradients differ by more than TOLERANCE.
    """
    found = {name: meter.of(update, rounds) for name, update in zip(names, updates, strict=True)}
    first = next(iter(found.values()))[1]
    for name, (_, gradient) in found.items():
        difference = apart(gradient, first)
        assert difference <= TOLERANCE, f"{name}: gradients differ by {difference:.2g}, allowed {TOLERANCE:g}"
    return {name: cost for name, (cost, _) in found.items()}


def d3po(meter: Meter, steps: int, rounds: int) -> dict[str, Cost]:
    subject = meter.subject
    rule = D3PO(group=7, steps=steps, guidance=GUIDANCE, at_once=14)
    run = subject.run()
    one = replace(subject.batch, prompts=PROMPTS[:1], conditions=(_first(subject.batch.conditions[0]),),
                  negative=_first(subject.batch.negative))  # fmt: skip
    with torch.no_grad():
        episodes = explore(run, run.policy, one, rule.explorer)

    def ours(mode: str) -> Callable[[], None]:
        mine = replace(rule, mode=mode)

        def update() -> None:
            with torch.no_grad():
                seen = replace(episodes, log_probs=log_probs_of(run, run.reference, episodes, mine.explorer))  # type: ignore[arg-type]
            microbatches(meter, mine, replace(run, held=lambda *_: (seen, {})), one)

        return update

    names = ("D3PO, group of 7: every pair by itself", "ours, mode: pairs", "ours, mode: shared")
    updates = (lambda: plain_d3po(meter, rule, run, episodes), ours("pairs"), ours("shared"))
    return compared(meter, names, updates, rounds)


def alignprop(meter: Meter, steps: int, rounds: int) -> dict[str, Cost]:
    subject, rule = meter.subject, DRaFT(last=3, steps=steps, guidance=GUIDANCE)
    return compared(
        meter, (f"AlignProp, 3 of {steps} steps: one graph", f"ours, 3 of {steps} steps"),
        (lambda: plain_draft(meter, rule, subject.run(), subject.batch, subject.reward),
         lambda: microbatches(meter, rule, subject.run(), subject.batch)), rounds,
    )  # fmt: skip


def prdp(meter: Meter, steps: int, rounds: int) -> dict[str, Cost]:
    subject = meter.subject
    rule = PRDP(group=4, steps=steps, guidance=GUIDANCE, updates=2, beta=10.0, clip=0.1)
    run = subject.run()
    with torch.no_grad():
        episodes = explore(run, run.policy, subject.batch, rule.explorer)
        assert run.reference is not None
        reference = log_probs_of(run, run.reference, episodes, rule.explorer)
    held = replace(run, held=lambda *_: (episodes, reference))
    return compared(meter, ("PRDP, 8 pictures: one graph", "ours, two passes"),
                    (lambda: plain_prdp(meter, rule, run, episodes, reference),
                     lambda: microbatches(meter, rule, held, subject.batch)), rounds)  # fmt: skip


def _first(condition: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:1] for name, value in condition.items()}


def run(steps: int, rounds: int) -> dict[str, Any]:
    """All comparisons."""
    torch.set_num_threads(1)
    meter = Meter(subject())
    groups = [d3po(meter, steps, rounds), alignprop(meter, steps, rounds), alignprop(meter, 5 * steps, rounds),
              prdp(meter, steps, rounds)]  # fmt: skip
    rows = []
    for group in groups:
        plain = next(iter(group.values()))
        for name, cost in group.items():
            rows.append({"update": name, **vars(cost), "fewer_evaluations": plain.evaluations / cost.evaluations,
                         "faster": plain.seconds / cost.seconds if cost.seconds else None})  # fmt: skip
    return {"steps": steps, "rows": rows, "versions": versions()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = run(args.steps, args.rounds)
    print(table(("update", "evaluations", "fewer", "ms", "faster", "MB kept at most"), [
        [row["update"], str(row["evaluations"]), f"{row['fewer_evaluations']:.2f}", f"{1000 * row['seconds']:.0f}",
         f"{row['faster']:.2f}" if row["faster"] else "", f"{row['kept_bytes'] / 1e6:.1f}"] for row in found["rows"]
    ]))  # fmt: skip
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    sys.exit(main())
