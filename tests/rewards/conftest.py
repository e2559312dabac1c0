"""A random CLIP checkpoint in transformers' own layout, small enough for every test, and pictures like photographs."""

from __future__ import annotations

import math
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

IMAGE_SIZE, CONTEXT = 32, 24


def fill(model: torch.nn.Module, seed: int) -> None:
    """Weights that make features move a lot with the input; transformers' own are near a constant function."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim >= 2:
                fan_in = math.prod(weight.shape[1:])
                weight.copy_(torch.randn(weight.shape, generator=generator) * (1.3 / math.sqrt(fan_in)))
            elif "norm" not in name and weight.ndim == 1:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))


def tiny_clip(processor: bool = True) -> tuple[CLIPModel, CLIPProcessor]:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    letters = string.ascii_lowercase
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    start, end = len(words) - 2, len(words) - 1
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    text = tower | ids | {"vocab_size": len(words), "max_position_embeddings": CONTEXT}
    vision = tower | {"image_size": IMAGE_SIZE, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    fill(model, seed=7)
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=CONTEXT)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return model, CLIPProcessor(images, tokenizer)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_pretrained` of a CLIPModel and its CLIPProcessor leaves, in fp16 as most checkpoints are."""
    folder = tmp_path_factory.mktemp("clip")
    model, processor = tiny_clip()
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Noise whose spectrum falls as 1/f, as in natural pictures, with a hard edge, on which resizing rings."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(rng.standard_normal((3, height, width)), axes=(1, 2)) / frequency
    waves = np.fft.ifft2(spectrum, axes=(1, 2)).real
    levels = 128 + 50 * waves / waves.std(axis=(1, 2), keepdims=True)
    levels[:, height // 3 : height // 2, width // 4 : width // 2] = rng.choice([10, 245], size=(3, 1, 1))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Landscape, portrait, square, smaller than a tower reads, thin, and one whose crop margin is odd."""
    sizes = [(160, 107), (64, 100), (96, 96), (24, 20), (32, 90), (67, 48)]
    return [photograph(width, height, seed) for seed, (width, height) in enumerate(sizes)]


PROMPTS = ["a red circle", "two blue squares", "", "a cat", "green triangles", "a cup of tea"]


@pytest.fixture
def prompts() -> list[str]:
    return list(PROMPTS)


def as_pixels(picture: Image.Image) -> torch.Tensor:
    """uint8 [1, 3, H, W]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]


@pytest.fixture
def pixels_of():
    return as_pixels


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_pretrained` of a small SiglipModel, its processor and a tokenizer of whole words leaves, in fp16."""
    folder = tmp_path_factory.mktemp("siglip")
    words = ["[PAD]", "[UNK]", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = SiglipTextConfig(**tower, vocab_size=len(words), max_position_embeddings=8, projection_size=32)
    config = SiglipConfig(text_config=text.to_dict(), vision_config=tower | {"image_size": 32, "patch_size": 8})
    model = SiglipModel(config).eval()
    fill(model, seed=3)
    model.half().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
