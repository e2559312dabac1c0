"""Picture rewards on clips: which frames count and how."""

from __future__ import annotations

import pytest
import torch

from diffalign.commands import check_reward
from diffalign.rewards import load_reward, load_rewards
from diffalign.rewards.base import Card, Explains, dispatch
from diffalign.rewards.clips import Frames, dispatch_clips, spread


class Brightness:
    name = "brightness"
    card = Card("percent", (0.0, 100.0), "tests", "none", "none", True, None, True, "formula only")

    def __init__(self):
        self.seen = 0

    def __call__(self, images, prompts):
        return dispatch(self.name, images, prompts, exact=None, differentiable=self._soft)

    def _soft(self, pixels, prompts):
        self.seen += len(pixels)
        return 100 * pixels.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def ramp(frames: int = 5) -> torch.Tensor:
    """Two clips that get brighter, or darker, frame by frame."""
    levels = torch.linspace(0.2, 0.6, frames)
    return torch.stack([levels, levels.flip(0)])[:, :, None, None, None].expand(2, frames, 3, 4, 4)


@pytest.mark.parametrize(
    ("options", "scores", "seen"),
    [
        ({}, [41, 42], 10),
        ({"reduce": "min"}, [21, 22], 10),
        ({"reduce": "first"}, [21, 62], 2),
        ({"frames": 2, "reduce": "min"}, [21, 22], 4),
        ({"frames": 1}, [21, 62], 2),
        ({"frames": 99}, [41, 42], 10),
    ],
)
def test_frames_are_taken_and_their_scores_become_one(options, scores, seen):
    inner = Brightness()
    reward = Frames(reward=inner, **options)
    torch.testing.assert_close(reward(ramp(), ["a", "bb"]), torch.tensor(scores).float(), atol=1e-3, rtol=0)
    assert inner.seen == seen, "frames that do not count are not scored"


@pytest.mark.parametrize("reduce", ["mean", "min", "first"])
def test_a_still_clip_is_its_picture_and_pictures_pass(reduce):
    reward = Frames(reward=Brightness(), frames=3, reduce=reduce)
    picture = ramp()[:, 1]
    assert torch.equal(reward(picture, ["a", "b"]), Brightness()(picture, ["a", "b"]))
    still = picture[:, None].expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(reward(still, ["a", "b"]), Brightness()(picture, ["a", "b"]))


def test_the_gradient_reaches_what_counts():
    reached = {}
    for reduce in ("mean", "min", "first"):
        clip = ramp().clone().requires_grad_()
        Frames(reward=Brightness(), frames=3, reduce=reduce)(clip, ["a", "b"]).sum().backward()
        reached[reduce] = (clip.grad.flatten(2).abs().sum(2) > 0).int().tolist()
    assert reached["mean"] == [[1, 0, 1, 0, 1]] * 2
    assert reached["min"] == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert reached["first"] == [[1, 0, 0, 0, 0]] * 2


class Unsure(Brightness):
    """No score where it is too dark."""

    reasons = ()

    def _soft(self, pixels, prompts):
        scores = super()._soft(pixels, prompts)
        self.reasons = ["" if score > 25 else f"{score:.0f} is too dark" for score in scores.tolist()]
        return torch.where(scores > 25, scores, float("nan"))


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({}, ["21 is too dark", "22 is too dark"]),
        ({"frames": 3, "reduce": "min"}, ["21 is too dark", "22 is too dark"]),
        ({"reduce": "first"}, ["21 is too dark", ""]),
    ],
)
def test_why_a_score_is_missing_is_passed_on(options, reasons):
    reward = Frames(reward=Unsure(), **options)
    assert isinstance(reward, Explains) and reward.reasons == []
    scores = reward(ramp(), ["a", "bb"])
    assert reward.reasons == reasons
    assert scores.isnan().tolist() == [bool(reason) for reason in reasons]
    reward(ramp()[0, :3], ["a"] * 3)
    assert reward.reasons == ["21 is too dark", "", ""], "of pictures, one each"


def test_a_reward_without_reasons_gets_none():
    reward = Frames(reward=Brightness())
    reward(ramp(), ["a", "bb"])
    assert not isinstance(reward, Explains)


def test_frames_are_spread_from_first_to_last():
    assert spread(10, 4) == [0, 3, 6, 9] and spread(7, 3) == [0, 3, 6] and spread(7, 1) == [0]
    assert spread(3, None) == spread(3, 3) == spread(3, 8) == [0, 1, 2]


def test_it_is_an_option_of_every_picture_reward():
    section = {"clips": {"frames": 2, "reduce": "min"}, "mode": "compressibility", "weight": 2}
    rewards = load_rewards({"jpeg": section})
    assert isinstance(rewards.rewards["jpeg"], Frames) and rewards.weights == {"jpeg": 2.0}
    noise = torch.randint(0, 256, (1, 4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = load_reward("jpeg")
    each = torch.cat([plain(noise[:, frame], ["a"]) for frame in (0, 3)])
    assert rewards.rewards["jpeg"](noise, ["a"]) == each.min()
    assert rewards.rewards["jpeg"].card == plain.card and rewards.rewards["jpeg"].name == "jpeg"


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ({"frames": 0}, "clips.frames: expected at least 1, got 0"),
        ({"reduce": "max"}, "clips.reduce: expected one of mean, min, first, got 'max'"),
        (8, "jpeg.clips: expected a mapping such as .frames: 8, reduce: min., got 8"),
        ({"frame": 3}, "'frame'.*did you mean 'frames'"),
        ({"frames": 2.5}, "frames: expected int or nothing, got 2.5"),
    ],
)
def test_what_does_not_fit_is_named(clips, message):
    with pytest.raises(ValueError, match=message):
        load_reward("jpeg", clips=clips)
    if clips not in ({"frames": 0}, {"reduce": "max"}):  # what the constructor judges shows when it is loaded
        with pytest.raises(ValueError, match=message):
            check_reward("jpeg", {"clips": clips})


def test_a_config_with_clips_is_checked():
    check_reward("jpeg", {"clips": {"frames": 2}, "weight": 0.5})


def test_rewards_of_whole_clips_have_their_own_frames():
    class Whole(Brightness):
        name = "videoreward"

    with pytest.raises(ValueError, match="videoreward watches whole clips; how many frames it takes is its own"):
        Frames(reward=Whole())


def test_rewards_of_whole_clips_check_what_they_get():
    def score(clips, prompts):
        return torch.stack([clip.float().mean() for clip in clips])

    watched = torch.full((1, 2, 3, 4, 4), 0.5)
    assert dispatch_clips("x", watched, ["a"], score, differentiable=True).tolist() == [0.5]
    assert dispatch_clips("x", watched, ["a"], score, differentiable=False).tolist() == [128], "as 8 bits"
    with pytest.raises(ValueError, match="2 prompts for 1 pictures"):
        dispatch_clips("x", watched, ["a", "b"], score, differentiable=True)
    with pytest.raises(ValueError, match="expected pixels"):
        dispatch_clips("x", watched[0, 0], ["a"] * 3, score, differentiable=True)
    with pytest.raises(ValueError, match="'x' has no gradient"):
        dispatch_clips("x", watched.requires_grad_(), ["a"], score, differentiable=False)
