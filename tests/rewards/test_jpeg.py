"""JPEG sizes against those of DDPO's released reward; tests/golden/jpeg.json names the libjpeg that gave them."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from PIL import Image, features

from diffalign.rewards import load_reward

GOLDEN = oracle.golden("jpeg")
TOLERANCE = 0.0 if features.version_feature("libjpeg_turbo") == GOLDEN["libjpeg_turbo"] else 0.01


def kilobytes(pictures: list[Image.Image]) -> list[float]:
    return load_reward("jpeg", mode="incompressibility")(pictures, [""] * len(pictures)).tolist()


def test_it_is_the_official_size():
    found = kilobytes([oracle.photographs()[name] for name in GOLDEN["kilobytes"]])
    # 1e-6: the official number is a double, ours fp32
    assert found == pytest.approx(list(GOLDEN["kilobytes"].values()), rel=TOLERANCE + 1e-6)


@pytest.mark.parametrize("quality", [94, 96])
def test_another_quality_is_far_off(quality: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffalign.rewards.jpeg.QUALITY", quality)
    for name, wanted in GOLDEN["kilobytes"].items():
        assert abs(kilobytes([oracle.photographs()[name]])[0] / wanted - 1) > 0.03, name


def test_compressibility_is_minus_the_size_and_the_default():
    pictures = list(oracle.photographs().values())[:2]
    assert load_reward("jpeg")(pictures, ["", "a"]).tolist() == [-size for size in kilobytes(pictures)]
    assert load_reward("jpeg").card.range == (-float("inf"), 0.0) and load_reward("jpeg").card.unit == "-kB"
    card = load_reward("jpeg", mode="incompressibility").card
    assert card.range == (0.0, float("inf")) and card.unit == "kB"


def test_bytes_and_floats_are_scored_like_pictures(pixels_of):
    picture = oracle.photographs()["exact_224"]
    pixels, wanted = pixels_of(picture), kilobytes([picture])
    reward = load_reward("jpeg", mode="incompressibility")
    assert reward(pixels, [""]).tolist() == reward(pixels / 255, [""]).tolist() == wanted
    still = (pixels / 255)[:, None].expand(1, 3, -1, -1, -1)
    assert reward(still, [""]).tolist() == pytest.approx(wanted, rel=1e-6)


def test_noise_compresses_worse_than_a_flat_picture():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    flat, noisy = load_reward("jpeg")([Image.new("RGB", (64, 64)), Image.fromarray(noise)], ["", ""]).tolist()
    assert noisy < 5 * flat < 0


def test_what_it_cannot_do_is_named():
    with pytest.raises(ValueError, match="compressibility, incompressibility, got 'small'"):
        load_reward("jpeg", mode="small")
    with pytest.raises(ValueError, match="no gradient"):
        load_reward("jpeg")(torch.zeros(1, 3, 8, 8, requires_grad=True), [""])
