"""Image files to training pixels: decoding that hides no damage, one resize, one crop and one flip for a pair."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffalign.errors import first_line

LARGEST = 89_478_485  # pixels; beyond, a small file may be made to fill the memory (Pillow's own limit for a warning)
# what Pillow's decoders raise on damaged files
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
           struct.error, zlib.error, Image.DecompressionBombError)  # fmt: skip


def decode(data: bytes, source: str) -> Image.Image:
    """An RGB picture of a file's bytes: EXIF orientation applied, CMYK and palettes converted, alpha put on white.

    16-bit and float pictures are scaled to 8 bits, not cut. Color profiles are not applied.

    Raises:
        ValueError: not an image, truncated, animated (or of several pages), or so large that it may be an attack; the
            message names `source`.
    """
    if not data:
        raise ValueError(f"{source}: the image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
        size, several = image.size, _has_several_frames(image)
        if size[0] * size[1] <= LARGEST and not several:
            return upright(image)
    except DAMAGED as error:
        raise ValueError(f"{source}: not a readable image, or a truncated one ({_one_line(error)})") from error
    if several:
        raise ValueError(f"{source}: an animated {image.format} (or one of several pages) where a still picture was "
                         f"expected")  # fmt: skip
    raise ValueError(f"{source}: {size[0]} x {size[1]} pixels are more than the {LARGEST} that are safe to decode")


def open_as_stored(data: bytes, source: str) -> Image.Image:
    """The picture of a file's bytes in its own mode, read to its end; of an animation the first frame.

    What scores need: their recipes convert, each in its own way. EXIF orientation is not applied: no published scorer
    does.

    Raises:
        ValueError: not a picture, truncated, or so large that it may be an attack; the message names `source`.
    """
    expected = f"{source}: expected a whole picture"
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height <= LARGEST:
            image.load()
            return image.copy()
    except DAMAGED as error:
        raise ValueError(f"{expected}, could not read it: {_one_line(error)}") from error
    raise ValueError(f"{expected}, got {image.width} x {image.height} pixels, more than the {LARGEST} that are safe to "
                     f"decode; shrink it first")  # fmt: skip


def upright(image: Image.Image) -> Image.Image:
    """In RGB as `decode` gives it: EXIF orientation applied, alpha put on white."""
    return _to_rgb(ImageOps.exif_transpose(image))


def _has_several_frames(image: Image.Image) -> bool:
    if image.format == "MPO":  # a JPEG with a preview behind it, as many cameras write: the first frame is the picture
        return False
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _one_line(error: BaseException) -> str:
    return first_line(error).partition(" <_io")[0]  # Pillow names its buffer, which means nothing to a reader


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        highest = float(values.max())
        top = 65535.0 if highest <= 65535 else 2.0**31 - 1  # 16 bits are often held in a wider type
        top = max(1.0, highest) if image.mode == "F" else top
        image = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


class Frame(NamedTuple):
    """Where a training picture comes from: (height, width) or (top, left), in whole pixels.

    `corner` is that of the crop in the resized picture as the network sees it: of a flipped picture the crop's right
    edge, mirrored, so the same as flipping before the crop. `original` is the size before the resize.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]


def frame(original: tuple[int, int], size: tuple[int, int], crop: tuple[float, float], flip: bool) -> Frame:
    """What `resize_and_crop` does to a picture of this (height, width), in numbers.

    >>> frame((600, 800), (300, 300), (0.5, 0.25), flip=False)
    Frame(original=(600, 800), corner=(0, 25), target=(300, 300))
    >>> frame((600, 800), (300, 300), (0.5, 0.25), flip=True).corner
    (0, 75)
    """
    covered, (top, left) = placed(original, size, crop)
    return Frame(original, (top, covered[1] - size[1] - left if flip else left), size)


def placed(
    original: tuple[int, int], size: tuple[int, int], crop: tuple[float, float]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of a picture that is resized to cover `size` without distortion, and (top, left) of the crop."""
    scale = max(size[0] / original[0], size[1] / original[1])
    height, width = max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale))
    return (height, width), (round((height - size[0]) * crop[0]), round((width - size[1]) * crop[1]))


def resize_and_crop(
    image: Image.Image, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Tensor:
    """uint8 [3, height, width]: resized to cover `size` = (height, width) without distortion, cropped, maybe flipped.

    `crop` in [0, 1]^2 = (vertical, horizontal) says where in the surplus the crop lies (0.5 is the center), so one pair
    of numbers means the same for two pictures of different sizes.
    """
    height, width = size
    covered, (top, left) = placed((image.height, image.width), size, crop)
    image = image.resize(covered[::-1], Image.Resampling.LANCZOS) if image.size != covered[::-1] else image
    image = image.crop((left, top, left + width, top + height))
    if flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def framed_regions(
    regions: Sequence[Sequence[int]],
    original: tuple[int, int],
    size: tuple[int, int],
    crop: tuple[float, float],
    flip: bool,
    grain: int = 8,
) -> tuple[tuple[int, ...], ...]:
    """A map of labels over a picture of this (height, width), as `resize_and_crop` shows it: nearest labels, one per
    `grain` pixels, so that a latent's place has its own.

    >>> framed_regions([[1, -1]], (16, 32), (16, 16), (0.5, 1.0), flip=False)
    ((-1, -1), (-1, -1))
    """
    covered, corner = placed(original, size, crop)
    counts = (len(regions), len(regions[0]))
    rows, columns = (
        [int((start + (place + 0.5) * grain) * count / whole) for place in range(side // grain)]
        for start, side, count, whole in zip(corner, size, counts, covered, strict=True)
    )
    return tuple(tuple(regions[row][column] for column in (columns[::-1] if flip else columns)) for row in rows)


def bucket(width: int, height: int, resolution: int, step: int = 64, limit: float = 2.0) -> tuple[int, int]:
    """(height, width) near resolution^2 pixels, multiples of `step`, with about the aspect of a picture up to `limit`.

    >>> bucket(1920, 1080, 512)
    (384, 704)
    """
    aspect = min(max(width / height, 1 / limit), limit)
    target_height = max(step, round(resolution / aspect**0.5 / step) * step)
    return target_height, max(step, round(resolution * aspect**0.5 / step) * step)
