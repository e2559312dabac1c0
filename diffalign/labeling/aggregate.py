"""Several rewards' scores of one prompt's pictures as one number per picture, which ranks them.

Pure functions of scores [K, N] (K rewards, N >= 2 pictures), weights [K] and margins [K], float64; higher is better.
Two pictures whose scores by a reward differ by no more than its margin are equal by that reward.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Values = NDArray[np.float64]

AGGREGATES: dict[str, str] = {
    "total": "diffalign.labeling.aggregate:total",
    "rankdpo": "diffalign.labeling.aggregate:aggregate_wins",
    "capo": "diffalign.labeling.aggregate:calibrated_win_rate",
}
NEED_POSITIVE = ("rankdpo", "capo")  # what is counted or averaged has no negative share


def total(scores: Values, weights: Values, margins: Values) -> Values:
    """sum_k w_k r_k(i), [N], in the rewards' own units. Margins do not change it; see `equal`.

    >>> total(np.array([[1.0, 2.0], [10.0, 0.0]]), np.array([1.0, 0.5]), np.zeros(2))
    array([6., 2.])
    """
    return weights @ scores


def aggregate_wins(scores: Values, weights: Values, margins: Values) -> Values:
    """phi_i, the share of comparisons that picture i wins: over all rewards and all other pictures, [N] in [0, 1].

    phi_i = sum_k w_k #{j != i: r_k(i) > r_k(j)} / ((N - 1) sum_k w_k)
    (RankDPO, arXiv 2410.18013, the algorithm that makes the data; there every weight is 1.)

    Deviation: equal by a reward is half a win for each, where the paper says nothing; counted as none, a picture would
    lose to all others for having a twin. No code was released.

    >>> aggregate_wins(np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 1.0]]), np.ones(2), np.zeros(2))
    array([0.625, 0.75 , 0.125])
    """
    gaps = _gaps(scores, margins)
    return _mean_over_others((1 + np.sign(gaps)) / 2, weights)


def calibrated_win_rate(scores: Values, weights: Values, margins: Values) -> Values:
    """R_ca, the expected win rate against the other pictures under Bradley and Terry's model, [N] in (0, 1).

    R_ca,k(i) = 1 / (N - 1) sum_{j != i} sigmoid(r_k(i) - r_k(j)); R_ca = sum_k w_k R_ca,k / sum_k w_k
    (CaPO, arXiv 2502.02588, reward calibration; there every weight is 1.)

    The sigmoid takes scores as log-odds, as PickScore's and ImageReward's nearly are. A reward in a small unit (a
    cosine) hardly moves it, and one in a large unit (100 cos, kB) makes it a count of wins.

    Deviation: the paper draws pairs of several rewards from the upper and the lower Pareto front; here their mean ranks
    the pictures. No code was released.

    >>> calibrated_win_rate(np.log(np.array([[1.0, 3.0]])), np.ones(1), np.zeros(1))
    array([0.25, 0.75])
    """
    gaps = _gaps(scores, margins)
    return _mean_over_others(expit(gaps), weights)


def equal(scores: Values, margins: Values) -> NDArray[np.bool_]:
    """[N, N]: pictures that every reward holds for equal."""
    return (_gaps(scores, margins) == 0).all(0)


def _gaps(scores: Values, margins: Values) -> Values:
    """[K, N, N]: r_k(i) - r_k(j), 0 within the margin."""
    gaps = scores[:, :, None] - scores[:, None, :]
    return np.where(np.abs(gaps) <= margins[:, None, None], 0.0, gaps)


def _mean_over_others(against: Values, weights: Values) -> Values:
    """[N] of outcomes [K, N, N] in [0, 1], of which the diagonal is 1/2 and not counted."""
    wins = against.sum(2) - 0.5
    return weights @ wins / (weights.sum() * (against.shape[1] - 1))
