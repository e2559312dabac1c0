"""What `diffalign judge` does once its arguments are read."""

from __future__ import annotations

import logging
import shlex
import socket
import webbrowser
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.arguments import read_pictures
from diffalign.console import Result
from diffalign.judging.export import preferences
from diffalign.judging.groups import ASKS, LEFT_OUT, Found, read_groups
from diffalign.judging.session import Session, named
from diffalign.judging.store import CHOSEN, SKIP, TIE, Choice, Store, agreed, open_store
from diffalign.labeling.files import write_labels
from diffalign.manifests import LISTINGS
from diffalign.scoring.command import NAMED, reason
from diffalign.table import unknown

log = logging.getLogger("diffalign")

DATABASE = "judgments.sqlite"  # in the folder of pictures, or beside a manifest under its name
VERDICTS = {CHOSEN: "chosen", TIE: "ties", SKIP: "skipped"}


@dataclass(frozen=True)
class Place:
    """Pictures, and the database of what was said of them.

    Args:
        prompt, prompts: for pictures without a prompt, as for `diffalign score`.
        db: None for the one beside the pictures.
        ask: None for what the database asks, else for the best.
    """

    path: str
    prompt: Sequence[str] = ()
    prompts: str | None = None
    db: Path | None = None
    ask: str | None = None

    def database(self) -> Path:
        """The file of the database."""
        path = Path(self.path)
        return self.db or (path / DATABASE if path.is_dir() else path.with_name(f"{path.name}.{DATABASE}"))

    def open(self) -> tuple[Found, Store, str]:
        """The groups, their database, and what is asked.

        Raises:
            ValueError: an unknown `ask`, no group, or a database of something else.
            OSError: the database cannot be read or written.
        """
        if self.ask is not None and self.ask not in ASKS:
            raise unknown("--ask", self.ask, ASKS)
        ask = agreed(self.database(), self.ask) or "best"
        found = read_groups(read_pictures([self.path], self.prompt, self.prompts), ask)
        if not found.groups:
            said = "; ".join([_left_out(found), *map(reason, found.broken[:1])]).strip("; ")
            raise ValueError(f"{self.path}: expected a prompt with two different pictures or more, found none"
                             + (f" ({said})" if said else ""))  # fmt: skip
        return found, open_store(self.database(), found.groups, ask, self.path), ask


@dataclass(frozen=True)
class Serving:
    """How the page is reached and by whom; the fields are the options of the command."""

    judge: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    seed: int = 0
    browser: bool = False


def judge_pictures(place: Place, serving: Serving) -> Result:
    """Serves the page until it is stopped; then how far every judge has come.

    Raises:
        ValueError: what `Place.open` raises, no server installed, or an address that cannot be had.
    """
    try:
        from diffalign.judging import server
    except ImportError as error:
        raise ValueError("diffalign judge needs Starlette and uvicorn: pip install 'diffalign[judge]'") from error
    judge = None if serving.judge is None else named(serving.judge)
    found, store, ask = place.open()
    for line in _left_out_lines(found):
        log.info("%s", line)
    session = Session(found.groups, store, ask, serving.seed)
    with server.listen(serving.host, serving.port) as opened:
        url = _address(serving.host, opened.getsockname()[1])
        log.info("%d groups to judge: open %s and stop with Ctrl-C; choices go to %s", len(found.groups), url,
                 store.path)  # fmt: skip
        if serving.host not in server.HOME:
            log.warning("--host %s: anybody in the network can see the pictures and judge, under any name",
                        serving.host)  # fmt: skip
        if serving.browser:
            webbrowser.open(url)
        server.serve(server.build_app(session, judge, place.path, _export_command(place), serving.host), opened)
    return _judged(found, store, _export_command(place))


