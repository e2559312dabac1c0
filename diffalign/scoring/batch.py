"""One batch of a manifest: how batches are cut, pictures opened, and scores given with the reasons of what is missing.

Every engine runs `score_batch`, so that scores do not depend on the engine.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign.answers import Unreached
from diffalign.manifests import Entry
from diffalign.rewards.base import Explains, Weighted
from diffalign.rewards.clips import Shown, together
from diffalign.rewards.preprocess import check_depth

NO_REASON = "the reward gives no reason"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one picture.

    Attributes:
        scores: one per reward, in the order of `Weighted.rewards`; NaN where `missing` says why. None if broken.
        missing: reward -> why it has no score.
        broken: why the picture was skipped: it cannot be opened, or a reward refuses it.
        refused: whether it was a reward, and not the file.
    """

    scores: tuple[float, ...] | None
    missing: dict[str, str] = field(default_factory=dict)
    broken: str = ""
    refused: bool = False


def batches(prompts: Sequence[str], size: int, whole_groups: bool) -> list[list[int]]:
    """Indices of prompts in batches of up to `size`.

    With `whole_groups`, which a reward that compares needs (`Card.compares`), all that share a prompt are in one batch,
    and a group larger than `size` is a batch of its own; prompts stay in the order of their first pictures.

    >>> batches(["a", "b", "a", "c"], 2, False)
    [[0, 1], [2, 3]]
    >>> batches(["a", "b", "a", "c"], 2, True)
    [[0, 2], [1, 3]]

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {size}")
    if not whole_groups:
        return [list(range(start, min(start + size, len(prompts)))) for start in range(0, len(prompts), size)]
    groups: dict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[prompt].append(index)
    packed: list[list[int]] = []
    for group in groups.values():
        if packed and len(packed[-1]) + len(group) <= size:
            packed[-1] += group
        else:
            packed.append(list(group))
    return packed


def opened(entry: Entry) -> Shown | str:
    """The picture or clip, or why it cannot be scored."""
    try:
        if entry.clip:
            return torch.from_numpy(entry.frames()).permute(0, 3, 1, 2).contiguous()
        picture = entry.open()
        check_depth(picture)
    except ValueError as error:
        return str(error)
    return picture


def score_batch(
    rewards: Weighted, entries: Sequence[Entry], pictures: Sequence[Shown | str] | None = None
) -> list[Outcome]:
    """One outcome per entry. A picture that is broken, or that a reward refuses, takes no other one with it.

    Args:
        pictures: what `opened` gave for the entries, if that has been done.

    Raises:
        Unreached: a judge that nobody can ask.
        RuntimeError: from the device, such as too little memory.
    """
    found = [opened(entry) for entry in entries] if pictures is None else pictures
    outcomes = [Outcome(None, broken=picture) if isinstance(picture, str) else None for picture in found]
    alike: dict[torch.Size | None, list[tuple[int, Shown]]] = defaultdict(list)  # what one tensor, or list, can hold
    for index, picture in enumerate(found):
        if not isinstance(picture, str):
            alike[picture.shape if isinstance(picture, Tensor) else None].append((index, picture))
    if rewards.card.compares and len(alike) > 1:
        got = " and ".join("pictures" if size is None else f"clips {list(size)}" for size in alike)
        raise ValueError(f"rewards that compare need clips of one size and length, or pictures alone, got {got}")
    for whole in alike.values():
        prompts = [entries[index].prompt for index, _ in whole]
        for (index, _), outcome in zip(whole, _scored(rewards, [p for _, p in whole], prompts), strict=True):
            outcomes[index] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


def _scored(rewards: Weighted, pictures: Sequence[Shown], prompts: Sequence[str]) -> list[Outcome]:
    try:
        with torch.no_grad():
            rewards(together(pictures), prompts)
    except Unreached:
        raise
    except ValueError as error:
        return _one_by_one(rewards, pictures, prompts, error)
    terms = {name: term.tolist() for name, term in rewards.terms.items()}
    reasons = {name: list(r.reasons) if isinstance(r, Explains) else [] for name, r in rewards.rewards.items()}
    return [_outcome({n: term[i] for n, term in terms.items()}, {n: r[i] for n, r in reasons.items() if r})
            for i in range(len(prompts))]  # fmt: skip


def _one_by_one(
    rewards: Weighted, pictures: Sequence[Shown], prompts: Sequence[str], error: ValueError
) -> list[Outcome]:
    """A reward refuses something in the batch: each picture alone (each group, if rewards compare) finds out what."""
    units = batches(prompts, 1, rewards.card.compares)
    if len(units) == 1:
        return [Outcome(None, broken=str(error), refused=True) for _ in prompts]
    outcomes: dict[int, Outcome] = {}
    for unit in units:
        scored = _scored(rewards, [pictures[index] for index in unit], [prompts[index] for index in unit])
        outcomes |= dict(zip(unit, scored, strict=True))
    return [outcomes[index] for index in range(len(prompts))]


def _outcome(scores: dict[str, float], reasons: dict[str, str]) -> Outcome:
    missing = {name: reasons.get(name) or NO_REASON for name, score in scores.items() if not math.isfinite(score)}
    return Outcome(tuple(math.nan if name in missing else score for name, score in scores.items()), missing)
