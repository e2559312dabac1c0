"""The aesthetic heads: the official score on a small tower, their affine form, and what is refused."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import oracle
import pytest
import small_checkpoints
import torch
from small_checkpoints import head_state

from diffalign.rewards import load_reward
from diffalign.rewards.affine import AffineHead
from diffalign.rewards.checkpoints import check_sha256, load_strictly, read_state
from diffalign.rewards.preprocess import hf_recipe, square_recipe

TINY_OPENAI = {
    "embed_dim": 768,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 3, "width": 64, "head_width": 64, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
OFFICIAL_HEAD = "DIFFALIGN_LAION_HEAD"  # path of the released file; the tests that need it are skipped without


def affine(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(w, b) of the layers multiplied out in double precision: what they must say without activations."""
    keys = sorted({key.rsplit(".", 1)[0] for key in state}, key=lambda key: int(key.rsplit(".", 1)[1]))
    width = state[f"{keys[0]}.weight"].shape[1]
    weight, bias = torch.eye(width).double(), torch.zeros(width).double()
    for key in keys:
        layer = state[f"{key}.weight"].double()
        weight, bias = layer @ weight, layer @ bias + state[f"{key}.bias"].double()
    return weight[0], bias


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoints.aesthetic_head(tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoints.backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def reward(head_file: Path, backbone: Path) -> Any:
    return load_reward("aesthetic", weights=head_file, backbone=str(backbone))


def test_the_head_is_one_affine_map(reward: Any, head_file: Path):
    weight, bias = affine(torch.load(head_file, weights_only=True))
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reward.head(x).double(), x.double() @ weight + bias, rtol=0, atol=2e-5)


def test_the_score_is_the_head_of_the_normalized_features(reward: Any):
    pictures = list(oracle.photographs().values())
    features = reward.tower.image_features(reward.recipe.pictures(pictures))
    expected = reward.head(features / features.norm(dim=-1, keepdim=True))
    found = reward(pictures, [""] * len(pictures))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.std() > 0.05
    torch.testing.assert_close(reward(pictures[::-1], ["x"] * len(pictures)), found.flip(0), rtol=0, atol=1e-5)


def test_pictures_are_made_as_openai_makes_them(reward: Any):
    for name, wanted in oracle.golden("aesthetic")["tiny"]["pixel_sha256"].items():
        picture = oracle.photographs()[name]
        assert oracle.pixel_sha256(reward.recipe.pictures([picture])[0]) == wanted, name
    other = hf_recipe(224).pictures([oracle.photographs()["china_640x427"]])[0]  # one column further
    assert oracle.pixel_sha256(other) != oracle.golden("aesthetic")["tiny"]["pixel_sha256"]["china_640x427"]


def test_the_float_path_has_a_gradient_and_is_near_the_exact_one(reward: Any):
    for name in ("astronaut_512", "chelsea_451x300", "small_96x64"):
        picture = oracle.photographs()[name]
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        score = reward(pixels.requires_grad_(), [""])
        score.backward()
        assert pixels.grad.abs().sum() > 0 and (score.detach() - reward([picture], [""])).abs() < 0.01


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """OpenAI's small tower of the golden scores, and a head of the official layout that is the released affine map."""
    folder, facts = tmp_path_factory.mktemp("official"), oracle.golden("aesthetic")["head"]
    (folder / "tiny-openai.json").write_text(json.dumps(TINY_OPENAI))
    open_clip.add_model_config(folder)
    state = open_clip.create_model("tiny-openai").state_dict()
    torch.save(oracle.seeded(state, logit_scale=4.6), folder / "tower.pt")
    head = {key: torch.zeros_like(value) for key, value in head_state(768, (0, 2, 4, 6, 7), "layers").items()}
    for name in (2, 4, 6, 7):
        head[f"layers.{name}.weight"][0, 0] = 1
    head["layers.0.weight"][0], head["layers.0.bias"][0] = torch.tensor(facts["affine_weight"]), facts["affine_bias"]
    torch.save(head, folder / "head.pth")
    return load_reward("aesthetic", weights=folder / "head.pth", backbone="open_clip:tiny-openai",
                       backbone_weights=folder / "tower.pt")  # fmt: skip


