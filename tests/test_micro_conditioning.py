"""What SDXL is told of a picture's size and crop: the truth of the data in training, the stock default in sampling."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from miniatures import FAMILIES
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffalign.batches import Batches
from diffalign.cache import Cache
from diffalign.data import images
from diffalign.data.examples import load_examples
from diffalign.data.images import frame, resize_and_crop
from diffalign.data.options import Framing
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.lora import WEIGHTS_NAME
from diffalign.trainer import train

SIZES = [(40, 72), (96, 48), (32, 32), (24, 20)]  # (height, width) of winners; every loser is 36 x 36


def write(folder: Path, sizes: list[tuple[int, int]], loser: tuple[int, int] = (36, 36)) -> dict[str, Any]:
    """A `data` section of one pair per size of its winner."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i, size in enumerate(sizes):
        for name, (height, width) in ((f"{i}w.png", size), (f"{i}l.png", loser)):
            Image.new("RGB", (width, height), (50 * i, 90, 200)).save(folder / name)
        lines.append(json.dumps({"prompt": f"picture {i}", "chosen": f"{i}w.png", "rejected": f"{i}l.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"name": "jsonl", "path": str(folder)}


def config(tmp_path: Path, sizes: list[tuple[int, int]], **changes: Any) -> dict[str, Any]:
    values = {
        "pretrained_model_name_or_path": str(FAMILIES["sdxl"]()),
        "resolution": 32,
        "lora": {"rank": 2},
        "method": {"name": "dpo", "beta": 100},
        "data": {**write(tmp_path / "data", sizes, loser=sizes[0]), "val_fraction": 0.25},
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_train_steps": 2,
        "report_to": "none",
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "run"),
    }
    return {**values, **changes}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [(0.5, 0.5), (0.0, 0.13), (1.0, 0.87)])
def test_a_frame_is_where_the_pixels_are(crop: tuple[float, float], flip: bool) -> None:
    """Every pixel says its own place, in a picture that is not resized; a flip is one of the whole picture."""
    whole = torch.zeros(3, 20, 61, dtype=torch.uint8)
    whole[0] = torch.arange(61, dtype=torch.uint8)
    whole[1] = torch.arange(20, dtype=torch.uint8)[:, None]
    picture = Image.fromarray(whole.permute(1, 2, 0).numpy())
    for size in ((20, 20), (20, 32)):
        top, left = frame((20, 61), size, crop, flip).corner
        seen = whole.flip(-1) if flip else whole
        expected = seen[:, top : top + size[0], left : left + size[1]]
        assert torch.equal(resize_and_crop(picture, size, crop, flip), expected)


def test_frames_are_those_of_the_training_scripts_of_diffusers() -> None:
    """Short side to the resolution, center crop at round((side - resolution) / 2): numbers worked out by hand."""
    assert frame((600, 800), (512, 512), (0.5, 0.5), False) == ((600, 800), (0, 86), (512, 512))  # 512 x 683
    assert frame((1024, 1024), (1024, 1024), (0.5, 0.5), True) == ((1024, 1024), (0, 0), (1024, 1024))
    assert frame((2000, 1000), (512, 512), (0.5, 0.5), False) == ((2000, 1000), (256, 0), (512, 512))  # 1024 x 512
    assert frame((256, 384), (512, 512), (0.0, 1.0), False) == ((256, 384), (0, 256), (512, 512))  # enlarged: 512 x 768


def batches(family: str, tmp_path: Path, **framing: Any) -> Batches:
    """All of `SIZES`, the last ones held out."""
    section = {**write(tmp_path / "data", SIZES), "val_fraction": 0.5}
    pairs = load_examples(section, Framing(32, **framing))
    pipe = load_pipeline(FAMILIES[family]())
    cache = Cache(tmp_path / "cache", pipe)
    cache.fill(pipe, [*pairs.train, *pairs.validation], [""], 4, lambda *_: None)
    pipe.release()
    return Batches(cache, pairs.train, pairs.validation, 2, 2, 0, pipe.latent_shape, pipe.frame_condition)


def expected_ids(pairs: Any) -> list[list[float]]:
    rows = []
    for pair in pairs:
        height, width = SIZES[int(pair.prompt.removeprefix("picture "))]
        scale = 32 / min(height, width)
        high, wide = round(height * scale) - 32, round(width * scale) - 32
        top, left = round(high * pair.crop.place[0]), round(wide * pair.crop.place[1])
        rows.append([height, width, top, wide - left if pair.crop.flip else left, 32, 32])
    return rows


@pytest.mark.parametrize("framing", [{}, {"random_crop": True, "random_flip": True, "seed": 3}])
def test_a_batch_tells_the_winners_size_and_crop_also_to_a_pair_without_prompt(
    tmp_path: Path, framing: dict[str, Any]
) -> None:
    made = batches("sdxl", tmp_path, **framing)
    assert len(made.train) == len(made.validation) == 2
    assert not framing or len({pair.crop.place for pair in (*made.train, *made.validation)}) == 4
    for dropout in (0.0, 1.0):
        found = made.batch(0, torch.Generator().manual_seed(0), dropout, torch.device("cpu"))
        ids = found.condition["time_ids"]
        assert ids.dtype == torch.float32 and sorted(ids.tolist()) == sorted(expected_ids(made.train))
        assert (found.condition["prompt_embeds"].count_nonzero() == 0) == (dropout == 1)
    [held_out] = made.validation_batches(0, torch.device("cpu"))
    assert held_out.condition["time_ids"].tolist() == expected_ids(made.validation)


def test_no_picture_is_opened_again_for_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = batches("sdxl", tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(images.Image, "open", refuse)
    assert "time_ids" in made.batch(0, torch.Generator().manual_seed(0), 0.0, torch.device("cpu")).condition


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_other_families_are_told_nothing(family: str, tmp_path: Path) -> None:
    found = batches(family, tmp_path).batch(0, torch.Generator().manual_seed(0), 0.0, torch.device("cpu"))
    assert "time_ids" not in found.condition


def test_the_size_of_a_picture_is_the_upright_one_and_the_key_of_its_latent_does_not_know_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    buffer = io.BytesIO()
    Image.new("RGB", (60, 20)).save(buffer, "JPEG", exif=exif)
    section = write(tmp_path / "data", [(40, 40)])
    (tmp_path / "data" / "0w.png").write_bytes(buffer.getvalue())
    [pair] = load_examples({**section, "val_fraction": 0}, 32).train
    assert pair.sources[0].size == (60, 20) and pair.frame.original == (60, 20)
    key = f"{pair.sources[0].sha256} 32x32 crop 0.5,0.5 flip 0"  # what caches of older versions are keyed by
    assert pair.cache_keys()[0] == key


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every time_ids that a network was called with."""
    seen: list[Tensor] = []
    forward = UNet2DConditionModel.forward

    def spy(self: Any, *args: Any, added_cond_kwargs: Any = None, **options: Any) -> Any:
        seen.append(added_cond_kwargs["time_ids"].detach().clone())
        return forward(self, *args, added_cond_kwargs=added_cond_kwargs, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    return seen


def test_training_and_validation_tell_the_truth_and_pictures_are_drawn_with_the_stock_default(
    tmp_path: Path, told: list[Tensor]
) -> None:
    train(config(tmp_path, [(40, 72)] * 4, validation_prompts=["a red circle"], num_inference_steps=2))
    truth, default = [40, 72, 0, 13, 32, 32], [32, 32, 0, 0, 32, 32]
    rows = [row for ids in told for row in ids.tolist()]
    assert rows.count(default) == 3 * 2 * 2  # the base's grid and two of the run's, two steps, with and without prompt
    assert rows.count(truth) == len(rows) - rows.count(default) > 20


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS_NAME)


def test_of_whole_pictures_of_their_own_size_both_settings_say_the_same_and_else_they_do_not(tmp_path: Path) -> None:
    for name, sizes in (("whole", [(32, 32)] * 4), ("cut", [(40, 72)] * 4)):
        runs = [
            weights(
                train(config(tmp_path, sizes, micro_conditioning=how, output_dir=str(tmp_path / name / how))).folder
            )
            for how in ("data", "fixed")
        ]
        same = all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
        assert same == (name == "whole")


def test_pictures_that_are_enlarged_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_examples(write(tmp_path / "data", SIZES), 32)
    assert (
        "1 of 8 pictures are smaller than the crop and are enlarged" in caplog.text
        and "24 x 20 for 32 x 32" in caplog.text
    )
    caplog.clear()
    load_examples(write(tmp_path / "data", SIZES[:3]), 32)
    assert "enlarged" not in caplog.text
