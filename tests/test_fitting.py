"""Batches are sized to the device, and halved where its memory runs out. The device here is a number of pictures."""

from __future__ import annotations

import logging

import pytest
import torch
from PIL import Image

from diffalign import fitting
from diffalign.evaluation import score_images
from diffalign.fitting import Fitted, batch_size_for
from diffalign.manifests import read_manifest
from diffalign.rewards.base import Card, Weighted, dispatch
from diffalign.scoring.engines import score_ahead


class Holds:
    """The red of a picture, as long as no more than `limit` come at once."""

    name = "holds"
    card = Card("level", (0.0, 255.0), "tests", "none", "none", False, 384, True, "formula only")

    def __init__(self, limit: int) -> None:
        self.limit, self.asked = limit, []

    def __call__(self, images, prompts):
        return dispatch(self.name, images, prompts, exact=self._exact, differentiable=None)

    def _exact(self, pictures, prompts):
        self.asked.append(len(pictures))
        if len(pictures) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor([float(picture.getpixel((0, 0))[0]) for picture in pictures])


PICTURES = [Image.new("RGB", (2, 2), (level, 0, 0)) for level in range(11)]


@pytest.mark.parametrize("size", [1, 3, 4, 11, 64])
def test_what_does_not_fit_is_done_in_halves_and_nothing_is_lost(size, caplog):
    reward, told = Holds(limit=3), []
    with caplog.at_level(logging.WARNING):
        scores = score_images(reward, PICTURES, ["x"] * 11, batch_size=size, progress=told.append)
    assert scores == {"holds": [float(level) for level in range(11)]}
    assert sum(told) == 11
    assert sum(count for count in reward.asked if count <= 3) == 11  # none is scored twice
    assert ("do not fit" in caplog.text) == (size > 3)


def test_the_smaller_size_is_kept():
    reward = Holds(limit=3)
    score_images(reward, PICTURES, ["x"] * 11, batch_size=8)
    assert reward.asked == [8, 4, 2, 2, 2, 2, 2, 1]


def test_a_term_that_does_not_fit_leaves_no_score_of_the_others_behind():
    both = Weighted({"large": (Holds(limit=8), 1.0), "small": (Holds(limit=2), 1.0)})
    scores = score_images(both, PICTURES, ["x"] * 11, batch_size=8)
    assert scores["large"] == scores["small"] == [float(level) for level in range(11)]


def test_one_picture_that_does_not_fit_is_a_sentence():
    with pytest.raises(ValueError, match="a single picture does not fit .*bfloat16"):
        score_images(Holds(limit=0), PICTURES, ["x"] * 11)
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        score_images(Holds(limit=9), PICTURES, ["x"] * 11, batch_size=0)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def fail(some: list[int]) -> list[int]:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        Fitted(fail)([1, 2, 3, 4])


def test_what_is_compared_is_not_torn_apart():
    def full(some: list[int]) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ValueError, match="4 pictures that are compared .* smaller --batch-size"):
        Fitted(full, divisible=False)([1, 2, 3, 4])


def test_diffalign_score_halves_too(tmp_path):
    for number, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{number:02d}.png")
    reward = Weighted({"holds": (Holds(limit=3), 1.0)})
    entries = list(read_manifest([tmp_path], ["x"]))
    ((_, first), (_, second)) = score_ahead(reward, [entries[:8], entries[8:]])
    assert [outcome.scores for outcome in (*first, *second)] == [(float(level),) for level in range(11)]
    assert reward.rewards["holds"].asked == [8, 4, 2, 2, 2, 2, 2, 1]


def test_a_gpu_gets_what_half_of_its_free_memory_holds(monkeypatch):
    assert batch_size_for(224, "cuda") == fitting.ON_CPU or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("mem_get_info", (8e9, 16e9)), ("memory_reserved", 3e9), ("memory_allocated", 1e9)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert batch_size_for(224, "cuda") == 128  # 10e9 are free, 5e9 may be used, a picture takes 32e6
    assert batch_size_for(384, "cuda") == 32
    assert batch_size_for(None, "cuda") == batch_size_for(224, "cuda")
    assert batch_size_for(224, "cpu") == fitting.ON_CPU
    assert fitting.fitting(224, 1e6) == 1 and fitting.fitting(64, 1e12) == fitting.MOST


def test_the_largest_reward_decides(monkeypatch):
    asked = []
    monkeypatch.setattr("diffalign.evaluation.batch_size_for", lambda side, device: asked.append((side, device)) or 4)
    score_images(Weighted({"a": (Holds(9), 1.0)}), PICTURES, ["x"] * 11, device="cuda:1")
    assert asked == [(384, "cuda:1")]
