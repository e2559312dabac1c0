"""The table of gaps in docs/rewards.md: its bounds hold, and a resize without antialiasing would break them."""

from __future__ import annotations

from pathlib import Path

import gaps
import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
SLACK = 1.25  # other processors round otherwise
# and sum otherwise in 16 bits: up to 2.1 times the gap on one with AMX
COARSE = {"bfloat16": 2.5, "float16": 2.5}
LARGEST = 0.2  # share of the spread
LARGER = {("hpsv3", "bfloat16"): 0.3}  # Qwen2-VL was released in bfloat16, and rounds as much
AT_LENGTH = ("hpsv3", "videoreward")  # slow: they read pictures at full size, and hundreds of words of question


def stated() -> dict[str, dict[str, float]]:
    """reward -> its row, by the fields of `Gaps`."""
    lines = PAGE.partition("| reward | spread |")[2].splitlines()[2:]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]
    return {name: dict(zip(gaps.Gaps.__annotations__, map(float, cells), strict=True)) for name, *cells in rows}


def test_the_table_has_every_reward_with_a_gradient():
    assert list(stated()) == gaps.with_gradient()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in AT_LENGTH)) for name in gaps.with_gradient()]
)
def test_the_stated_gaps_hold(name: str):
    found, row = gaps.measure(name), stated()[name]
    least = 1e-6 * max(row["spread"], 1)
    for key in ("median", "most", "bfloat16", "float16"):
        assert getattr(found, key) <= COARSE.get(key, SLACK) * row[key] + least, key
        assert row[key] < row["spread"] * LARGER.get((name, key), LARGEST) + least, (
            f"{key}: so large a gap mixes up pictures"
        )
    assert found.spread == pytest.approx(row["spread"], rel=0.1)
    assert found.aliased > 3 * (SLACK * row["most"] + least), "a resize without antialiasing would pass"
    assert found.aliased == pytest.approx(row["aliased"], rel=0.25)
