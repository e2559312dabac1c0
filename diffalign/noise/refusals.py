"""What cannot work is refused before the first picture, with what would."""

from __future__ import annotations

from diffalign.rewards import REWARDS
from diffalign.rewards.base import Weighted
from diffalign.table import resolve

OF_CLIPS = ("videoreward", "videoscore")
WITHOUT_GRADIENT = "best_of_n, zero_order, paths, fk, or dno with gradient='estimated'"


def refuse_black_boxes(method: str, rewards: Weighted) -> None:
    """Raises ValueError for a method that differentiates and a reward that cannot be; weights of 0 do not count."""
    weights = rewards.weights
    black = [name for name, reward in rewards.rewards.items() if weights[name] and not reward.card.differentiable]
    if black or not any(weights.values()):
        got = f"{', '.join(black)} has none" if black else "all weights are 0"
        known = ", ".join(with_gradient())
        raise ValueError(f"method {method!r} follows the rewards' gradient, and {got}: take rewards among {known}, or "
                         f"a method that asks for scores alone: {WITHOUT_GRADIENT}")  # fmt: skip


def with_gradient() -> list[str]:
    """Rewards of pictures in the table that have a gradient."""
    pictures = [name for name in REWARDS if name not in OF_CLIPS]
    return [name for name in pictures if resolve(REWARDS, name, "reward").card.differentiable]
