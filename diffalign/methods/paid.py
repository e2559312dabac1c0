"""What methods share that draw pictures, are paid for them, and replay their steps: advantages and what is logged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from diffalign.advantages import COMBINATIONS, in_group
from diffalign.episodes import Episodes, Explorer, every_step, explore, log_probs_of, share
from diffalign.groups import Group
from diffalign.methods.base import Batch, Noised, Run, reference_of
from diffalign.scores import Scores

SHOWN = ("reward", "missing", "same", "agree")  # how the names of what `seen` logs begin


def advantages_of(run: Run, scores: Scores, group: Group, kind: str, combination: str, largest: float) -> Tensor:
    """[R] of R scores: a row of ADVANTAGES under a row of COMBINATIONS, cut to +-largest."""
    terms = {name: group.whole(run, term.double()) for name, term in scores.terms.items()}
    found = COMBINATIONS[combination](terms, scores.weights, kind, group.gather(run))
    return group.own(run, found).clamp(-largest, largest).float()


def draw_and_replay(
    run: Run, batch: Batch, how: Explorer, updates: int, worth: Callable[[Scores], dict[str, Tensor]]
) -> Sequence[Noised]:
    """All steps of this update's share of a rollout that `updates` updates learn from.

    `worth` is what the loss is told of each picture: name -> [R].
    """
    group = how.groups
    how = replace(how, group=group.here(run))

    def draw() -> tuple[Episodes, dict[str, Tensor]]:
        episodes = explore(run, run.policy, batch, how)
        return episodes, worth(episodes.scores) | seen(run, episodes.scores, group)

    rows = share(len(batch.prompts) * how.group, updates, run.step % updates)
    episodes, aux = run.held(updates, draw)
    return every_step(episodes, rows, how, aux)


def seen(run: Run, scores: Scores, group: Group) -> dict[str, Tensor]:
    """What is logged of a rollout, each [R]: rewards, missing ones, whether a prompt's pictures all got the same."""
    total = scores.total
    known = total.isfinite()
    compared = group if group.size > 1 else Group(len(total))  # single pictures are compared across prompts
    grouped = compared.whole(run, torch.where(known, total, torch.nan))
    spread = grouped.nan_to_num(nan=-torch.inf).amax(1) - grouped.nan_to_num(nan=torch.inf).amin(1)
    same = (~(spread > 0)).float().repeat_interleave(compared.here(run))
    mean = torch.where(known, total, torch.zeros_like(total)).sum() / known.sum().clamp(min=1)
    shown = {"reward": torch.where(known, total, mean), "missing": (~known).float(), "same": same}
    if len(scores.terms) > 1:
        shown |= {f"reward_{name}": torch.where(t.isfinite(), t, t.nanmean()) for name, t in scores.terms.items()}
        shown |= agreement(run, scores, group)
    return shown


def agreement(run: Run, scores: Scores, group: Group) -> dict[str, Tensor]:
    """Of each two rewards, [R] whose mean is their correlation within groups: below 0 they are in conflict.

    A group in which one of them says nothing counts as 0.
    """
    inside = {name: in_group(group.whole(run, term.double()), run.gather) for name, term in scores.terms.items()}
    return {f"agree_{a}_{b}": group.own(run, inside[a] * inside[b]).float() for a, b in combinations(inside, 2)}


def logged(batch: Noised) -> dict[str, Tensor]:
    """Those of `seen`, out of a microbatch."""
    return {name: value for name, value in batch.aux.items() if name.split("_")[0] in SHOWN}


def with_reference(run: Run, episodes: Episodes, how: Explorer) -> Episodes:
    """The same walks with the reference's log-probabilities, which are the policy's own while the two are the same."""
    if run.same:
        return episodes
    return replace(episodes, log_probs=log_probs_of(run, reference_of(run), episodes, how))
