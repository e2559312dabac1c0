"""What can be said in the shapes world, and which captions a model may have seen.

    a red circle                                one object           24 combinations
    a red circle left of a blue square          two objects         276 unordered pairs x 4 relations x 2 orders
    three green triangles                       a count              72 combinations

A caption belongs to exactly one split, by *combination*: the set of its objects, whatever the order and the relation.
So "a blue square right of a red circle" can never be a training caption when its mirror image is held out.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2, "three": 3, "four": 4}
SPLITS = ("train", "validation", "heldout")
CATEGORIES = ("single", "two", "count")
MIX = {"single": 1 / 3, "two": 1 / 2, "count": 1 / 6}  # the fixed mix of the held-out prompts, and of training

_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_NUMERALS = {count: word for word, count in COUNTS.items()}
_OBJECT = rf"(?P<color{{n}}>{'|'.join(COLORS)}) (?P<shape{{n}}>{'|'.join(SHAPES)})"
_ONE_OR_TWO = re.compile(
    rf"an? {_OBJECT.format(n=1)}(?: (?P<relation>{'|'.join(RELATIONS)}) an? {_OBJECT.format(n=2)})?$"
)
_COUNT = re.compile(
    rf"(?P<count>{'|'.join(COUNTS)}) (?P<color>{'|'.join(COLORS)}) "
    rf"(?P<shape>{'|'.join(s + ('es' if s.endswith('s') else 's') for s in SHAPES)})$"
)


@dataclass(frozen=True, order=True)
class Thing:
    """One kind of object: a color and a shape."""

    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: `things` in the order named, and the relation of the first to the second, if any.

    A count is the same thing repeated: "three green triangles" has three equal things and no relation.
    """

    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def category(self) -> str:
        """One of `CATEGORIES`."""
        if len(self.things) == 1:
            return "single"
        return "two" if self.relation else "count"

    @property
    def combination(self) -> tuple[str, tuple[Thing, ...]]:
        """What the splits are made by: the category and the sorted objects."""
        return self.category, tuple(sorted(self.things))

    def __str__(self) -> str:
        first = self.things[0]
        if self.relation:
            return f"a {first} {self.relation} a {self.things[1]}"
        if len(self.things) == 1:
            return f"a {first}"
        return f"{_NUMERALS[len(self.things)]} {first}{'es' if first.shape.endswith('s') else 's'}"


def parse(caption: str) -> Scene:
    """The scene that a caption asks for; case, a final full stop and repeated spaces do not matter.

    Raises:
        ValueError: the caption is not of the grammar at the top of this file, or relates two equal things.
    """
    text = " ".join(caption.lower().strip().rstrip(".").split())
    if match := _ONE_OR_TWO.match(text):
        things = [Thing(match["color1"], match["shape1"])]
        if match["relation"]:
            things.append(Thing(match["color2"], match["shape2"]))
        if len(set(things)) == len(things):  # a relation between two equal things says nothing that can be checked
            return Scene(tuple(things), match["relation"])
    elif match := _COUNT.match(text):
        shape = match["shape"].removesuffix("s") if match["shape"] != "crosses" else "cross"
        return Scene((Thing(match["color"], shape),) * COUNTS[match["count"]])
    raise ValueError(
        f"expected a caption of the shapes world such as 'a red circle left of a blue square' (two different objects), "
        f"got {caption!r}; "
        f"colors: {', '.join(COLORS)}; shapes: {', '.join(SHAPES)}; relations: {', '.join(RELATIONS)}; "
        f"counts: {', '.join(COUNTS)}"
    )


def combinations(category: str) -> list[tuple[Thing, ...]]:
    """Every combination of a category, in a fixed order."""
    things = [Thing(color, shape) for color, shape in itertools.product(COLORS, SHAPES)]
    if category == "single":
        return [(thing,) for thing in things]
    if category == "two":
        return [tuple(sorted(pair)) for pair in itertools.combinations(things, 2)]
    if category == "count":
        return [(thing,) * count for thing, count in itertools.product(things, COUNTS.values())]
    raise ValueError(f"expected a category of {', '.join(CATEGORIES)}, got {category!r}")


