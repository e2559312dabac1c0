"""A run as a flat YAML file with sections for rows of tables, strict in every key, with dotted overrides.

    pretrained_model_name_or_path: tiny-sd
    learning_rate: 1e-4
    method: {name: dpo, beta: 5000}
    data: {name: pickapic, path: pairs.parquet}

`RunConfig` is the whole list of keys. Nothing here imports torch.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffalign.methods import DEFAULTS
from diffalign.strict_yaml import apply_override, read_yaml
from diffalign.table import coerce, split_section, unknown
from diffalign.writing import write_text

PACKAGED = Path(__file__).resolve().parent / "configs"
if not PACKAGED.is_dir():  # a checkout on a machine without symlinks
    PACKAGED = Path(__file__).resolve().parent.parent / "configs"

CHOICES: dict[str, tuple[str, ...]] = {
    "train": ("lora", "full", "user"),
    "micro_conditioning": ("data", "fixed"),
    "posterior": ("sample", "mean"),
    "lr_scheduler": ("constant", "constant_with_warmup", "linear", "cosine"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "report_to": ("tensorboard", "wandb", "trackio", "none"),
}
POSITIVE = (
    "resolution", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "max_train_steps",
    "max_grad_norm", "checkpointing_steps", "logging_steps", "max_nonfinite_steps", "validation_batch_size",
)  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """The adapter. alpha: scale is alpha / rank (None: the rank); targets: module endings or a regular expression."""

    rank: int = 16
    alpha: float | None = None
    targets: list[str] | str | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class RunConfig:
    """Every key of a training run; names are those that diffusers users know."""

    pretrained_model_name_or_path: str  # folder, hub id, or a shipped model such as tiny-sd
    data: dict[str, Any] = field(default_factory=dict)  # a row of DATASETS and its keywords
    revision: str | None = None
    variant: str | None = None
    output_dir: str | None = None  # default: runs/<name of the config>
    resolution: int = 512  # pixels of the short side, and of the crop
    height: int | None = None  # of the crop in pixels; None: the resolution
    width: int | None = None
    num_frames: int | None = None  # of clips; None for pictures
    fps: float | None = None  # frames a second that clips are seen at; None: every frame of a file
    max_sequence_length: int | None = None  # tokens of T5, as a prompt is padded or cut to; None: the stock pipeline's
    random_crop: bool = False  # else the center
    random_flip: bool = False  # one flip for both pictures of a pair
    micro_conditioning: str = "data"  # data | fixed: what SDXL is told of sizes and crops (pipelines/sdxl.py)

    posterior: str = "sample"  # sample | mean: of the VAE's latents of a picture; or as the method has it

    train: str = "lora"  # lora | full | user (the second cross-attention of ppd)
    lora: LoraConfig = field(default_factory=LoraConfig)
    init_lora: str | None = None  # continue this LoRA instead of a fresh one
    method: dict[str, Any] = field(default_factory=lambda: {"name": "dpo"})
    train_timesteps: list[int] | None = None  # train at these times of the network alone: [249, 499, 749, 999] of Turbo
    reference: dict[str, Any] = field(default_factory=lambda: {"name": "adapter_off"})  # or as the method has it
    selection: dict[str, Any] = field(default_factory=lambda: {"name": "all"})  # of the training examples, or likewise
    users: dict[str, Any] = field(default_factory=lambda: {"name": "clip"})  # of train: user: embedder, shots
    rewards: dict[str, Any] = field(default_factory=dict)  # name: weight, or name: {weight, keywords}

    train_batch_size: int = 4  # pairs per device and microbatch
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-5
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: int = 0
    max_train_steps: int = 1000
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    mixed_precision: str = "no"  # no | fp16 | bf16; LoRA weights and losses are fp32 in each
    attention: str = "auto"  # auto | flash | cudnn | efficient | math | xformers | flash_attn | flash_attn_3
    gradient_checkpointing: bool | None = None  # None: only when the run would not fit the memory without
    memory_gb: float | None = None  # what the run may take; None: what the GPU has free
    compile: bool = False  # the repeated blocks of the network, each kind once
    cuda_graph: bool = False  # record a step once and replay it: for small batches, where launching costs most
    ema_decay: float | None = None  # keep averaged weights, and save those as the result
    prompt_dropout: float = 0.1  # share of pairs trained with the empty prompt, for guidance
    max_nonfinite_steps: int = 10  # stop after so many steps in a row whose loss is not finite

    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = 3
    resume_from_checkpoint: str | None = None  # latest | checkpoint-<step> | a path
    report_to: str = "tensorboard"  # tensorboard | wandb | trackio | none
    logging_steps: int = 10
    validation_steps: int | None = None  # None: only before the first and after the last step
    early_stopping_patience: int | None = None  # stop after so many validations without a better held-out accuracy
    decoded_latents: int | None = None  # of a clip, from the first, that rewards with a gradient see; None: all
    reward_timeout: float | None = None  # seconds after which pictures count as without a score; null waits
    reward_retries: int = 2  # further attempts at a reward that raises an error
    validation_batch_size: int = 16
    validation_prompts: list[str] = field(default_factory=list)  # pictures of these are drawn at each validation
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    validation_seed: int = 0
    seed: int = 0
    cache_dir: str = "runs/cache"  # latents and embeddings, shared between runs
    cpu: bool = False  # train on the CPU although there is a GPU

    @property
    def method_name(self) -> str:
        return str(self.method["name"])

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the crop, buckets left aside."""
        return self.height or self.resolution, self.width or self.resolution

    @property
    def extent(self) -> tuple[int, ...]:
        """`size`, of clips (height, width, frames)."""
        return self.size if self.num_frames is None else (*self.size, self.num_frames)

    @property
    def reference_name(self) -> str:
        return str(self.reference["name"])


