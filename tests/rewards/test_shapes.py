from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

from diffalign.rewards.shapes import Shapes
from diffalign.shapes.grammar import one_fact_changed, sample_scenes
from diffalign.shapes.render import render
from diffalign.shapes.verify import verify


def drawn(count: int, seed: int):
    rng = random.Random(seed)
    scenes = sample_scenes("validation", count, seed)
    return scenes, [render(scene, rng) for scene in scenes], rng


def test_pass_and_score_are_the_verdicts():
    scenes, pictures, rng = drawn(24, seed=1)
    captions = [str(one_fact_changed(s, rng)) if i % 2 else str(s) for i, s in enumerate(scenes)]
    verdicts = [verify(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    assert Shapes()(pictures, captions).tolist() == [float(v.ok) for v in verdicts]
    graded = Shapes(mode="score")(pictures, captions)
    assert graded.tolist() == pytest.approx([v.score for v in verdicts])
    assert {v.ok for v in verdicts} == {True, False}
    assert ((graded == 1) == (Shapes()(pictures, captions) == 1)).all()


def test_bytes_and_floats_are_judged_like_pictures(pixels_of):
    scenes, pictures, _ = drawn(8, seed=2)
    captions = [str(scene) for scene in scenes]
    pixels = torch.cat([pixels_of(picture) for picture in pictures])
    assert Shapes()(pixels, captions).tolist() == Shapes()(pixels / 255, captions).tolist() == [1.0] * 8


def test_a_batch_equals_one_by_one():
    scenes, pictures, _ = drawn(6, seed=3)
    captions = [str(scene) for scene in scenes][::-1]
    whole = Shapes(mode="score")(pictures, captions)
    single = [Shapes(mode="score")([p], [c]).item() for p, c in zip(pictures, captions, strict=True)]
    assert whole.tolist() == single


def test_wrong_captions_and_modes_are_named():
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match="a photo of a dog"):
        Shapes()([picture], ["a photo of a dog"])
    with pytest.raises(ValueError, match="pass, score, got 'strict'"):
        Shapes(mode="strict")
    with pytest.raises(ValueError, match="no gradient"):
        Shapes()(torch.zeros(1, 3, 64, 64, requires_grad=True), ["a red circle"])