def test_it_is_the_official_score(official: Any):
    wanted = oracle.golden("aesthetic")["tiny"]["expected"]
    pictures = [oracle.photographs()[name] for name in wanted]
    expected = torch.tensor(list(wanted.values()))
    torch.testing.assert_close(official(pictures, [""] * len(pictures)), expected, rtol=0, atol=1e-5)
    wrong = copy.copy(official)
    wrong.recipe = square_recipe(224)
    assert (wrong(pictures, [""] * len(pictures)) - expected).abs().max() > 0.02


def test_heads_of_another_layout_are_refused(tmp_path: Path, backbone: Path, head_file: Path):
    torch.save({"weight": torch.zeros(1, 48)}, tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="expected the linear layers of an aesthetic head, got \\['weight'\\]"):
        load_reward("aesthetic", weights=tmp_path / "linear.pth", backbone=str(backbone))
    with pytest.raises(ValueError, match="found nothing at"):
        load_reward("aesthetic", weights=tmp_path / "none.pth", backbone=str(backbone))
    state = torch.load(head_file, weights_only=True)
    torch.save({key: value for key, value in state.items() if ".7." not in key}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="lacks layers.7.bias, layers.7.weight"):
        load_reward("aesthetic", weights=tmp_path / "short.pth", backbone=str(backbone))
    torch.save(head_state(32, (0, 2, 4, 6, 7), "layers"), tmp_path / "narrow.pth")
    narrow = load_reward("aesthetic", weights=tmp_path / "narrow.pth", backbone=str(backbone))
    with pytest.raises(ValueError, match=r"features of width 32, which .*narrow.pth is for, got width 48"):
        narrow([oracle.photographs()["exact_224"]], [""])
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page.pth: expected"):
        load_reward("aesthetic", weights=tmp_path / "page.pth", backbone=str(backbone))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = small_checkpoints.aesthetic_siglip(tmp_path_factory.mktemp("siglip"))
    return load_reward("aesthetic-v2.5", weights=folder / "head.pth", backbone=str(folder))


def test_v2_5_reads_squares_and_its_bf16_head_computes_in_fp32(siglip: Any):
    pictures = [oracle.photographs()[name] for name in ("astronaut_512", "china_640x427", "thin_224x100")]
    found = siglip(pictures, [""] * 3)
    assert {p.dtype for p in siglip.head.parameters()} == {torch.float32}
    x = square_recipe(384, (0.5,) * 3, (0.5,) * 3).pictures(pictures)
    features = siglip.tower(pixel_values=x).pooler_output
    torch.testing.assert_close(found, siglip.head(features / features.norm(dim=-1, keepdim=True)), rtol=0, atol=1e-5)
    assert found.std() > 0.01


@pytest.mark.parametrize(("name", "golden"), [("aesthetic", "head"), ("aesthetic-v2.5", "siglip_head")])
def test_the_bounds_on_the_card_are_those_of_the_released_heads(name: str, golden: str, siglip: Any, reward: Any):
    """A unit vector through an affine map: bias +- |w|, of the real files."""
    facts = oracle.golden("aesthetic")[golden]
    low, high = {"aesthetic": reward, "aesthetic-v2.5": siglip}[name].card.range
    assert low <= facts["affine_bias"] - facts["affine_weight_norm"] < low + 0.1
    assert high - 0.1 < facts["affine_bias"] + facts["affine_weight_norm"] <= high


def test_the_released_head_is_the_affine_map_of_the_golden_file():
    """Opt-in: DIFFALIGN_LAION_HEAD=FILE."""
    path = Path(os.environ.get(OFFICIAL_HEAD, ""))
    if not path.is_file():
        pytest.skip(f"{OFFICIAL_HEAD} does not name the released head")
    facts, head = oracle.golden("aesthetic")["head"], AffineHead(768, (0, 2, 4, 6, 7), "layers")
    check_sha256(path, facts["sha256"])
    load_strictly(head, read_state(path), path)
    weight, bias = affine(read_state(path))
    assert bias.item() == pytest.approx(facts["affine_bias"], abs=1e-6)
    torch.testing.assert_close(weight, torch.tensor(facts["affine_weight"]).double(), rtol=0, atol=1e-7)
