"""From what rewards say of a prompt's pictures to how much each is to be learned from, in fp64 and without gradient.

Scores are [P, G], G pictures of P prompts; a picture without a score (not finite) takes no part and gets 0. Where all
pictures of a prompt have one score, each gets exactly 0, since rounding must not make a preference; in `batch`, which
compares across prompts, where all that were drawn have one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]  # [n, ...] of this rank -> [m, ...] of all ranks
LEAST = 1e-6  # a standard deviation below this is none


def in_group(scores: Tensor, gather: Gather) -> Tensor:
    """(r - mean) / std, both over the prompt's own pictures (DanceGRPO, MixGRPO)."""
    known = scores.isfinite()
    centred = centre(scores, gather)
    std = (centred.square().sum(1) / known.sum(1).clamp(min=1)).sqrt()
    return torch.where((std > LEAST)[:, None], centred / std.clamp(min=LEAST)[:, None], torch.zeros_like(centred))


def global_std(scores: Tensor, gather: Gather) -> Tensor:
    """(r - mean of the prompt) / std over everything that was drawn (Flow-GRPO, DiffusionNFT)."""
    std = _known(scores, gather).std(correction=0)
    return centre(scores, gather) / std if std > LEAST else torch.zeros_like(scores)


def over_batch(scores: Tensor, gather: Gather) -> Tensor:
    """(r - mean) / std, both over everything that was drawn (DDPO without a history of prompts)."""
    everything = _known(scores, gather)
    std = everything.std(correction=0)
    if not std > LEAST:
        return torch.zeros_like(scores)
    return torch.where(scores.isfinite(), (scores - everything.mean()) / std, torch.zeros_like(scores))


def centre(scores: Tensor, gather: Gather) -> Tensor:
    """r - mean of the prompt, in the reward's own unit (PRDP's linear regime)."""
    known = scores.isfinite()
    filled = torch.where(known, scores, torch.zeros_like(scores))
    mean = filled.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    same = torch.where(known, scores, torch.full_like(scores, -torch.inf)).amax(1, keepdim=True) == torch.where(
        known, scores, torch.full_like(scores, torch.inf)
    ).amin(1, keepdim=True)
    return torch.where(known & ~same, filled - mean, torch.zeros_like(scores))


ADVANTAGES: dict[str, Callable[[Tensor, Gather], Tensor]] = {
    "group": in_group,
    "global": global_std,
    "batch": over_batch,
    "centre": centre,
}


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float], kind: str, gather: Gather) -> Tensor:
    """The advantage of sum_k w_k r_k: weights carry the scales of the rewards."""
    return ADVANTAGES[kind](_total(terms, weights), gather)


def per_reward(terms: Mapping[str, Tensor], weights: Mapping[str, float], kind: str, gather: Gather) -> Tensor:
    """sum_k w_k A_k: each reward brought to its own scale first (MixGRPO, Pref-GRPO)."""
    known = torch.isfinite(_total(terms, weights))
    parts = [weights[name] * ADVANTAGES[kind](term, gather) for name, term in terms.items() if weights[name]]
    return torch.where(known, torch.stack(parts).sum(0), torch.zeros_like(parts[0]))


def normalized(terms: Mapping[str, Tensor], weights: Mapping[str, float], kind: str, gather: Gather) -> Tensor:
    """`per_reward`, then over the whole batch once more, so that uniform groups do not shrink the gradient (GDPO)."""
    advantages = per_reward(terms, weights, kind, gather)
    missing = ~torch.isfinite(_total(terms, weights))
    std = _known(advantages.masked_fill(missing, torch.nan), gather).std(correction=0)
    return advantages / std if std > LEAST else torch.zeros_like(advantages)


def pareto(terms: Mapping[str, Tensor], weights: Mapping[str, float], kind: str, gather: Gather) -> Tensor:
    """`per_reward` of the pictures that no other one of all that were drawn beats in every reward, 0 for the others.

    After Parrot (arXiv 2401.05675), without its prompt tokens of each reward. Selects little in small batches: of 24
    pictures under three independent rewards a third is not beaten.
    """
    counted = [name for name in terms if weights[name]]
    own = torch.stack([terms[name].flatten() * _sign(weights[name]) for name in counted], 1)
    unbeaten = ~dominated(own, gather(own)).view_as(terms[counted[0]])
    return torch.where(unbeaten, per_reward(terms, weights, kind, gather), torch.zeros_like(unbeaten, dtype=own.dtype))


COMBINATIONS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, float], str, Gather], Tensor]] = {
    "sum": weighted_sum,
    "per_reward": per_reward,
    "gdpo": normalized,
    "pareto": pareto,
}


def dominated(scores: Tensor, others: Tensor) -> Tensor:
    """[n]: whether one of others [m, K] is at least as good as scores [n, K] in every reward, and better in one.

    Equal pictures do not dominate each other; one that lacks a score dominates nobody and counts as dominated.
    """
    theirs = others[:, None]
    beaten = ((theirs >= scores).all(2) & (theirs > scores).any(2)).any(0)
    return beaten | ~scores.isfinite().all(1)


def _known(scores: Tensor, gather: Gather) -> Tensor:
    """[n] of all ranks; where nothing has a score, two equal ones that are none."""
    everything = gather(scores.flatten())
    found = everything[everything.isfinite()]
    return found if len(found) else torch.zeros_like(everything[:2])


def _total(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    counted = [weights[name] * term for name, term in terms.items() if weights[name]]
    return torch.stack(counted).sum(0)


def _sign(weight: float) -> float:
    return 1.0 if weight > 0 else -1.0
