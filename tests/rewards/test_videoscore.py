"""VideoScore's layout and call on a random Idefics2; no score of the released code was to be had."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import oracle
import pytest
import small_language_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.rewards import load_reward
from diffalign.rewards.rubrics import rubric
from diffalign.rewards.videoscore import QUALITIES, stepped


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_language_models.videoscore(tmp_path_factory.mktemp("videoscore"))


@pytest.fixture(scope="module")
def reward(weights: Path) -> Any:
    return load_reward("videoscore", weights=weights, dtype="float32")


def clips(count: int = 2, frames: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, frames, 3, 40, 56), generator=generator, dtype=torch.uint8)


def test_the_words_are_those_it_was_trained_on():
    """sha256 of REGRESSION_QUERY_PROMPT of the released script."""
    text = rubric("videoscore")
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "49b386d9ea3003760c983cc258cf4211faf858d58191f95fcfacdf68a8fed2c0"
    )


def test_the_layout_is_that_of_the_released_class(weights: Path):
    keys = set(load_file(weights / "model.safetensors"))
    assert {"score.weight", "score.bias", "model.connector.perceiver_resampler.latents", "model.text_model.norm.weight",
            "model.text_model.layers.0.self_attn.q_proj.weight", "model.text_model.embed_tokens.weight",
            "model.vision_model.embeddings.patch_embedding.weight",
            "model.connector.modality_projection.gate_proj.weight"} <= keys  # fmt: skip
    assert {key.split(".")[0] for key in keys} == {"model", "score"}


def test_the_mean_is_of_five_qualities(reward: Any, weights: Path):
    five = torch.stack([reward.qualities(clip, prompt) for clip, prompt in zip(clips(), ["a", "b"], strict=True)])
    assert five.shape == (2, 5) and five.std() > 0.05
    torch.testing.assert_close(reward(clips(), ["a", "b"]), five.mean(1))
    for column, name in enumerate(QUALITIES):
        one = load_reward("videoscore", weights=weights, dtype="float32", dimension=name)
        assert torch.equal(one(clips(), ["a", "b"]), five[:, column])


def test_every_frame_is_shown_after_the_words(reward: Any):
    seen = {}
    body = reward.network.model.forward
    reward.network.model.forward = lambda **inputs: seen.update(inputs) or body(**inputs)
    try:
        reward(clips(1), ["a tree <image> </s>"])
    finally:
        reward.network.model.forward = body
    assert seen["pixel_values"].shape[:2] == (1, 3)
    text = reward.processor.tokenizer.decode(seen["input_ids"][0])
    image = "<fake_token_around_image>" + "<image>" * 4 + "<fake_token_around_image>"
    question = rubric("videoscore").replace("{text_prompt}", "a tree < image> </s>")
    assert text.replace(" ", "") == (question + image * 3).replace(" ", "")


def test_no_score_depends_on_its_batch_and_a_picture_is_one_frame(reward: Any):
    together = reward(clips(3), ["a", "", "茶"])
    alone = torch.cat([reward(clip[None], [said]) for clip, said in zip(clips(3), ["a", "", "茶"], strict=True)])
    assert torch.equal(together, alone)
    assert torch.equal(together, reward(clips(3).flip(0), ["茶", "", "a"]).flip(0))
    assert (reward(clips(1), ["a"]) - reward(clips(1).flip(1), ["a"])).abs() > 1e-4, "it sees the order"
    image = oracle.photographs()["small_96x64"]
    levels = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(1, 64, 96, 3).permute(0, 3, 1, 2)
    expected = reward(levels[:, None], ["a"])
    assert torch.equal(reward([image], ["a"]), expected) and torch.equal(reward(levels, ["a"]), expected)
    assert torch.equal(reward(levels / 255, ["a"]), expected), "floats are rounded to 8 bits"


def test_frames_are_those_of_the_released_script(weights: Path, reward: Any):
    assert stepped(40, 16) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]
    assert stepped(16, 16) == list(range(16)) and stepped(3, 16) == [0, 1, 2]
    assert all(len(stepped(count, 48)) == 48 and max(stepped(count, 48)) < count for count in range(49, 400))
    few = load_reward("videoscore", weights=weights, dtype="float32", frames=2)
    assert torch.equal(few(clips(1, 5), ["a"]), reward(clips(1, 5)[:, [0, 2]], ["a"]))


def test_bfloat16_is_near_and_there_is_no_gradient(reward: Any, weights: Path):
    half = load_reward("videoscore", weights=weights)
    assert 0 < (half(clips(), ["a", "b"]) - reward(clips(), ["a", "b"])).abs().max() <= 0.1
    with pytest.raises(ValueError, match="'videoscore' has no gradient"):
        reward(torch.rand(1, 2, 3, 28, 28, requires_grad=True), ["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("score.bias"), "it lacks score.bias"),
        (lambda s: s.update({"model.more": torch.zeros(1)}), "it has also model.more"),
        (lambda s: s.update({"score.weight": torch.zeros(3, 32)}), "videoscore: expected .* could not load it"),
    ],
)
def test_other_files_are_refused(weights: Path, tmp_path: Path, change: Any, message: str):
    for file in weights.iterdir():
        if file.is_file() and file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(weights / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_reward("videoscore", weights=tmp_path)


def test_wrong_keywords_are_refused(weights: Path, clip_folder: Path):
    with pytest.raises(ValueError, match="one of mean, visual, temporal, dynamic, alignment, factual, got 'x'"):
        load_reward("videoscore", weights=weights, dimension="x")
    with pytest.raises(ValueError, match="videoscore.frames: expected at least 1, got 0"):
        load_reward("videoscore", weights=weights, frames=0)
    with pytest.raises(ValueError, match="its model_type is clip, not idefics2"):
        load_reward("videoscore", weights=clip_folder)
    with pytest.raises(ValueError, match="run `hf download TIGER-Lab/VideoScore` once"):
        load_reward("videoscore")
