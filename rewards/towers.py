"""Loads CLIP and SigLIP checkpoints, from transformers or open_clip, behind one face: features of either side."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import open_clip
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPModel, SiglipModel

from diffalign.assets import asset
from diffalign.errors import first_line
from diffalign.rewards.checkpoints import download, is_hub_id, revision_of
from diffalign.rewards.preprocess import Recipe
from diffalign.rewards.texts import NetworkReader, longer_than
from diffalign.rewards.tower_recipes import open_clip_recipe, siglip_recipe, transformers_recipe

OPEN_CLIP = "open_clip:"
SHIPPED = ("tiny-clip",)  # folders of diffalign.assets
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNUSED = ("position_ids",)  # ends of keys that old checkpoints hold and nothing reads
KINDS: dict[str, Any] = {"clip": CLIPModel, "siglip": SiglipModel}  # by model_type; SigLIP 2 of a fixed size too


class Tower(Protocol):
    """Two encoders into one space; frozen, fp32, in eval mode."""

    @property
    def recipe(self) -> Recipe:
        """How pictures are made ready for `image_features`."""

    def image_features(self, x: Tensor) -> Tensor:
        """[B, D], not normalized, with gradient, of what `recipe` returned."""

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """[B, D], not normalized; prompts are cut where the encoder stops reading."""

    @property
    def scale(self) -> float:
        """exp(logit_scale) of the checkpoint, about 100 for every released CLIP."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def state(self) -> Hashable:
        """Another value after its weights have moved, changed their type or were overwritten."""

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of which the encoder reads only a part."""


def dtype_named(name: str) -> torch.dtype:
    """
    Raises:
        ValueError: none of `DTYPES`.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def load_tower(
    model: str,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    *,
    dtype: str = "float32",
    reward: str = "clip",
) -> Tower:
    """A CLIP or SigLIP checkpoint by name.

    Args:
        model: a folder or hub id of a transformers CLIPModel or SiglipModel, "tiny-clip", or
            "open_clip:ARCHITECTURE/TAG".
        weights: instead of the model's own: the checkpoint's folder or another hub id, or for open_clip a file.
        dtype: of the weights: float32, bfloat16 or float16.
        reward: for messages.

    Raises:
        ValueError: not to be had, or not a CLIP; the message says what to do.
    """
    kind = dtype_named(dtype)
    known = weights is None or Path(weights).exists() or (is_hub_id(weights) and not model.startswith(OPEN_CLIP))
    if not known:
        raise ValueError(f"weights of {model}: expected a local file or folder, found nothing at {weights}")
    if model.startswith(OPEN_CLIP):
        return _load_open_clip(model.removeprefix(OPEN_CLIP), weights, device, kind, reward)
    return _load_transformers(str(weights or _locate(model)), device, kind, reward)


@dataclass(frozen=True)
class TransformersTower(NetworkReader):
    """A stock CLIPModel or SiglipModel with its tokenizer."""

    tokenizer: Any
    recipe: Recipe

    @property
    def _siglip(self) -> bool:
        return bool(self.model.config.model_type == "siglip")

    def image_features(self, x: Tensor) -> Tensor:
        x = x.to(self.model.device, self.model.dtype)
        return _projected(self.model.get_image_features(pixel_values=x)).float()

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        # SigLIP was trained on prompts padded to their full length, and reads the padding
        padding = "max_length" if self._siglip else True
        tokens = self.tokenizer(
            list(prompts), padding=padding, truncation=True, max_length=self._context, return_tensors="pt"
        ).to(self.model.device)
        mask = None if self._siglip else tokens.attention_mask
        return _projected(self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=mask)).float()

    @property
    def scale(self) -> float:
        return float(self.model.logit_scale.exp())

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        return longer_than(self._context, self.tokenizer, prompts)

    @property
    def _context(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)


@dataclass(frozen=True)
class OpenCLIPTower(NetworkReader):
    """An open_clip model with its tokenizer."""

    tokenizer: Any
    recipe: Recipe

    def image_features(self, x: Tensor) -> Tensor:
        logit_scale = self.model.logit_scale  # the one parameter that every open_clip model has under this name
        features: Tensor = self.model.encode_image(x.to(logit_scale.device, logit_scale.dtype))
        return features.float()

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        ids = self.tokenizer(list(prompts), context_length=self._context)
        features: Tensor = self.model.encode_text(ids.to(self.model.logit_scale.device))
        return features.float()

    @property
    def scale(self) -> float:
        return float(self.model.logit_scale.exp())

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        # one column more than the encoder reads: only a prompt that is too long has anything but padding in it
        ids = self.tokenizer([*prompts, ""], context_length=self._context + 1)[:, -1]
        return [prompt for prompt, last in zip(prompts, ids[:-1] != ids[-1], strict=True) if last]

    @property
    def _context(self) -> int:
        return int(self.model.context_length)


