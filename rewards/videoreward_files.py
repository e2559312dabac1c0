"""VideoReward's files as its repository has them: model_config.json and, in checkpoint-N, a LoRA or a whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.checkpoints import check_keys, fetch_folder, read_state
from diffalign.rewards.lora_layout import Factors, merged, plain_names, split_factors
from diffalign.rewards.qwen_reward import load_base, load_body, new_names

REPO = "KwaiVGI/VideoReward"
TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
QUALITIES = ("VQ", "MQ", "TA")
WHOLE, ADAPTER, OTHERS = "model.pth", "adapter_model.safetensors", "non_lora_state_dict.pth"
WANTED = ("model_config.json", f"checkpoint-*/{WHOLE}", f"checkpoint-*/{ADAPTER}", f"checkpoint-*/{OTHERS}")
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Files:
    """config: model_config.json. checkpoint: the folder of the latest step."""

    config: Path
    checkpoint: Path


@dataclass(frozen=True)
class Settings:
    """What model_config.json says of the model that no weight's shape tells."""

    scale: float  # of the LoRA
    excluded: tuple[str, ...]  # parts of names that have no LoRA
    rows: int  # of the head
    most_pixels: int  # of a frame
    means: tuple[float, ...]
    deviations: tuple[float, ...]


def find_files(reward: str, weights: str | Path | None) -> Files:
    """
    Raises:
        ValueError: not to be had, or a folder without these files.
    """
    folder = fetch_folder(reward, REPO, weights, WANTED)
    steps = {path: int(path.name.split("-")[-1]) for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    if not steps or not (folder / "model_config.json").is_file():
        raise ValueError(f"weights of {reward}: expected a folder with model_config.json and checkpoint-N, as {REPO} "
                         f"has them, found neither or only one at {folder}")  # fmt: skip
    return Files(folder / "model_config.json", max(steps, key=lambda path: steps[path]))


def read_settings(path: Path, normalize: bool) -> Settings:
    """
    Args:
        normalize: takes the means and deviations of the file; else 0 and 1.

    Raises:
        ValueError: an entry that is missing or that asks for another model than this one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, lora, data = content["model_config"], content["peft_lora_config"], content["data_config"]
        settings = Settings(
            scale=lora["lora_alpha"] / (math.sqrt(lora["lora_r"]) if lora.get("use_rslora") else lora["lora_r"]),
            excluded=_excluded(lora),
            rows=int(model["output_dim"]),
            most_pixels=int(data["max_frame_pixels"]),
            means=_constants(content, "mean", normalize),
            deviations=_constants(content, "std", normalize),
        )
        asked = {"use_special_tokens": model["use_special_tokens"], "reward_token": model["reward_token"],
                 "prompt_template_type": data["prompt_template_type"]}  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the model_config.json of VideoReward, got {type(error).__name__}: {error}"
                         ) from error  # fmt: skip
    wanted = {"use_special_tokens": True, "reward_token": "special", "prompt_template_type": "detailed_special"}
    if asked != wanted or settings.rows not in (1, len(QUALITIES)):
        raise ValueError(f"{path}: expected a model that reads {len(QUALITIES)} reward tokens after the detailed "
                         f"prompt ({wanted}, output_dim 1 or 3), got {asked}, output_dim {settings.rows}")  # fmt: skip
    return settings


def _excluded(lora: Mapping[str, Any]) -> tuple[str, ...]:
    names = lora.get("lora_namespan_exclude") or []
    return (*names, *(() if lora.get("vision_lora") else ("visual",)))


def _constants(content: Mapping[str, Any], what: str, normalize: bool) -> tuple[float, ...]:
    if not normalize:
        return (0.0 if what == "mean" else 1.0,) * len(QUALITIES)
    if not content.get("inference_config"):
        raise ValueError("no inference_config with means and deviations; normalize=False does without")
    return tuple(float(content["inference_config"][f"{quality}_{what}"]) for quality in QUALITIES)


def load_network(
    files: Files, settings: Settings, base: str, words: int, dtype: torch.dtype, reward: str
) -> tuple[Any, Tensor]:
    """(a frozen Qwen2VLModel with the LoRA in its weights, head [1 or 3, D] in fp32).

    Args:
        base: where the weights come from that the checkpoint has not; not read of but for its config if it has all.
        words: length of the tokenizer's vocabulary.

    Raises:
        ValueError: a missing or surplus key, or another shape.
    """
    whole = files.checkpoint / WHOLE
    if whole.is_file():
        state, factors = split_factors(plain_names(read_state(whole)), whole)
        head = _head(state, settings, whole)
        state = _merge_all(state, factors, settings, whole)
        body = {key: value for key, value in state.items() if key not in ("lm_head.weight", "rm_head.weight")}
        return load_body(body, base, words, whole, dtype, reward), head
    adapter = files.checkpoint / ADAPTER
    if not adapter.is_file() or not (files.checkpoint / OTHERS).is_file():
        raise ValueError(f"{files.checkpoint}: expected {WHOLE}, or {ADAPTER} and {OTHERS}, as {REPO} has them")
    found = plain_names(read_state(adapter)) | plain_names(read_state(files.checkpoint / OTHERS))
    state, factors = split_factors(found, adapter)
    head = _head(state, settings, files.checkpoint / OTHERS)
    return _adapted(base, words, state, factors, settings, adapter, dtype, reward), head


def _head(state: dict[str, Tensor], settings: Settings, where: Path) -> Tensor:
    head = state.get("rm_head.weight")
    if head is None or head.ndim != 2 or head.shape[0] != settings.rows:
        found = "nothing" if head is None else list(head.shape)
        raise ValueError(f"{where}: expected rm_head.weight [{settings.rows}, width], got {found}")
    return head.float()


def _adapted(
    base: str, words: int, state: Mapping[str, Tensor], factors: Mapping[str, Factors],
    settings: Settings, where: Path, dtype: torch.dtype, reward: str
) -> Any:  # fmt: skip
    """The base model with some weights replaced and some changed by a LoRA."""
    model = load_base(base, words, dtype, reward)
    own = model.state_dict()
    # what is trained beside the LoRA: the vision tower, the embedding (for the rows of its new tokens) and the head
    replaced = {key: value for key, value in state.items() if key not in ("lm_head.weight", "rm_head.weight")}
    wanted = {key: own[key].shape for key in own if key.startswith("visual.")}
    wanted["language_model.embed_tokens.weight"] = own["language_model.embed_tokens.weight"].shape
    check_keys(wanted, new_names(replaced), where.parent / OTHERS, "VideoReward beside its LoRA")
    changed = _merge_all(_old_names(own), factors, settings, where)
    model.load_state_dict(new_names(changed) | new_names(replaced))
    return model


def _merge_all(
    state: Mapping[str, Tensor], factors: Mapping[str, Factors], settings: Settings, where: Path
) -> dict[str, Tensor]:
    """Every linear map that is not excluded must have its factors; names are those of transformers 4.45."""
    linear = {key.removesuffix(".weight") for key, value in state.items()
              if key.endswith(".weight") and value.ndim == 2 and key != EMBEDDING}  # fmt: skip
    wanted = {module for module in linear if not any(part in module for part in settings.excluded)}
    if factors.keys() and (different := sorted(wanted ^ factors.keys())):
        raise ValueError(f"{where}: expected LoRA factors of every linear map outside {', '.join(settings.excluded)}, "
                         f"and of no other; not so for {', '.join(different[:3])}"
                         f"{' ...' * (len(different) > 3)}")  # fmt: skip
    changed = {f"{module}.weight": merged(state[f"{module}.weight"], pair, settings.scale, f"{where}: {module}")
               for module, pair in factors.items()}  # fmt: skip
    return dict(state) | changed


def _old_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("language_model.", "model.", 1) if key.startswith("language_model.") else key: value
            for key, value in state.items()}  # fmt: skip
