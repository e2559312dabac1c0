"""Users as tokens: what a few pairs say of somebody's taste, in the space of a CLIP or of a vision-language model.

PPD (arXiv 2501.06655) takes an intermediate hidden state of LLaVA-OneVision that has read N = 4 examples of the user.
`VLMUsers` is that, `CLIPUsers` a small stand-in that needs no language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.rewards.local_vlm import load_vlm
from diffalign.rewards.preprocess import to_rgb
from diffalign.rewards.towers import load_tower
from diffalign.users import Shot


@final
class CLIPUsers:
    """One token per shot, [N, 3 E]: text, preferred picture, and the direction from the other one to it.

        token = [ f_text, f_w, (f_w - f_l) / |f_w - f_l| ]      each of length 1

    The direction is what a taste is; the difference of two unit vectors is small, so it gets a length of its own.

    Args:
        model: folder or hub id of a CLIPModel or SiglipModel, "tiny-clip" (of the shapes world), or
            "open_clip:ARCHITECTURE/TAG".
        weights: local copy to load instead of the hub's.
        device: where the towers live.

    Raises:
        ValueError: a checkpoint that is not to be had.
    """

    def __init__(
        self, *, model: str = "tiny-clip", weights: str | Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.tower = load_tower(model, weights, device, reward="users")

    @torch.no_grad()
    def __call__(self, shots: Sequence[Shot]) -> Tensor:
        pictures = [*(shot.preferred for shot in shots), *(shot.dispreferred for shot in shots)]
        features = self.tower.image_features(self.tower.recipe.pictures([to_rgb(picture) for picture in pictures]))
        better, worse = F.normalize(features, dim=-1).chunk(2)
        text = F.normalize(self.tower.text_features([shot.prompt for shot in shots]), dim=-1)
        return torch.cat([text, better, F.normalize(better - worse, dim=-1)], -1).float().cpu()


@final
class VLMUsers:
    """The last `tokens` positions of a layer's hidden states, [tokens, D], of a model that has read the shots.

    The shots come in one user turn of the model's own chat template, each as its prompt, the preferred and the other
    picture, and then `question`; what is taken lies at the end, where everything before has been read. Which positions
    and which layer the paper takes, and how it asks, is not public: the layer is the middle one by default.

    Args:
        weights: folder or hub id of a model that transformers knows as image-text-to-text, with its processor.
        layer: of the language model, 0 its embeddings, -1 the last; None the middle one.
        tokens: how many positions from the end.
        question: what is asked after the shots.
        device: where it lives.
        dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: a checkpoint that is not to be had or is none of these, or a layer that it does not have.
    """

    def __init__(
        self,
        *,
        weights: str | Path = "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        layer: int | None = None,
        tokens: int = 16,
        question: str = "Describe what this person likes in a picture, and what not.",
        device: torch.device | str = "cpu",
        dtype: str = "bfloat16",
    ) -> None:
        if tokens < 1:
            raise ValueError(f"users.tokens: expected at least 1, got {tokens}")
        self.processor, self.model = load_vlm(weights, device, dtype)
        layers = int(self.model.config.get_text_config().num_hidden_layers)
        self.layer = layers // 2 if layer is None else layer
        if not -layers - 1 <= self.layer <= layers:
            raise ValueError(
                f"users.layer: expected one of {layers} layers, from {-layers - 1} to {layers}, got {layer}"
            )
        self.tokens, self.question = tokens, question

    @torch.no_grad()
    def __call__(self, shots: Sequence[Shot]) -> Tensor:
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": told(shots, self.question)}], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt",
        ).to(self.model.device, self.model.dtype)  # fmt: skip
        states = self.model(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        found: Tensor = states[self.layer][0, -self.tokens :].float().cpu()
        if len(found) < self.tokens:
            raise ValueError(f"users.tokens: expected at most the {len(found)} tokens of the shots, got {self.tokens}")
        return found


def told(shots: Sequence[Shot], question: str) -> list[dict[str, Any]]:
    """The parts of a user turn that shows the shots in their order, then asks."""
    parts: list[dict[str, Any]] = []
    for number, shot in enumerate(shots, 1):
        parts += [
            {"type": "text", "text": f"Example {number}. Prompt: {shot.prompt}\nPreferred: "},
            {"type": "image", "image": to_rgb(shot.preferred)},
            {"type": "text", "text": "\nNot preferred: "},
            {"type": "image", "image": to_rgb(shot.dispreferred)},
            {"type": "text", "text": "\n"},
        ]
    return [*parts, {"type": "text", "text": question}]