def export_choices(place: Place, out: Path, judge: str | None, merge: bool) -> Result:
    """Writes what was chosen, of all judges or of one, as preferences.

    Raises:
        ValueError: what `Place.open` raises, a file that is no .jsonl or is the manifest, or nothing to write.
    """
    path = Path(place.path)
    if out.suffix.lower() != ".jsonl":
        raise ValueError(f"--export {out}: expected a file that ends in .jsonl")
    if out.resolve() in [file.resolve() for file in (path, *(path / name for name in LISTINGS))]:
        raise ValueError(f"--export {out}: is what lists the pictures; choose another file")
    if not place.database().exists():
        raise ValueError(f"{place.database()}: no database of choices there; judge first (diffalign judge "
                         f"{place.path}), or name it with --db")  # fmt: skip
    found, store, ask = place.open()
    choices = store.choices(None if judge is None else named(judge))
    rows = list(preferences(choices, found.groups, merge))
    if not rows:
        of = "" if judge is None else f" of {judge}"
        raise ValueError(f"{store.path}: no choice{of} to write yet, {len(choices)} skipped or of other pictures")
    write_labels(out, rows)
    ties, judges = sum(len(set(row.scores)) == 1 for row in rows), sorted({row.user for row in rows if row.user})
    data = {"out": str(out), "ask": ask, "records": len(rows), "ties": ties, "merged": merge, "judges": judges,
            "prompts": len({row.prompt for row in rows}), **_left_out_data(found)}  # fmt: skip
    text = [f"{len(rows)} preferences of {data['prompts']} prompts in {out}, {ties} of them ties"]
    text += _left_out_lines(found)
    text.append(f"look: diffalign data check {out}; train: data={{name: jsonl, path: {out}, ranking: all}}")
    return Result(data, "\n".join(text))


def _judged(found: Found, store: Store, export: str) -> Result:
    progress = _progress(store.choices(), {group.key for group in found.groups})
    groups = len(found.groups)
    total = sum(sum(counts.values()) for counts in progress.values())
    data = {"db": str(store.path), "groups": groups, "judges": progress, **_left_out_data(found)}
    rows = [(judge, f"{sum(counts.values())} of {groups}", *(str(counts[name]) for name in VERDICTS.values()))
            for judge, counts in progress.items()]  # fmt: skip
    text = f"{total} judged, all saved in {store.path}" + (f"; write them: {export}" if total else "")
    return Result(data, text, ("judge", "judged", *VERDICTS.values()), rows)


def _progress(choices: Sequence[Choice], groups: set[str]) -> dict[str, dict[str, int]]:
    """Judge -> how many groups were chosen from, are ties, or were skipped."""
    said: dict[str, Counter[str]] = defaultdict(Counter)
    for choice in choices:
        if choice.group in groups:
            said[choice.judge][choice.verdict] += 1
    return {judge: {name: said[judge][verdict] for verdict, name in VERDICTS.items()} for judge in sorted(said)}


def _address(host: str, port: int) -> str:
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def _export_command(place: Place) -> str:
    options = [word for text in place.prompt for word in ("--prompt", text)]
    options += ["--prompts", place.prompts] if place.prompts else []
    options += ["--db", str(place.db)] if place.db else []
    return shlex.join(["diffalign", "judge", place.path, *options, "--export", "preferences.jsonl"])


def _left_out(found: Found) -> str:
    return "; ".join(f"{found.counts[name]} {said}" for name, said in LEFT_OUT.items() if found.counts.get(name))


def _left_out_lines(found: Found) -> list[str]:
    lines = [f"left out: {_left_out(found)}"] if _left_out(found) else []
    lines += [f"left out: {reason(row)}" for row in found.broken[:NAMED]]
    if len(found.broken) > NAMED:
        lines.append(f"{len(found.broken)} left out in all; --json names every one")
    return lines


def _left_out_data(found: Found) -> Mapping[str, Any]:
    return {
        "left_out": {name: found.counts.get(name, 0) for name in LEFT_OUT},
        "named": [{"where": row.source, "reason": row.reason} for row in found.broken],
    }
