"""MPS gives what its official code gave on small weights in the official layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import small_checkpoints
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffalign.rewards import load_reward
from diffalign.rewards.mps import PromptReader, counted
from diffalign.rewards.rubrics import rubric

OPAQUE = ["astronaut_512", "coffee_600x400", "chelsea_451x300", "china_640x427", "portrait_256x400", "exact_224"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoints.mps_backbone(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoints.mps(tmp_path_factory.mktemp("mps"))


@pytest.fixture(scope="module")
def reward(weights: Path, backbone: Path) -> Any:
    return load_reward("mps", weights=weights, backbone=str(backbone))


def gaps(reward: Any, key: str, kind: str = "fp32") -> Tensor:
    wanted = oracle.golden("mps")[kind][key]
    found = reward(list(oracle.photographs().values()), [oracle.prompts()[key]] * len(wanted))
    return (found - torch.tensor([wanted[name] for name in oracle.photographs()])).abs()


def as_pixels(name: str) -> Tensor:
    return torch.from_numpy(np.array(oracle.photographs()[name])).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("key", list(oracle.golden("mps")["fp32"]))
def test_it_is_the_official_score(reward: Any, key: str):
    assert gaps(reward, key).max() <= 1e-4


def test_in_fp16_it_is_what_the_official_code_computes(weights: Path, backbone: Path, reward: Any):
    """Whose angles are rounded: fp32 is off by more than fp16 arithmetic is, at the median."""
    half = load_reward("mps", weights=weights, backbone=str(backbone), dtype="float16")
    near, same = (torch.cat([gaps(one, key, "fp16") for key in ("coffee", "empty")]) for one in (half, reward))
    assert near.max() <= 0.1 and near.median() <= 0.8 * same.median()
    far = torch.cat([gaps(reward, key, "fp16") for key in oracle.golden("mps")["fp16"]])
    assert 0.05 < far.max() <= 0.1


def test_the_layout_is_the_official_one():
    """The keys of one layer and of all that stands once, as the released classes name them."""
    known = set(oracle.golden("mps")["keys"])
    ours = {
        key for key in small_checkpoints.mps_state() if key.startswith("cross_model.layers.0.") or "layers." not in key
    }
    assert ours == known and len(known) > 20


@pytest.mark.parametrize(("threshold", "least"), [(0.01, 0.1), (0.9, 1.0)])
def test_another_threshold_is_another_score(weights: Path, backbone: Path, threshold: float, least: float):
    other = load_reward("mps", weights=weights, backbone=str(backbone), threshold=threshold)
    assert gaps(other, "coffee").max() > least


def test_a_word_counts_by_its_own_sample_alone():
    words = torch.tensor([[[4.0], [1.0], [2.0]], [[0.4], [0.1], [0.2]]])
    assert counted(words, torch.tensor([[[1.0], [0.5]]]), 0.3).tolist() == [[True, False, True]] * 2


def test_no_score_depends_on_its_batch(reward: Any):
    names, keys = OPAQUE, list(oracle.prompts())
    pairs = [(oracle.photographs()[name], oracle.prompts()[keys[i]]) for i, name in enumerate(names)]
    together = reward(*zip(*pairs, strict=True))
    alone = torch.cat([reward([picture], [prompt]) for picture, prompt in pairs])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(together, reward(*zip(*pairs[::-1], strict=True)).flip(0), atol=1e-4, rtol=0)
    assert together.std() > 1


def test_a_prompt_is_read_once_and_again_with_other_weights(weights: Path, backbone: Path, monkeypatch: Any):
    reward, asked = load_reward("mps", weights=weights, backbone=str(backbone)), []
    read = PromptReader.text_features
    monkeypatch.setattr(PromptReader, "text_features", lambda self, some: asked.extend(some) or read(self, some))
    pictures = [oracle.photographs()[name] for name in OPAQUE[:3]]
    before = reward(pictures, ["tea", "a cat", "tea"])
    reward(pictures[1:2], ["a cat"])
    assert asked == [rubric("mps"), "tea", "a cat"]
    with torch.no_grad():
        reward.clip.text_projection.weight.mul_(torch.arange(32)[:, None])
    assert (reward(pictures, ["tea", "a cat", "tea"]) - before).abs().min() > 0.01
    assert asked == [rubric("mps"), "tea", "a cat"] * 2


def test_the_float_path_is_near_the_exact_one(reward: Any):
    prompt = oracle.prompts()["coffee"]
    exact = reward([oracle.photographs()[name] for name in OPAQUE], [prompt] * len(OPAQUE))
    soft = torch.cat([reward(as_pixels(name), [prompt]) for name in OPAQUE])
    assert 0 < (soft - exact).abs().max() <= 0.15
    assert reward((as_pixels("exact_224") * 255).round().to(torch.uint8), [prompt]) == exact[-1:]


def test_the_gradient_is_that_of_finite_differences(reward: Any):
    generator = torch.Generator().manual_seed(0)
    x = (0.2 + 0.6 * torch.rand(2, 3, 24, 20, generator=generator)).requires_grad_()
    reward(x, ["a cup", ""]).sum().backward()
    assert x.grad.isfinite().all() and (x.grad.flatten(1).abs().sum(1) > 0).all()
    direction = x.grad / x.grad.norm()
    with torch.no_grad():
        up, down = (reward(x + step * direction, ["a cup", ""]).sum() for step in (1e-2, -1e-2))
    assert (up - down).item() / 2e-2 == pytest.approx(x.grad.norm().item(), rel=0.02)


def test_bfloat16_is_near(weights: Path, backbone: Path):
    half = load_reward("mps", weights=weights, backbone=str(backbone), dtype="bfloat16")
    assert 0.01 < gaps(half, "coffee").max() <= 1.5


class Pickled(torch.nn.Linear):
    """Stands for the released file, which is an object of a class of the authors."""


def test_the_released_pickle_is_refused_with_what_to_do(tmp_path: Path, backbone: Path):
    torch.save(Pickled(2, 2), tmp_path / "MPS_overall_checkpoint.pth")
    for weights in (tmp_path / "MPS_overall_checkpoint.pth", tmp_path / "nothing.pth", None):
        with pytest.raises(ValueError, match=r"weights_only=False\)\.state_dict\(\), 'mps.pth'\)"):
            load_reward("mps", weights=weights, backbone=str(backbone))


def test_safetensors_and_old_buffers_are_read(weights: Path, backbone: Path, tmp_path: Path, reward: Any):
    state = torch.load(weights) | {"model.text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(state, tmp_path / "mps.safetensors")
    other = load_reward("mps", weights=tmp_path / "mps.safetensors", backbone=str(backbone))
    images, said = [Image.new("RGB", (40, 30), "red")], ["a"]
    assert other(images, said) == reward(images, said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.text_projection.weight"), "it lacks text_projection.weight"),
        (lambda s: s.update({"model.more": torch.zeros(1)}), "it has also more"),
        (lambda s: s.pop("cross_model.layers.1.1.fn.ff_out.1.weight"), "it lacks layers.1.1.fn.ff_out.1.weight"),
        (lambda s: s.pop("cross_model.layers.0.0.fn.to_q.weight"), "expected the state dict of MPS, it lacks"),
        (lambda s: s.update({"cross_model.layers.0.0.fn.norm.bias": torch.zeros(3)}), r"norm.bias \[3\] for \[32\]"),
    ],
)
def test_other_files_are_refused(weights: Path, backbone: Path, tmp_path: Path, change: Any, message: str):
    state = torch.load(weights)
    change(state)
    torch.save(state, tmp_path / "mps.pth")
    with pytest.raises(ValueError, match=message):
        load_reward("mps", weights=tmp_path / "mps.pth", backbone=str(backbone))


def test_wrong_keywords_are_refused(weights: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"threshold: expected a number in \[0, 1\), got 1"):
        load_reward("mps", weights=weights, threshold=1.0)
    with pytest.raises(ValueError, match="backbone=FOLDER"):
        load_reward("mps", weights=weights, backbone=str(tmp_path))
