"""VideoScore: Mantis-Idefics2-8B with a regression head, asked for five qualities of a clip. He et al. 2024, arXiv
2406.15252.

    (s_1 .. s_5) = W h + b,   h the last hidden state of the last token

The five were trained on labels from 1 to 4 and may leave that range. Only layout and call are checked: the class of the
released code is not part of transformers and was rebuilt from its description, and no score of it was at hand. The
frames go through the checkpoint's own processor, so there is no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, Idefics2Model, Idefics2PreTrainedModel

from diffalign.errors import first_line
from diffalign.rewards.base import Card, Images
from diffalign.rewards.clips import dispatch_clips
from diffalign.rewards.preprocess import to_pictures
from diffalign.rewards.rubrics import asked
from diffalign.rewards.towers import dtype_named

REPO = "TIGER-Lab/VideoScore"
QUALITIES = ("visual", "temporal", "dynamic", "alignment", "factual")


@final
class VideoScoreNetwork(Idefics2PreTrainedModel):
    """`model.` and `score.` of the released checkpoint."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Idefics2Model(config)
        self.score = nn.Linear(config.text_config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, **inputs: Any) -> Tensor:
        """[1, 5], fp32, of what the processor made of one clip; the head is fp32 whatever the rest."""
        last = self.model(**inputs, use_cache=False).last_hidden_state[:, -1].float()
        return nn.functional.linear(last, self.score.weight.float(), self.score.bias.float())


@final
class VideoScore:
    """The mean of the five qualities, or one of them. Clips are scored one at a time; a picture is a clip of one frame.

    Args:
        weights: folder or hub id with model and processor, instead of TIGER-Lab/VideoScore (TIGER-Lab/VideoScore-v1.1
            takes 48 frames).
        device: where the network lives.
        dtype: of the network: bfloat16 as released, float16 or float32.
        dimension: "mean", "visual" (quality), "temporal" (consistency), "dynamic" (degree), "alignment" (with the
            prompt) or "factual" (consistency).
        frames: how many are watched of a clip that has more, at equal distances from the first.

    Raises:
        ValueError: a checkpoint that is not to be had, or of another layout; an unknown dimension, no frames.
    """

    name: ClassVar[str] = "videoscore"
    card: ClassVar[Card] = Card(
        unit="points, 1 to 4 as trained",
        range=(-float("inf"), float("inf")),
        source=f"{REPO}; arXiv 2406.15252",
        code="MIT",
        weights="not stated; the code is MIT",
        differentiable=False,
        side=None,
        across_prompts=True,
        checked="formula only",
    )

    def __init__(
        self,
        *,
        weights: str | Path = REPO,
        device: torch.device | str = "cpu",
        dtype: str = "bfloat16",
        dimension: str = "mean",
        frames: int = 16,
    ) -> None:
        if dimension not in ("mean", *QUALITIES):
            raise ValueError(f"videoscore.dimension: expected one of mean, {', '.join(QUALITIES)}, got {dimension!r}")
        if frames < 1:
            raise ValueError(f"videoscore.frames: expected at least 1, got {frames}")
        network, self.processor = _loaded(str(weights), dtype_named(dtype))
        self.network = network.to(device).requires_grad_(False).eval()
        self.dimension, self.frames = dimension, frames

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of clips [B, F, 3, H, W] or pictures; see `Reward.__call__`. Floats are rounded to 8 bits."""
        return dispatch_clips(self.name, images, prompts, self._score, differentiable=False)

    def qualities(self, clip: Tensor, prompt: str) -> Tensor:
        """[5] of a clip [F, 3, H, W], uint8."""
        pictures = to_pictures(clip[stepped(len(clip), self.frames)])
        text = asked("videoscore", prompt, self.processor.tokenizer) + "<image> " * len(pictures)
        inputs = self.processor(text=text, images=pictures, return_tensors="pt")
        return self.network(**inputs.to(self.network.device, self.network.dtype))[0]

    def _score(self, clips: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        found = torch.stack([self.qualities(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)])
        return found.mean(1) if self.dimension == "mean" else found[:, QUALITIES.index(self.dimension)]


def stepped(count: int, taken: int) -> list[int]:
    """Which of `count` frames the released script takes: 0, count / taken, 2 count / taken ... floored; or all."""
    # its own expression: floats floor to another frame than fractions here and there, and may give one frame too many
    return np.arange(0, count, count / taken).astype(int)[:taken].tolist() if count > taken else list(range(count))


def _loaded(weights: str, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        config: Any = AutoConfig.from_pretrained(weights)
        processor: Any = AutoProcessor.from_pretrained(weights)
        if config.model_type != "idefics2":
            raise ValueError(f"its model_type is {config.model_type}, not idefics2")
        loaded: Any = VideoScoreNetwork.from_pretrained(weights, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"videoscore: expected {weights} to be the folder or hub id of a VideoScore with its processor, "
            f"could not load it ({first_line(error)}); with a network, run `hf download {weights}` once, or give "
            f"weights=FOLDER, on the command line --weights videoscore=FOLDER"
        ) from error
    network, report = loaded
    wrong = {"lacks": sorted(report["missing_keys"]), "has also": sorted(report["unexpected_keys"])}
    if faults := [f"{fault} {', '.join(keys[:3])}{' ...' * (len(keys) > 3)}" for fault, keys in wrong.items() if keys]:
        raise ValueError(f"{weights}: expected the checkpoint of VideoScore; it {'; it '.join(faults)}")
    if network.score.out_features != len(QUALITIES):
        raise ValueError(f"{weights}: expected a head of {len(QUALITIES)} qualities, got {network.score.out_features}")
    return network, processor
