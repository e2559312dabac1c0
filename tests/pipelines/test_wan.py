"""Wan: clips in, latents and back, and the same clip as stock diffusers draws."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from miniatures import wan

from diffalign.pipelines.lora import attach_lora
from diffalign.pipelines.wan import Wan
from diffalign.sampling import ddim_stepper, guided, sample

PROMPTS = ["a red circle moving left", "two blue squares"]
SIZE = {"height": 32, "width": 32, "frames": 5}


@functools.cache
def model(scheduler: str = "euler") -> Wan:
    return Wan.load(str(wan(scheduler)), dtype=torch.float32, device="cpu", revision=None, variant=None)


def latents_of(pipe: Wan, seed: int = 0) -> torch.Tensor:
    shape = (len(PROMPTS), *pipe.latent_shape(**SIZE))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def drawn(pipe: Wan, noise: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    condition, away = pipe.encode_prompts(PROMPTS), pipe.encode_prompts([""] * len(PROMPTS))
    policy = guided(pipe.predict, away, guidance)
    step = ddim_stepper(policy, pipe.process, pipe.parametrization, condition)
    return pipe.decode(sample(step, noise, pipe.times(steps)).x)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_clip_is_the_one_that_stock_diffusers_draws(guidance: float) -> None:
    pipe = model()
    noise = latents_of(pipe)
    stock: Any = WanPipeline.from_pretrained(wan())
    stock.set_progress_bar_config(disable=True)
    theirs = stock(PROMPTS, height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=guidance,
                   latents=noise, output_type="pt").frames  # fmt: skip
    ours = drawn(pipe, noise, 3, guidance).clamp(0, 1)
    assert ours.shape == (2, 5, 3, 32, 32)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=0)


def test_the_flow_is_that_of_the_checkpoints_sampler() -> None:
    """Wan ships with UniPC, which walks the same flow by another rule: the shift is what counts."""
    assert model("unipc").process == model().process
    torch.testing.assert_close(model("unipc").times(4), model().times(4))
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(4)
    torch.testing.assert_close(model().times(4), stock.sigmas)


def test_latents_have_the_mean_and_deviation_that_the_folder_says() -> None:
    pipe = model()
    clip = torch.rand(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mean, logvar = pipe.encode(clip)
        code = pipe.stock.vae.encode(clip.transpose(1, 2) * 2 - 1).latent_dist
        assert mean.shape == logvar.shape == (1, 4, 2, 4, 4)
        stored = ([0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.5, 1.0])
        means, stds = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in stored)
        torch.testing.assert_close(mean * stds + means, code.mean)
        torch.testing.assert_close((0.5 * logvar).exp() * stds, code.std)
        expected = pipe.stock.vae.decode(code.mean).sample / 2 + 0.5
        torch.testing.assert_close(pipe.decode(mean), expected.transpose(1, 2))


def test_a_clip_has_a_gradient_down_to_its_noise() -> None:
    pipe = model()
    noise = latents_of(pipe).requires_grad_()
    condition = pipe.encode_prompts(PROMPTS)
    x0 = noise - pipe.predict(noise, torch.ones(2), condition)
    (slope,) = torch.autograd.grad(pipe.decode(x0)[:, -1].sum(), noise)
    assert slope.isfinite().all() and (slope.flatten(1).norm(dim=1) > 0).all()


def test_prompts_are_zeros_beyond_their_end_and_may_be_given_fewer_tokens() -> None:
    pipe = Wan.load(str(wan()), dtype=torch.float32, device="cpu", revision=None, variant=None)
    whole = pipe.encode_prompts(PROMPTS)["prompt_embeds"]
    assert whole.shape == (2, 512, 24) and not whole[:, 100:].any()
    before = pipe.fingerprint("text")
    pipe.set_max_sequence_length(16)
    few = pipe.encode_prompts(PROMPTS)["prompt_embeds"]
    torch.testing.assert_close(few, whole[:, :16])
    assert pipe.fingerprint("text") != before
    with pytest.raises(ValueError, match="expected 1 to 512 tokens of T5"):
        pipe.set_max_sequence_length(513)


def test_a_lora_reaches_attention_over_the_clip_and_over_the_prompt() -> None:
    pipe = Wan.load(str(wan()), dtype=torch.float32, device="cpu", revision=None, variant=None)
    attach_lora(pipe, rank=2)
    adapted = {name.split(".lora_A")[0] for name, _ in pipe.network.named_parameters() if "lora_A" in name}
    assert len(adapted) == 2 * 2 * 4 and {name.split(".")[2] for name in adapted} == {"attn1", "attn2"}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 40, "width": 32}, "multiples of 16, got 40 x 32"),
        ({"frames": 8}, "of the form 4 n . 1, got 8; the nearest is 9"),
        ({"frames": -3}, "of the form 4 n . 1, got -3; the nearest is 1"),
    ],
)
def test_sizes_that_it_cannot_draw_are_refused(size: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model().latent_shape(**size)


def test_the_size_of_the_stock_pipeline_is_the_default() -> None:
    assert model().latent_shape() == (4, 21, 60, 104) and model().latent_shape(**SIZE) == (4, 2, 4, 4)


def test_a_model_of_two_stages_is_refused() -> None:
    stock = WanPipeline.from_pretrained(wan())
    stock.register_to_config(boundary_ratio=0.875)
    with pytest.raises(ValueError, match=r"expected a Wan 2\.1 model with one transformer"):
        Wan(stock, "two")
