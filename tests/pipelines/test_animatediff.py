"""AnimateDiff: clips in, latents and back, and the same clip as stock diffusers draws."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnimateDiffPipeline, StableDiffusionPipeline
from miniatures import animatediff, stable_diffusion
from safetensors import safe_open

from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.animatediff import AnimateDiff
from diffalign.pipelines.lora import WEIGHTS_NAME, attach_lora, save_lora
from diffalign.sampling import ddim_stepper, guided, sample
from diffalign.trainer import train

PROMPTS = ["a red circle moving left", "two blue squares"]


@functools.cache
def model() -> AnimateDiff:
    pipe = load_pipeline(animatediff())
    assert isinstance(pipe, AnimateDiff)
    return pipe


def latents_of(pipe: AnimateDiff, seed: int = 0, **size: int) -> torch.Tensor:
    shape = (len(PROMPTS), *pipe.latent_shape(**size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def drawn(pipe: AnimateDiff, noise: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    condition, away = pipe.encode_prompts(PROMPTS), pipe.encode_prompts([""] * len(PROMPTS))
    step = ddim_stepper(guided(pipe.predict, away, guidance), pipe.process, pipe.parametrization, condition)
    return pipe.decode(sample(step, noise, pipe.times(steps)).x)


def stock_of(folder: Path) -> Any:
    stock: Any = AnimateDiffPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.mark.parametrize(("guidance", "size", "frames"), [(1.0, (32, 32), 8), (4.0, (32, 48), 5)])
def test_a_clip_is_the_one_that_stock_diffusers_draws(guidance: float, size: tuple[int, int], frames: int) -> None:
    pipe, (height, width) = model(), size
    noise = latents_of(pipe, height=height, width=width, frames=frames)
    theirs = stock_of(animatediff())(
        PROMPTS, height=height, width=width, num_frames=frames, num_inference_steps=4, guidance_scale=guidance,
        latents=noise, output_type="pt",
    ).frames  # fmt: skip
    ours = drawn(pipe, noise, 4, guidance).clamp(0, 1)
    assert ours.shape == (2, frames, 3, height, width) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=0)


def test_frames_look_at_each_other() -> None:
    pipe = model()
    noise = latents_of(pipe)
    other = noise.clone()
    other[:, :, -1] += 1
    t, condition = torch.full((2,), 500.0), pipe.encode_prompts(PROMPTS)
    with torch.no_grad():
        change = (pipe.predict(other, t, condition) - pipe.predict(noise, t, condition))[:, :, 0].abs().max()
    assert change > 1e-4


def test_every_frame_has_a_latent_of_its_own() -> None:
    pipe = model()
    clip = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))  # more than the VAE is given at once
    with torch.no_grad():
        mean, logvar = pipe.encode(clip)
        one = pipe.stock.vae.encode(clip[1, 3:4] * 2 - 1).latent_dist
        scale = pipe.stock.vae.config.scaling_factor
        assert mean.shape == logvar.shape == (2, 4, 8, 8, 8) == (2, *pipe.latent_shape(frames=8))
        torch.testing.assert_close(mean[1:, :, 3] / scale, one.mean)
        torch.testing.assert_close((0.5 * logvar[1:, :, 3]).exp() / scale, one.std)
        torch.testing.assert_close(pipe.decode(mean)[1, 3:4], pipe.stock.vae.decode(one.mean).sample / 2 + 0.5)


def test_a_lora_of_space_and_time_is_the_stock_pipelines_too(tmp_path: Path) -> None:
    pipe = load_pipeline(animatediff())
    for parameter in attach_lora(pipe, rank=2):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    save_lora(pipe, tmp_path)
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        names = list(file.keys())
    assert all(name.startswith("unet.") for name in names) and any("motion_modules" in name for name in names)
    ours = generate(pipe, PROMPTS, seeds=[0, 1], steps=4, guidance_scale=3.0)
    stock = stock_of(animatediff())
    stock.load_lora_weights(tmp_path)
    noise = torch.stack([torch.randn(pipe.latent_shape(), generator=torch.Generator().manual_seed(s)) for s in (0, 1)])
    theirs = stock(PROMPTS, num_frames=8, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="pt")
    torch.testing.assert_close(ours, theirs.frames.float(), atol=1e-4, rtol=0)


def test_a_folder_with_its_motion_adapter_draws_the_same() -> None:
    noise = latents_of(model())
    torch.testing.assert_close(drawn(load_pipeline(animatediff(adapter_saved=True)), noise, 2, 1.0),
                               drawn(model(), noise, 2, 1.0))  # fmt: skip


def test_what_it_cannot_be_told_is_refused() -> None:
    pipe = model()
    assert pipe.latent_shape() == (4, 8, 8, 8) and pipe.latent_shape(frames=1) == (4, 1, 8, 8)
    with pytest.raises(ValueError, match="expected 1 to 8 frames, which the motion modules of .* know, got 9"):
        pipe.latent_shape(frames=9)
    with pytest.raises(ValueError, match="multiples of 4, got 30 x 32"):
        pipe.latent_shape(height=30)
    stock = stock_of(animatediff())
    stock.register_modules(unet=StableDiffusionPipeline.from_pretrained(stable_diffusion()).unet)
    with pytest.raises(ValueError, match="expected a U-Net with motion modules"):
        AnimateDiff(stock, "pictures")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "densedpo", "inversion_dpo", "grpo", "draft"])
def test_methods_train_it(name: str, tmp_path: Path) -> None:
    from test_video_runs import clips, config, rows

    (tmp_path / "data").mkdir()
    clips(tmp_path / "data", frames=5)
    values = config(tmp_path, tmp_path / "run", name, max_sequence_length=None,
                    pretrained_model_name_or_path=str(animatediff()))  # fmt: skip
    result = train(values)
    first = next(row for row in rows(result.folder) if "loss" in row)
    assert first["grad_norm"] > 0
