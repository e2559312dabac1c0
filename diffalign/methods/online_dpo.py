"""Online DPO: Diffusion-DPO on pictures that the policy draws and a reward ranks (Flow-DPO's online form in flow_grpo).

Of every prompt a group of pictures is drawn; the best is the winner, the worst the loser, by the run's `rewards`:

    L = softplus(-h),   h = -(beta / 2) [(m_w - r_w) - (m_l - r_l)]

The reference is refreshed every so many steps (`reference: {name: sync}`), since the pictures move on with the policy.

Deviations from the released code (yifan123/flow_grpo, train_sd3_dpo.py), each on purpose:
- a group in which all rewards are equal has no gradient; there it makes a pair of pictures 0 and 1;
- every picture is the last latent of its own walk; the revision at hand keeps those of the last sample;
- pictures are drawn by the policy (`drawn_by: reference` for the released way, which lags up to one refresh);
- walks are deterministic and differ by their starting noise alone; `eta` adds noise on the way;
- several noisings of a pair (`reuse`) make one optimizer step, and not one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.losses import sigmoid
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, noise_together, reference_of, with_members
from diffalign.methods.checks import check_choice, check_group, check_positive, check_times
from diffalign.methods.pairs import pair_errors, pair_loss
from diffalign.rollouts import Sampler, repeated, roll_out


@dataclass(frozen=True)
class OnlineDPO:
    """Best against worst of a group that the policy draws, by the run's rewards.

    Args:
        beta: the leash, as in DPO.
        group: pictures per prompt, at least 2.
        drawn_by: policy | reference.
        steps, guidance, eta, at_once: how pictures are drawn, see `diffalign.rollouts.Sampler`.
        reuse: noisings of a pair per optimizer step.
        timestep_weight: native | eps | x0 | sigmoid | snr_clip, multiplied with d.
        time_low, time_high: the part of the noise axis to train on, 0 clean and 1 pure noise.

    Prompts are not dropped unless the config says so: a picture of the empty prompt would be judged by its prompt.

    Metrics, beside DPO's: `reward` (mean of the group), `reward_gap` (best less worst), `skipped` (no gap, no loss).

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROMPTS, Need.REWARD, Need.REFERENCE})
    view: ClassVar[str] = "prompts"

    beta: float = 2000.0
    group: int = 8
    drawn_by: str = "policy"
    steps: int = 40
    guidance: float = 4.5
    eta: float = 0.0
    at_once: int = 8
    reuse: int = 1
    timestep_weight: str = "native"
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta, reuse=self.reuse)
        check_group(self.group)
        check_choice("drawn_by", self.drawn_by, ("policy", "reference"))
        check_times(self.time_low, self.time_high, self.timestep_weight)
        self._sampler()

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        conditions = (repeated(batch.conditions[0], self.group), repeated(batch.negative, self.group))
        policy = run.policy if self.drawn_by == "policy" else reference_of(run)
        drawn = roll_out(run, policy, *conditions, batch.shape, self._sampler()).x
        prompts = [prompt for prompt in batch.prompts for _ in range(self.group)]
        scores = run.score(drawn, prompts).result().total.float().view(-1, self.group)
        pair, aux = best_and_worst(drawn.view(-1, self.group, *drawn.shape[1:]), scores)
        pairs, times = with_members(batch, *pair), (self.time_low, self.time_high)
        return [noise_together(run, pairs, times, aux=aux) for _ in range(self.reuse)]

    def loss(self, run: Run, batch: Noised) -> Loss:
        rho_w, rho_l, m, r = pair_errors(run, batch, self.beta, self.timestep_weight)
        value = (1 - batch.aux["skipped"]) * sigmoid(rho_w, rho_l)
        return pair_loss(run, batch, value, rho_w - rho_l, m, r, **batch.aux)

    def _sampler(self) -> Sampler:
        return Sampler(self.steps, self.guidance, self.eta, self.at_once)


def best_and_worst(latents: Tensor, scores: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """((best, worst), each [B, ...], and {"reward", "reward_gap", "skipped"}, each [B]) of groups [B, n, ...].

    A score that is missing (not finite) takes no part. Where fewer than two different ones are left there is no pair:
    skipped is 1, and best and worst are one picture.
    """
    known = scores.isfinite()
    high, low = (scores.masked_fill(~known, end) for end in (-torch.inf, torch.inf))
    best, worst = high.argmax(1), low.argmin(1)
    rows = torch.arange(len(scores), device=scores.device)
    skipped = ~(high[rows, best] > low[rows, worst]) | (known.sum(1) < 2)
    worst = torch.where(skipped, best, worst)
    gap = torch.where(skipped, 0.0, high[rows, best] - low[rows, worst])
    mean = torch.where(known, scores, 0.0).sum(1) / known.sum(1).clamp(min=1)
    return (latents[rows, best], latents[rows, worst]), {
        "reward": mean, "reward_gap": gap, "skipped": skipped.float(),
    }  # fmt: skip
