"""DiffusionNFT: Zheng et al. 2025, Online Diffusion Reinforcement with Forward Process, arXiv 2509.16117.

    L = w [ r L+ / b + (1 - r) L- / b ] + w_kl mean (y - y_base)^2,   at x_t noised afresh from what was drawn

    x+ = b x + (1 - b) x_old,   x- = (1 + b) x_old - b x,   L+- = mean (x+- - x0)^2 / its own mean |.|, detached
    r  = clamp(A / (2 A_max) + 1/2, 0, 1)

x, x_old: x0 as policy and reference predict it. The reference is the policy that draws, and follows the policy slowly
(`reference: {name: ema}`); no log-probabilities, so any sampler will do, and none of guidance in training.

Deviations from the released code (NVlabs/DiffusionNFT):
- walks are DDIM, which on a rectified flow is Euler, where theirs are DPM-Solver's of second order;
- x0 is mixed and not the velocity, which is the same on a rectified flow, so that other models can be trained as well;
- advantages are cut at A_max and mapped to [0, 1] in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.advantages import ADVANTAGES, COMBINATIONS
from diffalign.episodes import slices
from diffalign.groups import Group
from diffalign.losses import squared_error
from diffalign.losses.policy import forward_process
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, noised_at, reference_of
from diffalign.methods.checks import check_choice, check_group, check_not_negative, check_positive
from diffalign.methods.paid import advantages_of, logged, seen
from diffalign.process import endpoints, moved
from diffalign.rollouts import Sampler, repeated, roll_out
from diffalign.scores import joined


@dataclass(frozen=True)
class NFT:
    """The forward process towards pictures that score well and away from those that do not.

    Args:
        beta: b: 1, or 0.1 for several rewards.
        weight: w.
        kl_weight: w_kl; 0 needs no base model.
        largest: A_max.
        advantage: global | group | batch | centre.
        combine: sum | per_reward | gdpo | pareto, of several rewards.
        times: of the walk's times, how many each picture is trained at; 0 is all.
        steps, guidance, at_once: how pictures are drawn, see `diffalign.rollouts.Sampler`.
        group: pictures per prompt.
        spread: each of several ranks draws a share of every prompt's pictures, see `diffalign.groups.Group`.

    Metrics: `reward`, `missing`, `same` as in `ddpo`, `optimality` r, `kl`.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROMPTS, Need.REWARD, Need.REFERENCE, Need.BASE})
    view: ClassVar[str] = "prompts"

    beta: float = 1.0
    weight: float = 5.0
    kl_weight: float = 1e-4
    largest: float = 5.0
    advantage: str = "global"
    combine: str = "sum"
    times: int = 0
    steps: int = 10
    guidance: float = 1.0
    group: int = 24
    at_once: int = 8
    spread: bool = False

    def __post_init__(self) -> None:
        check_positive(beta=self.beta, weight=self.weight, largest=self.largest)
        check_not_negative(kl_weight=self.kl_weight, times=self.times)
        check_choice("advantage", self.advantage, ADVANTAGES)
        check_choice("combine", self.combine, COMBINATIONS)
        check_group(self.group)
        self._sampler()

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        group = Group(self.group, self.spread)
        here = group.here(run)
        condition, negative = (repeated(c, here) for c in (batch.conditions[0], batch.negative))
        prompts = [prompt for prompt in batch.prompts for _ in range(here)]
        noise, drawn, answers = torch.randn(len(prompts), *batch.shape, generator=run.generator), [], []
        for rows in slices(0, len(prompts), here * max(1, self.at_once // here)):  # whole prompts, as rewards see them
            told, away = ({name: value[rows] for name, value in c.items()} for c in (condition, negative))
            walk = roll_out(run, reference_of(run), told, away, batch.shape, self._sampler(), noise=noise[rows])
            drawn.append(walk.x)
            answers.append(run.score(walk.x, prompts[rows]))  # while the next are drawn
        x0, scores = torch.cat(drawn), joined([answer.result() for answer in answers])
        found = advantages_of(run, scores, group, self.advantage, self.combine, self.largest)
        aux = seen(run, scores, group) | {"optimality": found / (2 * self.largest) + 0.5, "x0": x0}
        return [part for rows in slices(0, len(x0), self.at_once) for part in self._noised(run, rows, condition, aux)]

    def _noised(self, run: Run, rows: slice, condition: dict[str, Tensor], aux: dict[str, Tensor]) -> list[Noised]:
        """Some pictures at times of the walk, in an order of their own, each with fresh noise."""
        aux = {name: value[rows] for name, value in aux.items()}
        x0, grid = aux["x0"], run.times(self.steps)[:-1]
        order = torch.rand(len(x0), len(grid), generator=run.generator).argsort(1)[:, : self.times or None]
        label, told = torch.ones(len(x0), device=x0.device), {name: value[rows] for name, value in condition.items()}
        made = []
        for k in range(order.shape[1]):
            t = moved(grid.cpu()[order[:, k]], x0.device)
            eps = moved(torch.randn(x0.shape, generator=run.generator), x0.device)
            made.append(noised_at(run, [x0], [told], label, t, [eps], aux))
        return made

    def loss(self, run: Run, batch: Noised) -> Loss:
        ours, x0 = run.policy(batch.x_t, batch.t, batch.condition), batch.aux["x0"]
        with torch.no_grad():
            old = reference_of(run)(batch.x_t, batch.t, batch.condition)
        at = run.process.coefficients(batch.t)
        mine, theirs = (endpoints(run.parametrization, y, batch.x_t, *at).x0 for y in (ours, old))
        value = self.weight * forward_process(mine, theirs, x0, batch.aux["optimality"], self.beta)
        kl = self._kl(run, ours, batch) if self.kl_weight else torch.zeros_like(value)
        known = batch.aux["missing"] == 0
        metrics = {"optimality": batch.aux["optimality"], "kl": kl.detach()} | logged(batch)
        return Loss(known * (value + self.kl_weight * kl), run.process.fraction(batch.t), metrics)

    def _kl(self, run: Run, ours: Tensor, batch: Noised) -> Tensor:
        assert run.base is not None
        with torch.no_grad():
            return_to = run.base(batch.x_t, batch.t, batch.condition)
        return squared_error(ours, return_to)

    def _sampler(self) -> Sampler:
        return Sampler(self.steps, self.guidance, at_once=self.at_once)
