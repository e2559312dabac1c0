"""Which recipe a CLIP or SigLIP checkpoint asks for, read from the settings that it comes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
from transformers.image_processing_base import ImageProcessingMixin

from diffalign.rewards.checkpoints import revision_of
from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, Recipe, hf_recipe, openai_recipe, square_recipe

BICUBIC = 3  # PIL's number for it, as preprocessor_config.json writes it
HALF = (0.5, 0.5, 0.5)
OPEN_CLIP_RECIPES = {"shortest": openai_recipe, "squash": square_recipe}


def _picture_settings(folder: str) -> dict[str, Any] | None:
    """Of the checkpoint's processor; None for one that is only a model."""
    path = Path(folder)
    names = ("preprocessor_config.json", "processor_config.json")
    if path.is_dir() and not any((path / name).is_file() for name in names):
        return None
    settings: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(folder, revision=revision_of(folder))[0]
    return settings


def siglip_recipe(folder: str, image_size: int) -> Recipe:
    """A square of the whole picture; values that are not stated are SigLIP's.

    Raises:
        ValueError: settings of another recipe.
    """
    settings = _picture_settings(folder) or {}
    sides = {_side(settings, "size", side) or image_size for side in ("height", "width")}
    if sides != {image_size} or settings.get("resample", BICUBIC) != BICUBIC:
        raise ValueError(f"{folder}: expected pictures made by a bicubic resize to {image_size} x {image_size}, got "
                         f"{settings}; use a reward of your own for another recipe")  # fmt: skip
    return square_recipe(image_size, tuple(settings.get("image_mean", HALF)), tuple(settings.get("image_std", HALF)))


def transformers_recipe(folder: str, image_size: int) -> Recipe:
    """The checkpoint's own picture settings; one that is only a model, without a processor, gets CLIP's defaults.

    Raises:
        ValueError: settings of another recipe.
    """
    settings = _picture_settings(folder)
    if settings is None:
        return hf_recipe(image_size)
    short, crop = _side(settings, "size", "shortest_edge"), _side(settings, "crop_size", "height")
    if short != crop or crop != image_size or settings.get("resample", BICUBIC) != BICUBIC:
        raise ValueError(
            f"{folder}: expected pictures made by a bicubic resize to a short side of {image_size} and a crop of the "
            f"same, got {settings}; use a reward of your own for another recipe"
        )
    return hf_recipe(crop, tuple(settings.get("image_mean", CLIP_MEAN)), tuple(settings.get("image_std", CLIP_STD)))


def _side(settings: dict[str, Any], key: str, side: str) -> int | None:
    """`key` is a number in old files and a dict in new ones."""
    value = settings.get(key)
    return value.get(side) if isinstance(value, dict) else value


def open_clip_recipe(model: Any) -> Recipe:
    """Of an open_clip model.

    Raises:
        ValueError: a model that does not read square, bicubic pictures.
    """
    settings = open_clip.get_model_preprocess_cfg(model)
    height, width = settings["size"] if isinstance(settings["size"], tuple | list) else (settings["size"],) * 2
    known = settings["resize_mode"] in OPEN_CLIP_RECIPES and settings["interpolation"] == "bicubic"
    if height != width or not known:
        raise ValueError(f"expected a model that reads square, bicubic pictures, got {settings}")
    return OPEN_CLIP_RECIPES[settings["resize_mode"]](height, tuple(settings["mean"]), tuple(settings["std"]))
