"""Answers of judges: as the released parsers read them where they can be read, and missing where those guess."""

from __future__ import annotations

import oracle
import pytest

from diffalign.rewards.judge_parse import (
    PAIR_PARSERS,
    imagedoctor_scores,
    parse_better,
    parse_final_score,
    parse_image_is_better,
    parse_imagedoctor,
    parse_score,
    parse_score_tag,
)

ROWS = oracle.golden("judge_parse")
# why ours is missing where the released code gives a number; a row that is not here is to be equal
GUESSED = {
    "qwenvl_score": {
        "<Score>5</Score> <Score>1</Score>": ("the first of two scores, as 1.0", "once, found it 2 times"),
        "Score: 4": ("0.0 for an answer without its tag", "once, found it 0 times"),
        "<Score>3.5</Score>": ("0.0 for what is no integer", "expected an integer"),
        "<Score> 3 </Score>": ("0.0 for blanks inside the tag", "expected an integer"),
        "": ("0.0 for nothing", "found it 0 times"),
    },
    "unifiedreward_final": {
        "final score: 4": ("0.0 for another spelling of the label", "found it 0 times"),
        "Final Score: 0.5": ("0.0 for a score below the scale", "from 1 to 5, got 0.5"),
        "Final Score: 10": ("1.0, the first digit, for a score above the scale", "from 1 to 5, got 10"),
        "none": ("0.0 for no score", "found it 0 times"),
    },
    "imagedoctor": {
        "Semantic Alignment score: 1.4\nAesthetic score: -1": ("clamps, and 0.0 for two that are absent", "got 1.4"),
        "<answer>semantic  alignment Score : .5</answer> Aesthetic score: 0.9": (
            "0.0 for three that it does not find inside the answer", "found it 0 times",
        ),
        "": ("0.0 for nothing", "found it 0 times"),
    },
}  # fmt: skip


def rows(name: str) -> list[pytest.param]:
    return [pytest.param(row, id=repr(row["text"][:40])) for row in ROWS[name]]


def test_every_exception_is_a_row():
    for name, guessed in GUESSED.items():
        assert set(guessed) < {row["text"] for row in ROWS[name]}, "at least one row must be equal"


@pytest.mark.parametrize("row", rows("qwenvl_score"))
def test_score_tags_as_flow_grpo_reads_them(row: dict):
    if row["text"] in GUESSED["qwenvl_score"]:
        with pytest.raises(ValueError, match=GUESSED["qwenvl_score"][row["text"]][1]):
            parse_score_tag(row["text"], (0.0, 5.0))
    else:
        assert parse_score_tag(row["text"], (0.0, 5.0)) / 5 == row["score"] > 0


@pytest.mark.parametrize("row", rows("unifiedreward_final"))
def test_final_scores_as_flow_grpo_reads_them(row: dict):
    if row["text"] in GUESSED["unifiedreward_final"]:
        with pytest.raises(ValueError, match=GUESSED["unifiedreward_final"][row["text"]][1]):
            parse_final_score(row["text"], (1.0, 5.0))
    else:
        assert parse_final_score(row["text"], (1.0, 5.0)) == row["score"] > 0


@pytest.mark.parametrize("row", rows("imagedoctor"))
def test_four_scores_as_imagedoctor_reads_them(row: dict):
    if row["text"] in GUESSED["imagedoctor"]:
        with pytest.raises(ValueError, match=GUESSED["imagedoctor"][row["text"]][1]):
            parse_imagedoctor(row["text"], (0.0, 1.0))
        return
    labels = {"semantic_alignment": "Semantic Alignment", "aesthetic": "Aesthetic", "plausibility": "Plausibility",
              "overall": "Overall Impression"}  # fmt: skip
    assert {key: imagedoctor_scores(row["text"])[label] for key, label in labels.items()} == {
        key: row[key] for key in labels
    }
    assert parse_imagedoctor(row["text"], (0.0, 1.0)) == pytest.approx(row["combined"], abs=1e-7)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("It is all there.\nScore: 7", 7),
        ("**Score: 7.5**", 7.5),
        ("**Score:** 10.", 10),
        ("Score: 1 (nothing of it)", 1),
        ("<think>Score: 3? No.</think>\nScore: 9", 9),
        ("\tScore :  8 \r\n", 8),
    ],
)
def test_a_plain_score_is_read(text: str, score: float):
    assert parse_score(text, (1.0, 10.0)) == score


@pytest.mark.parametrize(
    "text",
    [
        "Score: 11", "Score: 0", "Score: -3", "Score: 1e1", "Score: nan", "Score: inf", "Score: seven", "Score:",
        "Score: 7/10", "Score: 7 or 8", "Score: 7-8", "Score: 7 out of 10", "Score: 7\nScore: 7", "Score: 7,5",
        "Score: 7 Score: 8", "Score: \uff17", "Score: \u0667", "Score: 1_0", "Score: 0x7", "score: 7", "Scores: 7", "7",
        "<think>Score: 7", "<think>Score: 7</think>", "Score: 1**0", "Score:\n7", "",
    ],
)  # fmt: skip
def test_anything_else_is_no_score(text: str):
    with pytest.raises(ValueError):
        parse_score(text, (1.0, 10.0))


@pytest.mark.parametrize(("text", "win"), [("Better: 1", 1), ("x\nBetter: 2.", 0), ("**Better: 0**", 0.5)])
def test_which_is_better_is_read(text: str, win: float):
    assert parse_better(text, (0.0, 1.0)) == win


@pytest.mark.parametrize(
    ("text", "win"),
    [("So: Image 1 is better.", 1), ("<answer>Image 2 is better</answer>", 0), ("Both images are equally good.", 0.5)],
)
def test_which_image_is_better_is_read(text: str, win: float):
    assert parse_image_is_better(text, (0.0, 1.0)) == win


@pytest.mark.parametrize("name", PAIR_PARSERS)
@pytest.mark.parametrize(
    "text",
    ["Better: 3", "Better: 1 or 2", "Better: 1\nBetter: 2", "Better: first", "Better: 0.5", "Image 3 is better",
     "Image 1 is better. Image 2 is better.", "Image 1 is worse", "Image 1 is better Image 1 is better", "", "1"],
)  # fmt: skip
def test_no_verdict_is_none(name: str, text: str):
    with pytest.raises(ValueError):
        PAIR_PARSERS[name](text, (0.0, 1.0))
