"""What the training scripts of the shapes models share: learning rate, averaged weights, saving in one piece."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.common import stock_warnings_off
from diffalign.writing import replacing_folder


class _Savable(Protocol):
    def save_pretrained(self, save_directory: str) -> object: ...


def cosine_lr(peak: float, step: int, steps: int, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def update_ema(average: Mapping[str, torch.Tensor], model: torch.nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, in place, buffers included; `average` is a state dict."""
    for old, new in zip(average.values(), model.state_dict().values(), strict=True):
        if old.dtype.is_floating_point:
            old.lerp_(new.to(old.dtype), 1 - decay)
        else:
            old.copy_(new)


def save_atomically(model: _Savable, folder: Path) -> None:
    """Writes the model beside `folder` and renames: a kill leaves the old folder or the new one, never half of one."""
    with replacing_folder(folder) as partial:
        model.save_pretrained(str(partial))
        for file in partial.rglob("*.json"):
            _forget_origin(file)


def _forget_origin(file: Path) -> None:
    """Removes `_name_or_path`, the folder on this machine that a part was loaded from: a shipped file must not tell."""
    text = file.read_text(encoding="utf-8")
    values = json.loads(text)
    if isinstance(values, dict) and "_name_or_path" in values:
        del values["_name_or_path"]
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


class Halved:
    """Saves a pipeline as a stock folder: network and VAE in fp16, the text encoders in fp32.

    transformers 5 loads a model in the dtype of its file while diffusers loads in fp32, so a text encoder in fp16 would
    make a mixed pipeline that fails at its first call.
    """

    def __init__(self, pipe: LatentPipeline) -> None:
        self.pipe = pipe

    def save_pretrained(self, save_directory: str) -> None:
        stock = copy.copy(self.pipe.stock)  # cast in place, tables that are in no file would lose digits for good
        with stock_warnings_off():  # that some parts are cast which diffusers loads in fp32: so it will, from fp16
            for name in (self.pipe.lora_prefix, "vae"):
                stock.register_modules(**{name: copy.deepcopy(getattr(stock, name)).to(torch.float16)})
            stock.save_pretrained(save_directory)
