from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.rewards import REWARDS, load_reward, load_rewards
from diffalign.rewards.base import CHECKED, Card, Weighted, dispatch
from diffalign.table import resolve


class Brightness:
    """100 times the mean of the pixels: exact on pictures, differentiable on floats."""

    name = "brightness"
    card = Card("percent", (0.0, 100.0), "tests", "none", "none", True, None, True, "formula only")

    def __call__(self, images, prompts):
        return dispatch(self.name, images, prompts, exact=self._exact, differentiable=self._soft)

    def _exact(self, pictures, prompts):
        assert not torch.is_grad_enabled()
        return torch.tensor([100 * np.asarray(picture).mean() / 255 for picture in pictures])

    def _soft(self, pixels, prompts):
        return 100 * pixels.mean((1, 2, 3))


class PromptLength(Brightness):
    name = "length"
    card = dataclasses.replace(Brightness.card, range=(0.0, float("inf")), weights="other", differentiable=False)

    def __call__(self, images, prompts):
        return dispatch(self.name, images, prompts, exact=self._exact, differentiable=None)

    def _exact(self, pictures, prompts):
        return torch.tensor([float(len(prompt)) for prompt in prompts])


GRAY = [Image.new("RGB", (6, 4), (level,) * 3) for level in (0, 51, 255)]
PROMPTS = ["a", "bb", "ccc"]


def gray_pixels() -> torch.Tensor:
    return torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 6)


def test_pictures_bytes_and_floats_agree():
    reward = Brightness()
    expected = torch.tensor([0.0, 20.0, 100.0])
    for images in (GRAY, tuple(GRAY), gray_pixels(), gray_pixels() / 255, (gray_pixels() / 255).half()):
        scores = reward(images, PROMPTS)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, atol=0.02, rtol=0)


def test_a_clip_scores_the_mean_of_its_frames_and_a_still_clip_its_picture():
    clip = torch.stack([gray_pixels() / 255, torch.zeros(3, 3, 4, 6)], dim=1)
    torch.testing.assert_close(Brightness()(clip, PROMPTS), torch.tensor([0.0, 10.0, 50.0]))
    still = (gray_pixels() / 255)[:, None].expand(3, 5, 3, 4, 6)
    torch.testing.assert_close(Brightness()(still, PROMPTS), Brightness()(gray_pixels() / 255, PROMPTS))
    assert PromptLength()(clip, PROMPTS).tolist() == [1, 2, 3]


def test_floats_get_a_gradient_spread_over_frames_and_bytes_do_not():
    clip = torch.full((2, 4, 3, 5, 5), 0.5, requires_grad=True)
    Brightness()(clip, ["a", "b"]).sum().backward()
    torch.testing.assert_close(clip.grad, torch.full_like(clip, 100 / (4 * 3 * 25)))
    assert not Brightness()(gray_pixels(), PROMPTS).requires_grad


def test_a_reward_without_gradient_refuses_pixels_that_want_one():
    pixels = torch.rand(1, 3, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match="'length' has no gradient"):
        PromptLength()(pixels, ["a"])
    with torch.no_grad():
        assert PromptLength()(pixels, ["abc"]).item() == 3


