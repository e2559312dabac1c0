"""Folders from which something is missing: refused with its name before it is filled in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from miniatures import FAMILIES
from safetensors.torch import load_file, save_file

from diffalign.pipelines import load_pipeline
from diffalign.pipelines.sd import StableDiffusion
from diffalign.pipelines.sd3 import StableDiffusion3
from diffalign.pipelines.sdxl import StableDiffusionXL

CLASSES = {"sd": StableDiffusion, "sdxl": StableDiffusionXL, "sd3": StableDiffusion3}
EVERY = [(family, part) for family, kind in CLASSES.items() for part in kind.parts]
Edit = Callable[[Path], object]


def copy(family: str, to: Path) -> Path:
    shutil.copytree(FAMILIES[family](), to)
    return to


def reword(folder: Path, **changes: object) -> None:
    """Changes entries of model_index.json; one of None is taken out."""
    index = json.loads((folder / "model_index.json").read_text()) | changes
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v is not None}))


def test_every_family_names_what_it_cannot_do_without() -> None:
    """All that its stock folder has, but for T5 and what is not loaded at all."""
    for family, kind in CLASSES.items():
        index = json.loads((FAMILIES[family]() / "model_index.json").read_text())
        named = {name for name, value in index.items() if isinstance(value, list) and value[0]}
        assert named - {"text_encoder_3", "tokenizer_3"} == set(kind.parts)


@pytest.mark.parametrize(("family", "part"), EVERY)
def test_a_part_without_a_folder_and_a_part_that_is_not_named(family: str, part: str, tmp_path: Path) -> None:
    folder = copy(family, tmp_path / "gone")
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=rf"not complete: .* parts of which the folder {part} is missing: download"):
        load_pipeline(folder)
    for number, value in enumerate(([None, None], None)):
        folder = copy(family, tmp_path / str(number))
        reword(folder, **{part: value})
        with pytest.raises(ValueError, match=rf"not complete: .* got none for {part}; download or save it again"):
            load_pipeline(folder)


def cut(file: str, length: int) -> Edit:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:length])


def lose(file: str) -> Edit:
    def edit(folder: Path) -> None:
        state = load_file(folder / file)
        state.pop("conv_in.bias")
        save_file(state, folder / file, {"format": "pt"})

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "unet has no weights"),
        (lambda f: (f / "text_encoder" / "config.json").unlink(), "text_encoder has no config.json"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "tokenizer has no vocabulary"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler has no scheduler_config.json"),
        (cut("unet/diffusion_pytorch_model.safetensors", -100), r"unet/diff\S+ is damaged or cut off"),
        (cut("vae/diffusion_pytorch_model.safetensors", 5), r"vae/diff\S+ is damaged or cut off \(5 bytes"),
        (cut("text_encoder/model.safetensors", -100), r"text_encoder/model.safetensors is damaged or cut off"),
        (cut("vae/config.json", 20), "vae/config.json' is not a valid JSON file"),
        (lose("unet/diffusion_pytorch_model.safetensors"), "the file of unet lacks 1 weights, such as conv_in.bias"),
        (cut("model_index.json", 20), "model_index.json cannot be read"),
        (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json to hold one mapping, got list"),
    ],
)  # fmt: skip
def test_a_gap_or_damage_inside_a_part_is_named(edit: Edit, message: str, tmp_path: Path) -> None:
    folder = copy("sd", tmp_path / "model")
    edit(folder)
    with pytest.raises(ValueError, match=message) as refused:
        load_pipeline(folder)
    assert len(str(refused.value)) < 500 and str(refused.value).startswith(str(folder))


def test_weights_of_another_config_are_one_sentence(tmp_path: Path) -> None:
    folder = copy("sd", tmp_path / "model")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"hidden_size": 24}))
    with pytest.raises(ValueError, match=r"not complete or not readable: .*; download or save it again$"):
        load_pipeline(folder)


def test_sd3_does_without_t5_and_says_so_but_not_with_half_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy("sd3", tmp_path / "model")
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
        with pytest.raises(ValueError, match=r"or set text_encoder_3 and tokenizer_3 to \[null, null\] there to do"):
            load_pipeline(folder)
    reword(folder, tokenizer_3=[None, None], text_encoder_3=[None, None])
    with caplog.at_level("INFO", logger="diffalign"):
        assert load_pipeline(folder).encode_prompts(["a red circle"])["prompt_embeds"].shape == (1, 77 + 256, 48)
    assert "T5 is not in the folder, so its tokens are zeros" in caplog.text
    folder = copy("sd3", tmp_path / "half")
    reword(folder, tokenizer_3=[None, None])
    with pytest.raises(ValueError, match=r"expected T5 \(text_encoder_3\) with its tokenizer_3"):
        load_pipeline(folder)


def test_a_single_file_is_told_from_a_folder(tmp_path: Path) -> None:
    file = FAMILIES["sd"]() / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"expected a diffusers model folder, got a single file; .*from_single_file"):
        load_pipeline(file)
