"""CogVideoX: clips in, latents and back, and the same clip as stock diffusers draws."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from miniatures import cogvideox
from safetensors import safe_open

from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.cogvideox import CogVideoX
from diffalign.pipelines.lora import WEIGHTS_NAME, attach_lora, save_lora
from diffalign.sampling import ddim_stepper, guided, sample
from diffalign.trainer import train

PROMPTS = ["a red circle moving left", "two blue squares"]
BOTH = pytest.mark.parametrize("rotary", [True, False], ids=["5b", "2b"])


@functools.cache
def model(rotary: bool = True, scheduler: str = "ddim") -> CogVideoX:
    pipe = load_pipeline(cogvideox(rotary, scheduler))
    assert isinstance(pipe, CogVideoX)
    return pipe


def latents_of(pipe: CogVideoX, seed: int = 0, **size: int) -> torch.Tensor:
    shape = (len(PROMPTS), *pipe.latent_shape(**size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def drawn(pipe: CogVideoX, noise: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    condition, away = pipe.encode_prompts(PROMPTS), pipe.encode_prompts([""] * len(PROMPTS))
    step = ddim_stepper(guided(pipe.predict, away, guidance), pipe.process, pipe.parametrization, condition)
    return pipe.decode(sample(step, noise, pipe.times(steps)).x)


def stock_of(folder: Path) -> Any:
    stock: Any = CogVideoXPipeline.from_pretrained(folder)
    stock.scheduler = CogVideoXDDIMScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    return stock


@BOTH
@pytest.mark.parametrize(("guidance", "size"), [(1.0, (32, 32)), (4.0, (32, 48))])
def test_a_clip_is_the_one_that_stock_diffusers_draws(rotary: bool, guidance: float, size: tuple[int, int]) -> None:
    pipe, (height, width) = model(rotary), size
    noise = latents_of(pipe, height=height, width=width, frames=9)
    theirs = stock_of(cogvideox(rotary))(
        PROMPTS, height=height, width=width, num_frames=9, num_inference_steps=4, guidance_scale=guidance,
        latents=noise.transpose(1, 2), output_type="pt",
    ).frames  # fmt: skip
    ours = drawn(pipe, noise, 4, guidance).clamp(0, 1)
    assert ours.shape == (2, 9, 3, height, width) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=0)


def test_the_process_is_the_checkpoints_own_up_to_pure_noise() -> None:
    for rotary, shift in ((True, 1.0), (False, 3.0)):
        process = model(rotary).process
        alpha, sigma = process.coefficients(torch.tensor([999.0, 500.0]))
        stored = CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, snr_shift_scale=shift).alphas_cumprod
        assert alpha[0] == 0 and sigma[0] == 1 and alpha[1] ** 2 == pytest.approx(stored[500].item(), rel=1e-6)
    assert model(True, "dpm").times(4).tolist() == model().times(4).tolist() == [999, 749, 499, 249, -1]


def test_latents_are_scaled_and_a_clip_comes_back_as_the_vae_has_it() -> None:
    pipe = model()
    clip = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mean, logvar = pipe.encode(clip)
        code = pipe.stock.vae.encode(clip.transpose(1, 2) * 2 - 1).latent_dist
        assert mean.shape == logvar.shape == (1, 4, 3, 4, 4) == (1, *pipe.latent_shape(frames=9))
        torch.testing.assert_close(mean / 0.7, code.mean)
        torch.testing.assert_close((0.5 * logvar).exp() / 0.7, code.std)
        torch.testing.assert_close(pipe.decode(mean).transpose(1, 2), pipe.stock.vae.decode(code.mean).sample / 2 + 0.5)


@BOTH
def test_a_reward_has_a_gradient_down_to_the_noise(rotary: bool) -> None:
    pipe = model(rotary)
    noise = latents_of(pipe, frames=9).requires_grad_()
    v = pipe.predict(noise, torch.full((2,), 500.0), pipe.encode_prompts(PROMPTS))
    (slope,) = torch.autograd.grad(pipe.decode(noise - v)[:, -1].sum(), noise)
    assert slope.isfinite().all() and (slope.flatten(1).norm(dim=1) > 0).all()


def test_a_lora_is_the_stock_pipelines_too(tmp_path: Path) -> None:
    pipe = load_pipeline(cogvideox())
    for parameter in attach_lora(pipe, rank=2):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    save_lora(pipe, tmp_path)
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        assert all(name.startswith("transformer.transformer_blocks.") for name in file.keys())  # noqa: SIM118
    ours = generate(pipe, PROMPTS, seeds=[0, 1], steps=4, guidance_scale=3.0, num_frames=9)
    stock = stock_of(cogvideox())
    stock.load_lora_weights(tmp_path)
    noise = torch.stack([torch.randn(pipe.latent_shape(frames=9), generator=torch.Generator().manual_seed(s))
                         for s in (0, 1)])  # fmt: skip
    theirs = stock(PROMPTS, height=32, width=32, num_frames=9, num_inference_steps=4, guidance_scale=3.0,
                   latents=noise.transpose(1, 2), output_type="pt").frames  # fmt: skip
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=0)


def test_what_it_cannot_be_told_is_refused() -> None:
    pipe = model()
    assert pipe.latent_shape() == (4, 3, 4, 4)
    for size, message in (({"frames": 8}, "of the form 4 n . 1, got 8; the nearest is 9"),
                          ({"height": 24}, "multiples of 16, got 24 x 32")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pipe.latent_shape(**size)
    with pytest.raises(ValueError, match="max_sequence_length: expected 226, which the positions"):
        model(False).set_max_sequence_length(100)
    load_pipeline(cogvideox(), max_sequence_length=100)
    stock = CogVideoXPipeline.from_pretrained(cogvideox())
    stock.transformer.register_to_config(patch_size_t=2)
    with pytest.raises(ValueError, match=r"expected CogVideoX 2B or 5B, got one of 1\.5"):
        CogVideoX(stock, "1.5")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "densedpo", "inversion_dpo", "grpo"])
def test_methods_train_it(name: str, tmp_path: Path) -> None:
    from test_video_runs import clips, config, rows

    (tmp_path / "data").mkdir()
    clips(tmp_path / "data", frames=9)
    values = config(tmp_path, tmp_path / "run", name, num_frames=9, max_sequence_length=None,
                    pretrained_model_name_or_path=str(cogvideox()))  # fmt: skip
    result = train(values)
    first = next(row for row in rows(result.folder) if "loss" in row)
    assert first["grad_norm"] > 0
