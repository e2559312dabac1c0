"""What a user gets wrong about models, LoRAs, sizes and caches, through the command line: one sentence, exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_pairs
import yaml
from miniatures import FAMILIES
from PIL import Image

from diffalign import cli
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.export import export_lora
from diffalign.pipelines.lora import attach_lora, save_lora

Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Refused:
    """Runs a command that must fail, and returns its one sentence."""
    monkeypatch.delenv("DIFFALIGN_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert stop.value.code == 2 and out == "" and "Traceback" not in err
        last = err.rstrip().splitlines()[-1]
        assert last.startswith("diffalign: ") and len(last) < 900
        return last

    return run


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., str]:
    """Writes a run's config and returns its path."""
    (tmp_path / "data").mkdir()
    data = toy_pairs.write("jsonl", tmp_path / "data", count=4)

    def write(family: str, **changes: Any) -> str:
        values = {
            "pretrained_model_name_or_path": str(FAMILIES[family]()),
            "resolution": 32,
            "lora": {"rank": 2},
            "data": {**data, "val_fraction": 0},
            "train_batch_size": 2,
            "max_train_steps": 1,
            "report_to": "none",
            "cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "run"),
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, **changes}))
        return str(tmp_path / "run.yaml")

    return write


def lora_of(family: str, folder: Path) -> Path:
    pipe = load_pipeline(FAMILIES[family]())
    attach_lora(pipe, rank=2)
    return save_lora(pipe, folder)


@pytest.mark.parametrize(("made", "loaded"), [("sdxl", "sd3"), ("sd", "sdxl")])
def test_a_lora_of_another_family(made: str, loaded: str, tmp_path: Path, refused: Refused, config: Any) -> None:
    file = lora_of(made, tmp_path / "lora")
    kohya = export_lora(file, tmp_path / "kohya.safetensors")
    title = {"sd": "Stable Diffusion 1.x or 2.x", "sdxl": "SDXL"}[made]
    for some in (file, kohya):
        said = refused("generate", "--model", FAMILIES[loaded](), "--lora", some, "--prompt", "a red circle")
        assert f"got one for {title} (cross-attention width" in said
    assert f"got one for {title} (" in refused("train", config(loaded, init_lora=str(tmp_path / "lora")))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # refused before anything was encoded


def without(part: str) -> Callable[[Path], object]:
    return lambda folder: shutil.rmtree(folder / part)


def of_class(name: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))

    return edit


def cut(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("vae"), "the folder vae is missing"),
        (without("tokenizer"), "the folder tokenizer is missing"),
        (without("text_encoder_2"), "the folder text_encoder_2 is missing"),
        (cut, "unet/diffusion_pytorch_model.safetensors is damaged or cut off"),
        (of_class("PixArtSigmaPipeline"), "got PixArtSigmaPipeline; a new family is one file"),
        (of_class("StableDiffusionXLImg2ImgPipeline"), "the SDXL refiner, with its one text encoder"),
        (of_class("StableDiffusion3Pipeline"), "got none for transformer"),
    ],
)
def test_a_model_folder_with_something_missing(
    edit: Callable[[Path], object], message: str, tmp_path: Path, refused: Refused, config: Any
) -> None:
    shutil.copytree(FAMILIES["sdxl"](), tmp_path / "model")
    edit(tmp_path / "model")
    assert message in refused("generate", "--model", tmp_path / "model", "--prompt", "a red circle")
    assert message in refused("train", config("sdxl"), f"pretrained_model_name_or_path={tmp_path / 'model'}")


def test_a_single_file_of_weights(refused: Refused) -> None:
    file = FAMILIES["sdxl"]() / "unet" / "diffusion_pytorch_model.safetensors"
    assert "expected a diffusers model folder, got a single file; convert it" in refused(
        "generate", "--model", file, "--prompt", "a red circle"
    )


@pytest.mark.parametrize(
    ("family", "resolution", "message"),
    [
        ("sdxl", 30, "multiples of 4, got 30 x 30; the nearest is 32 x 32"),
        ("sd3", 36, "multiples of 8, at most 96, got 36 x 36; the nearest is 32 x 32"),
        ("sd3", 104, "multiples of 8, at most 96, got 104 x 104; the nearest is 96 x 96"),
        ("sd3", 3, "multiples of 8, at most 96, got 3 x 3; the nearest is 8 x 8"),
    ],
)
def test_a_resolution_that_the_model_cannot_take(
    family: str, resolution: int, message: str, refused: Refused, config: Any
) -> None:
    assert message in refused("train", config(family, resolution=resolution))
    assert message in refused("cache", config(family, resolution=resolution))


def test_a_bucket_that_the_model_cannot_take(tmp_path: Path, refused: Refused, config: Any) -> None:
    """96 pixels are allowed, but not the long side of a bucket of about as many pixels."""
    for name in ("0w.png", "0l.png"):
        Image.new("RGB", (90, 45)).save(tmp_path / "data" / name)
    data = {"name": "jsonl", "path": str(tmp_path / "data"), "val_fraction": 0, "buckets": 8}
    assert "at most 96, got 64 x 136; the nearest is 64 x 96" in refused(
        "train", config("sd3", resolution=96, data=data)
    )


def test_a_cache_that_cannot_be(tmp_path: Path, refused: Refused, config: Any) -> None:
    (tmp_path / "taken").write_text("a file")
    said = refused("cache", config("sd", cache_dir=str(tmp_path / "taken")))
    assert "taken" in said and "expected a cache_dir that is a folder" in said


def test_a_damaged_cache_is_set_aside_with_a_line_and_computed_again(
    tmp_path: Path, config: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    path = config("sd")
    for damage in (False, True):
        if damage:
            [shard] = (tmp_path / "cache").glob("latents-*/*.safetensors")
            shard.write_bytes(shard.read_bytes()[:-9])
        with pytest.raises(SystemExit) as stop:
            cli.main(["cache", path, "--json"])
        assert stop.value.code in (0, None)
        out, err = capfd.readouterr()
        assert json.loads(out)["computed_pairs"] == 4 and json.loads(out)["computed_prompts"] == (0 if damage else 5)
        said = " ".join(err.split())  # the log is wrapped
        assert ("is damaged" in said and "set aside, to be computed again" in said) == damage
    assert len(list((tmp_path / "cache").glob("latents-*/*.damaged"))) == 1


def test_a_run_that_was_refused_leaves_its_folder_to_the_corrected_one(refused: Refused, config: Any) -> None:
    assert "the nearest is 32 x 32" in refused("train", config("sd", resolution=30))
    assert "lora.targets" in refused("train", config("sd", lora={"rank": 2, "targets": ["nothing"]}))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", config("sd")])
    assert stop.value.code in (0, None)
    assert "already holds a run" in refused("train", config("sd"))
