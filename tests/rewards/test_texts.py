"""Features of prompts are made once each, and never those of other weights, another type or another mode."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from diffalign.rewards import load_reward, texts
from diffalign.rewards.texts import TextFeatures
from diffalign.rewards.towers import TransformersTower


@pytest.fixture
def reward(clip_folder) -> Any:
    return load_reward("clip", weights=clip_folder)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, ...]]:
    """The prompts of every forward pass of a text tower."""
    seen, encode = [], TransformersTower.text_features
    monkeypatch.setattr(
        TransformersTower, "text_features", lambda self, some: seen.append(tuple(some)) or encode(self, some)
    )
    return seen


def test_a_prompt_is_encoded_once_inside_a_batch_and_across_calls(reward, asked, photographs):
    reward(photographs[:4], ["a cat", "tea", "a cat", "tea"])
    assert asked == [("a cat",), ("tea",)]
    reward(photographs[:3], ["tea", "a dog", "a cat"])
    reward.text_features(["a dog"])
    assert asked == [("a cat",), ("tea",), ("a dog",)]


def test_a_feature_does_not_depend_on_what_was_asked_before_or_with_it(clip_folder, prompts):
    first, second = (load_reward("clip", weights=clip_folder) for _ in range(2))
    together = first.text_features(prompts)
    alone = torch.cat([second.text_features([prompt]) for prompt in prompts[::-1]]).flip(0)
    assert torch.equal(together, alone)
    assert torch.equal(first.text_features(prompts[::2]), together[::2])


def test_other_devices_encode_what_is_new_together(reward, asked, monkeypatch):
    class Elsewhere(TransformersTower):
        device = torch.device("meta")

    monkeypatch.setattr(texts, "TOGETHER", 2)
    features = TextFeatures()
    tower = Elsewhere(reward.tower.model, reward.tower.tokenizer, reward.tower.recipe)
    found = features(tower, ["a cat", "tea", "a cat", "a dog"])
    assert asked == [("a cat", "tea"), ("a dog",)]
    torch.testing.assert_close(found, reward.text_features(["a cat", "tea", "a cat", "a dog"]), atol=1e-5, rtol=0)


def test_only_the_latest_are_kept(reward, asked):
    features = TextFeatures(limit=2)
    for some in (["a", "b"], ["a"], ["c"], ["a"], ["b"]):
        features(reward.tower, some)
    assert asked == [("a",), ("b",), ("c",), ("b",)]  # "b" was asked for longest ago when "c" came
    assert len(features(reward.tower, ["d", "e", "f"])) == 3  # more at once than are kept
    assert list(features._rows) == ["e", "f"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()}),
        lambda model: model.text_projection.weight.mul_(torch.arange(16)[:, None]),
    ],
    ids=["cast", "loaded", "written"],
)
def test_features_of_other_weights_are_forgotten(clip_folder, reward, change):
    before = reward.text_features(["a cat"])
    with torch.no_grad():
        change(reward.tower.model)
    fresh = load_reward("clip", weights=clip_folder)
    with torch.no_grad():
        change(fresh.tower.model)
    assert torch.equal(reward.text_features(["a cat"]), fresh.text_features(["a cat"]))
    assert not torch.equal(reward.text_features(["a cat"]), before)


def test_features_of_another_tower_are_forgotten(reward, siglip_folder):
    reward.text_features(["a cat"])
    other = copy.copy(reward)
    other.tower = load_reward("siglip", weights=siglip_folder).tower
    assert torch.equal(
        other.text_features(["a cat"]), load_reward("siglip", weights=siglip_folder).text_features(["a cat"])
    )
    other.tower = dataclasses.replace(reward.tower)
    assert torch.equal(other.text_features(["a cat"]), reward.text_features(["a cat"]))


def test_what_inference_mode_left_serves_a_gradient(reward, photographs, pixels_of):
    with torch.inference_mode():
        reward(photographs[:1], ["a cat"])
    pixels = (pixels_of(photographs[0]) / 255).requires_grad_()
    reward(pixels, ["a cat"]).sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert not reward.text_features(["a cat"]).requires_grad


def test_a_tower_that_inference_mode_made_is_asked_like_any_other(clip_folder, reward, photographs):
    with torch.inference_mode():
        made = load_reward("clip", weights=clip_folder)
        assert torch.equal(made(photographs[:1], ["a cat"]), reward(photographs[:1], ["a cat"]))
    with torch.no_grad():
        assert torch.equal(made(photographs[:1], ["a cat"]), reward(photographs[:1], ["a cat"]))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_rows_of_one_batch_are_memory_of_their_own(name, request):
    reward = load_reward(name, weights=request.getfixturevalue(f"{name}_folder"))
    reward.text_features(["a cat", "tea"])
    rows = reward._texts._rows.values()
    assert all(row.untyped_storage().nbytes() == row.numel() * 4 for row in rows)
