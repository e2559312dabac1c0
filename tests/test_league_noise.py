"""The league of noise optimization: what a row keeps of a search, when it is computed again, and what its page says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import league_noise
from benchmarks.league_noise import AT_ONCE, LOOKS, MARKS, ROWS, STEPS, Row, Task, captions, curves, joined, run_row
from benchmarks.league_noise_page import write_page
from diffalign.noise.result import Found, NoiseResult
from diffalign.pipelines.base import LatentPipeline
from diffalign.shapes.grammar import parse

NOTHING = Found(torch.zeros(2, 1, 1, 1), torch.zeros(2, 3, 1, 1), torch.zeros(2), {}, torch.zeros(2))


def result(looks: int, method: str = "reno", captions: int = 2, plus: float = 0.0) -> NoiseResult:
    """tiny-clip rises by one a look for caption 0 and falls for the others; the verifier likes looks 2 and 3."""
    history = []
    for look in range(looks):
        learned = torch.full((captions,), 80.0 - look)
        learned[0] = 80.0 + look + plus
        shapes = torch.full((captions,), float(look in (2, 3)))
        history.append({"total": learned, "tiny-clip": learned, "shapes": shapes, "norm": learned, "ends": True})
    return NoiseResult(("a", "b"), (0, 1), NOTHING, NOTHING, NOTHING, tuple(history), 4.0 * looks, {},
                       {"method": method} | ({"steps": looks} if method == "reno" else {}))  # fmt: skip


def test_a_curve_is_of_the_best_look_until_then() -> None:
    found = curves(result(5))
    assert found["marks"] == [1, 2, 3, 5]
    assert found["learned"] == [[80.0, 80.0], [81.0, 80.0], [82.0, 80.0], [84.0, 80.0]]
    assert found["passed"] == [[0, 0], [0, 0], [1, 0], [0, 0]]
    assert found["any"] == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_looks_ahead_do_not_count_and_walks_together_have_their_end_alone() -> None:
    whole = result(5, method="fk")
    ahead = {**whole.history[0], "total": torch.full((2,), 1e6), "ends": False}
    found = curves(NoiseResult(**{**vars(whole), "history": (ahead, *whole.history)}))
    assert found["marks"] == [5] and found["learned"] == [[84.0, 80.0]]


def test_parts_are_put_together_by_mark() -> None:
    parts = [{"seconds": 4.0, "evaluations": 20.0, **curves(result(3))},
             {"seconds": 2.0, "evaluations": 20.0, **curves(result(3, captions=1))}]  # fmt: skip
    whole = joined(parts)
    assert whole["passed"] == ["000", "000", "101"] and whole["any"] == ["000", "000", "111"]
    assert whole["learned"][-1] == [82.0, 80.0, 82.0] and whole["seconds"] == 2.0 and whole["evaluations"] == 20.0


def test_captions_are_of_two_objects_and_no_setting_is_chosen_on_those_that_are_reported() -> None:
    reported, chosen = captions("heldout", 200), captions("validation", 48)
    assert len(set(reported)) == 200 and len(chosen) == 48 and not set(reported) & set(chosen)
    assert {parse(text).category for text in (*reported, *chosen)} == {"two"}


def test_every_row_spends_what_the_looks_cost_and_the_one_that_is_twice_as_long_twice(root: Path) -> None:
    assert LOOKS in MARKS
    for name, row in ROWS.items():
        options = dict(row.options)
        looks = options.get("steps", options.get("particles", 0)) + options.get("candidates", 0)
        assert looks == {"best_of_n, twice the looks": 2 * LOOKS, "paths": 0}.get(name, LOOKS)
    spent = {row["row"]: row["evaluations"] for row in map(json.loads, (
        file.read_text() for file in (root / "docs/league/noise/rows").glob("*.json")))}  # fmt: skip
    assert spent["best_of_n"] == LOOKS * STEPS and spent["best_of_n, twice the looks"] == 2 * LOOKS * STEPS
    assert all(count <= LOOKS * STEPS for name, count in spent.items() if "twice" not in name)


class Calls:
    """In place of `optimize_noise`."""

    def __init__(self) -> None:
        self.prompts: list[int] = []

    def __call__(self, pipe: LatentPipeline, prompts: Any, rewards: Any, **keywords: Any) -> NoiseResult:
        self.prompts.append(len(prompts))
        return result(keywords["steps"], captions=len(prompts), plus=keywords.get("lr", 0.0))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(league_noise, "optimize_noise", calls)
    monkeypatch.setattr(league_noise, "asset", lambda name: Path(__file__).parent / "golden")
    return calls


def test_a_row_is_computed_once_and_a_killed_one_goes_on(calls: Calls, tmp_path: Path) -> None:
    task = Task(None, tuple("abc"[i % 3] for i in range(AT_ONCE + 5)), tmp_path)  # type: ignore[arg-type]
    row, file = Row("best_of_n", "best_of_n", {"steps": 5}), tmp_path / "rows" / "best_of_n.json"
    file.parent.mkdir()
    first = run_row(row, task, file)
    assert calls.prompts == [AT_ONCE, 5] and first["prompts"] == AT_ONCE + 5 and len(first["passed"][0]) == AT_ONCE + 5
    run_row(row, task, file)
    file.unlink()
    next(tmp_path.glob("*-25.json")).unlink()
    assert run_row(row, task, file) == first
    assert calls.prompts == [AT_ONCE, 5, 5]
    run_row(Row("best_of_n", "best_of_n", {"steps": 3}), task, file)
    assert calls.prompts[3:] == [AT_ONCE, 5]


def test_the_page_compares_with_the_plain_picture_and_with_best_of_n(calls: Calls, tmp_path: Path) -> None:
    task = Task(None, tuple("ab" * 4), tmp_path)  # type: ignore[arg-type]
    (tmp_path / "rows").mkdir()
    for row in (Row("best_of_n", "best_of_n", {"steps": 4}), Row("reno", "reno", {"steps": 4, "lr": 8.0})):
        run_row(row, task, tmp_path / "rows" / f"{row.name}.json")
    write_page(["best_of_n", "reno", "fk"], tmp_path)
    text, table = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "noise.json").read_text())
    assert "| fk | not run |" in text and "| plain picture | 0.0 [0.0, 0.0] |" in text
    assert "| best_of_n, chosen by the verifier | 100.0 | +100.0 [+100.0, +100.0] |" in text
    assert (tmp_path / "curves.png").exists()
    [best, reno] = table
    assert best["passes"] == pytest.approx(1 / 8) and best["any_look"] == 1.0 and best["over_plain"][0] == 1 / 8
    assert reno["learned_over_best_of_n"][0] == pytest.approx(1.0) and reno["over_best_of_n"] == [0.0, 0.0, 0.0]


def test_without_the_baseline_the_page_says_that_nothing_has_run(tmp_path: Path) -> None:
    write_page(["best_of_n", "reno"], tmp_path)
    assert (tmp_path / "README.md").read_text().count("not run") == 2
    assert json.loads((tmp_path / "noise.json").read_text()) == []
