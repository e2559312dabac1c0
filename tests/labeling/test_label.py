"""Preferences written from scores: what is in the files, what is left out, and that training reads them."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from scoring_helpers import save_reds

from diffalign.arguments import Asked
from diffalign.console import Result
from diffalign.data.check import check
from diffalign.data.pickapic import read_pickapic
from diffalign.data.readers import read_jsonl
from diffalign.data.records import BrokenRow, PreferenceRecord
from diffalign.labeling.command import label_pictures, read_wanted
from diffalign.manifests import read_manifest
from diffalign.scoring.command import Wanted, score_pictures
from diffalign.scoring.engines import load_job
from diffalign.scoring.files import ScoreRow, write_scores
from diffalign.scoring.run import score_entries

RED = "scoring_helpers:Red"


def label(places: Any, out: Path, asked: Asked | None = None, **options: Any) -> Result:
    keywords = {"aggregate": "total", "pairs": None, "rank": False, "tie_margin": [], "min_margin": 0.0} | options
    given = [str(place) for place in (places if isinstance(places, list) else [places])]
    return label_pictures(given, asked or Asked(), read_wanted(out, **keywords))


def records(path: Path) -> list[PreferenceRecord]:
    found = list((read_jsonl if path.suffix == ".jsonl" else read_pickapic)(str(path)))
    assert not [row for row in found if isinstance(row, BrokenRow)]
    return [row for row in found if isinstance(row, PreferenceRecord)]


def reds_of(record: PreferenceRecord) -> list[int]:
    """Which of `save_reds`: their red is 5 times their number."""
    return [image.decode("x").getpixel((0, 0))[0] // 5 for image in record.images]  # type: ignore[index]


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """Seven pictures of two prompts and one of a third, scored by two rewards that disagree on the second prompt."""
    table = [("a", 1, 9), ("a", 2, 8), ("a", 4, 7.5), ("b", 3, 3), ("b", 3, 1), ("b", 5, 2), ("alone", 1, 1)]
    files = save_reds(tmp_path / "reds", len(table))
    rows = [ScoreRow(str(file), prompt, {"x": x, "y": y, "weighted": x + 0.5 * y})
            for file, (prompt, x, y) in zip(files, table, strict=True)]  # fmt: skip
    write_scores(tmp_path / "scores.jsonl", rows, ["x", "y", "weighted"], {})
    weights = {"x": {"weight": 1.0}, "y": {"weight": 0.5}, "weighted": {"weight": 1.0}}
    (tmp_path / "scores.jsonl.summary.json").write_text(json.dumps({"rewards": weights}))
    return tmp_path / "scores.jsonl"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_best_against_worst_with_the_scores_behind_it(scores: Path, tmp_path: Path, suffix: str):
    out = tmp_path / "out" / f"pairs{suffix}"
    told = label(scores, out)
    first, second = records(out)
    assert (first.prompt, first.scores, reds_of(first)) == ("a", (7.75, 5.5), [3, 1])  # x + 0.5 y, of the summary
    assert (second.prompt, second.scores, reds_of(second)) == ("b", (6.0, 3.5), [6, 5])
    assert told.data["left_out"]["alone"] == 1 and "1 prompts with fewer than two pictures left" in told.text
    assert told.data["weights"] == {"x": 1.0, "y": 0.5} and "1 x + 0.5 y" in told.text
    report = check(str(out))
    assert report.usable and report.records == 2 and report.ties == 0
    assert json.loads((tmp_path / "out" / f"pairs{suffix}.summary.json").read_text())["records"] == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_ties_are_read_as_ties(scores: Path, tmp_path: Path, suffix: str):
    out = tmp_path / f"pairs{suffix}"
    told = label(scores, out, pairs="all", tie_margin=["x=1", "y=1"])
    ties = [reds_of(record) for record in records(out) if record.tie]
    assert ties == [[2, 1]]  # a: x 2 and 1, y 8 and 9; b: pictures 4 and 5 differ in y by 2
    assert told.data["records"] == 6 and told.data["ties"] == 1 and check(str(out)).ties == 1
    if suffix == ".parquet":
        assert sorted(pq.read_table(out).column("label_0").to_pylist()) == [0.5, 1, 1, 1, 1, 1]


def test_rankings_hold_all_pictures_and_one_value_is_a_margin_of_what_ranks(scores: Path, tmp_path: Path):
    label(scores, tmp_path / "ranks.jsonl", rank=True, tie_margin=["0.5"])
    first, second = records(tmp_path / "ranks.jsonl")
    assert reds_of(first) == [3, 2, 1] and first.scores == (7.75, 5.75, 5.75)  # 6 and 5.5 are a tie
    assert reds_of(second) == [6, 4, 5] and second.scores == (6.0, 4.5, 3.5)
    with pytest.raises(ValueError, match=r"--rank writes rankings; choose a file that ends in \.jsonl"):
        label(scores, tmp_path / "ranks.parquet", rank=True)


@pytest.mark.parametrize(
    ("aggregate", "best", "value"),
    # b, wins of 2: x (3, 3, 5) gives 1/2, 1/2, 2 and y (3, 1, 2) gives 2, 0, 1; of 4 each
    [("rankdpo", [6, 5], 3 / 4), ("capo", [6, 5], None)],
)
def test_wins_do_not_take_the_weights_of_the_sum(scores: Path, tmp_path: Path, aggregate, best, value):
    told = label(scores, tmp_path / "p.jsonl", aggregate=aggregate)
    assert told.data["weights"] == {"x": 1.0, "y": 1.0}
    pair = records(tmp_path / "p.jsonl")[1]

    def s(gap: float) -> float:
        return 1 / (1 + math.exp(-gap))

    expected = value or (s(2) + s(2) + s(1) + s(-1)) / 4
    assert reds_of(pair) == best and pair.scores[0] == pytest.approx(expected)
    asked = Asked(reward=["x=0", "y"])
    assert label(scores, tmp_path / "y.jsonl", asked, aggregate=aggregate).data["weights"] == {"x": 0.0, "y": 1.0}
    assert reds_of(records(tmp_path / "y.jsonl")[1]) == [4, 5]


def test_what_lacks_a_score_or_comes_twice_is_left_out_counted_and_named(tmp_path: Path):
    files = save_reds(tmp_path / "reds", 6)
    nan = math.nan
    values = [("a", 1.0), ("a", nan), ("a", 2.0), ("b", 1.0), ("b", nan), ("", 1.0), ("", 2.0), ("a", 2.0)]
    places = [files[i] for i in (0, 1, 2, 3, 4, 0, 1, 2)]
    rows = [ScoreRow(str(file), prompt, {"x": x, "weighted": x}, {"x": "unsure"} if math.isnan(x) else {})
            for file, (prompt, x) in zip(places, values, strict=True)]  # fmt: skip
    write_scores(tmp_path / "s.csv", rows, ["x", "weighted"], {})
    told = label(tmp_path / "s.csv", tmp_path / "p.jsonl", pairs="all")
    assert [(r.prompt, reds_of(r)) for r in records(tmp_path / "p.jsonl")] == [("a", [3, 1])]
    left = told.data["left_out"]
    assert (left["without_score"], left["alone"], left["repeated"], left["unusable"]) == (2, 1, 1, 1)
    reasons = [row["reason"] for row in told.data["named"]]
    assert reasons == ["no score of x: unsure", "no score of x: unsure", "the caption is empty"]
    assert "every one is named in" in told.text


def test_a_picture_that_scores_but_cannot_be_trained_on_takes_its_pair_and_no_other(tmp_path: Path):
    files = save_reds(tmp_path / "reds", 4)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    rows = [ScoreRow(str(file), prompt, {"x": float(x)}) for x, (file, prompt) in enumerate(
            [(files[0], "a"), (files[1], "a"), (files[2], "b"), (tmp_path / "moving.gif", "b")])]  # fmt: skip
    write_scores(tmp_path / "s.jsonl", rows, ["x"], {})
    told = label(tmp_path / "s.jsonl", tmp_path / "p.parquet")
    assert [record.prompt for record in records(tmp_path / "p.parquet")] == ["a"]
    assert told.data["left_out"]["unusable"] == 1 and "moving.gif" in told.text


def test_where_nothing_is_left_nothing_is_overwritten(tmp_path: Path):
    (file,) = save_reds(tmp_path / "reds", 1)
    write_scores(tmp_path / "s.jsonl", [ScoreRow(str(file), "a", {"x": 1.0})], ["x"], {})
    write_scores(
        tmp_path / "e.jsonl", [ScoreRow(str(file), "", {"x": 1.0}), ScoreRow("b.png", "", {"x": 2.0})], ["x"], {}
    )
    out = tmp_path / "pairs.jsonl"
    out.write_text("mine")
    with pytest.raises(ValueError, match="no preference to write: 1 prompts with fewer than two pictures left"):
        label(tmp_path / "s.jsonl", out)
    with pytest.raises(ValueError, match="training would drop all 1, such as .*the caption is empty"):
        label(tmp_path / "e.jsonl", out)
    assert out.read_text() == "mine" and not list(tmp_path.glob("*.partial"))


def test_pictures_inside_larger_files_are_copied_out_for_json_lines_and_in_for_parquet(tmp_path: Path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, file in enumerate(save_reds(tmp_path / "reds", 4)):
            for name, data in ((f"{number}.png", file.read_bytes()), (f"{number}.txt", b"ab"[number // 2 :][:1])):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    asked = Asked(reward=[RED], device="cpu")
    label(tmp_path / "shard.tar", tmp_path / "p.jsonl", asked)
    assert [reds_of(record) for record in records(tmp_path / "p.jsonl")] == [[2, 1], [4, 3]]
    copied = sorted((tmp_path / "p.jsonl.pictures").iterdir())
    assert len(copied) == 4 and {file.suffix for file in copied} == {".png"}
    # and through a file of scores, which names them inside the shard
    listed = read_manifest([tmp_path / "shard.tar"])
    score_pictures(listed, load_job({RED: {"weight": 1.0}}, "cpu"), Wanted(tmp_path / "out" / "s.csv"))
    label(tmp_path / "out" / "s.csv", tmp_path / "p.parquet")
    assert [reds_of(record) for record in records(tmp_path / "p.parquet")] == [[2, 1], [4, 3]]
    assert all(path.read_bytes() for path in copied)


def test_labeling_pictures_goes_on_where_it_was(tmp_path: Path):
    save_reds(tmp_path / "reds", 6)
    out, asked = tmp_path / "p.jsonl", Asked(reward=[RED], prompt=["a"], batch_size=2, device="cpu")
    part = Asked(reward=[RED], prompt=["a"], batch_size=2, device="cpu")
    (tmp_path / "reds" / "005.png").rename(tmp_path / "005.png")
    first = label(tmp_path / "reds", out, part)
    (tmp_path / "005.png").rename(tmp_path / "reds" / "005.png")
    again = label(tmp_path / "reds", out, asked, pairs="adjacent")
    assert (first.data["new"], again.data["new"]) == (5, 1)
    assert [reds_of(record) for record in records(out)] == [[6, 5], [5, 4], [4, 3], [3, 2], [2, 1]]
    with pytest.raises(ValueError, match="holds scores of"):
        label(tmp_path / "reds", out, dataclasses.replace(asked, settings=[f'"{RED}".offset=1']))


def test_pictures_and_their_file_of_scores_give_the_same_preferences(tmp_path: Path):
    save_reds(tmp_path / "reds", 5)
    prompts = ["a", "b", "a", "b", "a"]
    job = load_job({RED: {"weight": 2.0}}, "cpu")
    score_pictures(read_manifest([tmp_path / "reds"], prompts), job, Wanted(tmp_path / "s.parquet"))
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    asked = Asked(reward=[f"{RED}=2"], prompts=str(tmp_path / "prompts.txt"), device="cpu")
    label(tmp_path / "reds", tmp_path / "p.jsonl", asked, pairs="all")
    label(tmp_path / "s.parquet", tmp_path / "q.jsonl", pairs="all")
    assert (tmp_path / "p.jsonl").read_bytes() == (tmp_path / "q.jsonl").read_bytes()
    assert len(score_entries(read_manifest([tmp_path / "s.parquet"]), job).rows) == 5  # still a manifest


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (["z"], {}, "has no scores of z, only of x, y"),
        (["x=0"], {}, "every weight is 0"),
        (["x=-1"], {"aggregate": "rankdpo"}, "expected weights above 0, got -1"),
        (["x"], {"tie_margin": ["y=1"]}, "--tie-margin y: expected one of the rewards that count, x"),
        (["x"], {"tie_margin": ["x=-1"]}, "expected a number of at least 0"),
        (["x"], {"tie_margin": ["much"]}, "expected float, got 'much'"),
        (["x"], {"aggregate": "capos"}, "did you mean 'capo'"),
        (["x"], {"rank": True, "pairs": "all"}, "--pairs or --rank, got both"),
    ],
)
def test_bad_options_say_what_would_do(scores: Path, tmp_path: Path, reward, options, message):
    with pytest.raises(ValueError, match=message):
        label(scores, tmp_path / "p.jsonl", Asked(reward=reward), **options)
    assert not (tmp_path / "p.jsonl").exists()


def test_a_margin_of_a_reward_that_is_not_there_is_refused_before_anything_is_scored(tmp_path: Path):
    save_reds(tmp_path / "reds", 2)
    with pytest.raises(ValueError, match="--tie-margin clip: expected one of the rewards that count"):
        label(tmp_path / "reds", tmp_path / "p.jsonl", Asked(reward=[RED], prompt=["a"]), tie_margin=["clip=1"])
    assert not (tmp_path / "p.jsonl.journal").exists()


def test_what_is_read_is_not_written_over_and_scores_do_not_mix_with_pictures(scores: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="is what is read"):
        label(scores, scores)
    with pytest.raises(ValueError, match="got both"):
        label([scores, tmp_path / "reds"], tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match="expected no --set"):
        label(scores, tmp_path / "p.jsonl", Asked(reward=["x"], settings=["x.y=1"]))
    with pytest.raises(ValueError, match=r"ends in \.jsonl or \.parquet"):
        label(scores, tmp_path / "p.csv")


def test_files_of_scores_are_read_as_one_unless_their_weights_contradict(scores: Path, tmp_path: Path):
    (file,) = save_reds(tmp_path / "more", 1)
    more = tmp_path / "more.jsonl"
    write_scores(more, [ScoreRow(str(file), "alone", {"x": 7.0, "y": 7.0})], ["x", "y"], {})
    with pytest.raises(ValueError, match=r"y weighs 1 there and 0\.5 in another"):
        label([scores, more], tmp_path / "p.jsonl")
    label([scores, more], tmp_path / "p.jsonl", Asked(reward=["y"]))
    assert [record.prompt for record in records(tmp_path / "p.jsonl")] == ["a", "b", "alone"]


def test_rewards_that_contradict_a_label_break_the_row(scores: Path, tmp_path: Path):
    label(scores, tmp_path / "p.parquet")
    table = pq.read_table(tmp_path / "p.parquet")
    place = table.schema.get_field_index("label_0")
    for labels, count in (([0.0, 1.0], 1), ([0.5, 0.5], 2)):
        changed = table.drop(["label_1"]).set_column(place, "label_0", [labels])
        pq.write_table(changed, tmp_path / f"{count}.parquet")
        broken = [row for row in read_pickapic(str(tmp_path / f"{count}.parquet")) if isinstance(row, BrokenRow)]
        assert len(broken) == count and "contradict each other" in broken[0].reason


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_training_takes_what_was_written(tmp_path: Path, suffix: str):
    import random

    from diffalign.shapes.grammar import parse
    from diffalign.shapes.render import render
    from diffalign.trainer import train

    captions = ["a red circle", "two blue squares", "a green cross above a red square"]
    lines = []
    for number, caption in enumerate(caption for caption in captions for _ in range(4)):
        shown = caption if number % 2 else captions[(number // 4 + 1) % 3]
        render(parse(shown), random.Random(number), 64).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": caption}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    out = tmp_path / f"pairs{suffix}"
    label(tmp_path / "list.jsonl", out, Asked(reward=["shapes", "tiny-clip=0.01"], device="cpu"), pairs="all")
    name = "jsonl" if suffix == ".jsonl" else "pickapic"
    overrides = [f"data={{name: {name}, path: {out}, tie: half}}", "max_train_steps=2", "train_batch_size=2",
                 f"output_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}", "validation_prompts=[]",
                 "report_to=none", "cpu=true"]  # fmt: skip
    assert train("tiny-sd/dpo", overrides).steps == 2
