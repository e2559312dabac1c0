"""What `diffalign judge` does once its arguments are read."""

from __future__ import annotations

import logging
import shlex
import socket
import webbrowser
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.arguments import read_pictures
from diffalign.console import HOME, Result
from diffalign.judging.export import preferences
from diffalign.judging.following import Following
from diffalign.judging.groups import ASKS, LEFT_OUT, Found, read_groups, together
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


def rollouts(place: Place) -> list[Place]:
    """The folders in a folder that a run has asked people about (`diffalign.rewards.human`), the oldest first.

    Only those whose database is there: it says what is asked.

    Raises:
        ValueError: not a folder, or a database is given where each has its own.
    """
    path = Path(place.path)
    if place.db:
        raise ValueError("--watch and --db do not go together: every rollout has a database of its own")
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder, in which a run with the reward human puts what it draws; start "
                         f"the run first, or give the folder of its config")  # fmt: skip
    found = [listing.parent for name in LISTINGS for listing in path.glob(f"*/{name}")]
    ready = [folder for folder in found if (folder / DATABASE).exists()]
    return [replace(place, path=str(folder)) for folder in sorted(ready, key=lambda f: (f / DATABASE).stat().st_ctime)]


@dataclass(frozen=True)
class Serving:
    """How the page is reached and by whom; the fields are the options of the command."""

    judge: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    seed: int = 0
    browser: bool = False
    watch: bool = False


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
    session = following(place, serving.seed) if serving.watch else _session(place, serving.seed)
    with server.listen(serving.host, serving.port) as opened:
        url = _address(serving.host, opened.getsockname()[1])
        many = "pictures as they come" if session.count is None else f"{session.count} groups"
        log.info(
            "%s to judge: open %s and stop with Ctrl-C; choices go to %s", many, url, _databases(place, serving.watch)
        )
        if serving.host not in HOME:
            log.warning("--host %s: anybody in the network can see the pictures and judge, under any name",
                        serving.host)  # fmt: skip
        if serving.browser:
            webbrowser.open(url)
        export = _export_command(place, serving.watch)
        server.serve(server.build_app(session, judge, place.path, export, serving.host), opened)
    return _judged([one.open() for one in (rollouts(place) if serving.watch else [place])], place, serving.watch)


def _session(place: Place, seed: int) -> Session:
    found, store, ask = place.open()
    for line in _left_out_lines(found):
        log.info("%s", line)
    return Session(found.groups, store, ask, seed)


def following(place: Place, seed: int) -> Following:
    rollouts(place)  # refuses what is no folder

    def known() -> list[Path]:
        return [Path(one.path) for one in rollouts(place)]

    return Following(known, lambda folder: _session(replace(place, path=str(folder)), seed), place.ask or "best")


def export_choices(place: Place, out: Path, judge: str | None, merge: bool, watch: bool = False) -> Result:
    """Writes what was chosen, of all judges or of one, as preferences; with `watch` of all rollouts in a folder.

    Raises:
        ValueError: what `Place.open` raises, a file that is no .jsonl or is the manifest, or nothing to write.
    """
    path = Path(place.path)
    if out.suffix.lower() != ".jsonl":
        raise ValueError(f"--export {out}: expected a file that ends in .jsonl")
    if out.resolve() in [file.resolve() for file in (path, *(path / name for name in LISTINGS))]:
        raise ValueError(f"--export {out}: is what lists the pictures; choose another file")
    places = rollouts(place) if watch else [place]
    if not any(one.database().exists() for one in places):
        raise ValueError(f"{_databases(place, watch)}: no database of choices there; judge first (diffalign judge "
                         f"{place.path}{' --watch' if watch else ''}), or name it with --db")  # fmt: skip
    opened = [one.open() for one in places]
    said = [store.choices(None if judge is None else named(judge)) for _, store, _ in opened]
    rows = [row for choices, (found, _, _) in zip(said, opened, strict=True)
            for row in preferences(choices, found.groups, merge)]  # fmt: skip
    if not rows:
        of = "" if judge is None else f" of {judge}"
        raise ValueError(
            f"{place.path}: no choice{of} to write yet, {sum(map(len, said))} skipped or of other pictures"
        )
    write_labels(out, rows)
    found = together([found for found, _, _ in opened])
    ties, judges = sum(len(set(row.scores)) == 1 for row in rows), sorted({row.user for row in rows if row.user})
    data = {"out": str(out), "ask": opened[-1][2], "records": len(rows), "ties": ties, "merged": merge,
            "judges": judges, "prompts": len({row.prompt for row in rows}), **_left_out_data(found)}  # fmt: skip
    text = [f"{len(rows)} preferences of {data['prompts']} prompts in {out}, {ties} of them ties"]
    text += _left_out_lines(found)
    text.append(f"look: diffalign data check {out}; train: data={{name: jsonl, path: {out}, ranking: all}}")
    return Result(data, "\n".join(text))


def _judged(opened: Sequence[tuple[Found, Store, str]], place: Place, watch: bool) -> Result:
    found = together([found for found, _, _ in opened])
    progress = _progress([choice for _, store, _ in opened for choice in store.choices()],
                         {group.key for group in found.groups})  # fmt: skip
    groups, where = len(found.groups), _databases(place, watch)
    total = sum(sum(counts.values()) for counts in progress.values())
    data = {"db": where, "groups": groups, "judges": progress, **_left_out_data(found)}
    rows = [(judge, f"{sum(counts.values())} of {groups}", *(str(counts[name]) for name in VERDICTS.values()))
            for judge, counts in progress.items()]  # fmt: skip
    text = f"{total} judged, all saved in {where}" + (f"; write them: {_export_command(place, watch)}" if total else "")
    return Result(data, text, ("judge", "judged", *VERDICTS.values()), rows)


def _progress(choices: Sequence[Choice], groups: set[str]) -> dict[str, dict[str, int]]:
    """Judge -> how many groups were chosen from, are ties, or were skipped."""
    said: dict[str, Counter[str]] = defaultdict(Counter)
    for choice in choices:
        if choice.group in groups:
            said[choice.judge][choice.verdict] += 1
    return {judge: {name: said[judge][verdict] for verdict, name in VERDICTS.items()} for judge in sorted(said)}


def _databases(place: Place, watch: bool) -> str:
    return f"{place.path}/*/{DATABASE}" if watch else str(place.database())


def _address(host: str, port: int) -> str:
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def _export_command(place: Place, watch: bool) -> str:
    options = [word for text in place.prompt for word in ("--prompt", text)]
    options += ["--prompts", place.prompts] if place.prompts else []
    options += ["--db", str(place.db)] if place.db else []
    options += ["--watch"] if watch else []
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
