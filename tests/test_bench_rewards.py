"""The benchmark of rewards runs, compares equal work, and notices work that is not. No timings."""

from __future__ import annotations

import dataclasses

import pytest
import small_checkpoints
import torch
import zoo

from benchmarks import rewards
from benchmarks.reward_models import Scorer, four_of_reno, vit_b32, vit_b32_twice, vit_h14
from diffalign.evaluation import score_images


@pytest.fixture(scope="module", autouse=True)
def small_architecture() -> None:
    zoo.made(small_checkpoints.hps)  # open_clip knows tiny-hps from then on


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SCORERS = {
    "one": lambda: vit_b32(architecture="tiny-hps"),
    "two": lambda: vit_b32_twice(architecture="tiny-hps"),
    "letterbox": lambda: vit_h14("cpu", architecture="tiny-hps"),
    "four": lambda: four_of_reno("cpu", architecture="tiny-hps", small=True),
}


@pytest.mark.parametrize("name", SCORERS)
def test_every_row_runs_and_counts_each_prompt_and_each_picture_once(name, one_thread):
    scorer = SCORERS[name]()
    document = rewards.run([scorer], "cpu", count=8, batch=4, side=64, rounds=1)
    counts, row = document["counts"][scorer.name], document["rows"][scorer.name]
    assert counts["prompts_encoded"] == 2 and counts["files_opened"] == 8
    assert counts["resizes"] == 8 * {"one": 1, "two": 1, "letterbox": 0, "four": 2}[name]
    assert counts["gap"] <= rewards.TOLERANCE and all(figure > 0 for figure in row.values())
    assert scorer.name in rewards.report(document)


def files_of(folder) -> list:
    files = []
    for number, picture in enumerate(rewards.pictures(4, 64)):
        files.append(folder / f"{number}.png")
        picture.save(files[-1])
    return files


def check(scorer: Scorer, folder) -> dict:
    return rewards.assert_equal_work(scorer, files_of(folder), rewards.prompts(4), batch=4)


def test_other_scores_and_work_done_twice_are_noticed(tmp_path):
    scorer = SCORERS["one"]()
    assert check(scorer, tmp_path)["pictures"] == 4
    (plain,) = scorer.plain.values()
    with pytest.raises(AssertionError, match="scores of clip differ"):
        check(dataclasses.replace(scorer, plain={"clip": lambda file, text: 1.01 * plain(file, text)}), tmp_path)
    with pytest.raises(AssertionError, match="gives every picture the same"):
        check(dataclasses.replace(scorer, plain={"clip": lambda file, text: 1.0}), tmp_path)
    with pytest.raises(AssertionError, match="4 resizes, 8 expected"):
        check(dataclasses.replace(scorer, pil_resizes=2), tmp_path)

    class Forgetful(type(scorer.fresh())):
        def text_features(self, prompts):
            return torch.cat([type(scorer.fresh())(self.tower, 1.0).text_features([prompt]) for prompt in prompts])

    forgetful = dataclasses.replace(scorer, fresh=lambda: Forgetful(scorer.towers[0], 100.0))
    with pytest.raises(AssertionError, match="prompts encoded"):
        check(forgetful, tmp_path)


def test_goals_name_the_rows_and_columns_that_there_are(one_thread):
    document = rewards.run([SCORERS["one"]()], "cpu", count=4, batch=4, side=64, rounds=1)
    columns = next(iter(document["rows"].values()))
    assert {column for _, column in rewards.GOALS} <= set(columns)
    assert {name for name, _ in rewards.GOALS} <= {SCORERS[name]().name for name in SCORERS}
    assert len(rewards.goals(document["rows"])) == 1


def test_what_is_timed_begins_without_cached_prompts(tmp_path):
    scorer = SCORERS["one"]()
    for _ in range(2):
        scorer.towers[0].encoded.clear()
        score_images(scorer.fresh(), files_of(tmp_path), rewards.prompts(4), batch_size=4)
        assert len(scorer.towers[0].encoded) == 1
