"""Judges any clip against a caption of the moving shapes world, frame by frame and half by half.

Each frame is looked at as a picture is (`diffalign.shapes.verify`). In each half of the clip each object's places are
fitted by a straight line; what the line covers in the half is its travel, which is compared with what the caption says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffalign.shapes.clips import Clip
from diffalign.shapes.grammar import Thing
from diffalign.shapes.motion import DIRECTIONS, HALVES, Motion, MovingScene, parse_moving
from diffalign.shapes.verify import Verdict, verify

# in pixels of a 64-pixel picture (`verify.WORKING_SIZE`), in half a clip; what is drawn is 4 to 14, or 0
LEAST_TRAVEL = 2.5  # of something that moves
MOST_DRIFT = 1.5  # of something that stands still
FAST = 8.0  # from here on it is quick
STRAIGHT = 2.0  # along the way at least so many times what is across it
STEADY = 0.75  # share of a half's frames that must show the scene


@dataclass(frozen=True)
class Half:
    """Of a clip.

    Attributes:
        steady: share of its frames that show the scene of the caption.
        shown: mean of what the verifier of pictures gives its frames, in [0, 1].
        travel: (dx, dy) in pixels of 64 of each thing of the caption, NaN where it is seen in fewer than two frames.
        as_said: of each thing, whether its travel is what the caption says.
        wrong: what is not as the caption says.
    """

    steady: float
    shown: float
    travel: tuple[tuple[float, float], ...]
    as_said: tuple[bool, ...]
    wrong: tuple[str, ...]

    @property
    def score(self) -> float:
        """Mean of what the frames show and of the share of things that go where they should."""
        return (self.shown + float(np.mean(self.as_said))) / 2


@dataclass(frozen=True)
class ClipVerdict:
    """`ok` when nothing is wrong in either half; `score` in [0, 1] is the share of facts that hold, 1 only when ok."""

    ok: bool
    score: float
    halves: tuple[Half, ...]
    frames: tuple[Verdict, ...]
    wrong: tuple[str, ...]

    @property
    def moves(self) -> bool:
        """Whether each thing of the caption goes where it should in both halves, however many frames show it."""
        return all(all(half.as_said) for half in self.halves)


def verify_clip(clip: Clip, caption: str | MovingScene) -> ClipVerdict:
    """Judges uint8 [F, H, W, 3] of any size, F at least 3. The middle frame belongs to both halves.

    Raises:
        ValueError: a caption outside the grammar, or an array that is no clip.
    """
    if not isinstance(clip, np.ndarray) or clip.dtype != np.uint8 or clip.ndim != 4 or len(clip) < 3:
        got = f"{getattr(clip, 'dtype', type(clip).__name__)} {list(getattr(clip, 'shape', []))}"
        raise ValueError(f"expected a clip as a uint8 array [at least 3 frames, H, W, 3], got {got}")
    moving = parse_moving(caption) if isinstance(caption, str) else caption
    frames = tuple(verify(frame, moving.scene) for frame in clip)
    places = [places_of(thing, frames) for thing in moving.scene.things]
    middle = (len(clip) - 1) / HALVES
    bounds = [(0, int(np.ceil(middle))), (int(np.floor(middle)), len(clip) - 1)]
    halves = tuple(_half(number, first, last, moving, frames, places) for number, (first, last) in enumerate(bounds))
    wrong = tuple(f"half {number + 1}: {text}" for number, half in enumerate(halves) for text in half.wrong)
    score = 1.0 if not wrong else 0.9 * float(np.mean([half.score for half in halves]))
    return ClipVerdict(not wrong, score, halves, frames, wrong)


def places_of(thing: Thing, frames: Sequence[Verdict]) -> NDArray[np.float64]:
    """[F, 2] centers of a thing in pixels of 64, NaN where there is none; of several the largest."""
    places = np.full((len(frames), 2), np.nan)
    for number, frame in enumerate(frames):
        same = [one for one in frame.seen if (one.color, one.shape) == (thing.color, thing.shape)]
        if same:
            places[number] = max(same, key=lambda one: one.box[2] - one.box[0]).center
    return places


def dynamic_degree(verdict: ClipVerdict) -> float:
    """Pixels of 64 that the objects of the caption go in the whole clip, on average; NaN where none is seen."""
    travels = np.array([[np.hypot(*travel) for travel in half.travel] for half in verdict.halves])
    seen = travels[:, ~np.isnan(travels).any(0)]
    return float(seen.sum(0).mean()) if seen.size else float("nan")


def flicker(verdict: ClipVerdict) -> float:
    """Share of the steps from frame to frame at which the scene comes or goes."""
    shown = np.array([frame.ok for frame in verdict.frames])
    return float((shown[1:] != shown[:-1]).mean())


def _half(
    number: int,
    first: int,
    last: int,
    moving: MovingScene,
    frames: Sequence[Verdict],
    places: Sequence[NDArray[np.float64]],
) -> Half:
    own = frames[first : last + 1]
    steady = float(np.mean([frame.ok for frame in own]))
    travel = tuple(travelled(place[first : last + 1]) for place in places)
    wrong = [] if steady >= STEADY else [f"{sum(not frame.ok for frame in own)} of {len(own)} frames do not show "
                                         f"{str(moving.scene)!r}"]  # fmt: skip
    as_said = tuple(moves_so(motion, number, gone) for motion, gone in zip(moving.motions, travel, strict=True))
    told = zip(moving.scene.things, moving.motions, travel, as_said, strict=True)
    wrong += [f"the {thing} goes {gone[0]:+.0f} right and {gone[1]:+.0f} down, which is not {_said(motion, number)}"
              for thing, motion, gone, right in told if not right]  # fmt: skip
    return Half(steady, float(np.mean([frame.score for frame in own])), travel, as_said, tuple(wrong))


def travelled(places: NDArray[np.float64]) -> tuple[float, float]:
    """What the straight line through places [F, 2] covers from the first frame to the last."""
    seen = np.flatnonzero(~np.isnan(places[:, 0]))
    if len(seen) < 2:
        return float("nan"), float("nan")
    x, y = np.polyfit(seen, places[seen], 1)[0] * (len(places) - 1)
    return float(x), float(y)


def moves_so(motion: Motion, half: int, travel: tuple[float, float]) -> bool:
    """Whether a travel is what the motion is in this half."""
    way = motion.ways[half]
    if np.isnan(travel[0]):
        return False
    if way is None:
        return bool(np.hypot(*travel) <= MOST_DRIFT)
    dx, dy = DIRECTIONS[way]
    along, across = travel[0] * dx + travel[1] * dy, abs(travel[0] * dy) + abs(travel[1] * dx)
    speed = {"slowly": along < FAST, "quickly": along >= FAST}.get(motion.speed or "", True)
    return bool(along >= LEAST_TRAVEL and along > STRAIGHT * across and speed)


def _said(motion: Motion, half: int) -> str:
    way = motion.ways[half]
    return f"moving {way}{f' {motion.speed}' if motion.speed else ''}" if way else "standing still"
