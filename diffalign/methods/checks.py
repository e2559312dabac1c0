"""What hyper-parameters of several methods must be; each message names the key, the expectation and the value.

`where` is what the key is a keyword of.
"""

from __future__ import annotations

from collections.abc import Iterable

TIME_WEIGHTS = ("native", "eps", "x0", "sigmoid", "snr_clip")  # names that `diffalign.process.time_weight` knows


def check_positive(where: str = "method", /, **values: float) -> None:
    """Raises ValueError for a number that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{where}.{name}: expected a number above 0, got {value}")


def check_not_negative(where: str = "method", /, **values: float) -> None:
    """Raises ValueError for a number below 0."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{where}.{name}: expected a number of at least 0, got {value}")


def check_group(group: int) -> None:
    """Raises ValueError for a group of pictures in which there is nothing to compare."""
    if group < 2:
        raise ValueError(f"method.group: expected at least 2 pictures of a prompt to compare, got {group}")


def check_last(name: str, count: int, steps: int) -> None:
    """Raises ValueError for a number of steps that a walk does not have."""
    if not 1 <= count <= steps:
        raise ValueError(f"method.{name}: expected 1 to {steps} of the walk's steps, got {count}")


def check_choice(name: str, value: str, known: Iterable[str], where: str = "method") -> None:
    """Raises ValueError for a value that is not one of the known."""
    names = list(known)
    if value not in names:
        raise ValueError(f"{where}.{name}: expected one of {', '.join(names)}, got {value!r}")


def check_times(low: float, high: float, weight: str = "native") -> None:
    """Raises ValueError for an empty part of the noise axis, or an unknown timestep weight."""
    check_choice("timestep_weight", weight, TIME_WEIGHTS)
    if not 0 <= low < high <= 1:
        raise ValueError(f"method.time_low, time_high: expected 0 <= low < high <= 1, got {low}, {high}")