def split_combinations(split: str, category: str) -> list[tuple[Thing, ...]]:
    """The combinations of one split: 60 % train, 20 % validation, 20 % held-out, the same on every machine.

    Raises:
        ValueError: unknown split or category.
    """
    if split not in SPLITS:
        raise ValueError(f"expected a split of {', '.join(SPLITS)}, got {split!r}")
    everything = combinations(category)
    # Random(str) seeds from a digest of the text, so the order does not depend on the hash seed of the process
    random.Random(f"shapes/{category}").shuffle(everything)
    fifth = -(-len(everything) // 5)
    bounds = {"heldout": (0, fifth), "validation": (fifth, 2 * fifth), "train": (2 * fifth, len(everything))}
    return everything[slice(*bounds[split])]


def scenes(split: str, category: str) -> list[Scene]:
    """Every caption of a split and a category, as scenes; a pair yields its 4 relations in both orders."""
    found = split_combinations(split, category)
    if category != "two":
        return [Scene(things) for things in found]
    return [Scene(order, relation) for pair in found for order in (pair, pair[::-1]) for relation in RELATIONS]


def sample_scenes(split: str, count: int, seed: int) -> list[Scene]:
    """`count` scenes of a split in the fixed mix of categories, shuffled; combinations repeat only when used up."""
    rng = random.Random(f"{split}/{seed}")
    quotas = _quotas(count)
    drawn = [scene for category in CATEGORIES for scene in _cycle(scenes(split, category), quotas[category], rng)]
    rng.shuffle(drawn)
    return drawn


def one_fact_changed(scene: Scene, rng: random.Random, fact: str | None = None) -> Scene:
    """The scene with one fact changed: color, shape, count, relation or order; a random one that applies if not named.

    Raises:
        ValueError: the fact does not apply to this scene (a single object has no relation).
    """
    facts = ["color", "shape"] + (["relation", "order"] if scene.relation else ["count"])
    fact = fact or rng.choice(facts)
    if fact not in facts:
        raise ValueError(f"expected a fact of {', '.join(facts)} for {str(scene)!r}, got {fact!r}")
    if fact == "order":
        return Scene(scene.things[::-1], scene.relation)
    if fact == "relation":
        return Scene(scene.things, rng.choice([r for r in RELATIONS if r != scene.relation]))
    if fact == "count":
        count = rng.choice([n for n in (1, 2, 3, 4) if n != len(scene.things)])
        return Scene(scene.things[:1] * count)
    return _with_other_thing(scene, fact, rng)


def inverse(scene: Scene) -> Scene:
    """The same picture said from the other end: "a left of b" becomes "b right of a"."""
    if scene.relation is None:
        return scene
    return Scene(scene.things[::-1], _INVERSE[scene.relation])


def _with_other_thing(scene: Scene, fact: str, rng: random.Random) -> Scene:
    index = rng.randrange(len(scene.things)) if scene.relation else 0
    old = scene.things[index]
    values = [v for v in (COLORS if fact == "color" else SHAPES) if v != (old.color if fact == "color" else old.shape)]
    changed = [Thing(v, old.shape) if fact == "color" else Thing(old.color, v) for v in values]
    # two equal things in a relation would name nothing: "a red circle left of a red circle"
    new = rng.choice([thing for thing in changed if not scene.relation or thing not in scene.things])
    if scene.relation is None:
        return Scene((new,) * len(scene.things))
    return Scene(tuple(new if i == index else thing for i, thing in enumerate(scene.things)), scene.relation)


def _quotas(count: int) -> dict[str, int]:
    quotas = {category: int(count * share) for category, share in MIX.items()}
    quotas["two"] += count - sum(quotas.values())
    return quotas


def _cycle(items: Sequence[Scene], count: int, rng: random.Random) -> list[Scene]:
    drawn: list[Scene] = []
    while len(drawn) < count:
        drawn += rng.sample(items, min(len(items), count - len(drawn)))
    return drawn
