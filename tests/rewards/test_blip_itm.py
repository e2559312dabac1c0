"""BLIP's matching on small weights: against a naive version written here, and against transformers' port of it."""

from __future__ import annotations

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
from transformers import BlipConfig, BlipForImageTextRetrieval

from diffalign.rewards import load_reward
from diffalign.rewards.blip import MedBert, resized_positions
from diffalign.rewards.blip_itm import UNUSED
from diffalign.rewards.blip_score import tokenized

SIDE, SHARED = small_checkpoints.BLIP_SIDE, small_checkpoints.BLIP_SHARED
VISION, TEXT = small_checkpoints.BLIP
KEYWORDS = {"side": SIDE, "vision_heads": VISION.heads, "text_heads": TEXT.heads}
NAMES = ["astronaut_512", "coffee_600x400", "portrait_256x400", "small_96x64", "palette_P_512"]
PROMPTS = ["a cup of tea", "", "An astronaut, smiling", "a cup of tea", "a very long prompt " * 20]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoints.blip_matching(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def rewards(official: Path) -> dict[str, Any]:
    outputs = ("probability", "logit", "cosine")
    return {output: load_reward("blip-itm", weights=official, output=output, **KEYWORDS) for output in outputs}


def scores(reward: Any) -> Tensor:
    return reward([oracle.photographs()[name] for name in NAMES], PROMPTS)


def square(name: str) -> Tensor:
    """[3, 64, 64], by PIL alone, then BLIP's mean and standard deviation."""
    resized = oracle.photographs()[name].convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


class Naive:
    """The paper's model in double precision: one picture, one prompt, one head, one query at a time."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {key: value.double() for key, value in state.items()}

    def linear(self, key: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{key}.weight"].T + self.state[f"{key}.bias"]

    def norm(self, key: str, x: Tensor, eps: float) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{key}.weight"] + self.state[f"{key}.bias"]

    def gelu(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, penalty: Tensor) -> Tensor:
        width, out = q.shape[1] // heads, torch.zeros_like(q)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for row in range(len(q)):
                logits = (k[:, part] * q[row, part]).sum(1) / math.sqrt(width) + penalty
                weights = (logits - logits.max()).exp()
                out[row, part] = (weights[:, None] * v[:, part]).sum(0) / weights.sum()
        return out

    def see(self, x: Tensor) -> Tensor:
        """[17, 32] of [3, 64, 64]."""
        kernel, start = self.state["visual_encoder.patch_embed.proj.weight"], "visual_encoder."
        corners = [(16 * i, 16 * j) for i in range(4) for j in range(4)]
        patches = [(kernel * x[:, i : i + 16, j : j + 16]).sum((1, 2, 3)) for i, j in corners]
        tokens = torch.stack(patches) + self.state[f"{start}patch_embed.proj.bias"]
        tokens = torch.cat([self.state[f"{start}cls_token"][0], tokens]) + self.state[f"{start}pos_embed"][0]
        for n in range(VISION.layers):
            key = f"{start}blocks.{n}"
            q, k, v = self.linear(f"{key}.attn.qkv", self.norm(f"{key}.norm1", tokens, 1e-6)).split(VISION.width, 1)
            attended = self.attend(q, k, v, VISION.heads, torch.zeros(len(k)))
            tokens = tokens + self.linear(f"{key}.attn.proj", attended)
            inner = self.gelu(self.linear(f"{key}.mlp.fc1", self.norm(f"{key}.norm2", tokens, 1e-6)))
            tokens = tokens + self.linear(f"{key}.mlp.fc2", inner)
        return self.norm(f"{start}norm", tokens, 1e-6)

    def read(self, ids: Tensor, mask: Tensor, seen: Tensor | None) -> Tensor:
        """[35, 36] of ids [35]."""
        start, penalty = "text_encoder.", -10000.0 * (1 - mask.double())
        words = self.state[f"{start}embeddings.word_embeddings.weight"][ids]
        words = words + self.state[f"{start}embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm(f"{start}embeddings.LayerNorm", words, 1e-12)
        for n in range(TEXT.layers):
            key = f"{start}encoder.layer.{n}"
            x = self.add(f"{key}.attention", x, x, penalty)
            x = x if seen is None else self.add(f"{key}.crossattention", x, seen, torch.zeros(len(seen)))
            inner = self.linear(f"{key}.output.dense", self.gelu(self.linear(f"{key}.intermediate.dense", x)))
            x = self.norm(f"{key}.output.LayerNorm", x + inner, 1e-12)
        return x

    def add(self, key: str, x: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
        q, k, v = (self.linear(f"{key}.self.{n}", z) for n, z in (("query", x), ("key", y), ("value", y)))
        attended = self.linear(f"{key}.output.dense", self.attend(q, k, v, TEXT.heads, penalty))
        return self.norm(f"{key}.output.LayerNorm", x + attended, 1e-12)

    def outputs(self, x: Tensor, ids: Tensor, mask: Tensor) -> dict[str, float]:
        seen = self.see(x.double())
        no, yes = self.linear("itm_head", self.read(ids, mask, seen)[0])
        image = self.linear("vision_proj", seen[0])
        text = self.linear("text_proj", self.read(ids, mask, None)[0])
        return {
            "probability": (yes.exp() / (yes.exp() + no.exp())).item(),
            "logit": (yes - no).item(),
            "cosine": (image @ text / (image.norm() * text.norm())).item(),
        }


def test_all_outputs_are_those_of_the_naive_version(official: Path, rewards: dict[str, Any]):
    naive = Naive(torch.load(official, weights_only=True)["model"])
    ids, mask = tokenized(PROMPTS)
    rows = [naive.outputs(square(name), ids[i], mask[i]) for i, name in enumerate(NAMES)]
    for output, reward in rewards.items():
        wanted = torch.tensor([row[output] for row in rows])
        torch.testing.assert_close(scores(reward), wanted, atol=1e-5, rtol=1e-5)
        assert wanted.std() > 0.02, output


PORT = {
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual_encoder.norm": "vision_model.post_layernorm",
    "visual_encoder.blocks": "vision_model.encoder.layers",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}


def ported(official: Path) -> BlipForImageTextRetrieval:
    """The same weights in transformers' model. Its ViT's eps is 1e-5 by default, the authors' 1e-6."""
    text = {"hidden_size": TEXT.width, "encoder_hidden_size": VISION.width, "intermediate_size": TEXT.hidden,
            "num_hidden_layers": TEXT.layers, "num_attention_heads": TEXT.heads, "vocab_size": TEXT.words,
            "max_position_embeddings": TEXT.positions}  # fmt: skip
    vision = {"hidden_size": VISION.width, "intermediate_size": VISION.hidden, "num_hidden_layers": VISION.layers,
              "num_attention_heads": VISION.heads, "image_size": SIDE, "patch_size": 16,
              "layer_norm_eps": 1e-6}  # fmt: skip
    model = BlipForImageTextRetrieval(
        BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=SHARED)
    ).eval()
    state = {}
    for key, value in torch.load(official, weights_only=True)["model"].items():
        if not key.startswith(UNUSED):
            for ours, theirs in PORT.items():
                key = key.replace(ours, theirs)
            state[key] = value.float()
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and not [key for key in left.missing_keys if "position_ids" not in key]
    return model


