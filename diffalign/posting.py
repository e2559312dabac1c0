"""One POST of JSON with an API key, and all that may go wrong with it; `diffalign.endpoint` decides about another try.

Only the standard library: which HTTP package is there changes with the version of the hub's client.
"""

from __future__ import annotations

import time
import urllib.request
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

LARGEST_ANSWER = 4 << 20  # bytes; more is no answer of a judge
SHORTEST_SECRET = 8  # "EMPTY", which some servers want as a key, may stand in an answer
AGAIN = (408, 425, 429)  # and all from 500 on
ADVICE = {
    401: "; is the key right?",
    403: "; may this key use the model?",
    404: "; is base_url the address that ends in /v1, and is model its name?",
}


class Failure(Exception):
    """One try that gave no answer.

    Args:
        again: whether another try may do better.
        reached: whether the endpoint answered at all.
        pause: seconds that it asks to be left alone.
    """

    def __init__(self, reason: str, *, again: bool = False, reached: bool = True, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.again, self.reached, self.pause = reason, again, reached, pause


def opener_for(url: str) -> urllib.request.OpenerDirector:
    """No redirects; no proxy for this machine itself, else what the environment says."""
    host = urlsplit(url).hostname or ""
    local = host in ("localhost", "::1") or host.startswith("127.")
    return urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if local else []))


def post(
    opener: urllib.request.OpenerDirector, url: str, body: bytes, *, key: str, timeout: float, end: float
) -> bytes:
    """What the endpoint said, without the key should it repeat it: answers are kept and reasons are logged.

    Args:
        key: sent as a bearer token; empty for none.
        timeout: seconds without a sign of life.
        end: when all of it must be there, on `time.monotonic`.

    Raises:
        Failure: there is no answer with a status of success.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, body, headers, method="POST")
    seconds = max(0.001, min(timeout, end - time.monotonic()))
    try:
        with opener.open(request, timeout=seconds) as response:
            return _without(key, _read(response, end))
    except HTTPError as error:
        with error:
            raise _refusal(error, key) from None
    except URLError as error:  # no connection, or one that broke before all was sent
        raise Failure(f"could not be reached: {one_line(error.reason)}", again=True, reached=False) from None
    except TimeoutError:
        raise Failure(f"no answer within {seconds:.3g} s", again=True) from None
    except (OSError, HTTPException) as error:
        raise Failure(f"the connection broke ({type(error).__name__})", again=True) from None


def one_line(said: object, longest: int = 200) -> str:
    """The beginning of what somebody else said, on one line and printable."""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= longest else f"{line[:longest]} ..."


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host, and turn the POST into a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _read(response: Any, end: float) -> bytes:
    chunks, size = [], 0
    while chunk := response.read1(1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > LARGEST_ANSWER:
            raise Failure(f"the answer has more than {LARGEST_ANSWER >> 20} MiB")
        if time.monotonic() > end:  # the timeout is one of silence; bytes that drip would go on for ever
            raise Failure("the answer had not ended at the deadline", again=True)
    if response.length:
        raise Failure(f"the answer broke off {response.length} bytes before its end", again=True)
    return b"".join(chunks)


def _refusal(error: HTTPError, key: str) -> Failure:
    try:
        said = one_line(_without(key, error.read(2000)))
    except (OSError, HTTPException):
        said = ""
    again = error.code in AGAIN or error.code >= 500
    pause = _seconds(error.headers.get("Retry-After")) if again else 0.0
    reason = f"answered {error.code}{': ' if said else ''}{said}{ADVICE.get(error.code, '')}"
    return Failure(reason, again=again, pause=pause)


def _without(key: str, raw: bytes) -> bytes:
    return raw.replace(key.encode(), b"[key]") if len(key) >= SHORTEST_SECRET else raw


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header: seconds or a date; 0 for none and for what is neither."""
    value = (retry_after or "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
