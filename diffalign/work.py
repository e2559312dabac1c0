"""How often a method looks at pictures: passes of the network over one example of each method, by its keywords."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffalign.methods.base import Need
from diffalign.table import split_section

PICTURES = {"pairs": 2, "captioned_pairs": 2, "perturbed": 2, "winners": 1, "thumbs": 1, "prompts": 2, "lists": 4}
# what a view has of one example, of lists as many as are usual; drawing and inverting pictures come on top


@dataclass(frozen=True)
class Work:
    """Of one example: pictures backpropagated at once and in all, and passes of one picture without gradient.

    Means over steps where steps differ. `most` is how many pictures are backpropagated at once whatever the batch.
    """

    at_once: float
    trained: float
    forwards: float
    most: float = math.inf


def _drawing(method: Any, more: int = 0) -> Work:
    """A pair, of which one picture (or a group, of which two stay) is drawn, and which is noised `reuse` times."""
    walk = method.steps * (1 if method.guidance == 1 else 2) * getattr(method, "group", 1)
    return Work(2, 2 * method.reuse, (2 + more) * method.reuse + walk)


def _inverting(method: Any, asked: int) -> Work:
    """A pair, each picture of which is walked half of the levels on average."""
    return Work(2, 2, 2 + asked * (method.steps + 1))


def _trajectories(method: Any) -> Work:
    """A pair of which both trajectories are walked, as at the first visit; later ones are spared that."""
    guidance = 1 if method.guidance == 1 else 2
    walks = 2 * method.steps * (1 + method.renoise)
    return Work(2, 2 * method.sampled * guidance, (2 * method.sampled + walks) * guidance)


def _branches(method: Any) -> int:
    """Pictures that the network sees of one under guidance."""
    return 1 if method.guidance == 1 else 2


def _replaying(
    method: Any, replays: float, reference: float = 0.0, every: bool = False, most: int | None = None
) -> Work:  # fmt: skip
    """A prompt whose group is drawn for `updates` steps, and then replayed.

    Args:
        replays: how often the policy sees a step of a picture with gradient in all of these steps together, and
        reference: without it.
        every: whether each of these steps looks at all pictures and not at a share of them.
        most: pictures at once; as many as the rollout's if not given.
    """
    branches, random = _branches(method), getattr(method, "window", 0) or method.steps - 1
    at_once = method.group / (1 if every else method.updates)
    passes = method.group * branches / method.updates
    return Work(at_once * branches, passes * random * replays, passes * (method.steps + random * reference),
                branches * (most or method.explorer.widest))  # fmt: skip


def _ranked(method: Any) -> Work:
    """D3PO; of the pairs of a group all, as if there were no ties."""
    group, at_once = method.group, method.at_once
    if method.mode == "shared":
        return _replaying(method, 1, reference=1, most=group * max(1, at_once // group))
    found = _replaying(method, group - 1, reference=1)
    return replace(found, at_once=found.at_once * (group - 1), most=2 * max(1, at_once // 2) * _branches(method))


def _regressed(method: Any) -> Work:
    """PRDP: every update learns from all pictures, and but for the first looks at them once more before."""
    return _replaying(method, method.updates, reference=1 + (method.updates - 1), every=True)


def _noising(method: Any) -> Work:
    """NFT: each picture at some of the walk's times, without guidance; the old policy sees it there, and the base."""
    times = method.group * min(method.times or method.steps, method.steps)
    seen = times * (2 if method.kl_weight else 1)
    return Work(method.group, times, method.group * method.steps * _branches(method) + seen, method.at_once)


def _steering(method: Any, walked: float, steered: float, parts: int = 1) -> Work:
    """A picture that is walked for `walked` steps; `steered` steps are then run again and differentiated.

    These are recomputed in the backward pass, whatever `gradient_checkpointing` says, so each is seen three times: on
    the walk, forward, and forward and backward. One of them is in memory at a time. A leash looks at the first state of
    each of `parts` stretches, by the reference too.
    """
    branches, leash = _branches(method), parts if method.kl_weight else 0
    at_once = branches + (1 if leash else 0)
    return Work(at_once, steered * branches + leash, (walked + steered) * branches + leash, at_once * method.at_once)


def _last_steps(method: Any) -> float:
    """Of AlignProp: how many steps are differentiated on average."""
    if method.truncation == "uniform":
        return float(method.steps / 2)
    if not method.deviation:
        return float(method.steps - method.first(torch.Generator()))
    law = statistics.NormalDist(method.steps * method.mean, method.steps * method.deviation)
    shares = {m: law.cdf(m + 1) - law.cdf(m) for m in range(1, method.steps)}
    return method.steps - sum(m * share for m, share in shares.items()) / sum(shares.values())


# of methods that do not take each picture of their view once through policy and reference
WORK: dict[str, Callable[[Any], Work]] = {
    "rankdpo": lambda method: Work(1, 4, 8),  # a list of four, one picture at a time, each seen twice by the policy
    "kto": lambda method: Work(1, 1, 2),
    "tkto": lambda method: Work(2, 2, 4),
    "capo": lambda method: Work(2, 2, 2),  # the best and the worst of a list
    "seppo": _drawing,
    "spin": _drawing,
    "online_dpo": _drawing,
    "dro": lambda method: _drawing(method, more=1),  # the policy also says what its own walk's target is
    "inpo": lambda method: _inverting(method, asked=1 + method.renoise),
    "smpo": lambda method: _inverting(method, asked=2),  # ReNoise asks twice a step
    "inversion_dpo": _trajectories,
    "d3po": _ranked,
    "prdp": _regressed,
    "ddpo": lambda method: _replaying(method, 1),
    "dpok": lambda method: _replaying(method, 1, reference=1),
    "grpo": lambda method: _replaying(method, 1, reference=1 if method.kl_weight else 0),
    "pref_grpo": lambda method: _replaying(method, 1, reference=1 if method.kl_weight else 0),
    "nft": _noising,
    "alignprop": lambda method: _steering(method, method.steps, _last_steps(method)),
    "draft": lambda method: _steering(method, method.steps, method.last),
    "draft_lv": lambda method: _steering(method, method.steps + method.draws, method.draws, parts=method.draws),
    # the walk ends at one of the last `late` steps, with one more step from there to the picture
    "refl": lambda method: _steering(method, method.steps - (method.late - 1) / 2, 1),
    "drtune": lambda method: _steering(
        method, method.steps - (method.late - 1) / 2, method.trained, parts=method.trained
    ),
}


def work_of(name: str, method: Any) -> Work:
    """Of one example of a method; of one that is not in the table each picture goes through policy and reference."""
    if name in WORK:
        return WORK[name](method)
    pictures = PICTURES.get(split_section(method.view, "view")[0], 2)
    return Work(pictures, pictures, pictures if Need.REFERENCE in method.needs else 0)
