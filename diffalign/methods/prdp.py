"""PRDP: Deng et al. 2024, Proximal Reward Difference Prediction for Large-Scale Reward Finetuning, arXiv 2402.08714.

    L = mean over pairs of a prompt of max( (R_a - R_b - D)^2 , (C_a - C_b - D)^2 ),   D = (r_a - r_b) / beta
    R = mean over steps of lp - lp_ref,   C the same with every step clamped to what it was at the rollout, +- c

The optimum of the KL-regularized problem has these differences, so they are regressed on, over whole trajectories. No
code was released. Without the clamp this is the variance of R - r / beta among a prompt's pictures, times 2: `form`.

The gradient is exact with the memory of one step: L depends on the policy through the numbers lp alone, so a first pass
without gradient gives dL/dlp of every step, and a second one multiplies them with the gradient of lp, a microbatch at a
time. The first update on a rollout has its numbers from the rollout. Steps with a weight of exactly 0 are left out.

Choices where the paper is silent:
- lp is a mean over the latent's elements: beta and the clip make sense for that alone. `reduction` of the steps is the
  mean of its appendix; its text has the sum;
- all pictures of a rollout are in every update on it;
- the last step is deterministic.

With the paper's betas D is in the thousands and lp in the hundredths: the loss is then linear, its gradient that of
REINFORCE with the prompt's mean as baseline, and beta no more than a scale. The pull back to the reference begins where
beta R is as large as r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.episodes import Episodes, Explorer, every_step, explore, log_probs_of
from diffalign.losses.policy import centred_differences, reward_differences
from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.checks import check_choice, check_group, check_positive
from diffalign.methods.paid import logged, seen, with_reference


@dataclass(frozen=True)
class PRDP:
    """Regression of log-ratios of whole walks on differences of rewards.

    Args:
        beta: r / beta is what a walk's log-ratio should come to; the paper has 3e-6 to 3e-5.
        clip: c, per step; the paper has 1e-6 for ten updates on a rollout and 1e-4 for one. Of the form `pairs` alone.
        form: pairs is the paper's, of pairs whose rewards differ; centred has no clamp, holds pictures of equal rewards
            together as well, and asks for no list of pairs, which pays in large groups.
        reduction: mean | sum of the steps.
        updates: optimizer steps on one rollout, K.
        steps, guidance, dynamics, noise_level, group, same_start, window, window_start, at_once, store: how pictures
            are drawn, see `diffalign.episodes.Explorer`.

    Metrics: `reward`, `missing`, `same` as in `ddpo`; `pairs` of a prompt; `unused`, the share of steps whose weight is
    exactly 0.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROMPTS, Need.REWARD, Need.REFERENCE})
    view: ClassVar[str] = "prompts"

    beta: float = 3e-6
    clip: float = 1e-4
    form: str = "pairs"
    reduction: str = "mean"
    updates: int = 1
    steps: int = 50
    guidance: float = 5.0
    dynamics: str = "auto"
    noise_level: float | None = None
    group: int = 8
    same_start: bool = False
    window: int = 0
    window_start: int | None = None
    at_once: int = 8
    store: str = "float32"

    def __post_init__(self) -> None:
        check_positive(beta=self.beta, clip=self.clip, updates=self.updates)
        check_choice("form", self.form, ("pairs", "centred"))
        check_choice("reduction", self.reduction, ("mean", "sum"))
        check_group(self.group)
        _ = self.explorer  # checks its own

    @property
    def explorer(self) -> Explorer:
        return Explorer.of(self)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        how = self.explorer

        def draw() -> tuple[Episodes, Tensor]:
            episodes = explore(run, run.policy, batch, how)
            return episodes, with_reference(run, episodes, how).log_probs

        episodes, reference = run.held(self.updates, draw)
        fresh = run.step % self.updates == 0
        now = episodes.log_probs if fresh else log_probs_of(run, run.policy, episodes, how)
        value, slope, pairs = self.value_and_slope(now, episodes.log_probs, reference, episodes.scores.total)
        unused = (slope == 0).float().mean(1)
        aux = seen(run, episodes.scores, how.groups) | {"loss": value, "pairs": pairs, "unused": unused}
        steps = every_step(episodes, slice(0, len(now)), how, aux)
        return self._weighed(steps, slope, keep_all=run.together)

    @torch.enable_grad()
    def value_and_slope(
        self, now: Tensor, old: Tensor, reference: Tensor, rewards: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(L of a picture's prompt [R], dL/dlp [R, W] of the mean over prompts, pairs of its prompt [R])."""
        leaf = now.detach().requires_grad_()
        shape = (-1, self.group, now.shape[1])
        ours, before = ((lp - reference).view(shape) for lp in (leaf, old))
        grouped = rewards.view(-1, self.group)
        if self.form == "centred":
            value, pairs = centred_differences(ours, grouped, self.beta, self.reduction)
        else:
            value, pairs = reward_differences(ours, before, grouped, self.beta, self.clip, self.reduction)
        (slope,) = torch.autograd.grad(value.mean(), leaf)
        loss, count = (x.detach().float().repeat_interleave(self.group) for x in (value, pairs))
        return loss, slope, count

    def _weighed(self, steps: list[Noised], slope: Tensor, keep_all: bool) -> list[Noised]:
        """Microbatches with the weights of their steps, without those in which all are 0 unless ranks must agree.

        A mean over rows and microbatches follows, so weights are multiplied with how many there are of both.
        """
        width, start, weighed = slope.shape[1], 0, []
        for place, step in enumerate(steps):
            rows, k = slice(start, start + len(step.t)), place % width
            start = rows.stop if k == width - 1 else start
            weight = slope[rows, k]
            if keep_all or weight.any():
                weighed.append((step, weight * len(weight)))
        if not weighed:  # nothing to learn, and a step has to be made
            weighed = [(steps[0], torch.zeros_like(steps[0].t))]
        return [replace(step, aux=step.aux | {"slope": len(weighed) * weight}) for step, weight in weighed]

    def loss(self, run: Run, batch: Noised) -> Loss:
        """L itself as the value, and one step's part of its gradient."""
        lp = self.explorer.law(run, run.policy, batch).log_prob(batch.y)
        value = batch.aux["loss"] + batch.aux["slope"] * (lp - lp.detach())
        shown = {name: batch.aux[name] for name in ("pairs", "unused")} | logged(batch)
        return Loss(value, run.process.fraction(batch.t), shown)
