"""The inversion benchmark compares equal work, and bench-gpu's Inversion-DPO step is the method's. No timings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import inversion
from benchmarks.inversion_step import Inverted
from benchmarks.models import sd3_mini, sdxl_mini
from benchmarks.steps import build_subject, gradients, random_cached
from diffalign.methods.inversion_dpo import InversionDPO

CPU = torch.device("cpu")


@pytest.mark.parametrize("build", [sdxl_mini, sd3_mini])
def test_both_ways_come_to_the_same_and_to_less_calls(build) -> None:
    work = inversion.task(build(), 5, 6, CPU, torch.float32)
    calls: list[int] = []
    predict = work.pipe.predict
    work.pipe.predict = lambda x, t, c: calls.append(len(x)) or predict(x, t, c)
    assert inversion.parity(work, torch.float32) <= 1e-4
    counts = work.walk(range(5)).counts
    assert calls[: int(counts.sum())] == [1] * int(counts.sum())
    assert len(calls) == int(counts.sum() + counts.max()) and sum(calls) == 2 * int(counts.sum())


def test_a_difference_is_refused(monkeypatch) -> None:
    work = inversion.task(sdxl_mini(), 2, 4, CPU, torch.float32)
    monkeypatch.setattr(inversion, "together", lambda work: inversion.one_by_one(work) * 1.01)
    with pytest.raises(AssertionError, match="differ by"):
        inversion.parity(work, torch.float32)


def test_the_benchmark_writes_its_figures(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(inversion, "SMALL", {"sdxl": sdxl_mini, "sd3": sd3_mini})
    out = tmp_path / "b" / "inversion.json"
    assert inversion.main(["--pictures", "3", "--steps", "4", "--rounds", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 and all(row["ratio"] > 0 and row["calls"] <= 4 < row["evaluations"] + 4 for row in rows)
    assert "one by one, s" in capsys.readouterr().out


@pytest.mark.parametrize("build", [sdxl_mini, sd3_mini])
def test_kept_trajectories_give_the_same_step(build) -> None:
    subject = build_subject(build(), CPU, torch.float32, rank=2)
    cached, rule = random_cached(subject.model, 2, CPU), InversionDPO(steps=5, sampled=2, beta=5000.0)
    walked, kept = Inverted(subject, cached, rule=rule), Inverted(subject, cached, kept=True, rule=rule)
    wanted, direction = gradients(walked, seed=3)
    assert direction.norm() > 0
    for _ in range(2):  # the second time the trajectories are looked up
        loss, vector = gradients(kept, seed=3)
        assert loss == wanted and torch.equal(vector, direction)
    assert set(kept.kept or {}) == {3}
    before = [p.detach().clone() for p in subject.parameters]
    kept.enter()
    kept(3)
    assert any(not torch.equal(p, old) for p, old in zip(subject.parameters, before, strict=True))
