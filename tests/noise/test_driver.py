"""`optimize_noise` on whole pipelines: what goes in, what comes out, what is refused, what a file holds."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from miniatures import stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from toy_noise import Box, Wavy

import diffalign
from diffalign.generation import generate
from diffalign.noise.driver import Progress
from diffalign.noise.result import NoiseResult
from diffalign.pipelines import as_pipeline, load_pipeline
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.compiling import compile_blocks, compiled
from diffalign.rewards.base import Weighted
from diffalign.rewards.clip import TinyCLIP
from diffalign.rewards.texts import NetworkReader

PROMPTS = ["a red circle", "two blue squares"]
STOCK: dict[str, tuple[Callable[[], Path], Any]] = {
    "sd": (stable_diffusion, StableDiffusionPipeline),
    "sdxl": (stable_diffusion_xl, StableDiffusionXLPipeline),
    "sd3": (lambda: stable_diffusion_3(t5=False), StableDiffusion3Pipeline),
}


@functools.cache
def model() -> LatentPipeline:
    """A frozen one, so all tests may share it."""
    return load_pipeline(stable_diffusion())


def optimized(pipe: Any = None, prompts: Any = None, rewards: Any = None, **keywords: Any) -> NoiseResult:
    given = {"steps": 3, "sampling_steps": 2, **keywords}
    return diffalign.optimize_noise(pipe or model(), prompts or PROMPTS, rewards or [Wavy()], **given)


def stock_of(family: str) -> Any:
    folder, kind = STOCK[family][0](), STOCK[family][1]
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    pipe = kind.from_pretrained(folder, torch_dtype=torch.float32, **absent)
    if family != "sd3":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", STOCK)
def test_the_noise_makes_the_same_picture_in_the_stock_pipeline(family: str) -> None:
    pipe = stock_of(family)
    result = optimized(pipe, method="reno", guidance_scale=3.0, lr=20.0, seed=7)
    assert (result.best.total >= result.first.total).all() and (result.best.iteration > 0).any()
    pictures = pipe(PROMPTS, latents=result.noise, num_inference_steps=2, guidance_scale=3.0, output_type="pt",
                    height=32, width=32).images  # fmt: skip
    torch.testing.assert_close(pictures.float(), result.best.pixels, rtol=0, atol=2e-4)


def test_a_one_step_network_starts_where_it_was_distilled_to() -> None:
    """As Hyper-SDXL's is drawn: LCM's scheduler from pure noise at timestep 800."""
    pipe = stock_of("sdxl")
    result = optimized(pipe, sampling_steps=1, timesteps=[800], guidance_scale=0.0)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pictures = pipe(PROMPTS, latents=result.noise, timesteps=[800], num_inference_steps=1, guidance_scale=0.0,
                    output_type="pt", height=32, width=32).images  # fmt: skip
    torch.testing.assert_close(pictures.float(), result.best.pixels, rtol=0, atol=2e-4)
    assert result.evaluations == 3 and result.settings["timesteps"] == [800]


def test_a_stock_pipeline_is_taken_as_it_is_and_left_so() -> None:
    stock = stock_of("sd")
    ours = as_pipeline(stock)
    assert ours.network is stock.unet and as_pipeline(ours) is ours and as_pipeline("tiny-sd").name.endswith("tiny-sd")
    before = optimized(model())
    torch.testing.assert_close(optimized(stock).best.pixels, before.best.pixels)


def test_the_plain_picture_is_that_of_generate() -> None:
    pipe = model()
    result = optimized(pipe, seed=[11, 5], guidance_scale=2.0)
    assert result.seeds == (11, 5)
    plain = generate(pipe, PROMPTS, seeds=[11, 5], steps=2, guidance_scale=2.0)
    torch.testing.assert_close(result.first.pixels, plain)


@pytest.mark.parametrize("family", STOCK)
def test_no_guidance_is_what_stock_pipelines_call_0(family: str) -> None:
    pipe = stock_of(family)
    result = optimized(pipe, guidance_scale=0.0, steps=1)
    drawn = generate(as_pipeline(pipe), PROMPTS, seeds=[0, 1], steps=2, guidance_scale=0.0)
    pictures = pipe(PROMPTS, latents=result.noise, num_inference_steps=2, guidance_scale=0.0, output_type="pt",
                    height=32, width=32).images  # fmt: skip
    torch.testing.assert_close(result.best.pixels, drawn)
    torch.testing.assert_close(pictures.float(), drawn, rtol=0, atol=2e-4)
    assert result.evaluations == 2


def test_history_has_a_line_per_look_and_the_best_is_the_largest_total() -> None:
    result = optimized(rewards=Weighted({"up": (Wavy(), 2.0), "down": (Wavy(1.0), -1.0)}), steps=4, seed=3)
    assert len(result.history) == 4
    for look in result.history:
        assert set(look) == {"total", "up", "down", "norm", "ends"}
        torch.testing.assert_close(look["total"], 2 * look["up"] - look["down"])
    totals = torch.stack([look["total"] for look in result.history])
    assert torch.equal(result.best.total, totals.amax(0)) and torch.equal(result.best.iteration, totals.argmax(0))
    torch.testing.assert_close(result.history[0]["norm"], result.first.noise.flatten(1).norm(dim=1))
    assert result.evaluations == 4 * 2 and not result.interrupted
    assert set(result.seconds) == {"setup", "search", "final"}


def test_the_same_call_gives_the_same_noise() -> None:
    one, other = optimized(seed=3), optimized(seed=3)
    assert torch.equal(one.noise, other.noise) and torch.equal(one.best.pixels, other.best.pixels)
    assert not torch.equal(one.noise, optimized(seed=4).noise)


@pytest.mark.slow
def test_a_compiled_network_finds_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, as inductor would have it; what inductor makes of it is for machines with a compiler."""
    traced = functools.partial(compile_blocks, backend="aot_eager")
    monkeypatch.setattr("diffalign.noise.driver.compile_blocks", traced)
    pipe = load_pipeline(stable_diffusion())
    found = optimized(pipe, rewards=[TinyCLIP()], compile=True)
    assert compiled(pipe.network)
    torch.testing.assert_close(found.noise, optimized(rewards=[TinyCLIP()]).noise, atol=1e-4, rtol=0)
    assert (found.noise - found.first.noise).norm() > 0.1


