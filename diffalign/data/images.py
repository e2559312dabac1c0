"""Image files to training pixels: decoding that loses nothing silently, one resize, one crop and one flip for a pair."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


def decode(data: bytes, source: str) -> Image.Image:
    """An RGB picture of a file's bytes: EXIF orientation applied, CMYK and palettes converted, alpha put on white.

    16-bit and float pictures are scaled to 8 bits, not cut.

    Raises:
        ValueError: not an image, truncated, animated, or so large that it may be an attack; the message names `source`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{source}: an animated {image.format} where a still picture was expected")
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{source}: not a readable image, or a truncated one ({error})") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{source}: {error}") from error
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max()))
        image = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Tensor:
    """uint8 [3, height, width]: resized to cover `size` = (height, width) without distortion, cropped, maybe flipped.

    `crop` in [0, 1]^2 says where in the surplus the crop lies (0.5 is the center), so one pair of numbers means the same
    for two pictures of different sizes.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    covered = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(covered, Image.Resampling.LANCZOS) if image.size != covered else image
    top, left = round((covered[1] - height) * crop[0]), round((covered[0] - width) * crop[1])
    image = image.crop((left, top, left + width, top + height))
    if flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def bucket(width: int, height: int, resolution: int, step: int = 64, limit: float = 2.0) -> tuple[int, int]:
    """(height, width) near resolution^2 pixels, multiples of `step`, with about the aspect of a picture up to `limit`."""
    aspect = min(max(width / height, 1 / limit), limit)
    target_height = max(step, round(resolution / aspect**0.5 / step) * step)
    return target_height, max(step, round(resolution * aspect**0.5 / step) * step)
