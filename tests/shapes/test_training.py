"""What the small models are trained with."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffalign.pipelines import PIPELINES
from diffalign.process import RectifiedFlow, VariancePreserving, endpoints, target
from diffalign.shapes.grammar import CATEGORIES, RELATIONS, SPLITS, inverse, parse, scenes
from diffalign.shapes.tiny_sd import build_tokenizer
from diffalign.shapes.train import (
    CLIP_TOKENS,
    MAX_WEIGHT,
    MODELS,
    NOISY_FROM,
    NOISY_SHARE,
    SHORT_SHARE,
    T5_LENGTHS,
    UNIFORM_SHARE,
    Trainer,
    _set_text_lengths,
    draw_times,
    weight,
)
from diffalign.shapes.train_text import after_end, side_reader, sides, sides_loss
from diffalign.shapes.train_vae import build_vae, grow
from diffalign.table import resolve


def test_sides_say_the_same_of_a_scene_from_both_ends():
    both = scenes("validation", "two")
    assert torch.equal(sides(both), sides([inverse(scene) for scene in both]))
    assert not torch.equal(sides(both[:1]), sides([type(both[0])(both[0].things[::-1], both[0].relation)]))


def test_sides_of_one_caption_by_hand():
    left, right = RELATIONS.index("left of"), RELATIONS.index("right of")
    found = sides([parse("a green cross right of a red circle"), parse("two blue squares")])
    assert found[0, left].tolist() == [1, 1] and found[0, right].tolist() == [2, 4]  # red circle, green cross
    assert found[0].count_nonzero() == 4 and found[1].count_nonzero() == 0


def test_sides_are_asked_from_the_end_token_on_and_a_reader_that_knows_them_has_no_loss():
    captions = ["a green cross right of a red circle", "a red circle"]
    asked = after_end(SimpleNamespace(tokenizer=build_tokenizer()), captions)
    assert asked.shape == (2, 77) and (~asked).sum(1).tolist() == [9, 4]  # the start token and the words
    assert asked.diff(dim=1).sum(1).tolist() == [1, 1]  # from there on
    wanted, reader = sides([parse(captions[0])] * 2), side_reader(8)
    with torch.no_grad():
        reader.weight.zero_()
        colors, shapes = reader.bias.view(4, 12).split((7, 5), dim=1)
        colors.fill_(-50.0).scatter_(1, wanted[0, :, :1], 50.0)
        shapes.fill_(-50.0).scatter_(1, wanted[0, :, 1:], 50.0)
    hidden = torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(0))
    assert sides_loss(reader, hidden, asked, wanted).item() < 1e-6
    assert sides_loss(reader, hidden, asked, wanted.roll(1, dims=1)).item() > 10


def test_half_of_the_times_are_noisy_and_the_rest_uniform():
    process = VariancePreserving(torch.linspace(0.999, 0.005, 1000), final=1.0)
    t = draw_times(process, 40_000, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() == 999
    noisy = (t >= 1000 * NOISY_FROM).float().mean().item()
    assert abs(noisy - (NOISY_SHARE + (1 - NOISY_SHARE) * (1 - NOISY_FROM))) < 0.01
    below = t[t < 1000 * NOISY_FROM].float()
    assert abs(below.mean().item() - 500 * NOISY_FROM) < 5


def test_a_flow_sees_clean_times_too():
    """Its own distribution has 1.4 % of its times below 0.25."""
    t = draw_times(RectifiedFlow(shift=3.0), 40_000, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() <= 1
    assert abs((t < 0.25).float().mean().item() - (0.25 * UNIFORM_SHARE + 0.014 * (1 - UNIFORM_SHARE))) < 0.005


def test_some_steps_are_padded_as_the_stock_call_pads():
    pipe, generator = SimpleNamespace(max_sequence_length=0, stock=SimpleNamespace()), torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(4000):
        _set_text_lengths(pipe, generator)
        drawn.append((pipe.stock.tokenizer_max_length, pipe.max_sequence_length))
    padded = [t5 for clip, t5 in drawn if clip == CLIP_TOKENS[1]]
    assert abs(len(padded) / len(drawn) - (1 - SHORT_SHARE)) < 0.03
    assert min(padded) == T5_LENGTHS[0] and max(padded) >= T5_LENGTHS[1] - 3
    assert {both for both in drawn if both[0] != CLIP_TOKENS[1]} == {(CLIP_TOKENS[0], T5_LENGTHS[0])}
    clip_alone = SimpleNamespace(stock=SimpleNamespace())
    _set_text_lengths(clip_alone, generator)
    assert not vars(clip_alone.stock)  # is always padded


def test_padding_that_is_left_out_changes_nothing_of_what_clip_says():
    longest = max(len(str(s).split()) for split in SPLITS for c in CATEGORIES for s in scenes(split, c))
    assert longest + 2 < CLIP_TOKENS[0]  # and what follows the end token is told there too
    stock = MODELS["tiny-sd3"](build_vae(16))
    pipe, length = resolve(PIPELINES, type(stock).__name__, "family")(stock, "tiny-sd3"), {}
    for pipe.stock.tokenizer_max_length in CLIP_TOKENS:
        length[pipe.stock.tokenizer_max_length] = pipe.encode_prompts(["a red circle", ""])
    short, padded = (length[tokens] for tokens in CLIP_TOKENS)
    torch.testing.assert_close(short["text_embeds"], padded["text_embeds"])
    kept = [*range(CLIP_TOKENS[0]), *range(CLIP_TOKENS[1], CLIP_TOKENS[1] + pipe.max_sequence_length)]
    torch.testing.assert_close(short["prompt_embeds"], padded["prompt_embeds"][:, kept])


def test_a_grown_vae_holds_the_blocks_of_the_smaller_one():
    small, large = build_vae(4), build_vae(16)
    assert grow(large, small) == 149  # all but what reads or writes the code
    for old, new in ((small.encoder.down_blocks[2].resnets, large.encoder.down_blocks[2].resnets),
                     (small.decoder.up_blocks[0], large.decoder.up_blocks[1])):  # fmt: skip
        for a, b in zip(old.parameters(), new.parameters(), strict=True):
            assert torch.equal(a, b)
    assert large.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 16, 8, 8)


def test_the_weight_makes_the_error_of_epsilon_that_of_v_and_leaves_a_flow_alone():
    process, t = VariancePreserving(torch.linspace(0.999, 0.005, 1000), final=1.0), torch.tensor([0.0, 500.0, 999.0])
    alpha, sigma = process.coefficients(t)
    x0, eps, wrong = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0)).unbind(1)
    x_t = process.add_noise(x0, eps, t)
    implied = endpoints("epsilon", wrong, x_t, alpha, sigma)
    error_of_v = target("v_prediction", implied.x0, wrong, alpha, sigma) - target("v_prediction", x0, eps, alpha, sigma)
    expected = error_of_v.square().mean(1) / (wrong - eps).square().mean(1)
    torch.testing.assert_close(weight(process, t), expected.clamp(max=MAX_WEIGHT), rtol=1e-4, atol=0)
    assert weight(RectifiedFlow(), torch.tensor([0.1, 0.9])).tolist() == [1, 1]


@pytest.mark.parametrize("name", MODELS)
def test_every_small_model_builds_small_and_learns(name: str):
    vae = build_vae(16 if name == "tiny-sd3" else 4)
    stock = MODELS[name](vae)
    pipe = resolve(PIPELINES, type(stock).__name__, "family")(stock, name)
    args = argparse.Namespace(
        seed=0, batch=4, pool=8, pool_steps=100, lr=1e-3, steps=4, ema=0.999, device="cpu", text=None
    )
    trainer = Trainer(pipe, args)
    before = {key: value.clone() for key, value in trainer.modules.state_dict().items()}
    trainer.teach(1)
    assert all(np.isfinite(trainer.step()) for _ in range(2))
    unchanged = [key for key, value in trainer.modules.state_dict().items() if torch.equal(value, before[key])]
    # positions are no parameters, and SDXL reads its first text encoder's last but one layer alone
    unread = ("text_encoder.encoder.layers.2.", "text_encoder.final_layer_norm.")
    assert all("pos_embed" in key or (name == "tiny-sdxl" and key.startswith(unread)) for key in unchanged), unchanged
    halved = sum(p.numel() for p in (*pipe.network.parameters(), *stock.vae.parameters())) * 2
    full = sum(p.numel() for n, m in trainer.modules.items() if n.startswith("text") for p in m.parameters()) * 4
    assert halved + full < (6e6 if name == "tiny-sd" else 6.9e6)
    with trainer.averaged() as averaged:
        assert not averaged.network.training
    assert pipe.network.training


@pytest.mark.slow
def test_training_goes_on_from_shipped_weights_and_then_from_where_it_was(root: Path, tmp_path: Path):
    words = [sys.executable, "-m", "diffalign.shapes.train", "--init", str(root / "assets" / "tiny-sd"),
             "--out", str(tmp_path / "sd"), "--pool", "64", "--batch", "4", "--teach-text", "2"]  # fmt: skip
    first = subprocess.run([*words, "--steps", "2"], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "text taught for 2 steps" in first.stdout and "step 2 validation" in first.stdout
    again = subprocess.run([*words, "--steps", "3"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "resumed at step 2" in again.stdout and "step 3 validation" in again.stdout
    assert "text taught" not in again.stdout  # once
    fresh = ["--model", "tiny-sdxl", "--vae", str(root / "assets" / "tiny-sd" / "vae")]
    other = subprocess.run([*words[:3], *fresh, *words[5:]], capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "is of another model" in other.stderr and "Traceback" not in other.stderr
