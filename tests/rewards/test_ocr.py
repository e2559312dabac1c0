"""The OCR reward against the cases that Flow-GRPO's released code scored; engines here are functions, and rapidocr."""

from __future__ import annotations

import logging
import random
import sys
from pathlib import Path

import oracle
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffalign.rewards import load_reward
from diffalign.rewards.base import Explains
from diffalign.rewards.ocr import levenshtein, quoted, similarity

PICTURE = Image.new("RGB", (8, 8))
PROMPT = 'a sign that says "Open Now"'


def reads(*lines):
    return load_reward("ocr", engine=lambda picture: list(lines))


def blue(picture: Image.Image) -> list[tuple[str, float]]:
    """Reads the words in blue pictures only."""
    return [("open now", float(picture.getpixel((0, 0))[2] > 100))]


@pytest.mark.parametrize("case", oracle.golden("ocr")["cases"], ids=lambda case: str(case["lines"]))
def test_it_is_the_official_reward(case):
    reward = reads(*[tuple(line) for line in case["lines"]])
    assert reward([PICTURE], [case["prompt"]]).item() == pytest.approx(case["reward"], abs=1e-7)


def test_pictures_keep_their_prompts():
    pictures = [Image.new("RGB", (4, 4), color) for color in ("blue", "red", "blue", "blue")]
    prompts = [PROMPT, PROMPT, 'an "open" sign', 'a "closed" sign']
    reward = load_reward("ocr", engine=blue)
    whole = reward(pictures, prompts).tolist()
    assert whole[:3] == [1.0, 0.0, 1.0] and whole[3] < 1
    assert whole == [reward([picture], [prompt]).item() for picture, prompt in zip(pictures, prompts, strict=True)]


def test_distances_by_hand_and_as_a_metric():
    known = {("kitten", "sitting"): 3, ("", "abc"): 3, ("abc", ""): 3, ("flaw", "lawn"): 2, ("same", "same"): 0}
    assert {pair: levenshtein(*pair) for pair in known} == known
    rng = random.Random(0)
    words = ["".join(rng.choices("abc", k=rng.randrange(8))) for _ in range(12)]
    for a in words:
        for b in words:
            assert levenshtein(a, b) == levenshtein(b, a) <= max(len(a), len(b))
            assert (levenshtein(a, b) == 0) == (a == b)
            assert all(levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c) for c in words)


def test_one_letter_of_the_target_costs_its_share_and_letters_around_it_nothing():
    assert [similarity(text, "shop") for text in ("shop", "xshopx", "sh op", "SHOP", "shp", "shpo", "no", "")] == [
        1, 1, 1, 1, 0.75, 0.5, 0.25, 0
    ]  # fmt: skip
    assert similarity("nothing at all of it", "ab") == 0  # capped, never negative


def test_a_picture_that_the_engine_fails_on_is_not_a_wrong_text(caplog: pytest.LogCaptureFixture):
    def fails_on_small_ones(picture: Image.Image):
        if picture.width < 8:
            raise RuntimeError("no memory left")
        return [("open now", 0.9)]

    reward = load_reward("ocr", engine=fails_on_small_ones)
    with caplog.at_level(logging.WARNING):
        scores = reward([PICTURE, PICTURE.resize((4, 4)), PICTURE], [PROMPT] * 3)
    assert scores[[0, 2]].tolist() == [1, 1] and scores[1].isnan()
    reason = "the engine failed on a picture of 4 x 4 pixels: RuntimeError('no memory left')"
    assert isinstance(reward, Explains) and reward.reasons == ["", reason, ""]
    assert f"ocr: 1 of 3 pictures have no score; 1 times: {reason}" in caplog.text
    assert reward([PICTURE], [PROMPT]).item() == 1 and reward.reasons == [""]


def test_of_a_clip_and_of_one_prompt_for_all_there_is_a_reason_each():
    def fails_on_black_ones(picture: Image.Image):
        if not picture.getpixel((0, 0))[0]:
            raise RuntimeError
        return [("open now", 0.9)]

    reward = load_reward("ocr", engine=fails_on_black_ones)
    clips = torch.tensor([[9, 9], [9, 0], [9, 9]], dtype=torch.uint8).view(3, 2, 1, 1, 1).expand(3, 2, 3, 4, 4)
    scores = reward(clips, [PROMPT])
    assert scores[[0, 2]].tolist() == [1, 1] and scores[1].isnan()
    failed = "the engine failed on a picture of 4 x 4 pixels: RuntimeError()"
    assert reward.reasons == ["", failed, ""]


@pytest.mark.parametrize("prompt", ["a sign", 'a sign that says "open', 'a "" sign', 'a " " sign', "a 'single' quote"])
def test_a_prompt_without_quoted_text_is_named_before_anything_is_read(prompt: str):
    def engine(picture):
        raise AssertionError("read")

    with pytest.raises(ValueError, match="double quotes") as error:
        load_reward("ocr", engine=engine)([PICTURE], [prompt])
    assert repr(prompt) in str(error.value)


def test_only_the_first_pair_counts():
    assert quoted('"one" and "two"') == "one"
    assert quoted('say "it\'s" "') == "it's"


@pytest.mark.parametrize("found", [None, "text", [("text",)], [("text", "0.9")], [(3, 0.9)]])
def test_an_engine_of_another_kind_is_named(found):
    with pytest.raises(ValueError, match=r"expected the engine to return \[\(text, confidence\)"):
        load_reward("ocr", engine=lambda picture: found)([PICTURE], [PROMPT])


def test_engines_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "engines_of_mine.py").write_text(
        "def read(picture):\n    return [('Open', 0.9)]\n\n\n"
        "class Reader:\n    def __call__(self, picture):\n        return [('Now', 0.9)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("ocr", engine="engines_of_mine:read")([PICTURE], ['"open"']).item() == 1
    assert load_reward("ocr", engine="engines_of_mine:Reader")([PICTURE], ['"now"']).item() == 1
    with pytest.raises(ValueError, match="unknown OCR engine 'rapid', did you mean 'rapidocr'"):
        load_reward("ocr", engine="rapid")
    with pytest.raises(ValueError, match="cannot be imported"):
        load_reward("ocr", engine="no_such_package:read")


def test_pixels_that_want_a_gradient_and_deep_pictures_are_refused():
    with pytest.raises(ValueError, match="no gradient"):
        reads()(torch.zeros(1, 3, 8, 8, requires_grad=True), [PROMPT])
    with pytest.raises(ValueError, match="8 bits per channel"):
        reads()([Image.new("I;16", (8, 8))], [PROMPT])


def test_without_its_packages_rapidocr_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ValueError, match=r"pip install 'diffalign\[ocr\]'"):
        load_reward("ocr")


def test_rapidocr_reads_a_rendered_word():
    pytest.importorskip("rapidocr", reason="rapidocr is not installed: pip install 'diffalign[ocr]'")
    picture = Image.new("RGB", (400, 120), "white")
    ImageDraw.Draw(picture).text((30, 30), "Open Now", fill="black", font=ImageFont.load_default(48))
    empty = Image.new("RGB", (400, 120), "white")
    assert load_reward("ocr")([picture, empty], [PROMPT] * 2).tolist() == [1, 0]
