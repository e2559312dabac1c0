"""Rewards that are scored together share one resize of each picture, and the gradient through it is their sum."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.evaluation import score_images
from diffalign.rewards import base, load_reward, preprocess
from diffalign.rewards.base import Weighted
from diffalign.rewards.prepared import once, shared
from diffalign.rewards.preprocess import hf_recipe, letterbox_recipe, openai_recipe, square_recipe


@pytest.fixture
def two(clip_folder) -> Weighted:
    """Two rewards of one recipe, each with a tower of its own."""
    other = load_reward("clip", weights=clip_folder, scale=1)
    return Weighted({"a": (load_reward("clip", weights=clip_folder), 0.5), "b": (other, -30.0)})


@pytest.fixture
def counted(monkeypatch) -> Counter[str]:
    """How often a picture was resized by PIL, pixels by torch, and bytes were made pictures."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, key: str) -> None:
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kw: counts.update([key]) or inner(*args, **kw))

    count(Image.Image, "resize", "pil")
    count(preprocess, "resize", "torch")
    count(base, "to_pictures", "decoded")
    return counts


def test_pictures_are_resized_once(two, photographs, prompts, counted):
    alone = 0.5 * two.rewards["a"](photographs, prompts) - 30 * two.rewards["b"](photographs, prompts)
    assert counted["pil"] == 2 * len(photographs)
    counted.clear()
    assert torch.equal(two(photographs, prompts), alone)
    assert counted == {"pil": len(photographs)}
    two(photographs, prompts)
    assert counted["pil"] == 2 * len(photographs)  # nothing is kept from call to call


def test_files_are_opened_and_resized_once(two, photographs, prompts, counted, tmp_path, monkeypatch):
    files = []
    for number, picture in enumerate(photographs):
        files.append(tmp_path / f"{number}.png")
        picture.save(files[-1])
    opened, inner = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, *args: opened.append(file) or inner(file, *args))
    scores = score_images(two, files, prompts, batch_size=4)
    assert len(opened) == counted["pil"] == len(files)
    assert scores["a"] == pytest.approx([100 * score for score in scores["b"]], rel=1e-5, abs=1e-4)


def test_bytes_become_pictures_once(two, photographs, prompts, counted, pixels_of):
    pixels = torch.cat([pixels_of(picture.resize((50, 40))) for picture in photographs])
    counted.clear()
    two(pixels, prompts)
    assert counted == {"decoded": 1, "pil": len(photographs)}


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_pixels_are_resized_once_with_the_right_gradient(two, photographs, prompts, counted, pixels_of, frames, kind):
    pixels = torch.cat([pixels_of(picture.resize((50, 40))) for picture in photographs[:4]]).to(kind) / 255
    pixels = pixels if frames == 1 else pixels.view(2, 2, 3, 40, 50)
    texts = prompts[: len(pixels)]
    gradients = []
    for reward, weight in ((two.rewards["a"], 0.5), (two.rewards["b"], -30.0)):
        own = pixels.clone().requires_grad_()
        (weight * reward(own, texts)).sum().backward()
        gradients.append(own.grad)
    counted.clear()
    together = pixels.clone().requires_grad_()
    two(together, texts).sum().backward()
    assert counted == {"torch": 1}
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(together.grad, sum(gradients), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("order", [("log", "train"), ("train", "log")])
def test_a_reward_that_only_logs_does_not_take_the_gradient_away(clip_folder, photographs, counted, pixels_of, order):
    weights = {"log": 0.0, "train": 1.0}
    both = Weighted({name: (load_reward("clip", weights=clip_folder), weights[name]) for name in order})
    pixels = (pixels_of(photographs[0]) / 255).requires_grad_()
    counted.clear()
    both(pixels, ["a cat"]).sum().backward()
    assert counted == {"torch": 1}
    alone = pixels.detach().clone().requires_grad_()
    both.rewards["train"](alone, ["a cat"]).sum().backward()
    torch.testing.assert_close(pixels.grad, alone.grad, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert not both(pixels, ["a cat"]).requires_grad


def test_a_weighted_sum_within_another_shares_with_it(two, photographs, prompts, counted):
    outer = Weighted({"inner": (two, 1.0), "a": (two.rewards["a"], 1.0)})
    outer(photographs, prompts)
    assert counted == {"pil": len(photographs)}


def test_recipes_are_values():
    for make in (hf_recipe, openai_recipe, square_recipe, letterbox_recipe):
        assert make(32) == make(32) and hash(make(32)) == hash(make(32)) and make(32) != make(64)
    assert letterbox_recipe(32, antialias=False) == letterbox_recipe(32, antialias=False) != letterbox_recipe(32)
    assert hf_recipe(32) != openai_recipe(32)


def test_other_sizes_other_recipes_and_other_means_are_not_mixed_up(photographs):
    recipes = [hf_recipe(32), hf_recipe(48), openai_recipe(32), square_recipe(32), letterbox_recipe(32),
               letterbox_recipe(32, antialias=False), hf_recipe(32, (0.5,) * 3, (0.5,) * 3)]  # fmt: skip
    alone = [recipe.pictures(photographs) for recipe in recipes]
    with shared():
        for _ in range(2):
            assert all(torch.equal(recipe.pictures(photographs), x) for recipe, x in zip(recipes, alone, strict=True))
        assert torch.equal(recipes[0].pictures(photographs[:2]), alone[0][:2])
        assert torch.equal(recipes[0].pictures(photographs[::-1]), alone[0].flip(0))


def total(source: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * source.sum()


def test_a_source_that_is_gone_is_not_taken_for_a_new_one():
    """Python gives the number of a dead object to the next one."""
    with shared():
        for value in range(20):
            assert once(total, torch.full((3,), float(value)), 2.0) == 6 * value


@pytest.mark.parametrize(("images", "message"), [(Image.new("RGB", (4, 4)), "wrap one in a list"), (None, "NoneType")])
def test_wrong_inputs_are_named_in_a_sum_too(two, images, message):
    with pytest.raises(ValueError, match=message):
        two(images, ["a"])


def test_a_failure_leaves_no_scope(two, photographs):
    with pytest.raises(ValueError, match="one prompt per picture"):
        two(photographs, ["a", "b"])
    source = torch.ones(2)
    assert once(total, source, 1.0) is not once(total, source, 1.0)
