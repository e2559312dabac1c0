"""Model families: name of the stock diffusers pipeline -> the class that serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffalign.assets import asset
from diffalign.errors import first_line
from diffalign.pipelines.attention import set_attention
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.parts import check_all_parts
from diffalign.table import resolve

PIPELINES: dict[str, str] = {
    "StableDiffusionPipeline": "diffalign.pipelines.sd:StableDiffusion",
    "StableDiffusionXLPipeline": "diffalign.pipelines.sdxl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "diffalign.pipelines.sd3:StableDiffusion3",
    "AnimateDiffPipeline": "diffalign.pipelines.animatediff:AnimateDiff",
    "CogVideoXPipeline": "diffalign.pipelines.cogvideox:CogVideoX",
    "WanPipeline": "diffalign.pipelines.wan:Wan",
}
UNSERVED: dict[str, str] = {  # what to do instead, where more is to be said than that a family is not there
    "StableDiffusionXLImg2ImgPipeline": (
        "the SDXL refiner, with its one text encoder and aesthetic score, is not served; train the base on the "
        "refiner's times with method.time_high: 0.2 (a base that was saved under this class: load it as "
        "StableDiffusionXLPipeline and save it again)"
    ),
}
SHIPPED = ("tiny-sd", "tiny-sdxl", "tiny-sd3", "tiny-sd-turbo")  # folders of diffalign.assets that are models


def locate(name_or_path: str | Path) -> str:
    """A shipped model's name becomes its folder; anything else stays what it is: a folder or a hub id."""
    if str(name_or_path) in SHIPPED and not Path(name_or_path).exists():
        return str(asset(str(name_or_path)))
    return str(name_or_path)


def load_pipeline(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    attention: str = "auto",
    max_sequence_length: int | None = None,
) -> LatentPipeline:
    """Loads a stock diffusers folder, a hub id or a shipped model ("tiny-sd") of any family of `PIPELINES`.

    Args:
        attention: the kernel of the network's attention, a row of `diffalign.pipelines.attention.BACKENDS`.
        max_sequence_length: tokens that T5's prompts are padded or cut to, where the family has a T5 (256 of SD3).
            Fewer are faster: of SD3 each token of a prompt costs what one of the picture does.

    Raises:
        ValueError: not a diffusers pipeline, not to be had, or of a family that is not served; the message says which.
            Or an attention backend that does not run here, or a length that the family does not take.
    """
    folder = locate(name_or_path)
    index = _index(folder, revision)
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        raise ValueError(
            f"{name_or_path}: expected a pipeline of {', '.join(PIPELINES)}, got {name}; "
            f"{UNSERVED.get(name, 'a new family is one file in pipelines/ and one row in its table')}"
        )
    family: type[LatentPipeline] = resolve(PIPELINES, name, "model family")
    check_all_parts(folder, index, family.parts)
    pipe = family.load(folder, dtype=dtype, device=device, revision=revision, variant=variant)
    set_attention(pipe.network, attention)
    if max_sequence_length is not None:
        pipe.set_max_sequence_length(max_sequence_length)
    return pipe


def as_pipeline(pipe: Any) -> LatentPipeline:
    """A `LatentPipeline` as it is, a stock diffusers pipeline in the class of its family, a name or folder loaded.

    The weights of a stock pipeline are shared, not copied; its own calls stay as they are.

    Raises:
        ValueError: nothing of that, or a family that is not served.
    """
    if isinstance(pipe, LatentPipeline):
        return pipe
    if isinstance(pipe, str | Path):
        return load_pipeline(pipe)
    name = type(pipe).__name__
    if name not in PIPELINES:
        raise ValueError(f"expected a LatentPipeline, the name of a model, or a stock pipeline of "
                         f"{', '.join(PIPELINES)}, got {name}")  # fmt: skip
    family: type[LatentPipeline] = resolve(PIPELINES, name, "model family")
    return family(pipe, str(pipe.config.get("_name_or_path") or name))


def _index(folder: str, revision: str | None) -> dict[str, Any]:
    """What model_index.json says."""
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"{folder}: expected a diffusers model folder, got a single file; convert it with diffusers' "
                         f"from_single_file(...).save_pretrained(...), and give that folder")  # fmt: skip
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"{folder}: expected a diffusers model folder with a model_index.json, found none; "
            f"save one with pipe.save_pretrained(...), or convert a single file with diffusers' from_single_file"
        )
    try:
        index = DiffusionPipeline.load_config(folder, revision=revision)
    except (OSError, ValueError) as error:
        if path.exists():
            raise ValueError(f"{folder}: model_index.json cannot be read ({first_line(error, 200)}); download or save "
                             f"the model again") from error  # fmt: skip
        raise ValueError(
            f"{folder}: neither a folder that exists nor a model that can be had from the hub "
            f"({first_line(error, 200)}); check the spelling, the network (HF_HUB_OFFLINE), and access to gated models"
        ) from error
    if not isinstance(index, dict):
        raise ValueError(f"{folder}: expected model_index.json to hold one mapping, got {type(index).__name__}; "
                         f"download or save the model again")  # fmt: skip
    return index
