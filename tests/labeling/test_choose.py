"""Which pairs and rankings become records, and what is a tie or too small a margin."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.labeling.choose import PAIRS, Choice, choose

VALUES = [1.0, 4.0, 2.0, 3.5]
NONE = np.zeros((4, 4), bool)


def pairs(choice: Choice, values: list[float] = VALUES, equal: np.ndarray = NONE) -> list[tuple[int, ...]]:
    return [record.pictures for record in choose(values, equal, choice)[0]]


def test_the_kinds_of_pairs():
    assert pairs(Choice("best-worst")) == [(1, 0)]
    assert pairs(Choice("adjacent")) == [(1, 3), (3, 2), (2, 0)]
    assert pairs(Choice("all")) == [(1, 3), (1, 2), (1, 0), (3, 2), (3, 0), (2, 0)]


@pytest.mark.parametrize("kind", PAIRS)
def test_the_first_of_a_pair_is_never_the_worse_one(kind: str):
    values = np.random.default_rng(0).integers(0, 4, 9).astype(float).tolist()
    records, dropped = choose(values, np.zeros((9, 9), bool), Choice(kind))
    assert records and dropped == 0
    for record in records:
        assert [values[i] for i in record.pictures] == list(record.scores) and record.scores[0] >= record.scores[1]


def test_within_the_margin_a_pair_is_a_tie_with_equal_scores_and_below_the_least_it_is_dropped():
    records, dropped = choose(VALUES, NONE, Choice("adjacent", tie_margin=0.5, min_margin=1.25))
    # 4 and 3.5 are a tie, 3.5 and 2 are apart enough, 2 and 1 are neither
    assert [(r.pictures, r.scores, r.tie) for r in records] == [
        ((1, 3), (3.75, 3.75), True),
        ((3, 2), (3.5, 2.0), False),
    ]
    assert dropped == 1


def test_equal_values_are_ties_and_min_margin_alone_drops_them():
    same = [2.0, 2.0, 1.0, 1.0]
    assert [record.tie for record in choose(same, NONE, Choice("adjacent"))[0]] == [True, False, True]
    assert choose(same, NONE, Choice("adjacent", min_margin=0.5))[1] == 2
    kept, dropped = choose(same, NONE, Choice("adjacent", tie_margin=0.0, min_margin=0.5))
    assert len(kept) == 3 and dropped == 0  # ties that were asked for


def test_what_every_reward_holds_for_equal_is_a_tie_whatever_the_values():
    alike = NONE.copy()
    alike[0, 1] = alike[1, 0] = True
    (record,), _ = choose(VALUES, alike, Choice())
    assert record.tie and record.scores == (2.5, 2.5)


def test_a_ranking_puts_ties_with_the_best_of_their_group_on_one_place():
    values = [3.0, 2.5, 2.0, 1.5, 0.0]
    (record,), _ = choose(values, np.zeros((5, 5), bool), Choice(rank=True, tie_margin=0.5))
    # 3 and 2.5 are a tie; 2 is one with 2.5 and not with 3, and so begins the next place
    assert record.pictures == (0, 1, 2, 3, 4) and record.scores == (2.75, 2.75, 1.75, 1.75, 0.0)


def test_a_ranking_is_whole_never_rises_and_is_dropped_when_its_ends_are_too_close():
    rng = np.random.default_rng(2)
    for _ in range(20):
        values = rng.normal(size=7).tolist()
        alike = rng.random((7, 7)) < 0.3
        (record,), _ = choose(values, alike | alike.T, Choice(rank=True, tie_margin=0.1))
        assert sorted(record.pictures) == list(range(7))
        assert all(a >= b for a, b in zip(record.scores, record.scores[1:], strict=False))
    assert choose(VALUES, NONE, Choice(rank=True, min_margin=3.5)) == ([], 1)


def test_margins_and_kinds_that_cannot_be():
    for keywords, message in (
        ({"pairs": "best-wrost"}, "did you mean 'best-worst'"),
        ({"min_margin": -1.0}, "at least 0"),
        ({"tie_margin": float("nan")}, "at least 0"),
        ({"tie_margin": 1.0, "min_margin": 0.5}, "--min-margin above --tie-margin, got 0.5 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Choice(**keywords)
