"""GenEval's rules: whether boxes show what a prompt asks for. Ghosh et al. 2023, arXiv 2310.11513; MIT code.

Pure functions over what a detector found. Per class the most confident boxes are kept; each requirement takes as many
of them as it counts, most confident first, then their colors and positions are judged. A requirement has at most one
fault, the first of: too few, wrong color, no target, wrong side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
MOST = 16  # boxes per class
SLACK = 0.1  # of the two sizes together: centers that are nearer than that are on no side of each other
SIDE = 0.5  # of the distance: about 60 degrees to either side still count as left
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Detection:
    """One object of a picture; `mask` [H, W], if the detector has one, says which pixels are its own."""

    name: str
    box: Box
    confidence: float
    mask: NDArray[np.bool_] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Requirement:
    """`count` objects of a class (or fewer than that, where it is excluded).

    Args:
        color: of all of them; a row of `COLORS`.
        position: (a row of `RELATIONS`, the index of an earlier requirement): every one of these objects stands so to
            every one of those.
    """

    name: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Task:
    """What one prompt asks for; `counting` ones trust only confident boxes."""

    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()
    counting: bool = False


@dataclass(frozen=True)
class Fault:
    """Why a requirement does not hold: `kind` is count, color, target, position or exclude."""

    kind: str
    name: str
    wanted: str
    found: str

    def __str__(self) -> str:
        return f"{self.name}: wanted {self.wanted}, found {self.found}"


@dataclass(frozen=True)
class Verdict:
    """The faults, in the order of the requirements, of a task with `total` requirements."""

    faults: tuple[Fault, ...]
    total: int

    @property
    def ok(self) -> bool:
        """Whether all hold: GenEval's own score."""
        return not self.faults

    @property
    def score(self) -> float:
        """The share that holds, in [0, 1]."""
        return 1 - len(self.faults) / self.total


Found = Mapping[str, Sequence[Detection]]
NameColors = Callable[[Sequence[Detection], str], Sequence[str]]  # objects of a class -> a row of COLORS for each


def keep(
    detections: Iterable[Detection], confidence: float = CONFIDENCE, most: int = MOST, max_overlap: float = 1.0
) -> dict[str, list[Detection]]:
    """Class -> its boxes above `confidence`, most confident first, at most `most`.

    Args:
        max_overlap: a box that overlaps a more confident one of its class by this much is dropped; 1 keeps all.
    """
    classes: dict[str, list[Detection]] = {}
    for detection in detections:
        if detection.confidence > confidence:
            classes.setdefault(detection.name, []).append(detection)
    ordered = {name: sorted(group, key=lambda d: -d.confidence)[:most] for name, group in classes.items()}
    return {name: _apart(group, max_overlap) for name, group in ordered.items()}


def overlap(a: Box, b: Box) -> float:
    """Intersection over union in [0, 1] of boxes whose last row and column belong to them: 0 to 9 are 10 pixels."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def relations(a: Box, b: Box) -> tuple[str, ...]:
    """On which sides of `b` the box `a` lies: none, one, or two next to each other, in the order of `RELATIONS`.

    The offset of the centers is shortened, per axis, by a tenth of both boxes' sizes, then divided by its length before
    that. A side counts where more than half is left.
    """
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    slack = [SLACK * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1)]
    left_over = [math.copysign(max(abs(o) - s, 0.0), o) for o, s in zip(offset, slack, strict=True)]
    if max(map(abs, left_over)) < 1e-3:
        return ()
    x, y = (value / math.hypot(*offset) for value in left_over)
    return tuple(side for side, share in zip(RELATIONS, (-x, x, -y, y), strict=True) if share > SIDE)


def judge(found: Found, task: Task, name_colors: NameColors) -> Verdict:
    """The verdict on what `keep` left of a picture's detections.

    Args:
        name_colors: called only for requirements with a color of which there are enough objects.
    """
    groups: list[Sequence[Detection] | None] = []  # None for a requirement that does not hold: nothing can be beside it
    faults = []
    for wanted in task.include:
        group = found.get(wanted.name, ())[: wanted.count]
        fault = _count(wanted, group) or _color(wanted, group, name_colors) or _position(wanted, group, task, groups)
        groups.append(None if fault else group)
        faults.append(fault)
    faults += [_excluded(unwanted, len(found.get(unwanted.name, ()))) for unwanted in task.exclude]
    return Verdict(tuple(fault for fault in faults if fault), len(faults))


def _apart(group: Sequence[Detection], max_overlap: float) -> list[Detection]:
    kept: list[Detection] = []
    for detection in group:
        if max_overlap == 1 or all(overlap(other.box, detection.box) < max_overlap for other in kept):
            kept.append(detection)
    return kept


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0.0) * max(box[3] - box[1] + 1, 0.0)


def _count(wanted: Requirement, group: Sequence[Detection]) -> Fault | None:
    if len(group) >= wanted.count:
        return None
    return Fault("count", wanted.name, str(wanted.count), str(len(group)))


def _color(wanted: Requirement, group: Sequence[Detection], name_colors: NameColors) -> Fault | None:
    if wanted.color is None:
        return None
    colors = list(name_colors(group, wanted.name))
    if colors.count(wanted.color) >= wanted.count:
        return None
    found = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
    return Fault("color", wanted.name, f"{wanted.count} {wanted.color}", found)


def _position(
    wanted: Requirement, group: Sequence[Detection], task: Task, groups: Sequence[Sequence[Detection] | None]
) -> Fault | None:
    if wanted.position is None:
        return None
    side, index = wanted.position
    targets, target_name = groups[index], task.include[index].name
    if targets is None:
        return Fault("target", wanted.name, f"{side} {target_name}", f"no such {target_name}")
    for sides in (relations(one.box, target.box) for one in group for target in targets):
        if side not in sides:
            return Fault("position", wanted.name, f"{side} {target_name}", " and ".join(sides) or "on no side")
    return None


def _excluded(unwanted: Requirement, count: int) -> Fault | None:
    if count < unwanted.count:
        return None
    return Fault("exclude", unwanted.name, f"fewer than {unwanted.count}", str(count))