def load_config(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """A packaged name ("tiny-sd/dpo"), a path, or a mapping, with `a.b=value` overrides, checked key by key.

    Raises:
        ValueError: no such file, bad YAML, an unknown key (with the nearest one), a value of the wrong type or range.
    """
    if isinstance(config, Mapping):
        values, name = {**config}, "run"
    else:
        path = find_config(config)
        values, name = read_yaml(path), run_name(path)
    for override in overrides:
        apply_override(values, override)
    values.setdefault("output_dir", f"runs/{name}")
    return resolve(values)


def packaged_configs() -> list[str]:
    """Names of the configs that ship, such as "tiny-sd/dpo"; the folder accelerate/ has launch files, not runs."""
    files = [path.relative_to(PACKAGED).with_suffix("") for path in PACKAGED.rglob("*.yaml")]
    return sorted(str(file) for file in files if file.parts[0] != "accelerate")


def find_config(name: str | Path) -> Path:
    """A path as it is, else a packaged config of that name.

    Raises:
        ValueError: neither; lists what is packaged.
    """
    if Path(name).is_file():
        return Path(name)
    if (packaged := str(name).removesuffix(".yaml")) in packaged_configs():
        return PACKAGED / f"{packaged}.yaml"
    raise unknown("config", str(name), packaged_configs())


def run_name(path: Path) -> str:
    """What a run of this config is called: "tiny-sd-dpo" for the packaged tiny-sd/dpo, else the name of the file."""
    path, home = path.resolve(), PACKAGED.resolve()
    return "-".join(path.relative_to(home).with_suffix("").parts) if path.is_relative_to(home) else path.stem


def resolve(values: Mapping[str, Any]) -> RunConfig:
    """A mapping as a `RunConfig`, each value checked.

    Raises:
        ValueError: names the key, what was expected and what came.
    """
    hints = typing.get_type_hints(RunConfig)
    for key in values:
        if key not in hints:
            raise unknown("config key", key, hints)
    if "pretrained_model_name_or_path" not in values:
        raise ValueError("the config has no pretrained_model_name_or_path: the model to train, such as tiny-sd")
    checked = {key: _checked(key, value, hints[key]) for key, value in values.items()}
    method = checked["method"]["name"] if "method" in checked else "dpo"
    config = RunConfig(**copy.deepcopy(DEFAULTS.get(method, {})) | checked)
    _check_ranges(config)
    return config


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain values, in the order of `RunConfig`."""
    return dataclasses.asdict(config)


def dump(config: RunConfig, path: Path) -> None:
    """Writes the resolved config as YAML, in one piece."""
    write_text(path, yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True))


def _checked(key: str, value: Any, hint: Any) -> Any:
    if key == "lora":
        return _lora(value)
    if key in ("method", "reference", "selection", "data", "users"):
        name, keywords = split_section(value, key)
        return {"name": name, **keywords}
    if key == "validation_prompts":
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"validation_prompts: expected a list of texts, got {value!r}")
        return value
    if key == "train_timesteps" and value is not None and (type(value) is not list or {*map(type, value)} != {int}):
        raise ValueError(f"train_timesteps: expected a list such as [249, 499, 749, 999], or null, got {value!r}")
    if key == "rewards":
        if not isinstance(value, Mapping):
            raise ValueError(f"rewards: expected name: weight lines, got {value!r}")
        return dict(value)
    value = "no" if key == "mixed_precision" and value is False else value  # YAML 1.1 reads a bare no as False
    return coerce(value, hint, key)


def _lora(value: Any) -> LoraConfig:
    if isinstance(value, LoraConfig):
        return value
    hints = typing.get_type_hints(LoraConfig)
    if not isinstance(value, Mapping):
        raise ValueError(f"lora: expected a section such as {{rank: 16}}, got {value!r}")
    for key in value:
        if key not in hints:
            raise unknown("key of lora", str(key), hints)
    lora = LoraConfig(**{key: coerce(item, hints[key], f"lora.{key}") for key, item in value.items()})
    if lora.rank < 1 or not 0 <= lora.dropout < 1:
        raise ValueError(
            f"lora: expected a rank of at least 1 and a dropout in [0, 1), got {lora.rank}, {lora.dropout}"
        )
    return lora


def _check_ranges(config: RunConfig) -> None:
    for key, allowed in CHOICES.items():
        if getattr(config, key) not in allowed:
            raise ValueError(f"{key}: expected one of {', '.join(allowed)}, got {getattr(config, key)!r}")
    for key in POSITIVE:
        if not getattr(config, key) > 0:
            raise ValueError(f"{key}: expected a number above 0, got {getattr(config, key)!r}")
    if config.reward_timeout is not None and not config.reward_timeout > 0:
        raise ValueError(f"reward_timeout: expected seconds above 0, or null to wait, got {config.reward_timeout!r}")
    for key in ("lr_warmup_steps", "adam_weight_decay", "adam_epsilon", "reward_retries"):
        if getattr(config, key) < 0:
            raise ValueError(f"{key}: expected a number of at least 0, got {getattr(config, key)!r}")
    for key in ("seed", "validation_seed"):
        if not 0 <= getattr(config, key) < 2**32:
            raise ValueError(f"{key}: expected a number from 0 to 2^32 - 1, got {getattr(config, key)!r}")
    if config.memory_gb is not None and config.memory_gb <= 0:
        raise ValueError(f"memory_gb: expected a number above 0, or null for what is free, got {config.memory_gb!r}")
    for key in ("height", "width", "num_frames", "fps", "decoded_latents"):
        if getattr(config, key) is not None and not 0 < getattr(config, key) < math.inf:
            raise ValueError(f"{key}: expected a number above 0, or null, got {getattr(config, key)!r}")
    for key in ("fps", "decoded_latents"):
        if getattr(config, key) is not None and config.num_frames is None:
            raise ValueError(f"{key} is of clips: set num_frames too, or leave it out")
    for key in ("checkpoints_total_limit", "validation_steps", "early_stopping_patience"):
        if getattr(config, key) is not None and getattr(config, key) < 1:
            raise ValueError(f"{key}: expected a number of at least 1, or null for none, got {getattr(config, key)!r}")
    for key in ("prompt_dropout", "ema_decay", "adam_beta1", "adam_beta2"):
        value = getattr(config, key)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{key}: expected a number in [0, 1], got {value!r}")
