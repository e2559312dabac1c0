"""What two sets of scores amount to: win rates, mean differences, and how far rewards agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from diffalign.comparing.match import Match, Meeting
from diffalign.scoring.files import ScoreRow
from diffalign.statistics import Interval, bootstrap_mean, wins

Values = NDArray[np.float64]
NOBODY = Interval(math.nan, math.nan, math.nan)
FEWEST = 3  # pictures of which a rank correlation is given


@dataclass(frozen=True)
class Verdict:
    """B against A by one reward. Numbers are means over prompts, of the means over the pairs of each.

    Attributes:
        win_rate: share of pairs in which B scores above A, a tie as half; with its interval over prompts.
        difference: B minus A, in the reward's unit; with its interval over prompts.
        mean_a, mean_b: of the same pairs.
        prompts, pairs: how many have scores on both sides.
        ties: pairs with equal scores.
        missing: pairs without a score on one side, which are left out.
    """

    win_rate: Interval
    difference: Interval
    mean_a: float
    mean_b: float
    prompts: int
    pairs: int
    ties: int
    missing: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON: intervals as *_ci95, as `diffalign evaluate` has them."""
        flat = {name: value for name, value in asdict(self).items() if not isinstance(value, dict)}
        for name, found in (("win_rate", self.win_rate), ("difference", self.difference)):
            flat |= {name: found.estimate, f"{name}_ci95": [found.low, found.high]}
        return flat


def prompt_scores(name: str, meeting: Meeting, a: Sequence[ScoreRow], b: Sequence[ScoreRow]) -> tuple[Values, Values]:
    """Scores ([P], [P]) of A and B of the pairs of one prompt that both have one."""
    found = [(a[i].scores[name], b[j].scores[name]) for i, j in meeting.pairs]
    table = np.array([pair for pair in found if not any(map(math.isnan, pair))], np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def judge(name: str, match: Match, a: Sequence[ScoreRow], b: Sequence[ScoreRow], seed: int = 0) -> Verdict:
    """B against A by one reward. Intervals are bootstrapped over prompts: the pairs of one are not independent."""
    scores = [prompt_scores(name, meeting, a, b) for meeting in match.meetings]
    there = [(first, second) for first, second in scores if len(first)]
    pairs = sum(len(first) for first, _ in there)
    missing = sum(len(meeting.pairs) for meeting in match.meetings) - pairs
    if not there:
        return Verdict(NOBODY, NOBODY, math.nan, math.nan, 0, 0, 0, missing)
    won = [float(wins(first, second).mean()) for first, second in there]
    means = np.array([(first.mean(), second.mean()) for first, second in there])
    return Verdict(
        win_rate=bootstrap_mean(won, np.random.default_rng(seed)),
        difference=bootstrap_mean(means[:, 1] - means[:, 0], np.random.default_rng(seed)),
        mean_a=float(means[:, 0].mean()),
        mean_b=float(means[:, 1].mean()),
        prompts=len(there),
        pairs=pairs,
        ties=sum(int((first == second).sum()) for first, second in there),
        missing=missing,
    )


def correlations(names: Sequence[str], rows: Sequence[ScoreRow], within: bool = False) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation of every two rewards over the pictures that both score: name -> name -> rho.

    NaN where fewer than `FEWEST` pictures have both, or where one reward gives all of them one score.

    Args:
        within: of scores less their prompt's mean. Over all pictures two rewards also agree on which prompts are easy,
            which says nothing of which picture of a prompt is the better one.
    """
    columns = {name: np.array([row.scores[name] for row in rows], np.float64) for name in names}
    if within:
        prompts = np.unique([row.prompt for row in rows], return_inverse=True)[1]
        columns = {name: _centered(column, prompts) for name, column in columns.items()}
    return {first: {second: _spearman(columns[first], columns[second]) for second in names} for first in names}


def _centered(scores: Values, groups: NDArray[np.intp]) -> Values:
    """Less the mean of the group, without the last digits: rounding would rank what is equal."""
    there = np.isfinite(scores)
    count = np.bincount(groups[there], minlength=groups.max() + 1)
    means = np.bincount(groups[there], scores[there], minlength=groups.max() + 1) / np.maximum(count, 1)
    largest = np.abs(scores[there]).max(initial=0.0) or 1.0
    centered: Values = (scores - means[groups]) / largest
    return centered.round(12)


def _spearman(first: Values, second: Values) -> float:
    both = np.isfinite(first) & np.isfinite(second)
    x, y = first[both], second[both]
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(spearmanr(x, y).statistic)


def flattened(table: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, float]]:
    """Every two different rewards once, in the order of the table."""
    names = list(table)
    return [(first, second, table[first][second]) for place, first in enumerate(names) for second in names[place + 1 :]]
