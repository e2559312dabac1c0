from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import image_transform
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffalign.rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    hf_pixels,
    hf_recipe,
    margin_floor,
    margin_half_even,
    openai_recipe,
    short_side,
    square_recipe,
    to_pictures,
    to_rgb,
)

RECIPES = {"hf": hf_recipe, "openai": openai_recipe, "square": square_recipe}


@pytest.mark.parametrize("size", [32, 96])
def test_hf_recipe_equals_transformers_to_the_last_bit(photographs, size):
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    for picture in [*photographs, photographs[0].convert("L"), photographs[0].convert("CMYK")]:
        expected = processor(picture.convert("RGB"), return_tensors="pt").pixel_values[0]
        assert torch.equal(hf_recipe(size).pictures([picture])[0], expected)


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_openai_recipe_equals_open_clip_to_the_last_bit(photographs, size, mode):
    transform = image_transform(size, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    for picture in photographs:
        picture = picture.convert(mode)
        if mode == "RGBA":
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        assert torch.equal(openai_recipe(size).pictures([picture])[0], transform(picture))


def test_square_recipe_keeps_the_whole_picture():
    picture = Image.new("RGB", (90, 30), (255, 0, 0))
    picture.paste((0, 0, 255), (60, 0, 90, 30))
    square = square_recipe(30, mean=(0, 0, 0), std=(1, 1, 1)).pictures([picture])[0]
    assert square.shape == (3, 30, 30)
    assert torch.equal(square[:, 15, 2], torch.tensor([1.0, 0, 0]))
    assert torch.equal(square[:, 15, 27], torch.tensor([0, 0, 1.0]))


def test_long_side_is_truncated_and_crops_differ_where_the_margin_is_odd():
    assert short_side(640, 427, 224) == (335, 224)  # 335.73
    assert short_side(427, 640, 224) == (224, 335)
    assert [margin_floor(111), margin_half_even(111), margin_floor(109), margin_half_even(109)] == [55, 56, 54, 54]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [32, 96])
def test_the_differentiable_twin_is_close_to_the_exact_recipe(photographs, pixels_of, name, size):
    recipe = RECIPES[name](size, mean=(0, 0, 0), std=(1, 1, 1))
    for picture in photographs:
        gap = (recipe.pixels(pixels_of(picture) / 255) - recipe.pictures([picture])).abs()
        assert gap.mean() < 0.4 / 255  # two roundings, each a quarter of a level on average
        assert gap.max() < (1.5 / 255 if name != "square" else 0.03)  # PIL may take the columns of a portrait first


def test_without_antialiasing_the_gap_would_be_far_larger(photographs, pixels_of):
    picture = photographs[0]
    pixels = pixels_of(picture) / 255
    width, height = short_side(*picture.size, 32)
    aliased = F.interpolate(pixels, size=(height, width), mode="bicubic").clamp(0, 1)
    left = margin_floor(width - 32)
    aliased = aliased[..., :32, left : left + 32]
    exact = hf_recipe(32, mean=(0, 0, 0), std=(1, 1, 1)).pictures([picture])
    assert (aliased - exact).abs().mean() > 10 * (hf_pixels(pixels, 32) - exact).abs().mean()


def test_a_gradient_reaches_every_pixel_that_the_crop_keeps(photographs, pixels_of):
    pixels = (pixels_of(photographs[2]).double() / 255).requires_grad_()  # square: nothing is cropped
    hf_pixels(pixels, 32).square().sum().backward()
    assert (pixels.grad.abs().sum(1) > 0).float().mean() > 0.99


def test_the_gradient_is_right():
    pixels = torch.rand(1, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    assert torch.autograd.gradcheck(lambda x: hf_pixels(x, 5), pixels.requires_grad_())


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_more_than_8_bits_is_refused_not_clipped(mode):
    picture = Image.new(mode, (8, 8))
    for convert in (to_rgb, lambda p: hf_recipe(4).pictures([p]), lambda p: openai_recipe(4).pictures([p])):
        with pytest.raises(ValueError, match="8 bits per channel"):
            convert(picture)


def test_alpha_is_dropped_not_put_on_white():
    picture = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert to_rgb(picture).getpixel((0, 0)) == (10, 20, 30)


def test_to_pictures_rounds_and_keeps_uint8():
    pixels = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 5, 4)
    pictures = to_pictures(pixels)
    assert [picture.size for picture in pictures] == [(4, 5), (4, 5)]
    assert pictures[1].getpixel((3, 4)) == (0, 128, 255)
    array = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    assert np.array_equal(np.array(to_pictures(torch.from_numpy(array).permute(2, 0, 1)[None])[0]), array)
