"""Which color an object has, by CLIP, as GenEval asks it: ten colors, three sentences each, on the object's crop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffalign.rewards.geneval_rules import COLORS, Detection
from diffalign.rewards.towers import Tower

BACKGROUND = (153, 153, 153)  # #999
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


@final
class ColorNamer:
    """The nearest of ten colors; a color's feature is the mean of its sentences' features, all of unit length."""

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, picture: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        """A row of `COLORS` for each of at least one object of the class `name` in an RGB picture."""
        x = self.tower.recipe.pictures([cut_out(picture, one) for one in objects])
        features = F.normalize(self.tower.image_features(x), dim=-1)
        return [COLORS[index] for index in (features @ self._classifier(name).T).argmax(1).tolist()]

    def _classifier(self, name: str) -> Tensor:
        """[10, D] of unit length."""
        if name not in self._known:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            features = F.normalize(self.tower.text_features(texts), dim=-1)
            self._known[name] = F.normalize(features.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)
        return self._known[name]


def cut_out(picture: Image.Image, found: Detection) -> Image.Image:
    """The box of an RGB picture, its bounds rounded, at least one pixel; gray where the object's mask is not.

    GenEval's own code fails on a box that rounds to nothing.
    """
    if found.mask is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, BACKGROUND), Image.fromarray(found.mask))
    left, top, right, bottom = map(round, found.box)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