def test_a_single_prompt_is_that_of_all_pictures_and_frames():
    assert PromptLength()(GRAY, ["abc"]).tolist() == [3, 3, 3]
    assert PromptLength()(torch.rand(2, 4, 3, 8, 8), ["abc"]).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (GRAY, PROMPTS[:2], "2 prompts for 3 pictures"),
        (GRAY[:1], "a", "got one string"),
        (GRAY[:1], [None], "NoneType"),
        (GRAY[0], ["a"], "wrap one in a list"),
        ([], [], "at least one picture"),
        ([torch.rand(3, 4, 4)], ["a"], "torch.stack"),
        (torch.rand(3, 4, 4), ["a"] * 3, r"\[3, 4, 4\]"),
        (torch.rand(1, 4, 4, 4), ["a"], r"\[1, 4, 4, 4\]"),
        (torch.rand(0, 3, 4, 4), [], r"\[0, 3, 4, 4\]"),
        (torch.ones(1, 3, 4, 4, dtype=torch.int64), ["a"], "int64"),
        (torch.full((1, 3, 4, 4), -1.0), ["a"], "from -1 to -1"),
        (torch.full((1, 3, 4, 4), 255.0), ["a"], "to 255"),
        (torch.full((1, 3, 4, 4), float("nan")), ["a"], "nan"),
    ],
)
def test_wrong_inputs_are_named(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        Brightness()(images, prompts)


def test_weighted_is_the_weighted_sum_and_keeps_its_terms():
    both = Weighted({"b": (Brightness(), 0.5), "l": (PromptLength(), -2.0)})
    torch.testing.assert_close(both(GRAY, PROMPTS), torch.tensor([-2.0, 6.0, 44.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(both.terms["b"], torch.tensor([0.0, 20.0, 100.0]), atol=0.02, rtol=0)
    assert both.terms["l"].tolist() == [1, 2, 3]
    assert both.card.range == (-float("inf"), 50.0)
    assert both.card.weights == "none; other"
    assert not both.card.differentiable


def test_a_weight_of_zero_only_logs():
    both = Weighted({"b": (Brightness(), 1.0), "l": (PromptLength(), 0)})
    assert both.card.differentiable
    assert both.card.range == (0.0, 100.0)
    pixels = torch.full((1, 3, 4, 4), 0.25, requires_grad=True)
    score = both(pixels, ["abc"])
    score.backward()
    assert score.item() == pytest.approx(25)
    assert pixels.grad.sum().item() == pytest.approx(100)
    assert both.terms["l"].item() == 3
    assert not any(term.requires_grad for term in both.terms.values())


def test_a_missing_score_that_is_only_logged_does_not_reach_the_sum():
    class Missing(Brightness):
        def __call__(self, images, prompts):
            return torch.full((len(prompts),), float("nan"))

    both = Weighted({"b": (Brightness(), 1.0), "m": (Missing(), 0)})
    assert both(GRAY, PROMPTS).tolist() == Brightness()(GRAY, PROMPTS).tolist() and both.terms["m"].isnan().all()
    assert Weighted({"m": (Missing(), 0)})(GRAY, PROMPTS).tolist() == [0, 0, 0]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", True, None])
def test_weighted_refuses_a_weight_that_is_no_number(weight):
    with pytest.raises(ValueError, match="finite number"):
        Weighted({"b": (Brightness(), weight)})


def test_weighted_refuses_nothing():
    with pytest.raises(ValueError, match="at least one reward"):
        Weighted({})


@pytest.mark.parametrize("name", REWARDS)
def test_every_row_states_what_it_is(name):
    reward = resolve(REWARDS, name, "reward")
    assert reward.name == name
    card = reward.card
    assert card.unit and card.source and card.code and card.weights and card.checked in CHECKED
    assert card.range[0] < card.range[1]
    assert reward.__doc__


def test_load_reward_names_what_is_wrong():
    assert load_reward("shapes", mode="score").mode == "score"
    with pytest.raises(ValueError, match=r"'shape'.*did you mean 'shapes'"):
        load_reward("shape")
    with pytest.raises(ValueError, match=r"'mod'.*'mode'"):
        load_reward("shapes", mod="score")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_load_reward_takes_a_type_by_name_or_as_torch_has_it(clip_folder, dtype):
    assert load_reward("clip", weights=clip_folder, dtype=dtype).tower.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="key of reward 'shapes' 'dtype'"):
        load_reward("shapes", dtype=dtype)
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, got 'float64'"):
        load_reward("clip", weights=clip_folder, dtype=torch.float64)


def test_load_rewards_reads_weights_keywords_and_labels():
    both = load_rewards({"shapes": "5e-1", "graded": {"name": "shapes", "mode": "score", "weight": 2}})
    assert both.weights == {"shapes": 0.5, "graded": 2.0}
    assert both.rewards["graded"].mode == "score"
    assert load_rewards({"shapes": {"mode": "score"}}).weights == {"shapes": 1.0}


def test_a_section_may_name_the_device_of_its_reward():
    two = load_rewards({"a": {"name": "tiny-clip"}, "b": {"name": "tiny-clip", "device": "cpu"}}, device="meta")
    places = {name: reward.tower.device.type for name, reward in two.rewards.items()}
    assert places == {"a": "meta", "b": "cpu"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "at least one reward"),
        (["shapes"], "expected a mapping"),
        ({"shapes": "much"}, "rewards.shapes: expected float, got 'much'"),
        ({"shapes": {"weight": None}}, "rewards.shapes: expected float, got None"),
        ({"shapse": 1.0}, "did you mean 'shapes'"),
        ({"shapes": {"weigth": 1.0}}, "'weigth'"),
    ],
)
def test_load_rewards_names_what_is_wrong(sections, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(sections)
