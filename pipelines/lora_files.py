"""What a LoRA file is for, as far as its keys, shapes and metadata tell; a wrong one is refused with the reason.

Loaders pass over keys that they do not know, so that a LoRA of another network may load in part and in silence. Here
every module of the file must be in the network, with its shape, before anything is attached. Only the file's header is
read, no weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

FAMILIES = {"sd": "Stable Diffusion 1.x or 2.x", "sdxl": "SDXL", "sd3": "SD3 or SD3.5"}
# what a U-Net's prompt embeddings are wide, and what the blocks of a transformer are
CROSS_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
BLOCK_WIDTHS = {1536: "SD3 or SD3.5 medium", 2432: "SD3.5 large", 3072: "FLUX"}
MARKS = (  # parts of keys that one family alone has
    ("single_transformer_blocks", "FLUX"), ("double_blocks", "FLUX"), ("single_blocks", "FLUX"),
    ("joint_blocks", "SD3 or SD3.5"), ("lora_unet_input_blocks", "SDXL"), ("lora_te2_", "SDXL"),
)  # fmt: skip
KOHYA = re.compile(r"lora_(unet|te\d?|transformer)_")
TEXT = re.compile(r"text_encoder(_\d)?\.|lora_te\d?_")
DOWN = r"(?:lora_A|lora_down|lora\.down|_lora\.down)(?:\.weight)?$"
CROSS = re.compile(r"attn2[._](?:processor\.)?to_k[._].*?" + DOWN + r"|attn2\.processor\.to_k" + DOWN)
BLOCK = re.compile(r"^(?!unet)\w+\.transformer_blocks\.\d+\.attn\.(?:to_q|add_k_proj)\." + DOWN)
# (module, which of the two matrices); old files of diffusers name the attention processor
MODULE = re.compile(r"(.+)\.(lora_A|lora_B|lora\.down|lora\.up)\.weight")
PROCESSOR = re.compile(r"(.+)\.processor\.(to_\w+)_lora\.(down|up)\.weight")


@dataclass(frozen=True)
class LoraHeader:
    """The keys of a LoRA file with their shapes, and its metadata."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @property
    def layout(self) -> str:
        """kohya, or diffusers, which this toolkit reads."""
        return "kohya" if any(KOHYA.match(key) for key in self.shapes) else "diffusers"

    @property
    def cross_width(self) -> int | None:
        """Of the prompt embeddings that a U-Net's LoRA was made for."""
        return next((shape[1] for key, shape in self.shapes.items() if CROSS.search(key)), None)

    def modules(self, prefix: str) -> Iterator[tuple[str, int, int]]:
        """(name in the network, dimension of its weight, size there) for every matrix under a prefix."""
        for key, shape in self.shapes.items():
            inner = key.removeprefix(f"{prefix}.")
            if inner == key:
                continue
            if match := PROCESSOR.fullmatch(inner):
                name = f"{match[1]}.{match[2]}".replace(".to_out", ".to_out.0")
                down = match[3] == "down"
            elif match := MODULE.fullmatch(inner):
                name, down = match[1], match[2] in ("lora_A", "lora.down")
            else:
                continue
            yield (name, 1, shape[1]) if down else (name, 0, shape[0])


def read_header(file: Path) -> LoraHeader:
    """Keys, shapes and metadata of a safetensors file.

    Raises:
        ValueError: not readable as one, or without a single LoRA key.
    """
    try:
        with safe_open(file, "pt") as stored:
            shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
            header = LoraHeader(file, shapes, dict(stored.metadata() or {}))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a LoRA: expected a whole safetensors file, which this is not ({error}); "
                         f"download or save it again") from error  # fmt: skip
    if not any("lora" in key for key in shapes):
        raise ValueError(f"{file}: not a LoRA: none of its {len(shapes)} keys names one, they are like "
                         f"{min(shapes, default='none')!r}; give the file that training a LoRA wrote")  # fmt: skip
    return header


