"""An OpenAI-compatible endpoint on this machine that answers as a test says, and counts."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


@dataclass
class Reply:
    """What goes back: a text becomes a well-formed answer; bytes, and what an error says, go as they are."""

    content: str | bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    finish_reason: str = "stop"
    tokens: int | None = None

    def body(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        if self.status != 200:
            return self.content.encode()
        choice = {"message": {"role": "assistant", "content": self.content}, "finish_reason": self.finish_reason}
        usage = {} if self.tokens is None else {"usage": {"total_tokens": self.tokens}}
        return json.dumps({"choices": [choice], **usage}).encode()


@dataclass
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def parts(self) -> list[dict[str, Any]]:
        (message,) = self.body["messages"]
        assert message["role"] == "user"
        return message["content"]

    @property
    def text(self) -> str:
        assert [part["type"] for part in self.parts[:-1]] == ["image_url"] * (len(self.parts) - 1)
        return self.parts[-1]["text"]

    def picture(self, index: int = 0) -> Image.Image:
        head, _, data = self.parts[index]["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        return Image.open(io.BytesIO(base64.b64decode(data)))

    @property
    def level(self) -> int:
        """The red of the first picture's corner: tests tell pictures apart by it."""
        return self.picture().getpixel((0, 0))[0]


class Loopback:
    """`reply(asked)` answers; `asked` holds the requests, `most` how many were open at the same time."""

    def __init__(self, reply: Callable[[Asked], Reply]) -> None:
        self.reply, self.asked, self.most = reply, [], 0
        self._open, self._lock = 0, threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = Asked(self.path, dict(self.headers), body)
                with loopback.counted(asked):
                    reply = loopback.reply(asked)
                    time.sleep(reply.delay)
                    content = reply.body()
                with contextlib.suppress(OSError):  # who waited too long has gone
                    self.send_response(reply.status)
                    for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    @contextlib.contextmanager
    def counted(self, asked: Asked) -> Iterator[None]:
        with self._lock:
            self.asked.append(asked)
            self._open += 1
            self.most = max(self.most, self._open)
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1

    @contextlib.contextmanager
    def running(self) -> Iterator[Loopback]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def gray(level: int, side: int = 4) -> Image.Image:
    return Image.new("RGB", (side, side), (level,) * 3)
