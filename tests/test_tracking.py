"""What a run writes about itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

from diffalign.tracking import MetricsFile


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
