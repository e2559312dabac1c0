"""The video league runs in small, keeps what is done, and its page says what the rows say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import wan

from benchmarks import league_video, league_video_page
from benchmarks.league_video import Job, Looks, frames_of, row
from diffalign.shapes.clips import render_clip
from diffalign.shapes.motion import parse_moving


def test_looks_do_not_see_what_moves() -> None:
    import random

    def clip(caption: str) -> torch.Tensor:
        return torch.from_numpy(render_clip(parse_moving(caption), random.Random(0), 9)).permute(0, 3, 1, 2)

    asked = "a red circle moving left"
    assert Looks().prefer(clip(asked), clip("a red circle standing still"), asked) == 0.5
    assert Looks().prefer(clip(asked), clip("a blue circle moving left"), asked) == 1
    assert Looks().prefer(clip("a red square moving left"), clip("a red circle standing still"), asked) == 0
    assert frames_of(clip(asked)).shape == (9, 64, 64, 3)


def test_the_page_says_gains_of_pairs_and_leaves_out_what_was_not_seen(tmp_path: Path) -> None:
    def written(name: str, seed: int | None, passed: list[float], motion: list[float | None]) -> None:
        found = {"pass": passed, "frames": passed, "motion": motion, "flicker": [0.0, 0.5, 0.0, 0.5]}
        told = {"row": name, "seed": seed, "key": "k", "steps": 7, "evaluations": 9, "seconds": 1.0, "found": found}
        (tmp_path / "rows").mkdir(exist_ok=True)
        (tmp_path / "rows" / f"{name}-{seed}.json").write_text(json.dumps(told))

    league_video_page.write_page(tmp_path)
    assert "Nothing has run yet" in (tmp_path / "README.md").read_text()
    written("base", None, [0, 0, 1, 1], [4.0, 4.0, None, 8.0])
    written("densedpo", 0, [0, 1, 1, 1], [6.0, None, 9.0, 8.0])
    written("densedpo", 1, [1, 1, 1, 1], [6.0, 4.0, 9.0, 8.0])
    league_video_page.write_page(tmp_path)
    base, dense = json.loads((tmp_path / "league.json").read_text())
    assert (base["pass"], base["motion"]) == (0.5, pytest.approx(16 / 3))
    assert dense["seeds"] == [0, 1] and dense["pass"] == 7 / 8
    assert dense["pass_gain"][0] == pytest.approx(3 / 8)
    assert dense["motion_gain"][0] == pytest.approx(np.mean([2.0, 0.0, 0.0]))  # of the three that the base shows
    page = (tmp_path / "README.md").read_text()
    assert "| densedpo | 0 1 | 87.5 (+37.5 [" in page and "| base |  | 50.0 |" in page


@pytest.mark.slow
def test_it_runs_in_small_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []
    monkeypatch.setattr(league_video, "SEGMENTS", 2)
    monkeypatch.setitem(league_video.SETTINGS, "train_batch_size", 2)
    monkeypatch.setattr(Looks, "prefer", lambda self, a, b, prompt: captions.append(prompt) or len(captions) % 4 > 0)
    job = Job(str(wan()), tmp_path, pairs=4, draws=3, budget=40, steps=2, side=32, frames=5)
    row(job, "base", None, tmp_path / "out", again=False)
    for name in league_video.ROWS:
        row(job, name, 0, tmp_path / "out", again=False)
    rows = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "out" / "rows").glob("*.json")}
    assert set(rows) == {"base", "vanilla-dpo-0", "structuraldpo-0", "densedpo-0"}
    assert all(len(one["found"][name]) == 3 for one in rows.values() for name in league_video_page.COLUMNS_OF)
    assert all(0 < one["evaluations"] <= 60 for name, one in rows.items() if name != "base")
    assert len(captions) == 2 * 2 * 4  # each of both kinds once
    before = (tmp_path / "out" / "rows" / "base.json").stat().st_mtime_ns
    row(job, "base", None, tmp_path / "out", again=False)
    assert (tmp_path / "out" / "rows" / "base.json").stat().st_mtime_ns == before
