"""What Qwen2-VL reads: sizes, the exact recipe against plain PIL and transformers, the differentiable twin."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from diffalign.rewards.qwen_pictures import frames, patched, picture, pixels, smart_resize

BUDGET = 256 * 28 * 28


def as_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(("case", "size"), oracle.golden("qwen2vl_rewards")["smart_resize"].items())
def test_sizes_are_those_of_the_official_code(case: str, size: list[int]):
    height, width = (int(side) for side in case.split("@")[0].split("x"))
    assert list(smart_resize(height, width, BUDGET, BUDGET)) == size


def test_thin_pictures_keep_a_side_and_needles_are_refused():
    height, width = smart_resize(2000, 11, 4 * 28 * 28, BUDGET)
    assert width == 28 and height % 28 == 0
    with pytest.raises(ValueError, match=r"at most a factor of 200, got 11 x 2201 pixels; crop it"):
        smart_resize(2201, 11, BUDGET, BUDGET)


@pytest.mark.parametrize("name", oracle.golden("inputs")["images"])
def test_the_exact_recipe_is_pil_then_transformers_patches(name: str):
    """The PIL reference is four lines; transformers' processor, given its result, must find nothing left to resize."""
    image = oracle.photographs()[name]
    height, width = smart_resize(image.height, image.width, BUDGET, BUDGET)
    plain = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    made = picture(image, BUDGET, BUDGET)
    assert torch.equal(made, as_pixels(plain))
    rows, grid = patched(made)
    wanted = Qwen2VLImageProcessorPil()(plain, return_tensors="pt")
    assert grid == wanted.image_grid_thw[0].tolist()
    torch.testing.assert_close(rows, wanted.pixel_values, atol=1e-6, rtol=0)


def test_a_whole_photograph_is_the_official_one():
    """Recorded of the official code in fp16, whose rounding the sum over 1.2 million values keeps."""
    known = oracle.golden("qwen2vl_rewards")["coffee_full"]
    rows, grid = patched(picture(oracle.photographs()["coffee_600x400"], BUDGET, BUDGET))
    assert [grid] == known["grid"]
    assert rows.double().sum().item() == pytest.approx(known["sum"], rel=1e-6)
    wrong, _ = patched(as_pixels(oracle.photographs()["coffee_600x400"].resize((532, 364), Image.Resampling.LANCZOS)))
    assert wrong.double().sum().item() != pytest.approx(known["sum"], rel=1e-6)


def test_the_differentiable_twin_differs_by_rounding():
    gaps = []
    for image in oracle.photographs().values():
        soft = pixels(as_pixels(image), BUDGET, BUDGET)
        gaps.append((soft - picture(image, BUDGET, BUDGET)).abs())
    assert max(gap.max().item() for gap in gaps) <= 0.012
    assert sum(gap.mean().item() for gap in gaps) / len(gaps) <= 0.0015


def test_frames_are_resized_as_torchvision_does():
    clip = torch.stack([as_pixels(oracle.photographs()["coffee_600x400"])[0], torch.zeros(3, 400, 600)])
    clip = (clip * 255).round().to(torch.uint8)
    least, most = 128 * 28 * 28, 200704
    height, width = smart_resize(400, 600, least, most)
    official = resize(clip, [height, width], InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal((frames(clip, least, most) * 255).round().to(torch.uint8), official)
    soft = frames(clip.float() / 255, least, most)
    assert 0 < (soft - official / 255).abs().max() <= 0.5 / 255 + 1e-6, "what is left is the rounding"


def test_a_clip_is_cut_two_frames_at_a_time_and_an_odd_one_filled_up():
    clip = torch.rand(4, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    rows, grid = patched(clip)
    assert grid == [2, 4, 6] and rows.shape == (math.prod(grid), 3 * 2 * 14 * 14)
    first, _ = patched(clip[:2])
    assert torch.equal(rows[: len(first)], first)
    odd, grid = patched(clip[:3])
    assert grid == [2, 4, 6] and torch.equal(odd, patched(torch.cat([clip[:3], clip[2:3]]))[0])
    # the second patch is the right neighbor, the third the one below: blocks of two by two
    mean = rows.view(2, 2, 3, 2, 2, -1)
    by_hand = patched(clip[:2, :, :28, :28])[0]
    assert torch.equal(mean[0, 0, 0].reshape(4, -1), by_hand)