@pytest.mark.parametrize("method", ["fk", "paths", "dno", "zero_order", "best_of_n"])
def test_every_method_is_behind_the_same_call(method: str) -> None:
    steps = {} if method in ("fk", "paths") else {"steps": 3}
    rewards = {"jpeg": 1.0} if method != "dno" else [Wavy()]
    own = {"fk": {"every": 1, "particles": 2}, "paths": {"rounds": 1, "kept": 1, "copies": 2}}.get(method, {})
    result = diffalign.optimize_noise(model(), "a red circle", rewards, method=method,
                                      sampling_steps=4, **steps, **own)  # fmt: skip
    assert result.best.pixels.shape == (1, 3, 32, 32) and result.best.total.isfinite().all()
    assert result.images[0].size == (32, 32) and result.settings["method"] == method


def test_prompts_are_read_once_by_every_text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, reward = load_pipeline(stable_diffusion()), diffalign.load_reward("tiny-clip")
    calls = {"model": 0, "reward": 0}

    def counted(key: str, module: Any) -> None:
        forward = module.forward

        def call(*args: Any, **keywords: Any) -> Any:
            calls[key] += 1
            return forward(*args, **keywords)

        monkeypatch.setattr(module, "forward", call)

    counted("model", pipe.stock.text_encoder)
    assert isinstance(reward, TinyCLIP) and isinstance(reward.tower, NetworkReader)
    counted("reward", reward.tower.model.text_model)
    optimized(pipe, rewards=[reward], steps=4, prompts=["a red circle"])
    assert calls == {"model": 1, "reward": 1}


