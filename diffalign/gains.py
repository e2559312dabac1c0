"""The numbers of an evaluation: means, gains and win rates of every reward, each with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.prompts import Prompt
from diffalign.statistics import Interval, bootstrap_mean, mean_gain, pass_rate, wins

Scores = dict[str, list[float]]  # reward -> one score per picture
Matrix = NDArray[np.float64]  # [prompts, seeds]


def summary(sides: Mapping[str, Scores], prompts: Sequence[Prompt], seeds: int, seed: int) -> dict[str, Any]:
    """`rewards` over all prompts and, where prompts have one, `per_category`.

    Args:
        sides: "base" and, where there is one, "aligned": reward -> one score per draw, NaN for none.
        prompts: one per draw; those of the seeds of one prompt follow each other.
        seeds: draws per prompt.
        seed: of every interval's generator.
    """
    of_prompt = np.array([prompt.category for prompt in prompts[::seeds]], dtype=object)
    matrices = {
        side: {name: np.array(values).reshape(-1, seeds) for name, values in scores.items()}
        for side, scores in sides.items()
    }
    categories = sorted({category for category in of_prompt if category is not None})
    summary: dict[str, Any] = {"rewards": _rows(matrices, np.full(len(of_prompt), True), seed)}
    summary["per_category"] = {
        category: {"prompts": int((chosen := of_prompt == category).sum()), "rewards": _rows(matrices, chosen, seed)}
        for category in categories
    }
    return summary


def _rows(sides: Mapping[str, Mapping[str, Matrix]], chosen: NDArray[np.bool_], seed: int) -> dict[str, dict[str, Any]]:
    aligned = sides.get("aligned")
    return {
        name: _row(base[chosen], None if aligned is None else aligned[name][chosen], seed)
        for name, base in sides["base"].items()
    }


def _row(base: Matrix, aligned: Matrix | None, seed: int) -> dict[str, Any]:
    """Numbers of one reward. Every interval has a generator of its own, so none depends on which others are asked.

    A prompt with a missing score on either side, which a judge may leave, counts in neither; `missing` says how many.
    """
    sides = [base] if aligned is None else [base, aligned]
    whole = np.isfinite(np.stack(sides)).all(axis=(0, 2))
    missing = {"missing": int((~whole).sum())}
    if not whole.any():
        names = ("base",) if aligned is None else ("base", "aligned", "gain", "win_rate")
        return missing | {key: value for name in names for key, value in ((name, None), (f"{name}_ci95", [None, None]))}
    base, aligned = base[whole], None if aligned is None else aligned[whole]
    intervals = {"base": _mean(base, seed)}
    if aligned is not None:
        rng = np.random.default_rng
        won = wins(base.ravel(), aligned.ravel()).reshape(base.shape)
        intervals["aligned"] = _mean(aligned, seed)
        intervals["gain"] = mean_gain(base.mean(1), aligned.mean(1), rng(seed))
        intervals["win_rate"] = bootstrap_mean(won.mean(1), rng(seed))
    row: dict[str, Any] = {**missing}
    for name, interval in intervals.items():
        row[name] = interval.estimate
        row[f"{name}_ci95"] = [None if math.isnan(bound) else bound for bound in (interval.low, interval.high)]
    return row


def _mean(scores: Matrix, seed: int) -> Interval:
    """Over prompts; of passes and failures with one seed each, Wilson's interval."""
    if scores.shape[1] == 1 and np.isin(scores, (0, 1)).all():
        return pass_rate(scores[:, 0])
    return bootstrap_mean(scores.mean(1), np.random.default_rng(seed))
