"""Pictures that a method draws while it trains: guided walks of a policy from fresh noise, as latents.

All noise comes from the run's own generator, so a resumed run draws the same pictures. Nothing here has a gradient or
looks at a picture; `Run.score` does the latter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.methods.base import Run
from diffalign.process import moved
from diffalign.sampling import Condition, Policy, Trajectory, ddim_stepper, guided, sample


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn: DDIM, which on a rectified flow is Euler.

    Args:
        steps: network times walked.
        guidance: scale of classifier-free guidance; 1 is none, and halves the network evaluations.
        eta: share of DDPM's noise in every step, in [0, 1]; above 0 every step has a log-probability.
        at_once: pictures in one call of the network, for memory; the noise does not depend on it.

    Raises:
        ValueError: a value outside its range; the message names it as a key of `method`.
    """

    steps: int = 50
    guidance: float = 7.5
    eta: float = 0.0
    at_once: int = 8

    def __post_init__(self) -> None:
        if self.steps < 1 or self.at_once < 1:
            raise ValueError(f"method.steps, at_once: expected at least 1, got {self.steps}, {self.at_once}")
        if not 0 <= self.guidance < math.inf or not 0 <= self.eta <= 1:
            raise ValueError(f"method.guidance, eta: expected a scale of at least 0 and an eta in [0, 1], got "
                             f"{self.guidance}, {self.eta}")  # fmt: skip


@torch.no_grad()
def roll_out(
    run: Run,
    policy: Policy,
    condition: Condition,
    negative: Condition,
    shape: Sequence[int],
    sampler: Sampler,
    *,
    times: Tensor | None = None,
    record: bool = False,
    noise: Tensor | None = None,
) -> Trajectory:
    """Walks of `policy` for the N rows of a condition, from noise [N, *shape], of `run.generator` if not given.

    Args:
        negative: of the empty prompt, N rows; not looked at where guidance is 1.
        times: [steps + 1] from noise to picture, or [steps + 1, N], each row its own; `run.times` if not given.
        record: keep states [N, steps + 1, *shape] and, where eta is above 0, log-probabilities [N, steps].
    """
    some = next(iter(condition.values()))
    count, device = len(some), some.device
    noise = moved(torch.randn(count, *shape, generator=run.generator) if noise is None else noise, device)
    seeds = torch.randint(2**62, (count,), generator=run.generator).tolist() if sampler.eta else []
    times = run.times(sampler.steps) if times is None else times
    parts = []
    for start in range(0, count, sampler.at_once):
        rows = slice(start, start + sampler.at_once)
        here, away = ({name: value[rows] for name, value in c.items()} for c in (condition, negative))
        step = ddim_stepper(guided(policy, away, sampler.guidance), run.process, run.parametrization, here, sampler.eta)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]] or None
        walked = moved(times if times.ndim == 1 else times[:, rows], device)
        parts.append(sample(step, noise[rows], walked, generators=generators, record=record))
    return Trajectory(
        torch.cat([part.x for part in parts]),
        _joined([part.states for part in parts]),
        times if record else None,
        _joined([part.log_probs for part in parts]),
    )


def jittered(times: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[N + 1, count] times of walks of their own: each time but the ends is drawn from it up to the one before.

    `times` [N + 1] from noise to picture. A walk of few steps then trains at all times, not at N of them.
    """
    start, inner, end = times[:1], times[1:-1], times[-1:]
    share = moved(torch.rand(len(inner), count, generator=generator), times.device)
    drawn = inner[:, None] + share * (times[:-2] - inner)[:, None]
    return torch.cat([start[:, None].expand(-1, count), drawn, end[:, None].expand(-1, count)])


def repeated(condition: Condition, count: int) -> Condition:
    """Every row `count` times, one below the other."""
    return {name: value.repeat_interleave(count, 0) for name, value in condition.items()}


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    return torch.cat([part for part in parts if part is not None]) if parts[0] is not None else None
