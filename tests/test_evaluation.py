from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from miniatures import stable_diffusion
from PIL import Image
from scoring_helpers import Redder

from diffalign.evaluation import evaluate, open_picture, score_images
from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.lora import attach_lora, load_lora, save_lora
from diffalign.prompts import Prompt
from diffalign.rewards.base import Card, Weighted, dispatch
from diffalign.rewards.pairwise import WinRate
from diffalign.rewards.preprocess import to_pictures
from diffalign.rewards.shapes import Shapes
from diffalign.statistics import bootstrap_mean, mean_gain

PROMPTS = [Prompt("a red circle", "single"), Prompt("a blue cross", "single"), Prompt("two red crosses", "count")]
QUICK = {"steps": 2, "guidance_scale": 2.0, "batch_size": 4, "seed": 11}


class Channel:
    """Mean of one channel of the picture."""

    card = Card("level", (0.0, 255.0), "tests", "none", "none", False, None, True, "formula only")

    def __init__(self, name, index):
        self.name, self.index = name, index

    def __call__(self, images, prompts):
        return dispatch(self.name, images, prompts, exact=self._exact, differentiable=None)

    def _exact(self, pictures, prompts):
        return torch.tensor([float(np.asarray(picture)[..., self.index].mean()) for picture in pictures])


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA that changes the pictures: its B is drawn instead of zero."""
    pipe = load_pipeline(stable_diffusion())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attach_lora(pipe, rank=4):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return save_lora(pipe, tmp_path_factory.mktemp("lora"))


@pytest.fixture
def pipe():
    return load_pipeline(stable_diffusion())


def pictures_of(pipe, seeds, prompts=PROMPTS):
    pixels = generate(pipe, [p.text for p in prompts], seeds=seeds, steps=2, guidance_scale=2.0, batch_size=1)
    return to_pictures(pixels)


def test_the_report_is_that_of_the_pictures_with_and_without_the_lora(pipe, lora):
    red = Channel("red", 0)
    report = evaluate(pipe, PROMPTS, red, lora=lora, **QUICK)
    base = red(pictures_of(pipe, [11, 12, 13]), ["x"] * 3).double().numpy()
    load_lora(pipe, lora)
    aligned = red(pictures_of(pipe, [11, 12, 13]), ["x"] * 3).double().numpy()
    row = report["rewards"]["red"]
    assert not np.array_equal(base, aligned)
    assert row["base"] == pytest.approx(base.mean(), abs=0.01)
    assert row["aligned"] == pytest.approx(aligned.mean(), abs=0.01)
    assert row["gain"] == pytest.approx((aligned - base).mean(), abs=0.01)
    expected = mean_gain(base, aligned, np.random.default_rng(11))
    assert row["gain_ci95"] == pytest.approx([expected.low, expected.high], abs=0.02)
    assert row["win_rate"] == pytest.approx((aligned > base).mean())
    assert (report["prompts"], report["draws"], report["seed"], report["lora"]) == (3, 3, 11, str(lora))


def test_the_lora_is_taken_off_again(pipe, lora):
    before = generate(pipe, ["a red circle"], seeds=[0], steps=2)
    evaluate(pipe, PROMPTS[:1], Channel("red", 0), lora=lora, **QUICK)
    first = evaluate(pipe, PROMPTS[:1], Channel("red", 0), lora=lora, **QUICK)
    assert torch.equal(generate(pipe, ["a red circle"], seeds=[0], steps=2), before)
    assert evaluate(pipe, PROMPTS[:1], Channel("red", 0), lora=lora, **QUICK) == first


def test_without_a_lora_only_the_base_is_scored(pipe):
    report = evaluate(pipe, ["a red circle", "tea"], Channel("red", 0), **QUICK)
    assert set(report["rewards"]["red"]) == {"missing", "base", "base_ci95"}
    assert report["lora"] is None
    assert report["per_category"] == {}


def test_the_report_does_not_depend_on_the_batch(pipe, lora):
    one, many = (
        evaluate(pipe, PROMPTS, Channel("red", 0), lora=lora, seeds_per_prompt=2, **QUICK | {"batch_size": size})
        for size in (1, 5)
    )
    for key, value in one["rewards"]["red"].items():
        assert many["rewards"]["red"][key] == pytest.approx(value, abs=0.05)


def test_seeds_of_a_prompt_are_averaged_before_the_interval(pipe):
    red = Channel("red", 0)
    report = evaluate(pipe, PROMPTS, red, seeds_per_prompt=2, **QUICK)
    repeated = [p for p in PROMPTS for _ in range(2)]
    scores = red(pictures_of(pipe, range(11, 17), repeated), ["x"] * 6).double().numpy()
    interval = bootstrap_mean(scores.reshape(3, 2).mean(1), np.random.default_rng(11))
    assert report["draws"] == 6
    assert report["rewards"]["red"]["base_ci95"] == pytest.approx([interval.low, interval.high], abs=0.05)


def test_categories_and_terms_have_rows_of_their_own(pipe, lora):
    both = Weighted({"red": (Channel("red", 0), 1.0), "blue": (Channel("blue", 2), -2.0)})
    report = evaluate(pipe, PROMPTS, both, lora=lora, **QUICK)
    rows = report["rewards"]
    assert set(rows) == {"red", "blue", "weighted"}
    assert rows["weighted"]["gain"] == pytest.approx(rows["red"]["gain"] - 2 * rows["blue"]["gain"], abs=1e-3)
    single, count = (report["per_category"][name] for name in ("single", "count"))
    assert (single["prompts"], count["prompts"]) == (2, 1)
    mean = (2 * single["rewards"]["red"]["base"] + count["rewards"]["red"]["base"]) / 3
    assert rows["red"]["base"] == pytest.approx(mean)
    assert count["rewards"]["red"]["gain_ci95"] == [None, None]  # one prompt


def test_a_prompt_without_a_score_counts_on_neither_side_and_is_counted(pipe, lora, tmp_path):
    class Unsure(Channel):
        def __call__(self, images, prompts):
            scores = super().__call__(images, prompts)
            return torch.where(torch.tensor([prompt == PROMPTS[1].text for prompt in prompts]), float("nan"), scores)

    told, unsure = (evaluate(pipe, PROMPTS, reward, lora=lora, **QUICK) for reward in (Channel("r", 0), Unsure("r", 0)))
    rest = evaluate(pipe, [PROMPTS[0], PROMPTS[2]], Channel("r", 0), lora=lora, **QUICK | {"seed": 11})
    assert told["rewards"]["r"]["missing"] == 0 and unsure["rewards"]["r"]["missing"] == 1
    assert unsure["per_category"]["count"]["rewards"] == told["per_category"]["count"]["rewards"]
    assert (
        unsure["per_category"]["single"]["rewards"]["r"]["base"]
        == rest["per_category"]["single"]["rewards"]["r"]["base"]
    )
    nothing = evaluate(pipe, PROMPTS[1:2], Unsure("r", 0), lora=lora, out=tmp_path / "out", **QUICK)["rewards"]["r"]
    assert nothing["missing"] == 1 and nothing["gain"] is None and nothing["gain_ci95"] == [None, None]


def test_a_reward_that_compares_sees_all_pictures_of_a_prompt_whatever_the_batch(pipe):
    twice = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]  # nine draws, six of them of one prompt
    options = QUICK | {"batch_size": 2}
    row = evaluate(pipe, twice, WinRate(preference=Redder()), seeds_per_prompt=3, **options)["rewards"]["winrate"]
    assert row["missing"] == 0 and row["base"] == pytest.approx(0.5)  # half of all comparisons are won


def test_a_pass_rate_has_wilsons_interval(pipe):
    report = evaluate(pipe, PROMPTS, Shapes(), **QUICK)  # random weights draw nothing right
    row = report["rewards"]["shapes"]
    assert (row["base"], row["base_ci95"]) == (0, [0.0, pytest.approx(3.8414588 / (3 + 3.8414588))])


def test_out_holds_the_pictures_that_were_scored_and_the_report(pipe, lora, tmp_path):
    red, out = Channel("red", 0), tmp_path / "runs" / "evaluation"
    report = evaluate(pipe, PROMPTS, red, lora=lora, out=out, **QUICK)
    assert json.loads((out / "evaluation.json").read_text()) == report
    files = sorted((out / "aligned").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    assert score_images(red, files, ["x"] * 3)["red"] == pytest.approx(
        red([Image.open(file) for file in files], ["x"] * 3).tolist()
    )
    assert np.mean(score_images(red, files, ["x"] * 3)["red"]) == pytest.approx(report["rewards"]["red"]["aligned"])
    assert [entry.name for entry in out.parent.iterdir()] == ["evaluation"]


def test_a_failure_leaves_nothing_half_written(pipe, tmp_path):
    out = tmp_path / "evaluation"
    with pytest.raises(ValueError, match="a cup of tea"):
        evaluate(pipe, [*PROMPTS, "a cup of tea"], Shapes(), out=out, **QUICK | {"batch_size": 2})
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_is_never_overwritten(pipe, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds something already"):
        evaluate(pipe, PROMPTS, Shapes(), out=tmp_path, **QUICK)
    assert (tmp_path / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ("a red circle", {}, "at least one prompt, got 'a red circle'"),
        (PROMPTS, {"seeds_per_prompt": 0}, "at least one seed"),
        (PROMPTS, {"seed": -1}, "from 0 on"),
        (PROMPTS, {"batch_size": 0}, "batch_size of at least 1"),
        (PROMPTS, {"lora": "absent"}, "absent"),
    ],
)
def test_misuse_is_named(pipe, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(pipe, prompts, Shapes(), **QUICK | options)


def test_score_images_takes_files_and_pictures_and_every_term(tmp_path):
    pictures = [Image.new("RGB", (8, 8), (level, 0, 2 * level)) for level in (10, 20, 30)]
    pictures[1].save(tmp_path / "1.png")
    both = Weighted({"red": (Channel("red", 0), 1.0), "blue": (Channel("blue", 2), 0.5)})
    told = []
    scores = score_images(
        both, [pictures[0], tmp_path / "1.png", str(tmp_path / "1.png")], ["x"] * 3, batch_size=2, progress=told.append
    )
    assert scores == {"red": [10, 20, 20], "blue": [20, 40, 40], "weighted": [20, 40, 40]}
    assert told == [2, 1]
    assert score_images(Weighted({"r": (Channel("red", 0), 1.0)}), pictures, ["x"] * 3) == {"r": [10, 20, 30]}


def test_score_images_names_what_is_wrong(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    assert open_picture(tmp_path / "whole.png").size == (64, 64)
    for name in ("cut.png", "text.png", "absent.png"):
        with pytest.raises(ValueError, match=f"{name}: expected a whole picture"):
            score_images(Channel("red", 0), [tmp_path / name], ["x"])
    with pytest.raises(ValueError, match="2 prompts for 1 pictures"):
        score_images(Channel("red", 0), [tmp_path / "whole.png"], ["x", "y"])
    with pytest.raises(ValueError, match="at least one picture, got none"):
        score_images(Channel("red", 0), [], [])
