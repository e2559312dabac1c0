"""What the golden scores were computed on, rebuilt: twelve photographs, nine prompts, weights that follow from keys.

The scores in tests/golden were given by the rewards' official codes (torch 2.14, transformers 4.45.2, Pillow 13) on
small checkpoints in the official layout. Their weights are drawn from a generator that the key seeds, so that nothing
but the numbers has to be kept.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image
from transformers import CLIPTokenizer

GOLDEN = Path(__file__).parent / "golden"
NORMS, EMBEDDED = ("norm", "ln_", "layer_norm", "layernorm"), ("embed", "class_token", "cls_token", "pos_emb")


def golden(name: str) -> dict[str, Any]:
    """tests/golden/NAME.json."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@cache
def photographs() -> dict[str, Image.Image]:
    """Name -> picture; the pixels are checked, so that a new version of the packages cannot change them unseen."""
    astronaut, coffee = Image.fromarray(data.astronaut()), Image.fromarray(data.coffee())
    alpha = np.broadcast_to(np.linspace(0, 255, 600).astype(np.uint8), (400, 600))
    made = {
        "astronaut_512": astronaut,
        "coffee_600x400": coffee,
        "chelsea_451x300": Image.fromarray(data.chelsea()),
        "china_640x427": Image.fromarray(load_sample_image("china.jpg")),
        "flower_640x427": Image.fromarray(load_sample_image("flower.jpg")),
        "portrait_256x400": astronaut.crop((100, 0, 356, 400)),
        "small_96x64": coffee.resize((96, 64), Image.Resampling.BOX),
        "exact_224": astronaut.crop((120, 20, 344, 244)),
        "thin_224x100": coffee.crop((100, 100, 324, 200)),
        "gray_L_512": Image.fromarray(data.camera()),
        "alpha_RGBA_600x400": Image.fromarray(np.dstack([np.asarray(coffee), alpha])),
        "palette_P_512": astronaut.quantize(32),
    }
    for name, facts in golden("inputs")["images"].items():
        assert (made[name].mode, list(made[name].size)) == (facts["mode"], facts["size"]), name
        assert hashlib.sha256(np.asarray(made[name].convert("RGB")).tobytes()).hexdigest() == facts["rgb_sha256"], name
    return made


def prompts() -> dict[str, str]:
    """Name -> prompt: plain, empty, too long, with an HTML entity, odd white space ..."""
    return golden("inputs")["prompts"]


def seeded(state: Mapping[str, torch.Tensor], **scalars: float) -> dict[str, torch.Tensor]:
    """The same keys and shapes with the weights of the golden scores, in fp16; scalars as they are given."""
    filled = {key: _weight(key, value) if value.is_floating_point() else value for key, value in state.items()}
    return filled | {key: torch.tensor(value).half() for key, value in scalars.items()}


def _weight(key: str, value: torch.Tensor) -> torch.Tensor:
    shape = tuple(value.shape)
    x = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape, np.float32)
    if len(shape) == 1:
        is_norm = key.endswith("weight") and any(part in key.lower() for part in NORMS)
        x = 1 + 0.1 * x if is_norm else 0.05 * x
    elif any(part in key for part in EMBEDDED):
        x = 0.3 * x
    elif shape:  # in double precision, as numpy's square root makes it
        x = x * (2.0 / np.sqrt(np.prod(shape[1:])) if len(shape) == 4 else 1.3 / np.sqrt(shape[-1]))
    return torch.from_numpy(np.asarray(x, np.float16))


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """OpenAI's vocabulary, which open_clip ships, as a transformers tokenizer."""
    file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(_bytes_to_unicode())
    pairs = [tuple(merge.split()) for merge in merges]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=pairs, model_max_length=77)


def _bytes_to_unicode() -> list[str]:
    """The letters that stand for the 256 bytes, in the vocabulary's order: printable ones first, then the others."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + number) for number in range(len(others)))]


def pixel_sha256(x: torch.Tensor) -> str:
    """Of what a tower reads, fp32."""
    return hashlib.sha256(x.float().contiguous().numpy().tobytes()).hexdigest()
