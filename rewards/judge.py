"""A vision-language model as a judge: it looks at one picture and a caption and writes a score.

`vlm` asks in our own words; `unifiedreward` in those that UnifiedReward was trained on (Wang et al. 2025, arXiv
2503.05236). Who is asked is an `Asker`: an OpenAI-compatible endpoint, or a model on this machine.

An answer without one plain score on the scale is missing: NaN, with a reason in `reasons`. A judge can be talked round
by what stands in a caption or a picture. That it answers off the scale, twice or not at all is seen here; that it
gives a high score is not.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from PIL import Image
from torch import Tensor

from diffalign.answers import Asker, in_order
from diffalign.rewards.base import Card, Images, dispatch
from diffalign.rewards.judge_parse import POINT_PARSERS
from diffalign.rewards.judge_templates import Template, load_template
from diffalign.rewards.missing import MISSING, of_clips, tell_missing
from diffalign.table import build

ASKERS: dict[str, str] = {
    "endpoint": "diffalign.endpoint:Endpoint",
    "local": "diffalign.rewards.local_vlm:LocalVLM",
}


def load_asker(judge: Asker | Mapping[str, Any], device: torch.device | str = "cpu") -> Asker:
    """Who is asked: an object as it is, or a section such as {"base_url": ..., "model": ...}.

    Args:
        judge: a section's `name` is a row of `ASKERS` (endpoint if not given) or a dotted path, the rest its keywords.
        device: for one that runs here.

    Raises:
        ValueError: unknown name or keyword, or what the asker itself finds wrong.
    """
    if not isinstance(judge, Mapping):
        return judge
    asker: Asker = build(ASKERS, {"name": "endpoint", **judge}, what="judge", device=device)
    return asker


class _Judge(ABC):
    """Scores on the template's scale, or (score - low) / (high - low) with `normalize`; NaN where there is none.

    `reasons` keeps, of the latest call, why a picture has no score; "" where it has one. A clip's score is the mean
    over its frames, and missing if one of them is.

    Args:
        judge: who is asked; a section of `ASKERS`, or an object with `ask`.
        normalize: scores in [0, 1].
        device: of a judge that runs here.

    Raises:
        ValueError: a section that does not fit; when called, an endpoint that was never reached.
    """

    name: ClassVar[str]
    card: Card

    def __init__(self, judge: Asker | Mapping[str, Any], template: Template, normalize: bool, device: Any) -> None:
        self.asker, self.template, self.normalize = load_asker(judge, device), template, normalize
        self.reasons: list[str] = []
        self.card = replace(self.card, range=(0.0, 1.0) if normalize else template.scale)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`."""
        scores = dispatch(self.name, images, prompts, exact=self._score, differentiable=None)
        self.reasons = of_clips(self.reasons, len(images))
        tell_missing(self.name, self.reasons)
        return scores

    def _score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        verdicts = in_order(self._judge_one, list(zip(pictures, prompts, strict=True)), self.asker.workers)
        self.reasons = [reason for _, reason in verdicts]
        return torch.tensor([score for score, _ in verdicts])

    def _judge_one(self, item: tuple[Image.Image, str]) -> tuple[float, str]:
        """(score, "") or (NaN, reason)."""
        picture, caption = item
        answer = self.asker.ask([picture], self.template.question(caption))
        if answer.text is None:
            return MISSING, answer.reason
        low, high = self.template.scale
        try:
            score = self.template.parse(answer.text, self.template.scale)
        except ValueError as error:
            return MISSING, str(error)
        return ((score - low) / (high - low) if self.normalize else score), ""


def _card(scale: tuple[float, float], source: str, code: str) -> Card:
    return Card(
        unit="points of the template",
        range=scale,
        source=source,
        code=code,
        weights="the model's own",
        differentiable=False,
        side=None,
        across_prompts=True,
        checked="formula only",
    )


@final
class VLM(_Judge):
    """Any vision-language model, asked for points from 1 to 10 in our own words, or with a template of yours.

    Args:
        judge: {"base_url": ..., "model": ...} and the other keywords of `Endpoint`; {"name": "local", "weights": ...}
            for a model on this machine; or an object with `ask`.
        template: "vlm", "unifiedreward", or a json file like those in assets/judges.
        normalize: scores in [0, 1] instead of points.
        device: of a judge that runs here.

    Raises:
        ValueError: a section or a template that does not fit; when called, an endpoint that was never reached.
    """

    name: ClassVar[str] = "vlm"
    card = _card((1.0, 10.0), "assets/judges/vlm.json", "Apache-2.0")

    def __init__(
        self,
        *,
        judge: Asker | Mapping[str, Any],
        template: str | Path = "vlm",
        normalize: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(judge, load_template(template, POINT_PARSERS), normalize, device)


@final
class UnifiedReward(_Judge):
    """UnifiedReward's point score, 1 to 5, for alignment and quality together; its words are part of the model.

    It deviates from the released client: pictures go as PNG, not JPEG; quotes, line breaks and brackets of a caption
    are escaped; what cannot be read is missing, not 0. Flow-GRPO shrinks pictures to 512 and divides by 5.

    Args:
        judge: as for `VLM`; the endpoint serves CodeGoat24/UnifiedReward-qwen-7b or a sibling.
        normalize: (score - 1) / 4, in [0, 1].
        device: of a judge that runs here.

    Raises:
        ValueError: a section that does not fit; when called, an endpoint that was never reached.
    """

    name: ClassVar[str] = "unifiedreward"
    card = _card((1.0, 5.0), "CodeGoat24/UnifiedReward-qwen-*; arXiv 2503.05236", "MIT")

    def __init__(
        self, *, judge: Asker | Mapping[str, Any], normalize: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(judge, load_template("unifiedreward", POINT_PARSERS), normalize, device)
