"""Search over paths: Ma et al. 2025, Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps,
arXiv 2501.09732.

A few paths walk down to a noise level. Each is then spread: noise takes it some steps back up, several times, and the
walk brings each copy further down again. Copies are scored by the picture in which their walk ends, the best ones of a
prompt are the next paths, and so on at lower and lower levels. The walk itself is deterministic.

There is no official code. The picture is that of the walk's end, not of the prediction on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.methods.checks import check_positive
from diffalign.noise.fk import of_each, worst_for_missing
from diffalign.noise.objective import Objective
from diffalign.noise.seen import Seen
from diffalign.process import per_sample
from diffalign.sampling import sample


@dataclass(frozen=True)
class Paths:
    """Any rewards will do; the model must walk several steps.

    Args:
        kept: paths of a prompt that go on after a round, and start.
        copies: of each path in a round.
        rounds: how often paths are spread.
        start: share of the walk after which they are spread first; the rounds' places lie evenly from there to the end.
        back: steps up again, each time.

    Raises:
        ValueError: a value outside its range.
    """

    kept: int = 2
    copies: int = 4
    rounds: int = 3
    start: float = 0.3
    back: int = 2

    def __post_init__(self) -> None:
        check_positive("optimize_noise", kept=self.kept, copies=self.copies, rounds=self.rounds, back=self.back)
        if not 0 < self.start < 1:
            raise ValueError(f"optimize_noise.start: expected a share of the walk between 0 and 1, got {self.start}")

    def check(self, objective: Objective) -> None:
        """Raises ValueError for a walk without room for the rounds."""
        if len(set(self._places(objective.steps))) < self.rounds:
            raise ValueError(f"method 'paths' spreads {self.rounds} times between the steps of a walk, and this one "
                             f"has {objective.steps}: take more sampling_steps or fewer rounds")  # fmt: skip

    def search(self, objective: Objective, noise: Tensor) -> Iterator[Seen]:
        prompts, kept = len(noise), self.kept
        starts = torch.stack([noise, *(objective.fresh() for _ in range(kept - 1))], 1).flatten(0, 1)
        x, place = starts, 0
        for spot in self._places(objective.steps):
            owners = [prompt for prompt in range(prompts) for _ in range(kept)]
            x = self._walked(objective, x, owners, place, spot)
            place = max(0, spot - self.back)
            # rows lie prompt by prompt, path by path, copy by copy
            draws = torch.stack([objective.fresh(kept) for _ in range(self.copies)], 2).flatten(0, 2)
            x, starts = (value.repeat_interleave(self.copies, 0) for value in (x, starts))
            x = noised_again(objective, x, draws, spot, place)
            owners = [prompt for prompt in range(prompts) for _ in range(kept * self.copies)]
            seen = objective.decoded(starts, self._walked(objective, x, owners, place, objective.steps), owners, True)
            yield from of_each(seen, kept * self.copies)
            total = worst_for_missing(seen.scores.total.view(prompts, -1))
            kept = min(self.kept, total.shape[1])
            best = total.topk(kept).indices + total.shape[1] * torch.arange(prompts, device=total.device)[:, None]
            x, starts = x[best.flatten()], starts[best.flatten()]

    def _places(self, steps: int) -> list[int]:
        first = max(1, round(self.start * steps))
        return [first + (steps - first) * number // self.rounds for number in range(self.rounds)]

    def _walked(self, objective: Objective, x: Tensor, owners: list[int], start: int, stop: int) -> Tensor:
        """From one place of the walk to another."""
        if start == stop:
            return x
        times = objective.times[start : stop + 1]
        with torch.no_grad():
            return torch.cat([sample(objective.stepper(some), x[rows], times).x
                              for rows, some in objective.parts(len(x), owners)])  # fmt: skip


def noised_again(objective: Objective, x: Tensor, draws: Tensor, now: int, back: int) -> Tensor:
    """x at one place of the walk with as much noise more as there is at an earlier one:

    x_t = (alpha_t / alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) n
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (objective.process.coefficients(objective.times[k].expand(len(x)))
                                              for k in (now, back))  # fmt: skip
    ratio = alpha_t / alpha_s
    added = (sigma_t.square() - (ratio * sigma_s).square()).clamp(min=0).sqrt()
    return per_sample(ratio, x) * x + per_sample(added, x) * draws
