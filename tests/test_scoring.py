"""Scoring of manifests: batches, what is broken or missing, filters, files of scores, and going on after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import scoring_helpers
from PIL import Image
from scoring_helpers import Choosy, Red, Redder, save_reds

from diffalign.answers import Unreached
from diffalign.evaluation import score_images
from diffalign.manifests import BrokenRow, Entry, read_manifest
from diffalign.rewards.base import Weighted
from diffalign.rewards.pairwise import WinRate
from diffalign.scoring.batch import Outcome, batches, score_batch
from diffalign.scoring.command import Wanted, score_pictures
from diffalign.scoring.engines import Job
from diffalign.scoring.files import SUM, ScoreRow, read_scores, write_scores
from diffalign.scoring.journal import Journal, keys
from diffalign.scoring.run import kept, score_entries


def job(**rewards: object) -> Job:
    """One reward of weight 1 each."""
    loaded = Weighted({name: (reward, 1.0) for name, reward in rewards.items()})  # type: ignore[misc]
    return Job(loaded, {name: {"weight": 1.0} for name in rewards}, "cpu")


def entries(places: list[Path], *prompts: str) -> list[Entry]:
    return [row for row in read_manifest(places, list(prompts)) if isinstance(row, Entry)]


@pytest.fixture
def reds(tmp_path: Path) -> list[Path]:
    return save_reds(tmp_path / "reds", 6)


def test_batches_keep_groups_whole_and_lose_nobody() -> None:
    prompts = list("abacabadd")
    assert batches(prompts, 4, False) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    whole = batches(prompts, 3, True)
    assert whole == [[0, 2, 4, 6], [1, 5, 3], [7, 8]]  # a group that is larger than a batch stays together
    with pytest.raises(ValueError, match="at least 1, got 0"):
        batches(prompts, 0, False)


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_a_win_rate_sees_its_whole_group_whatever_the_batch_and_the_order(reds: list[Path], size: int) -> None:
    prompts = ["a", "b", "a", "b", "a", "b"]
    reward = WinRate(preference=Redder())
    expected = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert score_images(reward, reds, prompts, batch_size=size)["winrate"] == expected
    scored = score_entries(entries(reds, *prompts), job(winrate=reward), batch_size=size)
    assert [row.scores["winrate"] for row in scored.rows] == expected
    assert [row.image for row in scored.rows] == [str(file) for file in reds]


def test_broken_and_refused_pictures_take_no_other_with_them(reds: list[Path]) -> None:
    reds[1].write_bytes(reds[1].read_bytes()[:45])
    Image.new("I;16", (8, 8), 40000).save(reds[3])
    prompts = ["a", "b", "refuse this", "d", "unsure", "f"]
    scored = score_entries(entries(reds, *prompts), job(red=Red(), choosy=Choosy()), batch_size=4)
    assert [row.prompt for row in scored.rows] == ["a", "unsure", "f"] and scored.new == 3
    reasons = {Path(row.source).name: row.reason for row in scored.broken}
    assert set(reasons) == {"001.png", "002.png", "003.png"}
    assert "expected a whole picture" in reasons["001.png"] and "8 bits per channel" in reasons["003.png"]
    assert reasons["002.png"] == "expected another caption, got 'refuse this'"
    unsure = scored.rows[1]
    assert unsure.scores["red"] == 25 and math.isnan(unsure.scores["choosy"]) and math.isnan(unsure.scores[SUM])
    assert unsure.missing == {"choosy": "it is unsure"}
    assert scored.rows[2].scores == {"red": 30, "choosy": 30, "weighted": 60}


def test_with_a_reward_that_compares_a_group_that_is_refused_goes_alone(reds: list[Path]) -> None:
    both = job(choosy=Choosy(), winrate=WinRate(preference=Redder()))
    prompts = ["a", "a", "refuse", "refuse", "b", "b"]
    scored = score_entries(entries(reds, *prompts), both, batch_size=100)
    assert [(row.prompt, row.scores["winrate"]) for row in scored.rows] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert len(scored.broken) == 2


def test_what_all_suffer_from_is_an_error_of_the_call_and_strict_forgives_nothing(reds: list[Path]) -> None:
    with pytest.raises(ValueError, match="expected another caption"):
        score_entries(entries(reds, "refuse"), job(choosy=Choosy()), batch_size=4)
    some = entries(reds, "a", "a", "a", "a", "refuse", "refuse")
    assert len(score_entries(some, job(choosy=Choosy()), batch_size=4).broken) == 2
    with pytest.raises(ValueError, match="expected another caption"):
        score_entries(some, job(choosy=Choosy()), batch_size=4, strict=True)
    with pytest.raises(ValueError, match="x line 1: not JSON"):
        score_entries([BrokenRow("x line 1", "not JSON"), *some], job(red=Red()), strict=True)
    with pytest.raises(ValueError, match=r"found none; the first of 1 broken rows is x line 1: not JSON"):
        score_entries([BrokenRow("x line 1", "not JSON")], job(red=Red()))


def test_a_judge_that_nobody_can_reach_is_asked_once(reds: list[Path]) -> None:
    class Nobody(Red):
        def __call__(self, images, prompts):
            self.sizes.append(len(prompts))
            raise Unreached("nobody is there")

    reward = Nobody()
    with pytest.raises(ValueError, match="nobody is there"):
        score_batch(Weighted({"red": (reward, 1.0)}), entries(reds, "x"))
    assert reward.sizes == [6]


def test_scores_do_not_depend_on_the_batch(reds: list[Path]) -> None:
    for size in (1, 4, 100):
        reward = Red()
        scored = score_entries(entries(reds, "x"), job(red=reward), batch_size=size)
        assert [row.scores["red"] for row in scored.rows] == [5, 10, 15, 20, 25, 30]
        assert max(reward.sizes) == min(size, 6)


def rows(*scores: tuple[str, float]) -> list[ScoreRow]:
    return [ScoreRow(f"{i}.png", prompt, {"red": score, SUM: score}) for i, (prompt, score) in enumerate(scores)]


def test_filters_keep_the_order_and_nothing_without_a_score() -> None:
    found = rows(("a", 1), ("b", 5), ("a", 3), ("a", math.nan), ("a", 3), ("b", 2))
    assert kept(found, {}, None) == [0, 1, 2, 3, 4, 5]
    assert kept(found, {"red": 2}, None) == [1, 2, 4, 5]
    assert kept(found, {}, 1) == [1, 2]  # of equal ones the earlier
    assert kept(found, {}, 2) == [1, 2, 4, 5]
    assert kept(found, {"red": 3.5}, 1) == [1]


EXTRA = {"seed": 7, "tags": ["x", {"y": 1}], "scores": "of before", "score.old": 3}
FILED = [
    ScoreRow("in/a, b.png", 'say "hi",\n一只猫', {"red": 0.1, "vlm": 1 / 3, SUM: -2.5}, {}, EXTRA),
    ScoreRow("/abs/c.png", "", {"red": 5.0, "vlm": math.nan, SUM: math.nan}, {"vlm": "no, none"}, {"seed": "text"}),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_of_scores_reads_back_and_is_a_manifest_again(tmp_path: Path, suffix: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("runs/deep") / f"scores{suffix}"
    write_scores(file, FILED, ["red", "vlm", SUM], {"red": "level", "vlm": "points", SUM: "sum"})
    first, second = read_scores(file)
    assert (first.image, first.prompt, second.image, second.prompt) == (
        "in/a, b.png",
        FILED[0].prompt,
        "/abs/c.png",
        "",
    )
    assert first.scores == FILED[0].scores and first.missing == {}
    assert second.missing == {"vlm": "no, none"} and math.isnan(second.scores["vlm"]) and second.scores["red"] == 5.0
    assert set(first.extra) == {"seed", "tags"} and str(first.extra["seed"]) == "7"
    listed = list(read_manifest([file]))
    assert [entry.prompt for entry in listed if isinstance(entry, Entry)] == [row.prompt for row in FILED]
    assert isinstance(listed[0], Entry) and Path(listed[0].image).resolve() == tmp_path / "in" / "a, b.png"
    assert not list(file.parent.glob("*.partial"))
    if suffix == ".parquet":
        assert pq.read_schema(file).metadata[b"unit.vlm"] == b"points"


def test_what_is_no_file_of_scores_is_named(tmp_path: Path) -> None:
    for name, text in {"a.jsonl": '{"image": "a.png"}\n', "b.csv": "image,prompt\na,b\n", "c.parquet": "none"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}, row 1: expected scores as diffalign score"):
            list(read_scores(tmp_path / name))
    with pytest.raises(ValueError, match=r"ends in .jsonl, .csv, .parquet"):
        list(read_scores(tmp_path / "a.txt"))


def score(out: Path, listed: list[Entry], reward: Red, options: dict[str, object] | None = None, **wanted: object):
    sections = {"red": {"weight": 1.0, **(options or {})}}
    asked = Job(Weighted({"red": (reward, 1.0)}), sections, "cpu")
    return score_pictures(listed, asked, Wanted(out, **({"batch_size": 2} | wanted)))  # type: ignore[arg-type]


def test_what_is_in_the_journal_is_not_scored_again(reds: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "runs" / "scores.jsonl"
    whole = reds[1].read_bytes()
    reds[1].write_bytes(whole[:45])
    first = score(out, entries(reds[:4], "x"), Red()).data
    assert (first["new"], first["pictures"], first["broken"]) == (3, 3, 1)
    reds[1].write_bytes(whole)  # repaired: a broken picture is tried again
    reward = Red()
    more = score(out, [*entries(reds, "x"), *entries(reds[:1], "x")], reward, best_of=3).data
    assert (more["new"], more["pictures"], more["kept"]) == (4, 7, 3) and sum(reward.sizes) == 4
    assert [row.scores["red"] for row in read_scores(out)] == [20, 25, 30]
    idle = Red()
    assert score(out, entries(reds, "x"), idle, minimum=["red=12"]).data["kept"] == 4 and idle.sizes == []
    summary = json.loads((tmp_path / "runs" / "scores.jsonl.summary.json").read_text())
    assert summary["rewards"]["red"] | {"mean": 17.5, "min": 5, "max": 30, "unit": "level"} == summary["rewards"]["red"]


def test_a_killed_run_loses_the_half_line_and_no_more(reds: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    score(out, entries(reds[:4], "x"), Red())
    journal = out.with_name("scores.jsonl.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    for cut in (b"".join(lines)[:-7], b"".join([*lines[:2], b"no json\n", *lines[3:]])):
        journal.write_bytes(cut)
        reward = Red()
        assert score(out, entries(reds[:4], "x"), reward).data["new"] == 1
        assert [row.scores["red"] for row in read_scores(out)] == [5, 10, 15, 20] and reward.sizes == [1]
        journal.write_bytes(b"".join(lines))
    journal.write_bytes(lines[0][:9])  # before the header was whole
    assert score(out, entries(reds[:4], "x"), Red()).data["new"] == 4


def test_a_group_that_a_kill_cut_is_compared_again_as_a_whole(reds: list[Path], tmp_path: Path) -> None:
    listed = entries(reds, *"aaabbb")
    path = tmp_path / "j"
    with Journal(path, {"winrate": {}}) as journal:
        journal.append([(key, Outcome((0.25,))) for key in keys(listed)[:4]])  # all of a, one of b
    with Journal(path, {"winrate": {}}) as journal:
        scored = score_entries(listed, job(winrate=WinRate(preference=Redder())), journal=journal)
    assert [row.scores["winrate"] for row in scored.rows] == [0.25, 0.25, 0.25, 0, 0.5, 1] and scored.new == 3


def test_other_rewards_or_options_in_the_same_file_are_refused(reds: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    score(out, entries(reds, "x"), Red())
    before = out.with_name("scores.csv.journal").read_bytes()
    with pytest.raises(ValueError, match=r"holds scores of red, and red \(offset=1.0\) was asked for; .*another --out"):
        score(out, entries(reds, "x"), Red(offset=1.0), {"offset": 1.0})
    assert out.with_name("scores.csv.journal").read_bytes() == before
    heavier = Job(Weighted({"red": (Red(), 3.0)}), {"red": {"weight": 3.0}}, "cpu")  # a weight changes no term
    assert score_pictures(entries(reds, "x"), heavier, Wanted(out)).data["new"] == 0
    assert [row.scores[SUM] for row in read_scores(out)] == [15, 30, 45, 60, 75, 90]


def test_a_foreign_file_is_not_overwritten_and_two_do_not_write_at_once(reds: list[Path], tmp_path: Path) -> None:
    for text in ("notes", "notes\n", "[]\n"):
        (tmp_path / "j").write_text(text)
        with pytest.raises(ValueError, match="expected a journal of diffalign score, found something else"):
            Journal(tmp_path / "j", {"red": {}})
        assert (tmp_path / "j").read_text() == text
    (tmp_path / "j").unlink()
    with Journal(tmp_path / "j", {"red": {}}), pytest.raises(ValueError, match="another process is scoring into it"):
        Journal(tmp_path / "j", {"red": {}})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"out": Path("scores.txt")}, "ends in .jsonl, .csv, .parquet"),
        ({"minimum": ["blue=1"]}, "NAME=VALUE of one of red, weighted"),
        ({"minimum": ["red=much"]}, "--min red: expected float, got 'much'"),
        ({"best_of": 0}, "--best-of of at least 1"),
        ({"engine": "spark"}, "unknown engine 'spark'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_scored(
    reds: list[Path], wanted: dict[str, object], message: str
) -> None:
    reward = Red()
    with pytest.raises(ValueError, match=message):
        score_pictures(entries(reds, "x"), job(red=reward), Wanted(**wanted))  # type: ignore[arg-type]
    assert reward.sizes == []


def test_prompts_of_every_kind_reach_the_reward(reds: list[Path]) -> None:
    from diffalign.rewards.clip import TinyCLIP

    prompts = ["", "word " * 5000, "一只红色的猫 🐈", "\u202eevil\x00\x07", "a red circle", "a\nb"]
    scored = score_entries(entries(reds, *prompts), job(clip=TinyCLIP()))
    assert [row.prompt for row in scored.rows] == prompts
    assert all(math.isfinite(row.scores["clip"]) for row in scored.rows)


def test_the_helpers_are_what_they_say() -> None:
    assert scoring_helpers.CARD.unit == "level" and not scoring_helpers.CARD.compares and WinRate.card.compares
