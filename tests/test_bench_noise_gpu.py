"""The noise benchmark for a GPU runs in small on a CPU, and its rows are the same work. No timings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import small_checkpoints
import torch
import zoo

from benchmarks import noise_gpu
from benchmarks.noise_gpu import SMALL, cells, measure


@pytest.mark.slow
def test_every_row_comes_to_the_same_noise_and_one_that_is_late_or_elsewhere_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.made(small_checkpoints.hps)  # open_clip knows tiny-hps from then on
    size = dataclasses.replace(SMALL, tower="tiny-hps", pictures=(1,), warm=0)
    rows = measure(size, torch.device("cpu"), 60.0, tmp_path / "a.json")["rows"]
    assert [(row["pictures"], row["memory"], row["compiled"]) for row in rows] == size.rows()
    assert all(0 <= row["difference"] < 1e-4 and row["seconds"] > 0 for row in rows)
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == rows
    monkeypatch.setattr(noise_gpu, "SAME", {torch.float32: -1.0})
    apart = measure(size, torch.device("cpu"), 60.0, tmp_path / "c.json")["rows"]
    assert all("went elsewhere" in row["failed"] and "seconds" not in row for row in apart)
    late = measure(size, torch.device("cpu"), -1.0, tmp_path / "b.json")["rows"]
    assert {row["failed"] for row in late} == {"no time left"} and "no time left" in cells(late[0])


def test_without_a_gpu_only_the_small_one_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert noise_gpu.main(["--out", str(tmp_path / "a.json")]) == 1 and not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(("seconds", "peak", "met"), [(1.9, 19.0, "True"), (2.1, 19.0, "False"), (1.9, 21.0, "False")])
def test_a_row_of_a_gpu_is_held_against_its_goal(seconds: float, peak: float, met: str) -> None:
    row = {"pictures": 1, "memory": "fast", "compiled": False, "seconds": seconds, "ms_per_iteration": 20 * seconds,
           "peak_gib": peak, "difference": 0.0}  # fmt: skip
    assert cells(row)[-1] == met
    assert cells(row | {"pictures": 2})[-1] == ""  # of which no goal is set
