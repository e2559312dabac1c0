"""From a picture to what a vision tower reads. Every recipe exists twice: exact and differentiable.

The exact one takes PIL pictures and repeats, pixel for pixel, what a reward was trained and published with. The
differentiable one takes float pixels, so that a gradient reaches them. They differ in one thing: PIL rounds to 8 bits
after every pass, and torch does not. A recipe is a row of data (`Recipe`); a new one is two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffalign.rewards.prepared import once

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP, clip/clip.py; BLIP and the laion models use the same
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Triple = tuple[float, float, float]
Margin = Callable[[int], int]  # what is left over along one side -> where the crop starts


@dataclass(frozen=True)
class Recipe:
    """How one model's pictures are made: both versions for a side of `size` pixels, then (x - mean) / std.

    A value: recipes of equal fields are equal, and `Weighted` makes a picture once for all that agree in function and
    size. So `exact` and `differentiable` are functions of a module, not made anew for each recipe.
    """

    exact: Callable[[Image.Image, int], Tensor]  # any picture -> [3, size, size] in [0, 1]
    differentiable: Callable[[Tensor, int], Tensor]  # [B, 3, H, W] -> [B, 3, size, size], both in [0, 1]
    size: int
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[B, 3, size, size], fp32 on the CPU, of B pictures of any sizes, by the exact version.

        Raises:
            ValueError: a picture with more than 8 bits per channel.
        """
        return self._normalized(once(_made, pictures, self.exact, self.size))

    def pixels(self, pixels: Tensor) -> Tensor:
        """[B, 3, size, size], fp32, of pixels [B, 3, H, W] in [0, 1], by the differentiable version."""
        return self._normalized(once(_made_soft, pixels, self.differentiable, self.size))

    def _normalized(self, x: Tensor) -> Tensor:
        return (x - x.new_tensor(self.mean).view(3, 1, 1)) / x.new_tensor(self.std).view(3, 1, 1)


def hf_recipe(size: int, mean: Triple = CLIP_MEAN, std: Triple = CLIP_STD) -> Recipe:
    """transformers' CLIPImageProcessor (PIL): RGB, bicubic to a short side of `size`, center crop that floors."""
    return Recipe(hf_picture, hf_pixels, size, mean, std)


def openai_recipe(size: int, mean: Triple = CLIP_MEAN, std: Triple = CLIP_STD) -> Recipe:
    """openai/CLIP and open_clip: bicubic in the picture's own mode, center crop that rounds half to even, RGB."""
    return Recipe(openai_picture, openai_pixels, size, mean, std)


def square_recipe(size: int, mean: Triple = CLIP_MEAN, std: Triple = CLIP_STD) -> Recipe:
    """Bicubic to a square, whatever the shape, in RGB; no crop (BLIP, SigLIP)."""
    return Recipe(square_picture, square_pixels, size, mean, std)


def letterbox_recipe(size: int, antialias: bool = True, mean: Triple = CLIP_MEAN, std: Triple = CLIP_STD) -> Recipe:
    """HPSv2: float pixels, bicubic to a long side of `size`, centered on black. Exact and differentiable are one.

    `antialias=False` is what torchvision did before 0.17.
    """

    exact, soft = (letterbox_picture, letterbox_pixels) if antialias else (aliased_picture, aliased_pixels)
    return Recipe(exact, soft, size, mean, std)


def hf_picture(picture: Image.Image, size: int) -> Tensor:
    """[3, size, size] in [0, 1]; equal to the last bit to transformers' PIL processor before its normalization."""
    resized = to_rgb(picture).resize(short_side(*picture.size, size), Image.Resampling.BICUBIC)
    return to_tensor(_center(resized, size, margin_floor))


def openai_picture(picture: Image.Image, size: int) -> Tensor:
    """[3, size, size] in [0, 1]; equal to torchvision's Resize and CenterCrop on a PIL picture.

    The order matters: resized before the conversion, a palette picture gets nearest neighbors and an alpha channel
    weights its colors.
    """
    check_depth(picture)
    resized = picture.resize(short_side(*picture.size, size), Image.Resampling.BICUBIC)
    return to_tensor(to_rgb(_center(resized, size, margin_half_even)))


def square_picture(picture: Image.Image, size: int) -> Tensor:
    """[3, size, size] in [0, 1]."""
    return to_tensor(to_rgb(picture).resize((size, size), Image.Resampling.BICUBIC))


def hf_pixels(pixels: Tensor, size: int) -> Tensor:
    """The differentiable twin of `hf_picture` for [B, 3, H, W]."""
    return _short_side_crop(pixels, size, margin_floor)


