"""One number out of several rewards, or out of one reward's numbers for several pictures: pure functions of scores.

A plain weighted sum is `diffalign.rewards.base.Weighted`. Here a group is the pictures of one prompt; `groups` [B]
holds an integer per picture that is the same within a group. Standard deviations are of the population, without
Bessel's correction. A picture whose score is not finite takes no part and gets 0. `diffalign.advantages` does the
sums, for training too.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.advantages import LEAST, dominated, global_std, in_group, normalized, per_reward

# ReNO (arXiv 2406.04312, arguments.py and rewards/*.py of its code): reward -> (weight, offset)
RENO = {
    "hpsv2.1": (5.0, 1.0),
    "imagereward": (1.0, 2.0),
    "clip": (0.01, 100.0),
    "pickscore": (0.05, 30.0),
    "aesthetic": (0.0, 10.0),
}


def standardized(scores: Tensor) -> Tensor:
    """(r - mean) / std, [B]; zeros where all scores are the same."""
    return _standardized(scores.float(), scores.float().mean(), scores.float().std(correction=0))


def within_groups(scores: Tensor, groups: Tensor) -> Tensor:
    """Each score standardized among the pictures of its prompt (GRPO, arXiv 2402.03300); [B].

    Scores of different prompts then compare, whatever the reward. A group of one, or one whose scores are all the same,
    gets zeros and not noise that is blown up.
    """
    table, places = _by_group(scores, groups)
    return in_group(table, _alone)[places]


def around_group_mean(scores: Tensor, groups: Tensor) -> Tensor:
    """(r - mean of its group) / std of the batch (Flow-GRPO, arXiv 2505.05470): a narrow group is not blown up."""
    table, places = _by_group(scores, groups)
    return global_std(table, _alone)[places]


def weighted_advantages(
    scores: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, *, rescaled: bool = False
) -> Tensor:
    """sum_k w_k z_k, z_k the scores of reward k standardized within groups; [B] (Pref-GRPO, arXiv 2508.20751).

    Free of the rewards' scales, where a weighted sum of raw scores lets one reward decide without a word.

    Args:
        rescaled: standardizes the sum over the batch again (GDPO), which keeps the scale when groups become uniform.

    Raises:
        ValueError: weights for other rewards than there are scores, or no weight but 0.
    """
    if scores.keys() != weights.keys():
        raise ValueError(f"expected one weight per reward, got weights for {', '.join(weights) or 'none'} and scores "
                         f"of {', '.join(scores) or 'none'}")  # fmt: skip
    if not any(weights.values()):
        raise ValueError("expected a weight other than 0")
    tables, places = {name: _by_group(score, groups)[0] for name, score in scores.items()}, _places(groups)
    return (normalized if rescaled else per_reward)(tables, weights, "group", _alone)[places]


def shortfall(scores: Mapping[str, Tensor], presets: Mapping[str, tuple[float, float]] = RENO) -> Tensor:
    """sum_k w_k (offset_k - r_k), [B], with gradient: ReNO's loss, lower is better, of the rewards that there are.

    An offset is a score that is hardly reached, so that the loss stays above 0; it does not change the gradient, which
    is that of the weighted sum. One of weight 0 is left out, as in `Weighted`. ReNO's CLIP is a ViT-H/14 and 100 cos.

    Args:
        scores: by name, each [B] and in the unit that this project's reward has.
        presets: name -> (weight, offset).

    Raises:
        ValueError: no score, or one without a preset.
    """
    if not scores or (unknown := sorted(scores.keys() - presets.keys())):
        got = "no score" if not scores else f"scores of {', '.join(unknown)}"
        raise ValueError(f"expected scores of some of {', '.join(presets)}, got {got}; give presets of your own")
    chosen = {name: presets[name] for name in scores}
    terms = [weight * (offset - scores[name].float()) for name, (weight, offset) in chosen.items() if weight]
    return torch.stack(terms).sum(0) if terms else torch.zeros_like(next(iter(scores.values())).float())


@final
class RunningStatistics:
    """Mean and deviation per prompt over its latest scores (DDPO, arXiv 2305.13301, stat_tracking.py).

    Of use where a prompt comes back often; with many prompts that are seen a few times each, group the batch instead.

    Args:
        size: scores that are kept per prompt.
        least: a prompt with fewer of them is measured by the whole batch.

    Raises:
        ValueError: not 1 <= least <= size.
    """

    def __init__(self, size: int = 32, least: int = 16) -> None:
        if not 1 <= least <= size:
            raise ValueError(f"expected 1 <= least <= size, got {least} and {size}")
        self.least = least
        self.kept: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=size))

    def __call__(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """Takes the scores [B] in, then standardizes each with what its prompt has by now; [B]."""
        for prompt, score in zip(prompts, scores.tolist(), strict=True):
            self.kept[prompt].append(score)
        batch = scores.float()
        pools = [self.kept[prompt] for prompt in prompts]
        known = [batch.new_tensor(list(pool)) if len(pool) >= self.least else batch for pool in pools]
        mean, std = (
            torch.stack(values) for values in ([k.mean() for k in known], [k.std(correction=0) for k in known])
        )
        return _standardized(batch, mean, std)


def log_sigmoid_centered(scores: Tensor, references: Tensor) -> Tensor:
    """sum_k log sigmoid(r_k - ref_k), [B] of scores and references [K, B], with gradient (arXiv 2402.00742).

    The log-probability that a picture is good in every respect, if each reward is a Bradley-Terry score and
    `references` are scores that are just good enough: `reference_quantile` of the base model's pictures of the same
    prompt. What is good already gains next to nothing, so no reward is pushed on for its own sake.
    """
    return F.logsigmoid(scores - references).sum(0)


def reference_quantile(scores: Tensor, quantile: float = 0.85) -> Tensor:
    """[...] of base scores [..., N]: the score that a share `quantile` of them does not exceed, interpolated.

    0.85 is what is reported of the paper; it is not verified.

    Raises:
        ValueError: a quantile outside [0, 1].
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile: expected a number in [0, 1], got {quantile}")
    return scores.float().quantile(quantile, dim=-1)


