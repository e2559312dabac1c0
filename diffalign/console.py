"""How commands speak: results on stdout, everything else on stderr, one sentence for an error. No torch here."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
DEBUG = "DIFFALIGN_DEBUG"
HOME = ("127.0.0.1", "localhost", "::1", "[::1]")  # addresses that this machine alone can reach
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Result:
    """What a command found: `data` for machines, and for people `text` and a table of cells below its header."""

    data: dict[str, Any]
    text: str = ""
    header: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    ok: bool = True


def show(result: Result, as_json: bool) -> None:
    """Prints a result and exits with 1 if it says that something is not as it should be."""
    if as_json:
        print(json.dumps(_plain(result.data), indent=2, ensure_ascii=False, allow_nan=False, default=str))
    else:
        console = Console(soft_wrap=True, highlight=False, markup=False)
        if result.rows:
            # names stay whole whatever the width: they are typed again
            columns = [Column(title, no_wrap=not place, overflow="fold") for place, title in enumerate(result.header)]
            table = Table(*columns, box=None, pad_edge=False)
            for row in result.rows:
                table.add_row(*row)
            console.print(table)
        if result.text:
            console.print(result.text)
    if not result.ok:
        sys.exit(FAILED)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Sends what libraries print while a command works, and our log, to stderr, so that stdout is the result alone."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False, show_level=False)
    logger = logging.getLogger("diffalign")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def progress_bar(what: str, total: int, *, done: int = 0, hidden: bool = False) -> Iterator[Callable[..., None]]:
    """A bar on stderr; the yielded function is told how many more are done, and what to show beside it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[state]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task(what, total=total, completed=done, state="")

        def advance(more: int, state: str = "") -> None:
            progress.update(task, advance=more, state=state)

        yield advance


def guarded(run: Callable[[], Any]) -> int:
    """Runs a command; the exit code. Bad input is one sentence and 2, a run that failed one sentence and 1.

    With DIFFALIGN_DEBUG=1 errors keep their traceback.
    """
    if os.environ.get(DEBUG):
        run()
        return 0
    try:
        run()
    except (ValueError, OSError) as error:
        return _say(error, BAD_INPUT)
    except RuntimeError as error:
        return _say(error, FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _say(error: Exception, code: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"diffalign: {text}", file=sys.stderr)
    return code


def _plain(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
