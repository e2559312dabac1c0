"""What `diffalign rewards` lists: the cards of all rewards, without loading any weights."""

from __future__ import annotations

import math
from dataclasses import asdict

from diffalign.console import Result
from diffalign.rewards import REWARDS
from diffalign.table import resolve


def list_rewards() -> Result:
    """The rows of the table of rewards."""
    classes = {name: resolve(REWARDS, name, "reward") for name in sorted(REWARDS)}
    data = {
        name: {
            "class": REWARDS[name],
            **asdict(kind.card),
            "range": [bound if math.isfinite(bound) else None for bound in kind.card.range],
            "about": _first_line(kind),
        }
        for name, kind in classes.items()
    }
    rows = [
        (
            name,
            kind.card.unit,
            "yes" if kind.card.differentiable else "no",
            str(kind.card.side or ""),
            "yes" if kind.card.across_prompts else "no",
            kind.card.checked,
            kind.card.weights,
        )
        for name, kind in classes.items()
    ]
    header = ("reward", "unit", "gradient", "side", "across prompts", "checked against", "licence of the weights")
    return Result(data, header=header, rows=rows)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]
