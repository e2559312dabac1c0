"""How sure a number is: bootstrap intervals of means, gains and win rates, Wilson's interval of a pass rate.

The unit that is resampled is one value: a prompt, or a (prompt, seed) draw. Values that belong together, such as
several seeds of one prompt, are averaged first, or the interval is too narrow.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
LEVEL = 0.95

_CHUNK = 4_000_000  # indices drawn at once: 32 MB

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate between `low` and `high`; both are NaN where one value says nothing about its spread."""

    estimate: float
    low: float
    high: float


def bootstrap_mean(
    values: ArrayLike, generator: np.random.Generator, *, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """The mean of values [N] with its percentile bootstrap interval (Efron 1979).

    Raises:
        ValueError: not a list of finite numbers, no value, or a level outside (0, 1).
    """
    checked = _finite(values)
    _check_level(level)
    estimate = float(checked.mean())
    if len(checked) == 1:
        return Interval(estimate, float("nan"), float("nan"))
    means = _resampled_means(checked, generator, resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


def mean_gain(
    base: ArrayLike,
    aligned: ArrayLike,
    generator: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """mean(aligned - base) with its paired bootstrap interval: base[i] and aligned[i] share prompt and seed.

    Raises:
        ValueError: as `bootstrap_mean`, or counts that differ.
    """
    first, second = _paired(base, aligned)
    return bootstrap_mean(second - first, generator, resamples=resamples, level=level)


def win_rate(
    base: ArrayLike,
    aligned: ArrayLike,
    generator: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Share of pairs in which aligned scores above base, a tie as half, with its bootstrap interval.

    Raises:
        ValueError: as `mean_gain`.
    """
    return bootstrap_mean(wins(base, aligned), generator, resamples=resamples, level=level)


def wins(base: ArrayLike, aligned: ArrayLike) -> Values:
    """[N]: 1 where aligned scores above base, 0 where below, 0.5 where they tie.

    Raises:
        ValueError: counts that differ, no value, or values that are not finite.
    """
    first, second = _paired(base, aligned)
    return (1 + np.sign(second - first)) / 2


def pass_rate(passed: ArrayLike, *, level: float = LEVEL) -> Interval:
    """Share of passes (ones among ones and zeros [N]) with Wilson's score interval (Wilson 1927).

    Unlike the bootstrap it is right for few values and does not vanish when all pass: 0 of 20 is [0, 0.16].

    Raises:
        ValueError: values other than 0 and 1, no value, or a level outside (0, 1).
    """
    checked = _finite(passed)
    _check_level(level)
    if not np.isin(checked, (0, 1)).all():
        raise ValueError("expected passes and failures, 1 and 0, got other numbers")
    n, p = len(checked), float(checked.mean())
    z = NormalDist().inv_cdf((1 + level) / 2)
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * float(np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)))
    return Interval(p, max(0.0, center - half), min(1.0, center + half))


def _resampled_means(values: Values, generator: np.random.Generator, resamples: int) -> Values:
    rows = max(1, _CHUNK // len(values))
    parts = []
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), len(values))
        parts.append(values[generator.integers(0, len(values), shape)].mean(axis=1))
    return np.concatenate(parts)


def _paired(base: ArrayLike, aligned: ArrayLike) -> tuple[Values, Values]:
    first, second = _finite(base), _finite(aligned)
    if len(first) != len(second):
        raise ValueError(f"expected pairs, got {len(first)} values of one and {len(second)} of the other")
    return first, second


def _finite(values: ArrayLike) -> Values:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"expected a list of at least one finite number, got shape {list(array.shape)}: {array!r:.200}"
        )
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, such as 0.95, got {level}")
