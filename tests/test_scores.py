"""Rewards in a thread of their own: order, retries, time limits, and pictures that stay without a score."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.scores import Background, Scores, joined, scores_of, unscored


def background(call: Callable[..., Any], **options: Any) -> Background:
    return Background(call, lambda latents, prompts: unscored(latents, {"red": 1.0}), **options)


def red(latents: Tensor, prompts: list[str]) -> Scores:
    return scores_of({"red": latents.sum(1)}, {"red": 1.0})


def test_answers_come_in_order_and_work_goes_on_meanwhile() -> None:
    gate = threading.Event()

    def slow(latents: Tensor, prompts: list[str]) -> Scores:
        gate.wait(10)
        return red(latents, prompts)

    worker = background(slow)
    answers = [worker.submit(torch.full((2, 1), float(k)), ["a"] * 2) for k in range(3)]
    assert not any(answer.done() for answer in answers)  # the caller was not held up
    gate.set()
    assert [answer.result(10).total.tolist() for answer in answers] == [[0, 0], [1, 1], [2, 2]]


def test_an_error_is_tried_again_and_then_leaves_the_pictures_without_a_score(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def failing(latents: Tensor, prompts: list[str]) -> Scores:
        calls.append(len(latents))
        if len(calls) < 3 or len(latents) == 5:
            raise ConnectionError("no route")
        return red(latents, prompts)

    worker = background(failing, retries=2)
    assert worker.submit(torch.ones(2, 1), ["a"] * 2).result(10).total.tolist() == [1, 1] and calls == [2, 2, 2]
    with caplog.at_level(logging.WARNING):
        found = worker.submit(torch.ones(5, 1), ["a"] * 5).result(10)
    assert calls[3:] == [5, 5, 5] and found.total.isnan().all() and found.terms["red"].isnan().all()
    assert "ConnectionError: no route; 5 pictures are left without a score" in caplog.text


def test_a_call_that_hangs_is_given_up_and_the_next_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    def hanging(latents: Tensor, prompts: list[str]) -> Scores:
        if len(latents) == 3:
            released.wait(30)
        return red(latents, prompts)

    worker = background(hanging, timeout=0.2)
    started = time.monotonic()
    stuck, fine = worker.submit(torch.ones(3, 1), ["a"] * 3), worker.submit(torch.ones(1, 1), ["a"])
    with caplog.at_level(logging.WARNING):
        assert stuck.result(10).total.isnan().all() and fine.result(10).total.tolist() == [1]
    assert time.monotonic() - started < 10 and "no answer after 0.2 seconds" in caplog.text
    released.set()


def test_bad_input_is_no_matter_of_patience() -> None:
    calls: list[int] = []

    def refusing(latents: Tensor, prompts: list[str]) -> Scores:
        calls.append(1)
        raise ValueError("expected a caption")

    with pytest.raises(ValueError, match="expected a caption"):
        background(refusing).submit(torch.ones(1, 1), [""]).result(10)
    assert calls == [1]


def test_only_rewards_with_a_weight_count_and_parts_join() -> None:
    weights = {"a": 2.0, "b": 0.0}
    parts = [scores_of({"a": torch.tensor([k]), "b": torch.tensor([torch.nan])}, weights) for k in (1.0, 3.0)]
    whole = joined(parts)
    assert whole.total.tolist() == [2, 6] and whole.terms["a"].tolist() == [1, 3] and whole.terms["b"].isnan().all()
