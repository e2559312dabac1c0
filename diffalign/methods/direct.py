"""What methods share that differentiate a reward: a walk with a gradient, from a state towards a picture.

    L = -R,   dL/dtheta = -< dR/dx , dx/dtheta >

dR/dx [B, ...] at the walk's end is taken first, through the VAE and the reward alone; then the walk is run again with a
gradient. So the graphs of network and VAE are never in memory together, and the steps of the walk are recomputed in the
backward pass, which keeps one step's activations at a time. The gradient is that of the joint graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.episodes import NEGATIVE, slices
from diffalign.losses import squared_error
from diffalign.methods.base import Batch, Loss, Noised, Run, reference_of
from diffalign.process import moved
from diffalign.sampling import Condition, ddim_stepper, guided, sample
from diffalign.scores import Scores


def start_of(run: Run, batch: Batch) -> Tensor:
    """The noise [B, ...] of a batch's prompts."""
    some = next(iter(batch.conditions[0].values()))
    return moved(torch.randn(len(batch.prompts), *batch.shape, generator=run.generator), some.device)


def walked(
    run: Run,
    x: Tensor,
    times: Tensor,
    condition: Condition,
    negative: Condition,
    guidance: float,
    gradient: bool = False,
) -> Tensor:
    """Where the policy takes x [B, ...] along `times` [K + 1], by DDIM; with gradient its steps are recomputed."""
    policy = guided(run.policy, negative, guidance)
    step = ddim_stepper(policy, run.process, run.parametrization, condition)
    steps = range(len(times) - 1) if gradient else range(0)
    return sample(step, x, moved(times, x.device), grad_steps=steps, checkpoint=gradient).x


def walked_in_parts(
    run: Run, batch: Batch, x: Tensor, times: Tensor, guidance: float, at_once: int
) -> Tensor:  # fmt: skip
    """`walked` without gradient, some pictures at a time."""
    parts = [
        walked(run, x[rows], times, {n: v[rows] for n, v in batch.conditions[0].items()},
               {n: v[rows] for n, v in batch.negative.items()}, guidance)
        for rows in slices(0, len(x), at_once)
    ]  # fmt: skip
    return torch.cat(parts)


def steered(
    run: Run, batch: Batch, x: Tensor, path: Tensor, slope: Tensor, scores: Scores, at_once: int
) -> list[Noised]:
    """Microbatches: from x [B, ...] along `path` [K + 1], and at its end dR/dx [B, ...] of rewards `scores` [B]."""
    slope = torch.where(slope.isfinite(), slope, torch.zeros_like(slope))
    known = scores.total.isfinite()
    reward = torch.where(known, scores.total, torch.zeros_like(scores.total)).detach()
    made = []
    for rows in slices(0, len(x), at_once):
        count = rows.stop - rows.start
        aux = {"slope": slope[rows], "reward": reward[rows], "missing": (~known[rows]).float(),
               "path": moved(path, x.device).expand(count, -1)}  # fmt: skip
        aux |= {NEGATIVE + name: value[rows] for name, value in batch.negative.items()}
        condition = {name: value[rows] for name, value in batch.conditions[0].items()}
        label = torch.ones(count, device=x.device)
        made.append(Noised(x[rows], x[rows], aux["path"][:, 0], condition, label, aux=aux))
    return made


def steer_last(
    run: Run, batch: Batch, last: int, steps: int, guidance: float, goal: float | None, at_once: int
) -> list[Noised]:
    """Walks of `steps` steps, of which the last ones are to be differentiated."""
    times, x = run.times(steps), start_of(run, batch)
    cut = steps - last
    if cut:
        x = walked_in_parts(run, batch, x, times[: cut + 1], guidance, at_once)
    end = walked_in_parts(run, batch, x, times[cut:], guidance, at_once)
    scores, slope = run.reward_gradient(end, batch.prompts)
    return steered(run, batch, x, times[cut:], below(slope, scores, goal), scores, at_once)


def below(slope: Tensor, scores: Scores, goal: float | None) -> Tensor:
    """dR/dx, 0 for pictures that have reached the goal: max(0, goal - R) in the place of -R."""
    if goal is None:
        return slope
    reached = (scores.total >= goal).view(-1, *[1] * (slope.ndim - 1))
    return torch.where(reached, torch.zeros_like(slope), slope)


def reward_loss(run: Run, batch: Noised, guidance: float, kl_weight: float = 0.0) -> Loss:
    """-R as the value and its gradient through the walk, with a leash at the walk's first state if asked for."""
    negative = {n[len(NEGATIVE):]: v for n, v in batch.aux.items() if n.startswith(NEGATIVE)}  # fmt: skip
    end = walked(run, batch.x_t, batch.aux["path"][0], batch.condition, negative, guidance, gradient=True)
    along = (batch.aux["slope"] * end).flatten(1).sum(1)
    value = -batch.aux["reward"] - (along - along.detach())
    metrics = {name: batch.aux[name] for name in ("reward", "missing")}
    if kl_weight:
        kl = _kl(run, batch)
        value, metrics = value + kl_weight * kl, metrics | {"kl": kl.detach()}
    return Loss(value, run.process.fraction(batch.t), metrics)


def _kl(run: Run, batch: Noised) -> Tensor:
    with torch.no_grad():
        theirs = reference_of(run)(batch.x_t, batch.t, batch.condition)
    return squared_error(run.policy(batch.x_t, batch.t, batch.condition), theirs)


def random_step(run: Run, places: Sequence[int]) -> int:
    """One of the places, drawn once."""
    return places[int(torch.randint(len(places), (1,), generator=run.generator))]
