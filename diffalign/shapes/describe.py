"""The caption of what a picture shows: a captioner of the shapes world that needs no model."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.shapes.grammar import COUNTS, RELATIONS, Scene, Thing
from diffalign.shapes.verify import Seen, relation_holds


def describe(seen: Sequence[Seen]) -> str | None:
    """A caption of the grammar that the verifier accepts for a picture with these regions, or None if there is none.

    Of the relations that hold between two objects the first of `RELATIONS` is said, starting with the left object.
    """
    if any(one.shape is None for one in seen):
        return None
    things = tuple(Thing(one.color, str(one.shape)) for one in seen)
    if len(things) == 1 or (len(things) in COUNTS.values() and len(set(things)) == 1):
        return str(Scene(things))
    if len(things) != 2:
        return None
    for relation in RELATIONS:
        if things[0] != things[1] and relation_holds(scene := Scene(things, relation), tuple(seen)):
            return str(scene)
    return None
