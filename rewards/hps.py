"""HPSv2 and HPSv2.1: a CLIP ViT-H/14 fine-tuned on human rankings. Wu et al. 2023, arXiv 2306.09341.

    score = cos(f_image, f_text)

0.23 to 0.29 (v2) and 0.13 to 0.34 (v2.1) with the released weights; benchmark tables give 100 times that. The picture
is neither cropped nor squeezed: its long side becomes 224 and the rest is black. Two faults of the released code are
not repeated: it fails on pictures with an alpha channel, and on oblong ones whose long side is 224 already.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, final

import open_clip
import torch

from diffalign.rewards.base import Card
from diffalign.rewards.checkpoints import HubFile, load_strictly, read_state
from diffalign.rewards.cosine import CosineScore
from diffalign.rewards.preprocess import letterbox_recipe
from diffalign.rewards.towers import OpenCLIPTower, dtype_named

REPO = "xswu/HPSv2"


class _HPS(CosineScore):
    """The cosine of one version.

    Args:
        weights: the official file, a folder that holds it, or a hub id with it, instead of xswu/HPSv2.
        device: where the towers live; pixels are brought there.
        dtype: of the towers: float32, bfloat16 or float16. Pictures are made in fp32 whatever it is.
        architecture: open_clip's name of it; another one only for checkpoints of one's own.
        antialias: as torchvision from 0.17 on resizes; False gives the numbers of 2023, which are off by up to 0.05.

    Raises:
        ValueError: a checkpoint that is not to be had, or of another layout.
    """

    file: ClassVar[str]
    sha256: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        architecture: str = "ViT-H-14",
        antialias: bool = True,
    ) -> None:
        path = HubFile(REPO, self.file, self.sha256).locate(self.name, weights)
        state = read_state(path)
        if "state_dict" not in state:
            raise ValueError(f"{path}: expected the official container {{'state_dict': ...}}, got {sorted(state)[:3]}")
        model = open_clip.create_model(architecture, pretrained=None)
        load_strictly(model, state["state_dict"], path)
        model = model.to(device, dtype_named(dtype)).requires_grad_(False).eval()
        size = open_clip.get_model_preprocess_cfg(model)["size"]
        side = size if isinstance(size, int) else size[0]
        tower = OpenCLIPTower(model, open_clip.get_tokenizer(architecture), letterbox_recipe(side, antialias))
        super().__init__(tower, scale=1.0)


def _card(file: str) -> Card:
    return Card(
        unit="cos",
        range=(-1.0, 1.0),
        source=f"{REPO}, {file}; arXiv 2306.09341",
        code="Apache-2.0",
        weights="Apache-2.0",
        differentiable=True,
        side=224,
        across_prompts=False,
        checked="official code, small weights",
    )


@final
class HPSv2(_HPS):
    """Human Preference Score v2; see `_HPS` for the keywords."""

    name: ClassVar[str] = "hpsv2"
    file: ClassVar[str] = "HPS_v2_compressed.pt"
    card = _card(file)


@final
class HPSv21(_HPS):
    """Human Preference Score v2.1, the one of the public benchmark; see `_HPS` for the keywords."""

    name: ClassVar[str] = "hpsv2.1"
    file: ClassVar[str] = "HPS_v2.1_compressed.pt"
    sha256: ClassVar[str | None] = "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"
    card = _card(file)
