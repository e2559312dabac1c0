"""What the rewards that read a picture and a prompt with BLIP's networks share: WordPiece ids, checks, recipes."""

from __future__ import annotations

import gzip
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer

from diffalign.assets import asset
from diffalign.rewards.base import Card, CutPrompts, Images, dispatch
from diffalign.rewards.preprocess import Recipe
from diffalign.rewards.texts import longer_than

VOCABULARY = "bert-base-uncased/vocab.txt.gz"
CONTEXT = 35  # tokens, [CLS] and [SEP] included: BLIP and ImageReward cut and pad to it


class BlipScore(ABC):
    """One number per picture and prompt, from `_score`."""

    name: ClassVar[str]
    card: Card

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._tell_cut = CutPrompts(self.name)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`."""
        return dispatch(self.name, images, prompts, exact=self._score_pictures, differentiable=self._score_pixels)

    @abstractmethod
    def _score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B], fp32, of normalized pixels [B, 3, side, side], from any device, and as many prompts."""

    def _score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._score(self.recipe.pictures(pictures), prompts)

    def _score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(self.recipe.pixels(pixels), prompts)

    def _tokens(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """`tokenized` prompts, on a device; one that is too long is said once."""
        self._tell_cut(too_long(prompts))
        return tokenized(prompts, device)


def tokenized(prompts: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Ids and mask (1 where a token is not padding), both [B, 35], [CLS] first.

    BLIP's other tasks begin a text with [ENC]; ImageReward and BLIP's image-text matching leave [CLS] there.
    """
    tokens = bert_tokenizer()(
        list(prompts), padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    return tokens.input_ids.to(device), tokens.attention_mask.to(device)


def too_long(prompts: Sequence[str]) -> list[str]:
    """The prompts of which only a part is read."""
    return longer_than(CONTEXT, bert_tokenizer(), prompts)


@cache
def bert_tokenizer() -> Any:
    """bert-base-uncased with BLIP's [DEC] (30522) and [ENC] (30523), from the vocabulary that ships with diffalign."""
    words = gzip.decompress(asset(VOCABULARY).read_bytes()).decode("utf-8").rstrip("\n").split("\n")
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
    return tokenizer
