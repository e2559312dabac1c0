"""The client of chat endpoints, against one on this machine that is rude in every way that is known."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import pytest
from loopback import Asked, Loopback, Reply, gray
from PIL import Image

from diffalign.answers import Answer, AnswerCache, in_order
from diffalign.endpoint import LONGEST_PAUSE, Endpoint

KEY = "sk-a-very-secret-key"
Serve = Callable[..., Loopback]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts an endpoint that gives these replies in turn (the last one for ever), or what a function says."""
    with contextlib.ExitStack() as stack:

        def start(*replies: Reply | Callable[[Asked], Reply]) -> Loopback:
            if callable(replies[0]):
                return stack.enter_context(Loopback(replies[0]).running())
            queue = itertools.chain(replies, itertools.repeat(replies[-1]))
            return stack.enter_context(Loopback(lambda _: next(queue)).running())

        yield start


class Sleeps(list):
    """Stands for time.sleep and notes the pauses."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def endpoint(server: Loopback | str, **keywords: Any) -> Endpoint:
    url = server if isinstance(server, str) else server.url
    return Endpoint(**{"base_url": url, "model": "judge-7b", "sleep": Sleeps(), **keywords})


def test_one_user_turn_with_pictures_before_the_text(serve: Serve):
    server = serve(Reply("fine"))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8), "RGBA")
    assert endpoint(server, max_tokens=77).ask([noise, gray(5)], "Ünïcode\n?") == Answer("fine")
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions" and "Authorization" not in asked.headers
    assert {k: v for k, v in asked.body.items() if k != "messages"} == {
        "model": "judge-7b", "temperature": 0, "max_tokens": 77,
    }  # fmt: skip
    assert asked.text == "Ünïcode\n?" and len(asked.parts) == 3
    np.testing.assert_array_equal(np.asarray(asked.picture(0)), np.asarray(noise.convert("RGB")))  # PNG: no loss
    assert asked.picture(1).getpixel((0, 0)) == (5, 5, 5)


def test_too_many_requests_waits_as_long_as_it_is_told(serve: Serve):
    server = serve(Reply("slow down", 429, {"Retry-After": "7"}), Reply("fine"))
    client = endpoint(server)
    assert client.ask([gray(0)], "?") == Answer("fine")
    assert client._sleep == [7.0] and client.budget.requests == len(server.asked) == 2


def test_retry_after_may_be_a_date(serve: Serve):
    server = serve(Reply("", 503, {"Retry-After": formatdate(time() + 40, usegmt=True)}), Reply("fine"))
    client = endpoint(server)
    assert client.ask([gray(0)], "?").text == "fine"
    assert 30 < client._sleep[0] <= 41


@pytest.mark.parametrize("status", [500, 502, 529])
def test_errors_of_the_server_are_tried_again_with_growing_pauses_up_to_the_cap(serve: Serve, status: int):
    server = serve(Reply("boom", status))
    client = endpoint(server, retries=7)
    answer = client.ask([gray(0)], "?")
    assert answer.text is None and answer.reason == f"answered {status}: boom (tries: 8)"
    assert len(server.asked) == 8 and len(client._sleep) == 7
    full = [min(LONGEST_PAUSE, 2.0**i) for i in range(7)]
    assert all(f / 2 <= pause <= f for f, pause in zip(full, client._sleep, strict=True))
    assert len({round(pause / f, 6) for f, pause in zip(full, client._sleep, strict=True)}) > 1, "no jitter"


def test_the_deadline_ends_the_tries(serve: Serve):
    server = serve(Reply("", 429, {"Retry-After": "3600"}))
    client = endpoint(server, deadline=30.0)
    answer = client.ask([gray(0)], "?")
    assert answer.reason == "answered 429 (tries: 1, no time for another before the deadline of 30 s)"
    assert client._sleep == [] and len(server.asked) == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(b"<html>\n<h1>Welcome</h1>"), "expected JSON, got '<html> <h1>Welcome</h1>'; is base_url"),
        (Reply(b""), "expected JSON, got ''"),
        (Reply(b"[" * 100_000), "expected JSON, got '\\[\\["),
        (Reply(b"\xff\xfe"), "expected JSON"),
        (Reply(b'{"error": {"message": "no such model"}}'), "expected a text in choices.*no such model"),
        (Reply(b'{"choices": []}'), "expected a text"),
        (Reply(b'{"choices": [{"message": {"content": null}}]}'), "expected a text"),
        (Reply(b'{"choices": [{"message": {"content": ["4"]}}]}'), "expected a text"),
        (Reply(b"[4]"), "expected a text"),
        (Reply("Score: 4", finish_reason="length"), "cut after max_tokens"),
        (Reply(b"x" * (5 << 20)), "more than 4 MiB"),
        (Reply("wrong key", 401), "answered 401: .*is the key right"),
        (Reply("nothing here", 404), "answered 404: .*ends in /v1"),
        (Reply("", 302, {"Location": "http://127.0.0.1:9/v1"}), "answered 302"),
    ],
)
def test_what_is_no_answer_is_missing_at_once_with_its_reason(serve: Serve, reply: Reply, reason: str):
    server = serve(reply)
    answer = endpoint(server).ask([gray(0)], "?")
    assert answer.text is None and len(server.asked) == 1
    assert re.search(reason, answer.reason), answer.reason
    assert len(answer.reason) < 400 and answer.reason.isprintable()


def test_an_answer_that_breaks_off_is_asked_for_again(serve: Serve):
    server = serve(Reply(b'{"choices": [', headers={"Content-Length": "500"}), Reply("whole"))
    assert endpoint(server, timeout=5.0).ask([gray(0)], "?") == Answer("whole")


def test_a_slow_endpoint_is_missing(serve: Serve):
    server = serve(Reply("late", delay=0.5))
    answer = endpoint(server, timeout=0.1, retries=1).ask([gray(0)], "?")
    assert answer == Answer(None, "no answer within 0.1 s (tries: 2)")


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_nobody_there_is_an_error_only_if_nobody_ever_was(serve: Serve):
    with pytest.raises(ValueError, match=r"could not be reached: .*refused.*tries: 3.*check that its server runs"):
        endpoint(closed_port(), retries=2).ask([gray(0)], "?")
    with Loopback(lambda _: Reply("busy", 500)).running() as server:
        client = endpoint(server, retries=1)
        client.ask([gray(0)], "?")
    answer = client.ask([gray(1)], "?")
    assert answer.text is None and answer.reason.startswith("could not be reached")


def test_the_budget_of_requests_counts_tries(serve: Serve):
    server = serve(Reply("boom", 500), Reply("one"), Reply("two"))
    client = endpoint(server, max_requests=3)
    answers = [client.ask([gray(i)], "?") for i in range(3)]
    assert [answer.text for answer in answers] == ["one", "two", None]
    assert answers[2].reason == "the budget of 3 requests is spent" and len(server.asked) == 3


def test_the_budget_of_tokens_counts_what_is_reported_also_of_lost_answers(serve: Serve):
    server = serve(Reply("one", tokens=60), Reply("cut", tokens=60, finish_reason="length"), Reply("three"))
    client = endpoint(server, max_total_tokens=100)
    answers = [client.ask([gray(i)], "?") for i in range(3)]
    assert [answer.text for answer in answers] == ["one", None, None] and client.budget.tokens == 120
    assert answers[2].reason == "the budget of 100 tokens is spent" and len(server.asked) == 2


def test_never_more_than_so_many_at_a_time_and_answers_in_order(serve: Serve):
    three = threading.Barrier(3, timeout=30)  # each answer waits until three are asked for

    def reply(asked: Asked) -> Reply:
        three.wait()
        return Reply(str(asked.level), delay=0.02 * (asked.level % 2))

    server = serve(reply)
    client = endpoint(server, workers=3)
    answers = in_order(lambda i: client.ask([gray(i)], "?").text, range(12), workers=12)  # the client's own bound
    assert answers == [str(i) for i in range(12)]
    assert server.most == 3


def test_the_first_error_ends_a_batch():
    begun = []

    def fail(i: int) -> None:
        begun.append(i)
        raise ValueError("nobody there")

    with pytest.raises(ValueError, match="nobody there"):
        in_order(fail, range(1000), workers=2)
    assert len(begun) < 1000


def test_a_question_is_not_asked_twice(serve: Serve, tmp_path: Path):
    server = serve(lambda asked: Reply(f"{asked.level} {asked.text} {asked.body['model']}"))
    first = endpoint(server, cache=tmp_path / "kept").ask([gray(3)], "?")
    again = endpoint(server, cache=tmp_path / "kept", max_requests=0).ask([gray(3)], "?")
    assert first == again == Answer("3 ? judge-7b") and len(server.asked) == 1
    (file,) = (tmp_path / "kept").rglob("*.*")
    assert len(file.parent.name) == 2 and file.parent.parent == tmp_path / "kept"
    assert json.loads(file.read_text())["text"] == first.text


@pytest.mark.parametrize("other", ["picture", "size", "text", "model", "max_tokens"])
def test_every_part_of_a_question_is_part_of_its_key(serve: Serve, tmp_path: Path, other: str):
    server = serve(Reply("fine"))
    endpoint(server, cache=tmp_path).ask([gray(3)], "?")
    client = endpoint(server, cache=tmp_path, **{"model": "other"} if other == "model" else {},
                      **{"max_tokens": 5} if other == "max_tokens" else {})  # fmt: skip
    picture = {"picture": gray(4), "size": gray(3, side=5)}.get(other, gray(3))
    client.ask([picture], "??" if other == "text" else "?")
    assert len(server.asked) == 2


def test_failures_are_not_kept_and_damaged_files_are_asked_again(serve: Serve, tmp_path: Path):
    server = serve(Reply("no", 400), Reply("yes"), Reply("yes again"))
    client = endpoint(server, cache=tmp_path)
    assert client.ask([gray(0)], "?").text is None and not list(tmp_path.iterdir())
    assert client.ask([gray(0)], "?").text == "yes"
    (file,) = tmp_path.rglob("*.json")
    for damage in ("", '{"text": 4}', "[]", "\xff"):
        file.write_text(damage, encoding="latin-1")
        assert AnswerCache(tmp_path).get(file.parent.name + file.stem) is None
    assert client.ask([gray(0)], "?").text == "yes again"
    assert json.loads(file.read_text())["text"] == "yes again" and not list(tmp_path.rglob("*.partial"))


def test_a_cache_that_cannot_be_written_costs_no_answer(serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("in the way")
    client = endpoint(serve(Reply("fine")), cache=tmp_path / "file")
    assert [client.ask([gray(i)], "?").text for i in range(2)] == ["fine"] * 2
    assert caplog.text.count("answers are not kept") == 1


def test_the_key_is_sent_and_nowhere_to_be_seen(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    echo = f"Bearer {KEY} is the key"
    server = serve(Reply(echo), Reply(echo, 403), Reply(echo.encode()), Reply(echo, 500))
    client = endpoint(server, key_variable="JUDGE_KEY", cache=tmp_path, retries=0)
    answers = [client.ask([gray(i)], "?") for i in range(4)]
    assert all(asked.headers["Authorization"] == f"Bearer {KEY}" for asked in server.asked) and len(server.asked) == 4
    assert answers[0].text == "Bearer [key] is the key"
    seen = [*map(repr, answers), caplog.text, repr(vars(client)), *(f.read_text() for f in tmp_path.rglob("*.json"))]
    with pytest.raises(ValueError) as error:
        endpoint(closed_port(), key_variable="JUDGE_KEY", retries=0).ask([gray(0)], "?")
    for said in [*seen, str(error.value), repr(error.getrepr(showlocals=False))]:
        assert KEY not in said


def test_a_key_that_is_none_is_named_by_its_variable_only(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="environment variable 'NO_KEY', got nothing"):
        endpoint("http://127.0.0.1/v1", key_variable="NO_KEY")
    for bad in ("sk-secret\r\nX: y", "sk-secrét"):
        monkeypatch.setenv("NO_KEY", bad)
        with pytest.raises(ValueError, match="got something else") as error:
            endpoint("http://127.0.0.1/v1", key_variable="NO_KEY")
        assert "sk-" not in str(error.value)


def test_the_environment_is_not_searched_for_keys(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("http_proxy", closed_port())  # not asked for an address of this machine
    server = serve(Reply("fine"))
    assert endpoint(server).ask([], "?").text == "fine" and "Authorization" not in server.asked[0].headers


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"base_url": "127.0.0.1:8000/v1"}, "expected an address such as"),
        ({"base_url": "file:///etc/passwd"}, "expected an address such as"),
        ({"base_url": "http://host /v1"}, "expected an address such as"),
        ({"base_url": "https://me:secret@host/v1"}, "without user, password"),
        ({"base_url": "https://host/v1?key=secret"}, "without user, password"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"timeout": 0.0}, "timeout: expected a number above 0"),
        ({"deadline": float("nan")}, "deadline: expected a number above 0"),
        ({"retries": -1}, "retries: expected at least 0, got -1"),
        ({"max_requests": -1}, "max_requests: expected at least 0"),
    ],
)
def test_wrong_settings_are_named(keywords: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        endpoint("http://127.0.0.1:8000/v1", **keywords)
    assert "secret" not in str(error.value)


def test_a_picture_that_cannot_be_sent_is_an_error(serve: Serve):
    with pytest.raises(ValueError, match="8 bits per channel"):
        endpoint(serve(Reply("fine"))).ask([Image.new("I;16", (4, 4))], "?")
