"""BLIP's image-text matching: does this text describe this picture? Li et al. 2022, arXiv 2201.12086, section 3.2.

    probability = softmax(itm(BERT(prompt | ViT(picture))[CLS]))[1]
    logit       = itm[1] - itm[0], so that probability = sigmoid(logit)
    cosine      = cos(W_image ViT(picture)[CLS], W_text BERT(prompt)[CLS])

The probability saturates near 0 and 1, and its gradient with it: train with the logit. The cosine is the contrastive
head, for which the text is read without the picture, and so once however many pictures it is asked of.

Not checked against scores of the official code, with small or with released weights: there were none. Checked are the
two networks, by ImageReward's scores, and the whole, by transformers' port of it on small weights. The key list of the
official file follows from its training code (models/blip_retrieval.py), not from the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.rewards.base import Card
from diffalign.rewards.blip import (
    BertSizes,
    MedBert,
    ViT,
    ViTSizes,
    bert_sizes,
    loaded,
    resized_positions,
    shape_of,
    vit_sizes,
)
from diffalign.rewards.blip_score import BlipScore, tokenized, too_long
from diffalign.rewards.checkpoints import UrlFile, read_state
from diffalign.rewards.preprocess import square_recipe
from diffalign.rewards.texts import NetworkReader, TextFeatures
from diffalign.rewards.towers import dtype_named

NAME = "model_base_retrieval_coco.pth"
FILE = UrlFile(f"https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/{NAME}", NAME)
POSITIONS = "visual_encoder.pos_embed"
UNUSED = (
    "visual_encoder_m.", "text_encoder_m.", "vision_proj_m.", "text_proj_m.",  # momentum copies
    "image_queue", "text_queue", "idx_queue", "ptr_queue", "temp",  # of the contrastive loss
    "text_encoder.embeddings.position_ids",
)  # fmt: skip


@final
class BlipMatcher(nn.Module):
    """The keys of model_base_retrieval_coco.pth that matching reads. Its heads are fp32 whatever the rest."""

    def __init__(self, vision: ViTSizes, text: BertSizes, shared: int) -> None:
        super().__init__()
        self.visual_encoder, self.text_encoder = ViT(vision), MedBert(text)
        self.vision_proj, self.text_proj = nn.Linear(vision.width, shared), nn.Linear(text.width, shared)
        self.itm_head = nn.Linear(text.width, 2)

    def logit(self, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """log(p / (1 - p)) of a match, [B], fp32, of pixels [B, 3, side, side] and tokens [B, N]."""
        first = self.text_encoder(ids, mask, self.visual_encoder(x))[:, 0]
        no, yes = self.itm_head(first.float()).unbind(-1)
        return yes - no

    def image_features(self, x: Tensor) -> Tensor:
        """[B, D], fp32, in the contrastive space, not normalized."""
        features: Tensor = self.vision_proj(self.visual_encoder(x)[:, 0].float())
        return features


@final
@dataclass(frozen=True)
class ContrastiveReader(NetworkReader):
    """The text side of the contrastive space, of a `BlipMatcher`'s text_encoder and text_proj."""

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """[B, D], fp32, in the space of `BlipMatcher.image_features`, not normalized."""
        read = self.model["text_encoder"](*tokenized(prompts, self.device))[:, 0]
        features: Tensor = self.model["text_proj"](read.float())
        return features

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        return too_long(prompts)


@dataclass(frozen=True)
class Output:
    """One of the numbers that the network gives.

    Args:
        of_logit: what becomes of the log-odds of a match; None for the cosine, which has none.
    """

    of_logit: Callable[[Tensor], Tensor] | None
    unit: str
    range: tuple[float, float]
    across_prompts: bool


OUTPUTS = {
    "probability": Output(torch.sigmoid, "probability of a match", (0.0, 1.0), across_prompts=True),
    "logit": Output(nn.Identity(), "log-odds of a match", (-float("inf"), float("inf")), across_prompts=True),
    "cosine": Output(None, "cos", (-1.0, 1.0), across_prompts=False),
}


@final
class BlipITM(BlipScore):
    """BLIP's verdict on a picture and a text.

    Args:
        weights: instead of a download from the authors' page: model_base_retrieval_coco.pth, a folder that holds it,
            or one of its siblings (large, Flickr30k), or a file of the same keys.
        output: "probability", "logit" or "cosine".
        device: where the network lives; pixels are brought there.
        dtype: of the two transformers: float32, bfloat16 or float16. Pictures and the heads are fp32 whatever it is.
        side: pixels of the square that pictures are resized to; positions of another size are interpolated.
        vision_heads: attention heads of the ViT; None is width / 64, 12 as released.
        text_heads: those of the BERT; None is width / 64, 12 as released.

    Raises:
        ValueError: a checkpoint that is not to be had, or of another layout; an unknown output; a side that is no
            multiple of the ViT's patch.
    """

    name: ClassVar[str] = "blip-itm"
    card = Card(
        unit=OUTPUTS["probability"].unit,
        range=OUTPUTS["probability"].range,
        source=f"{FILE.name} of github.com/salesforce/BLIP; arXiv 2201.12086",
        code="BSD-3-Clause",
        weights="not stated",
        differentiable=True,
        side=384,
        across_prompts=True,
        checked="formula only",
    )

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        output: str = "probability",
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        side: int = 384,
        vision_heads: int | None = None,
        text_heads: int | None = None,
    ) -> None:
        kind = dtype_named(dtype)
        if output not in OUTPUTS:
            raise ValueError(f"output: expected one of {', '.join(OUTPUTS)}, got {output!r}")
        path = FILE.locate(self.name, weights)
        state = _for_side(_model(path), side, path)
        vision = vit_sizes(state, "visual_encoder.", path, vision_heads)
        text = bert_sizes(state, "text_encoder.", path, text_heads)
        shared = shape_of(state, "vision_proj.weight", 2, path)[0]
        self.network = loaded(lambda: BlipMatcher(vision, text, shared), state, path, UNUSED, device)
        self.network.visual_encoder.to(kind)
        self.network.text_encoder.to(kind)
        super().__init__(square_recipe(side))
        sides = {"text_encoder": self.network.text_encoder, "text_proj": self.network.text_proj}
        self._reader = ContrastiveReader(nn.ModuleDict(sides).eval())
        self._texts = TextFeatures(new=lambda prompts: self._tell_cut(self._reader.too_long(prompts)))
        self.output = chosen = OUTPUTS[output]
        self.card = replace(
            self.card, unit=chosen.unit, range=chosen.range, side=side, across_prompts=chosen.across_prompts
        )

    def _score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        device = self.network.itm_head.weight.device
        if self.output.of_logit:
            return self.output.of_logit(self.network.logit(x.to(device), *self._tokens(prompts, device)))
        seen = F.normalize(self.network.image_features(x.to(device)), dim=-1)
        return (seen * self._texts(self._reader, prompts)).sum(-1)


def _model(path: Path) -> dict[str, Any]:
    state = read_state(path)
    if not isinstance(state.get("model"), Mapping):
        raise ValueError(f"{path}: expected the official container {{'model': ...}}, got {sorted(state)[:3]}")
    return dict(state["model"])


def _for_side(state: dict[str, Any], side: int, path: Path) -> dict[str, Any]:
    patch = shape_of(state, "visual_encoder.patch_embed.proj.weight", 4, path)[-1]
    if side < patch or side % patch:
        raise ValueError(f"side: expected a multiple of the patch, {patch} pixels, got {side}")
    shape_of(state, POSITIONS, 3, path)
    return state | {POSITIONS: resized_positions(state[POSITIONS], side // patch, path)}
