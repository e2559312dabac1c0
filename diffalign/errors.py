"""What an error of another library says, cut down for a message of ours."""

from __future__ import annotations


def lines(error: BaseException) -> list[str]:
    """The lines of what it says, at least one: the name of its type if it says nothing."""
    return str(error).strip().splitlines() or [type(error).__name__]


def first_line(error: BaseException, longest: int | None = None) -> str:
    """The first of them, cut after `longest` letters; None for all of it."""
    return lines(error)[0][:longest]