def non_dominated(scores: Tensor) -> Tensor:
    """bool [B] of scores [K, B]: pictures that no other one equals everywhere and beats somewhere (Parrot, 2401.05675).

    It only selects in large pools: of 24 pictures and 4 independent rewards half are not dominated, of 256 a sixth. A
    picture that lacks a score is not among them.
    """
    return ~dominated(scores.T, scores.T)


def uncertainty_weighted(loss: Tensor, uncertainty: Tensor) -> Tensor:
    """L exp(-U) + U, [B]: a loss counts less where the reward is not sure of itself (Ctrl-U, arXiv 2410.11236).

    Args:
        loss: [B], of a reward.
        uncertainty: [B], at least 0: how much the reward's loss differs between two predictions of one picture, at
            times t and t + 1 there.
    """
    return loss * torch.exp(-uncertainty) + uncertainty


def group_statistics(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of the group of each score, both [B], fp32.

    Raises:
        ValueError: shapes that differ.
    """
    _check_groups(scores, groups)
    _, index = groups.unique(return_inverse=True)
    count = torch.bincount(index).float()
    mean = (torch.zeros_like(count).index_add(0, index, scores.float()) / count)[index]
    variance = (torch.zeros_like(count).index_add(0, index, (scores.float() - mean).square()) / count)[index]
    return mean, variance.sqrt()


def agreement(scores: Mapping[str, Tensor], groups: Tensor) -> dict[str, float]:
    """What to log beside several rewards: spread, uniform groups, and how two of them agree within groups.

    Returns:
        `NAME/group_std`, `NAME/uniform` (share of pictures in groups that say nothing), and `A~B`, the correlation of
        the standardized scores (0 where one of them is uniform everywhere); below 0 the two rewards are in conflict.
    """
    found: dict[str, float] = {}
    inside = {name: within_groups(score, groups) for name, score in scores.items()}
    for name, score in scores.items():
        _, std = group_statistics(score, groups)
        found[f"{name}/group_std"], found[f"{name}/uniform"] = std.mean().item(), (std < LEAST).float().mean().item()
    names = list(scores)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            a, b = inside[first], inside[second]
            norm = (a.norm() * b.norm()).item()
            found[f"{first}~{second}"] = (a @ b).item() / norm if norm else 0.0
    return found


def _by_group(scores: Tensor, groups: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(fp32 scores [P, G] with NaN where a group has fewer than G, where each of [B] is in it)."""
    _check_groups(scores, groups)
    places = _places(groups)
    table = torch.full([int(place.max()) + 1 for place in places], torch.nan, device=scores.device)
    return table.index_put(places, scores.float()), places


def _places(groups: Tensor) -> tuple[Tensor, Tensor]:
    """(number of its group, number within it) of each of [B]."""
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    order = index.argsort(stable=True)
    first = (counts.cumsum(0) - counts)[index[order]]
    within = torch.empty_like(index)
    within[order] = torch.arange(len(index), device=index.device) - first
    return index, within


def _check_groups(scores: Tensor, groups: Tensor) -> None:
    if scores.ndim != 1 or scores.shape != groups.shape or not len(scores):
        raise ValueError(f"expected scores [B] and groups [B], B at least 1, got {list(scores.shape)} and "
                         f"{list(groups.shape)}")  # fmt: skip


def _alone(scores: Tensor) -> Tensor:
    """One process has everything."""
    return scores


def _standardized(scores: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return torch.where(std < LEAST, torch.zeros_like(scores), (scores - mean) / std.clamp(min=LEAST))
