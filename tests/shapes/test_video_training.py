"""The scripts that train tiny-video: what a caption says, resuming, and a folder that stock diffusers loads."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from diffalign.shapes import train_common, train_video, train_video_vae
from diffalign.shapes.clips import render_clip
from diffalign.shapes.grammar import COLORS, RELATIONS, SHAPES
from diffalign.shapes.motion import parse_moving, sample_moving
from diffalign.shapes.rates import clip_rates
from diffalign.shapes.tiny_video import CHANNELS, build, build_tokenizer, build_vae
from diffalign.shapes.train_video import CHOICES, SHORT, facts, mean_token
from diffalign.shapes.train_video_vae import clips


def call(monkeypatch: pytest.MonkeyPatch, module: object, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["script", *map(str, words)])
    module.main()  # type: ignore[attr-defined]


def test_facts_are_what_the_caption_says() -> None:
    [row] = facts([parse_moving("a red circle above a blue cross moving left slowly then moving up")]).tolist()
    assert row == [COLORS.index("blue"), SHAPES.index("cross"), 1 + COLORS.index("red"), 1 + SHAPES.index("circle"),
                   1 + RELATIONS.index("above"), 1, 3, 1]  # fmt: skip
    [still] = facts([parse_moving("a red circle standing still")]).tolist()
    assert still == [COLORS.index("red"), SHAPES.index("circle"), 0, 0, 0, 0, 0, 0]
    several = facts(sample_moving("train", 400, 0))
    assert (several < torch.tensor(CHOICES)).all() and several.amax(0).tolist() == [count - 1 for count in CHOICES]
    assert len({str(row) for row in several.tolist()}) > 350


class Draws:
    """In place of a stock pipeline: clips of what is asked for, each other one backwards."""

    device = torch.device("cpu")

    def set_progress_bar_config(self, disable: bool) -> None: ...

    def __call__(self, prompts: list[str], num_frames: int, **options: object) -> SimpleNamespace:
        clips = [render_clip(parse_moving(prompt), random.Random(0), num_frames) for prompt in prompts]
        return SimpleNamespace(frames=np.stack([clip[:: 1 - 2 * (row % 2)] for row, clip in enumerate(clips)]) / 255)


def test_rates_of_clips_are_of_what_moves_as_told() -> None:
    straight = [one for one in sample_moving("validation", 60, 0) if one.category == "straight"][:10]
    still = [one for one in sample_moving("validation", 200, 0) if one.category == "still"][:10]
    assert clip_rates(Draws(), straight, batch=4) == {"all": 0.5, "moves": 0.5, "straight": 0.5}
    assert clip_rates(Draws(), still) == {"all": 1.0, "moves": 1.0, "still": 1.0}


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for moving in sample_moving("heldout", 200, 0):
        ids = tokenizer(str(moving)).input_ids
        assert len(ids) == len(str(moving).split()) + 1 <= SHORT
        assert tokenizer.decode(ids, skip_special_tokens=True) == str(moving)


def test_a_mean_token_does_not_see_padding() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]], [[5.0, 6.0], [0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(mean_token(hidden), torch.tensor([[2.0, 3.0], [5.0, 6.0]]))


def test_clips_for_the_vae_are_drawn_anew_from_every_seed() -> None:
    whole, frame = clips(2, 9, seed=3), clips(2, 1, seed=3)
    assert whole.shape == (2, 3, 9, 64, 64) and frame.shape == (2, 3, 1, 64, 64)
    assert whole.min() >= -1 and whole.max() <= 1 and whole.equal(clips(2, 9, seed=3))
    assert not whole.equal(clips(2, 9, seed=4))


def test_the_model_is_as_large_as_may_ship() -> None:
    pipe = build(build_vae())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in pipe.components.items()
             if isinstance(part, torch.nn.Module)}  # fmt: skip
    assert 2 * sizes["transformer"] + 2 * sizes["vae"] + 4 * sizes["text_encoder"] < 8.6e6


@torch.no_grad()
def test_a_fresh_vae_is_one_of_pictures_that_stand_still() -> None:
    torch.manual_seed(0)
    own = build_vae()
    usual = AutoencoderKLWan.from_config(own.config)
    still = clips(2, 1, seed=0).expand(-1, -1, 9, -1, -1)
    for vae, stands in ((own, True), (usual, False)):
        y = vae.decode(vae.encode(still).latent_dist.mean).sample
        assert ((y - y[:, :, :1]).abs().max() < 1e-3 * y.std()) == stands


@torch.no_grad()
def test_a_fresh_vae_keeps_the_last_of_four_pictures() -> None:
    torch.manual_seed(0)
    vae, x = build_vae(), clips(2, 9, seed=0)
    latents = vae.encode(x).latent_dist.mean
    alone = torch.cat([vae.encode(x[:, :, k : k + 1]).latent_dist.mean for k in (0, 4, 8)], 2)
    torch.testing.assert_close(latents, alone, rtol=1e-4, atol=1e-4 * float(alone.std()))
    assert (alone[:, :, 1:] - alone[:, :, :1]).abs().max() > 0.1 * alone.std()  # things do move


@pytest.mark.slow
def test_trained_a_little_in_two_goes_and_loaded_by_stock_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def vae(out: str, steps: int, *more: object) -> None:
        call(monkeypatch, train_video_vae, "--out", tmp_path / out, "--frames", 1, "--batch", 2, "--steps", steps,
             "--save-every", 2, *more)  # fmt: skip

    def network(out: str, steps: int, *more: object) -> None:
        call(monkeypatch, train_video, "--vae", tmp_path / "vae", "--out", tmp_path / out, "--batch", 2, "--pool", 4,
             "--steps", steps, "--save-every", 2, "--eval-every", 4, "--teach-text", 2, "--draws", 2,
             *more)  # fmt: skip

    monkeypatch.setattr(train_common, "cosine_lr", lambda *_, **__: 1e-3)  # the same for runs of another length
    vae("vae", 2)
    vae("vae", 4)
    vae("whole", 4)
    assert "resumed at step 2" in capsys.readouterr().out
    one, other = (AutoencoderKLWan.from_pretrained(tmp_path / name) for name in ("vae", "whole"))
    same(one.state_dict(), other.state_dict())
    assert len(one.config.latents_std) == CHANNELS and not np.allclose(one.config.latents_std, 1.0)
    vae("decoder", 2, "--init", tmp_path / "vae", "--decoder")
    sharper = AutoencoderKLWan.from_pretrained(tmp_path / "decoder")
    same(one.encoder.state_dict(), sharper.encoder.state_dict())
    assert sharper.config.latents_std == one.config.latents_std
    assert not torch.equal(one.decoder.conv_in.weight, sharper.decoder.conv_in.weight)
    network("net", 2)
    network("net", 4)
    network("all", 4)
    said = capsys.readouterr().out
    assert "resumed at step 2" in said and "step 4 validation 0.000" in said
    stock = WanPipeline.from_pretrained(tmp_path / "net")
    same(stock.transformer.state_dict(), WanPipeline.from_pretrained(tmp_path / "all").transformer.state_dict())
    stock.set_progress_bar_config(disable=True)
    frames = stock("a red circle moving left", height=64, width=64, num_frames=9, num_inference_steps=1).frames
    assert frames.shape == (1, 9, 64, 64, 3) and np.isfinite(frames).all()
    network("frames", 4, "--frames", 1, "--bf16", "--compile")
    assert "frames that show the scene 0.000" in capsys.readouterr().out


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