def made_for(header: LoraHeader) -> str:
    """The network that a file says or shows it was made for, in words.

    >>> made_for(LoraHeader(Path(), {"unet.mid_block.attn2.to_k.lora_A.weight": (4, 2048)}, {}))
    'SDXL (cross-attention width 2048)'
    """
    said = _own_metadata(header)
    width = header.cross_width
    block = next((shape[1] for key, shape in header.shapes.items() if BLOCK.search(key)), None)
    kind = (
        FAMILIES.get(str(said.get("family")))
        or CROSS_WIDTHS.get(width or 0)
        or next((name for mark, name in MARKS if any(mark in key for key in header.shapes)), None)
        or BLOCK_WIDTHS.get(block or 0)
        or "an unknown network"
    )
    found = [f"cross-attention width {width}"] if width else [f"blocks of width {block}"] if block else []
    found += [f"trained on {said['base_model']}"] if "base_model" in said else []
    version = header.metadata.get("ss_base_model_version") or header.metadata.get("modelspec.architecture")
    found += [f"its metadata says {version}"] if version else []
    return f"{kind} ({', '.join(found)})" if found else kind


def refuse_foreign(header: LoraHeader, network: nn.Module, prefix: str, name: str, family: str) -> None:
    """Returns if the file fits the network, and is all for it.

    Args:
        prefix: what the network is called in the file: "unet" or "transformer".
        name: of the model, for the message.

    Raises:
        ValueError: another network, family or layout, scales that would be lost, or weights of text encoders.
    """
    config: Any = network.config
    width = config.get("cross_attention_dim") if prefix == "unet" else None
    if reason := _not_for(header, network, prefix, width):
        told = f", cross-attention width {width}" if isinstance(width, int) else ""
        title = FAMILIES.get(family, family)
        raise ValueError(f"{header.file}: expected a LoRA in diffusers' layout for the {prefix} of {name} "
                         f"({title}{told}), got one for {made_for(header)}, {reason}")  # fmt: skip
    if reason := _would_be_lost(header, prefix):
        raise ValueError(f"{header.file}: {reason}")


def _not_for(header: LoraHeader, network: nn.Module, prefix: str, width: Any) -> str:
    """Why the file is not for this network, or nothing."""
    elsewhere = "load it onto the model that it was made for"
    if header.layout == "kohya":
        same = prefix == "unet" and header.cross_width in (None, width)
        advice = "save it in diffusers' layout, with save_lora_weights" if same else elsewhere
        return f"in kohya's layout, with keys like {min(header.shapes)}; {advice}"
    if not any(key.startswith(f"{prefix}.") for key in header.shapes):
        return f"with no key under {prefix!r} but keys like {min(header.shapes)}; {elsewhere}"
    matrices = list(header.modules(prefix))
    if strange := [text for text in (_strange(network, *matrix) for matrix in matrices) if text]:
        return f"which does not fit: {strange[0]} ({len(strange)} of {len(matrices)} weights); {elsewhere}"
    return ""


def _would_be_lost(header: LoraHeader, prefix: str) -> str:
    """What the file holds beside weights of the network, and loaders pass over, or nothing."""
    if alphas := [key for key in header.shapes if key.endswith(".alpha")]:
        return (f"expected the scale in the metadata, as diffusers and peft save it, got {len(alphas)} keys like "
                f"{alphas[0]}, which would be passed over; save it again with save_lora_weights")  # fmt: skip
    if text := [key for key in header.shapes if TEXT.match(key)]:
        return (f"expected weights of the {prefix} alone, got {len(text)} of {len(header.shapes)} for text encoders, "
                f"such as {text[0]}: those are neither trained nor changed here, and without them the LoRA is another; "
                f"save it again without them if that is meant")  # fmt: skip
    return ""


def _strange(network: nn.Module, module: str, dimension: int, size: int) -> str:
    """What is wrong with a matrix for this module, or nothing."""
    try:
        weight = network.get_submodule(module).weight
    except AttributeError:
        return f"there is no module {module}"
    assert isinstance(weight, nn.Parameter)
    if weight.shape[dimension] == size:
        return ""
    return f"{module} has {weight.shape[dimension]} {('outputs', 'inputs')[dimension]}, the file's {size}"


def _own_metadata(header: LoraHeader) -> dict[str, Any]:
    try:
        said = json.loads(header.metadata.get("diffalign", "{}"))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
