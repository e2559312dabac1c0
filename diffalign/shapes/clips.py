"""Draws a clip of a moving scene: one picture whose last object moves, all else staying to the pixel."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from diffalign.shapes.motion import DIRECTIONS, HALVES, Motion, MovingScene
from diffalign.shapes.render import MARGIN, SUPERSAMPLE, Box, apart, background, draw_shape, related, shade

FRAMES = 17
# pixels of a 64-pixel picture that are gone in half a clip, by what is said of the speed
TRAVEL = {"slowly": (4.0, 6.0), None: (4.0, 14.0), "quickly": (10.0, 14.0)}
_SIZES = {"single": (15, 26), "two": (12, 17)}  # smaller than in pictures: there must be somewhere to go

Clip = NDArray[np.uint8]


def render_clip(moving: MovingScene, rng: random.Random, frames: int = FRAMES, size: int = 64) -> Clip:
    """uint8 [frames, size, size, 3]; all of it follows from `rng`.

    Raises:
        ValueError: fewer than three frames, an even number of them (a clip has two halves and a middle), or no size.
    """
    if frames < 3 or frames % 2 == 0 or size < 8:
        raise ValueError(f"expected an odd number of frames of at least 3, and a size of at least 8 pixels, got "
                         f"{frames} and {size}")  # fmt: skip
    paths = _paths(moving, rng, frames)
    canvas, scale = background(rng, size * SUPERSAMPLE), size / 64 * SUPERSAMPLE
    shades = [shade(thing, rng) for thing in moving.scene.things]
    pictures = []
    for frame in range(frames):
        picture = canvas.copy()
        draw = ImageDraw.Draw(picture)
        for thing, color, path in zip(moving.scene.things, shades, paths, strict=True):
            left, top, right, bottom = (round(v * scale) for v in path[frame])
            draw_shape(draw, thing.shape, (left, top, right, bottom), color)
        pictures.append(np.asarray(picture.resize((size, size), Image.Resampling.BOX)))
    return np.stack(pictures)


def one_frame(clip: Clip, rng: random.Random) -> Clip:
    """Any frame of a clip, as a clip of one."""
    place = rng.randrange(len(clip))
    return clip[place : place + 1]


def offsets(motion: Motion, travel: float, frames: int) -> list[tuple[float, float]]:
    """(dx, dy) at each frame from the first, in pixels, of something that goes `travel` pixels in a half."""
    half = (frames - 1) // HALVES
    places = []
    for frame in range(frames):
        gone = (min(frame, half) / half, max(frame - half, 0) / half)
        ways = [DIRECTIONS[way] if way else (0, 0) for way in motion.ways]
        places.append((travel * sum(way[0] * share for way, share in zip(ways, gone, strict=True)),
                       travel * sum(way[1] * share for way, share in zip(ways, gone, strict=True))))  # fmt: skip
    return places


def _paths(moving: MovingScene, rng: random.Random, frames: int) -> list[list[Box]]:
    """A box for each thing and frame: rejection sampling until all of it is inside, apart, and in the relation."""
    scene = moving.scene
    while True:
        travel = rng.uniform(*TRAVEL[moving.motion.speed])
        paths = []
        for motion in moving.motions:
            extent = rng.uniform(*_SIZES[scene.category])
            left, top = (rng.uniform(MARGIN, 64 - MARGIN - extent) for _ in range(2))
            paths.append([(left + dx, top + dy, left + dx + extent, top + dy + extent)
                          for dx, dy in offsets(motion, travel, frames)])  # fmt: skip
        together = zip(*paths, strict=True)
        if all(_inside(path) for path in paths) and all(_holds(scene.relation, boxes) for boxes in together):
            return paths


def _inside(path: Sequence[Box]) -> bool:
    return all(MARGIN <= value <= 64 - MARGIN for box in path for value in box)


def _holds(relation: str | None, boxes: Sequence[Box]) -> bool:
    return apart(list(boxes)) and (relation is None or related(relation, *boxes))
