"""The pipeline in the manner of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from miniatures import stable_diffusion
from toy_noise import Wavy

import diffalign
from diffalign.pipelines.optimized_noise import OptimizedNoisePipeline

HOW: dict[str, Any] = {"rewards": [Wavy()], "num_inference_steps": 2, "steps": 3}


@pytest.fixture(scope="module")
def pipe() -> OptimizedNoisePipeline:
    return OptimizedNoisePipeline.from_pretrained(str(stable_diffusion()))


def test_it_is_a_pipeline_with_the_parts_of_the_stock_one(pipe: OptimizedNoisePipeline) -> None:
    assert isinstance(pipe, DiffusionPipeline) and isinstance(pipe.stock, StableDiffusionPipeline)
    assert all(getattr(pipe, name) is part for name, part in pipe.stock.components.items())
    assert pipe.components.keys() == pipe.stock.components.keys()


def test_it_moves_and_is_saved_as_the_stock_one(tmp_path: Path) -> None:
    pipe = OptimizedNoisePipeline.from_pretrained(str(stable_diffusion()))
    pipe.save_pretrained(str(tmp_path / "saved"))
    saved = OptimizedNoisePipeline.from_pretrained(str(tmp_path / "saved"))
    how = {**HOW, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    assert torch.equal(pipe("a", **how).images, saved("a", **how).images)
    assert pipe.to(torch.bfloat16) is pipe and pipe.unet.dtype == torch.bfloat16 and pipe.device.type == "cpu"
    assert pipe("a", output_type="pt", **HOW).images.dtype == torch.float32


def test_its_pictures_are_those_of_optimize_noise(pipe: OptimizedNoisePipeline) -> None:
    out = pipe("a red circle", generator=torch.Generator().manual_seed(4), **HOW)
    expected = diffalign.optimize_noise(str(stable_diffusion()), "a red circle", [Wavy()], steps=3, sampling_steps=2,
                                        seed=4)  # fmt: skip
    assert torch.equal(out.result.noise, expected.noise)
    assert np.array_equal(np.asarray(out.images[0]), np.asarray(expected.images[0]))


def test_several_pictures_of_several_prompts(pipe: OptimizedNoisePipeline) -> None:
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)]
    how = {**HOW, "num_images_per_prompt": 2, "output_type": "np", "return_dict": False}
    images, result = pipe(["a", "b"], generator=seeds, **how)
    assert images.shape == (4, 32, 32, 3) and result.prompts == ("a", "a", "b", "b") and result.seeds == (1, 2, 3, 4)
    pixels = pipe("a", output_type="pt", **HOW).images
    assert pixels.shape == (1, 3, 32, 32) and pixels.min() >= 0 and pixels.max() <= 1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"output_type": "latent"}, "output_type: expected one of pil, np, pt, got 'latent'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: expected at least 1"),
        ({"lrr": 1}, "did you mean 'lr'"),
    ],
)
def test_bad_calls_are_named(pipe: OptimizedNoisePipeline, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe("a red circle", **{**HOW, **keywords})