def openai_pixels(pixels: Tensor, size: int) -> Tensor:
    """The differentiable twin of `openai_picture` for [B, 3, H, W]."""
    return _short_side_crop(pixels, size, margin_half_even)


def square_pixels(pixels: Tensor, size: int) -> Tensor:
    """The differentiable twin of `square_picture` for [B, 3, H, W]."""
    return resize(pixels, size, size)


def letterbox_pixels(pixels: Tensor, size: int, antialias: bool = True) -> Tensor:
    """[B, 3, size, size] of [B, 3, H, W]: nothing is cropped; the overshoot of bicubic is kept, as published."""
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    new = round(height * scale), round(width * scale)
    if new != (height, width):
        pixels = F.interpolate(pixels, size=new, mode="bicubic", align_corners=False, antialias=antialias)
    rest = [size - side for side in (new[1], new[0])]
    left, top = (side // 2 for side in rest)
    return F.pad(pixels, (left, rest[0] - left, top, rest[1] - top))


def aliased_pixels(pixels: Tensor, size: int) -> Tensor:
    """`letterbox_pixels` without antialiasing."""
    return letterbox_pixels(pixels, size, antialias=False)


def letterbox_picture(picture: Image.Image, size: int) -> Tensor:
    """[3, size, size] of any picture, by `letterbox_pixels`."""
    return letterbox_pixels(to_tensor(to_rgb(picture))[None], size)[0]


def aliased_picture(picture: Image.Image, size: int) -> Tensor:
    """[3, size, size] of any picture, by `aliased_pixels`."""
    return aliased_pixels(to_tensor(to_rgb(picture))[None], size)[0]


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing of pixels [B, 3, H, W] in [0, 1], as PIL does it but unrounded.

    PIL resizes the rows, clips what overshoots, then does the columns. In the same order nothing is left of the gap but
    PIL's rounding: 0.001 of the range on average, 0.01 at most on photographs. In one pass hard edges differ by 0.03,
    and so they do where PIL takes the columns first: for some portraits that become a square.
    """
    rows = _bicubic(pixels, pixels.shape[-2], width)
    return _bicubic(rows, height, width)


def short_side(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with a short side of `size`; the long side is truncated, never rounded."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def margin_floor(rest: int) -> int:
    """Where transformers starts a center crop: 111 left over -> 55."""
    return rest // 2


def margin_half_even(rest: int) -> int:
    """Where torchvision, openai/CLIP and open_clip start a center crop: 111 left over -> 56, 109 -> 54."""
    return round(rest / 2)


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB. An alpha channel is dropped, as the published scorers do, not put on white as transformers 5 does.

    Raises:
        ValueError: more than 8 bits per channel, which PIL would clip to white without a word.
    """
    check_depth(picture)
    return picture.convert("RGB")


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """PIL pictures of pixels [B, 3, H, W], uint8 or float in [0, 1]; floats are rounded to 8 bits."""
    if pixels.is_floating_point():
        pixels = (pixels.detach().float() * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def as_shown(pixels: Tensor) -> list[Image.Image] | Tensor:
    """What rewards see of drawn pixels, to 8 bits: PIL pictures of [B, 3, H, W], uint8 of clips [B, F, 3, H, W]."""
    return to_pictures(pixels) if pixels.ndim == 4 else (pixels.detach().float() * 255).round().to(torch.uint8)


def _made(pictures: Sequence[Image.Image], exact: Callable[[Image.Image, int], Tensor], size: int) -> Tensor:
    return torch.stack([exact(picture, size) for picture in pictures])


def _made_soft(pixels: Tensor, differentiable: Callable[[Tensor, int], Tensor], size: int) -> Tensor:
    # resizing in bf16 costs 3e-3 per pixel, more than all other differences together
    return differentiable(pixels.float(), size)


def _bicubic(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, size=(height, width), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def check_depth(picture: Image.Image) -> None:
    """
    Raises:
        ValueError: more than 8 bits per channel.
    """
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        raise ValueError(
            f"expected a picture with 8 bits per channel, got PIL mode {picture.mode!r}; "
            f"scale its values to 0..255 first"
        )


def _center(picture: Image.Image, size: int, margin: Margin) -> Image.Image:
    left, top = (margin(extent - size) for extent in picture.size)
    return picture.crop((left, top, left + size, top + size))


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _short_side_crop(pixels: Tensor, size: int, margin: Margin) -> Tensor:
    width, height = short_side(pixels.shape[-1], pixels.shape[-2], size)
    top, left = margin(height - size), margin(width - size)
    return resize(pixels, height, width)[..., top : top + size, left : left + size]
