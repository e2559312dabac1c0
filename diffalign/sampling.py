"""The one sampling loop: generation, inversion, rollouts with log-probabilities, gradients through some of the steps.

A policy says what the network predicts, a stepper turns that into a Gaussian for the next time, `sample` walks the
times. Guidance is a policy around a policy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from diffalign.process import Endpoints, NoiseProcess, endpoints
from diffalign.transition import Gaussian, ddim

Condition = dict[str, Tensor]  # every value has a leading batch dimension
Policy = Callable[[Tensor, Tensor, Condition], Tensor]  # (x_t [B, ...], t [B], condition) -> y [B, ...]
Stepper = Callable[[Tensor, Tensor, Tensor], Gaussian]  # (x_t [B, ...], t [B], s [B]) -> Gaussian for x_s
Generators = Sequence[torch.Generator]


@dataclass(frozen=True)
class Trajectory:
    """What a walk leaves: `x` [B, ...] at the last time; with record, every state, time and log-probability too.

    states: [B, N+1, ...] from the first to the last time; times: [N+1]; log_probs: [B, N] (not finite where std is 0).
    """

    x: Tensor
    states: Tensor | None = None
    times: Tensor | None = None
    log_probs: Tensor | None = None


def concatenate(*conditions: Condition) -> Condition:
    """Conditions one below the other, along the batch."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


def guided(policy: Policy, negative: Condition, scale: float) -> Policy:
    """Classifier-free guidance in one call on a doubled batch: y = y_neg + scale (y - y_neg) (arXiv 2207.12598).

    `negative` must have the batch size that the policy will be called with. A scale of 1 is the policy itself.
    """
    if scale == 1:
        return policy

    def call(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        y = policy(torch.cat([x_t, x_t]), torch.cat([t, t]), concatenate(negative, condition))
        unconditional, conditional = y.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return call


def as_stock(scale: float) -> float:
    """What a stock pipeline makes of this `guidance_scale`: 1 and below are none, and distilled models are given 0."""
    return max(scale, 1.0)


def predicted_endpoints(
    policy: Policy, process: NoiseProcess, kind: str, x_t: Tensor, t: Tensor, condition: Condition
) -> Endpoints:
    """(x0, eps) that the policy sees in x_t [B, ...] at t [B]."""
    return endpoints(kind, policy(x_t, t, condition), x_t, *process.coefficients(t))


def ddim_stepper(policy: Policy, process: NoiseProcess, kind: str, condition: Condition, eta: float = 0.0) -> Stepper:
    """DDIM in either direction; `kind` is the parametrization's name. eta = 0 on a rectified flow is Euler."""

    def step(x_t: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        ends = predicted_endpoints(policy, process, kind, x_t, t, condition)
        return ddim(ends, process.coefficients(t), process.coefficients(s), eta)

    return step


def carries(process: NoiseProcess, kind: str, path: Tensor) -> Tensor:
    """[K]: what each step of a walk along `path` [K + 1] multiplies its own x with, the network's answer held fixed."""
    one = torch.ones(len(path) - 1, 1, device=path.device)
    now, then = process.coefficients(path[:-1]), process.coefficients(path[1:])
    return ddim(endpoints(kind, torch.zeros_like(one), one, *now), now, then).mean.flatten()


def sample(
    step: Stepper,
    x: Tensor,
    times: Tensor,
    *,
    generators: Generators | None = None,
    noises: Tensor | None = None,
    grad_steps: Container[int] = (),
    checkpoint: bool = False,
    record: bool = False,
    store: torch.dtype | None = None,
) -> Trajectory:
    """Walks x [B, ...] along `times` [N+1] (towards the picture, or towards noise: inversion).

    Args:
        generators: one per sample, for stochastic steps; a sample's noise then does not depend on its batch mates.
            None draws no noise: for steps with std 0.
        noises: [B, N, ...] in their place: the noise of each step.
        grad_steps: indices of the steps to differentiate; the others run under no_grad. range(N) is all of them.
        checkpoint: recompute the differentiated steps in the backward pass instead of keeping their activations.
        record: keep states and log-probabilities for replay.
        store: round every state to this type before it is judged and walked on from, so that what is kept in it is
            what was walked: the log-probability of an unrounded state is off by as much as published clip ranges.

    Raises:
        ValueError: fewer than two times, or a number of generators that is not the batch size.
    """
    if len(times) < 2:
        raise ValueError(f"expected at least two times to walk between, got {len(times)}")
    if generators is not None and len(generators) != len(x):
        raise ValueError(f"expected one generator per sample ({len(x)}), got {len(generators)}")
    states, log_probs = [x], []
    for index, (t, s) in enumerate(itertools.pairwise(times)):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index in grad_steps):
            now, then = t.expand(len(x)), s.expand(len(x))
            law = _law(step, x, now, then, checkpoint and torch.is_grad_enabled())
            noise = noises[:, index] if noises is not None else None
            x = law.sample(noise if generators is None else draw(x.shape[1:], generators, x))
            x = x if store is None else x.to(store).to(law.mean.dtype)
        if record:
            states.append(x)
            log_probs.append(law.log_prob(x))
    if not record:
        return Trajectory(x)
    return Trajectory(x, torch.stack(states, 1), times, torch.stack(log_probs, 1))


def draw(shape: Sequence[int], generators: Generators, like: Tensor | None = None) -> Tensor:
    """Standard normal [len(generators), *shape], each row from its own generator, so none depends on the batch."""
    rows = [torch.randn(tuple(shape), generator=g, device=g.device) for g in generators]
    noise = torch.stack(rows)
    return noise if like is None else noise.to(like.device, like.dtype)


def _law(step: Stepper, x: Tensor, t: Tensor, s: Tensor, checkpoint: bool) -> Gaussian:
    if not checkpoint:
        return step(x, t, s)
    mean, std = recompute(lambda *a: (lambda law: (law.mean, law.std))(step(*a)), x, t, s, use_reentrant=False)
    return Gaussian(mean, std)
