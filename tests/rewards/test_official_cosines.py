"""PickScore and HPSv2 give the scores that their official codes gave, on pictures that they prepare to the last bit."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import small_checkpoints
import torch

from diffalign.rewards import load_reward
from diffalign.rewards.preprocess import letterbox_recipe, openai_recipe, square_recipe


@pytest.fixture(scope="module")
def pickscore_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoints.pickscore(tmp_path_factory.mktemp("pickscore"))


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoints.hps(tmp_path_factory.mktemp("hps"))


@pytest.fixture(scope="module")
def pickscore(pickscore_folder: Path) -> Any:
    return load_reward("pickscore", weights=pickscore_folder)


@pytest.fixture(scope="module")
def hps(hps_file: Path) -> Any:
    return load_reward("hpsv2.1", weights=hps_file, architecture="tiny-hps")


def scores(reward: Any, prompt: str, names: list[str]) -> torch.Tensor:
    return reward([oracle.photographs()[name] for name in names], [prompt] * len(names))


def gaps(reward: Any, table: dict[str, dict[str, float | None]]) -> torch.Tensor:
    """|score - golden score| over all prompts and pictures that have one."""
    found = []
    for key, row in table.items():
        names = [name for name, value in row.items() if value is not None]
        found.append(scores(reward, oracle.prompts()[key], names) - torch.tensor([row[name] for name in names]))
    return torch.cat(found).abs()


def with_recipe(reward: Any, recipe: Any) -> Any:
    other = copy.copy(reward)
    other.tower = dataclasses.replace(reward.tower, recipe=recipe)
    return other


def test_pickscore_prepares_pictures_and_prompts_to_the_last_bit(pickscore: Any):
    wanted = oracle.golden("pickscore")
    for name, picture in oracle.photographs().items():
        assert oracle.pixel_sha256(pickscore.tower.recipe.pictures([picture])[0]) == wanted["pixel_sha256"][name], name
    for key, prompt in oracle.prompts().items():
        ids = pickscore.tower.tokenizer([prompt], padding=True, truncation=True, max_length=77).input_ids
        assert ids[0] == wanted["input_ids"][key], key


def test_pickscore_is_the_official_score(pickscore: Any):
    wanted = oracle.golden("pickscore")
    assert pickscore.scale == pytest.approx(wanted["logit_scale_exp"], rel=1e-6)
    assert gaps(pickscore, wanted["scores"]).max() <= 1e-4


@pytest.mark.parametrize(("recipe", "least"), [(square_recipe(224), 1.0), (openai_recipe(224), 0.05)])
def test_pickscore_with_another_recipe_is_far_off(pickscore: Any, recipe: Any, least: float):
    """The second is the same crop, one pixel further on pictures of odd margins."""
    assert gaps(with_recipe(pickscore, recipe), oracle.golden("pickscore")["scores"]).max() > least


def test_hpsv2_is_the_official_score(hps: Any):
    wanted = oracle.golden("hpsv2")
    assert gaps(hps, wanted["scores"]).max() <= 1e-6
    for key, prompt in oracle.prompts().items():
        assert hps.tower.tokenizer([prompt])[0].tolist() == wanted["input_ids"][key], key


def test_hpsv2_of_2023_resized_without_antialiasing(hps: Any, hps_file: Path):
    wanted = oracle.golden("hpsv2")
    old = load_reward("hpsv2.1", weights=hps_file, architecture="tiny-hps", antialias=False)
    assert gaps(old, wanted["scores_antialias_false"]).max() <= 1e-6
    assert gaps(hps, wanted["scores_antialias_false"]).max() > 0.02


def test_hpsv2_on_what_the_official_code_fails_on(hps: Any):
    """An oblong picture whose long side is 224 already, and one with an alpha channel."""
    failed = list(oracle.golden("hpsv2")["errors"])
    found = scores(hps, "a cup of tea", failed)
    assert found.isfinite().all()
    dropped = oracle.photographs()["alpha_RGBA_600x400"].convert("RGB")
    alone = hps([dropped], ["a cup of tea"])
    torch.testing.assert_close(found[failed.index("alpha_RGBA_600x400")], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", [square_recipe(224), openai_recipe(224)])
def test_hpsv2_with_another_recipe_is_far_off(hps: Any, recipe: Any):
    assert gaps(with_recipe(hps, recipe), oracle.golden("hpsv2")["scores"]).max() > 0.06


def test_letterbox_keeps_the_whole_picture():
    x = torch.rand(1, 3, 100, 224)
    boxed = letterbox_recipe(224, mean=(0, 0, 0), std=(1, 1, 1)).pixels(x)
    assert boxed.shape == (1, 3, 224, 224) and torch.equal(boxed[..., 62:162, :], x)
    assert boxed[..., :62, :].abs().sum() == boxed[..., 162:, :].abs().sum() == 0


@pytest.mark.parametrize("name", ["pickscore", "hps"])
def test_the_float_path_is_near_the_exact_one(name: str, request: pytest.FixtureRequest):
    """The gap of the docs: PIL's rounding for PickScore, nothing for HPSv2, which resizes tensors itself."""
    reward = request.getfixturevalue(name)
    names = ["astronaut_512", "chelsea_451x300", "china_640x427", "portrait_256x400"]
    pictures = [oracle.photographs()[n] for n in names]
    for picture, exact in zip(pictures, scores(reward, "a cup of tea", names), strict=True):
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        pixels.requires_grad_()
        found = reward(pixels, ["a cup of tea"])
        found.backward()
        assert pixels.grad.abs().sum() > 0
        assert (found.detach() - exact).abs() <= (0.15 if name == "pickscore" else 1e-6)


def test_other_layouts_are_refused(tmp_path: Path, hps_file: Path, pickscore_folder: Path):
    state = torch.load(hps_file, weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="expected the official container"):
        load_reward("hpsv2", weights=tmp_path / "bare.pt", architecture="tiny-hps")
    torch.save({"state_dict": {k: v for k, v in state.items() if "ln_final" not in k} | {"more": torch.zeros(1)}},
               tmp_path / "gap.pt")  # fmt: skip
    with pytest.raises(ValueError, match=r"it lacks ln_final.bias, ln_final.weight; it has also more"):
        load_reward("hpsv2", weights=tmp_path / "gap.pt", architecture="tiny-hps")
    with pytest.raises(ValueError, match="it lacks|has other shapes"):
        load_reward("hpsv2", weights=hps_file, architecture="ViT-B-32")
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16"):
        load_reward("pickscore", weights=pickscore_folder, dtype="fp8")
