"""What rewards say of pictures, and a thread that asks them while the next pictures are drawn."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, final

import torch
from torch import Tensor

log = logging.getLogger("diffalign")


@dataclass(frozen=True)
class Scores:
    """Of B pictures; not a number where a picture has no score, which drops the picture and not the run.

    Attributes:
        total: [B], sum of weight times term.
        terms: reward -> [B], as the reward gave it.
        weights: reward -> number; one of 0 is only logged.
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    weights: Mapping[str, float]


Score = Callable[[Tensor, Sequence[str]], "Future[Scores]"]  # (latents [B, ...], B prompts); the answer may come later


def scores_of(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Scores:
    """With the sum over rewards that count."""
    counted = [weights[name] * term for name, term in terms.items() if weights[name]]
    return Scores(torch.stack(counted).sum(0), terms, weights)


def joined(parts: Sequence[Scores]) -> Scores:
    """One below the other."""
    names = parts[0].terms
    return Scores(
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.terms[name] for part in parts]) for name in names},
        parts[0].weights,
    )


def known(scores: Scores) -> Future[Scores]:
    """An answer that is there already."""
    answer: Future[Scores] = Future()
    answer.set_result(scores)
    return answer


@final
class Background:
    """Calls in a thread of their own, in the order in which they are given, so that drawing does not wait for scores.

    A call that raises is made again; one that still does after `retries` more, or hangs for longer than `timeout`,
    gives what `missing` makes of its arguments, and the log says so. A ValueError is bad input and comes out as it is.

    Args:
        call: what is to be done.
        missing: the same arguments -> the answer without one.
        timeout: seconds; None waits for ever. A call that hangs is left to itself.
        retries: further attempts after an error.
    """

    def __init__(
        self, call: Callable[..., Any], missing: Callable[..., Any], timeout: float | None = None, retries: int = 2
    ) -> None:
        self.call, self.missing, self.timeout, self.retries = call, missing, timeout, retries
        self._waiting: SimpleQueue[tuple[Future[Any], tuple[Any, ...]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, *arguments: Any) -> Future[Any]:
        """The answer, later."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="rewards")
            self._thread.start()
        answer: Future[Any] = Future()
        self._waiting.put((answer, arguments))
        return answer

    def _work(self) -> None:
        while True:
            answer, arguments = self._waiting.get()
            try:
                answer.set_result(self._patiently(arguments))
            except BaseException as error:
                answer.set_exception(error)

    def _patiently(self, arguments: tuple[Any, ...]) -> Any:
        problem = ""
        for _ in range(1 + self.retries):
            done, value = within(self.timeout, lambda: self.call(*arguments))
            if not done:
                problem = f"no answer after {self.timeout:g} seconds"
                break  # it still hangs there: another attempt would wait behind it
            if not isinstance(value, Exception):
                return value
            if isinstance(value, ValueError):
                raise value
            problem = f"{type(value).__name__}: {value}"
        log.warning("rewards: %s; %d pictures are left without a score", problem, len(arguments[0]))
        return self.missing(*arguments)


def within(timeout: float | None, call: Callable[[], Any]) -> tuple[bool, Any]:
    """(whether it was done in time, what it gave or the exception that it raised)."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    if timeout is None:
        run()
    else:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(timeout)
    return (True, found[0]) if found else (False, None)


def unscored(latents: Tensor, weights: Mapping[str, float]) -> Scores:
    """Of pictures that no reward has answered for."""
    nothing = torch.full((len(latents),), torch.nan, device=latents.device)
    return Scores(nothing, dict.fromkeys(weights, nothing), weights)
