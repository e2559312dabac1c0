"""The moving shapes world: what captions say, what clips show, and what the verifier lets pass."""

from __future__ import annotations

import random

import numpy as np
import pytest

from diffalign.shapes.clips import FRAMES, offsets, render_clip
from diffalign.shapes.grammar import split_combinations
from diffalign.shapes.motion import KINDS, Motion, MovingScene, parse_moving, sample_motion, sample_moving
from diffalign.shapes.verify_clip import dynamic_degree, flicker, travelled, verify_clip


def other_motion(moving: MovingScene, rng: random.Random) -> MovingScene:
    """The same scene with a motion that is false wherever the true one holds: another kind, or another way."""
    while (other := sample_motion(rng)).ways == moving.motion.ways:
        pass
    return MovingScene(moving.scene, other)


CAPTIONS = {
    "a red circle moving left": Motion(("left", "left")),
    "a yellow cross moving down quickly": Motion(("down", "down"), "quickly"),
    "a blue square above a green circle moving up then stopping": Motion(("up", None)),
    "a red circle moving left slowly then moving up": Motion(("left", "up"), "slowly"),
    "a red circle left of a cyan square standing still": Motion(),
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_captions_are_read_and_said(caption: str) -> None:
    moving = parse_moving(f"  {caption.upper()}. ")
    assert moving.motion == CAPTIONS[caption] and str(moving) == caption


def test_every_sampled_caption_is_one_of_its_split() -> None:
    for split in ("train", "heldout"):
        several = sample_moving(split, 300, seed=3)
        assert several == sample_moving(split, 300, seed=3) != sample_moving(split, 300, seed=4)
        assert {moving.category for moving in several} == set(KINDS)
        for moving in several:
            category, things = moving.scene.combination
            assert parse_moving(str(moving)) == moving and things in split_combinations(split, category)


@pytest.mark.parametrize(
    "caption",
    ["a red circle", "two red circles moving left", "a red circle moving sideways", "a red circle moving left then",
     "a red circle moving left then moving left", "a red circle standing still quickly", "moving left",
     "a red circle left of a red circle moving up", "a pink circle moving up"],
)  # fmt: skip
def test_what_is_no_caption_of_a_clip_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="expected a caption"):
        parse_moving(caption)


@pytest.mark.parametrize(("ways", "speed"), [((None, "left"), None), ((None, None), "slowly"), (("in", "in"), None),
                                             (("left", "left"), "fast")])  # fmt: skip
def test_what_cannot_be_said_is_no_motion(ways: tuple[str | None, str | None], speed: str | None) -> None:
    with pytest.raises(ValueError, match="expected ways"):
        Motion(ways, speed)


def test_a_clip_goes_where_its_caption_says() -> None:
    assert offsets(Motion(("left", "up")), 8.0, 5) == [(0, 0), (-4, 0), (-8, 0), (-8, -4), (-8, -8)]
    assert offsets(Motion(("down", None)), 8.0, 5) == [(0, 0), (0, 4), (0, 8), (0, 8), (0, 8)]


@pytest.mark.parametrize("frames", [9, FRAMES])
def test_the_verifier_lets_every_drawn_clip_pass_and_no_other_motion(frames: int) -> None:
    rng = random.Random(0)
    for moving in sample_moving("validation", 30, seed=1):
        clip = render_clip(moving, rng, frames)
        assert clip.shape == (frames, 64, 64, 3) and clip.dtype == np.uint8
        verdict = verify_clip(clip, str(moving))
        assert verdict.ok and verdict.score == 1.0, (str(moving), verdict.wrong)
        assert flicker(verdict) == 0 and len(verdict.frames) == frames
        assert (dynamic_degree(verdict) > 1.5) == (moving.category != "still")
        for _ in range(3):
            other = other_motion(moving, rng)
            wrong = verify_clip(clip, other)
            assert not wrong.ok and wrong.score < 1, (str(moving), str(other))


def test_speeds_are_told_apart() -> None:
    rng = random.Random(1)
    for said, other in (("slowly", "quickly"), ("quickly", "slowly")):
        for _ in range(10):
            clip = render_clip(parse_moving(f"a red circle moving left {said}"), rng)
            assert verify_clip(clip, "a red circle moving left").ok
            assert not verify_clip(clip, f"a red circle moving left {other}").ok


def test_a_clip_backwards_goes_the_other_way() -> None:
    clip = render_clip(parse_moving("a red circle moving left"), random.Random(2))
    assert verify_clip(clip[::-1], "a red circle moving right").ok
    assert not verify_clip(clip[::-1], "a red circle moving left").ok


def test_a_half_that_is_wrong_is_named() -> None:
    clip = render_clip(parse_moving("a red circle above a blue square moving down then stopping"), random.Random(3))
    verdict = verify_clip(clip, "a red circle above a blue square moving down")
    assert [bool(half.wrong) for half in verdict.halves] == [False, True]
    assert "half 2: the blue square goes" in verdict.wrong[0]
    assert 0.5 < verdict.score < 0.9
    assert not verify_clip(clip, "a red circle above a green square moving down then stopping").ok


def test_an_object_that_changes_or_goes_away_is_no_constant_one() -> None:
    rng = random.Random(4)
    clip = render_clip(parse_moving("a red circle standing still"), rng)
    changed = clip.copy()
    changed[10:] = changed[10:, :, :, ::-1]  # red and blue change places
    verdict = verify_clip(changed, "a red circle standing still")
    assert [bool(half.wrong) for half in verdict.halves] == [False, True] and flicker(verdict) == pytest.approx(1 / 16)
    assert "frames do not show 'a red circle'" in verdict.wrong[0]
    gone = clip.copy()
    gone[:] = gone[:, :1, :1]
    verdict = verify_clip(gone, "a red circle standing still")
    assert not verdict.ok and verdict.score == 0 and np.isnan(dynamic_degree(verdict))


def test_a_frame_or_two_may_be_lost() -> None:
    moving = parse_moving("a red circle moving right quickly")
    clip = render_clip(moving, random.Random(5)).copy()
    clip[4] = clip[4, :1, :1]
    verdict = verify_clip(clip, moving)
    assert verdict.ok and flicker(verdict) == pytest.approx(2 / 16)


def test_a_jump_in_one_frame_does_not_make_a_motion() -> None:
    assert travelled(np.array([[5.0, 5.0]] * 8 + [[9.0, 5.0]]))[0] < 2.5
    assert travelled(np.array([[np.nan, np.nan], [1.0, 2.0], [2.0, 2.0]])) == pytest.approx((2.0, 0.0))
    assert np.isnan(travelled(np.full((5, 2), np.nan))).all()


@pytest.mark.parametrize("clip", [np.zeros((2, 64, 64, 3), np.uint8), np.zeros((9, 64, 64), np.uint8),
                                  np.zeros((9, 64, 64, 3)), [1]])  # fmt: skip
def test_what_is_no_clip_is_refused(clip: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected a clip"):
        verify_clip(clip, "a red circle standing still")


@pytest.mark.parametrize(("frames", "size"), [(8, 64), (1, 64), (9, 4)])
def test_a_clip_has_two_halves(frames: int, size: int) -> None:
    with pytest.raises(ValueError, match="an odd number of frames"):
        render_clip(MovingScene(parse_moving("a red circle standing still").scene, Motion()), random.Random(0), frames,
                    size)  # fmt: skip