def test_a_small_vae_searches_and_the_models_own_makes_the_picture() -> None:
    torch.manual_seed(0)
    small = AutoencoderTiny(latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    pipe, reward = model(), Wavy()
    result = optimized(pipe, rewards=[reward], vae=small, seed=1)
    again = generate(pipe, PROMPTS[:1], seeds=[1], steps=2, guidance_scale=1.0)
    torch.testing.assert_close(result.first.pixels[:1], again)
    torch.testing.assert_close(result.best.total, reward(result.best.pixels, PROMPTS))
    assert not torch.allclose(result.best.total, result.history[int(result.best.iteration[0])]["total"])


# -- interruption ------------------------------------------------------------------------------------------------------


def test_ctrl_c_gives_what_was_found_so_far() -> None:
    def stop(progress: Progress) -> None:
        if progress.iteration == 1:
            raise KeyboardInterrupt

    result = optimized(steps=9, callback=stop)
    assert result.interrupted and len(result.history) == 2
    assert torch.equal(result.best.total, torch.stack([look["total"] for look in result.history]).amax(0))


def test_ctrl_c_on_the_way_of_particles_gives_what_they_were_heading_for() -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    result = diffalign.optimize_noise(model(), "a red circle", [Wavy()], method="fk",
                                      sampling_steps=4, every=1, first=0.0, callback=stop)  # fmt: skip
    assert result.interrupted and result.best.pixels.shape == (1, 3, 32, 32) and not result.history[0]["ends"]


def test_a_callback_may_have_seen_enough() -> None:
    told: list[Progress] = []

    def enough(progress: Progress) -> bool:
        told.append(progress)
        return progress.iteration == 2

    result = optimized(steps=9, callback=enough)
    assert [progress.iteration for progress in told] == [0, 1, 2] and not result.interrupted
    assert torch.equal(told[-1].best.noise, result.noise)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_result_is_saved_in_one_piece_and_its_noise_read_again(tmp_path: Path) -> None:
    result = optimized(seed=2)
    folder = result.save(tmp_path / "found")
    names = {"best-0000.png", "best-0001.png", "first-0000.png", "first-0001.png", "noise.safetensors", "noise.json"}
    assert {file.name for file in folder.iterdir()} == names
    assert torch.equal(diffalign.load_noise(folder), result.noise)
    report = json.loads((folder / "noise.json").read_text())
    assert report["prompts"] == PROMPTS and report["seeds"] == [2, 3] and len(report["history"]) == 3
    assert report["best"]["total"] == pytest.approx(result.best.total.tolist())
    assert optimized(seed=4).save(folder) == folder  # an older result may be replaced


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        optimized().save(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "x"
    with pytest.raises(ValueError, match="expected a saved result"):
        diffalign.load_noise(tmp_path)


def test_a_missing_score_is_null_in_the_file_and_loses(tmp_path: Path) -> None:
    class Moody(Wavy):
        def __call__(self, images: Any, prompts: Any) -> Any:
            scores = super().__call__(images, prompts)
            return scores * float("nan") if len(self.asked) == 1 else scores

    result = optimized(rewards=[Moody()])
    assert (result.best.iteration > 0).all() and result.best.total.isfinite().all()
    report = json.loads((result.save(tmp_path / "found") / "noise.json").read_text())
    assert report["history"][0]["total"] == [None, None]


def test_the_plot_has_a_curve_for_each_number() -> None:
    figure = optimized().plot()
    assert [axis.get_title() for axis in figure.axes] == ["total", "wavy", "norm"]
    assert all(len(axis.lines[0].get_ydata()) == 3 for axis in figure.axes)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "renoo"}, "unknown optimize_noise 'renoo', did you mean 'reno'"),
        ({"lrr": 1.0}, "did you mean 'lr'"),
        ({"prompts": [" "]}, "prompts: expected a prompt or a list of them, got ' '"),
        ({"prompts": [3]}, "prompts: expected a prompt"),
        ({"seed": -1}, "seed: expected a number of at least 0"),
        ({"seed": [1, 2, 3]}, "or one for each of 2 prompts"),
        ({"height": 33}, "expected a height and width that are multiples of 4, got 33 x 32"),
        ({"sampling_steps": 0}, "expected 1 to 1000 sampling steps, got 0"),
        ({"timesteps": []}, "times of the network that fall"),
        ({"timesteps": [400, 800]}, "times of the network that fall"),
        ({"timesteps": [1200, 800]}, "on its noise axis"),
        ({"timesteps": [800, 0]}, "above 0"),
        ({"timesteps": [800], "sampling_steps": 4}, "sampling_steps: expected 1, as there are timesteps"),
        ({"guidance_scale": -1.0}, "guidance_scale: expected a number of at least 0"),
        ({"memory": "tiny"}, "unknown memory 'tiny'"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"rewards": 3}, "rewards: expected a mapping of name -> weight"),
        ({"rewards": {"tiny-clap": 1.0}}, "did you mean 'tiny-clip'"),
        ({"rewards": {"tiny-clip": float("nan")}}, "expected a finite number as weight"),
        ({"rewards": [Box()]}, "box has none"),
        ({"rewards": {"winrate": {"preference": {"name": "reward", "rewards": {"jpeg": 1.0}}}}}, "winrate compares"),
        ({"vae": 3}, "vae: expected a VAE of diffusers"),
        ({"pipe": 3}, "expected a LatentPipeline, the name of a model, or a stock pipeline of"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimized(**keywords, callback=lambda progress: pytest.fail("something was drawn"))


def test_a_pipeline_of_another_family_is_refused() -> None:
    class KolorsPipeline(DiffusionPipeline):
        pass

    with pytest.raises(ValueError, match="stock pipeline of StableDiffusionPipeline.*got KolorsPipeline"):
        optimized(KolorsPipeline())


def test_weights_that_are_not_finite_are_refused() -> None:
    pipe = load_pipeline(stable_diffusion(seed=5))
    with torch.no_grad():
        pipe.network.conv_in.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="1 weights of the network are not finite, such as conv_in.weight"):
        optimized(pipe)


def test_a_vae_of_other_latents_is_refused() -> None:
    small = AutoencoderTiny(latent_channels=16, encoder_block_out_channels=(8,), decoder_block_out_channels=(8,),
                            num_encoder_blocks=(1,), num_decoder_blocks=(1,))  # fmt: skip
    with pytest.raises(ValueError, match="vae: expected one of 4 channels, as the model's latents have, got 16"):
        optimized(vae=small)
