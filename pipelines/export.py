"""A saved LoRA as other programs read it: ComfyUI, AUTOMATIC1111, kohya's scripts.

Files go in and out; no model is loaded. What a key looks like was read from the loaders' behavior, and every layout is
loaded back through diffusers in the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.pipelines.lora import weights_file
from diffalign.writing import replacing

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PEFT = "lora_adapter_metadata"  # where diffusers keeps rank and alpha
_BASE_VERSIONS = {"sd": "sd_v1", "sdxl": "sdxl_base_v1-0", "sd3": "sd3"}  # what kohya's scripts call the families


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in diffusers' format: per module A [rank, in, ...] and B [out, rank, ...], with scale alpha / rank."""

    prefix: str  # "unet" or "transformer"
    modules: Mapping[str, tuple[Tensor, Tensor]]
    alpha: float
    metadata: Mapping[str, str]  # all that the file says of itself

    @property
    def rank(self) -> int:
        return len(next(iter(self.modules.values()))[0])


def read_lora(path: str | Path) -> LoraFile:
    """Reads a file that we, or stock diffusers, saved.

    Raises:
        ValueError: no such file, another format, several networks in one file, or ranks that differ between layers.
    """
    file = weights_file(Path(path))
    try:
        with safe_open(file, "pt") as stored:
            metadata = dict(stored.metadata() or {})
            state = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    prefixes = {key.split(".", 1)[0] for key in state}
    names = sorted({key.split(".", 1)[-1].rsplit(".lora_", 1)[0] for key in state})
    expected = {f"{prefix}.{n}.lora_{side}.weight" for prefix in prefixes for n in names for side in "AB"}
    if len(prefixes) != 1 or not prefixes <= {"unet", "transformer"} or set(state) != expected:
        raise ValueError(
            f"{file}: expected a LoRA in diffusers' format, keys like unet.….lora_A.weight or "
            f"transformer.….lora_A.weight of one network, got keys like {min(state, default='none')}"
        )
    prefix = prefixes.pop()
    modules = {n: (state[f"{prefix}.{n}.lora_A.weight"], state[f"{prefix}.{n}.lora_B.weight"]) for n in names}
    ranks = {len(down) for down, _ in modules.values()}
    config = json.loads(metadata.get(_PEFT, "{}"))
    if len(ranks) > 1 or config.get(f"{prefix}.alpha_pattern"):
        raise ValueError(f"{file}: expected one rank and one alpha for all layers, got ranks {sorted(ranks)}")
    rank = ranks.pop()
    return LoraFile(prefix, modules, float(config.get(f"{prefix}.lora_alpha", rank)), metadata)


def as_diffusers(lora: LoraFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Its own format again, for another dtype."""
    state: dict[str, Tensor] = {}
    for name, (down, up) in lora.modules.items():
        state |= {f"{lora.prefix}.{name}.lora_A.weight": down, f"{lora.prefix}.{name}.lora_B.weight": up}
    return state, dict(lora.metadata)


def as_kohya(lora: LoraFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What ComfyUI and AUTOMATIC1111 read.

    U-Nets get `lora_unet_*` keys with an alpha each. For SD3 there is no such layout that all of them read: its keys
    stay diffusers', and the scale is folded into B, since stock diffusers refuses an alpha key there.
    """
    metadata = {**lora.metadata, **_kohya_metadata(lora)}
    if lora.prefix == "transformer":
        scale = lora.alpha / lora.rank
        folded = LoraFile(lora.prefix, {n: (down, up * scale) for n, (down, up) in lora.modules.items()},
                          lora.rank, lora.metadata)  # fmt: skip
        config = json.loads(metadata.get(_PEFT, "{}"))
        config |= {"transformer.r": lora.rank, "transformer.lora_alpha": lora.rank}
        return as_diffusers(folded)[0], {**metadata, _PEFT: json.dumps(config, indent=2, sort_keys=True)}
    state: dict[str, Tensor] = {}
    for name, (down, up) in lora.modules.items():
        key = "lora_unet_" + name.replace(".", "_")
        state |= {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(lora.alpha),
        }
    metadata.pop(_PEFT, None)  # the alphas say it, and diffusers would read it twice
    return state, metadata


FORMATS: dict[str, Callable[[LoraFile], tuple[dict[str, Tensor], dict[str, str]]]] = {
    "kohya": as_kohya,
    "diffusers": as_diffusers,
}


def export_lora(source: str | Path, out: Path, form: str = "kohya", dtype: str = "fp32") -> Path:
    """Writes a LoRA file or run folder in another format, in one piece; returns the file.

    Raises:
        ValueError: an unknown format or dtype, or a source that is no LoRA in diffusers' format.
    """
    if form not in FORMATS or dtype not in DTYPES:
        raise ValueError(f"expected a format of {', '.join(FORMATS)} and a dtype of {', '.join(DTYPES)}, "
                         f"got {form!r} and {dtype!r}")  # fmt: skip
    state, metadata = FORMATS[form](read_lora(source))
    tensors = {key: value.to(DTYPES[dtype]).contiguous() for key, value in state.items()}
    with replacing(out) as partial:
        save_file(tensors, partial, metadata=metadata)
    return out


def _kohya_metadata(lora: LoraFile) -> dict[str, str]:
    said = json.loads(lora.metadata.get("diffalign", "{}"))
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(lora.alpha),
        "ss_base_model_version": _BASE_VERSIONS.get(said.get("family"), "unknown"),
        "ss_sd_model_name": str(said.get("base_model", "unknown")),
    }
