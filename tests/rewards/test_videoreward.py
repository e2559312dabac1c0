"""VideoReward gives what its official code gave on small weights; its LoRA layout is read whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import small_language_models as small
import torch
from safetensors.torch import load_file, save_file
from small_language_models import adapted, factors
from tiny_qwen import qwen2_base, tokenizer
from torch import Tensor

from diffalign.rewards import load_reward
from diffalign.rewards.qwen_pictures import patched
from diffalign.rewards.qwen_reward import QwenReader, load_body
from diffalign.rewards.rubrics import rubric
from diffalign.rewards.videoreward import readout
from diffalign.rewards.videoreward_files import TOKENS

CLIP_SIDES = (24, 36)


def by_hand(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + alpha / r B A."""
    low = factors(state)
    return state | {
        f"{m}.weight": state[f"{m}.weight"].float() + 2.0 * low[f"{m}.lora_B.weight"] @ low[f"{m}.lora_A.weight"]
        for m in adapted(state)
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.videoreward_base(tmp_path_factory.mktemp("qwen2-vl-2b"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.videoreward(tmp_path_factory.mktemp("videoreward"))


@pytest.fixture(scope="module")
def reward(weights: Path, base: Path) -> Any:
    return load_reward("videoreward", weights=weights, base=str(base), dtype="float32")


def clips(count: int = 2, frames: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.2 + 0.6 * torch.rand(count, frames, 3, *CLIP_SIDES, generator=generator)


def test_it_is_the_official_score_and_two_dimensional_positions_are_far_off(tmp_path: Path):
    known = oracle.golden("qwen2vl_rewards")["videoreward"]
    base = qwen2_base(tmp_path)
    config = json.loads((base / "config.json").read_text())
    config |= {"image_token_id": 300, "video_token_id": 301}  # those of the golden tokens
    (base / "config.json").write_text(json.dumps(config))
    state = small.videoreward_state(320)
    body = {key: value for key, value in state.items() if key not in ("rm_head.weight", "lm_head.weight")}
    model = load_body(body, str(base), 320, tmp_path, torch.float32, "a test")
    reader = QwenReader(model, tokenizer(), tuple(known["special_token_ids"]), "image")
    sizes = {"coffee_600x400": (112, 84), "astronaut_512": (112, 112)}
    resized = [oracle.photographs()[name].resize(size, 3) for name, size in sizes.items()]
    cut = [patched(torch.tensor(list(image.tobytes())).view(image.height, image.width, 3).permute(2, 0, 1)[None] / 255)
           for image in resized]  # fmt: skip
    states = reader.states(torch.tensor(known["ids"]), torch.tensor(known["mask"]),
                           torch.cat([rows for rows, _ in cut]), torch.tensor([grid for _, grid in cut]))  # fmt: skip
    logits = readout(states, state["rm_head.weight"].float())
    torch.testing.assert_close(logits, torch.tensor(known["logits"]), atol=1e-5, rtol=0)
    assert (torch.tensor(known["mrope_logits"]) - logits).abs().min() > 0.1


def test_a_head_with_a_row_for_each_quality_gives_the_diagonal():
    states = torch.arange(12.0).view(2, 3, 2)
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert readout(states, head).tolist() == [[0, 3, 9], [6, 9, 21]]
    assert readout(states, head[:1]).tolist() == [[0, 2, 4], [6, 8, 10]]


def test_the_words_are_those_it_was_trained_on():
    """sha256 of DETAILED_PROMPT_WITH_SPECIAL_TOKEN of the released code."""
    text = rubric("videoreward")
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
    )
    assert [text.count(token) for token in TOKENS] == [1, 1, 1]


@pytest.mark.parametrize("whole", ["merged", "with factors"])
def test_an_adapter_on_its_base_is_the_whole_model(reward: Any, weights: Path, base: Path, tmp_path: Path, whole: str):
    """model.pth is what the training saves instead, with the factors beside their base layers, or somebody merged."""
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "model_config.json").write_text((weights / "model_config.json").read_text())
    state = small.videoreward_state(small.videoreward_words())
    saved = by_hand(state)
    if whole == "with factors":
        names = adapted(state)
        saved = {f"base_model.model.{key.replace('.weight', '.base_layer.weight').replace('.bias', '.base_layer.bias')}"
                 if key.rpartition(".")[0] in names else f"base_model.model.{key}": value
                 for key, value in state.items()}  # fmt: skip
        saved |= {f"base_model.model.{key.replace('.weight', '.default.weight')}": value
                  for key, value in factors(state).items()}  # fmt: skip
    torch.save(saved, tmp_path / "checkpoint-3" / "model.pth")
    other = load_reward("videoreward", weights=tmp_path, base=str(base), dtype="float32")
    torch.testing.assert_close(other(clips(), ["a", "b"]), reward(clips(), ["a", "b"]), atol=1e-4, rtol=0)


def test_the_lora_counts(reward: Any, weights: Path, base: Path, tmp_path: Path):
    small.videoreward(tmp_path / "x")
    step = tmp_path / "x" / "checkpoint-20" / "adapter_model.safetensors"
    save_file({key: value if "lora_A" in key else 0 * value for key, value in load_file(step).items()}, step)
    without = load_reward("videoreward", weights=tmp_path / "x", base=str(base), dtype="float32")
    assert (without(clips(), ["a", "b"]) - reward(clips(), ["a", "b"])).abs().max() > 0.05


def test_the_qualities_are_normalized_and_summed(weights: Path, base: Path, reward: Any):
    raw = load_reward("videoreward", weights=weights, base=str(base), dtype="float32", normalize=False)
    given = raw.qualities(list(clips()), ["a", "b"])
    means, deviations = (torch.tensor(list(table.values())) for table in (small.MEANS, small.DEVIATIONS))
    wanted = (given - means) / deviations
    torch.testing.assert_close(reward(clips(), ["a", "b"]), wanted.sum(1), atol=1e-5, rtol=0)
    for column, dimension in enumerate(("vq", "mq", "ta")):
        one = load_reward("videoreward", weights=weights, base=str(base), dtype="float32", dimension=dimension)
        torch.testing.assert_close(one(clips(), ["a", "b"]), wanted[:, column], atol=1e-5, rtol=0)
        assert one.card.unit == "z-score"


def test_no_score_depends_on_its_batch(reward: Any):
    said = ["a cup of tea", "", "a long caption " * 5]
    together = reward(clips(3), said)
    alone = torch.cat([reward(clip[None], [prompt]) for clip, prompt in zip(clips(3), said, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(together, reward(clips(3).flip(0), said[::-1]).flip(0), atol=1e-4, rtol=0)
    assert together.std() > 0.02


def test_it_sees_the_order_of_frames_and_a_picture_is_a_still(reward: Any):
    clip = clips(1)
    assert (reward(clip, ["a"]) - reward(clip.flip(1), ["a"])).abs() > 1e-3
    still = clip[:, :1].expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(reward(clip[:, 0], ["a"]), reward(still, ["a"]), atol=1e-5, rtol=0)
    image = oracle.photographs()["small_96x64"]
    levels = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(1, 64, 96, 3).permute(0, 3, 1, 2)
    assert reward([image], ["a"]) == reward(levels, ["a"])
    assert 0 < (reward(levels.float() / 255, ["a"]) - reward([image], ["a"])).abs() <= 0.02


def test_a_clip_of_one_frame_is_read_as_a_picture_is(reward: Any):
    """The golden scores are of pictures; a still clip of two frames has the same patches."""
    frame = clips(1)[0, :1, :, :, :28].repeat(1, 1, 3, 3)[..., :56, :84]
    words = "".join(("What? ", *TOKENS))
    as_picture = QwenReader(reward.reader.model, reward.reader.tokenizer, reward.reader.tokens, "image")
    assert torch.equal(reward.reader([frame], [words]), as_picture([frame], [words]))
    assert (reward.reader([frame], [words]) - reward.reader([1 - frame], [words])).abs().max() > 0.01


def test_frames_are_spread_over_the_clip(weights: Path, base: Path, reward: Any):
    few = load_reward("videoreward", weights=weights, base=str(base), dtype="float32", frames=4)
    clip = clips(1, frames=7)
    torch.testing.assert_close(few(clip, ["a"]), reward(clip[:, [0, 2, 4, 6]], ["a"]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="videoreward.frames: expected an even number from 2 on, got 5"):
        load_reward("videoreward", weights=weights, base=str(base), frames=5)


def test_the_gradient_is_that_of_finite_differences(reward: Any):
    x = clips(1, frames=2).requires_grad_()
    reward(x, ["a"]).sum().backward()
    assert (x.grad.flatten(2).abs().sum(2) > 0).all(), "it reaches every frame"
    direction = x.grad / x.grad.norm()
    with torch.no_grad():
        up, down = (reward(x + step * direction, ["a"]).sum() for step in (1e-2, -1e-2))
    assert (up - down).item() / 2e-2 == pytest.approx(x.grad.norm().item(), rel=0.02)
    assert not any(weight.requires_grad for weight in reward.reader.model.parameters())


def test_bfloat16_is_near(reward: Any, weights: Path, base: Path):
    half = load_reward("videoreward", weights=weights, base=str(base))
    gap = (half(clips(), ["a", "b"]) - reward(clips(), ["a", "b"])).abs().max().item()
    assert 0 < gap <= 0.3, gap


def change_file(folder: Path, name: str, change: Any) -> None:
    path = folder / "checkpoint-20" / name
    state = load_file(path) if name.endswith(".safetensors") else torch.load(path)
    change(state)
    (save_file if name.endswith(".safetensors") else torch.save)(state, path)


LAYER = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adapter_model.safetensors", lambda s: s.pop(f"{LAYER}.lora_B.weight"), "lacks lora_B.weight"),
        ("adapter_model.safetensors", lambda s: [s.pop(f"{LAYER}.lora_{x}.weight") for x in "AB"],
         "not so for model.layers.1.mlp.up_proj"),
        ("adapter_model.safetensors", lambda s: s.update({f"{LAYER}.lora_A.weight": torch.zeros(small.RANK, 5)}),
         r"factors \[rank, in\] and \[out, rank\] of a weight \[96, 64\], got \[4, 5\]"),
        ("adapter_model.safetensors", lambda s: s.update(more=torch.zeros(1)), "it has also more"),
        ("non_lora_state_dict.pth", lambda s: s.pop("base_model.model.visual.merger.ln_q.bias"),
         "it lacks visual.merger.ln_q.bias"),
        ("non_lora_state_dict.pth", lambda s: s.pop("base_model.model.rm_head.weight"),
         r"rm_head.weight \[1, width\], got nothing"),
    ],
)  # fmt: skip
def test_other_files_are_refused(base: Path, tmp_path: Path, name: str, change: Any, message: str):
    change_file(small.videoreward(tmp_path / "x"), name, change)
    with pytest.raises(ValueError, match=message):
        load_reward("videoreward", weights=tmp_path / "x", base=str(base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("inference_config"), "normalize=False does without"),
        (
            lambda c: c["data_config"].update(prompt_template_type="simple"),
            "a model that reads 3 reward tokens",
        ),
        (lambda c: c["model_config"].update(output_dim=4), "output_dim 4"),
        (lambda c: c.pop("peft_lora_config"), "expected the model_config.json of VideoReward, got KeyError"),
    ],
)
def test_other_settings_are_refused(base: Path, tmp_path: Path, change: Any, message: str):
    config = json.loads(json.dumps(small.VIDEOREWARD))
    change(config)
    with pytest.raises(ValueError, match=message):
        load_reward("videoreward", weights=small.videoreward(tmp_path / "x", config), base=str(base))


def test_what_is_not_there_is_named(base: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="expected a folder with model_config.json and checkpoint-N"):
        load_reward("videoreward", weights=tmp_path, base=str(base))
    with pytest.raises(ValueError, match=r"run `hf download KwaiVGI/VideoReward` once"):
        load_reward("videoreward", base=str(base))
    with pytest.raises(ValueError, match="dimension: expected one of overall, vq, mq, ta, got 'sum'"):
        load_reward("videoreward", dimension="sum")
