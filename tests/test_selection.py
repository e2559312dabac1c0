"""Which examples are drawn from: stages by score gap, clear margins, and what cannot be ordered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffalign.selection import SELECTIONS, Chooser, Known
from diffalign.table import build

GAPS = [0.1, 0.9, 0.3, 0.3, 0.0, 0.7]


def chooser(gaps: list[float], **section: Any) -> Chooser:
    examples: Any = [SimpleNamespace(scores=(0.0, gap)) for gap in gaps]
    return Chooser(build(SELECTIONS, section, what="selection"), examples)


def test_a_curriculum_begins_with_the_largest_gaps_and_ends_with_all() -> None:
    stages = chooser(GAPS, name="curriculum", parts=3, every=10)
    assert stages.chosen(0) == stages.chosen(9) == (1, 5)
    assert stages.chosen(10) == (1, 2, 3, 5)
    assert stages.chosen(20) == stages.chosen(1000) == (0, 1, 2, 3, 4, 5)
    assert stages.chosen(0) == (1, 5)  # of the step alone, whatever was asked before
    assert not stages.due(10) and stages.tensors() == {}


@pytest.mark.parametrize(
    ("section", "last"),
    [({"least_gap": 0.3}, (1, 2, 3, 5)), ({"most": 3}, (1, 2, 5)), ({"least_gap": 0.3, "most": 1}, (1,))],
)
def test_a_curriculum_may_leave_examples_out_for_good(section: dict[str, Any], last: tuple[int, ...]) -> None:
    stages = chooser(GAPS, name="curriculum", parts=2, every=1, **section)
    assert stages.chosen(5) == last
    first = stages.chosen(0)
    assert first and set(first) <= set(last) and len(first) == -(-len(last) // 2)


@pytest.mark.parametrize(
    ("gaps", "section", "message"),
    [
        ([1.0, 1.0, 1.0], {}, "all gaps here are 1: give the data scores"),
        ([0.1, 0.2], {"least_gap": 0.5}, "no example has a score gap of least_gap 0.5, the largest is 0.2"),
        (GAPS, {"parts": 0}, "parts and every of at least 1"),
        (GAPS, {"most": 0}, "most of at least 1"),
    ],
)
def test_what_has_no_order_is_refused(gaps: list[float], section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chooser(gaps, name="curriculum", **section)


def test_prompts_alone_have_no_gap_and_need_none() -> None:
    examples: Any = [SimpleNamespace(scores=())] * 2
    assert Chooser(build(SELECTIONS, "all", what="selection"), examples).chosen(0) is None


def test_margins_are_means_less_their_error_and_remember() -> None:
    clear = chooser(GAPS[:4], name="margin", keep=0.5, every=5, draws=2)
    assert clear.chosen(0) is None and not clear.due(0) and clear.due(5) and not clear.due(6)
    # the first has the largest mean, but is not sure: 10 +- 10; then 4, 3 and -1
    clear.update(torch.tensor([[0.0, 4.0, 3.0, -1.0], [20.0, 4.0, 3.0, -1.0]]))
    assert clear.chosen(5) == (1, 2)
    clear.update(torch.tensor([[10.0, 0.0, 3.0, -1.0], [10.0, 0.0, 3.0, -1.0]]))
    torch.testing.assert_close(clear.known.margins, torch.tensor([10.0, 2.0, 3.0, -1.0]))  # half old, half new
    assert clear.chosen(10) == (0, 2)
    again = chooser(GAPS[:4], name="margin", keep=0.5, every=5, draws=2)
    again.restore(clear.tensors())
    assert again.chosen(10) == clear.chosen(10)
    assert all(torch.equal(again.tensors()[name], value) for name, value in clear.tensors().items())


def test_a_margin_before_it_is_known_leaves_all() -> None:
    rule = build(SELECTIONS, "margin", what="selection")
    assert rule.chosen(600, Known(torch.tensor(GAPS))) is None
