"""Draws a scene: sizes, positions, colors and the background vary, the facts of the caption always hold."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

from diffalign.shapes.grammar import Scene, Thing

PALETTE = {
    "red": (214, 39, 40),
    "green": (38, 170, 66),
    "blue": (45, 85, 215),
    "yellow": (240, 205, 40),
    "purple": (152, 56, 192),
    "cyan": (40, 190, 205),
}
CROSS_ARM = 0.36  # width of a cross's arm as a share of its size

_SIZES = {"single": (18, 34), "two": (14, 22), "count": (12, 17)}  # pixels of a 64-pixel picture
GAP = 5.0  # the least space between two bounding boxes, so that JPEG and the VAE do not join them
MARGIN = 2.0
SUPERSAMPLE = 4

Box = tuple[float, float, float, float]


def outline(shape: str, box: Box) -> list[tuple[float, float]]:
    """The polygon of a square, triangle or cross inside `box` = (left, top, right, bottom); a circle has none."""
    left, top, right, bottom = box
    if shape == "square":
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    if shape == "triangle":
        return [((left + right) / 2, top), (right, bottom), (left, bottom)]
    if shape == "cross":
        low, high = (1 - CROSS_ARM) / 2, (1 + CROSS_ARM) / 2
        steps = [(low, 0), (high, 0), (high, low), (1, low), (1, high), (high, high),
                 (high, 1), (low, 1), (low, high), (0, high), (0, low), (low, low)]  # fmt: skip
        return [(left + x * (right - left), top + y * (bottom - top)) for x, y in steps]
    raise ValueError(f"expected square, triangle or cross, got {shape!r}")


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: Box, fill: tuple[int, ...] | int) -> None:
    """Fills one shape inside `box` (pixels of the canvas; right and bottom are exclusive)."""
    left, top, right, bottom = box
    inclusive = (left, top, right - 1, bottom - 1)  # PIL draws the last pixel too
    if shape == "circle":
        draw.ellipse(inclusive, fill=fill)
    else:
        draw.polygon(outline(shape, inclusive), fill=fill)


def render(scene: Scene, rng: random.Random, size: int = 64) -> Image.Image:
    """A picture of the scene, RGB, `size` x `size` pixels, anti-aliased; all of it follows from `rng`."""
    scale = size / 64
    boxes = [tuple(v * scale for v in box) for box in _layout(scene, rng)]
    canvas = background(rng, size * SUPERSAMPLE)
    draw = ImageDraw.Draw(canvas)
    for thing, box in zip(scene.things, boxes, strict=True):
        left, top, right, bottom = (round(v * SUPERSAMPLE) for v in box)
        draw_shape(draw, thing.shape, (left, top, right, bottom), shade(thing, rng))
    return canvas.resize((size, size), Image.Resampling.BOX)


def _layout(scene: Scene, rng: random.Random) -> list[Box]:
    """Rejection sampling of one box per thing: apart by `GAP`, and in the relation that the caption names."""
    while True:
        boxes: list[Box] = []
        for _ in scene.things:
            extent = rng.uniform(*_SIZES[scene.category])
            left, top = (rng.uniform(MARGIN, 64 - MARGIN - extent) for _ in range(2))
            boxes.append((left, top, left + extent, top + extent))
        if apart(boxes) and (scene.relation is None or related(scene.relation, *boxes)):
            return boxes


def apart(boxes: list[Box]) -> bool:
    """Whether no two boxes are nearer than `GAP`."""
    return all(
        a[2] + GAP <= b[0] or b[2] + GAP <= a[0] or a[3] + GAP <= b[1] or b[3] + GAP <= a[1]
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    )


def related(relation: str, first: Box, second: Box) -> bool:
    """Whether the first box lies so of the second, beyond doubt."""
    dx, dy = ((second[i] + second[i + 2] - first[i] - first[i + 2]) / 2 for i in range(2))
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > 1.25 * abs(across)  # the verifier asks for 1.0: what is drawn is never a close call


def background(rng: random.Random, size: int) -> Image.Image:
    """Nearly neutral, light or dark, with a soft gradient in a random direction."""
    low, high = rng.choice(((200, 250), (15, 70)))
    start, end = (rng.uniform(low, high) for _ in range(2))
    angle = rng.uniform(0, 2 * math.pi)
    wide = Image.linear_gradient("L").resize((2 * size, 2 * size)).rotate(math.degrees(angle))
    ramp = wide.crop((size // 2, size // 2, size // 2 + size, size // 2 + size))  # away from the empty corners
    tint = [rng.uniform(-4, 4) for _ in range(3)]
    bands = [ramp.point([round(start + (end - start) * v / 255 + t) for v in range(256)]) for t in tint]
    return Image.merge("RGB", bands)


def shade(thing: Thing, rng: random.Random) -> tuple[int, int, int]:
    """Its color, a little off the palette's."""
    red, green, blue = (max(0, min(255, value + rng.randint(-12, 12))) for value in PALETTE[thing.color])
    return red, green, blue
