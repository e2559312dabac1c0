"""Rewards with random weights at full size for `benchmarks.rewards`, and the plain script that scores with the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor, nn

from diffalign.rewards.base import Reward, Weighted
from diffalign.rewards.blip import BertSizes, ViTSizes
from diffalign.rewards.blip_score import BlipScore, tokenized
from diffalign.rewards.clip import CLIPScore
from diffalign.rewards.cosine import CosineScore
from diffalign.rewards.imagereward import MEAN, STD, ImageReward, ImageRewardNetwork
from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, Recipe, hf_recipe, letterbox_recipe, openai_recipe
from diffalign.rewards.towers import OpenCLIPTower

SIZE = 224
Plain = Callable[[Path, str], float]


@dataclass(frozen=True)
class CountedTower(OpenCLIPTower):
    """Notes the prompts that went through it."""

    encoded: list[str] = field(default_factory=list)

    def text_features(self, prompts: Any) -> Tensor:
        self.encoded.extend(prompts)
        return super().text_features(prompts)


@final
class Cosine(CosineScore):
    """100 cos of a tower that is given."""

    name = "clip"
    card = CLIPScore.card


@final
class RandomImageReward(BlipScore):
    """ImageReward at its full size with random weights."""

    name = "imagereward"
    card = ImageReward.card

    def __init__(self, network: ImageRewardNetwork) -> None:
        super().__init__(openai_recipe(SIZE))
        self.network = network

    def _score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        device = next(self.network.parameters()).device
        return (self.network(x.to(device), *self._tokens(prompts, device)) - MEAN) / STD


@dataclass(frozen=True)
class Scorer:
    """A row of the benchmark.

    Args:
        fresh: the rewards anew, without a prompt in their caches.
        plain: term -> a score the plain way.
        pil_resizes: that PIL does of one picture for all terms: one per recipe; the letterbox is torch's.
        cast: gives the networks the type that is timed; scores are compared before, in fp32.
    """

    name: str
    fresh: Callable[[], Reward]
    plain: dict[str, Plain]
    towers: tuple[CountedTower, ...]
    pil_resizes: int
    cast: Callable[[], object] = lambda: None


def vit_b32(device: str = "cpu", architecture: str = "ViT-B-32") -> Scorer:
    """One CLIP of that size, fp32."""
    tower = _tower(architecture, openai_recipe(SIZE), device, seed=0)
    return Scorer("clip, ViT-B/32", lambda: Cosine(tower, 100.0), {"clip": _plain(tower)}, (tower,), 1)


def vit_b32_twice(device: str = "cpu", architecture: str = "ViT-B-32") -> Scorer:
    """Two with one recipe: what is shared shows."""
    towers = [_tower(architecture, openai_recipe(SIZE), device, seed) for seed in (0, 1)]
    return _together("two of one recipe, ViT-B/32", towers, 1)


def vit_h14(device: str, architecture: str = "ViT-H-14") -> Scorer:
    """HPSv2.1's size and recipe, timed in bf16. Its plain way resizes by torch, as the released code does."""
    tower = _tower(architecture, letterbox_recipe(SIZE), device, seed=0)
    return Scorer("hpsv2.1, ViT-H/14", lambda: Cosine(tower, 100.0), {"clip": _plain(tower)}, (tower,), 0,
                  lambda: tower.model.bfloat16())  # fmt: skip


def four_of_reno(device: str, architecture: str = "ViT-H-14", small: bool = False) -> Scorer:
    """HPSv2, PickScore, CLIP, all ViT-H/14, and ImageReward, timed in bf16; two share a recipe."""
    recipes = {"hpsv2.1": letterbox_recipe(SIZE), "pickscore": hf_recipe(SIZE), "clip": hf_recipe(SIZE)}
    towers = {name: _tower(architecture, recipe, device, seed)
              for seed, (name, recipe) in enumerate(recipes.items())}  # fmt: skip
    network = _imagereward(device, small)
    plain = {name: _plain(tower) for name, tower in towers.items()} | {"imagereward": _plain_blip(network)}

    def fresh() -> Reward:
        terms: dict[str, tuple[Reward, float]] = {name: (Cosine(t, 100.0), 1.0) for name, t in towers.items()}
        return Weighted(terms | {"imagereward": (RandomImageReward(network), 1.0)})

    networks = [network.blip, *(tower.model for tower in towers.values())]
    return Scorer("four of ReNO", fresh, plain, tuple(towers.values()), 2, lambda: [n.bfloat16() for n in networks])


def _together(name: str, towers: list[CountedTower], pil_resizes: int) -> Scorer:
    named = {f"clip {number}": tower for number, tower in enumerate(towers)}
    return Scorer(
        name,
        lambda: Weighted({key: (Cosine(tower, 100.0), 1.0) for key, tower in named.items()}),
        {key: _plain(tower) for key, tower in named.items()},
        tuple(towers),
        pil_resizes,
    )


def _tower(architecture: str, recipe: Recipe, device: str, seed: int) -> CountedTower:
    model: Any = open_clip.create_model(architecture, pretrained=None, device=device).requires_grad_(False).eval()
    _fill(model, seed)
    return CountedTower(model, open_clip.get_tokenizer(architecture), recipe)


def _imagereward(device: str, small: bool) -> ImageRewardNetwork:
    width, layers = (64, 1) if small else (1024, 24)
    vision = ViTSizes(grid=14, patch=16, width=width, hidden=4 * width, layers=layers, heads=width // 64)
    layers = 1 if small else 12
    text = BertSizes(words=30524, positions=512, width=768, seen_width=width, hidden=3072, layers=layers, heads=12)
    with torch.device(device):
        network = ImageRewardNetwork(vision, text).requires_grad_(False).eval()
    _fill(network, seed=0)
    return network


@torch.no_grad()
def _fill(network: nn.Module, seed: int) -> None:
    """Weights that let scores move with pictures and prompts; as they are made, some networks are near a constant."""
    torch.manual_seed(seed)
    for weight in network.parameters():
        if weight.ndim >= 2:
            weight.normal_(std=1.3 / math.sqrt(math.prod(weight.shape[1:])))


def _plain(tower: CountedTower) -> Plain:
    """As a script does it with open_clip alone; on square pictures its crop is that of transformers, too."""
    letterboxed = tower.recipe == letterbox_recipe(SIZE)  # which open_clip's own transform cannot do
    transform = image_transform(SIZE, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    model, tokenizer = tower.model, tower.tokenizer

    @torch.no_grad()
    def score(file: Path, prompt: str) -> float:
        picture = Image.open(file)
        x = tower.recipe.pictures([picture])[0] if letterboxed else transform(picture)
        x = x[None].to(model.logit_scale.device, model.logit_scale.dtype)
        image = F.normalize(model.encode_image(x).float(), dim=-1)
        text = F.normalize(model.encode_text(tokenizer([prompt]).to(x.device)).float(), dim=-1)
        return 100 * (image @ text.T).item()

    return score


def _plain_blip(network: ImageRewardNetwork) -> Plain:
    transform = image_transform(SIZE, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)

    @torch.no_grad()
    def score(file: Path, prompt: str) -> float:
        device = next(network.parameters()).device
        ids, mask = tokenized([prompt], device)
        return ((network(transform(Image.open(file))[None].to(device), ids, mask) - MEAN) / STD).item()

    return score
