"""Wrong resizes miss the official scores by what was measured of them: a test that they would pass shows nothing."""

from __future__ import annotations

import gaps
import oracle
import pytest
import torch
import zoo

OPAQUE = ["astronaut_512", "coffee_600x400", "chelsea_451x300", "china_640x427", "flower_640x427", "portrait_256x400",
          "small_96x64", "exact_224", "thin_224x100", "gray_L_512"]  # fmt: skip
MARGINS = [  # reward, golden scores, the mistake, the largest gap over opaque photographs and all prompts
    ("pickscore", "pickscore", {"antialias": False}, 3.5),
    ("pickscore", "pickscore", {"mode": "bilinear"}, 1.6),
    ("hpsv2.1", "hpsv2", {"antialias": False}, 0.053),
    ("imagereward", "imagereward", {"antialias": False}, 0.36),
]


@pytest.mark.parametrize(("name", "golden", "mistake", "most"), MARGINS)
def test_a_wrong_resize_is_off_by_the_measured_margin(name, golden, mistake, most):
    reward, wanted = zoo.ZOO[name].build(), oracle.golden(golden)["scores"]
    texts, worst = [oracle.prompts()[key] for key in wanted], 0.0
    for picture in OPAQUE:
        scores = [wanted[key][picture] for key in wanted]
        if None in scores:  # the official HPSv2 fails on it
            continue
        pixels = gaps.as_pixels(oracle.photographs()[picture].convert("RGB")).expand(len(texts), -1, -1, -1)
        with gaps.resizing(**mistake), torch.no_grad():
            worst = max(worst, (reward(pixels, texts) - torch.tensor(scores)).abs().max().item())
    assert worst == pytest.approx(most, rel=0.02)
