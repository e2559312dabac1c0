"""What methods share that draw pictures, are paid for them, and replay their steps: advantages and what is logged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.advantages import COMBINATIONS
from diffalign.episodes import Episodes, Explorer, every_step, explore, log_probs_of, share
from diffalign.methods.base import Batch, Noised, Run, reference_of
from diffalign.scores import Scores


def advantages_of(run: Run, scores: Scores, group: int, kind: str, combination: str, largest: float) -> Tensor:
    """[R] of R scores, `group` of each prompt: a row of ADVANTAGES under a row of COMBINATIONS, cut to +-largest."""
    terms = {name: term.double().view(-1, group) for name, term in scores.terms.items()}
    found = COMBINATIONS[combination](terms, scores.weights, kind, run.gather)
    return found.flatten().clamp(-largest, largest).float()


def draw_and_replay(
    run: Run, batch: Batch, how: Explorer, updates: int, worth: Callable[[Scores], dict[str, Tensor]]
) -> Sequence[Noised]:
    """All steps of this update's share of a rollout that `updates` updates learn from.

    `worth` is what the loss is told of each picture: name -> [R].
    """

    def draw() -> tuple[Episodes, dict[str, Tensor]]:
        episodes = explore(run, run.policy, batch, how)
        return episodes, worth(episodes.scores) | seen(episodes.scores, how.group)

    rows = share(len(batch.prompts) * how.group, updates, run.step % updates)
    episodes, aux = run.held(updates, draw)
    return every_step(episodes, rows, how, aux)


def seen(scores: Scores, group: int) -> dict[str, Tensor]:
    """What is logged of a rollout, each [R]: rewards, missing ones, whether a prompt's pictures all got the same."""
    total = scores.total
    known = total.isfinite()
    compared = group if group > 1 else len(total)  # single pictures are compared across prompts
    grouped = torch.where(known, total, torch.nan).view(-1, compared)
    spread = grouped.nan_to_num(nan=-torch.inf).amax(1) - grouped.nan_to_num(nan=torch.inf).amin(1)
    mean = torch.where(known, total, torch.zeros_like(total)).sum() / known.sum().clamp(min=1)
    shown = {"reward": torch.where(known, total, mean), "missing": (~known).float(),
             "same": (~(spread > 0)).float().repeat_interleave(compared)}  # fmt: skip
    if len(scores.terms) > 1:
        shown |= {f"reward_{name}": torch.where(t.isfinite(), t, t.nanmean()) for name, t in scores.terms.items()}
    return shown


def logged(batch: Noised) -> dict[str, Tensor]:
    """Those of `seen`, out of a microbatch."""
    return {name: value for name, value in batch.aux.items() if name.split("_")[0] in ("reward", "missing", "same")}


def with_reference(run: Run, episodes: Episodes, how: Explorer) -> Episodes:
    """The same walks with the reference's log-probabilities, which are the policy's own while the two are the same."""
    if run.same:
        return episodes
    return replace(episodes, log_probs=log_probs_of(run, reference_of(run), episodes, how))
