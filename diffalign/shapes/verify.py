"""Judges any picture against a caption of the shapes world by looking at it: colored regions and their outline.

No learning, no threshold fitted to a model: a pixel belongs to the palette color of the nearest hue when it is
colored enough, regions are connected pixels of one color, and a region is the shape whose outline, drawn into the
region's own box, overlaps it best. The picture is right when it shows exactly the objects that the caption names, in
the relation that it names, and nothing else.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from diffalign.shapes.grammar import COLORS, SHAPES, Scene, Thing, parse
from diffalign.shapes.render import PALETTE, draw_shape

WORKING_SIZE = 64  # pixels; larger pictures are reduced to it, smaller ones enlarged
MIN_AREA = 24  # pixels of a 64-pixel picture below which a region is a speck
MAX_SPECKS = 40  # pixels of all specks together that are still overlooked
MIN_OVERLAP = (
    0.68  # intersection over union with the best outline: what JPEG 90 (chroma at half size) leaves of a cross
)
MAX_ASPECT = 1.35

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """One region: its color, the shape it was taken for (None when no outline fits) and its box in pixels of 64."""

    color: str
    shape: str | None
    box: tuple[int, int, int, int]
    overlap: float

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    def __str__(self) -> str:
        return f"{self.color} {self.shape or 'blob'} at ({self.center[0]:.0f}, {self.center[1]:.0f})"


@dataclass(frozen=True)
class Verdict:
    """`ok` when nothing is wrong; `score` in [0, 1] is the share of the caption's facts that hold, 1 only when ok."""

    ok: bool
    score: float
    seen: tuple[Seen, ...]
    wrong: tuple[str, ...]


def verify(image: Image.Image | NDArray[np.uint8], caption: str | Scene) -> Verdict:
    """Judges a picture (PIL, or uint8 [H, W, 3]) of any size.

    Raises:
        ValueError: a caption outside the grammar, or an array that is not uint8 [H, W, 3].
    """
    scene = parse(caption) if isinstance(caption, str) else caption
    seen, specks = look(image)
    wrong = list(_wrong_objects(scene, seen))
    related = not wrong and relation_holds(scene, seen)
    if scene.relation and not wrong and not related:
        wrong.append(f"the {scene.things[0]} is not {scene.relation} the {scene.things[1]}")
    if specks > MAX_SPECKS:
        wrong.append(f"{specks} colored pixels belong to no object")
    score = 1.0 if not wrong else _partial_score(scene, seen)
    return Verdict(not wrong, score, seen, tuple(wrong))


def look(image: Image.Image | NDArray[np.uint8]) -> tuple[tuple[Seen, ...], int]:
    """Every region of a picture, left to right, and the number of colored pixels too small to be one."""
    colors = _color_of_pixels(_working_array(image))
    seen: list[Seen] = []
    specks = 0
    for index, color in enumerate(COLORS):
        labels, count = ndimage.label(colors == index)
        for number, window in enumerate(ndimage.find_objects(labels, count), start=1):
            mask = labels[window] == number
            if (area := int(mask.sum())) < MIN_AREA:
                specks += area
            else:
                seen.append(_recognize(color, mask, window))
    return tuple(sorted(seen, key=lambda one: one.box)), specks


def _working_array(image: Image.Image | NDArray[np.uint8]) -> NDArray[np.float32]:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected a uint8 array [H, W, 3], got {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image)
    image = image.convert("RGB")
    if image.size != (WORKING_SIZE, WORKING_SIZE):
        image = image.resize((WORKING_SIZE, WORKING_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _color_of_pixels(rgb: NDArray[np.float32]) -> NDArray[np.int64]:
    """[64, 64] index into COLORS, or -1 where a pixel has less than half of the chroma of its color.

    Mixing a color with a neutral background keeps its hue and scales its chroma (max - min) by the coverage, so hue
    decides which color and chroma decides where the edge is, on light and dark backgrounds alike.
    """
    hue, chroma = _hue_chroma(rgb)
    palette_hue, palette_chroma = _hue_chroma(
        np.array([PALETTE[c] for c in COLORS], dtype=np.float32) / np.float32(255)
    )
    distance = np.abs((hue[..., None] - palette_hue + 0.5) % 1.0 - 0.5)
    nearest = distance.argmin(-1)
    return np.where(chroma > 0.5 * palette_chroma[nearest], nearest, -1)


def _hue_chroma(rgb: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Hue in turns and chroma = max - min, of [..., 3] in [0, 1]."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.arctan2(np.sqrt(3.0) * (green - blue), 2 * red - green - blue) / (2 * np.pi) % 1.0
    return hue, rgb.max(-1) - rgb.min(-1)


def _recognize(color: str, mask: Mask, window: tuple[slice, ...]) -> Seen:
    height, width = mask.shape
    box = (window[1].start, window[0].start, window[1].stop, window[0].stop)
    overlaps = {shape: _overlap(mask, _template(shape, height, width)) for shape in SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    long, short = max(height, width), min(height, width)
    # from edge to edge of the picture there is no outline to see: a picture filled with red is not a red square
    fits = overlaps[best] >= MIN_OVERLAP and long <= MAX_ASPECT * short and long < WORKING_SIZE
    return Seen(color, best if fits else None, box, overlaps[best])


@functools.lru_cache(maxsize=8192)
def _template(shape: str, height: int, width: int) -> Mask:
    canvas = Image.new("L", (width * 4, height * 4))
    draw_shape(ImageDraw.Draw(canvas), shape, (0, 0, width * 4, height * 4), 255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) >= 128


def _overlap(mask: Mask, template: Mask) -> float:
    return float((mask & template).sum() / (mask | template).sum())


def _wrong_objects(scene: Scene, seen: tuple[Seen, ...]) -> list[str]:
    wanted = Counter((thing.color, thing.shape) for thing in scene.things)
    found = Counter((one.color, one.shape or "blob") for one in seen)
    wrong = []
    for color, shape in wanted | found:
        asked, present = wanted[color, shape], found[color, shape]
        if asked != present:
            wrong.append(f"expected {asked} {color} {shape}, saw {present}")
    return wrong


def relation_holds(scene: Scene, seen: tuple[Seen, ...]) -> bool:
    """True for a scene without a relation; the axis of the larger distance decides, so one relation holds at most."""
    if scene.relation is None:
        return True
    first, second = (next(one for one in seen if _is(one, thing)) for thing in scene.things)
    dx, dy = second.center[0] - first.center[0], second.center[1] - first.center[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[scene.relation]
    return along > abs(across)


def _is(one: Seen, thing: Thing) -> bool:
    return (one.color, one.shape) == (thing.color, thing.shape)


def _partial_score(scene: Scene, seen: tuple[Seen, ...]) -> float:
    """Share of facts that hold, at most 0.9: colors and shapes each as multisets, whole objects, number, relation."""
    colors = _shared([t.color for t in scene.things], [s.color for s in seen])
    shapes = _shared([t.shape for t in scene.things], [s.shape for s in seen])
    objects = _shared([(t.color, t.shape) for t in scene.things], [(s.color, s.shape) for s in seen])
    facts = [colors, shapes, objects, float(len(seen) == len(scene.things))]
    if scene.relation:
        present = all(any(_is(one, thing) for one in seen) for thing in scene.things)
        facts.append(float(present and relation_holds(scene, seen)))
    return 0.9 * sum(facts) / len(facts)


def _shared(wanted: list, found: list) -> float:  # type: ignore[type-arg]
    return sum((Counter(wanted) & Counter(found)).values()) / max(len(wanted), len(found), 1)
