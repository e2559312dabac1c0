from __future__ import annotations

import numpy as np
import pytest

from diffalign.statistics import bootstrap_mean, mean_gain, pass_rate, win_rate, wins

Z2 = 3.8414588  # the square of the normal quantile of 97.5 %


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_bootstrap_of_a_normal_sample_is_the_textbook_interval():
    values = rng(1).normal(3, 2, 400)
    interval = bootstrap_mean(values, rng())
    half = 1.96 * values.std() / 20
    assert interval.estimate == values.mean()
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_follows_the_seed_and_nothing_else():
    values = rng(2).normal(size=50)
    assert bootstrap_mean(values, rng(5)) == bootstrap_mean(values.tolist(), rng(5))
    assert bootstrap_mean(values, rng(5)) != bootstrap_mean(values, rng(6))


def test_bootstrap_of_many_values_is_drawn_in_chunks():
    values = rng(3).normal(size=5000)  # 10,000 resamples would be 50 million indices at once
    interval = bootstrap_mean(values, rng())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(5000), rel=0.05)


def test_a_wider_level_is_a_wider_interval():
    values = rng(4).normal(size=100)
    narrow, wide = (bootstrap_mean(values, rng(), level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high


def test_one_value_has_no_interval_and_equal_values_have_none_to_spare():
    single = bootstrap_mean([2.5], rng())
    assert single.estimate == 2.5
    assert np.isnan([single.low, single.high]).all()
    assert bootstrap_mean([2.5] * 4, rng()) == bootstrap_mean([2.5, 2.5], rng())


def test_the_interval_of_a_gain_holds_the_truth_as_often_as_it_says():
    true_gain, hits = 0.3, 0
    for seed in range(300):
        g = rng(seed)
        shared = g.normal(size=60)  # what prompt and seed give both: it must cancel
        base, aligned = shared + g.normal(0, 0.5, 60), shared + true_gain + g.normal(0, 0.5, 60)
        interval = mean_gain(base, aligned, rng(seed), resamples=1000)
        hits += interval.low <= true_gain <= interval.high
    assert 0.91 <= hits / 300 <= 0.98


def test_pairing_makes_the_interval_narrow():
    g = rng(7)
    shared = g.normal(0, 5, 100)
    base, aligned = shared + g.normal(0, 0.1, 100), shared + 1 + g.normal(0, 0.1, 100)
    paired = mean_gain(base, aligned, rng())
    assert paired.high - paired.low < 0.1
    assert mean_gain(base, rng(8).permutation(aligned), rng()).low < 0.5
    assert paired.estimate == pytest.approx(1, abs=0.05)


def test_a_tie_is_half_a_win():
    assert wins([1, 1, 1], [2, 1, 0]).tolist() == [1, 0.5, 0]
    interval = win_rate([1, 1, 1, 1], [2, 2, 1, 0], rng())
    assert interval.estimate == pytest.approx(0.625)
    assert 0 <= interval.low < 0.625 < interval.high <= 1
    assert win_rate([0] * 9, [0] * 9, rng()).low == 0.5


@pytest.mark.parametrize(
    ("passes", "total", "low", "high"),
    # closed forms: 0 of n is [0, z^2 / (n + z^2)], n of n its mirror image; half of n is 1/2 -+ z / (2 sqrt(n + z^2))
    [
        (0, 20, 0.0, Z2 / (20 + Z2)),
        (20, 20, 1 - Z2 / (20 + Z2), 1.0),
        (1, 1, 1 / (1 + Z2), 1.0),
        (5, 10, 0.5 - 0.5 * (Z2 / (10 + Z2)) ** 0.5, 0.5 + 0.5 * (Z2 / (10 + Z2)) ** 0.5),
    ],
)
def test_pass_rate_is_wilsons(passes, total, low, high):
    interval = pass_rate([1] * passes + [0] * (total - passes))
    assert interval.estimate == passes / total
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_wilson_bounds_solve_their_equation():
    # |p - P| = z sqrt(P (1 - P) / n) at both ends
    interval = pass_rate([True] * 37 + [False] * 90)
    for bound in (interval.low, interval.high):
        z = abs(37 / 127 - bound) / np.sqrt(bound * (1 - bound) / 127)
        assert z == pytest.approx(1.959964, abs=1e-6)


def test_wilson_holds_the_truth_even_where_passes_are_rare():
    hits = 0
    for seed in range(400):
        interval = pass_rate(rng(seed).random(40) < 0.05)
        hits += interval.low <= 0.05 <= interval.high
    assert 0.92 <= hits / 400 <= 0.99


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0, 2.0]], 3.0])
def test_values_that_are_no_list_of_numbers_are_refused(values):
    with pytest.raises(ValueError, match="at least one finite number"):
        bootstrap_mean(values, rng())
    with pytest.raises(ValueError, match="at least one finite number"):
        pass_rate(values)


def test_other_misuse_is_named():
    with pytest.raises(ValueError, match="2 values of one and 1 of the other"):
        mean_gain([1, 2], [1], rng())
    with pytest.raises(ValueError, match="1 and 0"):
        pass_rate([0, 0.5])
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_mean([1, 2], rng(), level=95)
