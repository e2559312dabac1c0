"""What a run writes about itself."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from diffalign.tracking import MetricsFile, RewardAlarm


def test_a_value_that_is_no_number_is_left_out(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(1, {"loss": 0.5, "validation/reward/vlm": math.nan, "validation/loss": math.inf})
    assert json.loads(file.path.read_text()) == {"step": 1, "loss": 0.5}


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path):
    first = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        first.write(step, {"loss": float(step)})
    MetricsFile(first.path, 2).write(3, {"loss": 9.0})
    rows = [json.loads(line) for line in first.path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 9.0}]


def test_rewards_that_say_nothing_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    alarm = RewardAlarm(patience=3)
    with caplog.at_level(logging.WARNING):
        for missing, same in [(0.0, 1.0), (0.0, 1.0), (0.0, 0.5), (0.25, 1.0), (0.5, 1.0)]:
            alarm.update(missing, same)
        assert [record.getMessage()[:42] for record in caplog.records] == ["rewards: 25% of a step's pictures have no "]
        for _ in range(4):
            alarm.update(0.0, 1.0)
    assert len(caplog.records) == 2
    assert "for 3 steps all pictures of each prompt have got the same score" in caplog.records[1].getMessage()
