"""When a row of the league is computed again, and what its page says of rows that have not run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import league
from benchmarks.league import BUDGET, Drawn, Probe, Trained, method_row, probed
from benchmarks.league_page import MODELS, pooled, verdicts, write_page
from diffalign.shapes.grammar import sample_scenes
from diffalign.statistics import Interval
from diffalign.trainer import RunResult

COST = 128  # evaluations of a step
SCENES = sample_scenes("validation", 12, 0)
BASE = Drawn(torch.zeros(12, 3, 4, 4), [1, 0] * 6, [80.0] * 12)


class Runs:
    """In place of training: counts what is asked for."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.loss = 0.5

    def __call__(self, config: str, changes: Sequence[str], steps: int, folder: Path) -> Trained:
        self.steps.append(steps)
        return Trained(folder, 7 + COST * steps, 1.0, 32, {"loss": self.loss, "grad_norm": 2.0, "other": 1.0})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    runs = Runs()
    monkeypatch.setattr(league, "trained", runs)
    monkeypatch.setattr(league, "drawn", lambda *_: Drawn(torch.ones(12, 3, 4, 4), [1] * 12, [81.0] * 12))
    monkeypatch.setattr(league, "settings", lambda model: "data")
    monkeypatch.setattr(league, "ROWS", tmp_path / "rows")
    return runs


def row(work: Path, again: bool = False) -> None:
    method_row("tiny-sd", "dpo", 0, SCENES, BASE, work, again)


def test_the_steps_of_a_row_fit_the_budget(runs: Runs, tmp_path: Path) -> None:
    probe = probed("tiny-sd/dpo", [], tmp_path)
    assert BUDGET - COST < 7 + COST * probe.steps <= BUDGET
    assert runs.steps == [1, 3] and probe.mark == {"evaluations": 7 + 3 * COST, "loss": 0.5, "grad_norm": 2.0}


def test_a_row_is_computed_once(runs: Runs, tmp_path: Path) -> None:
    row(tmp_path)
    whole = len(runs.steps)
    row(tmp_path)
    assert len(runs.steps) == whole == 3
    row(tmp_path, again=True)
    assert len(runs.steps) == 2 * whole


def test_other_code_of_the_same_numbers_keeps_the_row_and_other_numbers_do_not(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row(tmp_path)
    [file] = (tmp_path / "rows").glob("*.json")
    first = json.loads(file.read_text())
    monkeypatch.setattr(league, "CODE", (*league.CODE, "seeds"))
    row(tmp_path)
    kept = json.loads(file.read_text())
    assert runs.steps[3:] == [1, 3] and kept["keys"]["code"] != first["keys"]["code"]
    assert {**kept, "keys": None} == {**first, "keys": None}
    row(tmp_path)
    assert len(runs.steps) == 5
    monkeypatch.setattr(league, "CODE", league.CODE[:-1])
    runs.loss = 0.51
    row(tmp_path)
    assert len(runs.steps) == 8 and json.loads(file.read_text())["probe"]["loss"] == 0.51


def test_a_run_that_is_stopped_is_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = SimpleNamespace(register_forward_hook=lambda *_, **__: None)
    prepared = SimpleNamespace(pipe=SimpleNamespace(network=network))
    stopped = RunResult(tmp_path, 7, {}, interrupted=True)
    monkeypatch.setattr(league, "prepare_run", lambda *_: prepared)
    monkeypatch.setattr(league, "Trainer", lambda _: SimpleNamespace(fit=lambda: stopped))
    with pytest.raises(SystemExit, match="stopped at step 7 of 9"):
        league.trained("tiny-sd/dpo", [], 9, tmp_path / "run")


def test_a_mark_agrees_up_to_rounding() -> None:
    probe = Probe(10, {"loss": 0.5, "grad_norm": 1e-3})
    assert probe.agrees({"loss": 0.50001, "grad_norm": 1e-3})
    assert not probe.agrees({"loss": 0.502, "grad_norm": 1e-3}) and not probe.agrees({"loss": 0.5})


def test_the_page_says_on_how_many_models_a_method_gains() -> None:
    gains = {"dpo": (0.01, 0.02, -0.01), "kto": (0.01, -0.01), "sft": (-0.1,)}
    table = [{"model": model, "method": method, "gain": low + 0.05, "gain_ci95": [low, low + 0.1]}
             for method, lows in gains.items() for model, low in zip(MODELS, lows, strict=False)]  # fmt: skip
    table = [{"model": "tiny-sd", "method": "base", "gain": 0.0}, *table, {"model": "x", "method": "spin"}]
    said = verdicts(table, {"kto": Interval(0.012, -0.001, 0.03)})
    assert said.splitlines()[2:5] == [
        "- on two models or more: dpo",
        "- on one of those that they ran on: kto (tiny-sd; tiny-sd and tiny-sdxl together +1.2 [-0.1, +3.0])",
        "- on none of them: sft (tiny-sd)",
    ]


def test_gains_of_models_are_pooled_by_caption() -> None:
    def told(model: str, method: str, passed: str) -> dict[str, Any]:
        return {"model": model, "method": method, "passed": passed}

    rows = [told("tiny-sd", "base", "0000"), told("tiny-sd", "dpo", "1100"), told("tiny-sd", "dpo", "1000"),
            told("tiny-sdxl", "base", "1111"), told("tiny-sdxl", "dpo", "0111"),
            told("tiny-sd3", "dpo", "1111")]  # fmt: skip
    found = pooled(rows, "dpo")
    assert found is not None and found.estimate == pytest.approx(np.mean([0.0, 0.25, 0.0, 0.0]))
    assert pooled(rows, "kto") is None


def test_the_page_names_what_has_not_run(runs: Runs, tmp_path: Path) -> None:
    league.base_row("tiny-sd", SCENES, tmp_path)
    row(tmp_path)
    write_page(tmp_path, SCENES)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "- on none of them: dpo (tiny-sd +0.0 [+0.0, +0.0])" in lines  # base and row pass everything here
    [dpo] = [line for line in lines if line.startswith("| dpo |") and "not run" not in line]
    assert (
        "100.0" in dpo
        and "ppd" not in {line.split(" | ")[0] for line in lines}
        and len([line for line in lines if line.startswith("| kto | not run")]) == 3
    )
