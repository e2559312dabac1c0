"""What of another library's error goes into a message."""

from __future__ import annotations

import pytest

from diffalign.errors import first_line, lines


@pytest.mark.parametrize(
    ("said", "first"), [("\n no such file\nhint", "no such file"), ("", "KeyError"), (" \n", "KeyError")]
)
def test_an_error_is_its_first_line_or_its_type(said: str, first: str) -> None:
    error = type("KeyError", (Exception,), {})(said)
    assert first_line(error) == first and first_line(error, 4) == first[:4]


def test_the_last_line_is_there_too() -> None:
    assert lines(ValueError("Traceback\n  in a worker\nit broke"))[-1] == "it broke"
