"""Folders of pictures to judge, and the server of `diffalign judge` in a thread or as a program of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.data.readers import read_jsonl
from diffalign.data.records import BrokenRow, PreferenceRecord
from diffalign.judging.command import Place, export_choices
from diffalign.judging.following import Following
from diffalign.judging.groups import Group, read_groups
from diffalign.judging.server import build_app, listen, web_server
from diffalign.judging.session import Session
from diffalign.judging.store import open_store
from diffalign.manifests import read_manifest


def save_groups(folder: Path, prompts: Sequence[str], each: int = 3, first: int = 0) -> Path:
    """As `diffalign generate` leaves it: `each` pictures of every prompt, no two alike, and generations.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, prompt in enumerate(prompt for prompt in prompts for _ in range(each)):
        red, green = divmod(number + first, 200)
        Image.new("RGB", (64, 48), (red, green, 90)).save(folder / f"{number:05d}.png")
        lines.append(json.dumps({"image": f"{number:05d}.png", "prompt": prompt, "seed": number}) + "\n")
    (folder / "generations.jsonl").write_text("".join(lines))
    return folder


def groups_of(folder: Path, ask: str = "best") -> Sequence[Group]:
    """The groups of a folder in which nothing is broken."""
    found = read_groups(read_manifest([folder]), ask)
    assert not found.broken
    return found.groups


def session_of(folder: Path, ask: str = "best", seed: int = 0) -> Session:
    """With its database beside the pictures, where the command puts it."""
    groups = groups_of(folder, ask)
    return Session(groups, open_store(folder / "judgments.sqlite", groups, ask, str(folder)), ask, seed)


def choose(session: Session, judge: str, pick: int | None = 0, verdict: str = "chosen") -> dict[str, Any]:
    """An answer to the group that is next: the picture at a place of the manifest, or a verdict without one."""
    group = session.by_key[session.look(judge)["group"]["key"]]
    picks = [list(group.pictures)[pick]] if verdict == "chosen" and pick is not None else []
    return session.choose(judge, group.key, verdict, picks)


def exported(folder: Path, judge: str | None = None, merge: bool = False) -> list[PreferenceRecord]:
    """What `diffalign judge FOLDER --export` writes, as training reads it."""
    out = folder.parent / "out" / "preferences.jsonl"
    export_choices(Place(str(folder)), out, judge, merge)
    rows = list(read_jsonl(str(out)))
    assert not [row for row in rows if isinstance(row, BrokenRow)]
    return [row for row in rows if isinstance(row, PreferenceRecord)]


@contextlib.contextmanager
def answering(session: Session | Following, judge: str | None = None) -> Iterator[str]:
    """The address of a server in a thread."""
    server = web_server(build_app(session, judge, "pictures", "diffalign judge pictures --export p.jsonl", "127.0.0.1"))
    with listen("127.0.0.1", 0) as opened:
        url = f"http://127.0.0.1:{opened.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(30)


@contextlib.contextmanager
def program(folder: Path, *words: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`diffalign judge FOLDER ...` as a program, and its address."""
    command = [sys.executable, "-m", "diffalign.cli", "judge", str(folder), "--port", str(port), "--json", *words]
    log = folder.parent / "server.log"
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True,
                                   env={**os.environ, "COLUMNS": "1000"})  # fmt: skip
    try:
        yield process, _address(process, log)
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[str], log: Path, seconds: float = 120) -> str:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"open (http://\S+)", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def get(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, content and headers of an answer, whatever the status."""
    return _answered(urllib.request.Request(url, headers=headers))


def post(url: str, action: str, kind: str = "application/json", **said: Any) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an action."""
    request = urllib.request.Request(f"{url}/{action}", json.dumps(said).encode(), {"Content-Type": kind})
    status, content, _ = _answered(request)
    return status, json.loads(content)


def _answered(request: urllib.request.Request) -> tuple[int, bytes, dict[str, str]]:
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read(), dict(reply.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)
