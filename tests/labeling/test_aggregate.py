"""What ranks the pictures of a prompt: numbers worked out by hand, and what every row of the table has to hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffalign.labeling.aggregate import AGGREGATES, NEED_POSITIVE, aggregate_wins, calibrated_win_rate, equal, total
from diffalign.table import resolve


def rows(*scores: list[float]) -> np.ndarray:
    return np.array(scores, np.float64)


def test_total_is_the_weighted_sum_and_takes_negative_weights():
    assert total(rows([1, 2, 3], [10, 0, 5]), np.array([2.0, -0.5]), np.zeros(2)).tolist() == [-3, 4, 3.5]


def test_aggregate_wins_are_those_of_rankdpo():
    """phi_i = wins over all rewards / (n (k - 1)), arXiv 2410.18013; counted by hand for n = 3 and k = 4."""
    scores = rows([4, 3, 2, 1], [2, 4, 3, 1], [1, 4, 3, 2])  # wins 3210, 1320, 0321
    assert aggregate_wins(scores, np.ones(3), np.zeros(3)) == pytest.approx([4 / 9, 8 / 9, 5 / 9, 1 / 9])
    one_mind = rows([9, 5, 4, 0], [0.4, 0.3, 0.2, 0.1])  # all agree: the phi of the paper's loss, whatever the units
    assert aggregate_wins(one_mind, np.ones(2), np.zeros(2)) == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_a_win_is_halved_between_pictures_within_the_margin_and_weights_weigh_rewards():
    scores = rows([3.0, 2.9, 0.0], [0, 1, 2])
    found = aggregate_wins(scores, np.array([3.0, 1.0]), np.array([0.5, 0.0]))
    # first reward: 1.5, 1.5, 0 wins of 2, three times; second: 0, 1, 2
    assert found == pytest.approx([4.5 / 8, 5.5 / 8, 2 / 8])


def test_calibrated_win_rates_are_those_of_capo():
    """R_ca(i) = mean over j of sigmoid(r_i - r_j), arXiv 2502.02588; for r = ln e that is e_i / (e_i + e_j)."""
    scores = np.log(rows([1, 2, 6]))
    one = calibrated_win_rate(scores, np.ones(1), np.zeros(1))
    assert one == pytest.approx([(1 / 3 + 1 / 7) / 2, (2 / 3 + 2 / 8) / 2, (6 / 7 + 6 / 8) / 2])
    both = calibrated_win_rate(np.log(rows([1, 2, 6], [1, 1, 1])), np.array([1.0, 3.0]), np.zeros(2))
    assert both == pytest.approx((one + 3 * 0.5) / 4)


def test_calibrated_win_rates_of_far_scores_are_counts_of_wins_without_overflow():
    with np.errstate(over="raise", invalid="raise"):
        found = calibrated_win_rate(rows([-5000, 0, 5000]), np.ones(1), np.zeros(1))
    assert found == pytest.approx([0, 0.5, 1])


def test_pictures_are_equal_when_every_reward_holds_them_for_equal():
    found = equal(rows([1.0, 1.1, 5.0], [3.0, 3.0, 3.0]), np.array([0.2, 0.0]))
    assert found.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize("name", AGGREGATES)
def test_every_aggregate_follows_the_pictures_and_never_puts_a_dominated_one_first(name: str):
    rng = np.random.default_rng(0)
    aggregate = resolve(AGGREGATES, name, "aggregate")
    weights, margins = np.array([1.0, 0.5, 2.0]), np.zeros(3)
    for _ in range(20):
        scores = rng.normal(size=(3, 6))
        scores[:, 0] = scores[:, 1] + 0.1  # the first is better than the second by every reward
        values = aggregate(scores, weights, margins)
        order = rng.permutation(6)
        assert aggregate(scores[:, order], weights, margins) == pytest.approx(values[order])
        assert values[0] > values[1] and values.shape == (6,)


@pytest.mark.parametrize("name", NEED_POSITIVE)
def test_win_rates_lie_in_0_to_1_average_to_a_half_and_do_not_depend_on_the_zero_of_a_unit(name: str):
    scores = np.random.default_rng(1).normal(size=(2, 5)) * 3
    aggregate = resolve(AGGREGATES, name, "aggregate")
    values = aggregate(scores, np.ones(2), np.zeros(2))
    assert values.min() >= 0 and values.max() <= 1 and values.mean() == pytest.approx(0.5)
    assert aggregate(scores + 100, np.ones(2), np.zeros(2)) == pytest.approx(values)
    assert aggregate(scores, np.ones(2), np.full(2, math.inf)) == pytest.approx([0.5] * 5)
