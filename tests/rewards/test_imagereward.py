"""ImageReward gives the scores that its official code gave, from pictures and prompts prepared to the last bit."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import small_checkpoints
import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards import load_reward
from diffalign.rewards.blip import BertSizes, ViTSizes, bert_sizes, vit_sizes
from diffalign.rewards.blip_score import bert_tokenizer, tokenized
from diffalign.rewards.imagereward import MEAN, STD, UNUSED, ImageRewardNetwork
from diffalign.rewards.preprocess import hf_recipe, square_recipe

VISION, TEXT = small_checkpoints.IMAGEREWARD
HEADS = {"vision_heads": VISION.heads, "text_heads": TEXT.heads}
OPAQUE = ["astronaut_512", "coffee_600x400", "chelsea_451x300", "china_640x427", "portrait_256x400", "exact_224"]
PROMPT = "a cup of tea"


def meta_network(vision: ViTSizes, text: BertSizes) -> ImageRewardNetwork:
    with torch.device("meta"):
        return ImageRewardNetwork(vision, text)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoints.imagereward(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="module")
def reward(official: Path) -> Any:
    return load_reward("imagereward", weights=official.parent, **HEADS)


def scores(reward: Any, prompt: str, names: list[str]) -> Tensor:
    return reward([oracle.photographs()[name] for name in names], [prompt] * len(names))


def gaps(reward: Any, pictures: dict[str, Image.Image], key: str) -> Tensor:
    """|score - golden score| of these pictures with one prompt."""
    wanted = oracle.golden("imagereward")["scores"][key]
    found = reward(list(pictures.values()), [oracle.prompts()[key]] * len(pictures))
    return (found - torch.tensor([wanted[name] for name in pictures])).abs()


def as_pixels(name: str) -> Tensor:
    return torch.from_numpy(np.array(oracle.photographs()[name])).permute(2, 0, 1)[None].float() / 255


def test_pictures_and_prompts_are_prepared_to_the_last_bit(reward: Any):
    wanted = oracle.golden("imagereward")
    assert len(wanted["pixel_sha256"]) == 12 and len(wanted["input_ids"]) == 9
    for name, picture in oracle.photographs().items():
        assert oracle.pixel_sha256(reward.recipe.pictures([picture])[0]) == wanted["pixel_sha256"][name], name
    for key, prompt in oracle.prompts().items():
        ids, mask = tokenized([prompt])
        known = wanted["input_ids"][key]
        assert ids[0].tolist() == known + [0] * (35 - len(known)), key
        assert mask[0].tolist() == [1] * len(known) + [0] * (35 - len(known)), key
    assert bert_tokenizer().convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [30522, wanted["enc_token_id"]]


@pytest.mark.parametrize("key", list(oracle.golden("imagereward")["scores"]))
def test_it_is_the_official_score(reward: Any, key: str):
    wanted = oracle.golden("imagereward")
    assert [wanted["mean"], wanted["std"]] == [MEAN, STD]
    assert gaps(reward, oracle.photographs(), key).max() <= 1e-4


@pytest.mark.parametrize(("recipe", "least"), [(square_recipe(224), 1.0), (hf_recipe(224), 0.3)])
def test_another_recipe_is_far_off(reward: Any, recipe: Any, least: float):
    """The second is the same crop, one pixel off on pictures of odd margins."""
    other = copy.copy(reward)
    other.recipe = recipe
    assert gaps(other, oracle.photographs(), "coffee").max() > least


def test_a_prompt_that_begins_with_enc_is_far_off(reward: Any, monkeypatch: pytest.MonkeyPatch):
    """BLIP's other tasks put [ENC] there."""

    def with_enc(prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        ids, mask = tokenized(prompts, device)
        ids[:, 0] = oracle.golden("imagereward")["enc_token_id"]
        return ids, mask

    monkeypatch.setattr("diffalign.rewards.blip_score.tokenized", with_enc)
    assert gaps(reward, oracle.photographs(), "coffee").min() > 0.1


def test_alpha_put_on_white_is_far_off(reward: Any):
    """What transformers 5 does with transparent pictures."""
    name = "alpha_RGBA_600x400"
    picture = oracle.photographs()[name]
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    assert gaps(reward, {name: on_white}, "coffee").item() > 0.5


def test_no_score_depends_on_its_batch(reward: Any):
    names, keys = list(oracle.photographs()), list(oracle.prompts())
    pairs = [(oracle.photographs()[name], oracle.prompts()[keys[i % 9]]) for i, name in enumerate(names)]
    together = reward(*zip(*pairs, strict=True))
    alone = torch.cat([reward([picture], [prompt]) for picture, prompt in pairs])
    backward = reward(*zip(*pairs[::-1], strict=True)).flip(0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, backward, atol=1e-5, rtol=0)
    assert together.std() > 0.5


def test_the_float_path_is_near_the_exact_one(reward: Any):
    """The gap is PIL's rounding to 8 bits."""
    exact = scores(reward, PROMPT, OPAQUE)
    soft = torch.cat([reward(as_pixels(name), [PROMPT]) for name in OPAQUE])
    assert (soft - exact).abs().max() <= 0.02
    whole = reward((as_pixels("exact_224") * 255).round().to(torch.uint8), [PROMPT])
    torch.testing.assert_close(whole, exact[-1:], rtol=0, atol=1e-5)  # of a batch of another size


def test_the_gradient_is_that_of_finite_differences(reward: Any):
    generator = torch.Generator().manual_seed(0)
    pixels = (0.2 + 0.6 * torch.rand(2, 3, 24, 20, generator=generator)).requires_grad_()
    reward(pixels, [PROMPT, ""]).sum().backward()
    assert pixels.grad.isfinite().all() and (pixels.grad.flatten(1).abs().sum(1) > 0).all()
    direction = pixels.grad / pixels.grad.norm()
    with torch.no_grad():
        up, down = (reward(pixels + step * direction, [PROMPT, ""]).sum() for step in (1e-2, -1e-2))
    assert (up - down).item() / 2e-2 == pytest.approx(pixels.grad.norm().item(), rel=0.02)


def test_weights_are_frozen_and_nothing_is_dropped(reward: Any):
    assert not any(weight.requires_grad for weight in reward.network.parameters())
    assert not any(module.training for module in reward.network.modules())
    assert reward.card.side == 224 and reward.card.checked == "official code, small weights"


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_precision_is_near_and_keeps_the_gradient(reward: Any, official: Path, dtype: str, most: float):
    half = load_reward("imagereward", weights=official, dtype=dtype, **HEADS)
    gap = (scores(half, PROMPT, OPAQUE) - scores(reward, PROMPT, OPAQUE)).abs().max()
    assert 0 < gap <= most
    pixels = as_pixels("exact_224").requires_grad_()
    half(pixels, [PROMPT]).backward()
    assert pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0


def test_a_prompt_that_is_cut_is_named_once(official: Path, caplog: pytest.LogCaptureFixture):
    reward = load_reward("imagereward", weights=official, **HEADS)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            scores(reward, oracle.prompts()["long"], OPAQUE[:1])
    assert len([record for record in caplog.records if "longer than the text encoder reads" in record.message]) == 1


def official_layout() -> dict[str, Tensor]:
    """All 625 tensors of the released model, without values."""
    layout = oracle.golden("imagereward")["layout"]
    repeats = {f"{name}.*": range(count) for name, count in layout["repeats"].items()}
    state = {}
    for key, shape in layout["shapes"].items():
        numbers = next((numbers for part, numbers in repeats.items() if part in key), range(1))
        state |= {key.replace("*", str(number)): torch.empty(shape, device="meta") for number in numbers}
    return state


def test_the_full_model_has_the_keys_of_the_official_file():
    state = official_layout()
    assert len(state) == 625 and sum(math.prod(value.shape) for value in state.values()) == 446_666_465
    vision = vit_sizes(state, "blip.visual_encoder.", Path("official"))
    text = bert_sizes(state, "blip.text_encoder.", Path("official"))
    assert (vision.heads, vision.layers, text.heads, text.layers) == (16, 24, 12, 12)
    assert vision.grid * vision.patch == 224
    ours = {key: list(value.shape) for key, value in meta_network(vision, text).state_dict().items()}
    unused = {key: list(state.pop(key).shape) for key in list(state) if key.startswith(UNUSED)}
    assert ours == {key: list(value.shape) for key, value in state.items()}
    assert unused == {
        "blip.text_encoder.embeddings.position_ids": [1, 512],
        "blip.vision_proj.weight": [256, 1024],
        "blip.vision_proj.bias": [256],
        "blip.text_proj.weight": [256, 768],
        "blip.text_proj.bias": [256],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mlp.layers.7.bias"), "it lacks mlp.layers.7.bias"),
        (lambda s: s.update(more=torch.zeros(1)), "it has also more"),
        (lambda s: s.update({"mlp.layers.7.bias": torch.zeros(2)}), r"other shapes: mlp.layers.7.bias \[2\] for \[1\]"),
        (lambda s: s.pop("blip.visual_encoder.pos_embed"), r"a weight blip.visual_encoder.pos_embed .* got nothing"),
        (lambda s: s.update({"blip.visual_encoder.pos_embed": torch.zeros(1, 6, 64)}), "positions for 5 patches"),
        (lambda s: s.pop("blip.visual_encoder.blocks.2.norm1.weight"), "it has also blip.visual_encoder.blocks.2"),
    ],
)
def test_other_files_are_refused(official: Path, tmp_path: Path, change: Any, message: str):
    state = torch.load(official, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        load_reward("imagereward", weights=tmp_path / "other.pt", **HEADS)


def test_wrong_keywords_are_refused(official: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="text_heads: .* divides the width 48, got 0"):
        load_reward("imagereward", weights=official, vision_heads=4)
    with pytest.raises(ValueError, match="vision_heads: .* divides the width 64, got 5"):
        load_reward("imagereward", weights=official, vision_heads=5)
    with pytest.raises(ValueError, match="dtype: expected one of float32"):
        load_reward("imagereward", weights=official, dtype="fp8", **HEADS)
    with pytest.raises(ValueError, match=r"expected the file ImageReward.pt"):
        load_reward("imagereward", weights=tmp_path)


def test_the_heads_count(official: Path):
    """Two heads for four is a valid network and another score: no shape tells."""
    other = load_reward("imagereward", weights=official, vision_heads=2, text_heads=4)
    assert gaps(other, oracle.photographs(), "plain").max() > 0.5
