"""A client of OpenAI-compatible chat endpoints (vLLM, SGLang, OpenAI ...): pictures and a text go in, one answer comes.

An answer that cannot be had is missing with its reason, never a stand-in.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final
from urllib.parse import urlsplit

from PIL import Image

from diffalign.answers import Answer, AnswerCache, Unreached
from diffalign.posting import Failure, one_line, opener_for, post
from diffalign.rewards.preprocess import to_rgb

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 20.0  # seconds between two tries: doubled each time up to the cap, half of it drawn


@final
class Endpoint:
    """POST base_url/chat/completions: one user turn, the pictures as PNG before the text, temperature 0.

    It is an `Asker`, and may be asked from several threads. Answers are kept under the hash of the whole request
    (model, pictures as sent, text, sampling options), not of the address: give two endpoints that serve different
    models under one name a folder each.

    Args:
        base_url: up to and with /v1, such as http://127.0.0.1:8000/v1. Redirects are not followed.
        model: the name under which the endpoint serves it.
        key_variable: environment variable that holds the API key; without it none is sent. The key itself is never
            kept, logged, or part of a message.
        timeout: seconds without a sign of life after which one request is given up.
        deadline: seconds that one answer may take with all its tries.
        retries: further tries after 429, 5xx, a timeout or a broken connection.
        workers: requests at the same time, at most.
        max_tokens: of one answer; an answer that is cut there is missing.
        cache: folder where answers are kept; a question that is in there is not sent again.
        max_requests: further ones are not sent; tries count. None for no bound.
        max_total_tokens: no request is sent once the endpoint reported so many; those under way still end.
        sleep: for tests.

    Raises:
        ValueError: an address that is not http(s), or that holds a password or a query; a number that is too small; a
            variable that is not set or holds no key.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        key_variable: str | None = None,
        timeout: float = 60.0,
        deadline: float = 600.0,
        retries: int = 5,
        workers: int = 8,
        max_tokens: int = 1024,
        cache: str | Path | None = None,
        max_requests: int | None = None,
        max_total_tokens: int | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        _check_least(1, workers=workers, max_tokens=max_tokens, timeout=timeout, deadline=deadline)
        _check_least(0, retries=retries, max_requests=max_requests, max_total_tokens=max_total_tokens)
        self.base_url, self.model, self.key_variable = _checked(base_url), model, key_variable
        self.timeout, self.deadline, self.retries = timeout, deadline, retries
        self.workers, self.max_tokens = workers, max_tokens
        self.budget = Budget(max_requests, max_total_tokens)
        self._cache = None if cache is None else AnswerCache(Path(cache).expanduser())
        self._sleep, self._random = sleep, random.Random()
        self._slots, self._reached = threading.BoundedSemaphore(workers), False
        self._opener = opener_for(self.base_url)
        self._key()  # a variable that is not set is said now, not at the first picture

    def ask(self, pictures: Sequence[Image.Image], text: str) -> Answer:
        """The answer to `text`, which follows the pictures.

        Raises:
            ValueError: the endpoint was never reached, or a picture has more than 8 bits per channel.
        """
        body = self._body(pictures, text)
        name = hashlib.sha256(body).hexdigest()
        if self._cache and (kept := self._cache.get(name)) is not None:
            return Answer(kept)
        answer = self._insist(body)
        if self._cache and answer.text is not None:
            self._cache.put(name, answer.text, model=self.model)
        return answer

    def _body(self, pictures: Sequence[Image.Image], text: str) -> bytes:
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_url(p)}} for p in pictures]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        request = {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": self.max_tokens}
        return json.dumps(request).encode("ascii")  # json writes all else as \u....

    def _insist(self, body: bytes) -> Answer:
        end = time.monotonic() + self.deadline
        tries = 0
        while True:
            try:
                return Answer(self._send(body, end))
            except Failure as failure:
                pause = max(failure.pause, self._backoff(tries))
                late = time.monotonic() + pause > end
                tries += 1
                if not failure.again or late or tries > self.retries:
                    return self._missing(failure, tries, late)
            self._sleep(pause)

    def _backoff(self, tries: int) -> float:
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2**tries) * self._random.uniform(0.5, 1.0)

    def _missing(self, failure: Failure, tries: int, late: bool) -> Answer:
        if not failure.reached and not self._reached:
            raise Unreached(
                f"{self.base_url}: expected an OpenAI-compatible endpoint, but it {failure.reason} (tries: {tries}); "
                f"check that its server runs, that host and port are right, and that this machine may reach them"
            ) from None  # the failure's own trace holds the key
        if not failure.again:
            return Answer(None, failure.reason)
        limit = f", no time for another before the deadline of {self.deadline:g} s" if late else ""
        return Answer(None, f"{failure.reason} (tries: {tries}{limit})")

    def _send(self, body: bytes, end: float) -> str:
        key = self._key()
        with self._slots:
            self.budget.take()
            try:
                url = f"{self.base_url}/chat/completions"
                raw = post(self._opener, url, body, key=key, timeout=self.timeout, end=end)
            except Failure as failure:
                self._reached |= failure.reached
                raise
        self._reached = True
        data = _decoded(raw)
        self.budget.add_tokens(_tokens(data))
        return self._text(data, raw)

    def _text(self, data: object, raw: bytes) -> str:
        match data:
            case {"choices": [{"finish_reason": "length"}, *_]}:
                raise Failure(f"the answer was cut after max_tokens ({self.max_tokens}); give more")
            case {"choices": [{"message": {"content": str(text)}}, *_]}:
                return text
        raise Failure(f"expected a text in choices[0].message.content, got {one_line(raw)!r}")

    def _key(self) -> str:
        if self.key_variable is None:
            return ""
        key = os.environ.get(self.key_variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():  # http.client would quote a bad one in its error
            raise ValueError(f"key_variable: expected the API key in the environment variable {self.key_variable!r}, "
                             f"got {'something else' if key else 'nothing'}; set it before the start")  # fmt: skip
        return key


class Budget:
    """Counts requests and tokens, and refuses what is beyond the bounds; safe between threads.

    Args:
        max_requests: None for no bound.
        max_tokens: prompt and answer together, as the endpoint reports them; None for no bound.
    """

    def __init__(self, max_requests: int | None, max_tokens: int | None) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = 0
        self._lock = threading.Lock()

    def take(self) -> None:
        """Counts one more request.

        Raises:
            Failure: a bound is reached.
        """
        with self._lock:
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise Failure(f"the budget of {self.max_requests} requests is spent")
            if self.max_tokens is not None and self.tokens >= self.max_tokens:
                raise Failure(f"the budget of {self.max_tokens} tokens is spent")
            self.requests += 1

    def add_tokens(self, count: int) -> None:
        """Counts what the endpoint reported for one answer."""
        with self._lock:
            self.tokens += count


def _checked(base_url: str) -> str:
    parts = urlsplit(base_url)
    clean = base_url.isascii() and base_url.isprintable() and " " not in base_url
    if not clean or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("base_url: expected an address such as http://127.0.0.1:8000/v1, got something else")
    if parts.username or parts.password or parts.query or parts.fragment:  # not shown: it may be a secret
        raise ValueError(
            f"base_url: expected an address without user, password, query and fragment, got one with them at host "
            f"{parts.hostname}; a key goes into an environment variable (key_variable)"
        )
    return base_url.rstrip("/")


def _check_least(least: int, **numbers: float | None) -> None:
    for name, value in numbers.items():
        strict = least == 1 and isinstance(value, float)
        if value is not None and not (value > 0 if strict else value >= least):
            raise ValueError(f"{name}: expected {'a number above 0' if strict else f'at least {least}'}, got {value}")


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    to_rgb(picture).save(file, "PNG", compress_level=1)  # sent once: quick is better than small
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _decoded(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise Failure(f"expected JSON, got {one_line(raw)!r}; is base_url the address that ends in /v1?") from None


def _tokens(data: object) -> int:
    match data:
        case {"usage": {"total_tokens": int(reported)}}:
            return max(0, reported)
    return 0
