"""Decoding of every kind of picture, refusals that name the source, and one geometry for a pair."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data.images import LARGEST, bucket, decode, resize_and_crop

pytestmark = pytest.mark.filterwarnings("ignore")  # what Pillow says about damaged files


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 20, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("P", "PNG"), ("CMYK", "TIFF"),
                       ("CMYK", "JPEG"), ("RGBA", "WEBP"), ("LA", "PNG")]
)  # fmt: skip
def test_every_mode_becomes_rgb_of_the_same_size(mode: str, kind: str) -> None:
    image = decode(encoded(noise().convert(mode), kind), "row 1")
    assert image.mode == "RGB" and image.size == (20, 12)


def test_cmyk_keeps_its_colors() -> None:
    image = decode(encoded(Image.new("RGB", (8, 8), (200, 40, 90)).convert("CMYK"), "TIFF"), "row 1")
    assert np.abs(np.asarray(image).astype(int) - (200, 40, 90)).max() <= 2


def test_16_bits_are_scaled_and_not_cut() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        image = decode(encoded(Image.fromarray(values), kind), "row 1")
        assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_pictures_are_scaled() -> None:
    for top in (1.0, 4.0):
        values = np.array([[0.0, 0.5 * top, top, np.nan]], dtype=np.float32)
        image = decode(encoded(Image.fromarray(values), "TIFF"), "row 1")
        assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255, 0]


def test_transparency_is_put_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert decode(encoded(clear), "row 1").getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(half), "row 1").getpixel((0, 0)) == (255, 127, 127)
    keyed = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    assert decode(keyed, "row 1").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    image = noise()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = decode(encoded(image, exif=exif), "row 1")
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated_pictures_are_refused(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=f"^row 1: an animated {kind}"):
        decode(data, "row 1")
    assert decode(encoded(frames[0], kind), "row 1").size == (8, 8)


def test_a_jpeg_with_a_preview_behind_it_is_a_still_picture() -> None:
    data = encoded(noise(), "MPO", save_all=True, append_images=[noise(4, 4)])
    assert decode(data, "row 1").size == (20, 12)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_every_truncation_is_refused_or_decodes_and_never_does_anything_else(kind: str) -> None:
    data = encoded(noise(), kind)
    refused = 0
    for length in range(0, len(data) - 1, 7):
        try:
            decode(data[:length], "row 1")
        except ValueError as error:
            assert str(error).startswith("row 1: ") and "\n" not in str(error)
            refused += 1
    assert refused > 0.7 * len(range(0, len(data) - 1, 7))


def test_random_damage_raises_nothing_but_value_errors() -> None:
    rng = random.Random(0)
    files = [encoded(noise(), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000")]
    outcomes = []
    for _ in range(600):
        data = bytearray(rng.choice(files))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(min(len(data), rng.choice([64, 10_000])))] = rng.randrange(256)
        try:
            outcomes.append(decode(bytes(data), "row 1").mode == "RGB")
        except ValueError:
            outcomes.append(False)
    assert any(outcomes) and not all(outcomes)


def test_a_picture_that_would_fill_the_memory_is_refused() -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for side in (10_000, 50_000):  # above our limit; above Pillow's own for an error
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        with pytest.raises(ValueError, match="row 1: .*pixels"):
            decode(bomb, "row 1")
    assert LARGEST < 10_000**2


def test_the_short_side_is_resized_and_nothing_is_distorted() -> None:
    wide = Image.new("RGB", (200, 50), "black")
    wide.paste((255, 255, 255), (75, 0, 125, 50))  # a white square of 50 in the middle
    pixels = resize_and_crop(wide, (32, 32))
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
    assert pixels.float().mean() > 254


def test_crop_says_where_and_means_the_same_for_other_sizes() -> None:
    ramp = np.linspace(0, 255, 400).astype(np.uint8)
    for scale in (1, 2):
        image = Image.fromarray(np.repeat(np.repeat(ramp[None, ::scale], 100 // scale, 0)[..., None], 3, 2))
        left, middle, right = (resize_and_crop(image, (50, 50), (0.5, x)).float().mean() for x in (0.0, 0.5, 1.0))
        assert abs(left - 32) < 3 and abs(middle - 127.5) < 3 and abs(right - 223) < 3


def test_flip_mirrors_what_the_crop_shows() -> None:
    image = noise(40, 24)
    plain, flipped = (resize_and_crop(image, (16, 16), (0.2, 0.9), flip) for flip in (False, True))
    assert torch.equal(flipped, plain.flip(2)) and not torch.equal(flipped, plain)


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    image = noise(16, 16)
    assert np.array_equal(resize_and_crop(image, (16, 16)).permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (33, 31)])
def test_odd_sizes_still_fill_the_crop(size: tuple[int, int]) -> None:
    assert resize_and_crop(Image.new("RGB", size), (32, 48), (1.0, 1.0)).shape == (3, 32, 48)


def test_buckets_keep_area_and_aspect() -> None:
    assert bucket(512, 512, 512) == (512, 512)
    for width, height in ((1920, 1080), (1080, 1920), (900, 1200), (5000, 100), (100, 5000)):
        tall, wide = bucket(width, height, 512)
        assert tall % 64 == wide % 64 == 0 and 0.8 < tall * wide / 512**2 < 1.25
        assert (wide > tall) == (width > height) and max(tall / wide, wide / tall) < 2.3
        assert bucket(height, width, 512) == (wide, tall)
    assert bucket(5, 4000, 64) == (64, 64)
