"""Rows at the larger budget: what is trained, what is looked at, and what the page says of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import config

from benchmarks import league, league_paid
from benchmarks.league import Drawn, Trained
from benchmarks.league_paid import BUDGET, POINTS, ROWS, as_lora, base_row, run_row, spent
from benchmarks.league_paid_page import write_page
from diffalign.methods import METHODS
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.lora import WEIGHTS_NAME
from diffalign.shapes.grammar import sample_scenes
from diffalign.trainer import train

COST = 2000  # evaluations of a step
SCENES = sample_scenes("validation", 12, 0)


class Runs:
    """In place of training and drawing: leaves the checkpoints that were asked for, and gets better at each look."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.went_on: list[bool] = []
        self.changes: list[str] = []
        self.folders: list[Path] = []
        self.looks = 0

    def train(
        self, config: str, changes: Sequence[str], steps: int, folder: Path, *, goes_on: bool = False
    ) -> Trained:  # fmt: skip
        self.steps.append(steps)
        self.went_on.append(goes_on)
        self.changes = list(changes)
        self.folders.append(folder)
        every = next((int(c.split("=")[1]) for c in reversed(changes) if c.startswith("checkpointing_steps")), steps)
        for step in {*range(every, steps, every), steps}:
            (folder / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)
        lines = [{"step": steps // 2, "pairs_per_second": 4.0}, {"step": steps, "pairs_per_second": 2.0}, {"step": 9}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Trained(folder, COST * steps, 1.0, 8, {"loss": 0.5, "grad_norm": 2.0})

    def draw(self, model: str, lora: Path | None, scenes: Sequence[Any], steps: int, guidance: float) -> Drawn:
        assert steps == 10
        if guidance != 1:
            return Drawn(torch.zeros(12, 3, 4, 4), [1] * (11 if lora else 10) + [0] * (1 if lora else 2), [90.0] * 12)
        self.looks += lora is not None
        passed = [1] * (3 + self.looks) + [0] * (9 - self.looks)
        return Drawn(torch.full((12, 3, 4, 4), 0.1 * self.looks), passed, [80.0 + self.looks] * 12)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    runs = Runs()
    for module in (league, league_paid):
        monkeypatch.setattr(module, "trained", runs.train)
        monkeypatch.setattr(module, "settings", lambda model: "data")
    monkeypatch.setattr(league_paid, "drawn", runs.draw)
    monkeypatch.setattr(league_paid, "as_lora", lambda checkpoint, model, folder: checkpoint)
    monkeypatch.setattr(league_paid, "FOLDER", tmp_path / "paid")
    return runs


def run(name: str, work: Path, again: bool = False) -> dict[str, Any]:
    run_row(ROWS[name], "tiny-sd", 0, SCENES, base_row("tiny-sd", SCENES, work), work, again)
    found: dict[str, Any] = json.loads((league_paid.FOLDER / "rows" / f"tiny-sd-{name}-0.json").read_text())
    return found


def test_every_method_has_a_row_and_the_black_boxes_two() -> None:
    assert {row.method for row in ROWS.values()} == {*METHODS} - {"ppd"}
    assert {row.method for row in ROWS.values() if row.pay == "verifier"} == {"d3po", "prdp", "ddpo", "grpo"}
    assert ROWS["draft-tiny-clip"].changes == [league_paid.LEARNED] and ROWS["dpo"].changes == []


def test_a_row_is_looked_at_evenly_up_to_its_budget(runs: Runs, tmp_path: Path) -> None:
    found = run("grpo-verifier", tmp_path)
    looks = [point["evaluations"] for point in found["points"]]
    assert len(looks) == POINTS and looks[-1] == found["evaluations"] and BUDGET - COST < looks[-1] <= BUDGET
    assert max(b - a for a, b in zip([0, *looks], looks, strict=False)) <= BUDGET / POINTS + COST
    assert league_paid.VERIFIER in runs.changes and runs.went_on == [False, False, True]
    assert found["seconds"] == pytest.approx(75 * 8 / 4 + 75 * 8 / 2)


def test_a_row_is_computed_once_and_kept_while_its_numbers_stay(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("dpo", tmp_path)
    looks = runs.looks
    assert run("dpo", tmp_path) == first and len(runs.steps) == 3
    monkeypatch.setattr(league, "CODE", league.CODE[:-1])
    kept = run("dpo", tmp_path)
    assert runs.steps[3:] == [1, 3] and runs.looks == looks and {**kept, "keys": 0} == {**first, "keys": 0}
    assert run("dpo", tmp_path, again=True)["points"] != first["points"] and runs.went_on[-1] is False


def test_a_row_of_other_settings_does_not_go_on_with_checkpoints_of_the_first(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("dpo", tmp_path)
    for module in (league, league_paid):
        monkeypatch.setattr(module, "settings", lambda model: "other data")
    run("dpo", tmp_path)
    assert runs.went_on == [False, False, True] * 2 and runs.folders[2] != runs.folders[5]


def test_the_page_says_from_when_on_a_row_gains(runs: Runs, tmp_path: Path) -> None:
    folder = league_paid.FOLDER
    write_page(list(ROWS), SCENES, folder)
    page = " ".join((folder / "README.md").read_text().split())
    assert page.count(f"Not run: base, {', '.join(ROWS)}.") == 2 and not list(folder.glob("*.png"))
    run("grpo-verifier", tmp_path)
    write_page(list(ROWS), SCENES, folder)
    lines = (folder / "README.md").read_text().splitlines()
    assert "| (83.3) |" in next(line for line in lines if line.startswith("| base"))  # 10 of 12, with guidance
    assert "| +8.3 [" in next(line for line in lines if line.startswith("| grpo-verifier"))  # 11 of 12
    [line] = [line for line in lines if line.startswith("| grpo-verifier | 0 |")]
    assert "| 75.0 | +50.0 [" in line and "| 86.00 | +6.00 [+6.00, +6.00] |" in line
    entry = next(e for e in json.loads((folder / "league.json").read_text()) if e["row"] == "grpo-verifier")
    first = min(point["evaluations"] for point in entry["points"] if point["gain_ci95"][0] > 0)
    assert f"| {first:,.0f} |" in line and first < entry["points"][-1]["evaluations"]
    assert (folder / "tiny-sd.png").stat().st_size > 10_000


def test_a_run_that_went_on_has_the_time_of_all_its_steps(tmp_path: Path) -> None:
    lines = [{"step": 2, "pairs_per_second": 1.0}, {"step": 2, "reward": 1.0}, {"step": 6, "pairs_per_second": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert spent(tmp_path, 3) == 2 * 3 / 1.0 + 4 * 3 / 2.0


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_checkpoint_is_the_lora_that_its_run_would_save(
    ema: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = config(tmp_path, ema_decay=ema, lora={"rank": 16})
    train(values)
    folder = Path(values["output_dir"])
    monkeypatch.setattr(league_paid, "loaded", lambda _: load_pipeline(values["pretrained_model_name_or_path"]))
    [last] = [c for c in folder.glob("checkpoint-*") if c.name == f"checkpoint-{values['max_train_steps']}"]
    ours, theirs = (load_file(f / WEIGHTS_NAME) for f in (as_lora(last, "any", tmp_path / "lora"), folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(value.count_nonzero() for name, value in ours.items() if "lora_B" in name)
