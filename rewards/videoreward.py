"""VideoReward of VideoAlign: Qwen2-VL-2B with a LoRA, asked for three qualities of a clip. Liu et al. 2025, arXiv
2501.13918.

    r_d = (W h_d - mean_d) / std_d   at the tokens <|VQ_reward|>, <|MQ_reward|>, <|TA_reward|>
    overall = r_VQ + r_MQ + r_TA

VQ is visual quality, MQ quality of motion, TA alignment with the prompt; means and deviations are in model_config.json
beside the weights. Deviations from the released code: frames are those of the clip that is given, because a tensor does
not say its frame rate (the released code takes 2 per second, at least 4, spread as `frames` spreads them); the LoRA is
merged into the weights, in fp32; a caption cannot spell a token of the model; nothing that fails becomes a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor

from diffalign.rewards.base import Card, Images
from diffalign.rewards.clips import dispatch_clips, spread
from diffalign.rewards.qwen_pictures import FRAMES
from diffalign.rewards.qwen_pictures import frames as qwen_frames
from diffalign.rewards.qwen_reward import QwenReader, load_tokenizer
from diffalign.rewards.rubrics import asked
from diffalign.rewards.towers import dtype_named
from diffalign.rewards.videoreward_files import REPO, TOKENS, find_files, load_network, read_settings

LEAST = 128 * 28 * 28  # pixels of a frame; the most is in model_config.json
DIMENSIONS = ("overall", "vq", "mq", "ta")


@final
class VideoReward:
    """The sum of the three qualities, or one of them.

    A picture is a clip of one frame, which stands there twice, as every odd frame at the end does; what its MQ says is
    open, since nothing moves.

    Args:
        weights: folder with model_config.json and checkpoint-N, or hub id, instead of KwaiVGI/VideoReward.
        base: folder or hub id of Qwen2-VL-2B-Instruct, which the LoRA was trained on.
        device: where the network lives; clips are brought there.
        dtype: of the transformer: bfloat16 as released, float16 or float32. The head is fp32 whatever it is.
        dimension: "overall", "vq", "mq" or "ta".
        frames: how many are watched, spread over the clip; even. None watches all.
        normalize: the z-scores of the paper; without, what the head gives.

    Raises:
        ValueError: a checkpoint that is not to be had, or of another layout; an unknown dimension or an odd number of
            frames; when called, frames whose sides differ by more than a factor of 200.
    """

    name: ClassVar[str] = "videoreward"
    card: Card = Card(
        unit="sum of z-scores",
        range=(-float("inf"), float("inf")),
        source=f"{REPO}; arXiv 2501.13918",
        code="MIT",
        weights="not stated; the code is MIT",
        differentiable=True,
        side=None,
        across_prompts=False,
        checked="official code, small weights",
    )

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        base: str = "Qwen/Qwen2-VL-2B-Instruct",
        device: torch.device | str = "cpu",
        dtype: str = "bfloat16",
        dimension: str = "overall",
        frames: int | None = None,
        normalize: bool = True,
    ) -> None:
        if dimension not in DIMENSIONS:
            raise ValueError(f"videoreward.dimension: expected one of {', '.join(DIMENSIONS)}, got {dimension!r}")
        if frames is not None and (frames < FRAMES or frames % FRAMES):
            raise ValueError(f"videoreward.frames: expected an even number from 2 on, got {frames}; the network reads "
                             f"frames in pairs")  # fmt: skip
        kind = dtype_named(dtype)
        files = find_files(self.name, weights)
        settings = read_settings(files.config, normalize)
        tokenizer = load_tokenizer(base, TOKENS, self.name)
        model, head = load_network(files, settings, base, len(tokenizer), kind, self.name)
        ids = tuple(tokenizer.convert_tokens_to_ids(token) for token in TOKENS)
        self.reader = QwenReader(model.to(device), tokenizer, ids, "video")
        self.head = head.to(device)
        self.settings, self.dimension, self.frames = settings, dimension, frames
        if dimension != "overall" or not normalize:
            unit = "z-score" if normalize else "what the head gives"
            self.card = replace(self.card, unit=unit if dimension != "overall" else f"sum of three, {unit}")

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of clips [B, F, 3, H, W] or pictures; see `Reward.__call__`."""
        return dispatch_clips(self.name, images, prompts, self._score, differentiable=True)

    def qualities(self, clips: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """[B, 3], VQ, MQ and TA of B clips [F, 3, H, W], uint8 or float in [0, 1], with the gradient of float ones."""
        most = self.settings.most_pixels
        seen = [qwen_frames(clip[spread(len(clip), self.frames)], LEAST, most) for clip in clips]
        questions = [asked("videoreward", prompt, self.reader.tokenizer) for prompt in prompts]
        states = self.reader(seen, questions)
        given = readout(states, self.head)
        return (given - given.new_tensor(self.settings.means)) / given.new_tensor(self.settings.deviations)

    def _score(self, clips: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        found = self.qualities(clips, prompts)
        return found.sum(1) if self.dimension == "overall" else found[:, DIMENSIONS.index(self.dimension) - 1]


def readout(states: Tensor, head: Tensor) -> Tensor:
    """[B, 3] of states [B, 3, D] and a head [1, D], or [3, D] with a row for each token."""
    if head.shape[0] == 1:
        return (states @ head.T)[..., 0]
    return torch.einsum("btd,td->bt", states, head)
