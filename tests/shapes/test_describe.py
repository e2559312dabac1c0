"""The captioner says of a picture what the verifier accepts."""

import random

import numpy as np
import pytest

from diffalign.shapes.describe import describe
from diffalign.shapes.grammar import CATEGORIES, sample_scenes
from diffalign.shapes.render import render
from diffalign.shapes.verify import look, verify


@pytest.mark.parametrize("category", CATEGORIES)
def test_what_is_said_of_a_rendered_picture_is_true(category: str) -> None:
    scenes = [s for s in sample_scenes("train", 400, seed=3) if s.category == category][:60]
    said = 0
    for number, scene in enumerate(scenes):
        picture = np.asarray(render(scene, random.Random(number)))
        caption = describe(look(picture)[0])
        if caption is not None:
            said += 1
            assert verify(picture, caption).ok, (caption, str(scene))
    assert said >= 0.98 * len(scenes)


def test_nothing_is_said_of_what_the_grammar_has_no_words_for() -> None:
    assert describe(()) is None
    scene = sample_scenes("train", 50, seed=1)[0]
    seen = look(np.asarray(render(scene, random.Random(0))))[0]
    assert describe([*seen, *seen, *seen, *seen, *seen]) is None
