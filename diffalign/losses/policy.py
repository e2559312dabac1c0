"""Losses of policies that are paid for what they draw: pure functions of log-probabilities, advantages and rewards.

lp is a step's log-probability, a mean over the elements of a latent; old is the policy that drew, ref the reference.
Advantages and rewards have no gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def clipped_ratio(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """[B]: max(-A r, -A clamp(r, 1 - c, 1 + c)), r = exp(lp - old): PPO, as DDPO (arXiv 2305.13301) and GRPO have it.

    The gradient is zero where r has left the band on the side that A asks for, and only there.
    """
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def clamped_ratio(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """[B]: -A clamp(r, 1 - c, 1 + c), as DPOK (arXiv 2305.16381) was released: no gradient outside the band at all."""
    return -advantage * log_ratio.exp().clamp(1 - clip, 1 + clip)


def step_preferences(log_ratio: Tensor, scores: Tensor, beta: float, clip: float) -> tuple[Tensor, Tensor]:
    """(sum of the losses of all pairs, their number), each [P], of P prompts at one step: D3PO (arXiv 2311.13231).

        softplus(-beta (q_w - q_l)),   q = clamp(lp - ref, log(1 - c), log(1 + c))

    Args:
        log_ratio: lp - ref [P, G] of G pictures.
        scores: [P, G]; equal ones are no pair, and a picture without one (not finite) has none.
    """
    q = log_ratio.clamp(math.log(1 - clip), math.log(1 + clip))
    pairs = scores[:, :, None] > scores[:, None, :]
    each = F.softplus(-beta * (q[:, :, None] - q[:, None, :]))
    return (each * pairs).sum((1, 2)), pairs.sum((1, 2))


def pairs_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(winners, losers): places in scores.flatten() of all pairs of `scores` [P, G] that are no tie."""
    prompt, better, worse = (scores[:, :, None] > scores[:, None, :]).nonzero(as_tuple=True)
    start = prompt * scores.shape[1]
    return start + better, start + worse


def reward_differences(
    log_ratio: Tensor, old: Tensor, rewards: Tensor, beta: float, clip: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """(L [P], number of pairs [P]) of P prompts: PRDP (arXiv 2402.08714), all pairs of a prompt with another reward.

        L = mean over pairs of max( (R_a - R_b - D)^2 , (C_a - C_b - D)^2 ),   D = (r_a - r_b) / beta

    Args:
        log_ratio: [P, G, N] lp - ref of every step of G pictures.
        old: the same of the policy that drew; C is R with each step clamped to old +- clip.
        rewards: [P, G]; a picture without one (not finite) takes no part.
        reduction: mean | sum of the steps.
    """
    clamped = torch.minimum(torch.maximum(log_ratio, old - clip), old + clip)
    whole, held = (x.mean(-1) if reduction == "mean" else x.sum(-1) for x in (log_ratio, clamped))
    gap = rewards[:, :, None] - rewards[:, None, :]
    pairs = gap > 0  # false where one is not a number
    aim = torch.where(pairs, gap, torch.zeros_like(gap)) / beta
    miss, held_miss = (x[:, :, None] - x[:, None, :] - aim for x in (whole, held))
    each = torch.maximum(miss.square(), held_miss.square())
    count = pairs.sum((1, 2))
    return (each * pairs).sum((1, 2)) / count.clamp(min=1), count


def centred_differences(log_ratio: Tensor, rewards: Tensor, beta: float, reduction: str) -> tuple[Tensor, Tensor]:
    """(L [P], number of pairs [P]): the mean over all pairs of a prompt without a clamp, in O(G) and not in O(G^2).

        L = 2 / (G - 1) sum_i (u_i - mean u)^2,   u = R - r / beta

    Pairs of equal rewards are in it, unlike those of `reward_differences`, whose arguments these are.
    """
    whole = log_ratio.mean(-1) if reduction == "mean" else log_ratio.sum(-1)
    known = rewards.isfinite()
    count = known.sum(1)
    u = torch.where(known, whole - rewards / beta, torch.zeros_like(whole))
    off = torch.where(known, u - u.sum(1, keepdim=True) / count.clamp(min=1)[:, None], torch.zeros_like(u))
    return 2 * off.square().sum(1) / (count - 1).clamp(min=1), count * (count - 1) // 2


def forward_process(ours: Tensor, old: Tensor, x0: Tensor, optimality: Tensor, beta: float) -> Tensor:
    """[B]: r L+ / b + (1 - r) L- / b: DiffusionNFT (arXiv 2509.16117), written for predictions of x0.

        x+ = b x + (1 - b) x_old,   x- = (1 + b) x_old - b x,   L = mean (x - x0)^2 / its own mean |x - x0|, detached

    The paper mixes velocities; x0 is linear in them, so on a rectified flow this is the same, and it is as good for any
    other parametrization.

    Args:
        ours, old: x0 as policy and the policy that drew predict it, [B, ...].
        optimality: r [B] in [0, 1].
        beta: b.
    """
    plus, minus = beta * ours + (1 - beta) * old, (1 + beta) * old - beta * ours
    good, bad = (_self_normalized(x - x0) for x in (plus, minus))
    return (optimality * good + (1 - optimality) * bad) / beta


def _self_normalized(residual: Tensor) -> Tensor:
    size = residual.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return residual.square().flatten(1).mean(1) / size
