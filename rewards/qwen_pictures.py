"""What Qwen2-VL reads: pictures of any shape, resized to a budget of pixels and cut into patches.

    patches [N, 3 * 2 * 14 * 14]: row, column and pixel of a patch, two frames each, in blocks of 2 x 2 patches

A picture fills both frames of its patches. Both the exact recipe and the differentiable one end in `patched`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, resize, to_rgb, to_tensor

PATCH, FRAMES, MERGE = 14, 2, 2  # preprocessor_config.json of every Qwen2-VL
FACTOR = PATCH * MERGE
MAX_RATIO = 200


def smart_resize(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """(height, width) in multiples of 28, near the given shape, with an area of about `least` to `most` pixels.

    As in qwen-vl-utils: both sides are rounded; an area that is then too large is scaled down and floored, one that is
    too small is scaled up and ceiled. Where `least` equals `most`, as for HPSv3, the result may miss both. A side is at
    least 28: the released code floors thin pictures to 0 and fails.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"expected a picture whose sides differ by at most a factor of {MAX_RATIO}, got "
                         f"{width} x {height} pixels; crop it")  # fmt: skip
    new = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width)]
    if new[0] * new[1] > most:
        shrink = math.sqrt(height * width / most)
        new = [max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (height, width)]
    elif new[0] * new[1] < least:
        grow = math.sqrt(least / (height * width))
        new = [math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width)]
    return new[0], new[1]


def picture(image: Image.Image, least: int, most: int) -> Tensor:
    """[1, 3, h, w] in [0, 1] of any picture: RGB, then PIL's bicubic resize; the exact recipe of HPSv3.

    Raises:
        ValueError: more than 8 bits per channel, or too thin; see `smart_resize`.
    """
    height, width = smart_resize(image.height, image.width, least, most)
    return to_tensor(to_rgb(image).resize((width, height), Image.Resampling.BICUBIC))[None]


def pixels(x: Tensor, least: int, most: int) -> Tensor:
    """[B, 3, h, w] of pixels [B, 3, H, W], both in [0, 1]: the differentiable twin of `picture`.

    Raises:
        ValueError: too thin; see `smart_resize`.
    """
    return resize(x.float(), *smart_resize(x.shape[-2], x.shape[-1], least, most))


def frames(clip: Tensor, least: int, most: int) -> Tensor:
    """[F, 3, h, w] in [0, 1], fp32, of a clip [F, 3, H, W], uint8 or float in [0, 1]: VideoAlign's recipe.

    torchvision's bicubic resize of tensors, with antialiasing. It rounds uint8 clips to 8 bits again, and so does
    this; a float clip is not rounded, so that it keeps its gradient.

    Raises:
        ValueError: too thin; see `smart_resize`.
    """
    size = smart_resize(clip.shape[-2], clip.shape[-1], least, most)
    scale = 1.0 if clip.is_floating_point() else 255.0
    x = clip.float()
    if size != tuple(clip.shape[-2:]):
        x = F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, scale)
    return x if clip.is_floating_point() else x.round() / scale


def patched(x: Tensor) -> tuple[Tensor, list[int]]:
    """(patches [t * h * w, 1176], normalized, and the grid [t, h, w]) of one picture or clip [F, 3, 14 h, 14 w].

    An odd number of frames is filled up with the last one, so that a picture stands twice.
    """
    if x.shape[0] % FRAMES:
        x = torch.cat([x, x[-1:]])
    x = (x - x.new_tensor(CLIP_MEAN).view(3, 1, 1)) / x.new_tensor(CLIP_STD).view(3, 1, 1)
    t, h, w = x.shape[0] // FRAMES, x.shape[-2] // PATCH, x.shape[-1] // PATCH
    blocks = x.view(t, FRAMES, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    # -> t, block row, block column, row in it, column in it, channel, frame, y, x
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), [t, h, w]