@torch.no_grad()
def test_all_outputs_are_those_of_transformers_port(official: Path, rewards: dict[str, Any]):
    model, (ids, mask) = ported(official), tokenized(PROMPTS)
    x = torch.stack([square(name) for name in NAMES])
    match = model(ids, x, use_itm_head=True, attention_mask=mask).itm_score
    cosine = model(ids, x, use_itm_head=False, attention_mask=mask).itm_score.diag()
    torch.testing.assert_close(scores(rewards["probability"]), match.softmax(1)[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores(rewards["logit"]), match[:, 1] - match[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores(rewards["cosine"]), cosine, atol=1e-5, rtol=0)


@pytest.mark.parametrize("output", ["probability", "logit", "cosine"])
def test_scores_stay_in_range_and_do_not_depend_on_the_batch(rewards: dict[str, Any], output: str):
    reward, pictures = rewards[output], [oracle.photographs()[name] for name in NAMES]
    together = scores(reward)
    alone = torch.cat([reward([picture], [prompt]) for picture, prompt in zip(pictures, PROMPTS, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, reward(pictures[::-1], PROMPTS[::-1]).flip(0), atol=1e-5, rtol=0)
    low, high = reward.card.range
    assert low <= together.min() and together.max() <= high and reward.card.side == SIDE


@pytest.mark.parametrize("output", ["probability", "logit", "cosine"])
def test_the_gradient_is_that_of_finite_differences(rewards: dict[str, Any], output: str):
    generator = torch.Generator().manual_seed(0)
    pixels = (0.2 + 0.6 * torch.rand(1, 3, 24, 20, generator=generator)).requires_grad_()
    rewards[output](pixels, PROMPTS[:1]).sum().backward()
    direction = pixels.grad / pixels.grad.norm()
    with torch.no_grad():
        up, down = (rewards[output](pixels + step * direction, PROMPTS[:1]).item() for step in (1e-2, -1e-2))
    assert (up - down) / 2e-2 == pytest.approx(pixels.grad.norm().item(), rel=0.02)


def test_the_cosine_reads_a_prompt_once_until_the_weights_change(
    official: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    reward, read, asked = load_reward("blip-itm", weights=official, output="cosine", **KEYWORDS), MedBert.forward, []
    monkeypatch.setattr(MedBert, "forward", lambda self, ids, *rest: asked.append(len(ids)) or read(self, ids, *rest))
    with torch.inference_mode():
        before = scores(reward)
    assert asked == [1] * len(set(PROMPTS)), "alone, so that no score depends on what was asked before"
    pixels = torch.full((1, 3, 24, 20), 0.5, requires_grad=True)
    reward(pixels, PROMPTS[2:3]).sum().backward()
    assert pixels.grad is not None and torch.equal(scores(reward), before)
    assert len(asked) == len(set(PROMPTS)) and caplog.text.count("longer than the text encoder reads") == 1
    with torch.no_grad():
        reward.network.text_proj.weight.mul_(torch.linspace(-1, 1, SHARED)[:, None])
    after = scores(reward)
    assert len(asked) == 2 * len(set(PROMPTS)) and (after - before).abs().max() > 0.01
    reward.network.visual_encoder.double().float()
    assert torch.equal(scores(reward), after) and len(asked) == 2 * len(set(PROMPTS)), "another side of the network"
    reward.network.text_encoder.bfloat16()
    assert 0 < (scores(reward) - after).abs().max() < 0.05 and len(asked) == 3 * len(set(PROMPTS))


def keys_kernel(distance: float, a: float = -0.75) -> float:
    """Keys' cubic with the slope that torch has without antialiasing."""
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4)


def test_positions_of_another_size_are_interpolated(official: Path):
    """The class token's row stays; row 3 of 8 lies at 1.25 of 4, between rows 0 to 3."""
    values = torch.tensor([3.0, -1.0, 4.0, 2.0])
    table = torch.cat([torch.full((1, 1, 1), 9.0), values.view(4, 1).expand(4, 4).reshape(1, 16, 1)], dim=1)
    table = resized_positions(table, 8, Path("here"))
    assert table.shape == (1, 65, 1) and table[0, 0, 0] == 9
    rows = table[0, 1:, 0].view(8, 8)
    torch.testing.assert_close(rows, rows[:, :1].expand(8, 8))
    wanted = sum(keys_kernel(abs(1.25 - row)) * value for row, value in enumerate(values.tolist()))
    assert rows[3, 0].item() == pytest.approx(wanted, abs=1e-5)
    assert torch.equal(resized_positions(table, 8, Path("here")), table)
    larger = load_reward("blip-itm", weights=official, **KEYWORDS | {"side": 96})
    assert larger.network.visual_encoder.pos_embed.shape == (1, 37, 32) and larger.card.side == 96
    assert scores(larger).isfinite().all()


def test_wrong_files_and_keywords_are_refused(official: Path, tmp_path: Path):
    state = torch.load(official, weights_only=True)["model"]
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model": state | {"itm_head.weight": torch.zeros(3, 36)}}, tmp_path / "other.pth")
    for keywords, message in (
        ({"weights": tmp_path / "none"}, "expected the file model_base_retrieval_coco.pth, a folder that holds it"),
        ({"weights": tmp_path / "bare.pth"}, r"expected the official container \{'model'"),
        ({"weights": tmp_path / "other.pth"}, "has other shapes: itm_head.weight"),
        ({"output": "itc"}, "output: expected one of probability, logit, cosine, got 'itc'"),
        ({"side": 100}, "side: expected a multiple of the patch, 16 pixels, got 100"),
        ({"dtype": "fp8"}, "dtype: expected one of float32"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward("blip-itm", **{"weights": official} | KEYWORDS | keywords)
