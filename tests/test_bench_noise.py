"""The noise benchmark compares equal work. No timings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from miniatures import stable_diffusion

from benchmarks import noise
from benchmarks.noise import PROMPTS, parity, straightforward, work_of


def test_both_ways_come_to_the_same_noise_in_every_memory_mode() -> None:
    work = work_of(str(stable_diffusion()), 2, 4, 2)
    for memory in ("fast", "balanced", "low"):
        assert parity(work, PROMPTS[:2], (0, 1), memory) <= noise.TOLERANCE


def test_a_difference_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_of(str(stable_diffusion()), 1, 3, 1)
    monkeypatch.setattr(noise, "ours", lambda work, prompts, seeds, _: 1.01 * straightforward(work, prompts, seeds))
    with pytest.raises(AssertionError, match="differ by"):
        parity(work, PROMPTS[:1], (0,), "fast")


@pytest.mark.slow
def test_the_benchmark_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "noise.json"
    arguments = ["--model", str(stable_diffusion()), "--iterations", "3", "--towers", "2", "--rounds", "1"]
    assert noise.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    kept = {(row["pictures"], row["memory"]): row["kept_bytes"] for row in rows}
    assert list(kept) == [(pictures, memory) for pictures in (1, 8) for memory in ("fast", "balanced", "low")]
    assert kept[8, "fast"] > kept[8, "balanced"] > kept[8, "low"] and kept[8, "low"] < 2 * kept[1, "low"]
    assert all(row["ratio"] > 0 for row in rows)
    assert "straightforward, s" in capsys.readouterr().out
    assert noise.main([*arguments, "--pictures", "9"]) == 2