def _projected(output: Any) -> Tensor:
    """transformers 5 returns an object whose pooler_output is the projected feature; 4 returned the feature itself."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _locate(model: str) -> str:
    if model in SHIPPED and not Path(model).exists():
        return str(asset(model))
    return model


def _load_transformers(folder: str, device: torch.device | str, dtype: torch.dtype, reward: str) -> TransformersTower:
    revision = revision_of(folder)
    try:
        kind = AutoConfig.from_pretrained(folder, revision=revision).model_type
        if kind not in KINDS:
            raise ValueError(f"its model_type is {kind}, not {' or '.join(KINDS)}")
        # the dtype is explicit: transformers 5 would load an fp16 file as an fp16 model, also on a CPU
        loaded: Any = KINDS[kind].from_pretrained(
            folder, revision=revision, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(_not_to_be_had(folder, error, reward)) from error
    clip, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder}: the checkpoint lacks weights of a CLIPModel: {missing[:3]} ...")
    if surplus := sorted(key for key in report["unexpected_keys"] if not key.endswith(UNUSED)):
        raise ValueError(f"{folder}: the checkpoint has weights that a CLIPModel has not: {surplus[:3]} ...")
    size = clip.config.vision_config.image_size
    recipe = siglip_recipe(folder, size) if kind == "siglip" else transformers_recipe(folder, size)
    return TransformersTower(clip.requires_grad_(False).eval().to(device, dtype), tokenizer, recipe)


def _not_to_be_had(folder: str, error: Exception, reward: str) -> str:
    reason = first_line(error)
    if Path(folder).exists():
        return (
            f"{folder}: expected the folder of a CLIPModel with its tokenizer, as save_pretrained writes it: {reason}"
        )
    return (
        f"{folder}: neither a folder here nor to be had from the hub ({reason}); with a network, run "
        f"`{download(folder)}` once, or give a local copy: weights=FOLDER, on the command line "
        f"--weights {reward}=FOLDER"
    )


def _load_open_clip(
    name: str, weights: str | Path | None, device: torch.device | str, dtype: torch.dtype, reward: str
) -> OpenCLIPTower:
    architecture, _, tag = name.partition("/")
    _check_open_clip_names(architecture, tag, weights)
    # tags trained with QuickGELU say so here; open_clip only warns when the architecture's name does not ask for it
    quick_gelu = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu")) if tag else False
    try:
        model = open_clip.create_model(
            architecture, str(weights) if weights else tag, force_quick_gelu=quick_gelu, device=device
        )
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(_open_clip_failed(name, weights, error, reward)) from error
    tokenizer = open_clip.get_tokenizer(architecture)
    return OpenCLIPTower(model.requires_grad_(False).eval().to(dtype), tokenizer, open_clip_recipe(model))


def _open_clip_failed(name: str, weights: str | Path | None, error: Exception, reward: str) -> str:
    reason = first_line(error)
    if weights:
        return f"{weights}: expected an open_clip checkpoint of {name}, could not read it: {reason}"
    repo = open_clip.get_pretrained_cfg(*name.split("/")).get("hf_hub", "").strip("/")
    return (
        f"{OPEN_CLIP}{name}: not to be had from the hub ({reason}); with a network, run `hf download {repo}` once, "
        f"or give a local copy: weights=FILE, on the command line --weights {reward}=FILE"
    )


def _check_open_clip_names(architecture: str, tag: str, weights: str | Path | None) -> None:
    _check_known("architecture", architecture, open_clip.list_models())
    if tag or not weights:
        _check_known(f"tag of {architecture}", tag, open_clip.list_pretrained_tags_by_model(architecture))


def _check_known(what: str, name: str, known: list[str]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    raise ValueError(f"open_clip:ARCHITECTURE/TAG: unknown {what} {name!r}; nearest: {', '.join(near or known[:10])}")
