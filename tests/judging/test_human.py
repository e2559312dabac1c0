"""People as a reward: what waits, what comes of their choices, and a run that is killed meanwhile."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.judging.command import Place
from diffalign.judging.store import CHOSEN, SKIP, TIE, Choice
from diffalign.rewards import load_reward

PICTURES = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue", "white", "black")]
PROMPTS = ["a cat", "a cat", "a cat", "a dog", "a dog"]


def people(reward: Any, *verdicts: dict[str, tuple[str, int]]) -> None:
    """Each judge answers while the reward waits: prompt -> (verdict, which of its pictures)."""
    left = list(enumerate(verdicts))

    def answer() -> None:
        number, said = left.pop(0)
        [folder] = [path for path in reward.folder.iterdir() if path.is_dir()]
        found, store, _ = Place(str(folder)).open()
        for group in found.groups:
            verdict, place = said[group.prompt]
            picks = (list(group.pictures)[place],) if verdict == CHOSEN else ()
            store.add(Choice(f"judge {number}", group.key, verdict, picks))

    reward.wait = answer


def test_a_call_waits_for_people_and_gives_their_votes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = load_reward("human", folder=str(tmp_path), judges=2)
    people(reward, {"a cat": (CHOSEN, 1), "a dog": (TIE, 0)}, {"a cat": (CHOSEN, 2), "a dog": (CHOSEN, 0)})
    with caplog.at_level(logging.WARNING):
        scores = reward(PICTURES, PROMPTS).tolist()
    assert scores == [0, 0.5, 0.5, 0.75, 0.25]
    assert caplog.text.count(f"2 prompts wait to be judged: diffalign judge {tmp_path} --watch") == 1


def test_a_run_that_was_killed_finds_what_was_said(tmp_path: Path) -> None:
    first = load_reward("human", folder=str(tmp_path))
    people(first, {"a cat": (CHOSEN, 0), "a dog": (CHOSEN, 1)})
    said = first(PICTURES, PROMPTS).tolist()
    again = load_reward("human", folder=str(tmp_path))
    again.wait = lambda: pytest.fail("waits for what was said")
    assert again(PICTURES, PROMPTS).tolist() == said == [1, 0, 0, 0, 1]


def test_what_all_skip_and_what_is_alone_has_no_score(tmp_path: Path) -> None:
    reward = load_reward("human", folder=str(tmp_path))
    people(reward, {"a cat": (CHOSEN, 0), "a dog": (SKIP, 0)})
    scores = reward([*PICTURES, PICTURES[0]], [*PROMPTS, "a bird"]).tolist()
    assert scores[:3] == [1, 0, 0] and all(math.isnan(score) for score in scores[3:])
    assert math.isnan(load_reward("human", folder=str(tmp_path / "b"))(PICTURES[:1], ["a cat"]).item())


@pytest.mark.parametrize(("keywords", "message"), [({"ask": "pairs"}, "ask"), ({"judges": 0}, "at least one judge")])
def test_bad_keywords_are_named(keywords: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward("human", folder=str(tmp_path), **keywords)
