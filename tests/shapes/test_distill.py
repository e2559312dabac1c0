"""Distillation to a few steps: the teacher's walks, a student that learns them, and a folder that loads again."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import stable_diffusion

from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.sampling import ddim_stepper
from diffalign.shapes.distill import Distiller, Walks, pool, turbo_of, walked

PROMPTS = ["a red circle", "two blue squares", "a green cross", "a red circle"]


def settings(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    values = {"teacher": str(stable_diffusion()), "out": tmp_path / "turbo", "stages": 2, "substeps": 3, "steps": 60,
              "guidance_scale": 3.0, "batch": 4, "pool": 4, "pool_steps": 1000, "lr": 3e-3, "ema": 0.9, "seed": 0,
              "device": "cpu"}  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


def walks_of(args: argparse.Namespace) -> Walks:
    return walked(load_pipeline(args.teacher), PROMPTS, [1, 2, 3, 4], args)


def distiller_of(args: argparse.Namespace, teacher: Path, walks: Walks) -> Distiller:
    """One that has its pool."""
    distiller = Distiller(load_pipeline(teacher), args)
    distiller.pool, distiller.walks = 0, walks
    return distiller


@torch.no_grad()
def missed(distiller: Distiller, walks: Walks) -> float:
    """Mean squared error of where the student's first step lands, where most is to be learned."""
    student, times = distiller.student, distiller.times[:2, None].expand(-1, 4)
    condition = student.encode_prompts(PROMPTS)
    take = ddim_stepper(student.predict, student.process, student.parametrization, condition)
    landed = take(walks.states[:, 0].float(), times[0], times[1]).mean
    return (landed - walks.states[:, 1].float()).square().mean().item()


def test_walks_are_the_teachers_guided_pictures(tmp_path: Path) -> None:
    args = settings(tmp_path)
    walks, teacher = walks_of(args), load_pipeline(args.teacher)
    assert walks.states.shape == (4, 3, 4, 8, 8) and walks.states.dtype == torch.float16
    trailing = turbo_of(teacher)
    assert trailing.times(2).tolist() == [999, 499, -1]
    pictures = generate(trailing, PROMPTS, seeds=[1, 2, 3, 4], steps=6, guidance_scale=3.0)
    torch.testing.assert_close(teacher.decode(walks.states[:, -1].float()).clamp(0, 1), pictures, rtol=0, atol=5e-3)
    start = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(walks.states[2, 0].float(), start, rtol=0, atol=2e-3)


def test_a_student_learns_to_land_where_the_teacher_does(tmp_path: Path) -> None:
    walks = walks_of(settings(tmp_path))
    distiller = distiller_of(settings(tmp_path), stable_diffusion(), walks)
    before = {name: value.clone() for name, value in distiller.teacher.network.state_dict().items()}
    error = missed(distiller, walks)
    for _ in range(60):
        distiller.step()
    assert missed(distiller, walks) < 0.5 * error
    after = distiller.teacher.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_folder_holds_the_network_alone_and_loads_with_the_rest(tmp_path: Path) -> None:
    args = settings(tmp_path)
    shutil.copytree(args.teacher, tmp_path / "teacher")
    walks = walks_of(args)
    distiller = distiller_of(settings(tmp_path, teacher="teacher"), tmp_path / "teacher", walks)
    distiller.step()
    distiller.save()
    assert {file.name for file in (tmp_path / "turbo").iterdir()} == {"unet", "scheduler", "model_index.json"}
    loaded = load_pipeline(tmp_path / "turbo")
    with distiller.learner.averaged():
        drawn, expected = (generate(pipe, PROMPTS[:2], seeds=[5, 6], steps=2, guidance_scale=1.0)
                           for pipe in (loaded, distiller.student))  # fmt: skip
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2e-2)
    assert next(loaded.network.parameters()).dtype == torch.float32
    again = distiller_of(settings(tmp_path, teacher="teacher"), tmp_path / "teacher", walks)
    assert again.learner.resume() and again.learner.done == 1
    assert again.step() == pytest.approx(distiller.step(), nan_ok=True)
    for one, other in zip(again.network.parameters(), distiller.network.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_pool_is_drawn_once_and_each_number_has_its_own(tmp_path: Path) -> None:
    args = settings(tmp_path)
    teacher = load_pipeline(args.teacher)
    first = pool(teacher, 0, args)
    assert len(first.prompts) == len(first.states) == 4 and (tmp_path / "turbo.walks-0.pt").exists()
    again = pool(teacher, 0, settings(tmp_path, guidance_scale=9.0))  # read, not drawn
    assert again.prompts == first.prompts and torch.equal(again.states, first.states)
    assert not torch.equal(pool(teacher, 1, args).states, first.states)


@pytest.mark.parametrize(
    ("rest", "missing", "message"),
    [
        ("nobody", (), "the others being those of 'nobody', and there is no such folder"),
        ("teacher", ("unet",), "the folder unet is missing"),
        ("teacher", ("../teacher/vae",), "the folder vae is missing"),
    ],
)
def test_a_folder_of_some_parts_that_lacks_more_is_named(
    tmp_path: Path, rest: str, missing: tuple[str, ...], message: str
) -> None:
    shutil.copytree(stable_diffusion(), tmp_path / "teacher")
    folder = tmp_path / "turbo"
    for part in ("unet", "scheduler"):
        shutil.copytree(tmp_path / "teacher" / part, folder / part)
    index = {"_class_name": "StableDiffusionPipeline", "_rest_of": rest, "unet": ["diffusers", "UNet2DConditionModel"],
             "scheduler": ["diffusers", "DDIMScheduler"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in missing:
        shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder)
