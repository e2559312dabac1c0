"""What can be said of things that move: a scene of the shapes world, and what the object that is named last does.

    a red circle moving left
    a yellow cross moving down quickly
    a blue square above a green circle moving up then stopping
    a red circle moving left slowly then moving up
    a red circle left of a cyan square standing still

A clip has two halves, and a motion changes between them or not at all. The scene holds in every frame: objects keep
their color and shape, the others stand still, and a relation that is named is never lost on the way. A caption belongs
to the split of its scene.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from diffalign.shapes.grammar import Scene, parse, scenes

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = ("slowly", "quickly")
HALVES = 2
KINDS = ("still", "straight", "stopping", "turning")
KIND_MIX = (0.1, 0.4, 0.25, 0.25)
TWO = 0.4  # share of captions with two objects
SPOKEN_SPEED = 0.5  # share of moving ones that say how fast

_WAYS = "|".join(DIRECTIONS)
_MOVING = re.compile(
    rf"(?P<scene>.+?) (?:(?P<still>standing still)|moving (?P<way>{_WAYS})(?: (?P<speed>{'|'.join(SPEEDS)}))?"
    rf"(?: then (?:(?P<stop>stopping)|moving (?P<turn>{_WAYS})))?)$"
)


@dataclass(frozen=True)
class Motion:
    """Where something goes in each half of a clip, None for nowhere, and how fast if that is said.

    Raises:
        ValueError: it stands still first and then moves, or goes at a speed nowhere: captions do not say that.
    """

    ways: tuple[str | None, str | None] = (None, None)
    speed: str | None = None

    def __post_init__(self) -> None:
        unknown = [way for way in self.ways if way not in (None, *DIRECTIONS)]
        if unknown or self.speed not in (None, *SPEEDS) or (self.ways[0] is None and (self.ways[1] or self.speed)):
            raise ValueError(
                f"expected ways of {', '.join(DIRECTIONS)} in both halves, in the first alone or in none, and a speed "
                f"of {', '.join(SPEEDS)} or none, got {self.ways} and {self.speed}"
            )

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        first, second = self.ways
        if first is None:
            return "still"
        return "straight" if first == second else "turning" if second else "stopping"

    def __str__(self) -> str:
        first, second = self.ways
        speed = f" {self.speed}" if self.speed else ""
        after = {"straight": "", "stopping": " then stopping", "turning": f" then moving {second}", "still": ""}
        return f"moving {first}{speed}{after[self.kind]}" if first else "standing still"


@dataclass(frozen=True)
class MovingScene:
    """What a caption of a clip asks for; `motion` is that of the last of the scene's things."""

    scene: Scene
    motion: Motion

    @property
    def motions(self) -> tuple[Motion, ...]:
        """Of each thing."""
        return (*[Motion()] * (len(self.scene.things) - 1), self.motion)

    @property
    def category(self) -> str:
        """The kind of the motion."""
        return self.motion.kind

    def __str__(self) -> str:
        return f"{self.scene} {self.motion}"


def parse_moving(caption: str) -> MovingScene:
    """What a caption of a clip asks for; case, a final full stop and repeated spaces do not matter.

    Raises:
        ValueError: the caption is not of the grammar at the top of this file.
    """
    text = " ".join(caption.lower().strip().rstrip(".").split())
    match = _MOVING.match(text)
    if match and (match["turn"] is None or match["turn"] != match["way"]):
        scene = parse(match["scene"])
        if scene.category != "count":
            way = match["way"]
            after = None if match["stop"] else match["turn"] or way
            return MovingScene(scene, Motion() if match["still"] else Motion((way, after), match["speed"]))
    raise ValueError(f"expected a caption of a clip such as 'a red circle moving left' or 'a blue square above a green "
                     f"circle moving up slowly then stopping', got {caption!r}; one or two objects; ways: "
                     f"{', '.join(DIRECTIONS)}; speeds: {', '.join(SPEEDS)}; or 'standing still'")  # fmt: skip


def sample_moving(split: str, count: int, seed: int) -> list[MovingScene]:
    """`count` captions of a split, in a fixed mix of motions; scenes may repeat."""
    rng = random.Random(f"moving/{split}/{seed}")
    known = {category: scenes(split, category) for category in ("single", "two")}
    return [MovingScene(rng.choice(known["two" if rng.random() < TWO else "single"]), sample_motion(rng))
            for _ in range(count)]  # fmt: skip


def sample_motion(rng: random.Random) -> Motion:
    """One, in the mix of `KIND_MIX`."""
    [kind] = rng.choices(KINDS, KIND_MIX)
    if kind == "still":
        return Motion()
    way = rng.choice(list(DIRECTIONS))
    turn = rng.choice([one for one in DIRECTIONS if one != way])
    speed = rng.choice(SPEEDS) if rng.random() < SPOKEN_SPEED else None
    return Motion((way, {"straight": way, "stopping": None, "turning": turn}[kind]), speed)
